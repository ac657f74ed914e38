"""Checkpoints on a real disk. References: killed writers, damaged bytes and a full disk, all of them real; safetensors'
own writer for files that are not ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from dimat.agent.learner.checkpoint import FORMAT, Checkpoint, Stored, digest, encode, read_checkpoint
from dimat.agent.learner.checkpoint_store import NAME, CheckpointStore, Loaded
from dimat.agent.learner.learner import Learner
from dimat.agent.learner.recorder import Recorder
from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.state import MachineState
from dimat.agent.setup.loaded_task import derive_checked
from dimat.config import ExchangeConfig
from dimat.errors import DataError
from dimat.merge.shared_statistics import beside
from dimat.simulate.world.scenario import prepare
from dimat.train.base import TrainerState
from dimat.weights import durable
from dimat.weights.snapshot import checksum
from tests.agent.learner.rounds import merged, trained
from tests.simulate.helpers import tiny_experiment

SCHEMA = "5" * 64
ROOT = Path(__file__).parents[3]
Pair = tuple[CheckpointStore, Path, bytes]


def made(number: int, stage: str = "merged", *, run: str = "r", agent: str = "a", size: int = 50) -> Checkpoint:
    """A checkpoint whose parts all say `number`, so that a mixture of two would be seen."""
    machine = MachineState(run, agent, number, stage, BasisId(0, agent, "00"), root=f"root {number}")  # type: ignore[arg-type]
    tensors = {"model/w": torch.full((size,), float(number)), "rng/batches": torch.arange(number, number + 8)}
    method = {"method/m": torch.tensor(number)}
    return Checkpoint(machine, TrainerState(tensors, {"position": number}), SCHEMA, method, {"count": number})


def whole(loaded: Loaded | None) -> int:
    """Return the number that all parts of a checkpoint agree on."""
    assert loaded is not None
    kept = loaded.checkpoint
    number = kept.machine.round
    assert kept.machine.root == f"root {number}"
    assert kept.trainer.values == {"position": number}
    assert kept.method_values == {"count": number}
    assert torch.equal(kept.method_tensors["method/m"], torch.tensor(number))
    assert set(kept.trainer.tensors["model/w"].tolist()) == {float(number)}
    assert kept.trainer.tensors["rng/batches"].tolist() == list(range(number, number + 8))
    return number


def files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file())


def numbers(folder: Path) -> list[int]:
    found = [NAME.fullmatch(file.name) for file in files(folder)]
    return [int(match[1]) for match in found if match is not None]


# ── what is written is what is read ──────────────────────────────────────────────────────────────────────────
def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    """Law: newest ∘ save = identity, also for empty, integer, half and 0-dimensional tensors and odd values."""
    tensors = {
        "empty": torch.zeros(0, 3),
        "long": torch.tensor([2**62, -1]),
        "flags": torch.tensor([True, False]),
        "half": torch.tensor([1.5, float("inf")], dtype=torch.bfloat16),
        "scalar": torch.tensor(3.25, dtype=torch.float64),
        "model/über/punkt.w": torch.randn(3, 4),
    }
    state = TrainerState(tensors, {"optimizer": "adam", "scale": 2.0**16, "samples_seen": 7})
    before = Checkpoint(made(3).machine, state, SCHEMA, {"fisher/w": torch.ones(2)}, {"merges": 3, "name": "é"})
    store = CheckpointStore(tmp_path / "c")
    path = store.save(before)
    loaded = store.newest("r", "a", SCHEMA)
    assert loaded is not None
    after = loaded.checkpoint
    assert (after.machine, after.schema, after.trainer.values) == (before.machine, SCHEMA, state.values)
    assert after.method_values == before.method_values
    for ours, theirs in ((tensors, after.trainer.tensors), (before.method_tensors, after.method_tensors)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(t, theirs[k]) and t.dtype == theirs[k].dtype for k, t in ours.items())
    assert loaded.passed_over == ()
    assert list((tmp_path / "c").iterdir()) == [path]


def test_an_agent_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Train, adopt a basis, merge, train = the same with the agent lost and restored before the last training."""
    config = tiny_experiment(tmp_path)
    scenario = prepare(config)
    spec = derive_checked(scenario.task)
    (tmp_path / "store").mkdir()

    def agent(i: int) -> Learner:
        name, part = scenario.agents[i], scenario.parts[i]
        return Learner(name, config, scenario.task, part, tmp_path / "store", spec, durable=False)

    one, two = agent(0), agent(1)
    trained(one, 1, learn=True)
    peer = tmp_path / "store" / f"{trained(two, 1, learn=True).payload.root}.safetensors"
    assert one.adopt_basis(1, "two", peer)
    merged(one, 1, 0.5, [("two", peer, 0.5, True)], "none")
    store = CheckpointStore(tmp_path / "c")
    store.save(one.checkpoint(made(1, agent="agent-0").machine))
    again = agent(0)
    loaded = store.newest("r", "agent-0", again.schema())
    assert loaded is not None
    again.restore(loaded.checkpoint)
    assert trained(one, 2, learn=True).payload == trained(again, 2, learn=True).payload
    ours, theirs = one.trainer.state(), again.trainer.state()
    assert ours.values == theirs.values
    assert all(torch.equal(tensor, theirs.tensors[name]) for name, tensor in ours.tensors.items())


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_last_few_are_kept(tmp_path: Path, keep: int) -> None:
    """Files after each save: the newest `keep`, numbered without gaps, also where a folder is taken up again."""
    for number in range(1, 9):
        CheckpointStore(tmp_path, keep).save(made(number))
        assert numbers(tmp_path) == list(range(max(1, number - keep + 1), number + 1))
        assert whole(CheckpointStore(tmp_path, keep).newest("r", "a", SCHEMA)) == number
    assert all(NAME.fullmatch(file.name) for file in files(tmp_path))


