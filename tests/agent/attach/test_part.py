"""Which part of a model is exchanged. References: by hand; PEFT's own adapters."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

from dimat.agent.attach.inputs import Inputs
from dimat.agent.attach.part import Part, part_of
from dimat.agent.attach.task import AttachedTask
from dimat.errors import ConfigError
from dimat.merge.registry import combine_registry
from dimat.tasks.huggingface.library import library
from dimat.tasks.huggingface.lora import MERGE_STAGES


def base(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))


def of_extra(name: str) -> Any:
    """Return a library of the extra `hf`, loaded as dimat loads it: without a torchvision that does not fit."""
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed (it is in the extra `hf`)")
    return library(name)


def adapted(seed: int = 1, model: nn.Module | None = None, **options: Any) -> nn.Module:
    peft = of_extra("peft")
    model = base() if model is None else model
    torch.manual_seed(seed)
    return peft.get_peft_model(model, peft.LoraConfig(**({"r": 2, "target_modules": ["0"]} | options)))


def test_adapters_alone_are_exchanged_and_their_base_is_hashed() -> None:
    """Reference: PEFT's names. Equal bases have equal hashes, whatever the adapters hold; others and other scales do
    not."""
    model = adapted()
    part = part_of(model)
    names = {f"base_model.model.0.lora_{side}.default.weight" for side in "AB"}
    assert part.names == names
    whole = set(model.state_dict())
    with part.alone(model):
        assert set(model.state_dict()) == names
    assert set(model.state_dict()) == whole
    assert part.merge_stages is not None
    assert part.merge_stages["combine"] == "lora-svd"
    assert part_of(adapted(seed=2)).base_hash == part.base_hash
    assert part_of(adapted(model=base(3))).base_hash != part.base_hash
    assert part_of(adapted(lora_alpha=5)).base_hash != part.base_hash


def test_a_base_that_begins_to_train_is_refused() -> None:
    """It would not be exchanged, and each agent would go its own way."""
    model = adapted()
    part = part_of(model)
    part.check(model)
    model.base_model.model[2].weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"base_model\.model\.2\.weight trains now, and was frozen"):
        part.check(model)
    Part().check(model)


def test_a_plain_model_is_exchanged_whole() -> None:
    """Frozen layers too: without adapters there is no base that all share."""
    model = base()
    model[0].requires_grad_(False)
    part = part_of(model)
    assert (part.names, part.base_hash, part.merge_stages) == (None, "", None)
    with part.alone(model):
        assert len(model.state_dict()) == 4


class Loralib(nn.Module):
    """Factors by the names that other libraries give them."""

    def __init__(self, a: str = "lora_A", b: str = "lora_B") -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4).requires_grad_(False)
        self.register_parameter(a, nn.Parameter(torch.zeros(2, 4)))
        self.register_parameter(b, nn.Parameter(torch.zeros(4, 2)))


def test_what_cannot_be_merged_as_products_is_refused() -> None:
    """Factors of other libraries, half a pair, adapters of other kinds, a base that trains or counts."""
    peft = of_extra("peft")
    other = peft.get_peft_model(base(), peft.LoHaConfig(r=2, target_modules=["0"]))
    turning = peft.get_peft_model(base(), peft.OFTConfig(oft_block_size=4, target_modules=["0"]))
    thawed = adapted().requires_grad_(True)
    counting = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 2))
    half = copy.deepcopy(adapted())
    half.base_model.model[0].lora_B.requires_grad_(False)
    for model, message in (
        (Loralib(), "lora_A looks like a part of an adapter"),
        (Loralib("lora_a", "lora_b"), "lora_a looks like a part of an adapter"),
        (other, "adapters of kind LOHA, which dimat cannot merge: its trained parts multiply each other"),
        (turning, "adapters of kind OFT, which dimat cannot merge: it rotates weights"),
        (adapted(use_dora=True), "adapters of kind DoRA"),
        (thawed, "its base is not frozen"),
        (half, "is a LoRA factor without its lora_B"),
        (adapted(model=counting), "the model: base_model.model.1 is a BatchNorm"),
    ):
        with pytest.raises(ConfigError, match=message) as fault:
            part_of(model)
        assert "\n" not in str(fault.value)


SUMS = {
    "IA3": lambda peft: peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
    "LN_TUNING": lambda peft: peft.LNTuningConfig(target_modules=["1"]),
    "FOURIERFT": lambda peft: peft.FourierFTConfig(n_frequency=9, target_modules=["0"]),
    "C3A": lambda peft: peft.C3AConfig(block_size=4, target_modules=["0"]),
    "SHIRA": lambda peft: peft.ShiraConfig(r=1, random_seed=3, target_modules=["0"]),
    "BEFT": lambda peft: peft.BeftConfig(target_modules=["0"]),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # PEFT's own, of SHiRA
@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # and of LN tuning
@pytest.mark.parametrize("kind", SUMS)
def test_kinds_that_change_a_layer_in_proportion_are_averaged(kind: str) -> None:
    """Law: the mean of what is trained changes the adapted layer by the mean of the changes."""
    peft = of_extra("peft")

    def model(seed: int) -> Any:
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 2))
        made = peft.get_peft_model(plain, SUMS[kind](peft))
        for p in made.parameters():
            if p.requires_grad:
                with torch.no_grad():
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
        return made.eval()

    one, two, mean = model(1), model(2), model(3)
    part = part_of(one)
    assert part.names == {name for name, p in one.named_parameters() if p.requires_grad}
    assert part.merge_stages is not None
    averaged = average(
        *({name: p.detach() for name, p in each.named_parameters() if name in part.names} for each in (one, two))
    )
    mean.load_state_dict(averaged, strict=False)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(4))

    def run(each: Any) -> torch.Tensor:
        inside = each.base_model.model
        return inside[1](inside[0](x)) if kind == "LN_TUNING" else inside[0](x)

    torch.testing.assert_close(run(mean), (run(one) + run(two)) / 2, rtol=1e-4, atol=1e-5)


def average(own: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Merge as agents with adapters do."""
    return combine_registry.call(MERGE_STAGES["combine"], {}, own, [other], [0.5, 0.5])


def test_where_what_is_trained_acts_counts() -> None:
    """Entries at other places cannot be averaged: agents whose places differ do not meet."""
    peft = of_extra("peft")

    def hashed(seed: int) -> str:
        return part_of(
            peft.get_peft_model(base(), peft.ShiraConfig(r=1, random_seed=seed, target_modules=["0"]))
        ).base_hash

    assert hashed(3) == hashed(3) != hashed(4)


def test_a_frozen_base_is_not_held_twice() -> None:
    """Reference: the places in memory of the user's own tensors."""
    model = adapted()
    part = part_of(model)
    task = AttachedTask(model, Inputs((torch.zeros(4, 8),)), part, "accuracy")
    made = task.build_model(torch.Generator())
    assert set(made.state_dict()) == part.names
    own = dict(model.named_parameters())
    for name, parameter in made.named_parameters():
        assert (parameter.data_ptr() == own[name].data_ptr()) == (not parameter.requires_grad)
