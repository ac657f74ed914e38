"""What agents tell each other beyond shapes. Reference: pairs of models and tasks that differ in one thing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dimat.agent.setup.agreement import LONGEST, settings_of
from dimat.agent.setup.prepare import prepare_agent
from dimat.config import MergeConfig
from dimat.errors import HookError
from dimat.merge import plan_merge
from dimat.net.compatibility import Profile, doubtful, incompatibility
from dimat.tasks import ClassificationTask, TensorData, seeded
from dimat.wire.v1 import peer_pb2 as pb
from tests.simulate.helpers import TINY_TASK, tiny_experiment


def task(classes: tuple[str, ...] = ("cat", "dog", "eel"), probe: float = 0.0, **more: Any) -> ClassificationTask:
    data = TensorData(torch.zeros(6, 4), torch.arange(6) % 3)
    public = TensorData(torch.full((6, 4), probe), torch.arange(6) % 3)
    return ClassificationTask("t", seeded(lambda: nn.Linear(4, 3)), data, data, public, classes, **more)


def told(own: Any = None, model: nn.Module | None = None, **merge: Any) -> dict[str, str]:
    plan = plan_merge(MergeConfig.model_validate(merge))
    return settings_of(own or task(), model or nn.Linear(4, 3), plan)


def greeted(one: dict[str, str], two: dict[str, str]) -> tuple[str, str]:
    """Return why an agent with settings `one` refuses one with `two`, and what it doubts; over the wire's bytes."""
    own, other = Profile("s", settings=one), Profile("s", settings=two)
    hello = pb.HelloRequest.FromString(pb.HelloRequest(**other.fields("r", "b")).SerializeToString())
    reply = pb.HelloReply.FromString(pb.HelloReply(**other.fields("r", "b")).SerializeToString())
    assert incompatibility(own, "r", hello) == incompatibility(own, "r", reply)
    return incompatibility(own, "r", hello), doubtful(own, reply)


@dataclass
class Config:
    """As nanoGPT and its kin have it."""

    n_head: int = 4
    rope_theta: float = 10000.0
    dropout: float = 0.0


class Configured(nn.Linear):
    def __init__(self, config: Any) -> None:
        super().__init__(4, 3)
        self.config = config


class Transformers:
    """A configuration with transformers' one method that is used."""

    def __init__(self, **keys: Any) -> None:
        self.keys = keys

    def to_dict(self) -> dict[str, Any]:
        return self.keys


def stack(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules)


DIFFERENT: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
    "classes in another order": (
        told(),
        told(task(("cat", "eel", "dog"))),
        "class 1 is 'eel' there, 'dog' here (the same classes in another order)",
    ),
    "another class": (told(), told(task(("cat", "dog", "fox"))), "class 2 is 'fox' there, 'eel' here"),
    "fewer classes": (told(), told(task(("cat", "dog"))), "it has 2 classes, this agent has 3"),
    "heads of a configuration": (
        told(model=Configured(Config())),
        told(model=Configured(Config(n_head=8))),
        "its config.n_head is '8', here '4'",
    ),
    "rope of a nested configuration": (
        told(model=Configured(Transformers(text_config={"rope_theta": 1e4}))),
        told(model=Configured(Transformers(text_config={"rope_theta": 5e5}))),
        "its config.text_config.rope_theta is '500000.0', here '10000.0'",
    ),
    "names of a configuration's classes": (
        told(task(()), Configured(Transformers(id2label={0: "no", 1: "yes"}))),
        told(task(()), Configured(Transformers(id2label={"0": "yes", "1": "no"}))),
        "class 0 is 'yes' there, 'no' here",
    ),
    "heads of a module": (
        told(model=nn.MultiheadAttention(8, 2)),
        told(model=nn.MultiheadAttention(8, 4)),
        "its model's num_heads is '4 ×1', here '2 ×1'",
    ),
    "eps of norms": (
        told(model=stack(nn.LayerNorm(4), nn.LayerNorm(4))),
        told(model=stack(nn.LayerNorm(4), nn.LayerNorm(4, eps=1e-6))),
        "its model's eps is '1e-05 ×1, 1e-06 ×1', here '1e-05 ×2'",
    ),
    "activation": (
        told(model=stack(nn.Linear(4, 3), nn.ReLU())),
        told(model=stack(nn.Linear(4, 3), nn.GELU())),
        "its model's activations is 'GELU', here 'ReLU'",
    ),
    "stride": (
        told(model=nn.Conv2d(1, 1, 3)),
        told(model=nn.Conv2d(1, 1, 3, stride=2)),
        "its model's stride is '(2, 2) ×1', here '(1, 1) ×1'",
    ),
    "tokenizer": (
        told(task(agreement={"tokenizer": "257 tokens, hash a"})),
        told(task(agreement={"tokenizer": "258 tokens, hash b"})),
        "its tokenizer is '258 tokens, hash b', here '257 tokens, hash a'",
    ),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_agents_whose_weights_mean_something_else_refuse_each_other_and_name_both(kind: str) -> None:
    one, two, says = DIFFERENT[kind]
    assert greeted(one, one) == greeted(two, two) == ("", "")
    refusal, doubt = greeted(one, two)
    assert refusal.startswith("the same weights mean something else to it: ")
    assert says in refusal
    assert refusal.endswith("; give both the same")
    assert "\n" not in refusal
    assert doubt == ""
    assert greeted(two, one)[0]


