"""Make readings.csv: six sensors of a made-up machine in four states, 1,500 rows."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

STATES = ("idle", "normal", "worn", "faulty")


def main() -> None:
    draw = np.random.default_rng(7)
    mixing = draw.normal(size=(3, 6))
    rows: list[list[str]] = []
    for _ in range(1500):
        state = int(draw.integers(4))
        load, heat = (state >= 1) + draw.normal(0, 0.35), (state >= 2) + draw.normal(0, 0.35)
        shake = (load * heat if state != 3 else -load * heat) + draw.normal(0, 0.35)
        sensors = np.array([load, heat, shake]) @ mixing + draw.normal(0, 0.1, 6)
        rows.append([*(f"{value:.3f}" for value in sensors), STATES[state]])
    with (Path(__file__).parent / "readings.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([[*(f"sensor_{i}" for i in range(6)), "state"], *rows])


if __name__ == "__main__":
    main()
