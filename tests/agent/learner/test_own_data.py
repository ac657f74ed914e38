"""Training data that changed before an agent goes on. Reference: data, map and partition as they were changed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dimat.agent.daemon.folder import AgentFolder
from dimat.agent.daemon.mid_round import MidRound
from dimat.agent.daemon.worker import AgentWorker
from dimat.agent.doctor.doctor import examine
from dimat.agent.learner.checkpoint_store import CheckpointStore
from dimat.agent.learner.own_data import compare_data
from dimat.agent.lineage.compaction import Compaction
from dimat.agent.lineage.manifest_log import LEDGER_BYTES, ManifestLedger
from dimat.agent.protocol.state import Restored
from dimat.agent.setup.prepare import prepare_agent
from dimat.config import ExperimentConfig
from dimat.errors import DataError
from tests.agent.learner.test_checkpoint import made
from tests.simulate.helpers import TINY_TASK, tiny_experiment

WHOLE: dict[str, Any] = {"hook": "tiny_task.py:task"}
SPLIT: dict[str, Any] = {**WHOLE, "partition": {"kind": "iid"}}
"""One data set for all agents; in `WHOLE` each has data of its own."""


def steps(count: int, batch_size: int = 16) -> dict[str, Any]:
    return {"steps_per_round": count, "batch_size": batch_size}


def agent(folder: Path, task: dict[str, Any] = WHOLE, **changes: Any) -> ExperimentConfig:
    """Agent 1 of three; its learner's folder is the same at each call."""
    own = {"name": "agent-1", "insecure": True, "folder": str(folder / "run"), **changes.pop("agent", {})}
    folder.mkdir(exist_ok=True)
    return tiny_experiment(folder, task=task, merge={"method": "average"}, agent=own, **changes)


def cut(folder: Path, name: str, what: str) -> dict[str, Any]:
    """A task whose training data are `what` of the tiny task's."""
    (folder / f"{name}.py").write_text(
        f"{TINY_TASK}\n\nfrom dataclasses import replace\nfrom dimat.tasks import TensorData\n"
        f"\n\ndef {name}():\n    whole = task()\n    x, y = whole.train.inputs[0], whole.train.targets\n"
        f"    return replace(whole, train=TensorData({what}))\n"
    )
    return {"hook": f"{name}.py:{name}"}


def life(config: ExperimentConfig, *, train: bool = False) -> tuple[AgentWorker, Restored | None]:
    """One life of the agent on its folder's checkpoints: it goes on, and with `train` ends with a checkpoint."""
    setup = prepare_agent(config)
    place = AgentFolder(Path(config.agent.folder or ""), config.run, setup.name)
    try:
        learner = setup.learner(place.snapshots)
        store = CheckpointStore(place.checkpoints)
        middle = MidRound(learner, store, None, print)
        compaction = Compaction(setup.name, place.lineage, ManifestLedger(place.manifests), LEDGER_BYTES)
        work = AgentWorker(learner, config.run, store, place.lineage, "none", place.weights, middle, compaction)
        found = work.restore()()
        if train:
            learner.train(1)
            machine = replace(made(1, agent=setup.name).machine, run=config.run)
            store.save(learner.checkpoint(machine))
        else:
            learner.train(2)  # what was restored can be trained on
        return work, found
    finally:
        place.close()


def checks(config: ExperimentConfig) -> list[tuple[str, str, str]]:
    """What doctor says of the data, without asking machine and network."""
    found = [(check.level, check.what, check.mend) for check in examine(config) if check.name == "data"]
    assert len(found) == 1
    return found


def test_the_same_data_go_on_without_a_word(tmp_path: Path) -> None:
    for task in (WHOLE, SPLIT):
        config = agent(tmp_path / str(len(task)), task)
        life(config, train=True)
        _, found = life(config)
        assert found is not None
        assert found.note == ""
    assert checks(config) == [("ok", "53 examples, as at the checkpoint", "")]


FEWER = "x[:100], y[:100]"
RELABELLED = "x, y.roll(1).clamp(max=2)"


