"""The tables of a real agent: [agent], [exchange] (how weights travel) and [dht]."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from dimat.config.tree import Tree

CHECKPOINTS_KEPT, SNAPSHOTS_KEPT = 3, 2
"""How many of its checkpoints and of its newest snapshots an agent keeps, real or simulated, unless it is told."""

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.%\w]+\]|[^:\s\[\]]+):\d{1,5}")


def check_address(value: str) -> str:
    """Return a `host:port` as it is; ValueError where it is none."""
    if not _ADDRESS.fullmatch(value) or int(value.rpartition(":")[2]) > 65535:
        raise ValueError('must be "host:port", e.g. "0.0.0.0:7300" or "[::]:7300"')
    return value


class AgentConfig(Tree):
    """One real agent (`dimat agent`); the simulator does not read this table."""

    name: str | None = None
    """Its name on the network map, and in its certificate."""
    folder: Annotated[str, Field(min_length=1)] | None = None
    """Folder of its checkpoints, snapshots and logs; a path, relative to the file's folder. Default: agents/<run>/
    <name> in the folder that the command is run in."""
    listen: str | None = None
    """`host:port` to listen on. Default: the port of its first address on the map, on all interfaces."""
    keys: str = "keys"
    """Folder with <name>.key, <name>.crt and ca.crt (see `dimat keys`); a path, relative to the file's folder."""
    insecure: bool = False
    """Without keys, encryption and proof of identity: for trials on one host; listens on loopback only."""
    founder: bool = False
    """Whether it is there when the network begins: it starts with round 1 at once. Otherwise an agent without a
    checkpoint first listens for a network that lives, for schedule.join_wait_s, and joins it."""
    go_on_alone: bool = False
    """Train on by itself where a new network map does not have this agent any more. Otherwise it stops after
    exchange.lost_after_s, unless the map has it again by then."""
    accept_new_data: bool = False
    """Go on from a checkpoint although the agent's training data have changed since, with a new epoch; else that is an
    error, unless the network map or the partition has changed too."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = CHECKPOINTS_KEPT
    """Checkpoints kept, of two a round."""
    keep_snapshots: Annotated[int, Field(ge=1)] = SNAPSHOTS_KEPT
    """How many of its newest snapshots peers can fetch; more where peers may be further behind."""
    disk_quota_mb: Annotated[float, Field(gt=0)] | None = None
    """Space on disk for all that grows, in MB: five eighths for peers' snapshots, an eighth each for the log, the
    ledger of own merges and that of manifests. Default: for snapshots four times the need of a round, for each of the
    others half of that need, and at least 64 MiB."""
    logs_kept: Annotated[int, Field(ge=1)] = 4
    """A log that has grown to its share of the space is put aside; so many that were put aside are kept."""
    evaluate: Literal["all", "after", "none"] = "after"
    """Test metrics before and after each merge, after it, or never."""
    linger_s: Annotated[float, Field(ge=0)] = 60.0
    """After its last round an agent serves its readers for at most this many seconds, until they have all they need."""
    drain_s: Annotated[float, Field(ge=0)] = 5.0
    """When the agent is stopped, running transfers may go on for at most this many seconds, and so may the step of
    training that is under way and the saving of what the round has trained so far."""
    checkpoint_every_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds of training after which what a round has trained so far is saved. Default: only when it is stopped."""

    @field_validator("listen")
    @classmethod
    def _listen(cls, value: str | None) -> str | None:
        return None if value is None else check_address(value)


class ExchangeConfig(Tree):
    """How weights travel between real agents."""

    encoding: Literal["fp32", "bf16", "fp16", "int8"] = "fp32"
    """Type that weights are cast to before they are sent: "bf16" and "fp16" halve the bytes, "int8" (a scale per block
    of 256; rounding errors are carried over to the next round) takes about a quarter. The agent's weights stay fp32."""
    moments: Literal["int8", "bf16", "fp32"] = "int8"
    """Type that optimizer moments are cast to before they are sent, where train.optimizer_state = "merged"; in the
    simulator too. With Adam "int8" (logarithmic, a scale per block of 256) sends half a snapshot in fp32 more, "bf16"
    as much again, "fp32" twice as much again."""
    delta: bool = False
    """With "int8": send the change since the snapshot before; peers that do not hold that one get whole weights."""
    transfers: Annotated[int, Field(ge=1)] = 4
    """Snapshots that are fetched at a time, and that are served to one peer at a time."""
    rate_limit_mb_s: Annotated[float, Field(gt=0)] | None = None
    """Limit of all that is sent to peers together, in MB/s; none by default."""
    idle_s: Annotated[float, Field(gt=0)] = 15.0
    """A transfer in which nothing moves for this many seconds is broken off, and resumed from the blocks held."""
    lost_after_s: Annotated[float, Field(gt=0)] = 10.0
    """A peer may be out of reach for this many seconds; then no merge waits for it until it is heard again."""

    @model_validator(mode="after")
    def _delta_of_int8(self) -> ExchangeConfig:
        if self.delta and self.encoding != "int8":
            raise ValueError(f'delta goes with encoding "int8", not with {self.encoding!r}')
        return self


class DhtConfig(Tree):
    """Finding peers whose addresses change, through a hivemind DHT beside the map."""

    bootstraps: tuple[str, ...] = ()
    """Multiaddresses of DHT nodes (`dimat dht` prints its own); without any there is no DHT."""
    listen: str = "0.0.0.0:0"
    """`host:port` of the agent's own DHT node; port 0: any free one."""
    announce: tuple[str, ...] = ()
    """`host:port`s to announce. Default: this agent's on the map."""
    follow_map: bool = False
    """Take over network maps that the organiser publishes in the DHT (`dimat keys publish-map`), signed with the CA's
    key, where their version is above that of the map file. The holder of ca.key then decides who takes part."""

    @model_validator(mode="after")
    def _follow_with_bootstraps(self) -> DhtConfig:
        if self.follow_map and not self.bootstraps:
            raise ValueError("follow_map needs bootstraps: the map comes through the DHT")
        return self

    @field_validator("listen")
    @classmethod
    def _listen(cls, value: str) -> str:
        return check_address(value)
