"""Files of the right form with one wrong value: a seeded walk over every file that is read, told in one line or read.

Reference: errors of `dimat/errors.py` alone, of one line each; and the folder, to which nothing is added.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dimat.agent.learner.checkpoint import Stored, digest, encode
from dimat.agent.learner.checkpoint_store import CheckpointStore
from dimat.agent.lineage.lineage import lineage, read_records
from dimat.agent.lineage.manifest_log import read_ledger
from dimat.cli import main
from dimat.config import load_experiment
from dimat.errors import ConfigError, DimatError, HookError
from dimat.merge_files import prepare as prepare_merge
from dimat.merge_files.recipe import recipe_of
from dimat.net.discovery.dht_addresses import check_bootstrap
from dimat.simulate.replay import replay_run
from dimat.simulate.world.scenario import prepare
from dimat.topology import build_topology, check
from dimat.ui.dashboard.run_source import FolderSource
from dimat.ui.jsonl_read import read_events
from dimat.ui.report.report import write_report
from dimat.ui.symmetry.diff import diff_symmetry
from dimat.ui.symmetry.tables import load_model
from dimat.weights.snapshot import RecordedSnapshot
from tests.cli.bad_input import VALUES, as_toml, mutants
from tests.merge_files.adapters import CONFIG as ADAPTER_CONFIG
from tests.merge_files.adapters import factors, write_adapter
from tests.merge_files.models import weights, write_folder
from tests.simulate.helpers import TINY_TASK

COUNT = 80
"""Trees with one wrong value, of each kind of file."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, inside of one that nothing may be written to."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run with a trace."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny_task.py").write_text(TINY_TASK)
    tree = {"topology": {"graph": "path", "agents": 3}, "task": {"hook": "tiny_task.py:task"}}
    (folder / "x.toml").write_text(as_toml({**tree, "schedule": {"rounds": 2}, "simulate": {"trace": True}}))
    made = ["simulate", str(folder / "x.toml"), "--out", str(folder / "run"), "--quiet", "--workers", "1"]
    assert main(made) == 0
    return folder / "run"


def tells(what: str, call: Callable[..., object], *args: Any, **named: Any) -> None:
    """Demand that a call does what it is asked, or says in one line of dimat's why not; nothing is written beside."""
    before = files()
    if line := refusal(what, call, *args, **named):
        assert "\n" not in line, what
        assert len(line) < 20_000, what
        assert files() == before, what


def files() -> set[Path]:
    """Return every path of the test's own folder; the bytecode that Python keeps of an imported task is not dimat's."""
    return {path for path in Path("..").rglob("*") if "__pycache__" not in path.parts}


def refusal(what: str, call: Callable[..., object], *args: Any, **named: Any) -> str:
    """Return what dimat's error says, nothing where there is none; any other error fails."""
    try:
        call(*args, **named)
    except (DimatError, OSError) as error:  # both are one line by the time that `main` tells them
        return str(error) or "no word"
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return ""


def merge_plan(inputs: tuple[str, ...], **changes: Any) -> None:
    prepare_merge(recipe_of([Path(name) for name in inputs], changes)).plan()


EXPERIMENT: dict[str, Any] = {
    "run": "tiny",
    "seed": 3,
    "topology": {"graph": "watts-strogatz", "agents": 6, "options": {"k": 2, "p": 0.1}, "mixing": {"name": "uniform"}},
    "task": {"hook": "tiny_task.py:task", "partition": {"kind": "dirichlet", "alpha": 0.5, "min_samples": 2}},
    "train": {
        "epochs_per_round": 2,
        "batch_size": 16,
        "optimizer": {"name": "adam", "lr": 0.01},
        "lr_schedule": {"name": "step", "milestones": [0.5, 0.75], "gamma": 0.1},
    },
    "merge": {"method": "dimat", "combine": {"name": "ties", "options": {"density": 0.5}}, "base": {"seed": 1}},
    "schedule": {"rounds": 3, "round_deadline_s": 10, "changes": [{"round": 2, "topology": {"graph": "complete"}}]},
    "simulate": {
        "workers": 1,
        "network": {"latency_s": [0.1, 0.2], "links": [{"between": ["agent-0", "agent-1"], "loss": 0.1}]},
        "compute": {"speeds": {"agent-1": 2.0}},
        "faults": [{"kind": "crash", "agent": "agent-1", "at_s": 1.0}],
    },
    "agent": {"name": "agent-0", "listen": "127.0.0.1:7300", "folder": "a"},
    "exchange": {"encoding": "int8", "delta": True},
    "variants": [{"name": "v", "set": {"topology": {"graph": "torus"}}}],
}


