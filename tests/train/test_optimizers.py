"""Optimizers against torch's own, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from dimat.agent.learner.checkpoint import Stored, read_state, write_state
from dimat.config import OptimizerConfig, TrainConfig, load_experiment
from dimat.errors import ConfigError, TrainingError
from dimat.symmetry import derive_symmetry, permute_weights
from dimat.tasks import ClassificationTask, TensorData, seeded
from dimat.train.base import TrainerState
from dimat.train.model_state import check_whole
from dimat.train.optimizer_state import group_values
from dimat.train.optimizer_state import read_state as read_optimizer
from dimat.train.optimizer_state import write_state as write_optimizer
from dimat.train.optimizers import build_optimizer
from dimat.train.trainer import Trainer

PLAIN: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.01, fused=True),
}


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_steps_and_state_are_those_of_torch(name: Literal["sgd", "adam", "adamw"]) -> None:
    """Reference: torch's class, bit for bit, also after its state went through a state dict."""
    config = OptimizerConfig(name=name, lr=0.1, momentum=0.9, weight_decay=0.01)
    trained: list[tuple[nn.Module, dict[str, Any]]] = []
    for make in (lambda model: build_optimizer(model, config), lambda model: PLAIN[name](model.parameters())):
        torch.manual_seed(0)
        model, inputs = nn.Linear(5, 3), torch.randn(8, 5)
        optimizer = make(model)
        for step in range(6):
            if step == 3:
                state = optimizer.state_dict()
                optimizer = make(model)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
        assert isinstance(optimizer, type(PLAIN[name](model.parameters())))
        trained.append((model, optimizer.state_dict()))
    (ours, state), (theirs, reference) = trained
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert state["param_groups"] == reference["param_groups"]
    for number, entries in reference["state"].items():
        assert entries.keys() == state["state"][number].keys()
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(state["state"][number][k])) for k, v in entries.items()
        )


def seven(model: str = "mlp") -> tuple[Any, Any]:
    """A task of 48 examples with a model that is no more than a dense one, with or without biases."""
    generator = torch.Generator().manual_seed(0)
    data = TensorData(torch.randn(48, 6, generator=generator), torch.randint(3, (48,), generator=generator))
    build = {
        "mlp": lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
        "matrices": lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)),
    }[model]
    return ClassificationTask("seven", seeded(build), data, data, data, ("a", "b", "c")), data


def trainer(optimizer: Any, model: str = "mlp", folder: Path = Path(), **settings: Any) -> Trainer:
    task, data = seven(model)
    config = {"device": "cpu", "steps_per_round": 3, "batch_size": 16, "optimizer": optimizer, **settings}
    return Trainer(task, data, TrainConfig.model_validate(config), seed=0, folder=folder)


def of_torch() -> list[str]:
    """All classes of torch.optim but those that need sparse gradients or matrices alone."""
    held = vars(torch.optim).items()
    return [n for n, k in held if isinstance(k, type) and n not in ("Optimizer", "SparseAdam", "Muon")]


