"""The command line as a person meets it: real processes, exit codes, one clear line for bad input (design page)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dimat import __version__
from dimat.cli import main
from tests.forks import dimat
from tests.simulate.helpers import TINY_TASK

TINY = """
run = "tiny"
topology = { graph = "ring", agents = 3 }
task = { hook = "tiny_task.py:task" }
schedule = { rounds = 2 }
simulate = { workers = 1 }
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny_task.py").write_text(TINY_TASK)
    file = tmp_path / "tiny.toml"
    file.write_text(TINY)
    monkeypatch.chdir(tmp_path)
    return file


def run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [dimat(), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=110, check=False)


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: str | Path) -> str:
    assert main([str(a) for a in arguments]) == code
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.strip().splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("dimat: ")
    return lines[0]


def test_help_and_version_do_not_load_torch() -> None:
    """Design: `dimat --help` answers in under 0.4 s; what costs time is importing torch, networkx or matplotlib."""
    code = (
        "import sys; from dimat.cli import main; main(['--help']); main(['--version']); "
        "heavy = {'torch', 'networkx', 'numpy', 'scipy', 'matplotlib', 'sklearn'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert f"dimat {__version__}" in done.stdout
    for verb in ("demo", "init", "simulate", "topology", "symmetry", "report", "evaluate"):
        assert verb in done.stdout


@pytest.mark.parametrize("command", [["simulate"], ["agent", "--name", "a"], ["doctor", "--name", "a"]])
def test_a_bad_file_is_refused_before_torch_is_loaded(tmp_path: Path, command: list[str]) -> None:
    """Nobody waits for seconds to read of a typing error."""
    file = tmp_path / "experiment.toml"
    file.write_text("[schedule]\nrounds = -1\n")
    code = (
        f"import sys; from dimat.cli import main; code = main({[command[0], str(file), *command[1:]]!r}); "
        "sys.exit('loaded torch' if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert "schedule.rounds" in done.stdout + done.stderr


def test_init_simulate_report_evaluate(tmp_path: Path) -> None:
    """The path of a newcomer, with the written starter file and real processes: init → simulate → report → evaluate."""
    assert run("init", cwd=tmp_path).returncode == 0
    short = ["--set", "schedule.rounds=2", "--set", "train.first_round_epochs=2", "--workers", "1"]
    simulated = run("simulate", "experiment.toml", *short, cwd=tmp_path)
    assert simulated.returncode == 0, simulated.stderr
    rounds = [line for line in simulated.stderr.splitlines() if " round " in line and "->" in line]
    assert len(rounds) == 2, "one plain line per round when not a terminal"
    assert "\x1b" not in simulated.stderr + simulated.stdout
    folder = tmp_path / "runs" / "digits-ring"
    made = {"experiment.json", "results.json", "events.jsonl", "rounds.csv", "report.html", "final", "plots"}
    assert made <= {p.name for p in folder.iterdir()}
    (folder / "report.html").unlink()
    assert run("report", folder, cwd=tmp_path).returncode == 0
    assert (folder / "report.html").exists()
    evaluated = run("evaluate", folder / "final" / "agent-0.safetensors", "--json", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    rows = json.loads((folder / "results.json").read_text())["rows"]
    last = next(row for row in rows if row["agent"] == "agent-0" and row["round"] == 2)
    assert json.loads(evaluated.stdout)["accuracy"] == pytest.approx(last["after"], abs=1e-6)


def test_compare_and_json(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--compare`: methods side by side; stdout is one JSON object, everything for a person goes to stderr."""
    methods = "isolated,average,dimat,centralised"
    assert main(["simulate", str(tiny), "--compare", methods, "--seeds", "2", "--json", "--workers", "1"]) == 0
    said = capsys.readouterr()
    (split,) = json.loads(said.out).values()
    assert list(split) == methods.split(",")
    for curve in split.values():
        assert set(curve) == {"after_merge", "std", "mb_sent_per_agent"}
        assert len(curve["after_merge"]) == len(curve["std"]) == 2
    assert split["isolated"]["mb_sent_per_agent"] == 0 < split["dimat"]["mb_sent_per_agent"]
    folder = Path("runs/tiny-compared")
    assert (folder / "report.html").exists()
    assert (folder / "iid" / "dimat" / "seed1" / "events.jsonl").exists()
    assert not list(folder.glob(".first-rounds*"))


def test_comparison_equals_single_runs(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Branching off after a shared first round changes nothing: curves, last models and the bytes of every snapshot
    (moments are sent with the first one, too) equal those of a run on its own, and so do mixing weights by samples."""
    mixing = ["--set", "topology.mixing=samples", "--json", "--workers", "1"]
    assert main(["simulate", str(tiny), "--compare", "average,dimat", *mixing]) == 0
    together = json.loads(capsys.readouterr().out)["iid"]

    def told(folder: Path) -> tuple[list[tuple[int, str, int]], dict[str, bytes]]:
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        sizes = [(e["round"], e["agent"], e["bytes"]) for e in events if e.get("event") == "Published"]
        return sorted(sizes), {file.name: file.read_bytes() for file in (folder / "final").iterdir()}

    for method in ("average", "dimat"):
        single = ["simulate", str(tiny), "--set", f"merge.method={method}", "--out", f"runs/{method}", *mixing]
        assert main(single) == 0
        assert told(Path(f"runs/{method}")) == told(Path(f"runs/tiny-compared/iid/{method}/seed0"))
        rows = json.loads(capsys.readouterr().out)["rows"]
        means = [sum(r["after"] for r in rows if r["round"] == n) / 3 for n in (1, 2)]
        assert means == pytest.approx(together[method]["after_merge"], abs=1e-12)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("trian.lr=1", "unknown key 'trian' in --set trian.lr; did you mean 'train'?"),
        (
            "train.optimiser.lr=1",
            "unknown key 'train.optimiser' in --set train.optimiser.lr; did you mean 'optimizer'?",
        ),
        (
            "train.batch_size=0",
            "--set train.batch_size: train.batch_size: Input should be greater than or equal to 1 (got 0)",
        ),
        ("merge.method=dimatt", "unknown merge method 'dimatt'; did you mean 'dimat'?"),
        ("merge.combine=avrage", "did you mean 'average'?"),
        ("topology.graph=rign", "did you mean 'ring'?"),
        ("topology.agents=500", "500 agents cannot share 160 training samples"),
        ("task.hook=nowhere.py:task", "there is no file"),
        ("task.hook=tiny_task.py:tusk", "has no function 'tusk'; did you mean 'task'?"),
        ("train.device=abacus", "train.device 'abacus' cannot be used here"),
    ],
)
def test_bad_settings_get_one_line(tiny: Path, capsys: pytest.CaptureFixture[str], setting: str, said: str) -> None:
    """Exit code 2, one line with the key, the file and the nearest match, and no run folder."""
    assert said in fails(capsys, 2, "simulate", "tiny.toml", "--set", setting)
    assert not Path("runs").exists()


def test_environment_and_flags_override_the_file(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Precedence: flag > environment > file > default (design page)."""
    from dimat.config import load_experiment

    assert load_experiment(tiny).schedule.rounds == 2
    monkeypatch.setenv("DIMAT_SCHEDULE__ROUNDS", "7")
    monkeypatch.setenv("DIMAT_TRAIN__OPTIMIZER__LR", "0.5")
    monkeypatch.setenv("DIMAT_HOME", "not a setting of an experiment")
    assert load_experiment(tiny).schedule.rounds == 7
    assert load_experiment(tiny).train.optimizer.lr == 0.5
    assert load_experiment(tiny, ["schedule.rounds=9"]).schedule.rounds == 9


def test_missing_and_foreign_files(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2 for what was typed wrong, 5 for data that are damaged or another's."""
    assert "dimat init nope.toml" in fails(capsys, 2, "simulate", "nope.toml")
    assert "see --help" in fails(capsys, 2, "simulate")
    assert "see --help" in fails(capsys, 2, "simulat")
    for numbers in (["--workers", "-1"], ["--compare", "average", "--seeds", "0"]):
        assert "see --help" in fails(capsys, 2, "simulate", "tiny.toml", *numbers)
    assert "nothing to compare" in fails(capsys, 2, "simulate", "tiny.toml", "--compare", " ,")
    assert "--compare" in fails(capsys, 2, "simulate", "tiny.toml", "--seeds", "2")
    bounded = ("simulate", "tiny.toml", "--set", "simulate.most_seeds=2", "--compare", "average", "--seeds", "3")
    assert "3 seeds are above simulate.most_seeds = 2; raise it in an experiment file" in fails(capsys, 2, *bounded)
    assert "no results in" in fails(capsys, 5, "report", ".")
    Path("typo.toml").write_text(TINY + "[trian]\nlr = 1\n")
    assert "unknown key 'trian' in typo.toml; did you mean 'train'?" in fails(capsys, 2, "simulate", "typo.toml")
    Path("broken.toml").write_text("run = ")
    assert "not valid TOML" in fails(capsys, 2, "simulate", "broken.toml")
    assert main(["init"]) == 0
    capsys.readouterr()
    assert "exists" in fails(capsys, 2, "init")
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("")
    assert "no run folder of dimat" in fails(capsys, 5, "simulate", "tiny.toml", "--out", "mine")
    assert "cannot write" in fails(capsys, 5, "simulate", "tiny.toml", "--out", "/proc/runs")
    assert main(["simulate", "tiny.toml", "--quiet"]) == 0
    capsys.readouterr()
    assert "--overwrite" in fails(capsys, 5, "simulate", "tiny.toml")
    assert "another experiment" in fails(capsys, 5, "simulate", "tiny.toml", "--set", "seed=3", "--overwrite")
    weights = Path("runs/tiny/final/agent-0.safetensors")
    Path("cut.safetensors").write_bytes(weights.read_bytes()[:-9])
    assert "cut.safetensors" in fails(capsys, 5, "evaluate", "cut.safetensors", "--file", "tiny.toml")
    assert "does not fit" in fails(capsys, 5, "evaluate", weights, "--task", "digits")
    assert main(["evaluate", str(weights), "--file", "tiny.toml"]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_untraceable_model_is_averaged_with_a_warning(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SYM-E01 (symmetry.md): a model that cannot be traced is merged by plain averaging, and this is said."""
    Path("tiny_task.py").write_text(
        TINY_TASK
        + """
class Refusing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp((6, 12, 8, 4))
    def forward(self, x):
        if torch.fx.experimental.proxy_tensor.get_proxy_mode() is not None:
            raise RuntimeError("not by a tracer")
        return self.net(x)

class Loop(Refusing):
    def forward(self, x):
        while float(x.abs().max()) > 100:  # depends on data: one path of it is run
            x = x / 2
        return self.net(x)

def refusing():
    made = task()
    return ClassificationTask("refusing", seeded(Refusing), made.train, made.test, made.probe, made.classes)

def loop():
    made = task()
    return ClassificationTask("loop", seeded(Loop), made.train, made.test, made.probe, made.classes)
"""
    )
    assert main(["simulate", "tiny.toml", "--set", "task.hook=tiny_task.py:loop"]) == 0
    assert "SYM-E01" not in capsys.readouterr().err
    again = ["--set", "task.hook=tiny_task.py:refusing", "--out", "runs/refusing"]
    assert main(["simulate", "tiny.toml", *again]) == 0
    said = capsys.readouterr()
    assert "SYM-E01 cannot trace" in said.err
    assert "averaging without alignment" in said.err
    results = json.loads(Path("runs/refusing/results.json").read_text())
    assert results["status"] == "done"
    assert any("SYM-E01" in warning for warning in results["warnings"])


def test_topology_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`topology show|list|check|export`: figures of peers.md for a ring of ten; files read back."""
    assert main(["topology", "show", "ring", "-n", "10", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["spectral_gap"] == pytest.approx(0.127, abs=1e-3)
    assert abs(figures["rounds_to_consensus"] - 45) <= 0.15 * 45
    assert main(["topology", "list", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["graphs"]) >= 12
    file = tmp_path / "hypercube.toml"
    assert main(["topology", "export", "hypercube", str(file), "-n", "8"]) == 0
    assert main(["topology", "check", str(file)]) == 0
    picture = tmp_path / "ring.png"
    assert main(["topology", "show", str(file), "--draw", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    (tmp_path / "split.edges").write_text("a b\nc d\n")
    assert "split.edges" in fails(capsys, 2, "topology", "check", tmp_path / "split.edges")
    fails(capsys, 2, "topology", "check", "random-regular", "-n", "5", "--set", "options.degree=3")


def test_symmetry_show(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`symmetry show`: an MLP with two hidden layers has two groups, proved in float64."""
    assert main(["symmetry", "show", "tiny_task.py:task", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [group["size"] for group in shown["groups"]] == [12, 8]
    assert shown["invariance_error"] < 1e-9
    assert main(["symmetry", "show", "digits"]) == 0
    assert "groups;" in capsys.readouterr().out
    fails(capsys, 2, "symmetry", "show", "tiny_task.py:seeded")


LONG_RUN = """
import signal, sys
from dimat.cli import main
# where tests run in the background of a script, Ctrl-C is ignored, and that is inherited
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def long_run(tiny: Path, workers: int) -> Generator[subprocess.Popen[bytes]]:
    """Start a run that is past its third round; what is left of it is killed at the end, whatever came between."""
    command = [sys.executable, "-c", LONG_RUN, "simulate", "tiny.toml", "--set", "schedule.rounds=100000"]
    log = tiny.parent / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, "--workers", str(workers)],
            cwd=tiny.parent,
            stderr=stream,
            stdout=stream,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 60
        while not re.search(r"round +3/", log.read_text()):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def descendants(pid: int) -> set[int]:
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            if parent == pid:
                found |= {int(entry.name)} | descendants(int(entry.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for orphans in /proc")
@pytest.mark.parametrize(("sent", "code", "workers"), [(signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 1)])
@pytest.mark.live
def test_a_stopped_run_keeps_its_complete_rounds(tiny: Path, sent: int, code: int, workers: int) -> None:
    """Ctrl-C and SIGTERM, to the whole process group as a terminal sends them: results, weights, no orphans."""
    with long_run(tiny, workers) as process:
        children = descendants(process.pid)
        os.killpg(process.pid, sent)
        assert process.wait(timeout=60) == code
        assert "Traceback" not in (tiny.parent / "log").read_text()
        folder = tiny.parent / "runs" / "tiny"
        results = json.loads((folder / "results.json").read_text())
        assert results["status"] == "stopped"
        complete = max(row["round"] for row in results["rows"])
        assert complete >= 3
        assert len(results["rows"]) == 3 * complete
        assert len(list((folder / "final").iterdir())) == 3
        assert (folder / "report.html").exists()
        deadline = time.monotonic() + 20
        while any(map(alive, children)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not [pid for pid in children if alive(pid)]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_stopped_before_it_has_begun(tmp_path: Path, sent: int, code: int) -> None:
    """An agent that still reads its file when it is stopped ends as one that runs does, and says so in one line."""
    file = tmp_path / "agents.toml"
    os.mkfifo(file)  # whoever reads it waits for a writer
    command = [sys.executable, "-c", LONG_RUN, "agent", str(file)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while True:
        try:
            writer = os.open(file, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:
            assert time.monotonic() < deadline, "nobody reads the file"
            time.sleep(0.05)
    said = None
    try:
        while said is None:
            process.send_signal(
                sent
            )  # once more where it came just before the system call that waits, which nothing ends
            try:
                _, said = process.communicate(timeout=5)
            except subprocess.TimeoutExpired:
                assert time.monotonic() < deadline, "it does not stop"
    finally:
        os.close(writer)
        process.kill()
        process.wait()
    assert (process.returncode, said) == (code, "dimat: stopped\n")


def test_faults_in_a_users_code_name_the_agent(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A loss that raises at once or later on, a model that cannot be built, training that diverges: one line, exit 1
    or 2, and a run folder that says "failed" and holds no leavings; none where it fails before anything runs."""
    Path("tiny_task.py").write_text(
        TINY_TASK
        + """
class Broken(ClassificationTask):
    def loss(self, outputs, targets):
        raise RuntimeError("shapes do not match")

class Breaking(ClassificationTask):
    def loss(self, outputs, targets):
        loss = super().loss(outputs, targets)
        if loss < 0.8:  # it has learnt something
            raise RuntimeError("shapes do not match")
        return loss

def broken(kind=Broken):
    made = task()
    return kind(made.name, made.model, made.train, made.test, made.probe, made.classes)

def breaking():
    return broken(Breaking)

def unbuilt():
    made = task()
    return ClassificationTask("x", lambda generator: 1 / 0, made.train, made.test, made.probe, made.classes)
"""
    )
    run_it = ["simulate", "tiny.toml", "--quiet", "--set"]
    said = fails(capsys, 2, *run_it, "task.hook=tiny_task.py:broken")
    assert said.startswith(
        "dimat: tiny_task.py:broken: task tiny failed in loss() (the model returned (6, 4) float32, "
    )
    assert said.endswith("): RuntimeError: shapes do not match; mend its code")
    assert not Path("runs").exists()
    longer = ["--set", "train.epochs_per_round=40", "--out", "runs/breaking"]
    said = fails(capsys, 2, *run_it, "task.hook=tiny_task.py:breaking", *longer)
    assert said.startswith("dimat: the work of agent-")
    assert said.endswith(": RuntimeError: shapes do not match; mend its code")
    assert "task tiny failed in training in round " in said
    assert "ZeroDivisionError" in fails(capsys, 2, *run_it, "task.hook=tiny_task.py:unbuilt", "--out", "runs/unbuilt")
    diverges = ["train.optimizer.lr=1e38", "--set", "train.optimizer.name=sgd", "--out", "runs/diverged"]
    said = fails(capsys, 1, *run_it, *diverges)
    assert "the work of agent-0: " in said
    assert "lower train.optimizer.lr" in said
    folder = Path("runs/diverged")
    assert json.loads((folder / "results.json").read_text())["status"] == "failed"
    assert not (folder / "snapshots").exists()
    assert not (folder / "state").exists()


@pytest.mark.live
def test_a_script_without_a_main_guard(tiny: Path) -> None:
    """`run_simulation` with worker processes from a plain script: workers must not run the script again."""
    script = tiny.parent / "script.py"
    script.write_text(
        "from dimat import run_simulation\n"
        "tree = {'task': {'hook': 'tiny_task.py:task'}, 'simulate': {'workers': 2}, 'schedule': {'rounds': 2}}\n"
        "print('rounds', len(run_simulation(tree).after_merge()))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "rounds 2\n"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for orphans in /proc")
@pytest.mark.live
def test_kill_9_leaves_no_orphans(tiny: Path) -> None:
    """kill -9 of the simulator: its workers notice and leave; results.json of the last round is whole."""
    with long_run(tiny, workers=2) as process:
        children = descendants(process.pid)
        assert len(children) >= 2
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
        deadline = time.monotonic() + 30
        while any(map(alive, children)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not [pid for pid in children if alive(pid)]
        results = json.loads((tiny.parent / "runs" / "tiny" / "results.json").read_text())
        assert len(results["rows"]) == 3 * max(row["round"] for row in results["rows"])


def test_an_interrupt_inside_exec_keeps_the_exit_code(tmp_path: Path) -> None:
    """Reference: the exit code of a stop, also where CPython's own mark of an interrupt in `exec` would replace it."""
    (tmp_path / "late.py").write_text(
        "import os, signal\nfrom dimat.cli import main, app\n\n\n@app.command\ndef late() -> None:\n"
        "    exec('import os, signal; os.kill(os.getpid(), signal.SIGTERM); [0 for _ in range(10**6)]')\n\n\n"
        "raise SystemExit(main(['late']))\n"
    )
    run = subprocess.run([sys.executable, "-m", "late"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (143, "dimat: stopped\n")


def test_reports_begin_with_the_verdict(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reference: the difference of the two rows' last means, from the comparison's own JSON; and a run by itself, which
    claims none."""
    words = ["simulate", str(tiny), "--compare", "isolated,average", "--workers", "1", "--quiet"]
    assert main(words) == 0
    line = capsys.readouterr().out.splitlines()[0]
    curves = json.loads(Path("runs/tiny-compared/comparison.json").read_text())["splits"]["iid"]
    by = curves["average"]["after_merge"][-1] - curves["isolated"]["after_merge"][-1]
    assert line.startswith("iid: average: merging")
    assert f"{abs(by):.3f}" in line
    assert line.replace('"', "&quot;") in Path("runs/tiny-compared/report.html").read_text()
    folder = Path("runs/tiny-compared/iid/average/seed0")
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.startswith("whether merging beat training alone was not measured; 2 merges changed")
    assert main(["report", str(folder), "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)["verdict"]
    assert (verdict["ahead"], verdict["by"]) == (None, None)
