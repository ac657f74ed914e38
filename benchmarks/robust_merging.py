"""What robust combine methods withstand: honest agents' accuracy on digits with attackers among their peers.

Agents start from equal weights, train ten epochs alone, then merge, and one epoch before each further merge. Every
merge goes through the library's pipeline (screen, combine, BatchNorm re-estimated, always accepted). Attackers are
members in good standing whose snapshots are not what they seem; each sends all its peers the same. With θ what honest
training gave an attacker and s what it had started the round from, it publishes

- sign flip: s − 4 (θ − s), its update reversed (Damaskinos et al., ICML 2018; the factor is ours);
- scaled: s + 10 (θ − s) (model replacement: Bagdasaryan et al., arXiv 1807.00459);
- random: Gaussian noise, tensor by tensor of the root mean square of its own weights;
- labels: θ as it is, trained on labels 9 − y (data poisoning: nothing is wrong with the message);
- alie: mean − z · std of the honest agents' weights, coordinate by coordinate, known to all attackers, with
  Φ(z) = (n − f − s) / (n − f), s = ⌊n/2 + 1⌋ − f the honest agents that f of n attackers lack for a majority (Baruch
  et al., "A Little Is Enough", NeurIPS 2019, arXiv 1902.06156): so many are expected further out than they are
  themselves. z is 0 for 1 of 5 and 0.18 for 3 of 10. alie-1.5: the same with z = 1.5.

All floating-point tensors are treated so, running statistics too. Reference: what `average` reaches without
attackers on the complete graph, IID; target: the best method keeps nine tenths of it under every attack.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

import torch
from _common import Result, finish, options, table
from torch import Tensor

from dimat.config import MergeConfig, NamedConfig, PartitionConfig, TaskConfig, TopologyConfig, TrainConfig, build
from dimat.errors import MergeError, TrainingError
from dimat.merge import MergeContext, MergePlan, Peer, adopt, merge, plan_merge
from dimat.merge.registry import combine_registry
from dimat.seeds import numpy_generator, torch_generator
from dimat.symmetry import Observer, SymmetrySpec, derive_symmetry, permute_weights
from dimat.tasks import Data, Subset, Task, TensorData, load_task, partition
from dimat.topology import build_topology
from dimat.train import Trainer, TrainerState

METHODS = (
    "average",
    "coordinate-median",
    "trimmed-mean",
    "geometric-median",
    "krum",
    "multi-krum",
    "clipped-gossip",
)
ATTACKS = ("none", "sign flip", "scaled", "random", "labels", "alie", "alie-1.5")
QUICK = ("sign flip", "random", "alie-1.5")
ALIE = {"alie": None, "alie-1.5": 1.5}
ALONE = "alone"
"""Instead of a method: nobody merges."""
IDLE = ("random", *ALIE)
"""Attacks for which attackers need not train."""
FACTORS = {"sign flip": -4.0, "scaled": 10.0}

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Block:
    """One table. `own_starts`: every agent starts from weights of its own; `aligned`: they align once, by activations,
    into a shared basis."""

    name: str
    title: str
    graph: str = "complete"
    split: str = "iid"
    own_starts: bool = False
    aligned: bool = False
    attacks: Sequence[str] = ATTACKS
    sizes: Sequence[tuple[int, int]] = ((5, 1), (10, 3))


SHORT: dict[str, Any] = {"attacks": ("none", "sign flip"), "sizes": ((5, 1),)}
BLOCKS = (
    Block("complete", "Complete graph, IID"),
    Block("dirichlet", "Complete graph, Dirichlet 0.5", split="dirichlet"),
    Block("ring", "Ring, IID", graph="ring", sizes=((10, 3),)),
    Block("aligned", "Complete graph, IID, own initialisations, aligned", own_starts=True, aligned=True, **SHORT),
    Block("unaligned", "Complete graph, IID, own initialisations, not aligned", own_starts=True, **SHORT),
)


@dataclass
class Group:
    """The agents of a block of one size and seed, and what they hold after training alone, which all methods and
    attacks share. `attackers` are spread evenly, so that on the ring nobody has two of them beside it."""

    block: Block
    agents: int
    attackers: frozenset[int]
    seed: int
    task: Task
    config: TrainConfig
    spec: SymmetrySpec | None
    rows: list[dict[int, float]] = field(init=False)
    parts: list[Data] = field(init=False)
    alone: dict[tuple[int, bool], TrainerState] = field(default_factory=dict)
    observers: dict[str, Observer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        topology = build_topology(TopologyConfig(graph=self.block.graph, agents=self.agents), seed=self.seed)
        names = topology.schedule.names
        self.rows = [
            {names.index(peer): w for peer, w in topology.schedule.row(1, name).items() if w} for name in names
        ]
        train = self.task.data("train")
        split = PartitionConfig(kind="dirichlet" if self.block.split == "dirichlet" else "iid", alpha=0.5)
        drawn = partition(train.labels, self.agents, split, numpy_generator(self.seed, "partition"))
        self.parts = [Subset(train, indices) for indices in drawn]

    def trainers(self, attack: str) -> list[Trainer]:
        """Return all agents' trainers after their first round."""
        trainers: list[Trainer] = []
        for i, part in enumerate(self.parts):
            flipped = attack == "labels" and i in self.attackers
            data = with_flipped_labels(part) if flipped else part
            trainer = Trainer(self.task, data, self.config, seed=self.seed, path=("agent", i))
            if (i, flipped) not in self.alone:
                trainer.train(1)
                self.alone[i, flipped] = trainer.state()
            trainer.load_state(self.alone[i, flipped])
            trainers.append(trainer)
        return trainers

    def starts(self) -> list[Weights]:
        """Return what agents are initialised with."""
        return [
            Trainer(self.task, part, self.config, seed=self.seed, path=("agent", i)).weights()
            for i, part in enumerate(self.parts)
        ]

    def context(self, trainer: Trainer, agent: int, number: int, base: Weights) -> MergeContext:
        order = torch_generator(self.seed, "align", agent, number)
        return MergeContext(
            model=trainer.model,
            spec=self.spec,
            data=trainer.input_batches(self.parts[agent], self.config.eval_batch_size, order),
            base=base,
            generator=torch_generator(self.seed, "merge", agent, number),
            observer_cache=self.observers,
        )


