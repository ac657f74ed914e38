"""Many real agents on a complete graph: processes, mutual TLS, 1-MB snapshots; each fetches from all others at once.

Reference: what they publish and merge themselves. A dictionary that a thread changes while the event loop goes through
it, a slot that is never given back or a snapshot that goes while it is read would end an agent, or leave it behind.
"""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from dimat.weights.snapshot import checksum_file
from tests.agent.processes import check_ledgers, network

pytestmark = [pytest.mark.slow, pytest.mark.live]


MORE = [pytest.param(12, 20, marks=pytest.mark.more), pytest.param(20, 20, marks=pytest.mark.more)]


@pytest.mark.parametrize(("count", "rounds"), [(8, 4), *MORE])
def test_a_complete_graph(tmp_path: Path, count: int, rounds: int) -> None:
    """All finish all rounds; in each round but the first, when some may not be there yet, each merges with all that
    were in time, and nearly all were; what lies in the folders has its address."""
    names = [f"agent-{place:02}" for place in range(count)]
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in names]
        ports = [each.getsockname()[1] for each in sockets]
    schedule = f"rounds = {rounds}\nround_deadline_s = 120\njoin_wait_s = 3"
    train = "steps_per_round = 1\nbatch_size = 8"
    agent = "founder = true\nlinger_s = 60\nevaluate = 'none'"
    exchange = "lost_after_s = 240\nidle_s = 120"
    tables = {"schedule": schedule, "train": train, "agent": agent, "exchange": exchange, "merge": 'method = "average"'}
    with network(tmp_path, names, ports, hosts=(), loads=(), **tables) as net:
        net.write_map(graph="complete")
        task = tmp_path / "tiny_task.py"
        task.write_text(task.read_text().replace("(6, 12, 8, 4)", "(6, 480, 480, 4)"))  # 0.94 MB
        lives = [net.start(name) for name in names]
        assert [life.wait(60.0 * rounds) for life in lives] == [0] * count, "\n".join(life.text() for life in lives)
        check_ledgers(net)
        for name in names:
            merges = net.events(name, "Merged")
            assert [merge["round"] for merge in merges] == list(range(1, rounds + 1)), name
            assert not net.events(name, "FetchFailed"), name
            heard = [merge["heard"] for merge in merges]
            assert sum(heard) >= 0.9 * rounds * (count - 1), f"{name} heard {heard}"
            published = net.events(name, "Published")
            assert {event["bytes"] > 900_000 for event in published} == {True}
            for file in (net.folder / name / "received").glob("*.safetensors"):
                assert checksum_file(file).root == file.stem
