"""The promises of the round, checked at every step of a simulated network, from outside of the machine."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from dimat import events
from dimat.agent.protocol import messages as m
from dimat.agent.protocol.offers import ROUNDS_KEPT, PeerPublished
from dimat.agent.protocol.round import Phase
from dimat.agent.protocol.state import MachineState
from tests.faults import finals
from tests.faults.node import RUN, Held, Node
from tests.faults.violation import Violation

if TYPE_CHECKING:
    from tests.faults.model import Snapshot
    from tests.faults.world import World

CLOSED = (Phase.ADOPTING, Phase.MERGING)
TOLERANCE = 1e-9
PER_PEER, PER_MACHINE = 30, 90
"""Things that a machine may keep."""


class Watch:
    """What all have seen: published content, the order that each basis names, push-sum weights."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.contents: dict[str, Snapshot] = {}
        self.orders: dict[Any, tuple[int, ...]] = {}
        self.ledger: dict[tuple[str, int], tuple[Any, ...]] = {}
        self.oldest: Any = None
        self._resumed: MachineState | None = None

    def _demand(self, true: bool, promise: str, node: Node, text: str) -> None:
        if not true:
            raise Violation(promise, f"{node.name}: {text}")

    # ── events ───────────────────────────────────────────────────────────────────────────────────────────────
    def hears(self, node: Node, event: m.Event) -> None:
        match event:
            case PeerPublished():
                assert node.machine is not None
                learns = node.machine.phase is Phase.JOINING and self.world.rules.join == "adopt"
                same = event.base == node.machine.base or (learns and not node.machine.base)
                counts = not self.world.rules.beyond(event.round) and event.round > 0
                if event.run == RUN and event.peer in node.known and same and counts:
                    node.offered[event.peer, event.round, event.root] = event
                    node.bases[event.peer] = min(node.bases.get(event.peer, event.basis), event.basis)
                    node.waiting.hears(event)
            case m.PeerLost():
                node.waiting.lost(event.peer, event.last)
            case m.SnapshotReady():
                machine = node.machine
                assert machine is not None
                counts = machine.phase in (Phase.TRAINING, Phase.GATHERING) and event.round == machine.round
                if counts and any(held.snapshot is not None for held in node.held.get((event.peer, event.root), ())):
                    node.waiting.came(event.peer)  # one that is late, or a proof, is no sign of being in step
            case m.FetchFailure():
                asked = node.asked.get((event.peer, event.round)) == event.root
                if asked and node.machine is not None and event.round == node.machine.round:
                    node.waiting.failed.add(event.peer)
            case m.Deadline():
                assert node.machine is not None
                if event.round == node.machine.round and node.machine.phase is Phase.GATHERING:
                    node.expired = event.round
                    missing = self._missing(node)
                    node.waiting.expired(missing, self._coming(node, missing), event.round)
            case m.TimeUp():
                node.time_heard = True
            case m.MapChanged():
                joining = node.machine is not None and node.machine.phase is Phase.JOINING
                node.known = event.plan.peers if joining else node.known | event.plan.peers
                if joining:  # what only agents that are on the map no more have offered does not count
                    node.bases = {peer: basis for peer, basis in node.bases.items() if peer in node.known}

    def handled(self, node: Node, event: m.Event, actions: list[m.Action], before: Phase, idle: bool) -> None:
        machine = node.machine
        assert machine is not None
        if idle:
            told = all(isinstance(action, m.Emit) for action in actions)
            self._demand(told and machine.phase is before, "messages of no concern", node, f"{event} gave {actions}")
        if machine.phase is Phase.GATHERING and node.expired == machine.round:
            raise Violation("deadline", f"{node.name} still waits in round {machine.round}")
        if isinstance(event, m.Started) and before is Phase.IDLE:
            self._started(node, actions)
        if machine.phase in CLOSED and before not in CLOSED:
            node.closed = self._arrived(node)
        if isinstance(event, m.MergeDone) and before is Phase.MERGING and not idle:
            self._merged(node, event, actions)
        ends = [i for i, action in enumerate(actions) if isinstance(action, m.Exit)]
        self._demand(not ends or ends == [len(actions) - 1], "exit", node, f"goes on after its end: {actions}")

    def stepped(self, node: Node) -> None:
        """A step is over: whoever waits must have a timer running."""
        machine = node.machine
        if machine is not None and machine.phase is Phase.GATHERING:
            self._demand(machine.round in node.timed, "deadline", node, f"no timer in round {machine.round}")
        if machine is not None and machine.phase is Phase.GATHERING and self.world.rules.mode == "sync":
            self._waits_for_somebody(node, machine.round)

    def _waits_for_somebody(self, node: Node, number: int) -> None:
        """A round that still gathers waits for a snapshot that may come, or for as many as the rules ask for."""
        expected, missing = self._expected(node), self._missing(node)
        short = len(expected) - len(missing) < min(self.world.rules.min_peers, len(expected))
        needed = short or self._coming(node, missing) or any(node.waiting.worth(peer, number) for peer in missing)
        self._demand(bool(needed), "needless waiting", node, f"waits in round {number} for {missing}: {node.waiting}")

    def _coming(self, node: Node, missing: list[str]) -> list[str]:
        """Return those of the missing whose snapshots are on their way."""
        return [peer for peer in missing if any(node.held.get((peer, root)) for root in self._roots(node, peer))]

    def _missing(self, node: Node) -> list[str]:
        """Return the peers of a round whose snapshots are not here."""
        if node.row is None or node.machine is None:
            return []
        return [p for p in self._expected(node) if not any(self._here(node, p, r) for r in self._roots(node, p))]

    def _roots(self, node: Node, peer: str) -> list[str]:
        assert node.machine is not None
        return [root for of, number, root in node.offered if (of, number) == (peer, node.machine.round)]

    def _here(self, node: Node, peer: str, root: str) -> bool:
        assert node.machine is not None
        return node.here(peer, root, node.machine.round) is not None

    def starts(self, node: Node, state: MachineState | None) -> None:
        self._resumed = state
        node.known = node.plan.peers
        node.merged = node.disk[-1].merged if node.disk else ()
        if node.disk:
            same = node.model == node.disk[-1].model and state == node.disk[-1].state
            self._demand(same, "resume", node, "does not go on with what it saved")
        for offer in state.offers if state is not None else ():  # what it was told in an earlier life, lies too
            if offer.peer in node.plan.peers:
                node.waiting.hears(offer)

    def _started(self, node: Node, actions: list[m.Action]) -> None:
        state = self._resumed
        if state is not None and state.leaves:
            ends = [a.reason for a in actions if isinstance(a, m.Exit)]
            self._demand(ends == [state.leaves], "target", node, f"had left ({state.leaves}) and goes on: {actions}")
        if state is not None and state.stage == "trained":
            node.row, node.row_round = node.plan.of(state.round), state.round
            node.waiting.begins(node.plan, state.round)
            again = any(isinstance(a, m.Publish) and (a.round, a.root) == (state.round, state.root) for a in actions)
            self._demand(again, "republish", node, f"does not republish round {state.round} after a restart")

    # ── what a machine asks for ──────────────────────────────────────────────────────────────────────────────
    def fetches(self, node: Node, action: m.Fetch) -> None:
        machine, key = node.machine, (action.peer, action.round, action.root)
        assert machine is not None
        self._demand(action.peer in node.known | node.plan.peers, "strangers", node, f"fetches from {action.peer}")
        self._demand(key in node.offered, "strangers", node, f"fetches what no peer of the run offered: {action}")
        if machine.phase is Phase.JOINING:
            self._joins_the_network(node, action)
        root = node.asked.setdefault((action.peer, action.round), action.root)
        self._demand(root == action.root, "one content", node, f"takes a second content: {action}")
        fits = machine.phase is Phase.JOINING or node.offered[key].base == machine.base
        self._demand(fits, "one base", node, f"is on {machine.base!r}, fetches {node.offered[key]}")
        if self.world.rules.mode == "sync" and machine.phase is not Phase.JOINING:
            # a peer that is alone ahead proves it with a snapshot, one for each round of this agent
            proof = action.round > machine.round and node.proofs.get(action.peer) != machine.round
            if proof:
                node.proofs[action.peer] = machine.round
            self._demand(action.round == machine.round or proof, "round", node, f"in round {machine.round}: {action}")

    def _joins_the_network(self, node: Node, action: m.Fetch) -> None:
        """A newcomer takes the weights of the network's round, the lower median of what it has heard, or a later one;
        of these one in the smallest basis that is left."""
        front = _median(self._newest(node))
        self._demand(action.round >= front, "joining", node, f"takes {action}, the network is at {front}")

    def _newest(self, node: Node) -> list[int]:
        """Return the newest round of each peer that an agent has heard in this life, in order."""
        return sorted(number for peer, number in node.waiting.newest.items() if peer in node.known)

    def trains(self, node: Node, action: m.Train) -> None:
        node.row, node.row_round = node.plan.of(action.round), action.round
        node.closed, node.unfit, node.known = None, False, node.plan.peers
        if not node.waiting.begun:
            self._settles(node)
        node.waiting.begins(node.plan, action.round)
        self._demand(not node.time_heard, "time", node, f"begins round {action.round} though its time is up")
        self._demand(action.round > node.published, "one content", node, f"trains round {action.round} anew")
        self._demand(action.learn == node.row.learn, "plan", node, f"trains against the plan: {action}")
        if node.disk:
            state = node.disk[-1].state
            durable = state.stage != "trained" and state.round < action.round
            self._demand(durable, "durable", node, f"begins round {action.round} on a {state.stage} {state.round}")
        sync = self.world.rules.mode == "sync"
        for (peer, _), held in node.held.items():
            stale = any(h.round < action.round for h in held) if sync else len(held) > 2
            self._demand(not stale, "release", node, f"keeps snapshots of {peer} that are of no use: {held}")
        self.bounded(node)

    def _settles(self, node: Node) -> None:
        """A newcomer that took any base has come to one. From now on it refuses offers on another, and what it heard of
        those before counts no more than if it came now: it is no content of its round, and tells of no round."""
        assert node.machine is not None
        base, asked = node.machine.base, node.asked.items()
        node.asked = {key: root for key, root in asked if node.offered[*key, root].base == base}
        node.waiting.settles(base)

    def checkpoints(self, node: Node, action: m.CheckpointAction) -> None:
        state = action.state
        self._demand((state.round, state.stage) == (action.round, action.stage), "checkpoint", node, str(action))
        known = self.orders.setdefault(state.basis, node.model.order)
        self._demand(known == node.model.order, "basis", node, f"is not in the order of its basis {state.basis}")
        if not node.late:
            self._demand(state.basis.round == 0, "newcomer", node, f"has come into the basis {state.basis}")
        record = action.record
        if action.stage == "trained":
            root = node.model.snapshot().root
            self._demand(state.root == root, "checkpoint", node, "its state names another snapshot than its weights")
            self._demand(action.round > node.published, "one content", node, f"trained round {action.round} again")
        elif action.stage == "merged":
            own = node.disk[-1].state if node.disk else state
            whole = record is not None and (own.stage, own.round) == ("trained", action.round)
            self._demand(whole, "durable", node, f"merged what was not durable: {own.stage} {own.round}")
            assert record is not None
            self._demand(record.contributions == state.parents, "record", node, f"{record} is not {state.parents}")
            named = (record.agent, record.round, record.snapshot) == (node.name, action.round, own.root)
            self._demand(named, "record", node, f"{record}, own snapshot is {own.root}")
            trained = node.row is not None and record.trained == node.row.learn
            self._demand(trained and record.kind == "merge", "record", node, str(record))
            node.merged = record.contributions
        elif record is not None:
            node.merged = record.contributions
        if self.world.schedule.push:
            self._mass(node, state)

    def _mass(self, node: Node, state: MachineState) -> None:
        """Push-sum weight is here, given away, or taken in; nothing is taken that was not given."""
        push = state.push
        total = push["weight"] + math.fsum(push["sent"].values()) - math.fsum(push["taken"].values())
        self._demand(abs(total - 1) < TOLERANCE, "push-sum", node, f"weight is off by {total - 1:.3g}: {push}")
        for peer, taken in push["taken"].items():
            other = self.world.by_name[peer].disk
            sent = max((saved.state.push["sent"].get(node.name, 0.0) for saved in other), default=0.0)
            self._demand(taken <= sent + TOLERANCE, "push-sum", node, f"took {taken} of {peer}, which gave {sent}")

    def publishes(self, node: Node, action: m.Publish) -> None:
        state = node.disk[-1].state if node.disk else None
        durable = state is not None and (state.stage, state.round, state.root) == ("trained", action.round, action.root)
        self._demand(durable, "durable", node, f"publishes what is not durable: {action}")
        assert state is not None
        snapshot = node.model.snapshot()
        self._demand(snapshot.root == action.root, "durable", node, f"has other weights than it publishes: {action}")
        self.contents[snapshot.root] = snapshot
        self._demand(action.basis == state.basis, "basis", node, f"publishes in {action.basis}, is in {state.basis}")
        self._demand(action.parents == node.merged, "parents", node, f"{action.parents} were {node.merged}")
        said = (action.root, action.basis, action.parents, dict(action.pushed), action.base)
        first = self.ledger.setdefault((node.name, action.round), said)
        self._demand(first == said, "one content", node, f"publishes round {action.round} anew: {said}, was {first}")
        if self.world.schedule.push:
            self._demand(dict(action.pushed) == dict(state.push["sent"]), "push-sum", node, str(action))

    def rebases(self, node: Node, action: m.AdoptBasis) -> int:
        """Return of which round the snapshot is whose basis is taken over; one of a later round may have equal content,
        and come while it is."""
        machine = node.machine
        assert machine is not None
        held = [each for each in node.held.get((action.peer, action.root), ()) if each.snapshot is not None]
        self._demand(bool(held), "whole or not at all", node, f"takes the basis of what is not here: {action}")
        offer = node.offered[action.peer, held[-1].round, action.root]
        smaller = self.world.rules.basis_gossip and action.basis < machine.basis and offer.basis == action.basis
        self._demand(smaller, "basis", node, f"is in {machine.basis}, offered was {offer.basis}: {action}")
        if action.round <= self.world.rules.adopt_rounds:  # its weights come with it
            self._taint(action.peer, held[-1].round, action.root)
        return held[-1].round

    def adopts(self, node: Node, action: m.AdoptWeights) -> None:
        here = node.here(action.peer, action.root, action.round)
        self._demand(here is not None, "whole or not at all", node, str(action))
        offer = node.offered[action.peer, action.round, action.root]
        fits = offer.base == action.base and self.world.rules.join == "adopt" and node.late
        self._demand(fits, "joining", node, f"{action} of {offer}")
        self._taint(action.peer, action.round, action.root)

    def exits(self, node: Node, action: m.Exit) -> None:
        if self.world.schedule.exact and self.world.rules.mode == "sync":
            last = node.disk[-1].state if node.disk else None
            through = action.reason == "done" and last is not None and last.round == self.world.rules.rounds
            self._demand(through, "rounds", node, f"leaves before the end: {action}")

    def reports(self, node: Node, fact: events.Event) -> None:
        if isinstance(fact, events.Joined) and fact.how == "found":
            self._demand(node.heard is None, "newcomer", node, "founds a network though it has heard one")
        if isinstance(fact, events.Joined) and fact.how == "align":
            assert node.machine is not None
            younger = node.heard is not None and node.machine.basis > node.heard
            self._demand(younger, "newcomer", node, f"founds {node.machine.basis} and has heard {node.heard}")
            newest = self._newest(node)
            borne_out = sum(number + ROUNDS_KEPT >= _median(newest) for number in newest) > 1
            joins = not borne_out or fact.round > _median(newest)
            self._demand(joins, "joining", node, f"joins at {fact.round}, has heard of {newest}")
        if isinstance(fact, events.RoundsSkipped):
            self.world.totals["skips"] += 1
            exact = self.world.schedule.exact and self.world.rules.mode == "sync"
            self._demand(not exact, "rounds", node, str(fact))

    def _taint(self, peer: str, number: int, root: str) -> None:
        if (peer, number, root) in self.world.fakes:
            self.world.tainted = True

    # ── merging ──────────────────────────────────────────────────────────────────────────────────────────────
    def _expected(self, node: Node) -> list[str]:
        assert node.row is not None
        return [peer for peer, weight in node.row.mixing.items() if peer != node.name and weight > 0]

    def _arrived(self, node: Node) -> dict[str, Held]:
        """Return what is here when a round stops gathering: that, and all of that, is to be merged."""
        assert node.machine is not None
        number, rules, expected = node.machine.round, self.world.rules, set(self._expected(node))
        oldest = number if rules.mode == "sync" else number - rules.max_staleness
        arrived: dict[str, Held] = {}
        for (peer, _), held in node.held.items():
            for each in held:
                fits = each.round == number if rules.mode == "sync" else each.round >= oldest
                fits = fits and peer in expected and each.snapshot is not None
                if fits and (peer not in arrived or arrived[peer].round < each.round):
                    arrived[peer] = each
        return arrived

    def merges(self, node: Node, action: m.MergeAction) -> None:
        machine, closed = node.machine, node.closed
        assert machine is not None
        whole = closed is not None and action.round == machine.round == node.row_round
        self._demand(whole, "round", node, f"merges in round {node.row_round}: {action}")
        assert closed is not None
        # what arrives while the basis changes may be merged in asynchronous mode, yet came too late for its basis
        arrived = closed if self.world.rules.mode == "sync" else self._arrived(node)
        weights = [action.own_weight, *(part.weight for part in action.parts)]
        sums = abs(math.fsum(weights) - 1) < TOLERANCE and min(weights) > -1e-12
        self._demand(sums, "weights sum to 1", node, str(action))
        peers = [part.peer for part in action.parts]
        self._demand(len(set(peers)) == len(peers), "once per round", node, str(action))
        for part in action.parts:
            here = node.here(part.peer, part.root, part.round)
            self._demand(here is not None, "whole or not at all", node, f"merges what is not here: {part}")
            offer = node.offered[part.peer, part.round, part.root]
            self._demand(offer.base == machine.base, "one base", node, f"is on {machine.base!r}, merges {offer}")
            self._demand(part.same_basis == (offer.basis == machine.basis), "basis", node, f"{part}, {offer}")
            same = not part.same_basis or (here is not None and here.order == node.model.order)
            self._demand(same, "basis", node, f"of one name, in another order: {part}")
            free = not self.world.rules.basis_gossip or node.unfit or part.peer not in closed
            free = free or closed[part.peer].round != part.round
            smallest = free or offer.basis >= machine.basis
            self._demand(smallest, "basis", node, f"stays in {machine.basis}, heard {offer.basis}")
            self._taint(part.peer, part.round, part.root)
        if self.world.settling:
            node.missed.update(dict.fromkeys(set(self._expected(node)) - set(peers), node.calm_merges + 1))
        count = len(arrived)
        if (
            node.taken is not None
        ):  # of that peer a newer one has come too late; but it counts as one that is in the merge
            peer, _, root = node.taken
            arrived = {name: held for name, held in arrived.items() if name != peer or _root(held) == root}
        wanted = self._weights(node, arrived, count)
        found = {part.peer: (part.round, part.weight) for part in action.parts}
        fits = found.keys() == wanted.keys() and all(
            found[peer][0] == arrived[peer].round and abs(found[peer][1] - weight) < 1e-12
            for peer, weight in wanted.items()
        )
        self._demand(fits, "mixing as planned", node, f"{found}, expected {wanted} of {arrived}")
        if self.world.schedule.exact and self.world.rules.mode == "sync":
            self._demand(len(closed) == len(self._expected(node)), "nobody is late", node, f"{action}")

    def _weights(self, node: Node, closed: dict[str, Held], count: int) -> dict[str, float]:
        """Work out what the plan says about what has arrived, of `count` peers: their weights; the rest is own."""
        rules, row = self.world.rules, node.row
        assert row is not None
        if count < min(rules.min_peers, len(self._expected(node))):
            return {}
        if row.push is None:
            stale = {peer: max(node.row_round - held.round, 0) for peer, held in closed.items()}
            return {peer: row.mixing[peer] * rules.staleness_decay ** stale[peer] for peer in closed}
        push = node.disk[-1].state.push
        shares = {
            peer: node.offered[peer, held.round, held.snapshot.root].pushed - push["taken"].get(peer, 0.0)
            for peer, held in closed.items()
            if held.snapshot is not None
        }
        whole = push["weight"] + math.fsum(shares.values())
        return {peer: share / whole for peer, share in shares.items() if share > 0}

    def _merged(self, node: Node, event: m.MergeDone, actions: list[m.Action]) -> None:
        """What is told about a merge is what was done."""
        assert node.merging is not None
        merge, refused, accepted = node.merging
        kept = {
            part.peer: (part.root, part.round, part.weight * accepted)
            for part in merge.parts
            if part.peer not in refused and part.weight * accepted > 0
            if part.same_basis or merge.round > self.world.rules.adopt_rounds
        }
        if node.taken is not None:
            peer, number, root = node.taken
            own_weight = 1 - sum(weight for of, (*_, weight) in kept.items() if of != peer)
            kept[peer], node.taken = (root, number, own_weight), None
        told = [a.fact for a in actions if isinstance(a, m.Emit) and isinstance(a.fact, events.Merged)]
        self._demand(len(told) == 1, "contributions", node, f"{len(told)} reports of one merge")
        own, *others = told[0].contributions
        found = {c.agent: (c.snapshot, c.round, c.weight) for c in others}
        fits = len(found) == len(others) and own.agent == node.name and own.round == merge.round
        rest = 1 - sum(weight for _, _, weight in kept.values())
        fits = fits and _alike(found, kept) and abs(own.weight - rest) < 1e-12
        fits = fits and own.snapshot == node.disk[-1].state.root
        self._demand(fits, "contributions", node, f"{told[0].contributions}, done was {merge}, {refused}, {accepted}")
        saved = [a for a in actions if isinstance(a, m.CheckpointAction) and a.stage == "merged"]
        target = self.world.rules.target
        reached = target is not None and event.result.after[target[0]] >= target[1]
        ends = [a.reason for a in actions if isinstance(a, m.Exit)]
        said = [a.state.leaves for a in saved]
        if reached or "target" in (*ends, *said):
            self._demand(
                reached and ends == said == ["target"], "target", node, f"{event.result.after}: {ends}, {said}"
            )
        records = [a.record.contributions for a in saved if a.record is not None]
        self._demand(records == [told[0].contributions], "record", node, f"{records}, told {told[0].contributions}")

    # ── all ──────────────────────────────────────────────────────────────────────────────────────────────────
    def bounded(self, node: Node) -> None:
        """Whatever is sent, a machine keeps a bounded number of things per peer."""
        if node.machine is None:
            return
        size = _size(vars(node.machine), 9)
        most = PER_MACHINE + PER_PEER * len(node.plan.peers | node.known)
        self._demand(size <= most, "bounded", node, f"keeps {size} things with {len(node.plan.peers)} peers")

    def quiet(self) -> None:
        """Note the oldest basis that there is. What the dead have left may still be on its way to somebody."""
        living = self.world.living()
        lived = [node for node in self.world.nodes if node.life]
        bases = [node.disk[-1].state.basis if node.disk else node.basis for node in lived]
        self.oldest = min([*bases, *(n.machine.basis for n in living if n.machine is not None)], default=None)

    def finish(self) -> None:
        """Check the end of a run."""
        for node in self.world.nodes:
            waits = node.up and not node.exited
            self._demand(not waits, "progress", node, f"waits for ever: {self.world.standing()}")
        finals.check(self.world)


def _root(held: Held) -> str:
    assert held.snapshot is not None
    return held.snapshot.root


def _alike(found: dict[str, tuple[str, int, float]], kept: dict[str, tuple[str, int, float]]) -> bool:
    """Whether parts of a merge are the same, but for rounding."""
    return found.keys() == kept.keys() and all(
        found[peer][:2] == part[:2] and abs(found[peer][2] - part[2]) < 1e-12 for peer, part in kept.items()
    )


def _median(ordered: list[int]) -> int:
    """Return the lower median."""
    return ordered[(len(ordered) - 1) // 2]


def _size(thing: Any, depth: int) -> int:
    """Count what containers hold, down to a depth, in objects of the machine too."""
    if isinstance(thing, dict):
        return len(thing) + (sum(_size(value, depth - 1) for value in thing.values()) if depth else 0)
    if isinstance(thing, list | tuple | set | frozenset):
        return len(thing)
    if depth and type(thing).__name__ in ("Inbox", "Offers", "MixingState", "PushSum"):
        return _size(vars(thing), depth - 1)
    return 0
