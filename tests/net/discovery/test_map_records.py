"""Network maps as records of the DHT. References: the CA's signature, and bytes made by hand that break each rule."""

from __future__ import annotations

import json
import zlib
from typing import Any

import pytest
from blake3 import blake3
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat.errors import ConfigError, SecurityError
from dimat.net.discovery.map_records import MAGIC, MapRecord, map_key, open_map, seal_map
from dimat.net.discovery.record_validator import RecordValidator
from dimat.net.limits import MAX_MAP_BYTES, MAX_MAP_LIFE_S, MAX_MAP_TEXT_BYTES
from tests.net.keys import Authority

CA, OTHER = Authority(), Authority("another")
NOW = CA.certificate.not_valid_before_utc.timestamp() + 7200
DAY = 86_400.0
TEXT = 'version = 3\ngraph = "ring"\nagents = ["lab-a", "lab-b"]\n'


def sealed(
    version: int = 3, text: str = TEXT, run: str = "digits", key: Any = CA.key, time_s: float = NOW, days: float = 1
) -> bytes:
    return seal_map(run, version, text, time_s, time_s + days * DAY, key)


def opened(data: bytes, ca: bytes | None = CA.pem, run: str | None = "digits", now: float = NOW) -> MapRecord:
    return open_map(data, ca=ca, run=run, now=now)


def by_hand(packed: bytes | None = None, domain: bytes = b"dimat map v1\0", **fields: Any) -> bytes:
    """Return a record that the CA has signed, whatever is in it."""
    head = {"run": "digits", "version": 3, "time_s": NOW, "expires_s": NOW + DAY}
    head |= {"digest": blake3(TEXT.encode()).hexdigest()} | fields
    body = json.dumps(head).encode() + b"\n" + (zlib.compress(TEXT.encode()) if packed is None else packed)
    signature = CA.key.sign(domain + body, ec.ECDSA(hashes.SHA256()))
    return MAGIC + len(signature).to_bytes(2, "big") + signature + body


def test_what_the_ca_signed_comes_out() -> None:
    record = opened(sealed())
    assert (record.run, record.version, record.text) == ("digits", 3, TEXT)
    assert record.digest == blake3(TEXT.encode()).hexdigest()
    assert opened(by_hand()) == record
    both = OTHER.pem + CA.pem  # while a CA is being replaced
    assert opened(sealed(), ca=both) == record
    assert opened(sealed(key=OTHER.key), ca=both).version == 3


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (sealed(key=CA.issue("lab-a").key), "the CA has not signed it"),
        (sealed(key=OTHER.key), "the CA has not signed it"),
        (sealed(run="images"), "of run 'images'"),
        (sealed(time_s=NOW - 2 * DAY), "expired"),
        (sealed(time_s=NOW + 400), "in the future"),
        (by_hand(domain=b"dimat record v1\0"), "the CA has not signed it"),
        (by_hand(zlib.compress(b"graph = 'star'")), "digest"),
        (by_hand(zlib.compress(bytes(MAX_MAP_TEXT_BYTES + 1))), "too long"),
        (by_hand(zlib.compress(TEXT.encode()) + b"more"), "followed by"),
        (by_hand(zlib.compress(TEXT.encode())[:-5]), "cut off"),
        (by_hand(b"no such thing"), "cannot be read"),
        (by_hand(version=True), "not a whole number"),
        (by_hand(version=0), "not a whole number"),
        (by_hand(version=2**60), "not a whole number"),
        (by_hand(expires_s=NOW + 2 * MAX_MAP_LIFE_S), "at most 366 days"),
        (by_hand(expires_s="soon"), "not a time"),
        (by_hand(more=1), "the fields"),
        (b"rubbish", "not a map's record"),
        (bytes(MAX_MAP_BYTES + 1), "bytes are more"),
    ],
)
def test_what_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(SecurityError, match=why):
        opened(data)


def test_a_ca_that_is_out_of_date_signs_nothing() -> None:
    late = CA.certificate.not_valid_after_utc.timestamp() + 3600
    with pytest.raises(SecurityError, match="the CA has not signed it"):
        opened(sealed(time_s=late), now=late)


@settings(max_examples=300)
@given(st.binary(min_size=1, max_size=3), st.integers(0, 10_000))
def test_no_changed_byte_passes(put: bytes, at: int) -> None:
    data = bytearray(sealed())
    start = len(MAGIC) + at % (len(data) - len(MAGIC))
    changed = bytes(data[:start] + put + data[start + len(put) :])
    if changed != data:
        with pytest.raises(SecurityError):
            opened(changed)


def test_maps_that_cannot_be_published_are_named() -> None:
    with pytest.raises(ConfigError, match="the DHT carries 32,768"):
        sealed(text="".join(f"{blake3(bytes([n % 256, n // 256])).hexdigest()}\n" for n in range(2000)))
    with pytest.raises(ConfigError, match="version 0"):
        sealed(version=0)
    with pytest.raises(ConfigError, match="at most 366 days"):
        sealed(days=500)


def test_the_guard_keeps_maps_apart_from_records_and_takes_no_older_one() -> None:
    guard = RecordValidator(CA.pem, "digits")
    key, until = map_key("digits"), NOW + DAY
    assert guard.admits(key, sealed(3), until, NOW)
    assert not guard.admits(key, sealed(2), until, NOW), "an older version"
    assert not guard.admits(key, sealed(4), until + 1, NOW), "a later end than was signed"
    assert not guard.admits(map_key("images"), sealed(4), until, NOW), "under another key"
    assert not guard.admits(key, sealed(9, key=CA.issue("lab-a").key), until, NOW), "a member's"
    assert guard.admits(key, sealed(4), until, NOW)
    assert guard.refused == 4
    values = [sealed(3), sealed(5), sealed(9, key=OTHER.key), b"rubbish", sealed(8, run="images")]
    newest = guard.newest_map(values, NOW)
    assert newest is not None
    assert opened(newest).version == 5
    assert guard.newest_map(values[2:], NOW) is None
