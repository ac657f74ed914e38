"""What goes with methods that exchange weights, and with those that exchange logits. Reference: one setting each."""

from __future__ import annotations

from typing import Any

import pytest

from dimat.config import ExperimentConfig, build
from dimat.errors import ConfigError

MODELS = [{"agents": ["a"], "options": {"model": "mlp"}}]


def made(**tables: Any) -> ExperimentConfig:
    return build(ExperimentConfig, {"merge": {"method": "distil"}, **tables}, "the test")


@pytest.mark.parametrize(
    ("table", "setting", "says"),
    [
        ("merge", {"align": "weights"}, "merge.align applies to weights"),
        ("merge", {"align_to": "self"}, "merge.align_to"),
        ("merge", {"align_data": "probe"}, "merge.align_data"),
        ("merge", {"repair": "batchnorm"}, "merge.repair"),
        ("merge", {"accept": "no-worse"}, "merge.accept"),
        ("merge", {"head": "rows"}, "merge.head"),
        ("merge", {"outer": {"lr": 0.5}}, "merge.outer"),
        ("merge", {"layers": {"head.*": 0}}, "merge.layers"),
        ("merge", {"keep_not_finite": True}, "merge.keep_not_finite"),
        ("merge", {"screen": {"max_norm_ratio": 3}}, "merge.screen"),
        ("merge", {"base": {"seed": 0}}, "merge.base"),
        ("merge", {"combine": "average"}, 'its only one is "distil"'),
        ("schedule", {"first_merge": "adopt-distil"}, "schedule.first_merge"),
        ("schedule", {"final_merge": True}, "schedule.final_merge"),
        ("train", {"optimizer_state": "merged"}, "train.optimizer_state"),
        ("exchange", {"encoding": "int8", "delta": True}, "exchange.encoding"),
        ("topology", {"mixing": "push-sum"}, 'topology.mixing = "push-sum" keeps sums of weights'),
    ],
    ids=str,
)
def test_what_is_done_to_weights_is_refused_where_logits_travel(table: str, setting: Any, says: str) -> None:
    """One line, which names the setting and the method."""
    tables = {"merge": {"method": "distil"}, table: setting}
    tables["merge"] = {"method": "distil", **tables["merge"]}
    with pytest.raises(ConfigError) as error:
        made(**tables)
    assert says in str(error.value)
    assert '"distil" exchanges logits instead' in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_that_say_nothing_more_are_taken() -> None:
    """What another method's file may say as well: stages that do nothing, options, more exchanges a round."""
    stages = {"align": "none", "repair": "none", "accept": "always"}
    options = {"combine": {"name": "distil", "options": {"steps": 3}}}
    made(merge={"method": "distil", **stages, **options}, schedule={"mixing_steps": 2, "mode": "sync"})
    assert made().optimizer_state == "kept"


def test_a_newcomer_keeps_its_own_weights() -> None:
    """There are none to adopt, whatever `schedule.join` says."""
    assert made().join == "align"
    assert made(merge={"method": "average"}).join == "adopt"


@pytest.mark.parametrize("method", ["average", "dimat", "opcm", "sgp"])
def test_unlike_models_share_no_weights(method: str) -> None:
    with pytest.raises(ConfigError, match=rf'task.models.*"{method}" merges weights.*use merge.method "distil"'):
        made(merge={"method": method}, task={"models": MODELS})
    for other in ("distil", "isolated", "centralised"):
        assert made(merge={"method": other}, task={"models": MODELS}).task.models


def test_each_agent_has_one_model() -> None:
    twice = [*MODELS, {"agents": ["b", "a"], "options": {}}]
    with pytest.raises(ConfigError, match=r"models\[1\] and models\[0\] both name agent 'a'"):
        made(task={"models": twice})
    with pytest.raises(ConfigError, match="agents"):
        made(task={"models": [{"agents": [], "options": {}}]})


def test_an_agents_task_has_its_options_over_the_others() -> None:
    task = {"options": {"model": "cnn", "probe": 50}, "models": MODELS}
    config = made(task=task)
    assert config.of_agent("a").task.options == {"model": "mlp", "probe": 50}
    assert config.of_agent("b").task.options == {"model": "cnn", "probe": 50}
    assert not config.of_agent("b").task.models
