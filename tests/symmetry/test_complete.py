"""Nothing is frozen without need: what never moves must change the outputs when it is moved after all."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from dimat.symmetry import AxisRef, Factor, Group, SymmetrySpec, derive_symmetry, verify_symmetry
from tests.symmetry.wide import ENTRIES, build

pytestmark = pytest.mark.zoo
MODELS = ("lenet", "resnet20_a", "unet", "lstm", "transformer_encoder", "gpt2", "bert", "llama_sdpa", "t5", "opt")


@pytest.mark.parametrize("name", MODELS)
def test_what_is_frozen_matters(name: str) -> None:
    """Reference: a float64 forward pass in which all axes that one cause froze are permuted alike, and nothing else."""
    entry = ENTRIES[name]
    if entry.source == "transformers":
        pytest.importorskip("transformers")
    model, inputs = build(entry)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec = derive_symmetry(model, inputs, entry.outputs)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    moving = {(axis.tensor, axis.dim) for axis in spec.axes}
    causes: dict[tuple[str, str, int], list[tuple[str, int]]] = defaultdict(list)
    for frozen in spec.frozen:
        place = (frozen.tensor, frozen.dim)
        if frozen.tensor in shapes and place not in moving and shapes[frozen.tensor][frozen.dim] > 1:
            causes[frozen.reason, frozen.node, shapes[frozen.tensor][frozen.dim]].append(place)
    assert causes
    for cause, places in causes.items():
        probe = _probe(spec, cause[2], places)
        errors = (verify_symmetry(model, probe, inputs, torch.Generator().manual_seed(seed)) for seed in range(4))
        assert any(error > 1e-6 for error in errors), f"{cause[0]} at {cause[1]}: {places} could move"


def _probe(spec: SymmetrySpec, size: int, places: list[tuple[str, int]]) -> SymmetrySpec:
    """Return a spec with one group: all of the given axes, each as a whole."""
    layout = ((Factor(size, "probe"),),)
    axes = tuple(AxisRef(tensor, dim, layout) for tensor, dim in sorted(places))
    return replace(spec, groups=(Group("probe", size, tuple(sorted(places))),), axes=axes)
