"""The round as a state machine: train, record, publish, gather, merge, checkpoint.

`RoundMachine.handle(event)` takes an event and returns the actions that follow from it, in order. It reads no clock (a
driver turns `SetTimer` into a `Deadline`), opens no socket, and draws no random number. Three drivers run it: the
daemon's runner, the simulator, and the tests' fault simulator, which delays, drops and reorders its events.

It promises that a round ends, whichever peers are dead, no later than the deadline after its training; a peer's
snapshot enters a merge whole or not at all and at most once per round; mixing weights sum to 1, and missing weight goes
to the agent itself; late, repeated, foreign or unknown messages change nothing; whatever peers send, it keeps a bounded
amount per peer; and a machine made from a checkpoint's state continues as the one that wrote it would have.

A driver carries out actions in the order given, and a `Publish` only once the `CheckpointAction` before it is durable.
"""

from __future__ import annotations

from enum import Enum

from dimat import events
from dimat.agent.protocol import messages as m
from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.inbox import PAST, Heard, Inbox
from dimat.agent.protocol.joining import Newcomer, better_basis
from dimat.agent.protocol.mixing_state import MixingState
from dimat.agent.protocol.offers import PeerPublished
from dimat.agent.protocol.plan import LAST_ROUND, Plan, RoundPlan, Rules
from dimat.agent.protocol.refusals import Refusals
from dimat.agent.protocol.state import MachineState, Stage


class Phase(Enum):
    """The machine's phase of a round."""

    IDLE = "idle"
    JOINING = "joining"
    TRAINING = "training"
    GATHERING = "gathering"
    ADOPTING = "adopting"
    MERGING = "merging"
    DONE = "done"


