"""The run folder: the files that a run writes, and the guards around them.

`experiment.json` (the resolved configuration) marks a folder as a run of that experiment; `results.json`,
`events.jsonl`, `final/<agent>.safetensors` and the report go beside it. A folder that holds another experiment
is never touched. `origin.json` holds the folder to which the experiment's relative paths refer: it is not part of
the experiment, which stays the same wherever its file lies.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from dimat.config import ExperimentConfig, build
from dimat.errors import ConfigError, DataError
from dimat.json_text import to_json
from dimat.reading import read_table
from dimat.results import Results
from dimat.weights.durable import write_bytes

MARK = "experiment.json"
ORIGIN = "origin.json"
TRACE = "trace.jsonl"


class RunFolder:
    """Folder of one run. Raises DataError if it cannot be made, or holds anything but this experiment.

    A folder with results of the same experiment is refused too unless `overwrite` is set, so that a finished
    run is not replaced by accident.
    """

    def __init__(self, path: Path, config: ExperimentConfig, *, overwrite: bool = False) -> None:
        self.path = path
        self.snapshots = path / "snapshots"
        self.state = path / "state"
        self.final = path / "final"
        self.checkpoints = path / "checkpoints"
        self.events = path / "events.jsonl"
        self.lineage = path / "lineage.jsonl"
        self.trace = path / TRACE
        described = check_folder(path, config, overwrite=overwrite)
        try:
            for folder in (self.snapshots, self.state, self.final, self.checkpoints):
                shutil.rmtree(folder, ignore_errors=True)
            for file in (self.events, self.lineage, self.trace, path / "results.json"):
                file.unlink(missing_ok=True)
            for folder in (path, self.state, self.final):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot write to run folder {path}: {error.strerror or error}") from error
        write_bytes(path / ORIGIN, _json(_origin(path, Path(config.folder))))
        write_bytes(path / MARK, _json(described))

    def write_results(self, results: Results) -> None:
        """Write `results.json`, by rename."""
        write_bytes(self.path / "results.json", results.model_dump_json(indent=1).encode(), durable=False)

    def recorded(self, agent: str) -> Path:
        """Return where an agent records its snapshots; from there they are moved to where all find them."""
        return self.snapshots / "recorded" / agent

    def state_file(self, agent: str, number: int) -> Path:
        """Return where an agent's weights after merge `number` are kept until all agents have passed it."""
        return self.state / f"{agent}.round{number}.safetensors"

    def finish(self, last: Mapping[str, int]) -> None:
        """Move each agent's weights after its merge of round `last[agent]` to `final/`, and remove what was needed on
        the way only."""
        for agent, number in last.items():
            source = self.state_file(agent, number)
            if source.exists():
                source.replace(self.final / f"{agent}.safetensors")
        for folder in (self.snapshots, self.state, self.checkpoints):
            shutil.rmtree(folder, ignore_errors=True)


def check_folder(path: Path, config: ExperimentConfig, *, overwrite: bool) -> dict[str, object]:
    """Return the experiment's description if `path` may become its run folder; raises DataError if not."""
    described = describe(config)
    place = path.resolve()  # a path through a folder that is yet to be made, and back, leads to one that is there
    if place.exists() and not place.is_dir():
        raise DataError(f"run folder {path} is a file; choose another with --out")
    if not place.exists() or not any(place.iterdir()):
        return described
    if not (place / MARK).exists():
        raise DataError(f"folder {path} is not empty and is no run folder of dimat; choose another with --out")
    kept = read_table(place / MARK)
    if kept != described:
        keys = sorted(_differences(kept, described)) or ["keys that only one version of dimat knows"]
        raise DataError(
            f"run folder {path} holds another experiment (differs in {', '.join(keys[:4])}); choose another with --out"
        )
    if (place / "results.json").exists() and not overwrite:
        raise DataError(f"run folder {path} already holds results of this experiment; --overwrite replaces them")
    return described


def read_experiment(path: Path) -> ExperimentConfig:
    """Return the experiment that a run folder holds; DataError if it cannot be read or is of another version."""
    if not (path / MARK).exists():
        raise DataError(f"{path} is no run folder of dimat: it has no {MARK}; give the folder of a run")
    origin = read_table(path / ORIGIN) if (path / ORIGIN).exists() else {}
    # where the experiment was, or else beside the run folder as it was before both were moved
    places = [Path(str(origin.get("folder", ""))), path / str(origin.get("relative", ""))]
    folder = next((place for place in places if origin and _is_folder(place)), path)
    try:
        return build(ExperimentConfig, {**read_table(path / MARK), "folder": str(folder)}, str(path / MARK))
    except ConfigError as error:
        raise DataError(f"{error}; this dimat cannot read the experiment of that run") from None


def _is_folder(place: Path) -> bool:
    try:
        return place.is_dir()
    except OSError:  # of a name that no file can have
        return False


def describe(config: ExperimentConfig) -> dict[str, object]:
    """Return the identity of an experiment: all settings except those on which no result depends."""
    unused = {"variants": True, "simulate": {"workers", "trace"}, "agent": True, "dht": True, "monitor": True}
    return json.loads(config.model_dump_json(exclude=unused))


def _origin(path: Path, folder: Path) -> dict[str, str]:
    return {"folder": str(folder.resolve()), "relative": os.path.relpath(folder.resolve(), path.resolve())}


def _json(values: Mapping[str, object]) -> bytes:
    return (to_json(values, indent=1) + "\n").encode()


def _differences(a: object, b: object, path: str = "") -> set[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        found: set[str] = set()
        for key in {*a, *b}:
            found |= _differences(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
        return found
    return set() if a == b else {path}