def with_flipped_labels(data: Data) -> TensorData:
    """Return examples of class c as examples of class C − 1 − c."""
    batch = data.batch(torch.arange(len(data)))
    return TensorData(batch.inputs, 9 - batch.targets)


def alie_z(agents: int, attackers: int) -> float:
    """Return the paper's z_max: s more agents are needed for a majority, and so many honest ones are to lie further
    out than the attackers do."""
    needed = agents // 2 + 1 - attackers
    return NormalDist().inv_cdf((agents - attackers - needed) / (agents - attackers))


def changed(weights: Weights, change: Callable[[str, Tensor], Tensor]) -> Weights:
    """Return weights with `change(name, tensor)` in the place of every floating-point tensor."""
    return {n: change(n, t) if t.is_floating_point() else t.clone() for n, t in weights.items()}


def published(
    attack: str, group: Group, trainers: Sequence[Trainer], starts: Sequence[Weights], number: int
) -> list[Weights]:
    """Return what each agent's peers get to see."""
    sent = [trainer.weights() for trainer in trainers]
    honest = [weights for i, weights in enumerate(sent) if i not in group.attackers]
    for i in group.attackers:
        draw = torch_generator(group.seed, "attack", i, number)
        if attack == "random":
            sent[i] = changed(sent[i], partial(noise, draw))
        elif attack in FACTORS:
            sent[i] = changed(sent[i], partial(beyond, starts[i], FACTORS[attack]))
        elif attack in ALIE:
            z = ALIE[attack]
            z = alie_z(group.agents, len(group.attackers)) if z is None else z
            sent[i] = changed(sent[i], partial(aside, honest, z))
    return sent


def noise(draw: torch.Generator, _: str, tensor: Tensor) -> Tensor:
    return torch.randn(tensor.shape, generator=draw) * tensor.square().mean().sqrt()


def beyond(start: Weights, factor: float, name: str, tensor: Tensor) -> Tensor:
    return start[name] + factor * (tensor - start[name])


def aside(honest: Sequence[Weights], z: float, name: str, _: Tensor) -> Tensor:
    values = torch.stack([weights[name] for weights in honest])
    return values.mean(0) - z * values.std(0, correction=0)


def plan_of(method: str, agents: int, aligned: bool) -> MergePlan:
    """Return dimat's preset with another combine method, without alignment where all start alike."""
    combine = NamedConfig(name="krum", options={"m": agents}) if method == "multi-krum" else NamedConfig(name=method)
    tree = {"method": "dimat", "combine": combine} | ({} if aligned else {"align": "none"})
    return plan_merge(build(MergeConfig, tree, "the benchmark"))


