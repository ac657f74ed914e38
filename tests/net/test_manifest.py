"""Manifests on the wire. References: the protobuf runtime, `cryptography`'s ECDSA, `snapshot.checksum`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pytest
from blake3 import blake3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat.agent.protocol.basis import BasisId
from dimat.errors import DataError, PeerError, SecurityError
from dimat.net.manifest import DOMAIN, ManifestLimits, SignedManifest, read_signed, seal, to_bytes, unseal, write_signed
from dimat.weights.encodings import ENCODINGS
from dimat.weights.snapshot import BLOCK_BYTES, Form, Manifest, Payload, checksum
from dimat.wire.v1 import peer_pb2 as pb

KEY = ec.generate_private_key(ec.SECP256R1())
BOUND = ManifestLimits(2**27)


def sign(data: bytes) -> bytes:
    return KEY.sign(data, ec.ECDSA(hashes.SHA256()))


def check(data: bytes, signature: bytes) -> None:
    try:
        KEY.public_key().verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise SecurityError("wrong signature") from None


def believe(data: bytes, signature: bytes) -> None:
    """An insecure network's check."""


def payload(size: int = 100, block: int = BLOCK_BYTES, seed: int = 0) -> Payload:
    """A payload of any size, whose blocks nobody ever had."""
    blocks = [blake3(f"{seed}/{i}".encode()).digest() for i in range(-(-size // block))]
    root = blake3(b"".join(blocks) + size.to_bytes(8, "big")).hexdigest()
    return Payload(root, size, tuple(b.hex() for b in blocks), block)


def manifest(**changes) -> Manifest:
    basis = str(BasisId(0, "lab-a", "00f1"))
    plain = Manifest(run="r", agent="a", round=3, basis=basis, schema="5c", payload=checksum(b"weights"))
    return replace(plain, **changes)


def opened(signed: SignedManifest, **changes) -> SignedManifest:
    arguments = {"verify": check, "publisher": signed.manifest.agent, "run": signed.manifest.run, "limits": BOUND}
    return unseal(signed.data, signed.signature, **{**arguments, **changes})


numbers = st.integers(0, 2**53 - 1)
finite = st.floats(allow_nan=False, allow_infinity=False)
names = st.from_regex(r"[\wé][\w.-]{0,20}", fullmatch=True).filter(str.isprintable)
texts = st.text(max_size=60).filter(str.isprintable)
roots = st.binary(min_size=32, max_size=32).map(bytes.hex)
payloads = st.builds(payload, st.integers(1, 2**27), st.sampled_from([2**16, 2**22, 2**24]), st.integers(0, 9))
manifests = st.builds(
    Manifest,
    run=texts,
    agent=names,
    round=st.integers(1, 2**53 - 1),
    basis=st.builds(BasisId, st.integers(0, 10**9), names, st.from_regex("[0-9a-f]{1,16}", fullmatch=True)).map(str),
    schema=texts,
    payload=payloads,
    encoding=st.sampled_from(ENCODINGS),
    forms=st.lists(st.builds(Form, st.sampled_from(ENCODINGS), payloads, st.just("") | roots), max_size=4).map(tuple),
    base=texts,
    samples=numbers,
    parents=st.lists(st.tuples(names, roots, numbers, finite), max_size=5).map(tuple),
    pushed=st.dictionaries(names, finite, max_size=5),
    metrics=st.dictionaries(texts, finite, max_size=5),
)


@settings(max_examples=60)
@given(manifests)
def test_any_manifest_arrives_as_it_was_sealed(sent: Manifest) -> None:
    """Round trip; the payload's checksums pass as `snapshot.checksum` makes them; equal manifests, equal bytes."""
    signed = seal(sent, sign)
    assert signed.manifest == sent
    assert opened(signed) == signed
    assert BasisId.parse(opened(signed).manifest.basis) == BasisId.parse(sent.basis)
    turned = replace(sent, pushed=dict(reversed(sent.pushed.items())), metrics=dict(reversed(sent.metrics.items())))
    assert seal(turned, sign).data == signed.data


FULL = seal(
    manifest(
        forms=(Form("int8", checksum(b"form"), "ab" * 32),),
        parents=(("b", "cd" * 32, 2, 0.5),),
        pushed={"b": 0.25},
        metrics={"accuracy": 0.9},
    ),
    sign,
)


@given(st.data())
def test_one_changed_byte_is_a_wrong_signature(data: st.DataObject) -> None:
    """Attack: any byte of a manifest or of its signature is altered on the way; real ECDSA refuses it."""
    part = data.draw(st.sampled_from(["data", "signature"]))
    content = bytearray(getattr(FULL, part))
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SecurityError):
        opened(replace(FULL, **{part: bytes(content)}))


def test_a_signature_over_something_else_does_not_pass() -> None:
    """The key signs other records too: only a signature made for a manifest passes, and not another key's."""
    assert DOMAIN == b"dimat manifest v1\0"
    other = ec.generate_private_key(ec.SECP256R1())
    for signature in (sign(FULL.data), b"", other.sign(DOMAIN + FULL.data, ec.ECDSA(hashes.SHA256()))):
        with pytest.raises(SecurityError):
            opened(replace(FULL, signature=signature))


def changed(change: Callable[[pb.Manifest], object]) -> SignedManifest:
    """A manifest that a member signed, whatever it says."""
    message = pb.Manifest.FromString(FULL.data)
    change(message)
    data = message.SerializeToString()
    return replace(FULL, data=data, signature=sign(DOMAIN + data))


def renamed(message: pb.Manifest) -> None:
    """A payload that is what it says, but for its size."""
    message.payload.bytes += 1


LIES: list[tuple[Callable[[pb.Manifest], object], str]] = [
    (lambda m: setattr(m, "agent", "mallory"), "of agent 'mallory'"),
    (lambda m: setattr(m, "run", "another"), "of run 'another', this is 'r'"),
    (lambda m: setattr(m, "round", 0), "round 0 "),
    (lambda m: setattr(m, "round", 2**53), "round 9007199254740992 "),
    (lambda m: setattr(m, "samples", 2**63), "samples"),
    (lambda m: setattr(m, "basis", "0:a"), "basis '0:a'"),
    (lambda m: setattr(m, "basis", ""), "basis ''"),
    (lambda m: setattr(m, "basis", "-1:a:0"), "basis"),
    (lambda m: setattr(m, "basis", "1_0:a:0"), "basis"),
    (lambda m: setattr(m, "basis", "9" * 5000 + ":a:0"), "basis"),
    (lambda m: setattr(m, "basis", "0:" + "a" * 2000 + ":0"), "basis"),
    (lambda m: setattr(m, "schema", "x" * 1025), "schema"),
    (lambda m: setattr(m, "base", "\x1b[2J"), "base"),
    (lambda m: m.ClearField("payload"), "no payload"),
    (lambda m: setattr(m, "encoding", "fp8"), "encoding 'fp8' of snapshot"),
    (lambda m: setattr(m.payload, "bytes", 0), "claims 0 bytes"),
    (lambda m: setattr(m.payload, "bytes", 2**27 + 1), "claims 134,217,729 bytes"),
    (lambda m: setattr(m.payload, "bytes", 2**64 - 1), "claims 18,446,744,073,709,551,615 bytes"),
    (lambda m: setattr(m.payload, "block_bytes", 0), "blocks of 0 bytes"),
    (lambda m: setattr(m.payload, "block_bytes", 2**16 - 1), "blocks of 65,535 bytes"),
    (lambda m: setattr(m.payload, "block_bytes", 2**24 + 1), "blocks of 16,777,217 bytes"),
    (lambda m: setattr(m.payload, "bytes", BLOCK_BYTES + 1), "payload has 1 blocks, its 4,194,305 bytes take 2"),
    (lambda m: m.payload.blocks.append(bytes(32)), "payload has 2 blocks"),
    (lambda m: m.payload.ClearField("blocks"), "payload has 0 blocks"),
    (lambda m: m.payload.blocks.__setitem__(0, bytes(31)), "block of 31 bytes"),
    (lambda m: m.payload.blocks.__setitem__(0, bytes(32)), "not the hash of its blocks"),
    (lambda m: setattr(m.payload, "root", bytes(32)), "not the hash of its blocks"),
    (lambda m: setattr(m.payload, "root", b""), "not the hash of its blocks"),
    (renamed, "not the hash of its blocks"),
    (lambda m: m.forms.extend([m.forms[0]] * 4), "5 forms"),
    (lambda m: setattr(m.forms[0], "encoding", ""), "encoding '' of form 0"),
    (lambda m: setattr(m.forms[0], "after", bytes(31)), "after of form 0"),
    (lambda m: m.forms[0].ClearField("payload"), "form 0 claims 0 bytes"),
    (lambda m: setattr(m.forms[0].payload, "bytes", 2**40), "form 0 claims 1,099,511,627,776 bytes"),
    (lambda m: setattr(m.forms[0].payload, "root", bytes(32)), "form 0 has an address"),
    (lambda m: setattr(m.parents[0], "agent", "a/b"), "parents: 'a/b'"),
    (lambda m: setattr(m.parents[0], "agent", ""), "parents: ''"),
    (lambda m: setattr(m.parents[0], "root", b"short"), "parents: a hash of 5 bytes"),
    (lambda m: setattr(m.parents[0], "round", 2**60), "round of a parent"),
    (lambda m: setattr(m.parents[0], "weight", float("nan")), "parents: nan is not finite"),
    (lambda m: m.parents.extend([m.parents[0]] * 10_000), "10,001 parents"),
    (lambda m: m.pushed.update({"b": float("inf")}), "pushed: inf is not finite"),
    (lambda m: m.pushed.update({"no name": 1.0}), "pushed: 'no name'"),
    (lambda m: m.pushed.update({f"a{i}": 1.0 for i in range(10_000)}), "10,001 pushed"),
    (lambda m: m.metrics.update({"loss": float("-inf")}), "metrics: -inf is not finite"),
    (lambda m: m.metrics.update({"x" * 1025: 1.0}), "metrics"),
    (lambda m: m.metrics.update({f"m{i}": 1.0 for i in range(1000)}), "1,001 metrics"),
]


@pytest.mark.parametrize(("lie", "said"), LIES, ids=[said for _, said in LIES])
def test_what_a_member_may_not_claim_is_refused_and_named(lie: Callable[[pb.Manifest], object], said: str) -> None:
    """Attack: a neighbour with a good key signs a manifest that claims what cannot be."""
    with pytest.raises(PeerError) as refused:
        opened(changed(lie))
    assert said in str(refused.value)
    assert str(refused.value).startswith("manifest of a refused: ")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


def test_what_is_too_long_is_not_even_checked() -> None:
    """Attack: a huge manifest is refused by its length, before signature and content."""

    def unwanted(data: bytes, signature: bytes) -> None:
        raise AssertionError("looked at")

    with pytest.raises(PeerError, match="bytes long"):
        opened(replace(FULL, data=bytes(BOUND.manifest_bytes + 1)), verify=unwanted)


def test_the_largest_honest_manifest_passes() -> None:
    """The bound on a manifest's length leaves room for a payload of the bound's size in the smallest blocks, with
    four forms, and for the parents and readers of a network of 10,000."""
    large = payload(2**27, 2**16)
    parents = tuple((f"agent-{i:05d}", "ab" * 32, 3, 0.1) for i in range(10_000))
    sent = manifest(payload=large, forms=(Form("int8", large, "cd" * 32),) * 4, parents=parents)
    sent = replace(sent, pushed={name: 0.5 for name, *_ in parents})
    assert opened(seal(sent, sign)).manifest == sent


@settings(max_examples=300)
@given(st.binary(max_size=300), st.binary(max_size=80))
def test_arbitrary_bytes_are_refused(data: bytes, signature: bytes) -> None:
    """Attack: garbage, with keys and on an insecure network, raises nothing but the errors that are promised."""
    with pytest.raises(SecurityError):
        unseal(data, signature, check, publisher="a", run="r", limits=BOUND)
    with pytest.raises(PeerError):
        unseal(data, signature, believe, publisher="a", run="r", limits=BOUND)


@settings(max_examples=300)
@given(st.data())
def test_bent_manifests_are_refused_or_whole(data: st.DataObject) -> None:
    """Attack: a good manifest with bytes changed, cut out or put in. On an insecure network nobody can tell that a
    number was changed, yet what is taken is a manifest that this agent could have sealed itself."""
    bent = bytearray(FULL.data)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(bent)))
        bent[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        got = unseal(bytes(bent), b"", believe, publisher="a", run="r", limits=BOUND).manifest
    except PeerError:
        return
    assert seal(got, sign).manifest == got


def test_hostile_manifests_take_little_memory() -> None:
    """Attack: manifests of the greatest length that is read, made to grow as they are parsed (empty blocks, forms,
    parents, map entries), in a process that may take 160 MB more than it has."""
    script = """
        import resource
        from dimat.errors import PeerError
        from dimat.net.manifest import ManifestLimits, unseal
        bound = ManifestLimits(2**26)
        size = bound.manifest_bytes // 2 - 16
        nested = b"\\x22\\x00" * size
        length = bytes([len(nested) & 127 | 128, len(nested) >> 7 & 127 | 128, len(nested) >> 14 & 127 | 128,
                        len(nested) >> 21])
        head = b"\\x0a\\x01r\\x12\\x01a\\x18\\x01\\x22\\x050:a:0"
        many = [b"\\x32" + length + nested, *(bytes([tag, 0]) * size for tag in (0x32, 0x42, 0x5a, 0x62, 0x6a))]
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + 160 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for number, data in enumerate(many):
            try:
                unseal(head + data, b"", lambda data, signature: None, publisher="a", run="r", limits=bound)
            except PeerError as error:
                print(number, error)
    """
    done = subprocess.run([sys.executable, "-c", dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 6
    assert not [line for line in said if "long" in line or "protocol" in line], "it was not even parsed"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"round": 0}, "round 0 cannot be offered"),
        ({"round": -1}, "round -1 cannot be offered"),
        ({"payload": replace(checksum(b"x"), root="no hash")}, "cannot be offered"),
        ({"payload": replace(checksum(b"x"), root="ab" * 32)}, "not the hash of its blocks"),
        ({"metrics": {"loss": float("nan")}}, "metrics: nan"),
        ({"run": "a\ud800"}, "cannot be offered"),
        ({"parents": (("x" * 1000, "ab" * 32, 1, 1.0),) * 9000}, "at most"),
    ],
)
def test_what_no_reader_would_take_is_not_sealed(changes: dict, said: str) -> None:
    """Bad input: the publisher is told, not its readers."""
    with pytest.raises(DataError, match=said):
        seal(manifest(**changes), sign)


def test_signed_manifests_are_kept_over_restarts(tmp_path: Path) -> None:
    """The very bytes and signature come back; an insecure network's empty signature too."""
    file = tmp_path / "a.manifest"
    for signed in (FULL, seal(manifest(), lambda data: b"")):
        write_signed(file, signed)
        assert read_signed(file) == (signed.data, signed.signature)
    assert [path.name for path in tmp_path.iterdir()] == ["a.manifest"]


def test_damaged_files_of_manifests_are_named(tmp_path: Path) -> None:
    """Bad input: a file that is cut short anywhere, altered anywhere, missing, or empty."""
    whole = to_bytes(FULL)
    file = tmp_path / "a.manifest"
    damaged = [whole[:n] for n in range(0, len(whole), 7)]
    damaged += [whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :] for n in range(0, len(whole), 7)]
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.manifest is damaged"):
            read_signed(file)
    with pytest.raises(DataError, match="cannot read"):
        read_signed(tmp_path / "none")