def test_agents_of_two_configurations(tmp_path: Path) -> None:
    """As they are prepared: a task of other classes, which travel with the rest of what agents agree on."""
    (tmp_path / "tiny_task.py").write_text(TINY_TASK)
    (tmp_path / "other.py").write_text(TINY_TASK.replace('tuple("abcd")', 'tuple("abdc")'))
    profiles: list[Profile] = []
    for hook in ("tiny_task.py:task", "other.py:task"):
        own = {"name": "agent-1", "insecure": True}
        setup = prepare_agent(tiny_experiment(tmp_path, agent=own, task={"hook": hook}))
        profiles.append(setup.profile(setup.experiment.task.build_model(torch.Generator())))
    one, two = profiles
    assert (one.schema, one.groups, one.base) == (two.schema, two.groups, two.base)
    reason = incompatibility(one, "r", pb.HelloRequest(**two.fields("r", "b")))
    assert "class 2 is 'd' there, 'c' here (the same classes in another order)" in reason


def test_agents_of_which_one_sends_moments(tmp_path: Path) -> None:
    """Kept or made afresh is all one to a peer; merged is not, and what a snapshot may take is told with moments."""
    profiles: dict[str, Profile] = {}
    sizes: dict[str, int] = {}
    for state in ("kept", "fresh", "merged"):
        train = {"epochs_per_round": 1, "optimizer_state": state}
        setup = prepare_agent(tiny_experiment(tmp_path, agent={"name": "agent-1", "insecure": True}, train=train))
        model = setup.experiment.task.build_model(torch.Generator())
        profiles[state] = setup.profile(model)
        sizes[state] = setup.largest_snapshot(model, [torch.optim.AdamW(model.parameters())])
    for one, two, fits in (("kept", "fresh", True), ("kept", "merged", False), ("merged", "fresh", False)):
        reason = incompatibility(profiles[one], "r", pb.HelloRequest(**profiles[two].fields("r", "b")))
        assert (reason == "") == fits
        assert fits or "one of the two sends its optimizer's moments, the other does not: its train.optimizer" in reason
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert sizes["kept"] == sizes["fresh"] <= sizes["merged"] - 2 * 4 * parameters


def test_several_differences_are_counted() -> None:
    one = {f"config.{i}": "1" for i in range(4)}
    refusal, _ = greeted(one, dict.fromkeys(one, "2"))
    assert "its config.0 is '2', here '1', and 3 more such settings; give both the same" in refusal


def test_what_may_differ_does() -> None:
    """Dropout, keys of training, the number of activations that do the same; and what one side does not tell, as one
    of an older version."""
    same = (
        (Configured(Config()), Configured(Config(dropout=0.5))),
        (Configured(Transformers(use_cache=True, n_head=2)), Configured(Transformers(use_cache=False, n_head=2))),
        (stack(nn.ReLU(), nn.Dropout(0.1)), stack(nn.ReLU(), nn.Dropout(0.2), nn.ReLU())),
    )
    for one, two in same:
        assert greeted(told(model=one), told(model=two)) == ("", "")
    assert greeted(told(), {}) == greeted({}, told()) == ("", "")
    assert greeted(told(), {"classes": "[" * 5000})[0] != ""


def test_other_probe_sets_and_scales_are_doubted_and_not_refused() -> None:
    one, two = (told(task(probe=value), align_data="probe") for value in (0.0, 1.0))
    assert greeted(one, told(task(), align_data="probe")) == ("", "")
    refusal, doubt = greeted(one, two)
    assert refusal == ""
    assert doubt == (
        f"it fits, but its probe is '{two['probe']}', here '{one['probe']}'; give both the same, unless that is meant"
    )
    assert "probe" not in told(task(), align_data="local")
    scaled = [told(task(agreement={"inputs": text})) for text in ("mean 0.5", "mean 0.4")]
    assert greeted(*scaled) == (
        "",
        "it fits, but its inputs is 'mean 0.4', here 'mean 0.5'; give both the same, unless that is meant",
    )


def test_long_lists_travel_as_a_hash_with_their_number() -> None:
    names = tuple(f"class number {i}" for i in range(1000))
    one = told(task(names))
    assert len(one["classes"]) < 60 < LONGEST
    assert one["classes"].startswith("1,000 names, hash ")
    assert "its classes is '1,000 names" in greeted(one, told(task((*names[:-1], "another"))))[0]
    assert len(pb.HelloRequest(**Profile("s", settings=one).fields("r", "a")).SerializeToString()) < 1000


@pytest.mark.parametrize("agreement", [["tokenizer"], {1: "a"}, {str(i): "a" for i in range(200)}, "tokenizer"])
def test_an_agreement_that_is_none_is_refused(agreement: Any) -> None:
    with pytest.raises(HookError, match="task t: its agreement is a"):
        told(replace(task(), agreement=agreement))
