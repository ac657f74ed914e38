"""A run and a comparison made by hand, with numbers as a ring of five agents on digits gives them."""

from __future__ import annotations

import math

from dimat.events import Event, RoundSummary, RunFinished, RunStarted, Trained, TrainResult
from dimat.results import AgentRound, Comparison, MethodCurve, Results, Timeline

SNAPSHOT = 940_600


def make_results(agents: int = 5, rounds: int = 10, names: list[str] | None = None, evaluated: bool = True) -> Results:
    own = names or [f"agent-{i}" for i in range(agents)]
    agents = len(own)
    edges = [(own[i], own[(i + 1) % agents]) for i in range(agents)] if agents > 2 else [(own[0], own[-1])]
    rows: list[AgentRound] = []
    for number in range(1, rounds + 1):
        for i, agent in enumerate(own):
            level = 0.95 - 0.55 * math.exp(-number / 3) - 0.015 * math.sin(3 * i + number)
            drop = 0.12 * math.exp(-number / 5) * (1 if number != 3 else -0.2)
            rows.append(
                AgentRound(
                    round=number,
                    agent=agent,
                    loss=1.9 * math.exp(-number / 4) + 0.02 * i,
                    before=level - drop if evaluated else None,
                    after=level if evaluated else None,
                    heard=1 if number == 2 and i == 1 else 2,
                    expected=2,
                    bytes_sent=2 * SNAPSHOT,
                    bytes_received=2 * SNAPSHOT,
                    basis=own[0] if number > 2 or i < 3 else agent,
                    accepted=1.0,
                    consensus_distance=0.6 * math.exp(-number / 2) * (1 + 0.1 * i),
                    samples=288,
                    time_s=float(number),
                )
            )
    return Results(
        version="0.1.0",
        run="digits-ring",
        method="dimat",
        seed=0,
        status="done",
        config={
            "run": "digits-ring",
            "seed": 0,
            "train": {"batch_size": 32, "optimizer": {"name": "adam", "lr": 0.002}},
            "merge": {"method": "dimat", "align": None},
            "schedule": {"rounds": rounds},
        },
        agents=own,
        edges=edges,
        metric="accuracy",
        classes=[str(digit) for digit in range(10)],
        histogram={
            a: [(7 * i + 13 * c) % 11 * (8 if (i + c) % 3 else 0) for c in range(10)] for i, a in enumerate(own)
        },
        parameters=235_146,
        snapshot_bytes=SNAPSHOT,
        rows=rows,
        wall_s=3.84,
        cpu_s={"train": 4.1, "merge": 1.2, "publish": 0.3, "evaluate": 0.9},
    )


def curve(start: float, end: float, rounds: int, std: float, mb: float) -> MethodCurve:
    points = [end - (end - start) * math.exp(-merge / 2) for merge in range(1, rounds + 1)]
    deviations = [std * (1 + 0.2 * math.cos(merge)) for merge in range(rounds)]
    timeline = Timeline(
        time_s=[float(merge) for merge in range(1, rounds + 1)],
        mb=[mb * merge / rounds for merge in range(1, rounds + 1)],
        value=points,
    )
    return MethodCurve(after_merge=points, std=deviations, mb_sent_per_agent=mb, seeds=[0, 1, 2], timeline=timeline)


def make_comparison(rounds: int = 10) -> Comparison:
    sent = 2 * rounds * SNAPSHOT / 1e6
    return Comparison(
        metric="accuracy",
        splits={
            "iid": {
                "centralised": curve(0.90, 0.975, rounds, 0.002, 0.0),
                "isolated": curve(0.75, 0.88, rounds, 0.006, 0.0),
                "average": curve(0.20, 0.93, rounds, 0.020, sent),
                "dimat": curve(0.70, 0.955, rounds, 0.004, sent),
                "dimat-paper": curve(0.68, 0.95, rounds, 0.006, sent),
            },
            "dirichlet(0.5)": {
                "centralised": curve(0.90, 0.975, rounds, 0.002, 0.0),
                "isolated": curve(0.45, 0.60, rounds, 0.020, 0.0),
                "average": curve(0.12, 0.89, rounds, 0.040, sent),
                "dimat": curve(0.55, 0.94, rounds, 0.010, sent),
                "dimat-paper": curve(0.50, 0.93, rounds, 0.015, sent),
            },
        },
    )


def make_events(run: str = "digits-ring", rounds: int = 3) -> list[Event]:
    agents = ("lab-a", "lab-b", "lab-c")
    started = RunStarted(
        run=run,
        method="dimat",
        seed=7,
        agents=agents,
        edges=(("lab-a", "lab-b"), ("lab-b", "lab-c"), ("lab-c", "lab-a")),
        rounds=rounds,
        parameters=235_146,
        snapshot_bytes=SNAPSHOT,
        histogram={"lab-a": (120, 0, 7), "lab-b": (3, 1040, 0), "lab-c": (60, 60, 60)},
        estimated_memory_mb=812.4,
        estimated_disk_mb=5.6,
        estimated_mb_sent=16.9,
        workers=2,
    )
    events: list[Event] = [started]
    for number in range(1, rounds + 1):
        events += [
            Trained(
                run=run, agent=agent, round=number, result=TrainResult(loss=1.2 / number, samples=288), train_s=0.31
            )
            for agent in agents
        ]
        events.append(
            RoundSummary(
                run=run,
                time_s=float(number),
                round=number,
                rounds=rounds,
                loss=1.2 / number,
                before_mean=0.50 + 0.1 * number,
                after_mean=0.55 + 0.1 * number,
                after_min=0.54 + 0.1 * number,
                after_max=0.57 + 0.1 * number,
                consensus_distance=0.2 / 10**number,
                bases=1 if number > 1 else 3,
                heard=6,
                expected=6,
                mb_sent=5.6436 * number,
            )
        )
    return [*events, RunFinished(run=run, reason="done", rounds_done=rounds, wall_s=3.84)]
