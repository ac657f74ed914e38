"""The run folder: what a run writes and where, and the guards around it.

`experiment.json` (the resolved configuration) marks a folder as a run of that experiment; `results.json`,
`events.jsonl`, `final/<agent>.safetensors` and the report go beside it. A folder that holds another experiment
is never touched.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from dimat.config import ExperimentConfig
from dimat.errors import DataError
from dimat.results import Results
from dimat.snapshot import write_bytes

MARK = "experiment.json"


class RunFolder:
    """Folder of one run. Raises DataError if it cannot be made, or holds other things than this experiment.

    A folder with results of the same experiment is refused too unless `overwrite` is set, so that a finished
    run is not replaced by accident.
    """

    def __init__(self, path: Path, config: ExperimentConfig, *, overwrite: bool = False) -> None:
        self.path = path
        self.snapshots = path / "snapshots"
        self.state = path / "state"
        self.final = path / "final"
        self.events = path / "events.jsonl"
        described = check_folder(path, config, overwrite=overwrite)
        try:
            for folder in (self.snapshots, self.state, self.final):
                shutil.rmtree(folder, ignore_errors=True)
            for file in (self.events, path / "results.json"):
                file.unlink(missing_ok=True)
            for folder in (path, self.state, self.final):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot write to run folder {path}: {error.strerror or error}") from error
        write_bytes(path / MARK, (json.dumps(described, indent=1) + "\n").encode())

    def write_results(self, results: Results) -> None:
        """Write `results.json`, by rename."""
        write_bytes(self.path / "results.json", results.model_dump_json(indent=1).encode(), durable=False)

    def state_file(self, agent: str, number: int) -> Path:
        """Return where an agent's weights after merge `number` are kept until all agents have passed it."""
        return self.state / f"{agent}.round{number}.safetensors"

    def finish(self, agents: list[str], number: int) -> None:
        """Move the weights after merge `number` to `final/`, and remove what was needed on the way only."""
        for agent in agents:
            source = self.state_file(agent, number)
            if source.exists():
                source.replace(self.final / f"{agent}.safetensors")
        for folder in (self.snapshots, self.state):
            shutil.rmtree(folder, ignore_errors=True)


def check_folder(path: Path, config: ExperimentConfig, *, overwrite: bool) -> dict[str, object]:
    """Return the experiment's description if `path` may become its run folder; DataError says why it may not."""
    described = describe(config)
    if path.exists() and not path.is_dir():
        raise DataError(f"run folder {path} is a file; choose another with --out")
    if not path.exists() or not any(path.iterdir()):
        return described
    mark = path / MARK
    if not mark.exists():
        raise DataError(f"folder {path} is not empty and no run folder of dimat; choose another with --out")
    try:
        kept = json.loads(mark.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {mark}: {error}") from error
    if kept != described:
        keys = sorted(_differences(kept, described))
        raise DataError(
            f"run folder {path} holds another experiment (differs in {', '.join(keys[:4])}); choose another with --out"
        )
    if (path / "results.json").exists() and not overwrite:
        raise DataError(f"run folder {path} already holds results of this experiment; --overwrite replaces them")
    return described


def describe(config: ExperimentConfig) -> dict[str, object]:
    """Return what makes two experiments one and the same: all settings but those of the host."""
    return json.loads(config.model_dump_json(exclude={"simulate": {"workers"}}))


def _differences(a: object, b: object, path: str = "") -> set[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        found: set[str] = set()
        for key in {*a, *b}:
            found |= _differences(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
        return found
    return set() if a == b else {path}
