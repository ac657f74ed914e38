"""What a comparison keeps for the verdict on its rows. Reference: the settings in which its variants differ."""

from __future__ import annotations

from pathlib import Path

from dimat.simulate.compare import cases_of, compare
from tests.simulate.helpers import tiny_experiment


def test_rows_say_in_what_their_training_differs_from_alone(tmp_path: Path) -> None:
    """A loss and epochs in all count, where agents begin and how the same epochs are cut into rounds do not."""
    variants = [
        {"name": "as-it-is", "set": {}},
        {"name": "plain-loss", "set": {"train": {"loss": "task"}}},
        {"name": "shared", "set": {"train": {"initialisation": "shared"}}},
        {"name": "long-rounds", "set": {"train": {"epochs_per_round": 4}, "schedule": {"rounds": 1}}},
        {"name": "more", "set": {"schedule": {"rounds": 3}}},
    ]
    config = tiny_experiment(tmp_path, schedule__rounds=2).model_dump(exclude_unset=True)
    config = type(tiny_experiment(tmp_path)).model_validate({**config, "variants": variants, "folder": str(tmp_path)})
    splits = {"iid": config.task.partition}
    cases = cases_of(config, ["isolated", "all"], splits, [0], tmp_path / "out")
    rows = compare(cases, tmp_path / "out", workers=1).comparison.splits["iid"]
    unlike = {name: curve.unlike for name, curve in rows.items()}
    assert unlike == {
        "isolated": [],
        "as-it-is": [],
        "plain-loss": ["train.loss"],
        "shared": [],
        "long-rounds": [],
        "more": ["epochs or steps in all"],
    }
    assert rows["isolated"].next_step == ""
    assert rows["as-it-is"].next_step.startswith('train.initialisation = "shared"')
    assert rows["shared"].next_step.startswith("schedule.mixing_steps = 3")  # on a path not all are linked