@pytest.mark.parametrize("name", of_torch())
def test_any_class_of_torch_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Reference: the same training without a stop in between; the state goes through a checkpoint's file."""
    optimizer = {"name": f"torch.optim.{name}", "lr": 1e-2}
    whole, first, second = (trainer(optimizer) for _ in range(3))
    whole.train(1)
    whole.train(2)
    first.train(1)
    state = first.state()
    write_state(tmp_path / "state.safetensors", Stored(state.tensors, state.values))
    stored = read_state(tmp_path / "state.safetensors")
    second.load_state(TrainerState(dict(stored.tensors), dict(stored.values)))
    second.train(2)
    assert type(second.optimizer).__name__ == name
    for key, value in whole.weights().items():
        assert torch.equal(second.weights()[key], value), key
    assert whole.state().tensors.keys() == second.state().tensors.keys()


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"name": "torch.optim.RAdam", "options": {"beta": 1}}, "RAdam has no option 'beta'; did you mean 'betas'"),
        ({"name": "torch.optim.RAdm"}, r"'torch\.optim\.RAdm' is not an optimizer class; did you mean 'RAdam'"),
        ({"name": "torch.optim.lr_scheduler.StepLR"}, "is not an optimizer class"),
        ({"name": "torch.optim.Optimizer"}, "is not an optimizer class"),
        ({"name": "no_such_package.Adam"}, "cannot import no_such_package"),
        ({"name": "torch.optim.RAdam", "lr": 1e-3, "options": {"lr": 1}}, "lr is given twice"),
        ({"name": "torch.optim.RAdam", "momentum": 0.5}, "RAdam has no option 'momentum'"),
        ({"name": "torch.optim.RAdam", "options": {"betas": [2.0, 0.9]}}, "RAdam cannot be made: ValueError: Invalid"),
        ({"name": "torch.optim.Muon"}, "Muon cannot be made: ValueError"),
        ({"name": "adam", "options": {"nesterov": True}}, "has no option 'nesterov'"),
    ],
)
def test_what_is_no_optimizer_is_said_in_a_line(optimizer: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as fault:
        trainer(optimizer)
    assert "\n" not in str(fault.value)


def test_a_name_that_is_neither_short_nor_dotted_is_refused_by_the_configuration() -> None:
    with pytest.raises(ConfigError, match=r"train\.optimizer\.name: unknown optimizer; did you mean 'adam'"):
        load_experiment(overrides=["train.optimizer.name=adm"], env={})
    for name in ("torch.optim.RAdam", "mine.py:make", "package.module:make"):
        assert load_experiment(overrides=[f"train.optimizer.name={name}"], env={}).train.optimizer.name == name


def test_options_reach_the_class_and_defaults_are_its_own() -> None:
    """Reference: torch's signature."""
    made = trainer({"name": "torch.optim.RAdam", "options": {"betas": [0.8, 0.9]}}).optimizer
    assert made.defaults["betas"] == (0.8, 0.9)
    assert made.defaults["lr"] == torch.optim.RAdam(nn.Linear(1, 1).parameters()).defaults["lr"]
    assert trainer({"name": "sgd", "options": {"nesterov": True}}).optimizer.defaults["nesterov"]
    assert trainer({"name": "torch.optim.SGD", "lr": 0.1}).optimizer.defaults["momentum"] == 0


def test_schedules_scale_each_groups_own_rate(tmp_path: Path) -> None:
    """Reference: by hand; a hook whose groups have two rates."""
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def two(model, *, lr=0.1, factor=10.0):\n"
        "    weights = [p for p in model.parameters() if p.ndim > 1]\n"
        "    rest = [p for p in model.parameters() if p.ndim < 2]\n"
        "    return torch.optim.SGD([{'params': rest, 'lr': lr * factor}, {'params': weights}], lr=lr)\n"
        "def other(model):\n"
        "    return torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)\n"
        "def none(model):\n"
        "    return None\n"
        "def fails(model):\n"
        "    raise KeyError('x')\n"
    )
    schedule = {"name": "step", "milestones": [0.01], "gamma": 0.5}
    optimizer = {"name": "mine.py:two", "lr": 0.2, "options": {"factor": 3.0}}
    one = trainer(optimizer, folder=tmp_path, lr_schedule=schedule)
    assert [group["lr"] for group in one.optimizer.param_groups] == pytest.approx([0.6, 0.2])
    one.train(1)
    assert [group["lr"] for group in one.optimizer.param_groups] == pytest.approx([0.3, 0.1])
    assert list(one.optimized()) == ["0.bias", "1.weight", "1.bias", "3.bias", "0.weight", "3.weight"]
    for name, message in (
        ("other", "2 parameters that are not the model's"),
        ("none", "returned a NoneType"),
        ("fails", r"failed: KeyError: 'x'"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainer({"name": f"mine.py:{name}"}, folder=tmp_path)
    with pytest.raises(ConfigError, match="two has no option 'faktor'; did you mean 'factor'"):
        trainer({"name": "mine.py:two", "options": {"faktor": 1}}, folder=tmp_path)


def test_lbfgs_gets_the_loss_that_it_asks_for() -> None:
    """Reference: torch's LBFGS in a loop of its own, on the same batch."""
    task, data = seven("matrices")
    optimizer = {"name": "torch.optim.LBFGS", "lr": 0.5, "options": {"max_iter": 4}}
    one = trainer(optimizer, "matrices", steps_per_round=2, batch_size=48)
    model = task.build_model(torch.Generator())
    model.load_state_dict(one.weights())
    plain: Any = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    inputs, targets = data.inputs[0], data.targets

    def loss() -> torch.Tensor:
        plain.zero_grad()
        value = nn.functional.cross_entropy(model(inputs), targets)
        value.backward()
        return value

    losses = [plain.step(loss).item() for _ in range(2)]
    assert one.train(1).loss == pytest.approx(sum(losses) / 2, rel=1e-4)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(one.weights()[key], value, rtol=1e-3, atol=1e-4)
    with pytest.raises(ConfigError, match="which fp16 cannot scale"):
        trainer(optimizer, precision="fp16")


def test_fp16_with_skipped_first_steps_trains_as_fp32_does() -> None:
    """Reference: fp32. The loss scale overflows at first, and steps are skipped, before any momentum is there."""
    generator = torch.Generator().manual_seed(0)
    data = TensorData(torch.rand(256, 64, generator=generator) * 255, torch.randint(3, (256,), generator=generator))
    build = seeded(lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)))
    task = ClassificationTask("big", build, data, data, data, ("a", "b", "c"))
    losses: dict[str, float] = {}
    for precision in ("fp32", "fp16"):
        config = TrainConfig.model_validate(
            {
                "device": "cpu",
                "precision": precision,
                "optimizer": {"name": "sgd", "lr": 1e-6},
                "steps_per_round": 30,
                "batch_size": 64,
            }
        )
        losses[precision] = Trainer(task, data, config, seed=0).train(1).loss
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.2)
    with pytest.raises(ConfigError, match="a first step that fp16 skips"):
        trainer({"name": "sgd", "options": {"fused": True}}, precision="fp16")


