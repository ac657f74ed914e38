"""An agent's status as lines for a person.

It may come from a peer: missing and malformed values are left out, and its texts are cleaned before they reach the
terminal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from dimat.ui.text import NONE, Table, as_text, bytes_text, clean, metric_text, seconds_text, spans, trimmed


def status_lines(status: Mapping[str, Any]) -> list[str]:
    """Return the output of `dimat status`. `status`: as the agent sent it."""
    now = _number(status.get("time"))
    rounds = f" of {_text(status['rounds'])}" if status.get("rounds") else ""
    process = f"process {_text(status['pid'])}, " if "pid" in status else ""  # other members are not told
    lines = [
        f"{_text(status.get('agent'))} of run {_text(status.get('run'))}: round {_text(status.get('round'))}{rounds}, "
        f"{_text(status.get('phase'))}; up {_ago(now, status.get('started'))}, {process}dimat "
        f"{_text(status.get('version'))}",
        f"listens on {_text(status.get('address'))}{'' if status.get('secure') else ' (insecure)'}; sent "
        f"{bytes_text(int(_number(status.get('sent_bytes'))))}, received "
        f"{bytes_text(int(_number(status.get('received_bytes'))))}",
    ]
    trained = _mapping(status.get("trained"))
    if trained:
        lines.append(f"last training: round {_text(trained.get('round'))}, loss {_metric(trained.get('loss'))}")
    lines += _merged(_mapping(status.get("merged")))
    kept = _mapping(status.get("checkpoint"))
    if kept:
        ago = _ago(now, kept.get("time"))
        lines.append(f"checkpoint: round {_text(kept.get('round'))}, {_text(kept.get('stage'))}, {ago} ago")
    lines += _dht(_mapping(status.get("dht")))
    peers = {name: _mapping(found) for name, found in _mapping(status.get("peers")).items()}
    if peers:
        lines += ["", *as_text(peers_table(peers))]
    warnings = status.get("warnings")
    if isinstance(warnings, list) and warnings:
        messages = cast("list[object]", warnings)
        lines += ["", *(f"warning: {_text(message)}" for message in messages)]
    if status.get("left"):
        lines.append(f"it leaves: {_text(status['left'])}")
    return lines


def peers_table(peers: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a row per followed peer: whether it is connected, its address, its offer, when it was last heard, bytes
    from and to it, trouble."""
    rows = tuple(
        (
            clean(name),
            "connected" if found.get("connected") else "out of reach",
            _text(found.get("address") or NONE),
            _rounds(found.get("rounds")),
            _since(found.get("heard_s")),
            _size(found.get("received_bytes")),
            _size(found.get("sent_bytes")),
            _trouble(found),
        )
        for name, found in sorted(peers.items())
    )
    headers = ("peer", "state", "address", "offers rounds", "last heard", "received", "sent", "trouble")
    numbers = frozenset({4, 5, 6})
    table = Table("", headers, rows, left=frozenset(range(len(headers))) - numbers)
    return trimmed(table, ("trouble",))


def _trouble(found: Mapping[str, Any]) -> str:
    """Return why a peer is out of reach, and how many of its offers were refused."""
    refused = int(_number(found.get("refused_offers")))
    told = [_text(found["trouble"])] if found.get("trouble") else []
    return "; ".join([*told, f"refused offers: {refused:,}"] if refused > 0 else told)


def _merged(merged: Mapping[str, Any]) -> list[str]:
    if not merged:
        return []
    before, after = _mapping(merged.get("before")), _mapping(merged.get("after"))
    metrics = [
        f"{clean(name)} {f'{_metric(before[name])} → ' if name in before else ''}{_metric(value)}"
        for name, value in after.items()
    ]
    shares = [f"{clean(name)} {_metric(weight)}" for name, weight in _mapping(merged.get("weights")).items()]
    accepted = _number(merged.get("accepted", 1.0))
    verdict = [] if accepted == 1 else [f"accepted {accepted:.0%}"]
    heard = f"heard {_text(merged.get('heard'))} of {_text(merged.get('expected'))}"
    return [
        "; ".join([f"last merge: round {_text(merged.get('round'))}, {heard}", ", ".join(shares), *verdict, *metrics])
    ]


def _dht(dht: Mapping[str, Any]) -> list[str]:
    if not dht:
        return []
    agents = dht.get("agents")
    seen = ", ".join(_text(name) for name in cast("list[object]", agents)) if isinstance(agents, list) else ""
    state = "healthy" if dht.get("healthy") else "not reached now"
    return [f"DHT: {state}; agents seen there: {seen or 'none'}"]


def _rounds(rounds: object) -> str:
    if not isinstance(rounds, Sequence) or isinstance(rounds, str):
        return NONE
    numbers = [number for number in cast("Sequence[object]", rounds) if isinstance(number, int)]
    return spans(numbers[-100:]) or NONE


def _since(seconds: object) -> str:
    """Return how long ago a peer was heard; a dash if it never was, or if an older agent does not say."""
    known = _finite(seconds)
    return NONE if known is None else f"{seconds_text(max(0.0, known))} ago"


def _size(count: object) -> str:
    known = _finite(count)
    return NONE if known is None else bytes_text(int(known))


def _mapping(value: object) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def _finite(value: object) -> float | None:
    """Return a number that can be displayed; a peer may send anything."""
    if not isinstance(value, (int, float)) or not abs(value) < 1e18:
        return None
    return float(value)


def _number(value: object) -> float:
    return _finite(value) or 0.0


def _metric(value: object) -> str:
    return metric_text(_finite(value))


def _ago(now: float, then: object) -> str:
    """Return how long ago something was, by the agent's own clock, which may differ from this one."""
    return seconds_text(max(0.0, now - _number(then)))


def _text(value: object) -> str:
    return clean(str(value)) if value is not None else NONE
