"""The driver: carries out what round machines ask for, in a network where a seeded schedule says what goes wrong."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from dimat.agent.protocol import messages as m
from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.messages import MergeRecord
from dimat.agent.protocol.offers import PeerPublished
from dimat.agent.protocol.round import RoundMachine
from dimat.events import Merged, MergeResult
from tests.faults import inject
from tests.faults.invariants import Watch
from tests.faults.links import Links
from tests.faults.model import UNITS, Model, Snapshot
from tests.faults.node import FAULT, MESSAGE, OWN, RUN, TIMER, Held, Node, Offer
from tests.faults.schedule import Fault, Plans, Schedule, name_of, rules_of
from tests.faults.trace import show
from tests.faults.violation import Violation

SCORE = "score"
Job = Callable[[], m.Event | None]


def score(seed: int, agent: int, number: int) -> int:
    """Return the metric of an agent after a round's merge: a whole number below 8, so that it often is the target."""
    return (seed * 31 + agent * 17 + number * number * 5 + number * 3) % 8


class World:
    """A network of agents. `machine` and the methods are what mutants replace; `trace` collects what happened."""

    machine: type[RoundMachine] = RoundMachine

    def __init__(self, schedule: Schedule, *, trace: list[str] | None = None) -> None:
        self.schedule = schedule
        self.rules = rules_of(schedule)
        self.plans = Plans(schedule)
        self.trace = trace
        self.now = 0.0
        self.totals: Counter[str] = Counter()
        self.map = 0
        self.cuts: list[Fault] = []
        self.fakes: dict[tuple[str, int, str], Snapshot] = {}
        self.tainted = False
        self.deltas: dict[tuple[str, int], tuple[float, ...]] = {}
        self.settling = False
        self.stopped = False
        self._queue: list[tuple[float, int, Node | None, int, int, Any]] = []
        self._count = 0
        self._links = Links(schedule)
        self._slow = dict(schedule.slow)
        orders = random.Random(schedule.seed ^ 0x0DE2)
        self.nodes = [self._node(i, orders) for i in range(schedule.agents)]
        self.by_name = {node.name: node for node in self.nodes}
        self.watch = Watch(self)
        self.wire()

    def _node(self, index: int, orders: random.Random) -> Node:
        order = tuple(orders.sample(range(UNITS), UNITS))
        name = name_of(index)
        seed = self.schedule.seed * 1009 + index
        return Node(
            name=name,
            index=index,
            plan=self.plans.plan(0, index),
            basis=BasisId(0, name, f"{orders.getrandbits(16):x}"),
            initial=Model.initial(seed, order),
            rng=random.Random(seed),
        )

    def wire(self) -> None:
        """Work out who reads whom, after a change of the map."""
        self.readers: dict[str, list[Node]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for peer in node.plan.peers:
                self.readers[peer].append(node)

    # ── the clock ────────────────────────────────────────────────────────────────────────────────────────────
    def put(self, at: float, node: Node | None, what: int, data: Any, *, life: int = -1) -> None:
        self._count += 1
        heapq.heappush(self._queue, (at, self._count, node, life, what, data))

    def run(self) -> None:
        """Let everything happen; raise Violation where a promise is broken."""
        for fault in self.schedule.faults:
            inject.prepare(self, fault)
        for node in self.nodes:
            if not node.late:
                self.put(node.rng.uniform(0, 0.2), None, FAULT, Fault("start", agent=node.index))
        if self.rules.rounds is None:
            self.put(self.schedule.quiet_s, None, FAULT, Fault("quiet"))
        while self._queue:
            self.now, _, node, life, what, data = heapq.heappop(self._queue)
            self.totals["events"] += 1
            if self.totals["events"] > self._most():
                raise Violation("runs on", f"after {self.totals['events']} events {self.standing()}")
            if node is None:
                inject.apply(self, data)
            elif node.up and (life < 0 or life == node.life):
                if node.paused_until > self.now:
                    self.put(node.paused_until, node, what, data, life=life)
                else:
                    self._deliver(node, what, data)
        self.watch.finish()

    def _most(self) -> float:
        """Return how many events there may be by now: while the slowest of an endless run settle, perhaps one deadline
        a round, the quickest go on."""
        rounds = self.schedule.settle + (self.now / self.schedule.train_s[0] if self.rules.rounds is None else 0)
        return 6000 + (2500 + 40 * rounds) * self.schedule.agents

    def standing(self) -> str:
        """Say where everybody is."""
        return ", ".join(
            f"{n.name}: {n.exited or ('down' if n.machine is None else f'{n.machine.phase.name} {n.machine.round}')}"
            for n in self.nodes
        )

    def _deliver(self, node: Node, what: int, data: Any) -> None:
        if what == MESSAGE:
            sender, event = data
            if self.cut(sender, node.index):
                return
            self.step(node, event)
        elif what == TIMER:
            due = node.timers.get(data)
            if due is None or due[0] > self.now:
                return
            del node.timers[data]
            self.step(node, m.Deadline(due[1]))
        else:
            event = data()
            if event is not None:
                self.step(node, event)

    # ── a machine's step ─────────────────────────────────────────────────────────────────────────────────────
    def step(self, node: Node, event: m.Event, *, idle: bool = False) -> None:
        """Hand an event in, carry out the actions in order; a crash may strike at any of them."""
        machine = node.machine
        if machine is None or node.exited:
            return
        before = machine.phase
        self.watch.hears(node, event)
        actions = machine.handle(event)
        if self.trace is not None:
            self.trace.append(show(self.now, node, event, actions))
        self.watch.handled(node, event, actions, before, idle)
        for action in actions:
            node.actions += 1
            crash = inject.strikes(self, node)
            if crash is not None and crash.where == "before":
                return inject.crash(self, node, crash)
            if crash is not None and crash.where == "torn" and isinstance(action, m.CheckpointAction):
                if action.record is not None and crash.count:
                    self.record(node, action.record)
                return inject.crash(self, node, crash)
            self.perform(node, action)
            if crash is not None:
                return inject.crash(self, node, crash)
        self.watch.stepped(node)
        return None

    def perform(self, node: Node, action: m.Action) -> None:
        match action:
            case m.Emit():
                if isinstance(action.fact, Merged):
                    self.totals["merges"] += 1
                self.watch.reports(node, action.fact)
            case m.Fetch():
                self._fetch(node, action)
            case m.Train():
                self.watch.trains(node, action)
                low, high = self.schedule.train_s
                slow = self._slow.get(node.index, 1.0)
                self._job(node, (slow * low, slow * high), lambda: self.train(node, action))
            case m.CheckpointAction():
                self.checkpoint(node, action)
            case m.Publish():
                self.publish(node, action)
            case m.Release():
                self.release(node, action)
            case m.SetTimer():
                node.timed.add(action.round)
                self.set_timer(node, action.round, action.seconds)
            case m.MergeAction():
                self._start_merge(node, action)
            case m.AdoptBasis():
                node.adopting = self.watch.rebases(node, action)
                self._job(node, self.schedule.job_s, lambda: self.rebase(node, action))
            case m.AdoptWeights():
                self.watch.adopts(node, action)
                self._job(node, self.schedule.job_s, lambda: self.adopt(node, action))
            case m.Exit():
                self._exit(node, action)

    def set_timer(self, node: Node, number: int, seconds: float) -> None:
        self._count += 1
        node.timers = {self._count: (self.now + seconds, number)}
        self.put(self.now + seconds, node, TIMER, self._count, life=node.life)

    def _job(self, node: Node, span: tuple[float, float], job: Job) -> None:
        self.put(self.now + node.rng.uniform(*span), node, OWN, job, life=node.life)

    def chance(self, node: Node, probability: float) -> bool:
        """Whether something goes wrong; the draw is made in any case, so that shrinking shifts no other."""
        return node.rng.random() < probability and self.now < self.schedule.quiet_s

    # ── own work ─────────────────────────────────────────────────────────────────────────────────────────────
    def train(self, node: Node, action: m.Train) -> m.Event:
        if action.learn:
            self.deltas[node.name, action.round] = node.model.train()
        return m.TrainingDone(action.round, node.model.snapshot().root)

    def checkpoint(self, node: Node, action: m.CheckpointAction) -> None:
        if action.record is not None:
            self.record(node, action.record)
        self.watch.checkpoints(node, action)
        node.save(action.state)
        node.intact = True
        if action.stage == "trained":
            node.published = max(node.published, action.round)
        if action.stage == "merged":
            node.calm_merges += self.settling
            self.settled()

    def record(self, node: Node, record: MergeRecord) -> None:
        node.records.append(record)

    def _start_merge(self, node: Node, action: m.MergeAction) -> None:
        self.watch.merges(node, action)
        refused = {p.peer: "not finite" for p in action.parts if self.chance(node, self.schedule.refuses)}
        accepted = node.rng.choice([0.0, 0.5]) if self.chance(node, self.schedule.backs_off) else 1.0
        node.merging = (action, refused, accepted)
        self._job(node, self.schedule.job_s, lambda: self.merge(node, action, refused, accepted))

    def merge(self, node: Node, action: m.MergeAction, refused: dict[str, str], accepted: float) -> m.Event:
        adopts = action.round <= self.rules.adopt_rounds
        kept = [p for p in action.parts if p.peer not in refused and (p.same_basis or not adopts)]
        own = 1.0 - sum(p.weight for p in kept)
        snapshots = []
        for part in kept:
            snapshot = node.here(part.peer, part.root)
            if snapshot is None:
                raise Violation("whole or not at all", f"{node.name} merges a snapshot of {part.peer} released before")
            snapshots.append((part.weight, snapshot))
        node.model.merge(own, snapshots, accepted)
        after = {SCORE: float(score(self.schedule.seed, node.index, action.round))}
        return m.MergeDone(action.round, MergeResult(refused=refused, accepted=accepted, after=after))

    def rebase(self, node: Node, action: m.AdoptBasis) -> m.Event:
        assert node.machine is not None
        snapshot = node.here(action.peer, action.root)
        if self.chance(node, self.schedule.rebase_fails) or snapshot is None:
            node.unfit = True
            return m.BasisChanged(action.round, node.machine.basis)
        if action.round > self.rules.adopt_rounds:
            node.model.rebase(snapshot.order)
        else:
            node.model.adopt(snapshot)
            node.taken = (action.peer, node.adopting, action.root)
        return m.BasisChanged(action.round, action.basis, 0.5)

    def adopt(self, node: Node, action: m.AdoptWeights) -> m.Event:
        snapshot = node.here(action.peer, action.root)
        if self.chance(node, self.schedule.rebase_fails) or snapshot is None:
            return m.WeightsAdopted(action.root, "not finite")
        node.model.adopt(snapshot)
        return m.WeightsAdopted(action.root)

    # ── the network ──────────────────────────────────────────────────────────────────────────────────────────
    def cut(self, a: int, b: int) -> bool:
        return any(inject.parts(fault, a, b) for fault in self.cuts)

    def send(self, sender: int, reader: Node, event: m.Event, *, last: bool = False) -> None:
        """Send a message. `last`: it arrives after all that were sent on this link before."""
        for at in self._links.arrivals(sender, reader.index, self.now, last=last):
            self.put(at, reader, MESSAGE, (sender, event))

    def publish(self, node: Node, action: m.Publish) -> None:
        self.watch.publishes(node, action)
        previous = max((part.round for part in action.parents if part.agent == node.name), default=0)
        offer = Offer(action.round, action.root, action.basis, dict(action.pushed), action.base, previous)
        node.store[action.round] = offer
        for old in sorted(node.store)[: -self.schedule.keep]:
            del node.store[old]
        for reader in self.readers[node.name]:
            self.send(node.index, reader, self.offer_for(node, offer, reader.name))

    def offer_for(self, node: Node, offer: Offer, reader: str) -> PeerPublished:
        return PeerPublished(
            node.name,
            offer.round,
            offer.root,
            offer.basis,
            run=RUN,
            oldest=min(node.store),
            pushed=offer.pushed.get(reader, 0.0),
            base=offer.base,
            previous=offer.previous,
        )

    def resend(self, node: Node, reader: Node) -> None:
        """A connection is made anew: all current offers are sent again."""
        if not self.serves(node) or not reader.up or self.cut(node.index, reader.index):
            return
        for number in sorted(node.store):
            self.send(node.index, reader, self.offer_for(node, node.store[number], reader.name))

    def serves(self, node: Node) -> bool:
        linger = self.schedule.linger_s
        return node.up and (not node.exited or linger < 0 or self.now <= node.exited_at + linger)

    def _fetch(self, node: Node, action: m.Fetch) -> None:
        self.watch.fetches(node, action)
        held = Held(action.round)
        node.held.setdefault((action.peer, action.root), []).append(held)
        seconds = node.rng.uniform(*self.schedule.fetch_s)
        hangs = self.chance(node, self.schedule.fetch_hangs)
        fails = self.chance(node, self.schedule.fetch_fails)
        if hangs and self.rules.mode == "sync":
            return  # for ever: only a deadline ends it
        if hangs:
            seconds += 3 * self.rules.deadline_s
        failing = fails or hangs
        self.put(self.now + seconds, node, OWN, lambda: self.fetched(node, action, held, failing), life=node.life)

    def fetched(self, node: Node, action: m.Fetch, held: Held, fails: bool) -> m.Event | None:
        """A fetch is over, one way or the other. Where nothing is to get lost it is tried until the peer is back.

        One that was let go still answers, unless the same is asked for again: a driver knows a fetch by what it brings,
        and has ended the first.
        """
        asked = [entry for entry in node.held.get((action.peer, action.root), ()) if entry.round == action.round]
        if asked and held not in asked:
            return None
        peer = self.by_name[action.peer]
        paused = peer.up and peer.paused_until > self.now
        if not fails and (paused or (self.schedule.exact and not peer.up)):
            again = peer.paused_until if paused else self.now + 1.0
            self.put(again, node, OWN, lambda: self.fetched(node, action, held, fails), life=node.life)
            return None
        snapshot = self.fakes.get((action.peer, action.round, action.root))
        if snapshot is None:
            offer = peer.store.get(action.round)
            snapshot = self.watch.contents[action.root] if offer is not None and offer.root == action.root else None
        if fails or snapshot is None or not self.serves(peer) or self.cut(peer.index, node.index):
            node.drop(action.peer, action.round, action.root, held)
            return m.FetchFailure(action.peer, action.round, action.root, "connection lost")
        held.snapshot = snapshot
        return m.SnapshotReady(action.peer, action.round, action.root)

    def release(self, node: Node, action: m.Release) -> None:
        if not node.drop(action.peer, action.round, action.root):
            raise Violation("release", f"{node.name} releases a snapshot of {action.peer} that it does not hold")

    # ── beginnings and ends ──────────────────────────────────────────────────────────────────────────────────
    def start(self, node: Node) -> None:
        """Start an agent's process, afresh or from its newest checkpoint."""
        node.up = True
        node.life += 1
        state, node.model = self.restore(node)
        # a record may be durable where its checkpoint is torn or lost: a merge that the agent has no memory of is void
        newest = -1 if state is None else state.round
        node.records = [record for record in node.records if record.round <= newest]
        node.machine = self.make(node, state)
        self.watch.starts(node, state)
        self.step(node, m.Started(join=node.late))
        if node.time_up:
            self.step(node, m.TimeUp())
        for peer in sorted(node.plan.peers):
            self.resend(self.by_name[peer], node)
        for reader in self.readers[node.name]:
            self.resend(node, reader)

    def restore(self, node: Node) -> tuple[Any, Model]:
        return node.load()

    def make(self, node: Node, state: Any) -> RoundMachine:
        # a newcomer that adopts weights need not know their base
        knows = not (node.late and self.rules.join == "adopt" and self.schedule.profile == "hostile")
        return self.machine(
            node.name,
            RUN,
            node.plan,
            self.rules,
            basis=node.basis,
            base=self.schedule.base_of(node.index) if knows else "",
            state=state,
            published=node.published,
        )

    def _exit(self, node: Node, action: m.Exit) -> None:
        self.watch.exits(node, action)
        node.exited, node.exited_at = action.reason, self.now
        last = max(node.store, default=0)
        for reader in self.readers[node.name]:
            self.send(node.index, reader, m.PeerLost(node.name, "left", last), last=True)

    # ── endless runs ─────────────────────────────────────────────────────────────────────────────────────────
    def living(self) -> list[Node]:
        return [node for node in self.nodes if not node.exited and not node.gone and (node.up or node.life)]

    def quiet(self) -> None:
        """Faults have ceased: once everybody is back, so many merges more, then all are stopped."""
        living = self.living()
        if any(not node.up for node in living):
            self.put(self.now + 1.0, None, FAULT, Fault("quiet"))
            return
        self.settling = True
        self.watch.quiet()
        rounds = [node.machine.round for node in living if node.machine is not None]
        behind = self.schedule.settle + max(rounds, default=0) - min(rounds, default=0)
        patience = (behind + 10) * (3 * self.rules.deadline_s + self.schedule.train_s[1] + 5)
        self.put(self.now + patience, None, FAULT, Fault("overdue"))
        self.settled()

    def settled(self) -> None:
        """Stop an endless run if everybody has merged often enough since faults ceased."""
        living = self.living()
        if self.settling and not self.stopped and all(node.calm_merges >= self.schedule.settle for node in living):
            self.stopped = True
            for node in living:
                self.put(self.now, None, FAULT, Fault("leave", at=self.now, agent=node.index))