def test_a_new_folder_holds_none(tmp_path: Path) -> None:
    """No checkpoint was ever written: None; files that are not checkpoints are left alone."""
    store = CheckpointStore(tmp_path / "deep" / "c")
    (tmp_path / "deep" / "c" / "notes.txt").write_text("mine")
    assert store.newest("r", "a", SCHEMA) is None
    store.save(made(1))
    assert (tmp_path / "deep" / "c" / "notes.txt").read_text() == "mine"


# ── parts: what has not changed is written once ──────────────────────────────────────────────────────────────
def large(number: int, stage: str = "merged", *, optimizer: int = 0, model: int | None = None) -> Checkpoint:
    """A checkpoint with a large model and optimizer state, which say their numbers."""
    before = made(number, stage)
    tensors = {
        "model/w": torch.full((20_000,), float(number if model is None else model)),
        "optimizer/w/exp_avg": torch.full((20_000,), float(optimizer)),
        "rng/batches": torch.arange(number, number + 8),
    }
    return replace(before, trainer=replace(before.trainer, tensors=tensors))


def parts(folder: Path) -> set[str]:
    return {file.name for file in (folder / "parts").iterdir()}


@pytest.fixture
def linked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without clones, where what is shared has one inode."""
    monkeypatch.setattr(durable, "FICLONE", 0)


@pytest.mark.usefixtures("linked")
def test_equal_parts_are_written_once(tmp_path: Path) -> None:
    """References: addresses of the tensors as safetensors' own writer lays them out, and inodes: weights that lie in a
    snapshot are that file, an optimizer state that has not changed is not written, and what none names is gone."""
    snapshots = tmp_path / "snapshots"
    snapshots.mkdir()
    weights = save({"w": torch.full((20_000,), 1.0)})
    snapshot = snapshots / f"{checksum(weights).root}.safetensors"
    snapshot.write_bytes(weights)
    store = CheckpointStore(tmp_path / "c", keep=2, elsewhere=(snapshots,))
    store.save(large(1, "trained"))
    moments = f"{checksum(save({'w/exp_avg': torch.zeros(20_000)})).root}.safetensors"
    assert parts(tmp_path / "c") == {snapshot.name, moments}
    assert (tmp_path / "c" / "parts" / snapshot.name).stat().st_ino == snapshot.stat().st_ino
    written = (tmp_path / "c" / "parts" / moments).stat()
    store.save(large(1, model=7))
    assert len(parts(tmp_path / "c")) == 3
    after = (tmp_path / "c" / "parts" / moments).stat()
    assert (after.st_ino, after.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    snapshot.unlink()  # peers need it no more: the checkpoint has it still
    assert sorted(value(path) for path in (tmp_path / "c").glob("*.safetensors")) == [(1.0, 0.0), (7.0, 0.0)]
    store.save(large(2, "trained", optimizer=3))
    store.save(large(2, optimizer=3))
    assert len(parts(tmp_path / "c")) == 2
    assert all(path.stat().st_size < 4096 for path in (tmp_path / "c").glob("*.safetensors"))


def value(path: Path) -> tuple[float, float]:
    """The numbers of the model and of the optimizer in a checkpoint file."""
    tensors = read_checkpoint(path).trainer.tensors
    return float(tensors["model/w"].mean()), float(tensors["optimizer/w/exp_avg"].mean())


def test_statistics_lie_beside_weights_as_in_their_snapshot(tmp_path: Path) -> None:
    """Reference: the recorder, whose snapshot's file is the checkpoint's part; both come back under their names, a
    model's tensor that is called like a statistic too."""
    statistics = {"fisher.w": torch.rand(20_000)}
    model = {"w": torch.rand(20_000), "aux.v": torch.rand(3)}
    (tmp_path / "snapshots").mkdir()
    payload, _ = Recorder(tmp_path / "snapshots", ExchangeConfig()).record(beside(model, statistics))
    store = CheckpointStore(tmp_path / "c", elsewhere=(tmp_path / "snapshots",))
    state = TrainerState({f"model/{name}": tensor for name, tensor in model.items()}, {})
    path = store.save(replace(made(1), trainer=state, statistics=statistics))
    assert parts(tmp_path / "c") == {f"{payload.root}.safetensors"}
    found = read_checkpoint(path)
    assert found.statistics.keys() == statistics.keys()
    assert torch.equal(found.statistics["fisher.w"], statistics["fisher.w"])
    assert found.trainer.tensors.keys() == state.tensors.keys()
    assert all(torch.equal(tensor, state.tensors[name]) for name, tensor in found.trainer.tensors.items())
    # they are no weights for people
    assert not store.share_weights(tmp_path / "weights.safetensors")


