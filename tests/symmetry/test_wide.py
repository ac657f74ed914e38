"""The wide zoo in CI: every model that is cheap enough is traced and meets its targets.

Reference: group counts by hand, and a float64 forward pass under random group elements. Seconds are not asserted
here; `make zoo` measures them.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dimat.symmetry import tolerance_of, verify_symmetry
from tests.symmetry.wide import ENTRIES, Entry, Subject, measure, shortcomings
from tests.symmetry.wide import __main__ as command
from tests.symmetry.wide.planted import FOUND, recover

pytestmark = pytest.mark.zoo

COSTLY = {
    "wide_resnet50_2": "69 M parameters in float64, the graph of resnet50",
    "vgg11_bn": "133 M parameters in float64; the VGG of the small zoo has its structure",
    "alexnet": "61 M parameters in float64, a plain chain as vgg",
    "vit_b_16": "86 M parameters in float64; deit_tiny has its structure",
}


def _params(names: Iterable[str]) -> list[object]:
    return [pytest.param(ENTRIES[name], id=name) for name in names]


CHEAP = [name for name in ENTRIES if name not in COSTLY]
OF_TRANSFORMERS = [name for name in CHEAP if ENTRIES[name].source == "transformers"]


def test_lists_name_models_of_the_zoo() -> None:
    """Reference: the registry; a model that was renamed must not drop out of sight."""
    assert {*COSTLY, *LARGER, *UNPLANTED} <= set(ENTRIES)


NEWER: dict[str, tuple[str, ...]] = {
    "mixtures of experts": (
        *("gpt_oss", "qwen2_moe", "qwen3_moe", "olmoe", "granite_moe", "phimoe", "looped_experts", "listed_experts"),
        *("interleaved_experts", "dense_experts", "looked_up_experts", "soft_experts"),
    ),
    "latent attention": ("deepseek_v2", "deepseek_v3"),
    "decoders": (
        *("gemma", "gemma2", "olmo2", "granite", "stablelm", "cohere2", "helium", "glm4", "nemotron", "smollm3"),
        *("gptj", "gpt_neo", "opt", "falcon", "starcoder2", "local_layers"),
    ),
    "distances in attention": ("mpt", "bloom", "slopes_by_head", "flex_attention", "complex_rotary"),
    "state-space models and scans": ("mamba2", "scans", "long_convolution"),
    "readers": ("bart", "electra", "mpnet", "squeezebert", "roformer", "convbert", "roberta", "albert", "deberta_v2"),
    "spectral and complex": ("fnet", "fourier_operator", "speech_spectra", "complex"),
    "images": (
        *("efficientnet_v2_s", "poolformer_s12", "resnest14d", "xcit_nano_12_p16_224", "mobilevit_xxs", "davit_tiny"),
        *("spatial_transformer", "unfolded_patches", "displaced_grid", "modulated", "pruned_convolutions"),
    ),
    "graphs": ("graph_convolution", "graph_attention", "graph_isomorphism", "edge_convolution", "many_aggregations"),
    "recurrent cells": ("lstm_cell", "gru_cell", "projected_lstm"),
    "other structures": (
        *("quantisation_aware", "normed_weights", "recommendation", "radial_basis", "variational", "masked_rows"),
        *("translates", "many_gates", "stacked_layers", "stacked_blocks", "mapped_ensemble"),
    ),
}
"""Models for which no rule was written, by family. Those that libraries outside `dev` bring (diffusion, layers of
torch_geometric) are not counted."""


def test_no_newer_family_drops_out_of_sight() -> None:
    """Reference: the list above. Every unseen model is in one family, every family's models are in the zoo, with its
    bounds: 1e-9 in float64, and 1e-5 only with the reason that the model computes in float32."""
    named = [name for family in NEWER.values() for name in family]
    assert sorted(named) == sorted(name for name, entry in ENTRIES.items() if entry.unseen)
    assert len(named) >= 40
    assert set(named).isdisjoint(COSTLY)
    for entry in ENTRIES.values():
        assert entry.tolerance in (1e-9, 1e-5), entry.name
        assert (entry.tolerance == 1e-9) == ("float32" not in entry.exception), entry.name


def test_the_command_fails_where_a_bound_is_missed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make zoo` on two models: one that is right, and one of a library that is not there, which is left out aloud. Its
    exit status tells of a bound that is missed, of the error as of the count."""
    good = ENTRIES["mlp"]
    gone: Any = "no_such_library"
    monkeypatch.setattr(command, "ENTRIES", {"mlp": good, "gone": replace(good, name="gone", source=gone)})
    assert command.main([]) == 0
    said = capsys.readouterr().out
    assert "left out, as not installed: no_such_library\n" in said
    assert "1 models: 1 meet their targets, 0 do not" in said
    for wrong in (replace(good, tolerance=0.0), replace(good, groups=3)):
        monkeypatch.setattr(command, "ENTRIES", {"mlp": wrong})
        assert command.main([]) == 1


