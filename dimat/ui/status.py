"""An agent's status as lines for a person."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from dimat.ui.text import bytes_text, metric_text, seconds_text


def status_lines(status: Mapping[str, Any]) -> list[str]:
    """Return what `dimat status` prints. `status`: as the agent tells it."""
    rounds = f" of {status['rounds']}" if status.get("rounds") else ""
    up = seconds_text(status["time"] - status["started"])
    lines = [
        f"{status['agent']} of run {status['run']}: round {status['round']}{rounds}, {status['phase']}; up {up}, "
        f"process {status['pid']}",
        f"listens on {status['address']}{'' if status['secure'] else ' (insecure)'}; sent "
        f"{bytes_text(status['sent_bytes'])}, received {bytes_text(status['received_bytes'])}",
    ]
    merged = status.get("merged")
    if merged:
        metrics = ", ".join(f"{name} {metric_text(value)}" for name, value in merged["after"].items())
        shares = ", ".join(f"{agent} {weight:.3f}" for agent, weight in merged["weights"].items())
        lines.append(f"last merge: round {merged['round']}, {shares}{f'; {metrics}' if metrics else ''}")
    kept = status.get("checkpoint")
    if kept:
        ago = seconds_text(max(0.0, time.time() - kept["time"]))
        lines.append(f"checkpoint: round {kept['round']}, {kept['stage']}, {ago} ago")
    for peer, found in sorted(status["peers"].items()):
        lines.append(f"  {peer}: " + ", ".join(f"{key} {value}" for key, value in found.items()))
    lines += [f"  warning: {message}" for message in status.get("warnings", ())]
    return lines
