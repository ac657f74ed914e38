"""What goes wrong, carried out on a simulated network. Each kind of fault is one function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from dimat.agent.protocol import messages as m
from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.offers import PeerPublished
from dimat.agent.protocol.plan import LAST_ROUND
from dimat.agent.protocol.round import Phase
from tests.faults.model import UNITS, Snapshot, splitmix
from tests.faults.node import FAULT, OWN, RUN, TIMER
from tests.faults.schedule import Fault
from tests.faults.violation import Violation

if TYPE_CHECKING:
    from tests.faults.node import Node
    from tests.faults.world import World


def prepare(world: World, fault: Fault) -> None:
    """Put a fault where it waits for its time, or for the agent's action."""
    node = world.nodes[fault.agent]
    if fault.kind == "late":
        node.late = True
        world.put(fault.at, None, FAULT, Fault("start", agent=fault.agent))
    elif fault.kind == "crash" and fault.step:
        node.crashes[fault.step] = fault
    else:
        world.put(fault.at, None, FAULT, fault)


def apply(world: World, fault: Fault) -> None:
    """Let a fault happen now."""
    world.totals[fault.kind] += 1
    if world.trace is not None and fault.kind not in ("quiet", "overdue"):
        world.trace.append(f"{world.now:9.3f}  **  {fault.kind} a{fault.agent} {fault}")
    KINDS[fault.kind](world, fault, world.nodes[fault.agent])


def strikes(world: World, node: Node) -> Fault | None:
    """Return the crash that waits for this action of the agent."""
    fault = node.crashes.pop(node.actions, None) if node.crashes else None
    endless = world.rules.rounds is None
    return None if fault is None or (endless and world.now >= world.schedule.quiet_s) else fault


def parts(fault: Fault, a: int, b: int) -> bool:
    """Whether a partition parts two agents."""
    return not any(a in group and b in group for group in fault.groups)


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────
def crash(world: World, node: Node, fault: Fault) -> None:
    """The process is gone without a word, and with it all memory."""
    if not node.up or node.exited:
        return
    world.totals["crashes"] += 1
    if world.trace is not None:
        world.trace.append(f"{world.now:9.3f}  **  {node.name} crashes {fault}")
    node.up = False
    node.life += 1
    node.paused_until = -1.0
    node.forget()
    if fault.damaged and node.disk and node.intact:
        node.disk.pop()
        node.intact = False
        world.totals["damaged"] += 1
    if fault.told:
        for reader in world.readers[node.name]:
            world.send(node.index, reader, m.PeerLost(node.name))
    node.gone = fault.until < 0
    if not node.gone:
        world.put(world.now + fault.until, None, FAULT, Fault("start", agent=node.index, count=0))


def _crash(world: World, fault: Fault, node: Node) -> None:
    crash(world, node, fault)


def _start(world: World, fault: Fault, node: Node) -> None:
    if not node.up and not node.gone and (fault.count == 0 or node.life == 0):
        world.start(node)


def _tell(world: World, node: Node, make: Callable[[], m.Event | None]) -> None:
    """Hand the process something of its own; one that is stopped takes it later."""
    world.put(world.now, node, OWN, make)


def _leave(world: World, fault: Fault, node: Node) -> None:
    _tell(world, node, m.Stop)


def _time_up(world: World, fault: Fault, node: Node) -> None:
    node.time_up = True
    _tell(world, node, m.TimeUp)


def _pause(world: World, fault: Fault, node: Node) -> None:
    if node.up:
        node.paused_until = max(node.paused_until, fault.until)


def _clock(world: World, fault: Fault, node: Node) -> None:
    for timer, (due, number) in list(node.timers.items()):
        due = world.now + (due - world.now) * fault.factor
        node.timers[timer] = (due, number)
        world.put(due, node, TIMER, timer, life=node.life)


def _map(world: World, fault: Fault, node: Node) -> None:
    """The operator changes the map; each agent hears of it in its own time, one that is down when it is back."""
    world.map += 1
    for each in world.nodes:
        if not each.up:
            _remap(world, each)
        else:
            _tell(world, each, lambda each=each: _remap(world, each))


def _remap(world: World, node: Node) -> m.Event:
    node.plan = world.plans.plan(world.map, node.index)
    world.wire()
    for peer in sorted(node.plan.peers):
        world.resend(world.by_name[peer], node)
    return m.MapChanged(node.plan)


# ── links ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _cut(world: World, fault: Fault, node: Node) -> None:
    world.cuts.append(fault)
    world.put(fault.until, None, FAULT, Fault("heal", groups=fault.groups))
    if fault.told:
        for reader in world.nodes:
            for peer in sorted(reader.plan.peers):
                if parts(fault, world.by_name[peer].index, reader.index):
                    _tell(world, reader, lambda peer=peer: m.PeerLost(peer))


def _heal(world: World, fault: Fault, node: Node) -> None:
    world.cuts = [cut for cut in world.cuts if cut.groups != fault.groups or cut.until > world.now]
    for reader in world.nodes:
        for peer in sorted(reader.plan.peers):
            sender = world.by_name[peer]
            if parts(fault, sender.index, reader.index):
                world.resend(sender, reader)


# ── messages ─────────────────────────────────────────────────────────────────────────────────────────────────────
def _peer(world: World, fault: Fault, node: Node) -> Node | None:
    """Return the peer that a fault names, or another one where that is none of the agent's."""
    peers = sorted(node.plan.peers)
    return world.by_name[peers[fault.peer % len(peers)]] if peers else None


def _awake(world: World, node: Node) -> bool:
    return node.up and not node.exited and node.paused_until <= world.now


def _basis_of(node: Node) -> BasisId:
    return node.machine.basis if node.machine is not None else node.basis