def test_experiments() -> None:
    Path("tiny_task.py").write_text(TINY_TASK)
    for what, tree in mutants(EXPERIMENT, random.Random(2), COUNT):
        Path("x.toml").write_text(as_toml(tree))
        tells(what, lambda: prepare(load_experiment("x.toml", env={})))


def test_settings_and_environment() -> None:
    """`--set` and variables: keys of any form, and values that are TOML or text."""
    Path("tiny_task.py").write_text(TINY_TASK)
    Path("x.toml").write_text(as_toml(EXPERIMENT))
    generator = random.Random(3)
    keys = ["run", "seed", "topology.agents", "train.optimizer", "merge.combine.options.density", "schedule.changes"]
    keys += [
        "",
        ".",
        "a..b",
        "train.",
        "no.such.key",
        "a" * 500,
        "seed=",
        "run\0",
        "task\ud800.hook",
        ".".join("a" * 300),
    ]
    texts = [*(str(value) for value in VALUES), "[" * 5000, "{a=" * 500, "9" * 5000, "true", "'", "\n[x]", "1979-05-27"]
    for _ in range(COUNT):
        key, text = generator.choice(keys), generator.choice(texts)
        tells(f"{key[:20]}={text[:20]}", load_experiment, "x.toml", [f"{key}={text}"], {})
        name = "DIMAT_" + key.upper().replace(".", "__")
        tells(f"{name[:30]}={text[:20]}", load_experiment, "x.toml", [], {name: text})


MAP: dict[str, Any] = {
    "version": 3,
    "graph": "ring",
    "mixing": {"name": "metropolis", "options": {"lazy": 0.5}},
    "schedule": {
        "name": "cycle",
        "options": {"graphs": ["ring", {"graph": "random-regular", "options": {"degree": 2}}]},
    },
    "agents": [
        {"name": name, "addresses": [f"{name}.example.org:7300"], "samples": 100}
        for name in ("lab-a", "lab-b", "lab-c")
    ],
}
GRAPHS: dict[str, Any] = {
    "nodes.json": {"directed": False, "nodes": [{"id": "a"}, {"id": "b"}], "edges": [{"source": "a", "target": "b"}]},
    "pi.json": {"connectivity": [[0, 1], [1, 0]], "pi": [[0.5, 0.5], [0.5, 0.5]]},
    "lists.json": {"connectivity": [[1], [0]], "pi": [[0.5, 0.5], [0.5, 0.5]]},
}


def test_maps() -> None:
    for what, tree in mutants(MAP, random.Random(4), COUNT):
        Path("x.toml").write_text(as_toml(tree))
        tells(what, lambda: check(build_topology(load_experiment(None, ["topology.map='x.toml'"], {}).topology)))


@pytest.mark.parametrize("name", GRAPHS)
def test_graph_files(name: str) -> None:
    for what, tree in mutants(GRAPHS[name], random.Random(5), COUNT):
        Path(name).write_text(json.dumps(tree))
        tells(what, lambda: check(build_topology(load_experiment(None, [f"topology.file='{name}'"], {}).topology)))


def test_maps_that_lead_back_to_themselves() -> None:
    """By one map or by three, and under another name."""
    Path("a.toml").write_text('file = "b.toml"\n')
    Path("b.toml").write_text('file = "c.toml"\n')
    Path("c.toml").write_text('file = "a.toml"\n')
    Path("self.toml").write_text('file = "../work/self.toml"\n')
    Path("link.toml").symlink_to("self.toml")
    for name in ("a", "self", "link"):
        with pytest.raises(ConfigError, match="leads back to"):
            build_topology(load_experiment(None, [f"topology.map='{name}.toml'"], {}).topology)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["graph='complete'", "agents=10000"], "49,995,000 links are above most_links = 1,000,000; raise"),
        (["graph='ring'", "agents=10000000"], "10,000,000 agents are above most_agents = 10,000; raise"),
        (["schedule='epidemic'", "agents=10000000"], "above most_agents"),
        (["edges=[[0, 10000000]]"], "10,000,001 agents are above most_agents"),
        (["graph='two-clusters'", "agents=5000"], "links are above most_links"),
        (["graph='bipartite'", "agents=5000"], "links are above most_links"),
        (["graph='random-regular'", "agents=5000", "options.degree=4000"], "links are above most_links"),
        (["graph='erdos-renyi'", "agents=5000", "options.p=0.9"], "links are above most_links"),
        (["graph='watts-strogatz'", "agents=5000", "options.k=4000"], "links are above most_links"),
        (["graph='complete'", "agents=50", "most_links=1000"], "1,225 links are above most_links = 1,000"),
        (["schedule={name='cycle', options={graphs=['complete']}}", "agents=50", "most_links=1000"], "1,225 links"),
    ],
)
def test_sizes_have_a_bound_that_a_key_raises(settings: list[str], message: str) -> None:
    """Told before anything of that size is made."""
    with pytest.raises(ConfigError, match=message):
        build_topology(load_experiment(None, [f"topology.{item}" for item in settings], {}).topology)


