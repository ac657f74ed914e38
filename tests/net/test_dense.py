"""Many agents that all fetch from each other, round after round: nobody's books break. The reference is the content."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from dimat.weights.snapshot import Manifest, verify_file
from tests.net.agents import Agent, join, make, started, weights

pytestmark = [pytest.mark.anyio, pytest.mark.live]


async def one_round(agents: list[Agent], number: int) -> None:
    """Publish a snapshot of 1 MiB each, fetch everybody's, and let go of it."""
    made = {agent.name: agent.publish(number, weights(number * 100 + place)) for place, agent in enumerate(agents)}

    async def fetch(reader: Agent, manifest: Manifest) -> None:
        await reader.ears.offer(manifest.agent, number)
        fetched = await reader.transport.fetch(manifest.agent, number, manifest.payload.root)
        # read while others come, are let go and make room: the content is the publisher's
        await asyncio.to_thread(verify_file, fetched.path, manifest.payload)
        reader.transport.release(manifest.agent, number, manifest.payload.root)

    async with asyncio.TaskGroup() as group:
        for reader in agents:
            for name, manifest in made.items():
                if name != reader.name:
                    group.create_task(fetch(reader, manifest))


@pytest.mark.parametrize(
    ("count", "rounds"),
    [
        (8, 2),
        pytest.param(12, 4, marks=pytest.mark.slow),
        pytest.param(12, 20, marks=pytest.mark.more),
        pytest.param(20, 20, marks=pytest.mark.more),
    ],
)
@pytest.mark.timeout(900)
async def test_a_complete_graph(tmp_path: Path, count: int, rounds: int) -> None:
    """The books of each agent agree with what it holds at the end."""
    agents = [make(tmp_path / f"p{place}", f"p{place}") for place in range(count)]
    async with started(*agents):
        join(*agents)
        for number in range(1, rounds + 1):
            await one_round(agents, number)
        for agent in agents:
            # of each peer the last snapshot stays
            assert agent.stored().count(".safetensors") == count - 1