class Words(nn.Module):
    """An embedding with sparse gradients, and a matrix."""

    def __init__(self, gaps: bool = False) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(20, 8)[:, ::2] if gaps else torch.randn(20, 4))
        self.head = nn.Linear(4, 3)
        self.sparse = not gaps

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.embedding(tokens, self.table, sparse=self.sparse).mean(1))


def words(optimizer: dict[str, Any], *, gaps: bool = False, **settings: Any) -> Trainer:
    generator = torch.Generator().manual_seed(0)
    data = TensorData(torch.randint(20, (32, 5), generator=generator), torch.randint(3, (32,), generator=generator))
    task = ClassificationTask("words", seeded(lambda: Words(gaps)), data, data, data, ("a", "b", "c"))
    config = {"device": "cpu", "steps_per_round": 4, "batch_size": 16, "optimizer": optimizer, **settings}
    return Trainer(task, data, TrainConfig.model_validate(config), seed=0)


def test_sparse_gradients_and_gaps_in_memory_train_as_without_fused_steps() -> None:
    """Reference: the same optimizer with fused steps off. Fused ones refuse sparse gradients, and run over gaps."""
    plain = {"name": "sgd", "lr": 0.1, "options": {"fused": False}}
    for gaps in (False, True):
        one, reference = words({"name": "sgd", "lr": 0.1}, gaps=gaps), words(plain, gaps=gaps)
        for each in (one, reference):
            each.train(1)
            each.train(2)
        assert all(torch.equal(one.weights()[name], value) for name, value in reference.weights().items())
    with pytest.raises(ConfigError, match="fused steps are wrong on parameters with gaps"):
        words({"name": "adam", "options": {"fused": True}}, gaps=True)
    with pytest.raises(TrainingError, match=r"'adam' cannot make a step: Adam does not support sparse gradients"):
        words({"name": "adam"}).train(1)
    with pytest.raises(ConfigError, match=r"grad_clip_norm: gradients of table are sparse"):
        words({"name": "sgd"}, grad_clip_norm=1.0).train(1)
    with pytest.raises(ConfigError, match=r"train\.proximal: gradients of table are sparse"):
        words({"name": "sgd"}, proximal=0.1).train(1)


