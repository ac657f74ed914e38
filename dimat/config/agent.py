"""The tables of a real agent: [agent], [exchange] (how weights are sent) and [dht]."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from dimat.config.tree import Tree

CHECKPOINTS_KEPT, SNAPSHOTS_KEPT = 3, 2
"""Default numbers of checkpoints and of newest snapshots that an agent keeps, real or simulated."""

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.%\w]+\]|[^:\s/\[\]]+):[0-9]{1,5}")


def check_address(value: str) -> str:
    """Return a `host:port` unchanged; raises ValueError for anything else."""
    if not _ADDRESS.fullmatch(value) or int(value.rpartition(":")[2]) > 65535:
        raise ValueError('must be "host:port", e.g. "0.0.0.0:7300" or "[::]:7300"')
    return value


def _folder(value: str) -> str:
    if not value.strip() or any(ord(letter) < 32 or ord(letter) == 127 for letter in value):
        raise ValueError("must be a path of a folder: not empty, no control characters")
    return value


def _own_folder(value: str) -> str:
    if Path(_folder(value)).name == "..":
        raise ValueError('must not end in "..": an agent needs a folder to itself; name one in there')
    return value


class AgentConfig(Tree):
    """One real agent (`dimat agent`); the simulator does not read this table."""

    name: str | None = None
    """Its name on the network map, and in its certificate."""
    folder: Annotated[str, AfterValidator(_own_folder)] | None = None
    """Folder of its checkpoints, snapshots and logs; a path, relative to the file's folder. Default: agents/<run>/
    <name> in the folder that the command is run in."""
    listen: str | None = None
    """`host:port` to listen on. Default: the port of its first address on the map, on all interfaces."""
    keys: Annotated[str, AfterValidator(_folder)] = "keys"
    """Folder with <name>.key, <name>.crt and ca.crt (see `dimat keys`); a path, relative to the file's folder."""
    insecure: bool = False
    """Run without keys, encryption and proof of identity, for trials on one host; listens on loopback only."""
    founder: bool = False
    """Whether the agent starts the network, with round 1 at once. Otherwise an agent without a checkpoint first listens
    for a running network, for schedule.join_wait_s, and joins it."""
    go_on_alone: bool = False
    """Continue to train alone if a new network map no longer lists this agent. Otherwise it stops after
    exchange.lost_after_s, unless the map lists it again by then."""
    accept_new_data: bool = False
    """Resume from a checkpoint, with a new epoch, although the agent's training data have changed since it was saved.
    Otherwise that is an error, unless the network map or the partition has changed too."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = CHECKPOINTS_KEPT
    """Number of checkpoints to keep; an agent makes two in each round."""
    keep_snapshots: Annotated[int, Field(ge=1)] = SNAPSHOTS_KEPT
    """Number of the agent's newest snapshots that peers can fetch; it keeps more if peers may be further behind."""
    disk_quota_mb: Annotated[float, Field(gt=0)] | None = None
    """Disk space for everything that grows, in MB: five eighths for peers' snapshots, and an eighth each for the log,
    the ledger of the agent's merges and the ledger of manifests. Default: four times what one round's snapshots
    take for the snapshots; half of what they take, and at least 64 MiB, for each of the others."""
    logs_kept: Annotated[int, Field(ge=1)] = 4
    """Number of old logs to keep; a log that has grown to its share of the space is rotated."""
    evaluate: Literal["all", "after", "none"] = "after"
    """When to compute test metrics: "all", before and after each merge; "after", only after it; "none", never."""
    linger_s: Annotated[float, Field(ge=0)] = 60.0
    """After its last round, the agent serves its readers until they have all they need, at most this many seconds."""
    drain_s: Annotated[float, Field(ge=0)] = 5.0
    """When the agent is stopped, it allows at most this many seconds for running transfers, for the current training
    step, and for saving the training of the unfinished round."""
    checkpoint_every_s: Annotated[float, Field(gt=0)] | None = None
    """Save the training of an unfinished round every this many seconds. Default: only when the agent is stopped."""

    @field_validator("listen")
    @classmethod
    def _listen(cls, value: str | None) -> str | None:
        return None if value is None else check_address(value)


class ExchangeConfig(Tree):
    """How weights are sent between real agents."""

    encoding: Literal["fp32", "bf16", "fp16", "int8"] = "fp32"
    """Type that weights are cast to before they are sent: "bf16" and "fp16" halve the bytes, "int8" (a scale per block
    of 256; rounding errors are carried over to the next round) takes about a quarter. The agent's weights stay fp32."""
    moments: Literal["int8", "bf16", "fp32"] = "int8"
    """Type that optimizer moments are cast to before they are sent, if train.optimizer_state = "merged"; also in the
    simulator. With Adam, relative to a snapshot in fp32, "int8" (logarithmic, a scale per block of 256) adds half its
    size, "bf16" its whole size, "fp32" twice its size."""
    delta: bool = False
    """With "int8": send the change since the previous snapshot; peers that do not hold that one get whole weights."""
    transfers: Annotated[int, Field(ge=1)] = 4
    """Number of snapshots fetched at the same time, and of snapshots served to one peer at the same time."""
    rate_limit_mb_s: Annotated[float, Field(gt=0)] | None = None
    """Limit on the total rate of sending to all peers, in MB/s; none by default."""
    idle_s: Annotated[float, Field(gt=0)] = 15.0
    """A transfer that makes no progress for this many seconds is aborted, and resumed from the blocks already held."""
    lost_after_s: Annotated[float, Field(gt=0)] = 10.0
    """After a peer has been out of reach for this many seconds, no merge waits for it until it is heard again."""

    @model_validator(mode="after")
    def _delta_of_int8(self) -> ExchangeConfig:
        if self.delta and self.encoding != "int8":
            raise ValueError(f'delta needs encoding = "int8", not {self.encoding!r}')
        return self


class DhtConfig(Tree):
    """Finding peers whose addresses change, through a hivemind DHT beside the map."""

    bootstraps: tuple[str, ...] = ()
    """Multiaddresses of DHT nodes to connect to (`dimat dht` prints its own); without any, no DHT is used."""
    listen: str = "0.0.0.0:0"
    """`host:port` of the agent's own DHT node; port 0 takes any free port."""
    announce: tuple[str, ...] = ()
    """Addresses (`host:port`) to announce. Default: this agent's addresses on the map."""
    follow_map: bool = False
    """Adopt network maps that the organiser publishes in the DHT (`dimat keys publish-map`), signed with the CA's key,
    if their version is above that of the map file. The holder of ca.key then decides who takes part."""

    @model_validator(mode="after")
    def _follow_with_bootstraps(self) -> DhtConfig:
        if self.follow_map and not self.bootstraps:
            raise ValueError("follow_map needs bootstraps: the map comes through the DHT")
        return self

    @field_validator("listen")
    @classmethod
    def _listen(cls, value: str) -> str:
        return check_address(value)
