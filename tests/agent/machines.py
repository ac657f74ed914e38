"""Round machines of an agent "me" with peers b and c, and how to talk to them."""

from __future__ import annotations

from typing import Any

from dimat import events
from dimat.agent.protocol import messages as r
from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.plan import Plan, RoundPlan, Rules
from dimat.agent.protocol.round import RoundMachine
from dimat.agent.protocol.state import MachineState
from dimat.config import ScheduleConfig

MINE = BasisId(0, "me", "0")
ROW = {"me": 0.5, "b": 0.25, "c": 0.25}


def machine(state: MachineState | None = None, published: int = 0, base: str = "", **rules: Any) -> RoundMachine:
    plan = Plan(frozenset({"b", "c"}), lambda _: RoundPlan(ROW))
    settings: dict[str, Any] = {"rounds": 100, "deadline_s": 10.0, **rules}
    return RoundMachine(
        "me",
        "run",
        plan,
        Rules.of(ScheduleConfig(), **settings),
        basis=MINE,
        base=base,
        state=state,
        published=published,
    )


def offer(peer: str, number: int, oldest: int | None = None, **fields: Any) -> r.PeerPublished:
    basis = fields.pop("basis", BasisId(0, "z" + peer, "0"))
    return r.PeerPublished(peer, number, f"{peer}{number}", basis, "run", oldest or number, **fields)


def of(actions: list[r.Action], kind: type[Any]) -> list[Any]:
    return [action for action in actions if isinstance(action, kind)]


def told(actions: list[r.Action], kind: type[events.Event]) -> list[Any]:
    return [action.fact for action in of(actions, r.Emit) if isinstance(action.fact, kind)]


def have(m: RoundMachine, peer: str, number: int, **fields: Any) -> list[r.Action]:
    """Offer a snapshot, and bring it if it is asked for."""
    actions = m.handle(offer(peer, number, **fields))
    for fetch in of(actions, r.Fetch):
        actions += m.handle(r.SnapshotReady(fetch.peer, fetch.round, fetch.root))
    return actions


def go_to(m: RoundMachine, number: int, *, peers: bool = True) -> list[r.Action]:
    """Take a synchronous machine to the beginning of a round, with everybody's snapshots or with nobody's."""
    actions = m.handle(r.Started())
    for current in range(1, number):
        m.handle(r.TrainingDone(current, f"own{current}"))
        for peer in ("b", "c") if peers else ():
            have(m, peer, current)
        m.handle(r.Deadline(current))
        actions = m.handle(r.MergeDone(current))
    assert m.round == number
    return actions
