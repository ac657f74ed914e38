"""The table [simulate]: the host, and the simulated network, computers and faults."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, model_validator

from dimat.config.agent import CHECKPOINTS_KEPT, SNAPSHOTS_KEPT
from dimat.config.tree import Tree

Span = float | tuple[float, float]
"""A number, or a range [low, high] from which one is drawn."""


def _span(value: Any) -> Any:
    numbers: list[Any] = list(cast("list[Any]", value)) if isinstance(value, list | tuple) else [value, value]
    if len(numbers) != 2 or any(isinstance(x, bool) or not isinstance(x, int | float) for x in numbers):
        raise ValueError("must be a number or a range [low, high]")
    low, high = numbers
    if not (math.isfinite(low) and math.isfinite(high) and low >= 0):
        raise ValueError("must be 0 or more, and finite")
    if low > high:
        raise ValueError(f"the range [{low:g}, {high:g}] is reversed; write [low, high]")
    return value


def _positive_span(value: Any) -> Any:
    value = _span(value)
    if (value[0] if isinstance(value, list | tuple) else value) == 0:
        raise ValueError("must be above 0")
    return value


Seconds = Annotated[float, Field(ge=0)]
SomeSeconds = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(ge=0)]
Factor = Annotated[float, Field(gt=0)]
Loss = Annotated[float, Field(ge=0, lt=1)]
AnySpan = Annotated[Span, BeforeValidator(_span)]
PositiveSpan = Annotated[Span, BeforeValidator(_positive_span)]


class LinkConfig(Tree):
    """One link that differs from the others; settings that are left out are as for all links."""

    between: tuple[str, str]
    """The two agents; the settings hold for both directions."""
    latency_s: Seconds | None = None
    """One-way latency in seconds."""
    bandwidth_mbit_s: Annotated[float, Field(gt=0, allow_inf_nan=True)] | None = None
    """Bandwidth of each direction in Mbit/s; inf = unlimited."""
    loss: Loss | None = None
    """Probability that a message or transfer is lost on the way."""

    @model_validator(mode="after")
    def _two(self) -> LinkConfig:
        if self.between[0] == self.between[1]:
            raise ValueError(f"a link connects two agents, not {self.between[0]!r} with itself")
        return self


class NetworkConfig(Tree):
    """The simulated network. By default everything arrives at once and nothing is lost."""

    latency_s: AnySpan = 0.0
    """One-way latency of a link in seconds; from a range it is drawn uniformly, once per link and for both
    directions."""
    bandwidth_mbit_s: PositiveSpan | None = None
    """Bandwidth of a link in Mbit/s in each direction, None = unlimited; from a range it is drawn log-uniformly, once
    per link and direction. Transfers over one link queue."""
    uplink_mbit_s: PositiveSpan | None = None
    """Total bandwidth with which one agent sends, in Mbit/s, None = unlimited; from a range it is drawn log-uniformly,
    once per agent. Transfers of one agent queue."""
    loss: Loss = 0.0
    """Probability in [0, 1) that a message or transfer is lost on the way."""
    attempts: Annotated[int, Field(ge=1)] = 3
    """Number of times a message or transfer is tried before it is given up."""
    retry_s: SomeSeconds = 1.0
    """Seconds between a loss and the next attempt."""
    links: tuple[LinkConfig, ...] = ()
    """Links that differ from the others."""

    @model_validator(mode="after")
    def _each_link_once(self) -> NetworkConfig:
        seen: dict[frozenset[str], int] = {}
        for i, link in enumerate(self.links):
            first = seen.setdefault(frozenset(link.between), i)
            if first != i:
                a, b = link.between
                raise ValueError(f"links[{i}] and links[{first}] both connect {a!r} and {b!r}; join them in one entry")
        return self


class ComputeConfig(Tree):
    """How long training and merging take on simulated computers, in virtual seconds.

    Results do not depend on the host's speed.
    """

    round_s: SomeSeconds = 1.0
    """Seconds of one round's local training at speed 1."""
    step_s: SomeSeconds | None = None
    """Seconds of one optimizer step at speed 1; if it is given, `round_s` is ignored."""
    merge_s: Seconds = 0.0
    """Seconds of one merge, the same for all agents."""
    speed: PositiveSpan = 1.0
    """Speed of an agent's training, by which its times are divided; from a range it is drawn log-uniformly, once per
    agent."""
    speeds: dict[str, Factor] = Field(default_factory=dict)
    """Speeds of single agents that differ from `speed`."""


FaultKind = Literal["crash", "join", "leave", "partition", "slow"]
Moment = Literal["train", "trained", "publish", "fetch", "adopt", "merge", "merged"]

_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "crash": (("agent",), ("at_s", "round", "on", "restart_after_s")),
    "join": (("agent", "at_s"), ()),
    "leave": (("agent", "at_s"), ()),
    "partition": (("at_s", "groups"), ("heal_after_s",)),
    "slow": (("agent", "at_s", "factor"), ()),
}
"""Kind → its required fields, its optional fields."""