def test_models_that_one_process_does_not_hold_are_refused() -> None:
    """Reference: the classes of torch that wrap or defer a model."""
    for build, message in (
        (lambda: nn.DataParallel(nn.Linear(6, 3)), r"wrapped in DataParallel.*model\.module"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), r"0\.weight has no shape yet"),
        (lambda: nn.Linear(6, 3, device="meta"), "weight has no values"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_whole(build())


@pytest.mark.filterwarnings("ignore:FSDP")  # torch's own: one process shards nothing, and its first way is old
def test_sharded_parameters_are_refused() -> None:
    """Reference: torch's DTensor and both of its ways to shard a model, on a group of one process."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch is built without distributed")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
        from torch.distributed.tensor import Replicate, distribute_tensor

        model = nn.Linear(4, 2)
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(ConfigError, match="wrapped in DistributedDataParallel"):
            check_whole(wrapped)
        sharded = FullyShardedDataParallel(nn.Sequential(nn.Linear(4, 2)), device_id=torch.device("cpu"))
        with pytest.raises(ConfigError, match=r"the model is sharded \(FullyShardedDataParallel\).*leave the sharding"):
            check_whole(sharded)
        with pytest.raises(ConfigError, match=r"^1 is sharded"):
            check_whole(nn.Sequential(nn.ReLU(), sharded))
        with pytest.raises(ConfigError, match="weight is a DTensor"):
            check_whole(fully_shard(nn.Linear(4, 2), mesh=init_device_mesh("cpu", (1,))))
        mesh = init_device_mesh("cpu", (1,))
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Replicate()]))
        with pytest.raises(ConfigError, match="weight is a DTensor"):
            check_whole(model)
    finally:
        distributed.destroy_process_group()


def test_objects_that_others_hold_stay_the_same() -> None:
    """Reference: the objects before. A scheduler holds groups, a user may hold a moment."""
    one = trainer({"name": "adam"})
    one.train(1)
    optimizer = one.optimizer
    groups, group, state = optimizer.param_groups, optimizer.param_groups[0], optimizer.state
    moment = optimizer.state[one.model[0].weight]["exp_avg"]
    one.model[0].weight.grad = torch.arange(48.0).view(8, 6)
    spec = derive_symmetry(one.model, (torch.randn(4, 6),))
    order = torch.arange(8).flip(0)
    before = moment.clone()
    assert one.permute(spec, {spec.groups[0].id: order}) == ""
    assert optimizer.state[one.model[0].weight]["exp_avg"] is moment
    assert torch.equal(moment, before[order])
    assert torch.equal(one.model[0].weight.grad, torch.arange(48.0).view(8, 6)[order])
    tensors, texts = one.optimizer_state()
    write_optimizer(optimizer, one.optimized(), tensors, texts)
    assert (optimizer.param_groups is groups, groups[0] is group, optimizer.state is state) == (True, True, True)


class Counting(torch.optim.SGD):
    """Keeps what torch's own classes do not: values in its groups, nested state, wider types, and None."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        for p in self.param_groups[0]["params"]:
            held = self.state[p]
            held["master"] = p.detach().double()
            held["history"] = [(0.5, torch.ones(3)), {"a": None}]
            held["nothing"] = None
            held["a/b"] = torch.zeros(2)
        self.state["all"] = {"count": 3}


def test_whatever_torch_would_load_goes_on() -> None:
    """Reference: the state itself, read and put back into an optimizer that is new."""
    model = nn.Linear(3, 2).bfloat16()
    optimizer = Counting(model.parameters(), lr=0.1, momentum=0.9)
    began = group_values(optimizer)
    model(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    named = dict(model.named_parameters())
    tensors, texts = read_optimizer(optimizer, named, began)
    assert all(isinstance(text, str) for text in texts.values())
    fresh = Counting(model.parameters(), lr=0.3, momentum=0.9)
    write_optimizer(fresh, named, tensors, texts)
    assert (fresh.param_groups[0]["k"], fresh.param_groups[0]["lr"]) == (1, 0.3)
    assert fresh.state["all"] == {"count": 3}
    for parameter in model.parameters():
        before, after = optimizer.state[parameter], fresh.state[parameter]
        assert before.keys() == after.keys()
        assert torch.equal(before["master"], after["master"])
        assert after["master"].dtype == torch.float64
        assert after["history"][0][0] == 0.5
        assert torch.equal(after["history"][0][1], torch.ones(3))
        assert (after["history"][1], after["nothing"]) == ({"a": None}, None)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "k": 5})
    added = dict(named) | {"added": optimizer.param_groups[1]["params"][0]}
    assert read_optimizer(optimizer, added, began)[1].keys() == texts.keys()
    optimizer.state[model.weight]["odd"] = object()
    with pytest.raises(ConfigError, match=r'keeps a object in its state.*optimizer_state = "fresh"'):
        read_optimizer(optimizer, named, began)


class Lookahead(torch.optim.Optimizer):
    """Lookahead (arXiv 1907.08610) as it is often written: a wrapper with slow weights of its own."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([p for group in inner.param_groups for p in group["params"]], {"lr": 0.0})
        self.inner = [inner]
        self.param_groups = inner.param_groups
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner[0].state_dict(), "slow": super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise AssertionError("of both at once")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p].setdefault("slow", p.clone())
        self.inner[0].step()
        for p in (p for group in self.param_groups for p in group["params"]):
            slow = self.state[p]["slow"]
            slow += 0.5 * (p - slow)
            p.copy_(slow)


def lookahead(model: nn.Module) -> torch.optim.Optimizer:
    return Lookahead(torch.optim.Adam(model.parameters(), lr=1e-2))


def test_an_optimizer_inside_another_one_goes_along_and_on() -> None:
    """Reference: training without a stop; and the trained model in another order of units, trained on (float64)."""
    optimizer = {"name": f"{__name__}:lookahead"}
    whole, first, second = (trainer(optimizer) for _ in range(3))
    whole.train(1)
    first.train(1)
    state = first.state()
    assert {"optimizer/0.weight/slow", "optimizer/1:0.weight/exp_avg"} <= state.tensors.keys()
    second.load_state(state)
    for each in (whole, second):
        each.train(2)
    assert all(torch.equal(second.weights()[key], value) for key, value in whole.weights().items())

    spec = derive_symmetry(first.model, (torch.randn(4, 6),))
    order = {spec.groups[0].id: torch.arange(8).flip(0)}
    first.permute(spec, order)
    first.train(2)
    expected = permute_weights(whole.weights(), spec, order)
    for key, value in first.weights().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
    fresh = trainer(optimizer, optimizer_state="fresh")
    fresh.train(1)
    assert not any(name.startswith("optimizer/") for name in fresh.state().tensors)
