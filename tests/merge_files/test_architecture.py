"""`dimat merge` with a model and data: aligning, learning and repairing on real files, through the command.

References: own weights (a permuted copy merges to them), and `merge_weights` with the same options.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file
from torch import Tensor

from dimat import derive_symmetry, merge_weights, permute_weights
from dimat.cli import main
from dimat.merge.models.classifier import class_statistics
from dimat.symmetry.verify import random_permutations
from tests.merge.methods import assert_same_bits, worst
from tests.merge.networks import ResNet, randomise
from tests.merge_files.models import metadata, read_model

ARCHITECTURE = """
import torch
from torch import nn
from tests.merge.networks import ResNet


def resnet():
    return ResNet(widths=(4, 6, 8))


def pair():
    return resnet(), torch.zeros(2, 3, 8, 8)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, x, y):
        return self.left(x) + self.right(y)


def two():
    return Two()


def images():
    return torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def batches():
    for part in images().split(20):
        yield part


def nothing():
    return None


def words():
    return "images"


def labelled():
    return [(images(), [1, 2])]


def broken():
    raise KeyError("weights")
"""


def images() -> Tensor:
    return torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def resnet(seed: int, near: int | None = None) -> dict[str, Tensor]:
    """Weights of a small network with BatchNorm; `near`: drawn towards those of another seed."""
    weights = {n: t.clone() for n, t in randomise(ResNet(widths=(4, 6, 8)), seed).state_dict().items()}
    if near is None:
        return weights
    other = resnet(near)
    return {n: torch.lerp(other[n], t, 0.3) if t.is_floating_point() else t for n, t in weights.items()}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models a and b, their base, inputs x, an architecture in arch.py."""
    monkeypatch.chdir(tmp_path)
    Path("arch.py").write_text(ARCHITECTURE)
    save_file(resnet(0), "a.safetensors")
    save_file(resnet(1, near=0), "b.safetensors")
    save_file(resnet(2, near=0), "base.safetensors")
    save_file({"images": images()}, "x.safetensors")
    return tmp_path


RUN = ["--model", "arch.py:resnet", "--data", "x.safetensors"]


def merge(*arguments: object) -> None:
    assert main(["merge", *map(str, arguments)]) == 0


