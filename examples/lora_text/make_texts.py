"""Make general.txt and topics.jsonl: sentences of a small grammar, by four topics that share its words of structure."""

from __future__ import annotations

import json
import random
from pathlib import Path

TOPICS = {
    "farm": (("farmer", "cow", "tractor"), ("feeds", "follows", "pulls"), ("hay", "field", "barn")),
    "sea": (("sailor", "whale", "ship"), ("meets", "passes", "leads"), ("reef", "harbour", "storm")),
    "lab": (("chemist", "robot", "laser"), ("measures", "heats", "cuts"), ("crystal", "sample", "glass")),
    "town": (("baker", "tram", "child"), ("visits", "leaves", "sees"), ("market", "bridge", "square")),
}
QUALITIES = ("old", "small", "quiet", "red")
PLACES = ("in the morning", "at night", "every day")


def document(topic: str, draw: random.Random) -> str:
    actors, deeds, things = TOPICS[topic]
    return " ".join(
        f"the {draw.choice(QUALITIES)} {draw.choice(actors)} {draw.choice(deeds)} the {draw.choice(things)} "
        f"{draw.choice(PLACES)}."
        for _ in range(4)
    )


def main() -> None:
    folder, draw = Path(__file__).parent, random.Random(0)
    general = [document(draw.choice(["farm", "sea"]), draw) for _ in range(200)]
    (folder / "general.txt").write_text("\n\n".join(general) + "\n", encoding="utf-8")
    rows = [{"topic": topic, "text": document(topic, draw)} for _ in range(80) for topic in TOPICS]
    (folder / "topics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
