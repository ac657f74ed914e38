"""`dimat advise`: short seeded probes of an experiment, one factor after the other.

The search is greedy and starts from the experiment, shortened. The options of each factor are run with the same seeds
and the same number of epochs. The search keeps the option that is best by more than seeds differ; among equals it
keeps the one that sends least, and then the present one. The next factor starts from the kept option.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dimat.advice import Advice, ProbeRow
from dimat.agent.setup.class_shares import FAR_APART
from dimat.agent.setup.next_step import exact_average
from dimat.config import FLOOR, ExperimentConfig, NamedConfig
from dimat.errors import ConfigError, DimatError
from dimat.metrics import score_of
from dimat.results import ONE_SEED
from dimat.simulate.compare import Case, cases_of, compare
from dimat.simulate.factors import FACTORS, Option, ProbedFactor, World, present_of, with_settings
from dimat.simulate.folder import describe
from dimat.simulate.world.scenario import prepare
from dimat.tasks.data import batch_bounds

ROUNDS = 4
BUDGET = 0.05
SEEDS = 2
FEWEST_STEPS = 20
"""Fewest optimizer steps in a probe's round: after fewer, a network has learned nothing that a merge could lose."""
FAST = (
    "short probes favour options that learn fast: an option that is ahead after a few epochs need not be ahead at the "
    "end; compare the advised settings with the present ones over the whole experiment before you rely on them"
)

CONDITIONS = {
    "train.initialisation": "train.initialisation is for new networks: models that exist already keep their weights; "
    'try schedule.first_merge = "adopt-distil" for them',
    "topology.graph": "the advised topology needs links that the present one may not have: all agents that it links "
    "must be able to reach each other",
}
"""Settings that not everybody can change → the conditions for changing them."""


