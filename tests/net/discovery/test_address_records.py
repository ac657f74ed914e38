"""Records of agents: what is sealed can be opened, and nothing else can. Reference: keys and signatures made by
`cryptography` itself, and records built by hand from the format that the module's docstring states."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dimat.errors import ConfigError, SecurityError
from dimat.net.discovery.address_records import AddressRecord, is_address, open_record, record_key, seal_record
from dimat.net.discovery.record_validator import RecordValidator
from dimat.net.limits import CLOCK_SKEW_S, MAX_RECORD_BYTES, MAX_RECORD_LIFE_S
from tests.net.authority import Authority

CA = Authority()
KEYS = CA.issue("lab-a")
NOW = 1_800_000_000.0
RECORD = AddressRecord("digits", "lab-a", ("10.0.0.1:7300",), "", 3, "ab" * 32, 7, NOW, NOW + 600)


def opened(data: bytes, **changes: Any) -> AddressRecord:
    options = {"ca": CA.pem, "run": "digits", "agent": "lab-a", "now": NOW + 1, **changes}
    return open_record(data, **options)


def by_hand(body: bytes, certificate: bytes = KEYS.certificate_der, signature: bytes | None = None) -> bytes:
    sealed = KEYS.sign(b"dimat record v1\0" + body) if signature is None else signature
    counted = [len(part).to_bytes(2, "big") + part for part in (certificate, sealed)]
    return b"dimat-record-1\n" + b"".join(counted) + body


def body_of(record: AddressRecord = RECORD, **changes: Any) -> bytes:
    fingerprint = hashlib.sha256(KEYS.certificate_der).hexdigest()
    return json.dumps({**asdict(record), "fingerprint": fingerprint, **changes}).encode()


names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,40}", fullmatch=True)
addresses = st.lists(
    st.builds("{}:{}".format, st.sampled_from(["10.1.2.3", "[::1]", "lab.example.org", "x"]), st.integers(1, 65535)),
    max_size=8,
).map(tuple)
records = st.builds(
    AddressRecord,
    run=names,
    agent=st.just("lab-a"),
    addresses=addresses,
    fingerprint=st.just(""),
    round=st.integers(0, 2**62 - 1),
    root=st.from_regex(r"[0-9a-f]{0,64}", fullmatch=True),
    seq=st.integers(0, 2**62 - 1),
    time_s=st.floats(NOW - 1000, NOW + CLOCK_SKEW_S),
    expires_s=st.floats(NOW + 2000, NOW + 50_000),
)


@given(records)
def test_what_was_sealed_is_opened(record: AddressRecord) -> None:
    data = KEYS.seal(record)
    assert len(data) <= MAX_RECORD_BYTES
    fingerprint = hashlib.sha256(KEYS.certificate_der).hexdigest()
    assert opened(data, run=record.run) == replace(record, fingerprint=fingerprint)
    assert opened(seal_record(record, None, b""), run=None, agent=None, ca=None) == record


def test_the_format_is_as_stated() -> None:
    """The magic word, certificate and signature after their lengths, and the body."""
    assert opened(by_hand(body_of())).seq == 7


@given(st.data())
def test_no_changed_byte_passes(data: st.DataObject) -> None:
    sealed = bytearray(KEYS.seal(RECORD))
    at = data.draw(st.integers(0, 10_000))  # signatures differ in length
    sealed[at % len(sealed)] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SecurityError):
        opened(bytes(sealed))


@given(st.integers(0, 10_000))
def test_no_cut_record_passes(length: int) -> None:
    sealed = KEYS.seal(RECORD)
    with pytest.raises(SecurityError):
        opened(sealed[: length % len(sealed)])


@given(st.binary(max_size=6000), st.booleans())
def test_rubbish_is_refused_in_one_way(rubbish: bytes, marked: bool) -> None:
    with pytest.raises(SecurityError):
        opened(b"dimat-record-1\n" * marked + rubbish, ca=None)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from([name for name in AddressRecord.__slots__ if name != "fingerprint"]), json_values)
def test_a_member_gains_nothing_by_odd_values(name: str, value: Any) -> None:
    """Signed by a member of the run, so that only the form can be wrong: refused, or a record of the right types."""
    try:
        record = opened(by_hand(body_of(**{name: value})), run=None, agent=None)
    except SecurityError:
        return
    assert all(type(getattr(record, key)) is type(getattr(RECORD, key)) for key in AddressRecord.__slots__)
    assert all(map(is_address, record.addresses))


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 3000,
        b'{"seq":' + b"9" * 3000 + b"}",
        b'{"a":NaN}',
        b"\xff\xfe",
        body_of(run="\ud800"),
        body_of(time_s=float("nan")),
        body_of(seq=True),
        body_of(seq=-1),
        body_of(seq=1.5),
        body_of(addresses=["10.0.0.1:7300"] * 9),
        body_of(addresses=["10.0.0.1:99999"]),
        body_of(addresses=["10.0.0.1"]),
        body_of(addresses=["a b:7"]),
        body_of(addresses="10.0.0.1:7300"),
        body_of(root="zz"),
        body_of(agent="../x"),
        body_of(expires_s=NOW + MAX_RECORD_LIFE_S + 1),
        body_of(expires_s=NOW),
        body_of(extra=1),
    ],
    ids=range(19),
)
def test_bodies_that_cannot_be(body: bytes) -> None:
    with pytest.raises(SecurityError, match="a record from the DHT was refused"):
        opened(by_hand(body), run=None, agent=None)


def test_each_forgery_is_named() -> None:
    sealed = KEYS.seal(RECORD)
    stranger = Authority("another CA").issue("lab-a")
    other = CA.issue("lab-b")
    with pytest.raises(SecurityError, match="not signed"):
        opened(seal_record(RECORD, None, b""))
    with pytest.raises(SecurityError, match="of run 'digits', not 'images'"):
        opened(sealed, run="images")
    with pytest.raises(SecurityError, match="of agent 'lab-a', not 'lab-b'"):
        opened(sealed, agent="lab-b")
    with pytest.raises(SecurityError, match="expired"):
        opened(sealed, now=NOW + 600)
    with pytest.raises(SecurityError, match="301 s in the future"):
        opened(sealed, now=NOW - 301)
    with pytest.raises(SecurityError, match="fingerprint"):
        opened(by_hand(body_of(), certificate=other.certificate_der))
    for forged in (
        stranger.seal(RECORD),  # another CA
        other.seal(RECORD),  # a member, in another's name
        by_hand(body_of(), signature=KEYS.sign(body_of())),  # signed as something else than a record
    ):
        with pytest.raises(SecurityError):
            opened(forged)
    assert opened(sealed, now=NOW - 120).seq == 7, "clocks two minutes apart"


def test_own_records_that_cannot_be_are_named_before_they_leave() -> None:
    with pytest.raises(ConfigError, match=r"this agent's record for the DHT \('lab-a'\): .*'nowhere' is not host:port"):
        KEYS.seal(replace(RECORD, addresses=("nowhere",)))
    with pytest.raises(ConfigError, match="fewer addresses"):
        seal_record(RECORD, KEYS.sign, bytes(MAX_RECORD_BYTES))


def test_addresses() -> None:
    good = ["a:1", "lab-a.example.org:7300", "127.0.0.1:65535", "[2001:db8::1]:80", "a_b.internal.:7"]
    bad = ["", ":1", "a:", "a:0", "a:65536", "a b:1", "::1:80", "a/b:1", "-a:1", "http://a:1", "a:1\n", "ä:1", "a:²"]
    assert all(map(is_address, good))
    assert not any(map(is_address, bad))


def test_the_guard_keeps_what_is_valid_under_its_key_until_its_time() -> None:
    guard = RecordValidator(CA.pem, "digits")
    key, sealed = record_key("digits", "lab-a"), KEYS.seal(RECORD)
    assert guard.admits(key, sealed, NOW + 600, NOW + 1)
    assert guard.admits(key, sealed, NOW + 600, NOW + 2), "the same record may come again"
    assert not guard.admits(record_key("digits", "lab-b"), sealed, NOW + 600, NOW + 1), "another's key"
    assert not guard.admits(key, sealed, NOW + 601, NOW + 1), "a later end than was signed"
    assert not guard.admits(key, seal_record(RECORD, None, b""), NOW + 600, NOW + 1), "unsigned"
    images = KEYS.seal(replace(RECORD, run="images"))
    assert not guard.admits(record_key("images", "lab-a"), images, NOW + 600, NOW + 1), "another run"
    assert guard.refused == 4


def test_the_guard_refuses_a_replayed_record() -> None:
    guard = RecordValidator(CA.pem, "digits")
    key = record_key("digits", "lab-a")
    newer = replace(RECORD, seq=8, time_s=NOW + 10, expires_s=NOW + 610)
    assert guard.admits(key, KEYS.seal(newer), NOW + 610, NOW + 11)
    assert not guard.admits(key, KEYS.seal(RECORD), NOW + 600, NOW + 12)


def test_a_guard_without_ca_checks_the_form_alone() -> None:
    guard = RecordValidator(None, None)
    key = record_key("digits", "lab-a")
    assert guard.admits(key, seal_record(replace(RECORD, seq=8), None, b""), NOW + 600, NOW + 1)
    assert guard.admits(key, seal_record(RECORD, None, b""), NOW + 600, NOW + 1), "a forged number keeps nobody out"
    assert not guard.admits(key, b"rubbish", NOW + 600, NOW + 1)
