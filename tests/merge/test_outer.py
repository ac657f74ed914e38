"""Merges that go a part of the way. References: closed forms, and merges with other mixing weights."""

from __future__ import annotations

from math import nan
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dimat import merge_weights
from dimat.agent.learner.shared_base import plan_for
from dimat.config import MergeConfig, TaskConfig, build
from dimat.errors import ConfigError
from dimat.merge import MergeContext, MergeOutcome, Peer, merge, plan_merge
from dimat.merge.natures import natures_of
from dimat.merge.outer import held_back, layer_factors
from dimat.tasks import load_task
from tests.merge.test_pipeline import assert_bits, assert_close, permuted, run, setting, state


def outer(lr: float, **more: Any) -> dict[str, Any]:
    return {"outer": {"name": "none", "lr": lr}, **more}


@settings(max_examples=10, deadline=None)
@given(lr=st.floats(0.01, 1.0), weight=st.floats(0.05, 1.0))
def test_a_partial_step_is_a_merge_with_less_weight_on_peers(lr: float, weight: float) -> None:
    """For an average: own + s (Σ w_k θ_k − own) is the average with s w_k; the record of who contributed says so."""
    own, peer = state(0), state(1)
    outcome = run(own, [Peer("b", peer, weight)], "average", **outer(lr))
    assert_close(outcome.weights, run(own, [Peer("b", peer, lr * weight)], "average").weights, atol=1e-5)
    assert outcome.accepted == lr


def test_the_repair_describes_the_weights_that_are_kept() -> None:
    """Running statistics are those of the partly merged network, not of the whole merge or of own weights."""
    own, peer = state(0), permuted(state(0) | {"features.0.weight": state(1)["features.0.weight"]}, 4)
    half = run(own, [Peer("b", peer, 0.5)], "dimat", **outer(0.5))
    quarter = run(own, [Peer("b", peer, 0.25)], "dimat")
    assert_close(half.weights, quarter.weights, atol=1e-4)
    whole = run(own, [Peer("b", peer, 0.5)], "dimat")
    name = next(name for name in own if name.endswith("running_var"))
    assert not torch.allclose(whole.weights[name], half.weights[name], rtol=1e-3)


def test_a_whole_step_is_none_at_all() -> None:
    """Bit for bit, by name alone too."""
    own, peers = state(0), [Peer("b", state(1), 0.4)]
    plain = run(own, peers)
    for config in (outer(1.0), {"outer": "none"}, {"layers": {"*": 1}}):
        assert_bits(run(own, peers, **config).weights, plain.weights)


def test_shares_multiply() -> None:
    """Of the step, of what is accepted, and in the weights of the layer."""
    own = {"w": torch.ones(4)}
    context = MergeContext(score=lambda w: -float((w["w"] > 1.6).any()))

    def merged(**config: Any) -> MergeOutcome:
        plan = plan_merge(build(MergeConfig, {"method": "average", **config}, "test"))
        return merge(own, 0.5, [Peer("b", {"w": torch.full((4,), 9.0)}, 0.5)], plan, context)

    assert float(merged().weights["w"][0]) == 5.0
    judged = merged(**outer(0.5), accept="no-worse")
    assert (judged.accepted, float(judged.weights["w"][0])) == (0.125, 1.5)  # 3 and 2 are not accepted, 1.5 is
    held = merged(**outer(0.5), layers={"w": 0.5})
    assert (held.accepted, float(held.weights["w"][0])) == (0.5, 2.0)


def test_layers_hold_tensors_back_and_the_last_pattern_counts() -> None:
    """FedPer and FedBN: factor 0 is own, bit for bit; ½ is half of the way; what no pattern names is merged whole."""
    own, peer = state(0), state(1)
    plain = run(own, [Peer("b", peer, 0.5)], "average").weights
    layers = {"features.*": 0.5, "classifier.*": 0, "features.0.weight": 1}
    outcome = run(own, [Peer("b", peer, 0.5)], "average", layers=layers)
    assert outcome.accepted == 1
    for name, tensor in outcome.weights.items():
        if not tensor.is_floating_point() or name.startswith("classifier."):
            assert torch.equal(tensor, own[name])
        elif name == "features.0.weight":
            assert torch.equal(tensor, plain[name])
        else:
            torch.testing.assert_close(tensor, (own[name] + plain[name]) / 2)
    again = merge_weights(own, [peer], [0.5, 0.5], "average", layers=layers, outer={"lr": 0.5})
    torch.testing.assert_close(again["features.0.weight"], (own["features.0.weight"] + plain["features.0.weight"]) / 2)
    kept = merge_weights(own, [peer], [0.5, 0.5], "dimat", layers={"*": 0}, model=setting().model, data=setting().data)
    assert all(torch.equal(t, own[n]) for n, t in kept.items() if "running" not in n)


def test_a_personal_tensor_may_be_anything_at_all() -> None:
    """What a combine method makes of it is let go, be it NaN."""
    own, merged = {"a": torch.ones(2), "head": torch.zeros(2)}, {"a": torch.zeros(2), "head": torch.full((2,), nan)}
    assert_bits(held_back(own, merged, {"head": 0, "a": 0.5}), {"a": torch.full((2,), 0.5), "head": own["head"]})


def test_patterns_that_match_nothing_are_refused_with_what_is_near() -> None:
    """When the agent is made, for a task's model; in any merge; and factors outside [0, 1] by the configuration."""
    digits = load_task(TaskConfig(name="digits"))
    with pytest.raises(ConfigError, match=r"merge\.layers: no tensor of the model is called 'hed\.\*'"):
        plan_for(build(MergeConfig, {"layers": {"hed.*": 0}}, "test"), digits)
    with pytest.raises(ConfigError, match=r"did you mean 'classifier\.\*'"):
        run(state(0), [Peer("b", state(1), 0.5)], "average", layers={"clasifier.*": 0})
    for layers, lr in (({"*": 1.5}, 1.0), ({"*": -0.1}, 1.0), ({}, 0.0), ({}, 1.5)):
        with pytest.raises(ConfigError):
            build(MergeConfig, {"layers": layers, "outer": {"lr": lr}}, "test")
    with pytest.raises(ConfigError, match="unknown outer step 'nesterof'"):
        plan_merge(build(MergeConfig, {"outer": "nesterof"}, "test"))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def test_what_is_merged_as_one_is_held_back_as_one() -> None:
    """Two names of a tensor, and LoRA factors whose product is merged; factors that are merged alone may differ."""
    tied = Tied()
    weights = tied.state_dict()
    natures = natures_of(weights, tied)
    with pytest.raises(ConfigError, match=r"are one tensor, and have different factors, 0 and 1; give both the same"):
        layer_factors({"head.*": 0}, weights.keys(), natures)
    assert layer_factors({"*": 0.5}, weights.keys(), natures) == {"embed.weight": 0.5, "head.weight": 0.5}
    names = ["q.lora_A.weight", "q.lora_B.weight"]
    alone = natures_of({})
    assert layer_factors({"*lora_B*": 0}, names, alone) == {names[1]: 0}
    with pytest.raises(ConfigError, match=r"lora_A.weight and .*lora_B.weight are merged as their product"):
        layer_factors({"*lora_B*": 0}, names, alone, products=True)
