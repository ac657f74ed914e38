"""Rules taken away: whatever dimat does not know, what it still permutes must leave outputs unchanged."""

from __future__ import annotations

import random
import warnings

import pytest
import torch

import dimat.symmetry.rules.call as rule_table
from dimat.symmetry import register_rule, trace, verify_symmetry
from dimat.symmetry.derive import describe
from dimat.symmetry.rules.call import find_rule, op_name
from tests.symmetry.wide import ENTRIES, build

pytestmark = pytest.mark.zoo

MODELS = ("resnet20_a", "unet", "lstm", "transformer_encoder", "gpt2", "llama_eager", "t5", "mamba", "deberta_v2")


@pytest.mark.parametrize("name", MODELS)
def test_without_a_rule_the_rest_still_holds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: a float64 forward pass under random group elements, with the rules of random operations declining."""
    entry = ENTRIES[name]
    if entry.source == "transformers":
        pytest.importorskip("transformers")
    model, inputs = build(entry)
    traced = trace(model, inputs)
    calls = [node for node in traced.nodes if node.op == "call_function"]
    known = sorted({op_name(node.target) for node in calls if find_rule(node.target)})
    for op in random.Random(name).sample(known, min(len(known), 4)):
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setattr(rule_table, "_RULES", dict(rule_table._RULES))
            patch.setattr(rule_table, "_foreign", set())
            register_rule(op, _declines)
            spec, _ = describe(traced, traced.select_outputs(entry.outputs))
            assert op in {unknown.op for unknown in spec.unknown_ops}
            error = verify_symmetry(model, spec, inputs, torch.Generator().manual_seed(0))
        assert error <= entry.tolerance, f"without a rule for {op}: {error:.1e}"


def _declines(call: rule_table.Call) -> rule_table.Result:
    raise rule_table.NoRule("taken away")