def permuted(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    spec = derive_symmetry(ResNet(widths=(4, 6, 8)), images())
    return permute_weights(weights, spec, random_permutations(spec, torch.Generator().manual_seed(3)))


def test_a_permuted_copy_merges_to_self(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """≤ 1e-6 of each tensor's largest value; without alignment it does not. The command tells what moved."""
    save_file({n: t.contiguous() for n, t in permuted(resnet(0)).items()}, "moved.safetensors")
    merge("a.safetensors", "moved.safetensors", *RUN, "--align", "activations", "-o", "out.safetensors")
    told = capsys.readouterr().err.splitlines()
    assert worst(read_model(Path("out.safetensors")), resnet(0)) <= 1e-6
    assert told[0].startswith("aligned moved.safetensors: ")
    assert told[0].endswith("% of its units moved")
    merge("a.safetensors", "moved.safetensors", "-o", "plain.safetensors")
    assert worst(read_model(Path("plain.safetensors")), resnet(0)) > 0.1


def test_a_recipe_aligns_combines_and_repairs_as_merge_weights_does(folder: Path) -> None:
    """Hooks, data and models are found beside the recipe; options reach their stages."""
    Path("sub").mkdir()
    Path("sub/recipe.toml").write_text(
        """
models = [{ path = "../a.safetensors", weight = 0.7 }, { path = "../b.safetensors", weight = 0.3 }]
model = "../arch.py:pair"
data = "../x.safetensors"
align = { name = "activations", options = { positions = 16, stable_within = 0.0 } }
repair = { name = "batchnorm", options = { estimator = "batch-mean", max_images = 48 } }
out = "merged"
"""
    )
    merge("sub/recipe.toml")
    expected = merge_weights(
        resnet(0),
        [resnet(1, near=0)],
        [0.7, 0.3],
        "average",
        model=ResNet(widths=(4, 6, 8)),
        data=[images()],
        align={"name": "activations", "options": {"positions": 16, "stable_within": 0.0}},
        repair={"name": "batchnorm", "options": {"estimator": "batch-mean", "max_images": 48}},
    )
    assert worst(read_model(Path("sub/merged")), expected) < 1e-4
    record = json.loads(metadata(Path("sub/merged/model.safetensors"))["dimat"])
    assert record["recipe"]["model"] == "../arch.py:pair"
    assert record["recipe"]["align"]["name"] == "activations"
    for file in ("arch.py", "x.safetensors"):
        (found,) = [files[file] for source, files in record["inputs"].items() if source.endswith(file)]
        assert found == blake3(Path(file).read_bytes()).hexdigest()
    assert "| run with | `x.safetensors` |" in Path("sub/merged/README.md").read_text()


def test_a_repair_gets_the_statistics_of_the_recipe(folder: Path) -> None:
    """Reference: `merge_weights` with the same statistics and draws."""
    model, told = ResNet(widths=(4, 6, 8)), list[dict[str, Tensor]]()
    for seed, name in ((0, "a"), (1, "b")):
        model.load_state_dict(resnet(seed, near=0) if seed else resnet(0))
        labels = torch.arange(48) % 5 + 5 * seed
        told.append(class_statistics(model, [((images(),), labels)]))
        save_file(told[-1], f"{name}-classes.safetensors")
    Path("recipe.toml").write_text(
        """
models = [
  { path = "a.safetensors", weight = 0.7, statistics = "a-classes.safetensors" },
  { path = "b.safetensors", weight = 0.3, statistics = "b-classes.safetensors" },
]
model = "arch.py:pair"
data = "x.safetensors"
repair = "head"
out = "out.safetensors"
"""
    )
    merge("recipe.toml")
    expected = merge_weights(
        *(resnet(0), [resnet(1, near=0)], [0.7, 0.3], "average"),
        model=ResNet(widths=(4, 6, 8)),
        data=[images()],
        repair="head",
        aux=told,
        generator=torch.Generator().manual_seed(0),
    )
    assert worst(read_model(Path("out.safetensors")), expected) < 1e-4
    mean = merge_weights(resnet(0), [resnet(1, near=0)], [0.7, 0.3], "average")
    assert worst({"w": expected["linear.weight"]}, {"w": mean["linear.weight"]}) > 1e-2


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("adamerging", {"steps": 6, "granularity": "task"}),
        ("self-positioning", {"steps": 6, "interpolation": "linear"}),
    ],
)
@pytest.mark.parametrize("data", ["x.safetensors", "arch.py:images"])
def test_methods_that_learn(method: str, options: dict[str, Any], data: str, folder: Path) -> None:
    """As merge_weights, on the same examples in one batch."""
    flags = [f"--set={key}={json.dumps(value)}" for key, value in options.items()]
    run = ["--model", "arch.py:resnet", "--data", data, "--base", "base.safetensors", "--weights", "0.6,0.4"]
    merge("a.safetensors", "b.safetensors", "--method", method, *run, *flags, "-o", "out.safetensors")
    expected = merge_weights(
        resnet(0),
        [resnet(1, near=0)],
        [0.6, 0.4],
        "average",
        model=ResNet(widths=(4, 6, 8)),
        data=[images()],
        base=resnet(2, near=0),
        combine={"name": method, "options": options},
    )
    assert worst(read_model(Path("out.safetensors")), expected) < 1e-3


