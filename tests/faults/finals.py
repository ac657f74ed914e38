"""What must hold when a run is over: the trajectory where it is known, the lineage of every model, one basis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dimat.agent.lineage.lineage import lineage
from dimat.errors import DataError
from tests.faults.model import UNITS, Model
from tests.faults.schedule import name_of, sources_of
from tests.faults.violation import Violation

if TYPE_CHECKING:
    from tests.faults.node import Node, Saved
    from tests.faults.world import World

TOLERANCE = 1e-9
MOST = 10
"""Models whose lineage is followed in a large network."""


def check(world: World) -> None:
    """Check all; raise Violation."""
    if world.schedule.exact and world.rules.mode == "sync":
        trajectory(world)
    if not world.tainted:
        lineages(world)
    if world.schedule.profile == "partitioned" and not world.tainted:
        bases(world)


def trajectory(world: World) -> None:
    """Where nothing is lost for good, models are W…W x plus what training adds on the way (by definition of gossip
    averaging; with push-sum W = diag(1/m') A diag(m), m' = A m)."""
    agents = world.schedule.agents
    canonical = tuple(range(UNITS))
    models = []
    for node in world.nodes:
        first = node.initial
        models.append(Model(canonical, first.by_unit(), (0.0,) * UNITS, first.stream))
    x = np.array([model.values for model in models])
    mass = np.ones(agents)
    for number in range(1, (world.rules.rounds or 0) + 1):
        rows = world.plans.of(0, number)
        if rows[0].learn:
            x += np.array([model.train() for model in models])
        if world.schedule.push:
            a = np.zeros((agents, agents))
            for i in range(agents):
                push = rows[i].push
                assert push is not None
                a[i, i] = push.keep
                for reader, share in push.to.items():
                    a[int(reader[1:]), i] = share
            after = a @ mass
            x = (a * mass) @ x / after[:, None]
            mass = after
        else:
            w = np.array([[rows[i].mixing.get(name_of(j), 0.0) for j in range(agents)] for i in range(agents)])
            x = w @ x
    for node, expected in zip(world.nodes, x):
        off = float(np.abs(np.array(node.model.by_unit()) - expected).max())
        if off > TOLERANCE:
            raise Violation("trajectory", f"{node.name} is off by {off:.3g} in units {node.model.by_unit()}")


def lineages(world: World) -> None:
    """Durable records alone say what every model is made of, to the last digit."""
    records = [record for node in world.nodes for record in node.records]
    for node in world.nodes[:MOST]:
        saved = _newest_merge(node)
        if saved is None:
            continue
        try:
            made_of = lineage(records, node.name, saved.state.round)
        except DataError as error:
            raise Violation("lineage", f"{node.name}, round {saved.state.round}: {error}") from error
        whole = sum(made_of.initial.values())
        if abs(whole - 1) > TOLERANCE or min(made_of.initial.values()) < 0:
            raise Violation("lineage", f"{node.name}: initial weights sum to {whole}")
        expected = np.zeros(UNITS)
        for name, weight in made_of.initial.items():
            expected += weight * np.array(world.by_name[name].initial.by_unit())
        for key, weight in made_of.updates.items():
            expected += weight * np.array(world.deltas.get(key, (0.0,) * UNITS))
        off = float(np.abs(np.array(saved.model.by_unit()) - expected).max())
        if off > TOLERANCE:
            raise Violation("lineage", f"{node.name}: its model of round {saved.state.round} is off by {off:.3g}")


def _newest_merge(node: Node) -> Saved | None:
    for saved in reversed(node.disk):
        if saved.state.stage == "merged" or (saved.state.stage == "joined" and saved.state.parents):
            return saved
    return None


def bases(world: World) -> None:
    """Once every edge delivers each round, all who hear each other both ways come to share one basis, and it is none
    that was not there when faults ceased. Agents that wait for each other (in synchronous mode, with links both ways)
    come to that by themselves."""
    schedule, map_ = world.schedule, world.schedule.maps[world.map]
    stayed = {node.index: node for node in world.nodes if node.exited == "stopped" and node.calm_merges}
    final = {i: node.disk[-1].state.basis for i, node in stayed.items()}
    edges = {
        (peer, reader)
        for phase in range(len(map_.cycle))
        for reader, heard in enumerate(sources_of(map_, phase, schedule.agents))
        for peer in heard
        if peer in final and reader in final
    }
    for peer, reader in sorted(edges):
        merges = stayed[reader].calm_merges
        if merges - stayed[reader].missed.get(name_of(peer), 0) < len(map_.cycle) * (schedule.agents + 1):
            # one that goes on alone between two meetings may withdraw what its reader has begun to fetch
            lasting = schedule.keep > len(map_.cycle)
            if world.rules.mode == "sync" and not map_.directed and lasting:
                missed = f"missed a{peer} in one of its last {merges} merges: {stayed[reader].missed}"
                raise Violation("healing", f"a{reader} {missed}")
            return
    for peer, reader in sorted(edges):
        if final[reader] > final[peer]:
            raise Violation("one basis", f"a{reader} is in {final[reader]}, hears a{peer} in {final[peer]}")
    if final and world.watch.oldest is not None and min(final.values()) < world.watch.oldest:
        raise Violation("one basis", f"{min(final.values())} is older than all there were: {world.watch.oldest}")
    world.totals["one basis"] += 1
