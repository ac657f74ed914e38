"""mergekit's merge methods in dimat: the method, options and mixing weights for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dimat.merge_files.mergekit_config import Config

Choice = tuple[str, dict[str, Any], "list[float] | None"]
"""dimat's method, its options, mixing weights."""


def _linear(config: Config) -> Choice:
    weights, total = config.each("weight", None), 0.0
    total = sum(weights)
    if not config.flag("normalize", True) and abs(total - 1) > 1e-9:
        raise config.fault(
            "linear with normalize: false and weights that do not sum to 1 is not supported; task_arithmetic with a "
            "base_model takes weights of any sum"
        )
    if total <= 0 or min(weights) < 0:
        raise config.fault("weights of linear must not be negative, and not all 0")
    return "average", {}, [w / total for w in weights]


def _deltas(config: Config) -> dict[str, Any]:
    """Return the options of all task-vector methods: coefficients, and the scale of their sum."""
    options: dict[str, Any] = {"weights": config.each("weight", 1.0)}
    return {**options, "scaling": config.number("lambda", 1.0)}


def _unscaled(config: Config) -> None:
    if config.flag("rescale", False):
        raise config.fault(f"{config.method} with rescale: true is not supported; leave it out")


def _task_arithmetic(config: Config) -> Choice:
    return "task-arithmetic", {**_deltas(config), "normalize": config.flag("normalize", False)}, None


def _ties(config: Config) -> Choice:
    _unscaled(config)
    how = "mean" if config.flag("normalize", True) else "sum"
    return "ties", {**_deltas(config), "density": config.each_or_one("density", 1.0), "merge_func": how}, None


def _breadcrumbs(config: Config) -> Choice:
    _unscaled(config)
    options = {
        **_deltas(config),
        "density": config.each_or_one("density", 1.0),
        "gamma": config.one("gamma", 0.01),
        "elect_signs": config.method == "breadcrumbs_ties",
        "normalize": config.flag("normalize", False),
    }
    return "breadcrumbs", options, None


def _rescaled(config: Config) -> str | bool:
    """Return the scaling of a sparsified delta: mergekit restores its former sum of magnitudes."""
    return "norm" if config.flag("rescale", True) else False


def _dare(config: Config) -> Choice:
    options = {
        **_deltas(config),
        "density": config.each_or_one("density", 1.0),
        "rescale": _rescaled(config),
        "normalize": config.flag("normalize", False),
    }
    return config.method.replace("_", "-"), options, None


def _della(config: Config) -> Choice:
    linear = config.method == "della_linear"
    normalize = config.flag("normalize", not linear)
    rescale, epsilon = _rescaled(config), config.one("epsilon", 0.15)
    options, densities = _deltas(config), config.each("density", 1.0)
    if min(densities) >= 1:  # nothing is dropped, whatever epsilon is
        if linear:
            return "task-arithmetic", {**options, "normalize": normalize}, None
        return "ties", {**options, "density": 1.0, "merge_func": "mean" if normalize else "sum"}, None
    if max(densities) >= 1:
        raise config.fault(f"{config.method} with density 1 for some models only is not supported; give less for all")
    if linear and normalize:
        total = sum(options["weights"])
        options["scaling"] /= total if abs(total) >= 1e-8 else 1
    options |= {
        "density": config.each_or_one("density", 1.0),
        "epsilon": 2 * epsilon,
        "rescale": rescale,
        "merge_func": "linear" if linear else "mean" if normalize else "sum",
    }
    return "della", options, None


def _sce(config: Config) -> Choice:
    return "sce", {"select_topk": config.one("select_topk", 1.0)}, None


def _slerp(config: Config) -> Choice:
    paths = [path for path, _ in config.listed]
    if len(paths) == 1 and config.base is not None and config.base not in paths:
        paths = [config.base, *paths]
    if len(paths) != 2 or config.base not in paths:
        raise config.fault("slerp merges two models, one of which is base_model")
    return "slerp", {"t": config.one("t", 0.5)}, None


def _nuslerp(config: Config) -> Choice:
    weights = config.each("weight", None)
    if len(weights) != 2 or min(weights) < 0:
        raise config.fault("nuslerp merges two models with weights that are not negative")
    total = sum(weights)
    mixing = [w / total for w in weights] if total >= 1e-6 else [0.5, 0.5]
    along = "tensor"
    row_wise = config.flag("nuslerp_row_wise", False)
    if not config.flag("nuslerp_flatten", True):  # sums run over the last axis, row-wise over the first one
        along = "columns" if row_wise else "rows"
    return "nuslerp", {"along": along, "deltas": config.base is not None}, mixing


def _karcher(config: Config) -> Choice:
    iterations = config.number("max_iter", 10)
    if iterations < 1 or iterations != int(iterations):
        raise config.fault("max_iter must be a whole number of at least 1")
    return "karcher", {"iterations": int(iterations), "tolerance": config.number("tol", 1e-5)}, None


def _model_stock(config: Config) -> Choice:
    return "model-stock", {"clamp": False, "filter_wise": config.flag("filter_wise", False)}, None


METHODS: Mapping[str, Callable[[Config], Choice]] = {
    "linear": _linear,
    "task_arithmetic": _task_arithmetic,
    "ties": _ties,
    "breadcrumbs": _breadcrumbs,
    "breadcrumbs_ties": _breadcrumbs,
    "dare_linear": _dare,
    "dare_ties": _dare,
    "della": _della,
    "della_linear": _della,
    "sce": _sce,
    "slerp": _slerp,
    "nuslerp": _nuslerp,
    "model_stock": _model_stock,
    "karcher": _karcher,
}

NEAREST: Mapping[str, str] = {
    "multislerp": "karcher is the mean of any number of models on the sphere",
    "passthrough": "layers stay where they are: copy a model by dimat merge MODEL -o FOLDER, or give rules by name",
    "nearswap": "slerp or linear with a filter and values by layer are near it",
    "arcee_fusion": "sce and ties also choose the changes to keep",
    "ram": "ties and sce merge changes by where models agree, too",
    "ramplus_tl": "ties and sce merge changes by where models agree, too",
}
"""The nearest alternatives to mergekit's methods that dimat does not have."""
