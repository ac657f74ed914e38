"""Looks after a running agent's keys: reads them anew, and warns before they end."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from blake3 import blake3

from dimat.errors import DimatError
from dimat.net.pki.identity import Identity, load_identity
from dimat.net.pki.key_info import SOON

LOOK_S = 3600.0
"""Seconds between two looks at the clock."""
AGAIN = timedelta(days=1)
"""Between two warnings of one certificate; each restart warns too."""


class KeyWatch:
    """Watches over one agent's identity, whose files lie in `folder`.

    `renewed(key, ca)` is called once it was read anew, with whether key and CA certificates are others; `notice`
    receives messages for a person; `clock`: aware.
    """

    def __init__(
        self,
        identity: Identity,
        folder: Path,
        renewed: Callable[[bool, bool], Awaitable[None]],
        notice: Callable[[str], None],
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._identity = identity
        self._folder = folder
        self._renewed = renewed
        self._notice = notice
        self._clock = clock
        self._warned: datetime | None = None

    async def go_on(self) -> None:
        """Warn until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        """Warn where the certificate ends soon, once a day."""
        now, until = self._clock(), self._identity.until
        left = until - now
        if left >= SOON or (self._warned is not None and now - self._warned < AGAIN):
            return
        self._warned = now
        name = self._identity.name
        when = f"ends in {left.days} days, at" if left > timedelta(0) else "has ended at"
        self._notice(
            f"the certificate of {name}, or its CA's, {when} {until:%Y-%m-%d %H:%M} UTC, and no new connection is made "
            f"then; renew it (dimat keys issue {name} --renew, or request and sign), then: kill -HUP {os.getpid()}"
        )

    async def read_anew(self) -> None:
        """Take over what is in the files now; connections that are there go on. What cannot be used is told, and the
        keys from before stand."""
        identity = self._identity
        try:
            fresh = await asyncio.to_thread(load_identity, self._folder, identity.name)
        except DimatError as error:
            self._notice(f"the keys are not taken over: {error}; the ones before stand")
            return
        if fresh == replace(identity, key=fresh.key):
            return
        new_key = fresh.key.public_key() != identity.key.public_key()
        new_ca = fresh.ca != identity.ca
        identity.take_over(fresh)
        self._warned = None
        await self._renewed(new_key, new_ca)
        self.look()


def certificate_facts(identity: Identity) -> dict[str, object]:
    """Return what a status says of an agent's keys: by it `dimat doctor` sees whether a process goes by its files."""
    return {
        "fingerprint": identity.fingerprint,
        "ca": blake3(identity.ca).hexdigest(),
        "until": identity.until.timestamp(),
    }