@pytest.mark.parametrize("what", [FEWER, RELABELLED])
@pytest.mark.parametrize("split", [False, True])
def test_other_data_of_the_same_part_are_refused(tmp_path: Path, what: str, split: bool) -> None:
    """Fewer examples, and as many with other labels; with data of one's own, and with a part of all."""
    life(agent(tmp_path, SPLIT if split else WHOLE, train=steps(4)), train=True)
    task = cut(tmp_path, "other", what) | ({"partition": SPLIT["partition"]} if split else {})
    other = agent(tmp_path, task, train=steps(4))
    with pytest.raises(
        DataError, match=r"the training data have changed since the checkpoint: .* then, .* now"
    ) as caught:
        life(other)
    assert str(caught.value).endswith(
        "restore the data, or set agent.accept_new_data = true to continue with the new data"
    )
    ((level, said, mend),) = checks(other)
    assert level == "fail"
    assert f"{said}; {mend}" == str(caught.value)


def test_other_data_that_are_accepted_begin_a_new_epoch(tmp_path: Path) -> None:
    life(agent(tmp_path, train=steps(9)), train=True)
    task = cut(tmp_path, "other", FEWER)
    other = agent(tmp_path, task, train=steps(9), agent={"accept_new_data": True})
    _, found = life(other)
    assert found is not None
    assert re.fullmatch(r"the training data have changed .* 160 examples .* 100 examples .* a new epoch .*", found.note)
    ((level, said, mend),) = checks(other)
    assert (level, f"{said}; {mend}") == ("warn", found.note)


@pytest.mark.parametrize(
    "changes",
    [
        {"topology": {"graph": "path", "agents": 5}},
        {"task": {**WHOLE, "partition": {"kind": "dirichlet", "alpha": 0.5}}},
        {"seed": 7},
    ],
    ids=str,
)
def test_another_map_partition_or_seed_begins_a_new_epoch(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Nine steps into an epoch of other length, where the place in it means nothing any more."""
    life(agent(tmp_path, SPLIT, train=steps(3)), train=True)
    other = agent(tmp_path, **({"task": SPLIT, "train": steps(3)} | changes))
    _, found = life(other)
    assert found is not None
    said = "the network map or the partition has changed since the checkpoint: the agent had 53 examples"
    assert found.note.startswith(said)
    assert checks(other)[0][0] == "warn"


def test_the_map_does_not_matter_to_whom_has_data_of_its_own(tmp_path: Path) -> None:
    life(agent(tmp_path), train=True)
    _, found = life(agent(tmp_path, topology={"graph": "path", "agents": 5}))
    assert found is not None
    assert found.note == ""


def test_batches_of_another_size_begin_a_new_epoch(tmp_path: Path) -> None:
    """Seven batches of 16 are further than two of 100 reach."""
    life(agent(tmp_path, train=steps(7)), train=True)
    _, found = life(agent(tmp_path, train=steps(7, 100)))
    assert found is not None
    assert found.note == "train.batch_size has changed since the checkpoint; a new epoch begins, over the current data"


def test_a_checkpoint_of_an_older_version_is_taken_to_be_of_the_same_data() -> None:
    now = {"rows": 100, "batches": 4, "labels": "", "part": "p"}
    assert compare_data({}, now) == ""


@pytest.mark.parametrize(
    ("change", "merge", "says"),
    [
        ("probe", {"method": "dimat", "align_data": "probe"}, r"the probe set has fewer than the two examples \(1\)"),
        ("train", {"method": "dimat"}, r"the data of agent agent-1 has fewer than the two examples \(1\)"),
        (
            "train",
            {"method": "average", "accept": {"name": "no-worse", "options": {"on": "local"}}},
            "agent agent-1 has 1 example, which accept",
        ),
    ],
)
def test_sets_of_one_example_are_refused_before_training(
    tmp_path: Path, change: str, merge: dict[str, Any], says: str
) -> None:
    (tmp_path / "one.py").write_text(
        f"{TINY_TASK}\n\nfrom dataclasses import replace\n\n\ndef one():\n    whole = task()\n"
        f"    return replace(whole, {change}=TensorData(torch.zeros(1, 6), torch.zeros(1, dtype=torch.int64)))\n"
    )
    own = {"name": "agent-1", "insecure": True}
    setup = prepare_agent(tiny_experiment(tmp_path, agent=own, task={"hook": "one.py:one"}, merge=merge))
    with pytest.raises(DataError, match=says):
        setup.learner(tmp_path)
