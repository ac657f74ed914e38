"""Methods by name: unknown names and options are configuration errors with a suggestion."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from dimat.config import MergeConfig, NamedConfig
from dimat.errors import ConfigError
from dimat.merge import accept_registry, align_registry, combine_registry, plan_merge, repair_registry
from dimat.merge.models.fisher_information import empirical_fisher
from dimat.merge.registry import CONTEXT, TRAITS
from dimat.registry import Registry, SharedOptions, keywords


@dataclass(frozen=True)
class Sizes(SharedOptions):
    """Options of two methods."""

    rows: int = 1
    columns: int | None = None


def test_every_stage_finds_its_methods() -> None:
    """The folders are scanned: each file's method is known by its name."""
    assert {"activations", "none"} <= set(align_registry.names())
    assert {"average"} <= set(combine_registry.names())
    assert {"batchnorm", "none"} <= set(repair_registry.names())
    assert {"always", "no-worse"} <= set(accept_registry.names())


def test_context_is_never_an_option() -> None:
    """What the pipeline hands in (model, data, score, …) cannot be set from a configuration."""
    for registry in (align_registry, combine_registry, repair_registry, accept_registry):
        for name in registry.names():
            assert not set(registry.options(name)) & CONTEXT


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"method": "dimatt"}, "unknown merge method 'dimatt'; did you mean 'dimat'"),
        ({"align": "activation"}, "unknown align method 'activation'; did you mean 'activations'"),
        ({"combine": "avarage"}, "did you mean 'average'"),
        ({"repair": "batch-norm"}, "did you mean 'batchnorm'"),
        ({"accept": "no_worse"}, "did you mean 'no-worse'"),
        ({"align": {"name": "activations", "options": {"position": 3}}}, "did you mean 'positions'"),
        ({"align": {"name": "activations", "options": {"positions": "many"}}}, "'positions': .*got 'many'"),
        ({"align": {"name": "activations", "options": {"positions": 0}}}, "greater than or equal to 1"),
        ({"align": {"name": "activations", "options": {"max_images": True}}}, "valid integer"),
        ({"align": {"name": "activations", "options": {"model": 1}}}, "no option 'model'"),
        ({"repair": {"name": "batchnorm", "options": {"estimator": "median"}}}, "'pooled' or 'batch-mean'"),
        ({"repair": {"name": "none", "options": {"x": 1}}}, "it has none"),
        ({"accept": {"name": "no-worse", "options": {"tolerance": -0.1}}}, "tolerance"),
        ({"screen": {"max_norm_ration": 3}}, "did you mean 'max_norm_ratio'"),
        ({"screen": {"max_norm_ratio": 0}}, "greater than 0"),
    ],
)
def test_faults_name_what_is_wrong_and_the_nearest_known(config: dict[str, Any], message: str) -> None:
    """One-line messages; exit code 2."""
    with pytest.raises(ConfigError, match=message) as error:
        plan_merge(MergeConfig.model_validate(config))
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_a_method_that_rests_on_statistics_says_how_agents_take_them() -> None:
    """Whoever asks for `aux` declares it, and nobody else does: agents know a method by its registration alone."""
    for name in combine_registry.names():
        plan = plan_merge(MergeConfig.model_validate({"combine": name}))
        assert ("aux" in keywords(combine_registry.get(name))) == bool(plan.statistics), name
    for name in repair_registry.names():
        plan = plan_merge(MergeConfig.model_validate({"repair": name}))
        assert ("aux" in keywords(repair_registry.get(name))) == bool(plan.statistics), name
    assert combine_registry.traits("fisher")["statistics"] is empirical_fisher
    assert "other" not in combine_registry.traits("fisher")


def test_whole_numbers_serve_as_floats() -> None:
    """TOML writes `stable_within = 0`."""
    plan_merge(MergeConfig.model_validate({"align": {"name": "activations", "options": {"stable_within": 0}}}))


