"""Lives of agents: two processes under one name are noticed, and the younger leaves.

A life is one process of an agent, from its start to its end. With each call an agent sends a signed statement of its
life: an id drawn at its start, the time of its start, and the time of the call. An agent that is called by one life,
then by another and then by the first again knows that both run, since a restart never returns to an earlier life. From
then on it refuses the younger one and sends it the older one's newest statement. The younger one leaves only if that
proves that the older one was running after the younger one's start: no member can make another agent leave with
statements of lives that have ended. All others learn of it in the replies to their calls, and pass it on.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

from dimat.errors import SecurityError
from dimat.net.limits import AGAIN_S, LIVES_KEPT, LIVING_S, MAX_LIFE_BYTES, PASSED_ON_S
from dimat.net.manifest import Sign, Verify
from dimat.wire import LIFE_HEADER, TWINS_HEADER


@dataclass(frozen=True, slots=True)
class Life:
    """One life of an agent, by its own statement: `started_s` and `said_s` in Unix time, by its own clock."""

    id: str
    started_s: float
    said_s: float
    signature: bytes = b""

    def is_older(self, other: Life) -> bool:
        """Whether it began before another one; equal times are ordered by id."""
        return (self.started_s, self.id) < (other.started_s, other.id)

    def statement(self, run: str, agent: str) -> bytes:
        """Return the bytes that are signed."""
        return json.dumps(["dimat life", run, agent, self.id, self.started_s, self.said_s]).encode()

    def text(self) -> str:
        """Return it as a header's value."""
        return json.dumps([self.id, self.started_s, self.said_s, self.signature.hex()])

    @staticmethod
    def parse(text: object) -> Life | None:
        """Parse the text that `text` returns; None for anything else."""
        if not isinstance(text, str) or len(text) > MAX_LIFE_BYTES:
            return None
        try:
            name, started_s, said_s, signature = json.loads(text)
            life = Life(str(name), float(started_s), float(said_s), bytes.fromhex(signature))
        except (ValueError, TypeError, RecursionError):
            return None
        return life if math.isfinite(life.started_s) and math.isfinite(life.said_s) else None


class OwnLife:
    """The life of `agent` in this process. `sign`, `verify`: with the agent's own key."""

    def __init__(
        self, run: str, agent: str, sign: Sign, verify: Verify, clock: Callable[[], float] = time.time
    ) -> None:
        self._run = run
        self._agent = agent
        self._sign = sign
        self._verify = verify
        self._clock = clock
        now = clock()
        self._life = Life(secrets.token_hex(8), now, now)  # an id never to come again, so from no seeded generator

    def header(self) -> tuple[str, str]:
        """Return the header that states which life this is, and that it is running now."""
        now = Life(self._life.id, self._life.started_s, self._clock())
        signature = self._sign(now.statement(self._run, self._agent))
        return LIFE_HEADER, Life(now.id, now.started_s, now.said_s, signature).text()

    def proven_older(self, text: object) -> Life | None:
        """Return the older life of the same name that a peer reports, if it is proven to have run after this one
        began."""
        life, own = Life.parse(text), self._life
        if life is None or life.id == own.id or not life.is_older(own) or life.said_s <= own.started_s:
            return None
        try:
            self._verify(life.statement(self._run, self._agent), life.signature)
        except SecurityError:
            return None
        return life


@dataclass(slots=True)
class _Heard:
    """The lives of one caller, the one heard last at the end; `twins`: ids of two that both run."""

    lives: dict[str, tuple[Life, float]] = field(default_factory=dict[str, tuple[Life, float]])
    twins: tuple[str, ...] = ()


class Lives:
    """The lives of all callers of one agent, and the names reported to have two.

    `told(message)` is called once for each name that has two lives, heard here or told by another member.
    """

    def __init__(self, told: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._told = told
        self._clock = clock
        self._heard: dict[str, _Heard] = {}
        self._names: dict[str, float] = {}  # names with two lives: when that was said first

    def heard(self, caller: str, life: Life) -> Life | None:
        """Record a call of one life; return the older one that runs at the same time, if there is one."""
        now, known = self._clock(), self._heard.setdefault(caller, _Heard())
        last = next(reversed(known.lives), life.id)
        if life.id in known.lives and last != life.id:
            known.twins = (life.id, last)
        known.lives.pop(life.id, None)
        known.lives[life.id] = (life, now)
        for gone in list(known.lives)[:-LIVES_KEPT]:
            del known.lives[gone]
        if life.id not in known.twins:
            return None
        other = next((each for each in known.twins if each != life.id), "")
        other_life, at = known.lives.get(other, (life, -math.inf))
        if now - at > LIVING_S:
            known.twins = ()
            return None
        older, younger = sorted((life, other_life), key=lambda each: (each.started_s, each.id))
        begun = (time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(each.started_s)) for each in (older, younger))
        self._say(
            caller,
            f"two processes run as {caller} at once, begun at {' and '.join(begun)} UTC by their clocks; the younger "
            "one is refused, and told to leave",
        )
        return other_life if other_life.is_older(life) else None

    def take_word(self, peer: str, value: object, members: Collection[str]) -> None:
        """Read a peer's report of names with two lives."""
        try:
            names: Any = json.loads(value) if isinstance(value, bytes) and len(value) <= MAX_LIFE_BYTES else ()
        except ValueError:
            return
        for name in cast("Iterable[object]", names) if isinstance(names, list | tuple) else ():
            if isinstance(name, str) and name in members:
                self._say(name, f"{peer} says that two processes run as {name} at once; the younger one is to leave")

    @property
    def trailer(self) -> tuple[tuple[str, bytes], ...]:
        """Metadata of a reply that passes on the names with two lives."""
        now = self._clock()
        names = [name for name, since in self._names.items() if now - since < PASSED_ON_S]
        return ((TWINS_HEADER, json.dumps(names)[:MAX_LIFE_BYTES].encode()),) if names else ()

    def _say(self, name: str, message: str) -> None:
        now = self._clock()
        if now - self._names.get(name, -math.inf) >= AGAIN_S:
            self._names[name] = now
            self._told(message)


def header_of(metadata: Iterable[tuple[str, object]] | None, name: str) -> object:
    """Return the value of a header, None if it is not there."""
    return next((value for key, value in metadata or () if key == name), None)
