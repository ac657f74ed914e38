"""Faults in the round machine and its driver, made on purpose: each breaks a promise that the checks must find."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from dimat import events
from dimat.agent.protocol import inbox, joining, mixing_state, offers, plan, push_sum
from dimat.agent.protocol import messages as m
from dimat.agent.protocol import round as round_module
from dimat.agent.protocol.offers import Known, PeerPublished
from dimat.agent.protocol.round import RoundMachine
from dimat.events import MergeResult
from tests.faults.node import Node
from tests.faults.world import World

Rewrite = Callable[[Any, m.Event, list[m.Action]], list[m.Action]]
Patch = tuple[Any, str, Any]


@dataclass(frozen=True)
class Mutant:
    """`breaks`: what is wrong with it; `world`: the driver to use while `patches` are in force; `first`: the schedule
    to begin with, near one that shows a rare fault."""

    name: str
    breaks: str
    world: type[World] = World
    patches: tuple[Patch, ...] = ()
    first: int = 0

    @contextmanager
    def alive(self) -> Iterator[type[World]]:
        """Put the mutation in force, and undo it."""
        with ExitStack() as stack:
            for target, attribute, value in self.patches:
                stack.enter_context(patch.object(target, attribute, value))
            yield self.world


class Kept(RoundMachine):
    """A machine that remembers what it was made with."""

    def __init__(self, agent: str, run: str, rounds: Any, rules: Any, **more: Any) -> None:
        super().__init__(agent, run, rounds, rules, **more)
        self.made_with = (rounds, rules, more["basis"])


def driving(machine: type[RoundMachine]) -> type[World]:
    return type("Mutated", (World,), {"machine": machine})


def rewriting(rewrite: Rewrite) -> type[World]:
    """Return a driver of machines whose actions are rewritten."""

    class Machine(Kept):
        def handle(self, event: m.Event) -> list[m.Action]:
            return rewrite(self, event, super().handle(event))

    return driving(Machine)


def hearing(change: Callable[[Any, m.Event], m.Event | None]) -> type[World]:
    """Return a driver of machines that take events for others; None: for nothing."""

    class Machine(Kept):
        def handle(self, event: m.Event) -> list[m.Action]:
            heard = change(self, event)
            return [] if heard is None else super().handle(heard)

    return driving(Machine)


def each(change: Callable[[Any, m.Action], m.Action]) -> Rewrite:
    return lambda machine, _, actions: [change(machine, action) for action in actions]


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────
def _missing_mass(machine: Any, action: m.Action) -> m.Action:
    if isinstance(action, m.MergeAction) and machine.push_weight is None:
        rounds, _, _ = machine.made_with
        return replace(action, own_weight=rounds.of(action.round).mixing[machine.agent])
    return action


def _twice_in_a_merge(machine: Any, action: m.Action) -> m.Action:
    if isinstance(action, m.MergeAction) and action.parts:
        half = replace(action.parts[0], weight=action.parts[0].weight / 2)
        return replace(action, parts=(half, half, *action.parts[1:]))
    return action


def _no_decay(rules: Any, *more: Any) -> Any:
    return _shares(replace(rules, staleness_decay=1.0), *more)


_shares = mixing_state.shares


def _refused_counts(agent: str, root: str, merge: m.MergeAction, result: MergeResult, **more: Any) -> Any:
    return _contributions(agent, root, merge, replace(result, refused={}), **more)


def _backing_off_forgotten(agent: str, root: str, merge: m.MergeAction, result: MergeResult, **more: Any) -> Any:
    return _contributions(agent, root, merge, replace(result, accepted=1.0), **more)


_contributions = mixing_state.contributions


# ── messages ─────────────────────────────────────────────────────────────────────────────────────────────────────
def _stranger(machine: Any, event: m.Event) -> m.Event:
    rounds, _, _ = machine.made_with
    if isinstance(event, PeerPublished) and event.peer not in rounds.peers and rounds.peers:
        return replace(event, peer=min(rounds.peers))
    return event


def _other_run(machine: Any, event: m.Event) -> m.Event:
    return replace(event, run=machine.run) if isinstance(event, PeerPublished) else event


def _other_base(machine: Any, event: m.Event) -> m.Event:
    return replace(event, base=machine.base) if isinstance(event, PeerPublished) else event


def _newest_content(self: Any, offer: PeerPublished) -> Known:
    kept = self._offers.setdefault(offer.peer, {})
    kept[offer.round] = offer
    return Known.NEW


def _partial(machine: Any, event: m.Event, actions: list[m.Action]) -> list[m.Action]:
    for fetch in [a for a in actions if isinstance(a, m.Fetch)]:
        actions = actions + machine.handle(m.SnapshotReady(fetch.peer, fetch.round, fetch.root))
    return actions


def _keep_late(self: Any) -> list[m.Action]:
    self.open = False
    self._retired, self.fetching = [], {}
    return []


def _deaf_to_deadlines(machine: Any, event: m.Event) -> m.Event | None:
    return None if isinstance(event, m.Deadline) and event.round else event


# ── what is durable ──────────────────────────────────────────────────────────────────────────────────────────────
def _early(machine: Any, event: m.Event, actions: list[m.Action]) -> list[m.Action]:
    return sorted(actions, key=lambda action: not isinstance(action, m.Publish))


def _train_first(machine: Any, event: m.Event, actions: list[m.Action]) -> list[m.Action]:
    return sorted(actions, key=lambda action: not isinstance(action, m.Train))


def _silent_restart(machine: Any, event: m.Event, actions: list[m.Action]) -> list[m.Action]:
    if isinstance(event, m.Started):
        return [action for action in actions if not isinstance(action, m.Publish)]
    return actions


def _orphan(machine: Any, event: m.Event, actions: list[m.Action]) -> list[m.Action]:
    if isinstance(event, m.Started):
        return [replace(a, parents=()) if isinstance(a, m.Publish) else a for a in actions]
    return actions


def _state(**changes: Callable[[Any, Any], Any]) -> Rewrite:
    """Rewrite entries of the states in checkpoints, given the machine and the state."""

    def change(machine: Any, action: m.Action) -> m.Action:
        if not isinstance(action, m.CheckpointAction):
            return action
        values = {name: make(machine, action.state) for name, make in changes.items()}
        return replace(action, state=replace(action.state, **values))

    return each(change)


class _NoRecord(World):
    """A driver that loses every other record of a merge."""

    def record(self, node: Node, record: Any) -> None:
        if record.round % 2:
            super().record(node, record)


class _NoStream(World):
    """A driver that restores weights and momentum and starts its random stream anew."""

    def restore(self, node: Node) -> tuple[Any, Any]:
        state, model = super().restore(node)
        model.stream = node.initial.stream
        return state, model


class _NoMomentum(World):
    """A driver that permutes weights when a basis is adopted, and leaves the optimizer as it was."""

    def rebase(self, node: Node, action: m.AdoptBasis) -> m.Event:
        momentum = node.model.momentum
        event = super().rebase(node, action)
        node.model.momentum = momentum
        return event


class _Unaware(World):
    """A driver that does not say which rounds were published before a checkpoint was lost."""

    def make(self, node: Node, state: Any) -> RoundMachine:
        published, node.published = node.published, 0
        machine = super().make(node, state)
        node.published = published
        return machine


class _Shuffled(World):
    """A driver that carries actions out in another order."""

    def step(self, node: Node, event: m.Event, *, idle: bool = False) -> None:
        machine = node.machine
        if machine is not None and type(machine) is RoundMachine:
            handle = machine.handle
            machine.handle = lambda e: handle(e)[::-1]
        super().step(node, event, idle=idle)
        if machine is not None:
            vars(machine).pop("handle", None)


# ── push-sum, bases, joining ─────────────────────────────────────────────────────────────────────────────────────
def _twice(self: Any, pushed: Any) -> None:
    _take(self, pushed)
    self.weight += math.fsum(pushed.values()) * 1e-3


_take = push_sum.PushSum.take


def _larger_basis(own: Any, offers_: Any, weight: Any) -> Any:
    return max((o for o in offers_ if o.basis > own), key=lambda offer: offer.basis, default=None)


def _old_basis(machine: Any, action: m.Action) -> m.Action:
    if isinstance(action, m.Emit) and isinstance(action.fact, events.Joined) and action.fact.how == "align":
        machine.basis = machine.made_with[2]._replace(round=-1)
    return action


def _patient(self: Any) -> list[m.Action]:
    return [] if self._adopting is not None else _time_is_up(self)


_time_is_up = joining.Newcomer.time_is_up


# ── targets, rounds that there cannot be, needless waiting ───────────────────────────────────────────────────────
def _above_target(machine: Any, event: m.Event) -> m.Event:
    if isinstance(event, m.MergeDone):
        after = {name: value - 0.5 for name, value in event.result.after.items()}
        return replace(event, result=replace(event.result, after=after))
    return event


def _one_round_more(machine: Any, event: m.Event) -> m.Event:
    return replace(event, last=event.last + 1) if isinstance(event, m.PeerLost) else event


def _hindmost(self: Any, peers: Any) -> int:
    return min((self.range(peer)[1] for peer in peers if self.range(peer)[1]), default=0)


def _waits_again(self: Any) -> None:
    silent = dict(self._silent)
    _expire(self)
    self._silent = silent


_expire = inbox.Inbox.expire


MUTANTS = (
    Mutant("missing-mass", "weights are not renormalised over what arrived", rewriting(each(_missing_mass))),
    Mutant("twice-in-a-merge", "a peer is merged twice in a round", rewriting(each(_twice_in_a_merge))),
    Mutant("no-decay", "stale snapshots count in full", patches=((mixing_state, "shares", _no_decay),)),
    Mutant("refused-counts", "refused peers are listed", patches=((mixing_state, "contributions", _refused_counts),)),
    Mutant(
        "backing-off-forgotten",
        "a merge that was half accepted is listed in full",
        patches=((mixing_state, "contributions", _backing_off_forgotten),),
    ),
    Mutant("strangers", "whoever offers is taken for a peer", hearing(_stranger)),
    Mutant("other-run", "offers of another run count", hearing(_other_run)),
    Mutant("other-base", "offers with another base count", hearing(_other_base)),
    Mutant(
        "mixed-bases",
        "a newcomer keeps what it was offered on another base than it has come to",
        patches=((offers.Offers, "settle", lambda self, base: None),),
        first=1_200,
    ),
    Mutant("newest-content", "the last content offered counts", patches=((offers.Offers, "note", _newest_content),)),
    Mutant("partial", "a snapshot is merged before it is here", rewriting(_partial)),
    Mutant("late-snapshots", "snapshots of the round before are merged", patches=((inbox.Inbox, "end", _keep_late),)),
    Mutant("no-deadline", "a round waits past its deadline", hearing(_deaf_to_deadlines)),
    Mutant("unbounded", "offers are kept without bound", patches=((offers, "ROUNDS_KEPT", 10**9),), first=200),
    Mutant("publish-first", "a snapshot is published before it is durable", rewriting(_early)),
    Mutant("train-first", "training begins before the merge is durable", rewriting(_train_first)),
    Mutant("shuffled", "actions are carried out in another order", _Shuffled),
    Mutant("silent-restart", "what was durable is not republished", rewriting(_silent_restart)),
    Mutant("no-parents", "a snapshot is republished with other parents", rewriting(_orphan)),
    Mutant("no-skip", "published rounds are trained anew after a checkpoint was lost", _Unaware),
    Mutant("no-stream", "the random stream starts anew after a crash", _NoStream),
    Mutant("no-record", "records of merges get lost", _NoRecord),
    Mutant(
        "no-basis",
        "the basis is not in the checkpoint",
        rewriting(_state(basis=lambda machine, state: machine.made_with[2])),
    ),
    Mutant(
        "no-sent",
        "push-sum weight given away is not in the checkpoint",
        rewriting(_state(push=lambda machine, state: {**state.push, "sent": {}})),
    ),
    Mutant(
        "no-taken",
        "push-sum weight taken in is not in the checkpoint",
        rewriting(_state(push=lambda machine, state: {**state.push, "taken": {}})),
    ),
    Mutant("push-twice", "push-sum weight is taken in twice", patches=((push_sum.PushSum, "take", _twice),)),
    Mutant("larger-basis", "the larger basis wins", patches=((round_module, "better_basis", _larger_basis),)),
    Mutant("no-momentum", "a basis is adopted without the optimizer", _NoMomentum),
    Mutant("old-basis", "a newcomer founds the oldest basis", rewriting(each(_old_basis))),
    Mutant(
        "patient-newcomer",
        "a newcomer waits for ever for the weights that it chose",
        patches=((joining.Newcomer, "time_is_up", _patient),),
        first=1_850,
    ),
    Mutant("above-target", "a target has to be exceeded, not reached", hearing(_above_target)),
    Mutant(
        "target-forgotten",
        "an agent that has reached its target goes on after a restart",
        rewriting(_state(leaves=lambda machine, state: "")),
    ),
    Mutant("beyond", "rounds after the last are taken", patches=((plan.Rules, "beyond", lambda self, number: False),)),
    Mutant("hindmost", "the network's round is the hindmost's", patches=((offers.Offers, "front", _hindmost),)),
    Mutant("one-round-more", "one that has left is waited for in one round more", hearing(_one_round_more)),
    Mutant("waits-again", "the silent are waited for in every round", patches=((inbox.Inbox, "expire", _waits_again),)),
    Mutant(
        "waits-for-the-far",
        "peers that are far behind are waited for",
        patches=((inbox.Inbox, "_is_behind", lambda self, peer: False),),
    ),
    Mutant(
        "waits-for-gaps",
        "rounds that a peer has left out are waited for",
        patches=((offers.Offers, "left_out", lambda self, peer, number: False),),
    ),
)
BY_NAME = {mutant.name: mutant for mutant in MUTANTS}