def test_a_raised_bound() -> None:
    items = ["topology.graph='ring'", "topology.agents=11000", "topology.most_agents=11000"]
    assert len(build_topology(load_experiment(None, items, {}).topology).names) == 11_000


RECIPE: dict[str, Any] = {
    "models": [{"path": "a.safetensors", "weight": 0.5}, {"path": "b.safetensors", "weight": 0.5}],
    "base": "base.safetensors",
    "method": "ties",
    "options": {"density": 0.5},
    "rules": [{"match": "*.bias", "method": "average"}, {"regex": "^layers", "options": {"density": 0.3}}],
    "out": "out",
    "dtype": "fp32",
    "shard_size": "5GB",
    "seed": 1,
}
MERGEKIT: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base.safetensors",
    "models": [
        {"model": "a.safetensors", "parameters": {"weight": 0.5, "density": [0.5, 0.7]}},
        {
            "model": {"model": {"path": "b.safetensors"}},
            "parameters": {"weight": [{"filter": "mlp", "value": 0.3}, {"value": 0.5}]},
        },
    ],
    "parameters": {"normalize": True, "lambda": 1.0},
    "dtype": "float32",
}


def _models() -> None:
    for name, seed in (("a", 0), ("b", 1), ("base", 2)):
        save_file(weights(seed), f"{name}.safetensors")


def test_recipes() -> None:
    _models()
    for what, tree in mutants(RECIPE, random.Random(6), COUNT):
        Path("x.toml").write_text(as_toml(tree))
        tells(what, lambda: prepare_merge(recipe_of([Path("x.toml")], {})).plan())


def test_mergekit() -> None:
    """As YAML, of which JSON is a part."""
    pytest.importorskip("yaml")
    _models()
    for what, tree in mutants(MERGEKIT, random.Random(7), COUNT):
        Path("x.yaml").write_text(json.dumps(tree))
        tells(what, lambda: prepare_merge(recipe_of([], {"out": "out"}, yaml=Path("x.yaml"))).plan())


def test_a_pattern_that_takes_for_ever() -> None:
    """Within a second by default; `regex_s` is the key that it names. The pattern is exponential for `regex` too."""
    tensors = {"a" * 40 + ".weight": torch.ones(2, 2)}
    save_file(tensors, "a.safetensors")
    Path("x.toml").write_text(
        'models = ["a.safetensors"]\nout = "out"\nregex_s = 0.1\n[[rules]]\nregex = "^(a|aa)+$"\nmethod = "average"\n'
    )
    with pytest.raises(ConfigError, match=r"takes more than regex_s = 0\.1 s for 'aaa"):
        prepare_merge(recipe_of([Path("x.toml")], {}))
    write_adapter(Path("p"), factors(0, 4, {"a" * 40 + ".x": (12, 10)}), rank_pattern={"(a|aa)+": 4})
    with pytest.raises(DimatError, match="raise regex_s in the recipe"):
        prepare_merge(recipe_of([Path("p"), Path("p")], {"out": "out", "method": "lora-svd"}))


FOLDER: dict[str, dict[str, Any]] = {
    "config.json": {
        "model_type": "ours",
        "id2label": {"0": "cat", "1": "dog"},
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
        "vocab_size": 20,
        "text_config": {"hidden_act": "silu"},
        "transformers_weights": "model.safetensors",
    },
    "tokenizer.json": {
        "model": {"vocab": {"a": 0, "b": 1}, "unk_token": "a"},
        "added_tokens": [{"id": 2, "content": "<s>", "special": True}],
    },
    "vocab.json": {"a": 0, "b": 1},
    "model.safetensors.index.json": {"metadata": {"total_size": 5}, "weight_map": {"w": "model.safetensors"}},
}


