"""The machine's part of a checkpoint. Reference: the law that reading undoes writing, through JSON, for any state."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.messages import PeerPublished
from dimat.agent.protocol.plan import PushShares
from dimat.agent.protocol.push_sum import PushSum
from dimat.agent.protocol.state import MachineState, Stage
from dimat.events import Contribution

# lone surrogates are no text; control characters, quotes and colons are
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
ROUNDS = st.integers(0, 10**6)
WEIGHTS = st.floats(0, 1)
BASES = st.builds(BasisId, ROUNDS, NAMES, st.text("0123456789abcdef", min_size=1, max_size=16))
PARTS = st.builds(Contribution, agent=NAMES, snapshot=NAMES, round=ROUNDS, weight=WEIGHTS, verdict=NAMES)
OFFERS = st.builds(
    PeerPublished, NAMES, ROUNDS, NAMES, BASES, run=NAMES, oldest=ROUNDS, pushed=st.floats(0, 1e9), base=NAMES
)


@st.composite
def ledgers(draw: st.DrawFn) -> dict[str, Any]:
    ledger = PushSum()
    for _ in range(draw(st.integers(0, 3))):
        ledger.push(PushShares(0.5, {draw(NAMES): 0.25, draw(NAMES): 0.25}))
        ledger.take({draw(NAMES): draw(st.floats(0, 4))})
    return ledger.to_dict()


STATES = st.builds(
    MachineState,
    run=NAMES,
    agent=NAMES,
    round=ROUNDS,
    stage=st.sampled_from(get_args(Stage)),
    basis=BASES,
    root=NAMES,
    parents=st.lists(PARTS, max_size=4).map(tuple),
    base=NAMES,
    push=ledgers(),
    offers=st.lists(OFFERS, max_size=4).map(tuple),
)


@given(STATES)
def test_reading_undoes_writing(state: MachineState) -> None:
    """from_dict ∘ JSON ∘ to_dict = identity, to the last bit of a weight."""
    assert MachineState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


@given(ledgers())
def test_a_push_sum_ledger_is_part_of_it(ledger: dict[str, Any]) -> None:
    """The same law for what `push` holds: weight and sums come back bit for bit."""
    assert PushSum.from_dict(json.loads(json.dumps(ledger))).to_dict() == ledger


@given(BASES)
def test_a_basis_id_reads_back_and_keeps_its_order(basis: BasisId) -> None:
    """parse ∘ str = identity, whatever the founder is called; ids compare as their parts do."""
    assert BasisId.parse(str(basis)) == basis
    assert basis < basis._replace(round=basis.round + 1)


@given(state=STATES, data=st.data())
def test_what_is_something_else_is_said_to_be(state: MachineState, data: st.DataObject) -> None:
    """A state that lacks a key, or has junk there: KeyError, TypeError or ValueError, which whoever reads turns into
    one line."""
    values = state.to_dict()
    key = data.draw(st.sampled_from(["stage", "basis", "parents", "offers", "push", "round"]))
    junk = data.draw(st.sampled_from(["gone", "?", *([None, [5], ["?"]] if key != "basis" else [])]))
    if junk == "gone":
        del values[key]
    else:
        values[key] = junk
    with pytest.raises((KeyError, TypeError, ValueError)):
        MachineState.from_dict(values)


@pytest.mark.parametrize("text", ["", "1", "1:", "1::", ":a:b", "x:a:b", "1:a", "1:a:"])
def test_what_is_no_basis_id(text: str) -> None:
    """ValueError for anything but round:founder:nonce."""
    with pytest.raises(ValueError, match=r"basis id|invalid literal"):
        BasisId.parse(text)


def test_a_basis_that_is_no_text() -> None:
    """As for any junk: KeyError, TypeError or ValueError."""
    values = MachineState("r", "a", 1, "merged", BasisId(0, "a", "0")).to_dict()
    with pytest.raises((KeyError, TypeError, ValueError)):
        MachineState.from_dict({**values, "basis": None})
