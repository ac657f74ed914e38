"""Watches a running agent's keys: reads them again on request, warns before they expire."""

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
    """Watches one agent's identity, whose files are in `folder`.

    `renewed(key, ca)` is called after the identity was read again, and says whether key and CA certificates have
    changed; `notice` receives messages for a person; `clock` gives aware times.
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
        """Warn once a day if the certificate expires soon."""
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
        """Use the keys that are in the files now; open connections stay. Unusable keys are reported, and the current
        ones stay in use."""
        identity = self._identity
        try:
            fresh = await asyncio.to_thread(load_identity, self._folder, identity.name)
        except DimatError as error:
            self._notice(f"the new keys are not used: {error}; the current ones stay in use")
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
    """Return the facts on an agent's keys for its status: `dimat doctor` compares them with the files."""
    return {
        "fingerprint": identity.fingerprint,
        "ca": blake3(identity.ca).hexdigest(),
        "until": identity.until.timestamp(),
    }