class FaultConfig(Tree):
    """One fault of the simulated network, at a virtual time or at a step of an agent's round."""

    kind: FaultKind
    """"crash": the agent's process dies, its disk stays; "join": it starts only then; "leave": it goes for good;
    "partition": groups of agents cannot reach each other; "slow": it trains more slowly."""
    agent: str | None = None
    """The agent that the fault hits (all kinds but "partition")."""
    at_s: Seconds | None = None
    """Virtual time in seconds; a crash may have `round` and `on` instead."""
    round: Annotated[int, Field(ge=1)] | None = None
    """Round of the agent at which it crashes, with `on`."""
    on: Moment | None = None
    """The step of `round` before which the agent crashes: "train", "publish", "fetch" a snapshot, "adopt" a
    basis or weights, "merge", or make the checkpoint after training ("trained") or after the merge ("merged")."""
    restart_after_s: Seconds | None = None
    """Seconds after which a crashed agent is started again; None = never."""
    groups: tuple[tuple[str, ...], ...] = ()
    """Groups of a partition; agents that are not named form one more group."""
    heal_after_s: SomeSeconds | None = None
    """Seconds after which a partition ends; None = never."""
    factor: Factor | None = None
    """Factor by which training takes longer from then on than at the start of the run (kind "slow"; 1 = as at the
    start)."""

    @model_validator(mode="after")
    def _fields_of_kind(self) -> FaultConfig:
        needed, allowed = _FIELDS[self.kind]
        given = [key for key in type(self).model_fields if key != "kind" and getattr(self, key) not in (None, ())]
        for key in given:
            if key not in (*needed, *allowed):
                owners = [f'"{kind}"' for kind, (some, more) in _FIELDS.items() if key in (*some, *more)]
                raise ValueError(f'a "{self.kind}" takes no {key} (only {", ".join(owners)}); remove it')
        for key in needed:
            if key not in given:
                raise ValueError(f'a "{self.kind}" needs {key}; add it')
        if self.kind == "crash":
            on_action = "round" in given or "on" in given
            if on_action and "at_s" in given:
                raise ValueError("a crash has at_s, or round and on, not both; remove one")
            if not on_action and "at_s" not in given:
                raise ValueError('a "crash" needs at_s, or round and on; add it')
            if on_action and not ("round" in given and "on" in given):
                raise ValueError(f"round and on belong together; add {'on' if 'round' in given else 'round'}")
        return self


class RandomFaultsConfig(Tree):
    """Faults drawn from the experiment's seed, with exponential intervals and durations."""

    crashes_per_hour: Rate = 0.0
    """Mean crashes of each agent per hour of virtual time that it is up."""
    mean_down_s: SomeSeconds = 60.0
    """Mean seconds after which a crashed agent is started again."""
    partitions_per_hour: Rate = 0.0
    """Mean partitions of the whole network, into two random groups, per hour of virtual time."""
    mean_partition_s: SomeSeconds = 60.0
    """Mean seconds after which a partition ends."""
    until_s: SomeSeconds | None = None
    """No fault begins after this virtual time in seconds; required if a rate is above 0."""

    @model_validator(mode="after")
    def _bounded(self) -> RandomFaultsConfig:
        for key in ("crashes_per_hour", "partitions_per_hour"):
            if getattr(self, key) > 0 and self.until_s is None:
                raise ValueError(f"{key} needs until_s, the virtual time at which random faults end; add it")
        return self


class SimulateConfig(Tree):
    """How the simulator runs on this host, and the world that it simulates."""

    workers: Annotated[int, Field(ge=1)] | None = None
    """Number of worker processes; default: one per core. Results do not depend on it."""
    most_seeds: Annotated[int, Field(ge=1)] = 10_000
    """Largest number of seeds allowed in a comparison, so that a mistyped number is refused before it makes as many
    runs."""
    evaluate: Literal["all", "after", "none"] = "all"
    """When to compute test metrics: "all", before and after each merge; "after", only after it; "none", never. With
    several mixing steps: before the first and after the last."""
    evaluate_every: Annotated[int, Field(ge=1)] = 1
    """Compute test metrics only in every n-th round, e.g. for methods that merge after each step."""
    keep_snapshots: Annotated[int, Field(ge=1)] = SNAPSHOTS_KEPT
    """Smallest number of snapshots kept per agent; more are kept if readers may be further behind (asynchronous mode,
    one-way links, time-varying graphs). Older ones are removed as soon as nobody reads them."""
    checkpoints: Annotated[int, Field(ge=1)] = CHECKPOINTS_KEPT
    """Number of checkpoints kept per agent, if agents may crash."""
    trace: bool = False
    """Write every message to and from the agents' round machines to `trace.jsonl` in the run folder."""
    network: NetworkConfig = NetworkConfig()
    """Latency, bandwidth and loss between agents."""
    compute: ComputeConfig = ComputeConfig()
    """Virtual seconds that training and merging take."""
    faults: tuple[FaultConfig, ...] = ()
    """Scripted faults of the network."""
    random_faults: RandomFaultsConfig = RandomFaultsConfig()
    """Random faults of the network."""