@dataclass(frozen=True)
class Run:
    """Mean test accuracy of the honest agents after the last merge; how many of the attackers' snapshots the screen
    refused, of how many; whether somebody's weights stopped being finite, which counts as accuracy by chance."""

    accuracy: float
    refused: int
    offered: int
    broken: bool = False


def play(group: Group, method: str, attack: str, merges: int) -> Run:
    """Let the agents train and merge, with attackers among them, and measure the honest ones."""
    plan = plan_of("average" if method == ALONE else method, group.agents, group.block.aligned)
    trainers, starts = group.trainers(attack), group.starts()
    base = starts[0]
    honest = [i for i in range(group.agents) if i not in group.attackers or attack == "none"]
    refused = offered = 0
    if group.block.aligned:
        into_one_basis(group, trainers, starts, honest[0], plan)
    try:
        for number in range(1, merges + 1):
            if number > 1:
                starts = [trainer.weights() for trainer in trainers]
                for i, trainer in enumerate(trainers):
                    if i in honest or attack not in IDLE:
                        trainer.train(number)
            sent = published(attack, group, trainers, starts, number)
            for i, trainer in enumerate(trainers):
                row = {i: 1.0} if method == ALONE else group.rows[i]
                peers = [Peer(f"agent-{k}", sent[k], w, same_basis=True) for k, w in row.items() if k != i]
                context = group.context(trainer, i, number, base)
                outcome = merge(trainer.weights(), row[i], peers, plan, context)
                trainer.load_weights(outcome.weights)
                if i in honest:
                    bad = {f"agent-{k}" for k in row if k not in honest}
                    refused, offered = refused + len(bad & outcome.refused.keys()), offered + len(bad)
    except (TrainingError, MergeError) as error:
        print(f"{group.block.name}, {attack}, {method}: {error}", file=sys.stderr)
        return Run(1 / len(group.task.classes), refused, offered, True)
    test = group.task.data("test")
    return Run(fmean(trainers[i].evaluate(test)[group.task.metric] for i in honest), refused, offered)


def into_one_basis(
    group: Group, trainers: Sequence[Trainer], starts: list[Weights], founder: int, plan: MergePlan
) -> None:
    """Let all agents permute themselves into the basis of an honest one, as basis gossip does."""
    anchor = Peer(f"agent-{founder}", trainers[founder].weights(), 0.0)
    for i, trainer in enumerate(trainers):
        if i != founder and group.spec is not None:
            moves = adopt(trainer.weights(), anchor, plan, group.context(trainer, i, 0, starts[0]))
            trainer.permute(group.spec, moves)
            starts[i] = permute_weights(starts[i], group.spec, moves)


Cells = dict[tuple[str, int, str, str], list[Run]]
"""Block, agents, attack and method → one run for each seed."""