@pytest.mark.usefixtures("linked")
def test_weights_for_people_are_the_checkpoints_own(tmp_path: Path) -> None:
    """References: safetensors' own reader, and the inode; the file is read-only, as whoever writes into it writes into
    the checkpoint; the next one takes its place and leaves a reader's as it was."""
    store, file = CheckpointStore(tmp_path / "c"), tmp_path / "weights.safetensors"
    assert not store.share_weights(file)
    store.save(large(1))
    assert store.share_weights(file)
    assert store.share_weights(file)
    (part,) = {path for path in (tmp_path / "c" / "parts").iterdir() if path.stat().st_ino == file.stat().st_ino}
    assert part.stem == checksum(file.read_bytes()).root
    assert not file.stat().st_mode & 0o222
    with file.open("rb") as held:
        store.save(large(2))
        assert store.share_weights(file)
        assert torch.equal(load(held.read())["w"], torch.full((20_000,), 1.0))
    assert torch.equal(load(file.read_bytes())["w"], torch.full((20_000,), 2.0))
    assert {path.name for path in tmp_path.iterdir()} == {"c", "weights.safetensors"}


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
@pytest.mark.parametrize("part", ["weights", "optimizer"])
def test_a_damaged_part_is_noticed(tmp_path: Path, part: str, damage: str) -> None:
    """A part altered, cut short or gone: the file is named, and the checkpoint before, which shares none with the
    damaged one, is used."""
    store = CheckpointStore(tmp_path)
    store.save(large(1, optimizer=1))
    before = parts(tmp_path)
    store.save(large(2, "trained", optimizer=2))
    new = [tmp_path / "parts" / name for name in parts(tmp_path) - before]
    (file,) = [path for path in new if (b"exp_avg" in path.read_bytes()) == (part == "optimizer")]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink()
    if damage != "gone":
        file.write_bytes(data if damage == "flip" else data[:-1])
    loaded = CheckpointStore(tmp_path).newest("r", "a", SCHEMA)
    assert loaded is not None
    assert (loaded.checkpoint.machine.round, loaded.published) == (1, 2)
    assert part in loaded.passed_over[0]
    assert str(file) in loaded.passed_over[0]


