"""Modules that export cannot follow: what `make_fx` gives, and what is and is not covered."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from dimat.symmetry import (
    Observer,
    SymmetryWarning,
    derive_symmetry,
    permute_weights,
    random_permutations,
    trace,
    verified_symmetry,
    verify_symmetry,
)
from dimat.symmetry.paths import PATHS


class Loop(nn.Module):
    """Applies a layer until the values are small: export cannot know how often."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        rounds = 0
        while x.abs().sum() > 1 and rounds < 5:
            x = torch.tanh(self.again(x)) * 0.5
            rounds += 1
        return self.last(x)


class Forked(nn.Module):
    """Takes another layer for large inputs than for small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(8, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.last(torch.relu(self.left(h) if x.sum() > 0 else self.right(h)))


def test_a_loop_that_depends_on_data_is_traced_by_running_it() -> None:
    """Reference: the hidden units are one group, by hand; outputs of inputs that were not traced stay the same."""
    model, inputs = Loop(), torch.randn(3, 4)
    spec = derive_symmetry(model, inputs)
    assert spec.trace_kind == "make_fx"
    (group,) = spec.groups
    assert (group.size, group.method, group.points) == (8, "weight", ())
    assert set(group.axes) >= {("again.weight", 0), ("again.weight", 1), ("last.weight", 1)}
    moved = permute_weights(model.state_dict(), spec, random_permutations(spec, torch.Generator().manual_seed(0)))
    for scale in (0.0, 0.1, 10.0):
        given = torch.randn(5, 4) * scale
        torch.testing.assert_close(torch.func.functional_call(model, moved, (given,)), model(given))
    Observer(model, spec, inputs)


def test_all_paths_relate_the_same_parameters() -> None:
    """Reference: both layers of the fork make the units that the last one reads; one path alone sees one of them."""
    torch.manual_seed(0)
    model, inputs = Forked(), torch.randn(3, 4)
    traced = trace(model, inputs)
    assert traced.kind == "make_fx"
    assert len(traced.others) == 1
    spec = derive_symmetry(model, inputs)
    assert sorted(group.size for group in spec.groups) == [6, 8]
    six = next(group for group in spec.groups if group.size == 6)
    assert {("left.weight", 0), ("right.weight", 0), ("last.weight", 1)} <= set(six.axes)
    for sign in (1, -1):
        assert verify_symmetry(model, spec, sign * torch.rand(3, 4), torch.Generator().manual_seed(0)) < 1e-12


def test_the_hash_does_not_depend_on_the_numbers_given() -> None:
    """Reference: peers have other examples, and must agree on what they run."""
    hashes = {derive_symmetry(Loop(), torch.randn(3, 4) * scale).arch_hash for scale in (0.01, 1, 10)}
    assert len(hashes) == 1


class Detour(nn.Module):
    """Leaves torch in the middle, so that the first layer seems not to matter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.from_numpy(np.tanh(self.first(x).detach().numpy())).clone()
        return self.last(torch.relu(self.second(x)))


def test_what_leaves_torch_stays_where_it_is(tmp_path: Path) -> None:
    """Reference: by hand: what goes to numpy passes an operation without a rule, which freezes the first layer's units;
    those of the second layer move."""
    model, inputs = Detour(), torch.randn(3, 4)
    spec = verified_symmetry(model, inputs, torch.Generator().manual_seed(0), folder=tmp_path)
    assert [group.size for group in spec.groups] == [6]
    assert "SYM-W02 no rule for aten.resolve_conj" in spec.warnings[0]


class Packed(nn.Module):
    """Reads sequences that are sorted by length, the longest first, and takes a path by value; keeps what it was given.

    torch refuses lengths in any other order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(7, 4), nn.Linear(4, 6)
        self.cells, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 2)
        self.seen: list[tuple[list[list[int]], list[int]]] = []

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        if type(tokens) is Tensor:  # export's tensors have no numbers
            self.seen.append((tokens.tolist(), lengths.tolist()))
        hidden = torch.tanh(self.layer(self.embed(tokens)))
        if bool(tokens.float().mean() < 0):
            return self.head(hidden[:, 0])
        _, (state, _) = self.cells(pack_padded_sequence(hidden, lengths, batch_first=True))
        return self.head(state[0])


@pytest.mark.filterwarnings("ignore:SYM-W02:dimat.symmetry.SymmetryWarning")
def test_sorted_lengths_stay_sorted() -> None:
    """Reference: by hand: the columns of the embedding, the layer's units and the cells' are three groups. On its other
    runs the model is given the same lengths, and rows of the same tokens in another order."""
    torch.manual_seed(0)
    model, lengths = Packed(), torch.tensor([5, 3, 2])
    tokens = torch.tensor([[0, 1, 2, 3, 4], [6, 5, 5, 1, 0], [2, 2, 3, 6, 6]])
    spec = derive_symmetry(model, (tokens, lengths))
    assert spec.trace_kind == "make_fx"
    assert sorted(group.size for group in spec.groups) == [4, 5, 6]
    assert {tuple(longest) for _, longest in model.seen} == {(5, 3, 2)}
    assert {tuple(sorted(rows[0])) for rows, _ in model.seen} == {(0, 1, 2, 3, 4)}
    assert {tuple(sorted(rows[1])) for rows, _ in model.seen} == {(0, 1, 5, 5, 6)}
    assert {tuple(sorted(rows[2])) for rows, _ in model.seen} == {(2, 2, 3, 6, 6)}
    assert len({str(rows) for rows, _ in model.seen}) == PATHS
    assert verify_symmetry(model, spec, (tokens, lengths), torch.Generator().manual_seed(0)) < 1e-9


def test_the_cause_of_each_way_to_trace_is_told() -> None:
    """Reference: what torch says of lengths that are not sorted where it sees their numbers, and export's own error
    where it does not."""
    with pytest.warns(SymmetryWarning) as told:
        spec = derive_symmetry(Packed(), (torch.ones(3, 5, dtype=torch.long), torch.tensor([2, 3, 5])))
    assert (spec.trace_kind, spec.groups) == ("none", ())
    (message,) = (str(warning.message) for warning in told)
    ran, _, exported = message.partition("; torch.export raised ")
    assert ran.startswith("SYM-E01 cannot trace: running it raised RuntimeError: `lengths` array must be sorted in")
    assert exported.startswith("GuardOnDataDependentSymNode: Could not guard on data-dependent expression")
    assert exported.endswith("; averaging without alignment")


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no forward today")


def test_what_does_not_even_run_is_averaged_as_it_is() -> None:
    """Reference: SYM-E01 with the cause."""
    with pytest.warns(SymmetryWarning, match="SYM-E01 cannot trace: ValueError: no forward today; averaging"):
        spec = derive_symmetry(Broken(), torch.randn(2, 4))
    assert (spec.trace_kind, spec.groups) == ("none", ())
