"""The merge methods' presets and traits. Reference: what each method's paper says that it does."""

import pytest

from dimat.config import CEILING, PRESETS, ExperimentConfig, MergeConfig, NamedConfig, TrainConfig
from dimat.config.presets import WITH_MOMENTS
from dimat.errors import ConfigError
from dimat.merge import plan_merge
from dimat.merge.registry import combine_registry


def test_traits() -> None:
    """One ceiling, which exchanges nothing; D-PSGD and SGP merge every step, and only SGP needs push-sum mixing; one
    exchanges logits."""
    assert [name for name, preset in PRESETS.items() if preset.ceiling] == [CEILING] == ["centralised"]
    assert {name for name, preset in PRESETS.items() if not preset.exchanges} == {"isolated", "centralised"}
    assert {name for name, preset in PRESETS.items() if preset.every_step} == {"dpsgd", "sgp"}
    assert {name for name, preset in PRESETS.items() if preset.push_sum} == {"sgp"}
    assert {name for name, preset in PRESETS.items() if preset.shares == "logits"} == {"distil"}


@pytest.mark.parametrize("method", PRESETS)
def test_every_preset_names_stages_that_there_are(method: str) -> None:
    plan = plan_merge(MergeConfig(method=method))
    preset = PRESETS[method]
    assert (plan.align.name, plan.combine.name, plan.repair.name) == (preset.align, preset.combine, preset.repair)
    assert plan.align_to == preset.align_to
    assert plan.accept.name == "always"


def test_a_trait_is_read_from_the_preset_and_not_from_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method of another name with SGP's traits sets what SGP sets."""
    monkeypatch.setitem(PRESETS, "another", PRESETS["sgp"])  # pyright: ignore[reportArgumentType]
    experiment = ExperimentConfig(merge=MergeConfig(method="another"))
    assert experiment.train.steps_per_round == 1
    assert experiment.topology.mixing.name == "push-sum"


def test_an_unknown_method_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"merge method .dimatt.*did you mean .dimat"):
        _ = MergeConfig(method="dimatt").preset


@pytest.mark.parametrize(
    ("method", "combine", "state"),
    [
        ("dimat", None, "merged"),
        ("dimat", "average", "merged"),
        ("dimat", "regmean", "merged"),
        ("dimat", "ties", "kept"),
        ("pleas", None, "kept"),
        ("dimat", "pleas", "kept"),
        ("average", None, "kept"),
        ("dimat-paper", "pleas", "kept"),
    ],
)
def test_moments_are_merged_beside_a_kind_of_mean(method: str, combine: str | None, state: str) -> None:
    """Reference: the table of benchmarks/default_combine.py. What is said stands."""
    merge = MergeConfig(method=method, combine=None if combine is None else NamedConfig(name=combine))
    assert ExperimentConfig(merge=merge).optimizer_state == state
    assert ExperimentConfig(merge=merge, train=TrainConfig(optimizer_state="fresh")).optimizer_state == "fresh"


def test_combine_methods_with_moments_are_registered() -> None:
    assert set(combine_registry.names()) >= WITH_MOMENTS