def test_a_snapshot_may_go_out_before_the_optimizer_is_written(tmp_path: Path) -> None:
    """Begun is a checkpoint whose round counts as published and that cannot be read; the one before is not removed for
    it. Complete it is the newest. Nothing is left where the optimizer's state has not changed, or is small."""
    store = CheckpointStore(tmp_path, keep=1)
    store.save(large(1, optimizer=1))
    complete = store.begin(large(2, "trained", optimizer=2))
    assert complete is not None
    loaded = CheckpointStore(tmp_path, keep=1).newest("r", "a", SCHEMA)
    assert loaded is not None
    assert (loaded.checkpoint.machine.round, loaded.published) == (1, 2)
    assert "was not written completely: its optimizer" in loaded.passed_over[0]
    complete()
    complete()  # as after a fault
    assert numbers(tmp_path) == [2]
    assert [value(path) for path in tmp_path.glob("*.safetensors")] == [(2.0, 2.0)]
    assert store.begin(large(2, optimizer=2, model=3)) is None
    assert numbers(tmp_path) == [3]
    assert store.begin(made(3)) is None


def test_what_is_set_aside_stays(tmp_path: Path) -> None:
    """The newest checkpoint, and one of its own, under names: whatever follows, they come back whole, with their parts;
    a second one under a name takes the first one's place, and what is dropped goes."""
    store = CheckpointStore(tmp_path, keep=1)
    assert store.aside("trusted", "r", "a", SCHEMA) is None
    with pytest.raises(DataError, match="there is no checkpoint"):
        store.set_aside("trusted")
    path = store.save(large(1, optimizer=1))
    store.set_aside("trusted")
    store.set_aside("trusted")
    store.set_aside("in-training", large(2, optimizer=5))
    for number in (2, 3, 4):
        path = CheckpointStore(tmp_path, keep=1).save(large(number, optimizer=number))
    store = CheckpointStore(tmp_path, keep=1)
    assert numbers(tmp_path) == [4]
    assert len(parts(tmp_path)) == 6
    trusted, training = (store.aside(name, "r", "a", SCHEMA) for name in ("trusted", "in-training"))
    assert trusted is not None
    assert training is not None
    assert (trusted.machine.round, training.machine.round) == (1, 2)
    assert training.trainer.tensors["optimizer/w/exp_avg"][0] == 5
    with pytest.raises(DataError, match="choose another folder"):
        store.aside("trusted", "r", "b", SCHEMA)
    store.set_aside("trusted")
    assert len(parts(tmp_path)) == 4
    again = store.aside("trusted", "r", "a", SCHEMA)
    assert again is not None
    assert again.machine.round == 4
    for name in ("trusted", "in-training"):
        store.drop(name)
    assert len(parts(tmp_path)) == 2
    assert value(path) == (4.0, 4.0)


# ── kill -9 ──────────────────────────────────────────────────────────────────────────────────────────────────
NURSERY = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from dimat.agent.learner.checkpoint_store import CheckpointStore
from tests.agent.learner.test_checkpoint import SCHEMA, made, numbers, whole

