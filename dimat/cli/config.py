"""`dimat config …`: the keys of experiments, and where their values come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dimat.cli.app import config
from dimat.cli.shared import Json, Overrides, show

File = Annotated[Path, Parameter(help="An experiment or an agent's configuration (TOML).")]


@config.command(name="keys")
def config_keys(
    pattern: Annotated[
        str, Parameter(help="Only keys whose path contains this, or matches it if it has `*`, `?` or `[…]`.")
    ] = "*",
    /,
    *,
    as_json: Json = False,
) -> int:
    """List all keys of experiments, with type, default and meaning."""
    from dataclasses import asdict

    from dimat.config.keys import all_keys, nearest_paths
    from dimat.errors import ConfigError
    from dimat.ui.terminal.config import key_lines

    found = all_keys(pattern)
    if not found:
        near = " or ".join(map(repr, nearest_paths(pattern)))
        raise ConfigError(f"no key is called {pattern!r}{f'; did you mean {near}?' if near else ''}")
    show([asdict(key) for key in found] if as_json else "\n".join(key_lines(found)))
    return 0


@config.command(name="show")
def config_show(file: File, /, *, set_: Overrides = (), as_json: Json = False) -> int:
    """Show all values of an experiment as they count, each with where it comes from: the file, a DIMAT_ variable,
    --set, or the default."""
    from dimat.config.keys import settings_of
    from dimat.config.load import load_with_origins, read_toml
    from dimat.ui.terminal.config import setting_lines

    loaded, origins = load_with_origins(file, set_)
    found = settings_of(loaded, file.name, read_toml(file), origins)
    show({s.path: {"value": s.value, "from": s.source} for s in found} if as_json else "\n".join(setting_lines(found)))
    return 0


@config.command(name="check")
def config_check(file: File, /, *, set_: Overrides = (), as_json: Json = False) -> int:
    """Check keys, values and merge methods of an experiment and its variants without loading its task; `dimat doctor`
    looks deeper.

    Exit code 2 and one line for the first fault.
    """
    from dimat.config import ExperimentConfig, build, changed, load_experiment
    from dimat.errors import ConfigError
    from dimat.merge import plan_merge

    loaded = load_experiment(file, set_)
    plan_merge(loaded.merge)
    plain = loaded.model_dump(exclude={"variants"}, exclude_unset=True)
    for variant in loaded.variants:
        tree = {**changed(plain, variant.set), "folder": loaded.folder}
        where = f"variant {variant.name!r}"
        try:
            plan_merge(build(ExperimentConfig, tree, where).merge)
        except ConfigError as error:
            raise ConfigError(str(error) if where in str(error) else f"{where}: {error}") from error
    told = {"run": loaded.run, "method": loaded.merge.method, "variants": [each.name for each in loaded.variants]}
    show(told if as_json else f"{file}: keys and values are right (run {loaded.run}, method {loaded.merge.method})")
    return 0
