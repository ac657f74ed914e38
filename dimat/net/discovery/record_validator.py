"""Decides which records a DHT node keeps: valid ones, under their own key, never older ones."""

from __future__ import annotations

from dimat.errors import SecurityError
from dimat.net.discovery.address_records import open_record, record_key
from dimat.net.discovery.map_records import MAGIC, map_key, open_map
from dimat.net.limits import DHT_SEEN


class RecordValidator:
    """Decides which values a DHT node keeps and passes on: agents' address records and an organiser's network map.

    `ca`: PEM of the CA's certificates, None to check the form only; `run`: the run whose records are accepted, None for
    all. `refused`: number of refused values.
    """

    def __init__(self, ca: bytes | None, run: str | None) -> None:
        self.refused = 0
        self._ca = ca
        self._run = run
        self._newest: dict[bytes, tuple[int, float]] = {}

    def admits(self, key: bytes, value: bytes, expires_s: float, now: float) -> bool:
        """Return whether a value may be kept under `key` until `expires_s`, which must be the time in the record."""
        try:
            place, number, lasts_s = self._read(value, now)
        except SecurityError:
            self.refused += 1
            return False
        # the DHT lets the later expiry win: were it not the signed one, an old record could be played over a new one
        if key != place or expires_s != lasts_s or number < self._newest.get(key, (0, 0.0))[0]:
            self.refused += 1
            return False
        if self._ca is not None:  # an unsigned record must not keep out the ones that come after it
            self._newest[key] = (number, lasts_s)
            if len(self._newest) > DHT_SEEN:
                self._newest = {key: seen for key, seen in self._newest.items() if seen[1] > now}
        return True

    def newest_map(self, values: list[bytes], now: float) -> bytes | None:
        """Return the valid map of the highest version (of equal versions, the one that lasts longest)."""
        best: tuple[int, float, bytes] | None = None
        for value in values:
            try:
                record = open_map(value, ca=self._ca, run=self._run, now=now)
            except SecurityError:
                continue  # an invalid value of a neighbour in the DHT does no harm
            found = (record.version, record.expires_s, value)
            best = found if best is None else max(best, found)
        return None if best is None else best[2]

    def _read(self, value: bytes, now: float) -> tuple[bytes, int, float]:
        """Return a value's key, its sequence number under that key, and its expiry."""
        if value.startswith(MAGIC):
            found = open_map(value, ca=self._ca, run=self._run, now=now)
            return map_key(found.run), found.version, found.expires_s
        record = open_record(value, ca=self._ca, run=self._run, agent=None, now=now)
        return record_key(record.run, record.agent), record.seq, record.expires_s