def advise(
    config: ExperimentConfig,
    *,
    rounds: int = ROUNDS,
    budget: float = BUDGET,
    seeds: int = SEEDS,
    out: Path | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Advice:
    """Probe an experiment and return which start, loss, combine, topology and local steps to use.

    `rounds`: rounds of a probe; `budget`: share in (0, 1] of the experiment's epochs that a probe trains, at least
    `FEWEST_STEPS` steps a round and at most the experiment's own epochs a round; `seeds`: runs of each variant, with
    seeds counted up from the experiment's; `out`: folder that keeps the probes, none by default; `tell`: is called with
    each line of progress.

    Equal arguments give equal rows. Raises ConfigError for an impossible experiment, or one that merges nothing between
    rounds of training; KeyboardInterrupt if a probe was stopped.
    """
    method = config.merge.preset
    if not method.exchanges or method.every_step:
        how = "never merges" if not method.exchanges else "merges after every step"
        raise ConfigError(f'merge.method "{config.merge.method}" {how}: nothing to advise; set merge.method = "dimat"')
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dimat-advise-") as scratch:
        folder = Path(scratch) / "probes" if out is None else out
        probe = _shortened(config, rounds, budget)
        given = probe.config
        search = _Search(given, folder, seeds, workers, overwrite, tell)
        search.run("the experiment", [("as it is", given)])
        for name, factor in FACTORS.items():
            search.vary(name, factor)
        alone = search.alone()
    notes = [*probe.notes, *search.notes, *_of_classes(search.config)]
    settings, removed = _translated(config, probe.config, search.settings)
    notes += [note for key, note in CONDITIONS.items() if key in settings]
    runs, epochs = search.runs, search.epochs
    return Advice(
        metric=search.metric,
        rows=tuple(search.rows),
        alone=alone,
        given=search.row_of(given, "as it is"),
        advised=search.row_of(search.config, "as advised"),
        settings=settings,
        removed=removed,
        map=config.topology.map or "",
        probe=probe.what,
        cost=f"{runs} runs, {epochs:g} {probe.unit} an agent{probe.share(epochs)}, "
        f"{time.perf_counter() - started:.0f} s",
        notes=(*notes, FAST),
    )


# ── a probe ──────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class _Probe:
    config: ExperimentConfig
    unit: str
    whole: float
    """Epochs or steps of the whole experiment, 0 if it has no end."""
    what: str
    notes: tuple[str, ...]

    def share(self, amount: float) -> str:
        return f" ({amount / self.whole:.3g} times the experiment's)" if self.whole else ""


def _shortened(config: ExperimentConfig, rounds: int, budget: float) -> _Probe:
    """Return the experiment as a probe runs it: few rounds, few epochs in each, no faults, metrics at the end."""
    train, schedule = config.train, config.schedule
    count = min(rounds, schedule.rounds) if schedule.rounds else rounds
    settings: dict[str, Any] = {
        "variants": (),
        "train.first_round_epochs": None,
        "schedule.rounds": count,
        "schedule.target": None,
        "schedule.max_time_s": None,
        "schedule.final_merge": False,
        "schedule.changes": (),
        "simulate.evaluate": "after",
        "simulate.evaluate_every": count,
        "simulate.faults": (),
        "simulate.random_faults": {},
        "simulate.trace": False,
    }
    plain = with_settings(config, settings, "the probe")
    scenario = prepare(plain)
    batches = [len(batch_bounds(len(part), train.batch_size)) - 1 for part in scenario.parts]
    if train.steps_per_round is not None:
        unit, own = "steps", float(train.steps_per_round)
        fewest, first = float(FEWEST_STEPS), train.first_round_epochs
        whole = own * schedule.rounds
        each = float(math.ceil(min(own, max(budget * whole / count, fewest))))
        plain = with_settings(plain, {"train.steps_per_round": int(each)}, "the probe")
    else:
        unit, own = "epochs", train.epochs_per_round or 2.0
        fewest, first = FEWEST_STEPS * len(batches) / sum(batches), train.first_round_epochs
        whole = (own if first is None else first) + own * (schedule.rounds - 1) if schedule.rounds else 0.0
        # half epochs, which the factor of local steps can cut in two
        each = min(own, math.ceil(2 * max(budget * whole / count, fewest)) / 2)
        plain = with_settings(plain, {"train.epochs_per_round": each}, "the probe")
    what = f"{count} rounds of {each:g} {unit}"
    what += f", {100 * each * count / whole:.2g} % of the experiment's {whole:g}" if whole else ""
    dropped = {
        "simulate.faults": bool(config.simulate.faults),
        "simulate.random_faults": config.simulate.random_faults != plain.simulate.random_faults,
        "train.first_round_epochs": first is not None,
        "schedule.final_merge": schedule.final_merge,
        "schedule.changes": bool(schedule.changes),
    }
    left = [key for key, there in dropped.items() if there]
    notes = (f"probes leave out the experiment's {', '.join(left)}",) if left else ()
    return _Probe(plain, unit, whole, what, notes)


_Measured = tuple[tuple[float, ...], float]
"""The final metric by seed, and megabytes sent by an agent."""


# ── the search ───────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(slots=True)
class _Search:
    """The state of the search. `config`: the best variant so far; `settings`: its changes to the first probe;
    `squares` and `degrees`: squared deviations of paired differences over seeds, and degrees of freedom."""

    config: ExperimentConfig
    folder: Path
    seeds: int
    workers: int | None
    overwrite: bool
    tell: Callable[[str], None]
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    rows: list[ProbeRow] = field(default_factory=list[ProbeRow])
    notes: list[str] = field(default_factory=list[str])
    metric: str = ""
    runs: int = 0
    epochs: float = 0.0
    squares: float = 0.0
    degrees: int = 0
    _known: dict[str, _Measured] = field(default_factory=dict[str, "_Measured"])

    @property
    def noise(self) -> float:
        """Threshold for a difference of means: twice its standard error, from the paired differences of all probes so
        far, but no less than this number of seeds can tell: the first few may agree by luck."""
        error = math.sqrt(self.squares / self.degrees / self.seeds) if self.degrees else 0.0
        return max(2 * error, ONE_SEED / math.sqrt(self.seeds))

    def vary(self, name: str, factor: ProbedFactor) -> None:
        """Run a factor's options, keep the best, and note what was not tried."""
        options = factor.options(self.config, World.of(prepare(self.config)))
        if isinstance(options, str):
            self.notes.append(f"{name}: not varied: {options}")
            return
        forms: dict[str, tuple[Option, ExperimentConfig]] = {}
        present = options[present_of(options)].label
        for option in options:
            try:
                changes = option.settings
                if "schedule.rounds" in changes:
                    changes = {**changes, "simulate.evaluate_every": changes["schedule.rounds"]}
                form = with_settings(self.config, changes, f"{name} = {option.label}")
                prepare(form)
            except ConfigError as error:
                if option.label == present:
                    raise
                self.notes.append(f"{name} = {option.label}: not possible here: {error}")
                continue
            forms[option.label] = (option, form)
        if len(forms) < 2:
            return
        self.run(name, [(label, form) for label, (_, form) in forms.items()])
        found = {label: self._known[_key(form)] for label, (_, form) in forms.items()}
        base = found[present][0]
        for label, (values, _) in found.items():
            if label != present and self.seeds > 1:
                self._learn_noise(values, base)
        means = {label: sum(values) / len(values) for label, (values, _) in found.items()}
        noise = self.noise
        scores = {label: score_of(self.metric, mean) for label, mean in means.items()}
        equals = [label for label, score in scores.items() if max(scores.values()) - score <= noise]
        kept = equals[0]
        if factor.by_traffic:  # of those that send as little, what is there already
            kept = min(equals, key=lambda label: (round(found[label][1], 3), label != present))
        for label, (values, mb) in found.items():
            gain = scores[label] - scores[present]
            self.rows.append(ProbeRow(name, label, values, gain, noise, mb, label == kept))
        option, self.config = forms[kept]
        self.settings |= option.settings

    def alone(self) -> ProbeRow:
        """Return the row of training alone, with the loss and the epochs of the best variant."""
        (case,) = cases_of(self.config, [FLOOR], self._splits, [self.config.seed], self.folder / "alone")
        config = with_settings(case.config, {"run": self.config.run}, FLOOR)
        self.run("alone", [(FLOOR, config)])
        values, mb = self._known[_key(config)]
        best, _ = self._known[_key(self.config)]
        if self.seeds > 1:
            self._learn_noise(best, values)
        gain = score_of(self.metric, sum(values) / len(values) - sum(best) / len(best))
        return ProbeRow("alone", FLOOR, values, gain, self.noise, mb, False)

    def row_of(self, config: ExperimentConfig, option: str) -> ProbeRow:
        """Return the row of a single variant that was run."""
        values, mb = self._known[_key(config)]
        return ProbeRow("", option, values, 0.0, self.noise, mb, False)

    @property
    def _splits(self) -> Mapping[str, Any]:
        partition = self.config.task.partition
        return {partition.kind: partition}

    def _learn_noise(self, values: Sequence[float], base: Sequence[float]) -> None:
        differences = [one - other for one, other in zip(values, base, strict=True)]
        mean = sum(differences) / len(differences)
        self.squares += sum((d - mean) ** 2 for d in differences)
        self.degrees += len(differences) - 1

    def run(self, name: str, forms: Sequence[tuple[str, ExperimentConfig]]) -> None:
        """Run the variants that were not run yet, with all seeds."""
        fresh = [(label, form) for label, form in forms if _key(form) not in self._known]
        if not fresh:
            return
        self.tell(f"{name}: {', '.join(label for label, _ in fresh)}, {self.seeds} seeds each")
        cases: list[Case] = []
        by_label = dict(fresh)
        for label, form in fresh:
            for seed in range(form.seed, form.seed + self.seeds):
                where = self.folder / name.replace(" ", "-") / label.replace(" ", "-") / f"seed{seed}"
                run = f"{name} = {label}, seed {seed}"
                cases.append(Case(name, label, seed, with_settings(form, {"run": run, "seed": seed}, run), where))
                self.runs += 1
                self.epochs += form.schedule.rounds * (form.train.steps_per_round or form.train.epochs_per_round or 0)
        outcome = compare(cases, self.folder, workers=self.workers, overwrite=self.overwrite)
        if not outcome.complete:
            raise KeyboardInterrupt("stopped before all probes had run")
        self.metric = outcome.comparison.metric
        for label, curve in outcome.comparison.splits[name].items():
            ends = dict(zip(curve.seeds, (each[-1] if each else math.nan for each in curve.curves), strict=True))
            if any(not math.isfinite(value) for value in ends.values()):
                raise DimatError(f"{name} = {label}: no finite {self.metric} at the end of a probe; give more --rounds")
            values = tuple(ends[seed] for seed in sorted(ends))
            self._known[_key(by_label[label])] = (values, curve.mb_sent_per_agent)


def _key(config: ExperimentConfig) -> str:
    return json.dumps(describe(config), sort_keys=True)


# ── the advice ───────────────────────────────────────────────────────────────────────────────────────────────
def _translated(
    config: ExperimentConfig, probe: ExperimentConfig, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the settings for the whole experiment, and the keys that they replace.

    Longer and shorter rounds are given by a factor, which is applied to the experiment's own length.
    """
    made = {key: value for key, value in settings.items() if value not in (None, {}, _value_of(config, key))}
    removed = tuple(key for key, value in settings.items() if value is None or value == {})
    if config.topology.map is not None:  # the map keeps its agents, and is changed itself
        made.pop("topology.agents", None)
        removed = tuple(key for key in removed if key != "topology.map")
    if "schedule.rounds" in made:
        factor = probe.schedule.rounds / made.pop("schedule.rounds")
        if config.schedule.rounds:
            made["schedule.rounds"] = max(1, round(config.schedule.rounds / factor))
        steps = made.pop("train.steps_per_round", None)
        if steps is not None and config.train.steps_per_round is not None:
            made["train.steps_per_round"] = max(1, round(config.train.steps_per_round * factor))
        elif made.pop("train.epochs_per_round", None) is not None:
            made["train.epochs_per_round"] = (config.train.epochs_per_round or 2.0) * factor
    return made, removed


def _value_of(config: ExperimentConfig, key: str) -> Any:
    """Return the value of a dotted key; for a named choice without options, its name."""
    table, _, name = key.rpartition(".")
    value = getattr(getattr(config, table), name)
    return value.name if isinstance(value, NamedConfig) and not value.options else value


def _of_classes(config: ExperimentConfig) -> list[str]:
    """Return notes on options that skewed class shares call for and the best variant lacks."""
    world = World.of(prepare(config))
    if world.apart is None or world.apart <= FAR_APART:
        return []
    wanted = [] if world.exact else [f"an exact average, {exact_average(world.agents)}"]
    wanted += ['train.loss = "auto"'] if config.train.loss.name == "task" else []
    if not wanted:
        return []
    return [
        f"class shares are {world.apart:.2f} from all data's (total variation, above {FAR_APART}): over a whole run "
        f"{' and '.join(wanted)} may be worth more than the probes say"
    ]