def test_data_hooks_may_return_batches_and_models_may_be_half(folder: Path) -> None:
    """A generator is read into memory, as data are ignored more than once; half types are merged in float32."""
    for name in ("a", "b"):
        halves = {
            n: t.bfloat16() if t.is_floating_point() else t for n, t in read_model(Path(f"{name}.safetensors")).items()
        }
        save_file(halves, f"{name}16.safetensors")
    run = ["--model", "arch.py:resnet", "--data", "arch.py:batches", "--align", "activations", "--repair", "batchnorm"]
    merge("a16.safetensors", "b16.safetensors", *run, "-o", "out.safetensors")
    wide = [
        {n: t.float() if t.is_floating_point() else t for n, t in read_model(Path(f"{k}16.safetensors")).items()}
        for k in "ab"
    ]
    for name, weights in zip("ab", wide):
        save_file(weights, f"{name}32.safetensors")
    merge("a32.safetensors", "b32.safetensors", *run, "-o", "wide.safetensors")
    found, expected = read_model(Path("out.safetensors")), read_model(Path("wide.safetensors"))
    assert found["conv1.weight"].dtype == torch.bfloat16
    assert_same_bits(found, {n: t.to(found[n].dtype) for n, t in expected.items()})


def test_weight_one_on_self_returns_own_bits(folder: Path) -> None:
    """Whatever the stages are; what has no weight is not looked at."""
    run = [*RUN, "--align", "activations", "--repair", "batchnorm", "--weights", "1,0"]
    merge("a.safetensors", "b.safetensors", *run, "-o", "out.safetensors")
    assert_same_bits(read_model(Path("out.safetensors")), resnet(0))


def test_rules_go_with_alignment(folder: Path) -> None:
    """All tensors are aligned, whatever merges them: a permuted copy is self under any rule."""
    save_file({n: t.contiguous() for n, t in permuted(resnet(0)).items()}, "moved.safetensors")
    Path("r.toml").write_text(
        """
models = ["a.safetensors", "moved.safetensors"]
model = "arch.py:resnet"
data = "x.safetensors"
align = "activations"
[[rules]]
match = "layer1.*"
weights = [0.1, 0.9]
[[rules]]
match = "layer2.*"
method = "coordinate-median"
"""
    )
    merge("r.toml", "-o", "out.safetensors")
    assert worst(read_model(Path("out.safetensors")), resnet(0)) <= 1e-6


def test_bundled_tasks_give_model_and_data(folder: Path) -> None:
    """`model` and `data` name a task: its network, and its probe set; wherever the recipe lies."""
    from dimat.config import TaskConfig
    from dimat.tasks import load_task

    task = load_task(TaskConfig(name="digits"))
    for k in range(2):
        save_file(task.build_model(torch.Generator().manual_seed(k)).state_dict(), f"d{k}.safetensors")
    Path("sub").mkdir()
    Path("sub/r.toml").write_text(
        'models = ["../d0.safetensors", "../d1.safetensors"]\n'
        'model = "digits"\ndata = "digits"\nalign = "activations"\n'
    )
    merge("sub/r.toml", "--repair", "batchnorm", "-o", "out.safetensors")
    assert read_model(Path("out.safetensors")).keys() == task.build_model(torch.Generator()).state_dict().keys()


def test_several_arguments_come_in_the_order_of_their_names(folder: Path) -> None:
    """input.0 is x of three columns, input.1 y of five; the other way round the model cannot run."""
    g = torch.Generator().manual_seed(0)
    shapes = {"left.weight": (4, 3), "left.bias": (4,), "right.weight": (4, 5), "right.bias": (4,)}
    for name in ("p", "q", "r"):
        save_file({n: torch.randn(shape, generator=g) for n, shape in shapes.items()}, f"{name}.safetensors")
    x, y = torch.randn(9, 3, generator=g), torch.randn(9, 5, generator=g)
    save_file({"input.1": y, "input.0": x}, "xy.safetensors")
    save_file({"input.1": x, "input.0": y}, "yx.safetensors")
    arguments = ["p.safetensors", "q.safetensors", "--method", "adamerging", "--base", "r.safetensors"]
    arguments += ["--model", "arch.py:two", "-o", "out.safetensors", "--data"]
    merge(*arguments, "xy.safetensors")
    assert main(["merge", *arguments, "yx.safetensors", "--overwrite"]) == 5