def test_presets_and_overrides() -> None:
    """Reference: the design's table of presets; what is set replaces its stage alone."""
    dimat, paper, average = (plan_merge(MergeConfig(method=m)) for m in ("dimat", "dimat-paper", "average"))
    assert (dimat.align.name, dimat.combine.name, dimat.repair.name) == ("activations", "average", "batchnorm")
    assert (dimat.align_to, paper.align_to) == ("shared", "self")
    assert (average.align.name, average.combine.name, average.repair.name) == ("none", "average", "none")
    assert {p.accept.name for p in (dimat, paper, average)} == {"always"}
    changed = plan_merge(MergeConfig(method="dimat", repair=NamedConfig(name="none"), align_data="probe"))
    assert (changed.align.name, changed.repair.name, changed.align_data) == ("activations", "none", "probe")
    for method in ("isolated", "centralised"):
        plan_merge(MergeConfig(method=method))


def test_only_the_module_that_is_called_as_the_method_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent's start does not wait for methods that it does not use; one that is elsewhere is found all the same,
    and the list is the same whatever was asked for before."""
    package = tmp_path / "some_methods"
    package.mkdir()
    (package / "__init__.py").write_text(
        'from dimat.registry import Registry\nMETHODS = Registry("toy", "some_methods")\n'
    )
    for module, names in (("any_sum", ["any-sum"]), ("late", ["late", "later"]), ("sole", ["sole"])):
        methods = "".join(f"@METHODS.register({name!r})\ndef method_{i}(): ...\n" for i, name in enumerate(names))
        (package / f"{module}.py").write_text(f"from some_methods import METHODS\n{methods}")
    monkeypatch.syspath_prepend(tmp_path)
    registry: Registry[None] = import_module("some_methods").METHODS

    def loaded() -> set[str]:
        return {name.partition(".")[2] for name in sys.modules if name.startswith("some_methods.")}

    registry.get("sole")
    assert loaded() == {"sole"}
    registry.get("any-sum")
    assert loaded() == {"any_sum", "sole"}
    registry.get("later")
    assert loaded() == {"any_sum", "late", "sole"}
    assert [entry.name for entry in registry.entries()] == ["any-sum", "late", "later", "sole"]
    with pytest.raises(ConfigError, match="did you mean 'sole'"):
        registry.get("soles")
    for name in ("a.b", "", "../sole", "__init__"):
        with pytest.raises(ConfigError, match="unknown toy"):
            registry.get(name)


def test_a_method_is_called_with_its_options_and_the_context_it_asks_for() -> None:
    """Only what the function names arrives; a second method of the same name is refused."""
    registry: Registry[dict[str, Any]] = Registry("toy", context=frozenset({"data", "model"}))

    @registry.register("toy")
    def toy(value: int, *, data: str, factor: float = 2.0) -> dict[str, Any]:
        return {"value": value, "data": data, "factor": factor}

    called = registry.call("toy", {"factor": 3}, 1, data="d", model="m")
    assert called == {"value": 1, "data": "d", "factor": 3}
    assert registry.options("toy") == {"factor": 2.0}
    with pytest.raises(ConfigError, match="twice"):
        registry.register("toy")(test_presets_and_overrides)
    with pytest.raises(ConfigError, match="needs the option 'data'"):
        registry.bind("toy", {})(1)


def test_options_that_methods_share_are_options_of_each() -> None:
    """A class of them: one option per field, with the method's own defaults, checked as any other."""
    registry: Registry[Sizes] = Registry("toy")

    @registry.register("toy")
    def toy(*, sizes: Sizes = Sizes(rows=5), name: str = "a") -> Sizes:
        return sizes

    assert registry.options("toy") == {"rows": 5, "columns": None, "name": "a"}
    bound = registry.bind("toy", {"columns": 3})
    assert bound() == Sizes(5, 3)
    assert bound.settings == {"rows": 5, "columns": 3, "name": "a"}
    assert registry.call("toy", {}) == Sizes(5)
    for options, message in (({"row": 1}, "did you mean 'rows'"), ({"columns": "many"}, "'columns': .*got 'many'")):
        with pytest.raises(ConfigError, match=message):
            registry.bind("toy", options)


def test_a_trait_that_no_method_can_have_is_refused() -> None:
    """And those that a method does not mention have the registry's values."""
    with pytest.raises(ConfigError, match="has no trait 'hold'"):
        combine_registry.register("other", hold="pieces")
    assert combine_registry.traits("average") == {**TRAITS, "moved": {}, "holds": "pieces", "linear": True}
