"""Whole simulated runs: determinism, exactness against a hand-written loop, and what a run leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dimat import events
from dimat.config import ExperimentConfig
from dimat.errors import ConfigError, DataError, PartitionError, TopologyError
from dimat.events import Event
from dimat.results import Results, read_results
from dimat.simulate import run_simulation
from dimat.simulate.world.scenario import prepare
from dimat.tasks import Subset
from dimat.topology import BaseK
from dimat.train.trainer import Trainer
from tests.simulate.helpers import tiny_experiment


def run(config: ExperimentConfig, out: Path) -> tuple[Results, list[Event], dict[str, dict[str, torch.Tensor]]]:
    heard: list[Event] = []
    results = run_simulation(config, out=out, listeners=[heard.append])
    weights = {file.stem: load_file(file) for file in sorted((out / "final").iterdir())}
    return results, heard, weights


def same(a: dict[str, dict[str, torch.Tensor]], b: dict[str, dict[str, torch.Tensor]]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n][k], b[n][k]) for n in a for k in a[n])


@pytest.mark.live
@pytest.mark.parametrize("method", ["dimat", "dimat-paper", "average"])
def test_equal_seeds_give_equal_bits_for_any_number_of_workers(tmp_path: Path, method: str) -> None:
    """Standard: two simulations with one seed are bit-equal, for any number of worker processes."""
    outcomes = []
    several = (("two", 2), ("three", 3)) if method == "dimat" else (("again", 1), ("two", 2))
    for name, workers in (("one", 1), *several):
        config = tiny_experiment(tmp_path, merge__method=method, simulate__workers=workers)
        outcomes.append(run(config, tmp_path / name))
    first, _, weights = outcomes[0]
    for results, _, others in outcomes[1:]:
        assert same(weights, others)
        assert results.rows == first.rows
    other, _, others = run(tiny_experiment(tmp_path, seed=1, merge__method=method), tmp_path / "other")
    assert not same(weights, others)
    assert other.rows != first.rows


@pytest.mark.parametrize("method", ["zipit", "pleas"])
def test_combine_methods_that_run_the_model_are_given_it_with_its_symmetry_and_data(
    tmp_path: Path, method: str
) -> None:
    """Aligned or not: equal seeds give equal bits, and it is no average. Without a spec or data ZipIt would refuse."""
    first, again = (run(tiny_experiment(tmp_path, merge__method=method), tmp_path / name) for name in ("one", "two"))
    assert same(first[2], again[2])
    plain = {"method": method, "combine": "average"}
    _, _, averaged = run(tiny_experiment(tmp_path, merge=plain), tmp_path / "average")
    assert not same(first[2], averaged)


def test_average_is_the_hand_written_loop(tmp_path: Path) -> None:
    """Method `average`: train alone, then θ_i ← Σ_j W_ij θ_j with Metropolis weights, as plain torch computes it."""
    config = tiny_experiment(tmp_path, merge__method="average")
    _, _, weights = run(config, tmp_path / "run")
    scenario = prepare(config)
    torch.set_num_threads(1)
    data = scenario.task.data("train")
    trainers = [
        Trainer(scenario.task, Subset(data, part), config.train, seed=0, path=("agent", name), rounds_total=3)
        for name, part in zip(scenario.agents, scenario.parts, strict=True)
    ]
    mixing = torch.tensor([[2, 1, 0], [1, 1, 1], [0, 1, 2]], dtype=torch.float64) / 3
    for number in (1, 2, 3):
        for trainer in trainers:
            trainer.train(number)
        held = [trainer.weights() for trainer in trainers]
        for trainer, row in zip(trainers, mixing, strict=True):
            mixed = {k: sum(w * h[k].double() for w, h in zip(row, held, strict=True)) for k in held[0]}
            trainer.load_weights({k: v.float() for k, v in mixed.items()})
    for name, trainer in zip(scenario.agents, trainers, strict=True):
        for key, tensor in trainer.weights().items():
            torch.testing.assert_close(weights[name][key], tensor, rtol=1e-5, atol=1e-6)


def test_bases_agree_after_diameter_rounds_and_contributions_are_exact(tmp_path: Path) -> None:
    """Basis gossip over a path of three (diameter 2); every merge lists self and its peers with Metropolis weights."""
    results, heard, _ = run(tiny_experiment(tmp_path), tmp_path / "run")
    bases = {n: {row.basis for row in results.rows if row.round == n} for n in (1, 2, 3)}
    assert len(bases[2]) == 1
    assert bases[3] == bases[2]
    for merged in (event for event in heard if isinstance(event, events.Merged)):
        expected = {"agent-0": 2 / 3, "agent-1": 1 / 3, "agent-2": 2 / 3}[merged.agent]
        assert merged.contributions[0].agent == merged.agent
        assert merged.contributions[0].weight == pytest.approx(expected)
        assert sum(part.weight for part in merged.contributions) == pytest.approx(1)
    published = {(e.agent, e.round): e.snapshot for e in heard if isinstance(e, events.Published)}
    parts = [part for e in heard if isinstance(e, events.Merged) for part in e.contributions]
    assert all(published[part.agent, part.round] == part.snapshot for part in parts)


def test_shared_basis_keeps_the_function_and_the_optimizer(tmp_path: Path) -> None:
    """Adopting a basis permutes weights and optimizer alike: test metrics right before the merge do not change."""
    dimat, _, _ = run(tiny_experiment(tmp_path), tmp_path / "dimat")
    paper, _, _ = run(tiny_experiment(tmp_path, merge__method="dimat-paper"), tmp_path / "paper")
    first = [[row.before for row in results.rows if row.round == 1] for results in (dimat, paper)]
    assert first[0] == first[1]


def test_networks_that_begin_with_the_same_weights_are_never_aligned(tmp_path: Path) -> None:
    """A `dimat` that averages is then the plain average to the last bit; `dimat-paper` aligns at every merge all the
    same."""

    def of(method: str) -> tuple[Results, list[Event], dict[str, dict[str, torch.Tensor]]]:
        merge = {"method": method, "repair": "none", "combine": "average"}
        train = {"epochs_per_round": 2, "batch_size": 16, "optimizer": {"name": "adam"}, "optimizer_state": "kept"}
        return run(tiny_experiment(tmp_path, merge=merge, train=train), tmp_path / method)

    (_, heard, dimat), (_, _, average), (_, told, _) = map(of, ("dimat", "average", "dimat-paper"))
    assert same(dimat, average)
    assert not [event for event in heard if isinstance(event, events.BasisAdopted)]
    bases = [{event.basis for event in said if isinstance(event, events.Published)} for said in (heard, told)]
    assert [len(each) for each in bases] == [1, 3]


def test_bytes_are_those_of_the_snapshots(tmp_path: Path) -> None:
    """A path of three agents: two edges, so the middle one sends and receives twice a snapshot per round."""
    results, heard, _ = run(tiny_experiment(tmp_path), tmp_path / "run")
    size = next(e.bytes for e in heard if isinstance(e, events.Published))
    rows = [row for row in results.rows if row.round == 2]
    assert [(row.bytes_sent, row.bytes_received) for row in rows] == [(size, size), (2 * size, 2 * size), (size, size)]
    assert results.mb_sent_per_agent == pytest.approx(4 * size * 3 / 3 / 1e6)


def test_isolated_and_centralised(tmp_path: Path) -> None:
    """`isolated` exchanges nothing; `centralised` is one model on all data, whatever the topology says."""
    alone, heard, weights = run(tiny_experiment(tmp_path, merge__method="isolated"), tmp_path / "isolated")
    assert alone.mb_sent_per_agent == 0
    assert all(row.before == row.after and row.expected == 0 for row in alone.rows)
    assert not [e for e in heard if isinstance(e, events.SnapshotFetched | events.Warned)]
    assert len(weights) == 3
    ceiling, _, weights = run(tiny_experiment(tmp_path, merge__method="centralised"), tmp_path / "centralised")
    assert list(weights) == ["centralised"]
    assert sum(ceiling.histogram["centralised"]) == 160


@pytest.mark.parametrize(("agents", "peers"), [(3, 1), (5, 1), (6, 1), (6, 2)])
def test_final_merge_is_the_exact_average(tmp_path: Path, agents: int, peers: int) -> None:
    """Base-(k+1) (arXiv 2305.11420): after one cycle without training, all agents hold the exact mean."""
    changes = {"topology": {"graph": "ring", "agents": agents}, "merge__method": "average"}
    plain, _, _ = run(tiny_experiment(tmp_path, **changes), tmp_path / "plain")
    final = tiny_experiment(
        tmp_path, **changes, schedule={"rounds": 3, "final_merge": True, "final_merge_peers": peers}
    )
    results, _, weights = run(final, tmp_path / "final")
    last = [row for row in results.rows if row.round == max(r.round for r in results.rows)]
    cycle = BaseK(tuple(f"agent-{i}" for i in range(agents)), peers).period
    assert max(row.round for row in results.rows) == 3 + (cycle or 0) > 3
    assert all(row.loss is None for row in last)
    assert max(row.consensus_distance for row in last) < 1e-6
    _, _, before = run(tiny_experiment(tmp_path, **changes), tmp_path / "before")
    for key, tensor in weights["agent-0"].items():
        mean = torch.stack([w[key].double() for w in before.values()]).mean(0).float()
        torch.testing.assert_close(tensor, mean, rtol=1e-5, atol=1e-6)
    assert plain.after_merge() == results.after_merge()[:3]


@pytest.mark.parametrize("steps", [2, 3])
def test_mixing_steps_apply_the_mixing_matrix_so_often(tmp_path: Path, steps: int) -> None:
    """Reference: W^k applied to what one merge starts from, by hand; Metropolis on a path of three (1/3 off it)."""
    plain = {"merge__method": "average", "schedule": {"rounds": 2}, "train__first_round_epochs": 1}
    ours = tiny_experiment(tmp_path, **plain | {"schedule": {"rounds": 2, "mixing_steps": steps}})
    results, _, weights = run(ours, tmp_path / "more")
    trained = [(row.agent, row.round) for row in results.rows if row.loss is not None]
    assert sorted({number for _, number in trained}) == [1, 1 + steps]
    assert max(row.round for row in results.rows) == 2 * steps
    assert len(results.after_merge()) == 2
    assert results.mb_sent_per_agent == pytest.approx(
        steps * run(tiny_experiment(tmp_path, **plain), tmp_path / "one")[0].mb_sent_per_agent
    )
    # after one training: k mixing steps are k - 1 more than one
    short = tiny_experiment(tmp_path, **plain | {"schedule": {"rounds": 1, "mixing_steps": steps}})
    once = tiny_experiment(tmp_path, **plain | {"schedule": {"rounds": 1}})
    (_, _, mixed), (_, _, first) = run(short, tmp_path / "short"), run(once, tmp_path / "once")
    w = torch.tensor([[2 / 3, 1 / 3, 0], [1 / 3, 1 / 3, 1 / 3], [0, 1 / 3, 2 / 3]], dtype=torch.float64)
    more = torch.linalg.matrix_power(w, steps - 1)
    for key in weights["agent-0"]:
        before = torch.stack([first[name][key].double().flatten() for name in sorted(first)])
        wanted = (more @ before).float()
        for row, name in zip(wanted, sorted(first), strict=True):
            torch.testing.assert_close(mixed[name][key].flatten(), row, rtol=1e-5, atol=1e-6)


def test_mixing_steps_come_before_a_final_merge_and_changes_count_in_rounds(tmp_path: Path) -> None:
    """Two rounds of two exchanges, then Base-2's cycle of five; the second round's graph holds from exchange 3."""
    cycle = BaseK(tuple(f"agent-{i}" for i in range(5)), 1).period or 0
    config = tiny_experiment(
        tmp_path,
        topology={"graph": "ring", "agents": 5},
        merge__method="average",
        schedule={
            "rounds": 2,
            "mixing_steps": 2,
            "final_merge": True,
            "changes": [{"round": 2, "topology": {"graph": "complete", "agents": 5}}],
        },
    )
    results, heard, _ = run(config, tmp_path / "run")
    expected = {row.round: row.expected for row in results.rows if row.agent == "agent-0"}
    assert [expected[number] for number in (1, 2, 3, 4)] == [2, 2, 4, 4]
    assert max(expected) == 4 + cycle
    assert {e.round for e in heard if isinstance(e, events.Trained)} == {1, 3}
    assert max(row.consensus_distance for row in results.rows if row.round == 4 + cycle) < 1e-6
    assert len(results.after_merge()) == 2 + cycle


def test_a_screened_out_network_trains_on_and_says_so(tmp_path: Path) -> None:
    """Every peer refused (a norm bound that nobody meets): own weights are kept, a warning names each peer once."""
    config = tiny_experiment(tmp_path, merge={"method": "dimat", "screen": {"max_norm_ratio": 0.01}})
    results, heard, _ = run(config, tmp_path / "run")
    assert results.status == "done"
    assert all(row.before == row.after and row.heard == row.expected for row in results.rows)
    refused = [line for line in results.warnings if "refused" in line]
    assert len(refused) == 4
    assert all(e.contributions[0].weight == 1 for e in heard if isinstance(e, events.Merged))


def test_run_folder_holds_results_and_final_weights(tmp_path: Path) -> None:
    """What a run leaves behind, and that nothing else is left: no snapshots, no state of single rounds."""
    out = tmp_path / "run"
    results, _, weights = run(tiny_experiment(tmp_path), out)
    assert read_results(out) == results
    assert sorted(p.name for p in out.iterdir()) == [
        "experiment.json",
        "final",
        "lineage.jsonl",
        "origin.json",
        "results.json",
    ]
    assert results.status == "done"
    assert [len([r for r in results.rows if r.round == n]) for n in (1, 2, 3)] == [3, 3, 3]
    model = prepare(tiny_experiment(tmp_path)).task.build_model(torch.Generator())
    model.load_state_dict(weights["agent-1"])


def test_run_folders_are_guarded(tmp_path: Path) -> None:
    """Nothing is lost by accident: other folders, other experiments and old results are refused, each in one line."""
    out = tmp_path / "run"
    config = tiny_experiment(tmp_path, schedule={"rounds": 1})
    run_simulation(config, out=out)
    kept = (out / "results.json").read_bytes()
    with pytest.raises(DataError, match="already holds results"):
        run_simulation(config, out=out)
    with pytest.raises(DataError, match=r"another experiment \(differs in seed\)"):
        run_simulation(config.model_copy(update={"seed": 4}), out=out, overwrite=True)
    assert (out / "results.json").read_bytes() == kept
    run_simulation(config, out=out, overwrite=True)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="no run folder of dimat"):
        run_simulation(config, out=foreign, overwrite=True)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(DataError, match="is a file"):
        run_simulation(config, out=file)
    with pytest.raises(DataError, match="cannot write"):
        run_simulation(config, out=Path("/proc/dimat"))


def test_impossible_experiments_are_refused_before_a_folder_exists(tmp_path: Path) -> None:
    """Bad input: more agents than samples, impossible graph, unknown method."""
    out = tmp_path / "run"
    with pytest.raises(PartitionError, match="500 agents cannot share 160"):
        run_simulation(tiny_experiment(tmp_path, topology={"graph": "ring", "agents": 500}), out=out)
    graph = {"graph": "random-regular", "agents": 5, "options": {"degree": 3}}
    with pytest.raises(TopologyError):
        run_simulation(tiny_experiment(tmp_path, topology=graph), out=out)
    with pytest.raises(ConfigError, match="did you mean 'dimat'"):
        run_simulation(tiny_experiment(tmp_path, merge={"method": "dimatt"}), out=out)
    assert not out.exists()


def test_time_varying_schedule(tmp_path: Path) -> None:
    """One-peer exponential on four agents: one model sent per agent and round, and the mean is exact after two."""
    topology = {"agents": 4, "schedule": {"name": "one-peer-exponential"}}
    config = tiny_experiment(tmp_path, topology=topology, merge__method="average", schedule={"rounds": 2})
    results, heard, _ = run(config, tmp_path / "run")
    sizes = {e.bytes for e in heard if isinstance(e, events.Published)}
    assert {row.bytes_sent for row in results.rows} == sizes
    assert all(row.expected == row.heard == 1 for row in results.rows)


def test_mixing_by_samples_and_skewed_parts(tmp_path: Path) -> None:
    """Mixing "samples" takes the counts of the partition that was drawn."""
    config = tiny_experiment(
        tmp_path,
        topology={"graph": "complete", "agents": 3, "mixing": "samples"},
        task={"hook": "tiny_task.py:task", "partition": {"kind": "dirichlet", "alpha": 0.3}},
    )
    results, heard, _ = run(config, tmp_path / "run")
    counts = {agent: sum(row) for agent, row in results.histogram.items()}
    merged = next(e for e in heard if isinstance(e, events.Merged))
    assert {p.agent: p.weight for p in merged.contributions} == pytest.approx(
        {agent: count / 160 for agent, count in counts.items()}
    )


def test_no_worse_accepts_on_a_local_hold_out(tmp_path: Path) -> None:
    """accept = no-worse: a tenth of the agent's samples is kept from training and judges merges."""
    merge = {"method": "average", "accept": {"name": "no-worse", "options": {"tolerance": 0.0}}}
    results, heard, _ = run(tiny_experiment(tmp_path, merge=merge), tmp_path / "run")
    trained = [e for e in heard if isinstance(e, events.Trained) and e.round == 1]
    assert {e.result.samples for e in trained} <= {2 * (n - max(1, n // 10)) for n in (53, 54)}
    assert any(row.accepted < 1 for row in results.rows), "averaging unaligned networks must be refused somewhere"
    for merged in (e for e in heard if isinstance(e, events.Merged)):
        assert sum(p.weight for p in merged.contributions) == pytest.approx(1)


def test_a_shared_start_that_is_none_is_refused(tmp_path: Path) -> None:
    """A task whose model ignores its generator makes other weights for each agent: they are in no one basis."""
    config = tiny_experiment(tmp_path, train__initialisation="shared")
    text = (tmp_path / "tiny_task.py").read_text()
    (tmp_path / "tiny_task.py").write_text(
        text.replace("seeded(lambda: mlp((6, 12, 8, 4)))", "lambda _: mlp((6, 12, 8, 4))")
    )
    with pytest.raises(ConfigError, match="makes other weights at each call"):
        run(config, tmp_path / "run")