def groups_of(block: Block, seeds: int, alone: float, task: Task) -> Iterator[Group]:
    """Give a block's agents by size and seed."""
    spec = None
    if block.aligned:
        spec = derive_symmetry(task.build_model(torch_generator(0, "symmetry")), task.example_inputs())
    config = TrainConfig(
        initialisation="own" if block.own_starts else "shared",
        first_round_epochs=alone,
        epochs_per_round=1,
        batch_size=64,
        device="cpu",
    )
    for agents, attackers in block.sizes:
        bad = frozenset(k * agents // attackers for k in range(attackers))
        for seed in range(seeds):
            yield Group(block, agents, bad, seed, task, config, spec)


def rows_of(block: Block, methods: Sequence[str], attacks: Sequence[str], cells: Cells) -> list[list[str]]:
    """Return a block's table: a row for each number of attackers and attack."""
    rows: list[list[str]] = []
    for agents, attackers in block.sizes:
        for attack in (a for a in block.attacks if a in attacks or a == "none"):
            runs = [cells[block.name, agents, attack, method] for method in methods]
            means = [fmean(run.accuracy for run in found) for found in runs]
            offered = sum(run.offered for found in runs for run in found)
            share = f"{sum(run.refused for found in runs for run in found) / offered:.0%}" if offered else "–"
            who = f"none of {agents}" if attack == "none" else f"{attackers} of {agents}"
            broken = ["*" if any(run.broken for run in found) else "" for found in runs]
            shown = [f"{mean:.3f}".removeprefix("0") + star for mean, star in zip(means, broken)]
            rows.append([who, attack, *shown, share])
    return rows


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def chosen(text: str | None, default: Sequence[str], what: str, known: Sequence[str]) -> list[str]:
    """Return the names in a list with commas; one that is not known ends the program."""
    names = [*default] if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise SystemExit(f"unknown {what} {name!r} (known: {', '.join(known)})")
    return names


def spread(cells: Cells) -> float:
    """Return how far two seeds of one cell are apart, at most."""
    return max(max(r.accuracy for r in runs) - min(r.accuracy for r in runs) for runs in cells.values())


def outcome(methods: Sequence[str], attacks: Sequence[str], cells: Cells, block: str) -> Result:
    """Return the best robust method's worst accuracy under attack, against that of `average` without attackers."""
    worst: dict[str, float] = {}
    clean: list[float] = []
    for (name, _, attack, method), runs in cells.items():
        if name == block and method != ALONE:
            mean = fmean(run.accuracy for run in runs)
            if attack != "none":
                worst[method] = min(worst.get(method, 1.0), mean)
            elif method == "average":
                clean.append(mean)
    robust = {method: value for method, value in worst.items() if method != "average"}
    best = max(robust, key=robust.__getitem__)
    reference, measured = min(clean, default=1.0), robust[best]
    print(f"\nbest in its worst case: {best} {measured:.3f}; average {worst.get('average', float('nan')):.3f}")
    return Result("robust_merging", measured, reference, measured / reference, ">= 0.9", measured >= 0.9 * reference)


def read_options() -> argparse.Namespace:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--merges", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--methods", help="with commas: multi-krum, or combine methods; default: average and robust ones"
    )
    parser.add_argument("--attacks", help=f"with commas, of {', '.join(ATTACKS)}")
    parser.add_argument("--blocks", help=f"with commas, of {', '.join(block.name for block in BLOCKS)}")
    parser.add_argument("--markdown", type=Path, help="file to write the tables to")
    return parser.parse_args()


def main() -> int:
    arguments = read_options()
    quick: bool = arguments.quick
    merges, seeds = (2, 1) if quick else (arguments.merges, arguments.seeds)
    methods = chosen(arguments.methods, METHODS, "method", ["multi-krum", *combine_registry.names()])
    attacks = chosen(arguments.attacks, QUICK if quick else ATTACKS, "attack", ATTACKS)
    names = [block.name for block in BLOCKS]
    names = chosen(arguments.blocks, names[:1] if quick else names, "block", names)
    blocks = [replace(b, sizes=b.sizes[:1]) if quick else b for b in BLOCKS if b.name in names]
    torch.set_num_threads(1)
    task = load_task(TaskConfig(name="digits"))
    cells: Cells = defaultdict(list)
    headers = ["attackers", "attack", *methods, "refused"]
    pages: list[str] = []
    for block in blocks:
        for group in groups_of(block, seeds, 2 if quick else 10, task):
            start = time.process_time()
            for attack in ("none", *(a for a in block.attacks if a in attacks and a != "none")):
                for method in (*methods, ALONE) if attack == "none" else methods:
                    run = play(group, method, attack, merges)
                    cells[block.name, group.agents, attack, method].append(run)
            took = time.process_time() - start
            print(f"{block.name}, {group.agents} agents, seed {group.seed}: {took:.0f} CPU-s", file=sys.stderr)
        rows = rows_of(block, methods, attacks, cells)
        alone = [
            f"{fmean(run.accuracy for run in cells[block.name, agents, 'none', ALONE]):.3f} ({agents} agents)"
            for agents, _ in block.sizes
        ]
        title = f"{block.title}. Without any merge: {', '.join(alone)}."
        print(f"\n{title} Honest agents' accuracy after merge {merges}, mean of {seeds} seeds:")
        table(headers, rows)
        sys.stdout.flush()
        pages.append(f"{title}\n\n{markdown(headers, rows)}\n")
    print(f"\nCPU-seconds {time.process_time():.0f}; seeds of a cell differ by up to {spread(cells):.3f}")
    if arguments.markdown is not None:
        arguments.markdown.write_text("\n".join(pages), encoding="utf-8")
    finish(outcome(methods, attacks, cells, blocks[0].name))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