def test_a_dry_run_tells_the_alignment(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Groups, memory, and nothing written; `--json` the same as one object, and a report with what moved."""
    arguments = ["a.safetensors", "b.safetensors", *RUN, "--align", "activations", "-o", "out"]
    merge(*arguments, "--dry-run")
    told = capsys.readouterr()
    assert told.err == ""
    spec = derive_symmetry(ResNet(widths=(4, 6, 8)), images())
    assert f"align    activations: {len(spec.groups)} groups of units" in told.out
    assert "network  arch.py:resnet, run on x.safetensors" in told.out
    assert "models are held in full" in told.out
    merge(*arguments, "--dry-run", "--json")
    plan = json.loads(capsys.readouterr().out)
    assert plan["align"]["name"] == "activations"
    assert not Path("out").exists()
    merge(*arguments, "--json")
    assert 0 <= json.loads(capsys.readouterr().out)["moved"]["b.safetensors"] <= 1


MODEL = ["--model", "arch.py:resnet", "--align", "activations"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--align", "activations"], 2, "align = 'activations' runs the models: give their architecture with --model"),
        (["--repair", "batchnorm", "--model", "arch.py:resnet"], 2, "runs the models on data: give inputs with --data"),
        (["--data", "x.safetensors"], 2, "data need a model that is run on them"),
        (["--method", "adamerging", "--base", "base.safetensors"], 2, "method 'adamerging' runs the models"),
        ([*RUN, "--align", "activation"], 2, "unknown align method 'activation'; did you mean 'activations'"),
        ([*RUN, "--repair", "batch"], 2, "unknown repair method 'batch'"),
        (["--model", "arch.py:resne"], 2, "arch.py has no function 'resne'; did you mean 'resnet'?"),
        (["--model", "nowhere.py:f"], 2, "there is no file nowhere.py"),
        (["--model", "arch.py"], 2, "expected package.module:function or file.py:function"),
        (["--model", "arch.py:nothing"], 2, "must return a torch.nn.Module (or a Task), not NoneType"),
        (["--model", "arch.py:broken"], 2, "model hook 'arch.py:broken' failed: KeyError: 'weights'"),
        (["--model", "arch.py:two"], 5, "does not fit the model 'arch.py:two'"),
        (
            [*MODEL, "--data", "none.safetensors"],
            5,
            "no data none.safetensors: give a safetensors file of inputs, or a hook",
        ),
        ([*MODEL, "--data", "nothing"], 5, "no data nothing"),
        ([*MODEL, "--data", "arch.py:nothing"], 2, "must return a tensor of inputs or batches of them, not NoneType"),
        ([*MODEL, "--data", "arch.py:words"], 2, "must return a tensor of inputs or batches of them, not str"),
        ([*MODEL, "--data", "arch.py:labelled"], 2, "must return batches of tensors, examples along the first axis"),
        ([*MODEL, "--data", "arch.py:broken"], 2, "data hook 'arch.py:broken' failed"),
        (
            [*MODEL, "--data", "wide.safetensors"],
            5,
            "the model cannot run on wide.safetensors, examples of shape [5, 8, 8]",
        ),
        (
            [*MODEL, "--data", "uneven.safetensors"],
            5,
            "equally many examples along the first axis, and some: 'input.0' 3",
        ),
        ([*MODEL, "--data", "scalar.safetensors"], 5, "and some: 'x' 0"),
        ([*MODEL, "--data", "nan.safetensors"], 5, "tensor 'x' holds 192 values that are not finite"),
        ([*MODEL, "--data", "torn.safetensors"], 5, "torn.safetensors is cut short"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], code: int, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is missing or does not fit, and nothing written."""
    save_file({"x": torch.zeros(2, 5, 8, 8)}, "wide.safetensors")
    save_file({"input.0": torch.zeros(3, 2), "input.1": torch.zeros(4, 2)}, "uneven.safetensors")
    save_file({"x": torch.tensor(1.0)}, "scalar.safetensors")
    save_file({"x": torch.full((1, 3, 8, 8), torch.nan)}, "nan.safetensors")
    Path("torn.safetensors").write_bytes(Path("x.safetensors").read_bytes()[:2000])
    assert main(["merge", "a.safetensors", "b.safetensors", *arguments, "-o", "out"]) == code
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert line.startswith("dimat: ")
    assert message in line
    assert not Path("out").exists()


def test_tensors_that_are_not_the_models_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As for models that differ among themselves: number and kind of the differences."""
    weights = resnet(0)
    weights["extra"] = torch.zeros(2)
    weights["conv1.weight"] = torch.zeros(4, 3, 5, 5)
    del weights["linear.bias"]
    save_file(weights, "odd.safetensors")
    assert main(["merge", "odd.safetensors", "odd.safetensors", *RUN, "--repair", "batchnorm", "-o", "out"]) == 5
    line = capsys.readouterr().err
    assert "3 differences: " in line
    for part in (
        "'extra' is missing from the model",
        "'conv1.weight' is F32[4, 3, 5, 5] in odd",
        "'linear.bias' is only in",
    ):
        assert part in line


def test_a_rule_cannot_give_some_tensors_to_a_method_that_runs_the_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("r.toml").write_text(
        'models = ["a.safetensors", "b.safetensors"]\nbase = "base.safetensors"\nmodel = "arch.py:resnet"\n'
        'data = "x.safetensors"\nout = "o"\n[[rules]]\nmatch = "linear.*"\nmethod = "adamerging"\n'
    )
    assert main(["merge", "r.toml"]) == 2
    assert "method 'adamerging' runs the whole model: it cannot merge some tensors by a rule" in capsys.readouterr().err


TIED = """
import torch
from torch import nn


class Settings:
    def __init__(self, **values):
        self.values = {"model_type": "ours", **values}

    def to_dict(self):
        return self.values


class Tied(nn.Module):
    def __init__(self, act="relu"):
        super().__init__()
        self.config = Settings(hidden_act=act)
        self.embed_tokens, self.lm_head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("inv_freq", torch.tensor([1.0, 0.1]))

    def forward(self, ids):
        return self.lm_head(self.embed_tokens(ids) * self.inv_freq.sum())


def tied():
    return Tied()


def other():
    return Tied("gelu")


def ids():
    return torch.arange(8)[:, None].repeat(4, 2)
"""


@pytest.mark.parametrize("stored", ["once", "twice"])
def test_a_tied_head_and_computed_buffers_with_a_model(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Own folder holds the embedding alone, or head and frequencies too; the peer is own with its columns turned, so
    that aligned it merges to own. The architecture's settings are compared as those of another folder are."""
    monkeypatch.chdir(tmp_path)
    Path("tied.py").write_text(TIED)
    embedding = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
    for name, table, whole in (
        ("a", embedding, stored == "twice"),
        ("b", embedding[:, [2, 0, 3, 1]], stored == "once"),
    ):
        Path(name).mkdir()
        more = {"lm_head.weight": table.clone(), "inv_freq": torch.tensor([1.0, 0.1])} if whole else {}
        save_file({"embed_tokens.weight": table.contiguous(), **more}, Path(name, "model.safetensors"))
        config = {"model_type": "ours", "hidden_act": "relu", "tie_word_embeddings": True}
        Path(name, "config.json").write_text(json.dumps(config))
    command = ["merge", "a", "b", "--data", "tied.py:ids", "--align", "weights", "-o", "out", "--overwrite"]
    assert main([*command, "--model", "tied.py:tied"]) == 0
    merged = read_model(Path("out"))
    torch.testing.assert_close(merged["embed_tokens.weight"], embedding)
    assert merged.keys() == read_model(Path("a")).keys()
    if stored == "twice":
        assert torch.equal(merged["lm_head.weight"], merged["embed_tokens.weight"])
    capsys.readouterr()
    assert main([*command, "--model", "tied.py:other"]) == 5
    assert "does not fit the model 'tied.py:other', 1 difference: hidden_act is 'relu' in a" in capsys.readouterr().err