folder, seed, lives = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
chance = random.Random(seed)
for life in range(lives):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        store = CheckpointStore(folder, durable=life % 2 == 0)
        found = store.newest("r", "a", SCHEMA)
        number = 0 if found is None else whole(found)
        while True:
            number += 1
            store.save(made(number, size=20_000))  # the model lies in a part
            os.write(writer, b"%d " % number)
    os.close(writer)
    heard, wait = b"", chance.randrange(4)
    while heard.count(b" ") < wait:  # how fast this machine is decides nothing
        heard += os.read(reader, 65536)
    time.sleep(0.004 * chance.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    said = (heard + b"".join(iter(lambda: os.read(reader, 65536), b""))).split()
    os.close(reader)
    left = [file.name for file in folder.rglob("*") if file.name.endswith(".tmp")]
    held = numbers(folder)
    found = CheckpointStore(folder).newest("r", "a", SCHEMA)
    print(json.dumps({
        "said": int(said[-1]) if said else None,
        "left": len(left),
        "swept": not any(file.name.endswith(".tmp") for file in folder.rglob("*")),
        "held": held,
        "newest": None if found is None else whole(found),
        "passed_over": [] if found is None else found.passed_over,
    }))
CheckpointStore(folder).save(made(1000))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked writers")
def test_kill_9_never_leaves_half_a_checkpoint(tmp_path: Path) -> None:
    """A real writer is killed 80 times at seeded moments: what is newest is whole, never older than what the writer
    knew to be written, numbered without gaps, and the next life goes on from it."""
    lives = 80
    command = [sys.executable, "-c", NURSERY, str(tmp_path / "c"), "0", str(lives)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == lives
    before = 0
    for line in lines:
        held, newest = line["held"], line["newest"]
        assert held == list(range(held[0], held[0] + len(held))) if held else newest is None
        assert line["passed_over"] == []
        assert line["swept"]
        # a kill may come after the rename and before the writer could say so
        assert (newest or 0) - (line["said"] or before) in (0, 1)
        assert (newest or 0) == (held[-1] if held else 0)
        before = newest or 0
    assert before >= lives
    assert any(line["left"] for line in lines), "no kill struck a write"
    # kills before the oldest was removed leave one more each; the next whole save removes them
    assert numbers(tmp_path / "c") == list(range(lines[-1]["held"][-1] - 1, lines[-1]["held"][-1] + 2))


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A store with two checkpoints, the newer one's file, and its content, for tests that damage it."""
    store = CheckpointStore(tmp_path_factory.mktemp("pair"))
    store.save(made(4))
    path = store.save(made(5, "trained"))
    return store, path, path.read_bytes()


def regions(data: bytes) -> dict[str, range]:
    """Where in a safetensors file is what: length of the header, header, tensors."""
    header = int.from_bytes(data[:8], "little")
    return {"length": range(8), "header": range(8, 8 + header), "tensors": range(8 + header, len(data))}


@pytest.mark.parametrize("region", ["length", "header", "tensors"])
@settings(max_examples=60)
@given(data=st.data())
def test_any_flipped_bit_is_noticed(pair: Pair, region: str, data: st.DataObject) -> None:
    """Any bit of any byte: the checkpoint before is taken, this one is named, and its round still counts as published,
    as peers may have its snapshot."""
    store, path, content = pair
    places = regions(content)[region]
    assert len(places) >= 8
    damaged = bytearray(content)
    damaged[data.draw(st.sampled_from(places))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged)
    falls_back(store, path)


@settings(max_examples=60)
@given(data=st.data())
def test_any_cut_is_noticed(pair: Pair, data: st.DataObject) -> None:
    """Cut short anywhere, the rest missing or zeros as after a power loss, or longer: as for a flipped bit."""
    store, path, content = pair
    cut = data.draw(st.integers(0, len(content) - 1))
    zeros = content[:cut] + bytes(len(content) - cut)
    path.write_bytes(data.draw(st.sampled_from([content[:cut], zeros, content * 2])))
    if path.read_bytes() != content:
        falls_back(store, path)


def falls_back(store: CheckpointStore, damaged: Path) -> None:
    loaded = store.newest("r", "a", SCHEMA)
    assert whole(loaded) == 4
    assert loaded is not None
    assert loaded.published == 5
    (why,) = loaded.passed_over
    assert str(damaged) in why
    assert "does not match the hash in its name" in why


def test_only_rounds_that_were_trained_count_as_published(tmp_path: Path) -> None:
    """A checkpoint of stage "joined" or "merged" is never published; one of stage "trained" may have been."""
    store = CheckpointStore(tmp_path, keep=9)
    for number, stage in ((3, "joined"), (4, "trained"), (4, "merged"), (9, "joined")):
        store.save(made(number, stage))
    loaded = store.newest("r", "a", SCHEMA)
    assert loaded is not None
    assert (whole(loaded), loaded.published) == (9, 4)


def test_all_damaged_says_what_to_do(tmp_path: Path) -> None:
    """No checkpoint can be read: DataError that names folder, cause and the two ways out; nothing is removed."""
    store = CheckpointStore(tmp_path)
    for number in (1, 2, 3):
        path = store.save(made(number))
        path.write_bytes(path.read_bytes()[:-1])
    before = files(tmp_path)
    with pytest.raises(DataError, match=r"no checkpoint in .* damaged.*restore one from a backup, or remove") as caught:
        CheckpointStore(tmp_path).newest("r", "a", SCHEMA)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == before


def test_the_next_save_after_damage_counts_on(tmp_path: Path) -> None:
    """Numbers only rise, past damaged files too: what is saved now is the newest from now on."""
    store = CheckpointStore(tmp_path)
    store.save(made(1))
    store.save(made(2)).write_bytes(b"")
    store.save(made(7))
    assert numbers(tmp_path) == [1, 2, 3]
    assert whole(store.newest("r", "a", SCHEMA)) == 7


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    """Temporary files of writes that never ended are removed when the folder is taken up again."""
    path = CheckpointStore(tmp_path).save(made(1))
    left = tmp_path / f".{path.name}.12345.tmp"
    left.write_bytes(b"half")
    assert whole(CheckpointStore(tmp_path).newest("r", "a", SCHEMA)) == 1
    assert files(tmp_path) == [path]


# ── another's ────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("run", "agent", "schema", "both"),
    [
        ("other", "a", SCHEMA, ("'r'", "'other'")),
        ("r", "b", SCHEMA, ("'a'", "'b'")),
        ("r", "a", "7" * 64, (SCHEMA[:12], "7" * 12)),
    ],
)
def test_anothers_checkpoint_is_refused(
    tmp_path: Path, run: str, agent: str, schema: str, both: tuple[str, str]
) -> None:
    """Another run, agent or architecture: DataError that names both, and no falling back to an older one."""
    store = CheckpointStore(tmp_path)
    store.save(made(1))
    path = store.save(made(2))
    with pytest.raises(DataError, match="choose another folder") as caught:
        store.newest(run, agent, schema)
    assert all(name in str(caught.value) for name in (*both, str(path)))
    assert "\n" not in str(caught.value)
    assert whole(store.newest("r", "a", SCHEMA)) == 2


@pytest.mark.parametrize("metadata", [{"dimat.checkpoint": "1", "values": "{}"}, {"values": "{}"}, None])
def test_another_format_is_passed_over(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    """A file of another version, or of another program, whose name and hash are right: not read, and said so."""
    store = CheckpointStore(tmp_path)
    data = save({"t": torch.ones(2)}, metadata)
    foreign = tmp_path / f"{1:09d}-{1:09d}-merged.{digest(data)}.safetensors"
    foreign.write_bytes(data)
    found = "1" if metadata and "dimat.checkpoint" in metadata else "none"
    with pytest.raises(DataError, match=rf"format {found}, expected {FORMAT}"):
        store.newest("r", "a", SCHEMA)
    store.save(made(2))
    assert whole(store.newest("r", "a", SCHEMA)) == 2


@pytest.mark.parametrize("lost", ["machine", "trainer", "method", "schema", "machine.basis", "machine.stage"])
def test_a_checkpoint_without_a_part_is_passed_over(tmp_path: Path, lost: str) -> None:
    """A file of our format that lacks something, as another version's might: not read, and the part is named."""
    store = CheckpointStore(tmp_path)
    kept = store.save(made(1))
    values = {
        "machine": made(2).machine.to_dict(),
        "trainer": {"position": 2},
        "method": {},
        "schema": SCHEMA,
    }
    table, _, key = lost.partition(".")
    if key:
        del values[table][key]  # type: ignore[attr-defined]
    else:
        del values[table]
    data = encode(Stored({}, values))
    (tmp_path / f"{2:09d}-{2:09d}-merged.{digest(data)}.safetensors").write_bytes(data)
    loaded = store.newest("r", "a", SCHEMA)
    assert whole(loaded) == 1
    assert loaded is not None
    assert (key or table) in loaded.passed_over[0]
    assert kept.exists()


# ── a disk that takes no more ────────────────────────────────────────────────────────────────────────────────
NO_ROOM = """
import resource, sys
from pathlib import Path
from dimat.agent.learner.checkpoint_store import CheckpointStore
from dimat.errors import DataError
from tests.agent.learner.test_checkpoint import SCHEMA, made, whole

store = CheckpointStore(Path(sys.argv[1]))
store.save(made(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    store.save(made(2, size=1_000_000))
except DataError as error:
    print(error)
print(whole(CheckpointStore(Path(sys.argv[1])).newest("r", "a", SCHEMA)))
store.save(made(3))
print(whole(store.newest("r", "a", SCHEMA)))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_no_room_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """The system refuses to write on (RLIMIT_FSIZE): DataError with path and cause, nothing half-written stays, the
    checkpoint before stands and the next one that fits is written."""
    command = [sys.executable, "-c", NO_ROOM, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    said, kept, next_one = done.stdout.splitlines()
    assert said.startswith(f"cannot write {tmp_path}")
    assert said.endswith("File too large")
    assert (kept, next_one) == ("1", "3")
    assert all(NAME.fullmatch(file.name) for file in files(tmp_path))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """A file stands where the folder should be: DataError with the path."""
    (tmp_path / "c").write_text("x")
    with pytest.raises(DataError, match=r"cannot make the checkpoint folder .*c"):
        CheckpointStore(tmp_path / "c")