@pytest.mark.parametrize("name", FOLDER)
def test_model_folders(name: str) -> None:
    for folder in "ab":
        write_folder(Path(folder), weights(ord(folder)))
        (Path(folder) / "tokenizer.json").unlink()
        Path(folder, name).write_text(json.dumps(FOLDER[name]))
    if name.endswith("index.json"):
        Path("b/model.safetensors").rename("b/x.safetensors")
    for what, tree in mutants(FOLDER[name], random.Random(8), COUNT // 2):
        Path("b", name).write_text(json.dumps(tree))
        for more in ({}, {"align_vocabulary": True}):
            tells(what, merge_plan, ("a", "b"), out="out", **more)


def test_adapters() -> None:
    write_adapter(Path("a"), factors(0))
    for what, tree in mutants({**ADAPTER_CONFIG, "rank_pattern": {"q_proj": 4}}, random.Random(9), COUNT):
        write_adapter(Path("b"), factors(1))
        Path("b/adapter_config.json").write_text(json.dumps(tree))
        for method in ("average", "lora-concat"):
            tells(what, merge_plan, ("a", "b"), out="out", method=method)


def _lines(file: Path, seed: int, count: int = COUNT) -> Iterator[tuple[str, str]]:
    """Yield a log with one line changed, and what was changed."""
    lines = file.read_text().splitlines()
    generator = random.Random(seed)
    for _ in range(count):
        number = generator.randrange(len(lines))
        ((what, tree),) = mutants(json.loads(lines[number]), generator, 1)
        yield f"line {number + 1}: {what}", "\n".join([*lines[:number], json.dumps(tree), *lines[number + 1 :], ""])


@pytest.mark.parametrize("name", ["events.jsonl", "lineage.jsonl", "trace.jsonl"])
def test_logs(name: str, run: Path) -> None:
    shutil.copytree(run, "run")

    def looked_at() -> None:
        if name == "lineage.jsonl":
            lineage(read_records(Path("run", name)), "agent-0")
        elif name == "trace.jsonl":
            replay_run(Path("run"))
        else:
            list(read_events(Path("run", name)))
            FolderSource(Path("run"))

    for what, text in _lines(run / name, 10):
        Path("run", name).write_text(text)
        tells(what, looked_at)


@pytest.mark.parametrize("name", ["results.json", "experiment.json", "origin.json"])
def test_run_folders(name: str, run: Path, here: Path) -> None:
    """Report and replay; what they write stays in the run's folder."""
    for what, tree in mutants(json.loads((run / name).read_text()), random.Random(11), COUNT // 10):
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(run, "run")
        Path("run", name).write_text(json.dumps(tree))
        assert "\n" not in refusal(what, write_report if name == "results.json" else replay_run, Path("run"))
        assert {path.name for path in here.iterdir()} == {"work"}, what
        assert {path.name for path in Path().iterdir()} == {"run"}, what


def test_ledgers_of_manifests() -> None:
    """Of a line that says something else nothing is taken."""
    line = {
        "agent": "a",
        "round": 1,
        "root": "ab",
        "parents": [["a", "cd", 0, 1.0]],
        "manifest": "00",
        "signature": "11",
    }
    for what, tree in mutants(line, random.Random(12), COUNT):
        Path("m.jsonl").write_text(json.dumps(tree) + "\n" + json.dumps(line) + "\n")
        tells(what, lambda: list(read_ledger(Path("m.jsonl"))))
        for entry in read_ledger(Path("m.jsonl")):
            assert (type(entry.agent), type(entry.round), type(entry.root)) == (str, int, str), what
            assert all(weight == weight for *_, weight in entry.parents), what


MACHINE: dict[str, Any] = {
    "machine": {
        "run": "r",
        "agent": "a",
        "round": 2,
        "stage": "merged",
        "basis": "1:a:0",
        "root": "ab",
        "parents": [{"agent": "a", "snapshot": "ab", "round": 1, "weight": 1.0, "verdict": "own"}],
        "base": "",
        "push": {"weight": 1.0, "sent": {}, "taken": {}},
        "offers": [],
        "leaves": "",
    },
    "trainer": {"rounds": 1},
    "method": {},
    "schema": "s",
}


def test_checkpoints() -> None:
    """The content fits the hash in the name, so that only the content can tell."""
    store = CheckpointStore(Path("checkpoints"))
    for what, tree in mutants(MACHINE, random.Random(13), COUNT):
        try:
            data = encode(Stored({"trainer/w": torch.ones(2)}, tree))
        except (ValueError, UnicodeEncodeError):
            continue
        file = Path("checkpoints", f"000000001-000000002-merged.{digest(data)}.safetensors")
        file.write_bytes(data)
        tells(what, lambda: store.newest("r", "a", "s"))
        file.unlink()


def test_recorded_snapshots() -> None:
    payload = {"root": "ab", "bytes": 5, "blocks": ["cd"], "block_bytes": 4}
    tree = {"payload": payload, "forms": [{"encoding": "bf16", "payload": payload, "after": ""}], "schema": "s"}
    for what, changed in mutants({**tree, "samples": 3}, random.Random(14), COUNT):
        Path("ab.json").write_text(json.dumps(changed))
        tells(what, lambda: RecordedSnapshot.load(Path(), "ab"))


def test_symmetry_specs() -> None:
    group = {"id": "w/0", "size": 2, "axes": [["w", 0]], "parents": [], "points": [], "method": "weight"}
    factor = {"size": 2, "group": "w/0", "parts": None}
    spec: dict[str, Any] = {
        "groups": [group],
        "axes": [{"tensor": "w", "dim": 0, "layout": [[factor]]}],
        **{key: [] for key in ("frozen", "unknown_ops", "tied", "warnings", "outputs")},
        "trace_kind": "export",
        "arch_hash": "x",
        "coverage": 0.5,
        "summary": {"parameters": 4, "tensors": {"w": [[2], "float32"]}},
    }
    Path("one.json").write_text(json.dumps(spec))
    for what, changed in mutants(spec, random.Random(15), COUNT):
        Path("x.json").write_text(json.dumps(changed))
        tells(what, lambda: diff_symmetry("one.json", "x.json", as_json=False))


def test_addresses_of_dht_nodes() -> None:
    for value in (*VALUES, "/ip4/1.2.3.4/tcp/1/p2p/", "/ip4/x/tcp/99999999/p2p/Qm" + "a" * 44, "\n/ip4/"):
        if isinstance(value, str):
            tells(value[:30], check_bootstrap, value)


HOOKS = {
    "exits on import": "raise SystemExit(3)",
    "exits": "import sys\ndef task(): sys.exit()",
    "raises BaseException": "def task(): raise BaseException('x')",
    "raises a cancellation": "import asyncio\ndef task(): raise asyncio.CancelledError",
    "raises what cannot be shown": "class E(Exception):\n    def __str__(self): return 1 / 0\ndef task(): raise E",
    "raises many lines": "def task(): raise ValueError('a\\nb\\0\\x1b[31m' * 5000)",
    "recurses": "def task(): return task()",
    "no UTF-8": "task = '\\ud800'\x00",
    "returns junk": "def task(): return {'a': [1]}",
    "is no function": "task = 5",
    "takes arguments": "def task(a, b): return a",
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks(kind: str) -> None:
    """As the hook of a task, of a model, and of a graph."""
    file = f"hook_{abs(hash(kind))}.py"
    Path(file).write_text(HOOKS[kind])
    tree = {**EXPERIMENT, "task": {"hook": f"{file}:task"}}
    Path("x.toml").write_text(as_toml(tree))
    for call in (
        lambda: prepare(load_experiment("x.toml", env={})),
        lambda: load_model(f"{file}:task"),
        lambda: build_topology(load_experiment(None, [f"topology.python='{file}:task'"], {}).topology),
    ):
        with pytest.raises(HookError if kind != "takes arguments" else ConfigError) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "name", ["../x.py:f", "\0.py:f", "x" * 5000 + ".py:f", "..:f", "a b:f", ":f", "x.py:", "x.py:1"]
)
def test_names_of_hooks(name: str) -> None:
    tells(name[:20], lambda: load_model(name))
    with pytest.raises(DimatError):
        load_model(name)


@pytest.mark.parametrize("run_name", ["", ".", "..", "../x", "a/b", "/x", "a\\b", "a\nb", " ", "x" * 201, "\x7f"])
def test_names_of_runs_stay_inside(run_name: str) -> None:
    """A name that cannot name a folder is told by the configuration, before any folder is made."""
    Path("x.toml").write_text(as_toml({"run": run_name}))
    with pytest.raises(ConfigError, match="run: must be able to name a folder"):
        load_experiment("x.toml", env={})


def test_a_byte_order_mark_is_read_over() -> None:
    """As Windows editors write it: TOML, JSON, an edge list, YAML."""
    mark = b"\xef\xbb\xbf"
    Path("x.toml").write_bytes(mark + b'run = "x"\n')
    assert load_experiment("x.toml", env={}).run == "x"
    for name, text in (("g.edges", "a b\n"), ("g.json", json.dumps(GRAPHS["nodes.json"]))):
        Path(name).write_bytes(mark + text.encode())
        assert build_topology(load_experiment(None, [f"topology.file='{name}'"], {}).topology).names == ("a", "b")
    pytest.importorskip("yaml")
    _models()
    Path("x.yaml").write_bytes(mark + json.dumps(MERGEKIT).encode())
    assert prepare_merge(recipe_of([], {"out": "out"}, yaml=Path("x.yaml"))).recipe.method == "ties"