class RoundMachine:
    """The rounds of one agent in one run.

    `basis`: the agent's own, and `base`: address of the weights from which a method takes task vectors, "" for none;
    a checkpoint's values take precedence.

    `state`: of the newest readable checkpoint. `published`: the last round that a checkpoint of stage "trained" was
    ever made for; peers may know rounds up to it, so none of them is published again with other content.
    """

    def __init__(
        self,
        agent: str,
        run: str,
        plan: Plan,
        rules: Rules,
        *,
        basis: BasisId,
        base: str = "",
        state: MachineState | None = None,
        published: int = 0,
    ) -> None:
        self.agent = agent
        self.run = run
        self.basis = basis if state is None else state.basis
        self.base = base if state is None else state.base
        self.round = 0 if state is None else state.round
        self.phase = Phase.IDLE
        self._plan = plan
        self._new_plan: Plan | None = None
        self._rules = rules
        self._state = state
        self._published = published
        self._inbox = Inbox(agent, run, plan, rules)
        self._inbox.base = self.base
        self.refusals = Refusals()
        self._current = RoundPlan({agent: 1.0})
        self._mixing = MixingState(agent, rules, state)
        self._adopting: PeerPublished | None = None
        self._newcomer: Newcomer | None = None
        self._unfit: set[str] = set()  # snapshots whose basis could not be adopted
        self._expired = False
        self._time_up = False
        self._merge: m.MergeAction | None = None

    @property
    def push_weight(self) -> float | None:
        """The agent's push-sum weight; None if the plan has none."""
        return self._mixing.push_weight(self._current)

    def handle(self, event: m.Event) -> list[m.Action]:
        """Take in one event, return the actions that follow from it."""
        if self.phase is Phase.DONE:
            return []
        match event:
            case PeerPublished():
                return self._offered(event)
            case m.SnapshotReady():
                return self._arrived(event)
            case m.FetchFailure():
                return self._failed(event)
            case m.TrainingDone():
                return self._trained(event)
            case m.MergeDone():
                return self._merged(event)
            case m.Deadline():
                return self._deadline(event)
            case m.PeerLost():
                return self._lost(event)
            case m.BasisChanged():
                return self._rebased(event)
            case m.WeightsAdopted():
                return [] if self._newcomer is None else self._join(self._newcomer.took_over(event))
            case m.Started():
                return self._start(event.join) if self.phase is Phase.IDLE else []
            case m.MapChanged():
                return self._remapped(event.plan)
            case m.TimeUp():
                self._time_up = True
                return self._exit("time") if self.phase is Phase.JOINING else []
            case m.Stop():
                return self._exit(event.reason)

    # ── beginning ────────────────────────────────────────────────────────────────────────────────────────────
    def _start(self, join: bool) -> list[m.Action]:
        state = self._state
        if state is None and join:
            self.phase = Phase.JOINING
            # the weights that a newcomer takes over bring their base with them
            self._inbox.base = self.base or (None if self._rules.join == "adopt" else "")
            self._newcomer = Newcomer(self.agent, self._inbox, self._plan, self._rules)
            return [m.SetTimer(0, self._rules.join_wait_s), *self._go_on()]
        if state is None:
            return self._found()
        actions: list[m.Action] = [m.Emit(events.Resumed(agent=self.agent, round=state.round, stage=state.stage))]
        if state.leaves:
            return actions + self._exit(state.leaves)
        for offer in state.offers:
            self._inbox.hear(offer)
        if state.stage != "trained":
            return actions + (self._through() or self._begin(state.round + 1))
        self.phase = Phase.GATHERING
        self._current = self._plan.of(state.round)
        actions += [
            m.SetTimer(state.round, self._rules.deadline_s),
            self._publish(),
            *self._inbox.begin(state.round, self._current),
        ]
        return actions + self._go_on()

    def _found(self, round_: int = 0) -> list[m.Action]:
        """Begin a network. `round_`: of the basis; 1 for a newcomer that hears nobody, so that its network never moves
        one that was there before."""
        self.basis = self.basis._replace(round=round_)
        self._inbox.settle(self.base)
        # durable first: an agent that crashes in its first round comes back with the same initial weights and basis
        return [m.CheckpointAction(0, "joined", self._state_now("joined")), *self._begin(1)]

    def _begin(self, first: int) -> list[m.Action]:
        """Begin the round `first`, or a later one where rounds have to be left out."""
        actions = self._inbox.end()
        if self._new_plan is not None:
            self._plan, self._new_plan = self._new_plan, None
            actions += self._inbox.change(self._plan)
        number, reason = first, ""
        if self._published >= first:
            number, reason = self._published + 1, "these rounds were published before a checkpoint was lost"
        front = self._inbox.network_round(number)
        if front > number:
            number, reason = front, "the network is ahead"
        if self._rules.beyond(number):
            return actions + self._exit("done")
        if number > first:
            skipped = events.RoundsSkipped(agent=self.agent, round=number, first=first, reason=reason)
            actions.append(m.Emit(skipped))
        actions += self._inbox.overtake(number)
        self.round = number
        self.phase = Phase.TRAINING
        self._current = self._plan.of(number)
        self._merge, self._unfit, self._expired = None, set(), False
        return [
            *actions,
            m.Emit(events.RoundStarted(agent=self.agent, round=number)),
            m.Train(number, self._current.learn),
            *self._inbox.begin(number, self._current),
        ]

    def _remapped(self, plan: Plan) -> list[m.Action]:
        """Take a new map over: with the next round, or at once where there is none in progress."""
        if self._newcomer is not None:
            self._plan = plan
            return self._join([*self._inbox.change(plan), *self._newcomer.remapped(plan)])
        self._new_plan = plan
        self._inbox.announce(plan)
        return []

    def _trained(self, event: m.TrainingDone) -> list[m.Action]:
        if event.round != self.round or self.phase is not Phase.TRAINING:
            return []
        self.phase = Phase.GATHERING
        self._mixing.trained(event.root, self._current)
        self._published = self.round
        actions: list[m.Action] = [
            m.CheckpointAction(self.round, "trained", self._state_now("trained")),
            # from here on: peers that train as long as this agent does are as late as it is, however long that takes
            m.SetTimer(self.round, self._rules.deadline_s),
            self._publish(),
        ]
        return actions + self._go_on()

    # ── hearing ──────────────────────────────────────────────────────────────────────────────────────────────
    def _offered(self, offer: PeerPublished) -> list[m.Action]:
        heard, actions = self._inbox.hear(offer)
        reason = self.refusals.reason(heard, offer, self.base)
        if reason:
            actions.append(self._refused(offer.peer, reason))
        # one that conflicts may have told, too, that its peer left a round out
        return actions + self._go_on() if heard in (Heard.NOTED, Heard.CONFLICT) else actions

    def _refused(self, peer: str, reason: str) -> m.Emit:
        return m.Emit(events.PeerRefused(agent=self.agent, round=self.round, peer=peer, reason=reason))

    def _arrived(self, event: m.SnapshotReady) -> list[m.Action]:
        if self._newcomer is not None:
            return self._join(self._newcomer.arrived(event))
        actions = self._inbox.arrived(event.peer, event.round, event.root)
        return [] if actions is None else actions + self._go_on()

    def _failed(self, event: m.FetchFailure) -> list[m.Action]:
        if self._newcomer is not None:
            return self._join(self._newcomer.failed(event))
        actions = self._inbox.failed(event.peer, event.round, event.root, event.reason)
        return [] if actions is None else actions + self._go_on()

    def _lost(self, event: m.PeerLost) -> list[m.Action]:
        if not self._inbox.gone(event.peer, event.reason, event.last):
            return []
        return self._go_on() if self._newcomer is None else self._join(self._newcomer.lost(event))

    def _deadline(self, event: m.Deadline) -> list[m.Action]:
        if self._newcomer is not None:
            return self._join(self._newcomer.time_is_up()) if event.round == 0 else []
        if event.round != self.round or self.phase is not Phase.GATHERING:
            return []
        self._expired = True
        self._inbox.expire()
        return self._go_on()

    def _go_on(self) -> list[m.Action]:
        """Leave the phase if what it waits for is here, given up or overdue."""
        if self._newcomer is not None:
            return self._join(self._newcomer.go_on())
        return self._maybe_merge() if self.phase is Phase.GATHERING else []

    # ── joining a network that lives ─────────────────────────────────────────────────────────────────────────
    def _join(self, actions: list[m.Action]) -> list[m.Action]:
        """Do what the newcomer asks for, and once it is decided how, begin: at the network's round, with a peer's
        weights or own; or found a network."""
        done = self._newcomer.done if self._newcomer is not None else None
        if done is None:
            return actions
        self._newcomer = None
        if done.founds:
            return [*actions, m.Emit(events.Joined(agent=self.agent, round=1, how="found")), *self._found(1)]
        offer, record = done.adopt, None
        self.round = done.round
        if offer is None:
            # a newcomer never moves a network that lives: its basis is as young as the first round that it takes part
            # in, and younger than the oldest that it heard of, which one peer's word may leave ahead of that round
            heard = min((offer.basis.round for offer in self._inbox.offers), default=0)
            self.basis = self.basis._replace(round=max(done.round, min(heard, LAST_ROUND)) + 1)
            joined = events.Joined(agent=self.agent, round=self.round + 1, how="align")
        else:
            self.basis, self.base = offer.basis, offer.base
            record = self._mixing.took_over(offer, self.round)
            joined = events.Joined(agent=self.agent, round=self.round + 1, how="adopt", peer=offer.peer)
        self._inbox.settle(self.base)
        checkpoint = m.CheckpointAction(self.round, "joined", self._state_now("joined"), record)
        return [m.Emit(joined), checkpoint, *actions, *(self._through() or self._begin(self.round + 1))]

    # ── merging ──────────────────────────────────────────────────────────────────────────────────────────────
    def _maybe_merge(self) -> list[m.Action]:
        """Go on to the merge once every expected peer has arrived or is given up."""
        inbox = self._inbox
        expected, missing, usable = inbox.expected(), inbox.missing(), inbox.usable()
        needed = min(self._rules.min_peers, len(expected))
        past = sum(inbox.lost.get(peer) == PAST for peer in missing)
        short = len(usable) < needed <= len(expected) - past  # more may still come
        if (short or any(peer not in inbox.lost for peer in missing)) and not self._expired:
            return []
        inbox.open = False
        actions: list[m.Action] = [
            m.Emit(
                events.PeerLate(agent=self.agent, round=self.round, peer=peer, reason=inbox.lost.get(peer, "deadline"))
            )
            for peer in missing
        ]
        if len(usable) < max(needed, min(1, len(expected))) and not inbox.mode.begins_alone(self.round):
            heard = "no peer was" if not usable else f"{len(usable)} of at least {needed} peers were"
            waited = f" within {self._rules.deadline_s:g} s of its training" if self._expired else ""
            message = f"{heard} heard in round {self.round}{waited}; own weights are kept"
            actions.append(m.Emit(events.Warned(message=message, agent=self.agent)))
        return actions + self._adopt_or_merge()

    def _adopt_or_merge(self) -> list[m.Action]:
        usable = self._inbox.usable().values() if self._rules.basis_gossip else ()
        best = better_basis(self.basis, [o for o in usable if o.root not in self._unfit], self._current.mixing)
        if best is None:
            return self._start_merge()
        self.phase = Phase.ADOPTING
        self._adopting = best
        return [m.AdoptBasis(self.round, best.peer, best.root, best.basis)]

    def _rebased(self, event: m.BasisChanged) -> list[m.Action]:
        offer = self._adopting
        if event.round != self.round or self.phase is not Phase.ADOPTING or offer is None:
            return []
        self._adopting = None
        if event.basis == self.basis:
            self._unfit.add(offer.root)
            return self._adopt_or_merge()
        self.basis = event.basis
        self._mixing.rebased(self.round, offer)
        adopted = events.BasisAdopted(
            agent=self.agent,
            round=self.round,
            peer=offer.peer,
            basis=str(event.basis),
            moved=event.moved,
            groups=event.groups,
        )
        told = [m.Emit(adopted)]
        if event.note:
            told.append(m.Emit(events.Warned(agent=self.agent, message=event.note)))
        return [*told, *self._start_merge()]

    def _start_merge(self) -> list[m.Action]:
        self.phase = Phase.MERGING
        usable = self._inbox.usable()
        if len(usable) < min(self._rules.min_peers, len(self._inbox.expected())):
            usable = {}
        self._merge = self._mixing.merge(self.round, self._current, usable, self.basis)
        return [self._merge]

    def _merged(self, event: m.MergeDone) -> list[m.Action]:
        merge = self._merge
        if event.round != self.round or self.phase is not Phase.MERGING or merge is None:
            return []
        expected = len(self._inbox.expected())
        merged, record = self._mixing.merged(merge, event.result, self._current, expected)
        reached = self._rules.reached(event.result.after)
        actions: list[m.Action] = [
            *(self._refused(peer, reason) for peer, reason in sorted(event.result.refused.items())),
            m.Emit(merged),
            m.CheckpointAction(self.round, "merged", self._state_now("merged", "target" if reached else ""), record),
        ]
        if reached:
            return actions + self._exit("target")
        return actions + (self._through() or self._begin(self.round + 1))

    # ── ending ───────────────────────────────────────────────────────────────────────────────────────────────
    def _through(self) -> list[m.Action]:
        """Leave if the round that is over was the last one."""
        if self._rules.beyond(self.round + 1):
            return self._exit("done")
        return self._exit("time") if self._time_up else []

    def _exit(self, reason: str) -> list[m.Action]:
        self.phase = Phase.DONE
        return [m.Exit(reason)]

    def _publish(self) -> m.Publish:
        mixing = self._mixing
        return m.Publish(self.round, mixing.root, self.basis, mixing.parents, dict(mixing.push.sent), self.base)

    def _state_now(self, stage: Stage, leaves: str = "") -> MachineState:
        return MachineState(
            run=self.run,
            agent=self.agent,
            round=self.round,
            stage=stage,
            basis=self.basis,
            root=self._mixing.root,
            parents=self._mixing.parents,
            base=self.base,
            push=self._mixing.push.to_dict(),
            offers=tuple(self._inbox.offers),
            leaves=leaves,
        )