def _stranger(world: World, fault: Fault, node: Node) -> None:
    """Somebody who is not on the map offers snapshots, in a basis older than all."""
    for i in range(fault.count):
        if _awake(world, node):
            offer = PeerPublished(f"zz{i}", i + 1, f"strange{i}", BasisId(-1, "zz", "0"), run=RUN, oldest=1)
            world.step(node, offer, idle=True)


def _foreign(world: World, fault: Fault, node: Node) -> None:
    """A peer of another run or with another base, or an agent of our own name, is heard."""
    peer = _peer(world, fault, node)
    for i in range(fault.count):
        if peer is not None and _awake(world, node):
            number = (node.machine.round if node.machine is not None else 0) + i
            offer = PeerPublished(peer.name, number, f"foreign{i}", BasisId(-1, "zz", "0"), run="other", oldest=number)
            world.step(node, offer, idle=True)
            if node.machine is not None and node.machine.phase is not Phase.JOINING:
                world.step(node, replace(offer, run=RUN, base="another"), idle=True)
        if _awake(world, node):
            own = PeerPublished(node.name, 1 + i, "own", BasisId(-1, "zz", "0"), run=RUN)
            world.step(node, own, idle=True)


def _tempt(world: World, fault: Fault, node: Node) -> None:
    """Whoever listens for a network is offered what it must not take, in a basis older than all: of a round that there
    cannot be, of another run, on another base than its own, by a stranger, by its own name."""
    peer, machine = _peer(world, fault, node), node.machine
    if peer is None or machine is None:
        return
    number = max(peer.store, default=0) + 1
    good = PeerPublished(peer.name, number, "tempting", BasisId(-1, "zz", "0"), run=RUN, oldest=1, base=machine.base)
    beyond = LAST_ROUND + 1 if world.rules.rounds is None else world.rules.rounds + 1
    offers = [
        replace(good, round=beyond),
        replace(good, round=LAST_ROUND + fault.count),
        replace(good, round=0),
        replace(good, round=-fault.count),
        replace(good, run="other"),
        replace(good, peer="zz"),
        replace(good, peer=node.name),
    ]
    knows = machine.base or world.rules.join == "align" or machine.phase is not Phase.JOINING
    offers += [replace(good, base="another")] if knows else []
    for offer in offers:
        if _awake(world, node):
            world.step(node, offer, idle=True)


def _flood(world: World, fault: Fault, node: Node) -> None:
    """A peer offers rounds far ahead that nobody can fetch."""
    peer = _peer(world, fault, node)
    for i in range(fault.count):
        if peer is not None and _awake(world, node):
            number = max(peer.store, default=0) + 1 + i
            offer = PeerPublished(
                peer.name, number, f"flood{number}", _basis_of(peer), run=RUN, base=world.schedule.base_of(peer.index)
            )
            world.step(node, offer)
    world.watch.bounded(node)


def _lost(world: World, fault: Fault, node: Node) -> None:
    """A peer is taken for lost though it is not."""
    peer = _peer(world, fault, node)
    if peer is not None and _awake(world, node):
        world.step(node, m.PeerLost(peer.name))


def _noise(world: World, fault: Fault, node: Node) -> None:
    """Answers to questions that nobody asked."""
    if node.machine is None:
        return
    peer, number = min(node.plan.peers, default="zz"), node.machine.round
    events: list[m.Event] = [
        m.SnapshotReady(peer, number, "never asked for"),
        m.FetchFailure(peer, number, "never asked for", "gone"),
        m.TrainingDone(number + 3, "x"),
        m.MergeDone(number + 1),
        m.BasisChanged(number + 1, BasisId(-1, "zz", "0")),
        m.WeightsAdopted("never asked for"),
        m.Deadline(number + 2),
        m.PeerLost("zz"),
        m.Started(),
        m.Started(join=True),
    ]
    for event in events:
        if _awake(world, node):
            world.step(node, event, idle=True)


def _equivocate(world: World, fault: Fault, node: Node) -> None:
    """A peer offers, and serves, other content under rounds that it has published."""
    peer = _peer(world, fault, node)
    if peer is None:
        return
    for number in sorted(peer.store)[-fault.count :]:
        true = peer.store[number]
        stream, values = world.schedule.seed + number, []
        for _ in range(UNITS):
            stream, x = splitmix(stream)
            values.append(100 * x)
        fake = Snapshot.of(world.watch.orders[true.basis], tuple(values))
        world.fakes[peer.name, number, fake.root] = fake
        if _awake(world, node):
            offer = world.offer_for(peer, true, node.name)
            told = PeerPublished(
                peer.name, number, fake.root, true.basis, run=RUN, oldest=offer.oldest, base=offer.base
            )
            world.step(node, told)


# ── an endless run's end ─────────────────────────────────────────────────────────────────────────────────────────
def _quiet(world: World, fault: Fault, node: Node) -> None:
    world.quiet()


def _overdue(world: World, fault: Fault, node: Node) -> None:
    if not world.stopped and world.living():
        raise Violation("progress", f"an endless run makes no rounds: {world.standing()}")


KINDS: dict[str, Callable[[World, Fault, Node], None]] = {
    "start": _start,
    "crash": _crash,
    "leave": _leave,
    "time_up": _time_up,
    "pause": _pause,
    "clock": _clock,
    "map": _map,
    "cut": _cut,
    "heal": _heal,
    "stranger": _stranger,
    "foreign": _foreign,
    "flood": _flood,
    "tempt": _tempt,
    "lost": _lost,
    "noise": _noise,
    "equivocate": _equivocate,
    "quiet": _quiet,
    "overdue": _overdue,
}