@pytest.fixture(scope="module", params=_params(CHEAP))
def subject(request: pytest.FixtureRequest) -> Subject:
    """A model of the zoo, built and described once for the tests below, which run one after the other for each."""
    entry: Entry = request.param
    # not importorskip: these import torchvision, which needs help first
    if entry.source != "own" and importlib.util.find_spec(entry.source) is None:
        pytest.skip(f"{entry.source} is not installed (it is in the extra `dev`)")
    return measure(entry)


def test_meets_its_targets(subject: Subject) -> None:
    """Reference: the entry's tolerance, least coverage and counts. Fails where the model cannot be built or traced. The
    larger tolerance is for models alone that compute in less than float64, whatever they are given."""
    assert shortcomings(subject.entry, subject.row) == []
    if subject.entry.tolerance > 1e-9:
        assert subject.spec is not None
        assert tolerance_of(subject.model, subject.spec, subject.inputs) == subject.entry.tolerance


@pytest.mark.parametrize("subject", _params(OF_TRANSFORMERS), indirect=True)
def test_a_matrix_left_out_shows(subject: Subject) -> None:
    """Reference: with one axis of one matrix left out, the output must change, by far more than the tolerance."""
    model, inputs, spec = subject.model, subject.inputs, subject.spec
    assert spec is not None, subject.row.failure
    shapes = {name: value.ndim for name, value in model.state_dict().items()}
    axes = [axis for axis in spec.axes if shapes[axis.tensor] == 2]
    for axis in random.Random(0).sample(axes, min(len(axes), 8)):
        broken = replace(spec, axes=tuple(other for other in spec.axes if other != axis))
        # two heads stay in place every second time
        errors = (verify_symmetry(model, broken, inputs, torch.Generator().manual_seed(seed)) for seed in range(8))
        assert any(error > 1e-3 for error in errors), f"{axis.tensor} axis {axis.dim} left out, nothing changed"


LARGER = (
    *("resnet50", "resnext50_32x4d", "densenet121", "googlenet", "inception_v3", "convnext_tiny", "efficientnet_v2_s"),
    *("swin_t", "swin_v2_t", "maxvit_t", "cait_xxs24_224", "convmixer_768_32", "repvgg_a0", "mixer_s32_224"),
    *("coatnet_nano_rw_224", "pvt_v2_b0", "xcit_nano_12_p16_224", "davit_tiny", "resmlp_12_224"),
)
"""Models whose planted permutation takes three CPU-seconds and more: with --all, and by `make zoo ZOO_ARGS=--planted`.
What they are built of is aligned in smaller ones, too."""

UNPLANTED = {
    "efficientnet_v2_s": "one of its 75 groups by weights takes long; it is left to `make zoo`",
    "variational": "draws its code anew in each pass, so that no two passes agree",
    "complex": "random weights are real there, and units without an imaginary part leave nothing to be told",
}


def _planted() -> list[object]:
    names = [name for name in CHEAP if name not in UNPLANTED]
    return [pytest.param(ENTRIES[name], id=name, marks=[pytest.mark.more] if name in LARGER else []) for name in names]


@pytest.mark.parametrize("subject", _planted(), indirect=True)
def test_planted_permutations_are_found(subject: Subject) -> None:
    """Reference: the network is the average of itself and its permuted copy, aligned back by activations, and by
    weights where nothing can be observed; without alignment it is not."""
    found = recover(subject)
    assert found.error <= FOUND
    assert found.before > 100 * FOUND
