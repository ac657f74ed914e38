"""Certificates: names, checks and requests.

References: openssl and the X.509 verifier of `cryptography`, which share no code with these checks; certificates built
wrong on purpose; and hypothesis for whatever else there may be.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store
from hypothesis import example, given
from hypothesis import strategies as st

from dimat.errors import ConfigError, SecurityError
from dimat.net.pki.authority import (
    host_of,
    hosts_of,
    make_authority,
    make_certificate,
    make_key,
    make_request,
    read_request,
)
from dimat.net.pki.certificates import CLOCK_SKEW, SUFFIX, check_certificate, check_name, check_signature, tls_name
from dimat.net.pki.identity import agent_of
from tests.net.keys import DER, PEM, Authority

NAMES = st.from_regex(r"\A\w[\w.-]{0,20}\Z")
CLOSE = st.text(alphabet="aAbß._-x0n", min_size=1, max_size=70).filter(lambda name: name[0] not in ".-")
AUTHORITY = Authority()
NOW = datetime.now(UTC)
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


@given(NAMES | CLOSE, NAMES | CLOSE)
@example("lab-a", "LAB-A")
@example("a", "a.")
@example("a.hash", "a")
@example("a" * 63, "a" * 64)
@example("xn--bcher-kva", "bücher")
@example("lab-a.agent.dimat.internal", "lab-a")
@example(tls_name("A").removesuffix(SUFFIX), "A")
@example(tls_name("A").split(".")[0], "A")
@example("K", "\N{KELVIN SIGN}")
def test_no_two_agents_share_a_dns_name(one: str, other: str) -> None:
    """Valid by RFC 1123, lower-case (TLS ignores case), and different for different agents."""
    found = [tls_name(one), tls_name(other)]
    for name in found:
        assert name.endswith(SUFFIX)
        assert len(name) <= 253
        assert all(LABEL.fullmatch(label) for label in name.split("."))
    assert (one == other) == (found[0] == found[1])


def test_plain_names_stay_readable() -> None:
    assert tls_name("lab-a") == "lab-a.agent.dimat.internal"
    for name in ("Lab_A", "xn--bcher-kva"):  # labels with -- in third place are kept for encodings
        assert re.fullmatch(r"[a-z2-7]{52}\.hash\.agent\.dimat\.internal", tls_name(name))


@pytest.mark.parametrize("name", ["lab-a", "Läb_A.2", "実験室", "a" * 64])
def test_a_certificate_is_valid_for_everybody(tmp_path: Path, name: str) -> None:
    """For openssl with all its rules, as server and as client, and for the verifier of `cryptography`."""
    identity = AUTHORITY.issue(name, hosts=["lab-a.example.org", "10.0.0.1", "::1"])
    (tmp_path / "agent.crt").write_bytes(identity.certificate)
    (tmp_path / "ca.crt").write_bytes(AUTHORITY.pem)
    if shutil.which("openssl") is not None:
        for purpose in ("sslserver", "sslclient"):
            command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", "ca.crt", "agent.crt"]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
            assert done.returncode == 0, done.stderr
    certificate = x509.load_pem_x509_certificate(identity.certificate)
    for subject in (
        x509.DNSName(tls_name(name)),
        x509.DNSName("lab-a.example.org"),
        x509.IPAddress(ip_address("10.0.0.1")),
        x509.IPAddress(ip_address("::1")),
    ):
        verifier = PolicyBuilder().store(Store([AUTHORITY.certificate])).build_server_verifier(subject)
        assert verifier.verify(certificate, []) == [certificate, AUTHORITY.certificate]
    key = check_certificate(identity.certificate_der, AUTHORITY.pem, name)
    assert key == identity.key.public_key()


def test_signatures() -> None:
    identity = AUTHORITY.issue("lab-a")
    key = check_certificate(identity.certificate_der, AUTHORITY.pem, "lab-a")
    signature = identity.sign(b"data")
    check_signature(key, b"data", signature)
    changed = bytes([*signature[:-1], signature[-1] ^ 1])
    for data, wrong in (
        (b"date", signature),
        (b"data", changed),
        (b"data", b""),
        (b"data", b"\x30\x00"),
        (b"", b"x" * 99),
    ):
        with pytest.raises(SecurityError, match="signature is wrong"):
            check_signature(key, data, wrong)
    with pytest.raises(SecurityError, match="signature is wrong"):
        check_signature(make_key().public_key(), b"data", signature)


def test_the_clock_may_be_off_by_five_minutes() -> None:
    identity = AUTHORITY.issue("lab-a")
    made = x509.load_pem_x509_certificate(identity.certificate)
    der, ca = identity.certificate_der, AUTHORITY.pem
    first, last = made.not_valid_before_utc, made.not_valid_after_utc
    assert timedelta(minutes=5) == CLOCK_SKEW
    second = timedelta(seconds=1)
    for now in (first - CLOCK_SKEW, first, last, last + CLOCK_SKEW):
        check_certificate(der, ca, "lab-a", now)
    with pytest.raises(SecurityError, match="valid only from"):
        check_certificate(der, ca, "lab-a", first - CLOCK_SKEW - second)
    with pytest.raises(SecurityError, match="expired at"):
        check_certificate(der, ca, "lab-a", last + CLOCK_SKEW + second)


def test_a_certificate_ends_with_its_ca() -> None:
    """One that is asked for longer is cut off, a CA that is over issues nothing, and what it issued is over too."""
    short = Authority(days=5)
    made = x509.load_pem_x509_certificate(short.issue("lab-a", days=100).certificate)
    assert made.not_valid_after_utc == short.certificate.not_valid_after_utc
    over = Authority(days=-0.02)
    with pytest.raises(SecurityError, match="CA's certificate expired"):
        over.issue("lab-a")
    key = make_key()
    later = build(over, key.public_key())
    with pytest.raises(SecurityError, match="CA certificate that issued the certificate of 'lab-a' expired"):
        check_certificate(later, over.pem, "lab-a")


def build(
    authority: Authority,
    key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
    *,
    names: Sequence[str] = ("lab-a",),
    dns: Sequence[str] = (tls_name("lab-a"),),
    ca: bool | None = False,
    usage: str | None = "digital_signature",
    uses: Sequence[x509.ObjectIdentifier] = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH),
    more: x509.ExtensionType | None = None,
    signer: ec.EllipticCurvePrivateKey | None = None,
) -> bytes:
    """Build a certificate by hand: with all as given it is in order, and each argument spoils one thing."""
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names]
    builder = x509.CertificateBuilder().subject_name(x509.Name(attributes)).issuer_name(authority.certificate.subject)
    builder = builder.public_key(key).serial_number(7)
    builder = builder.not_valid_before(NOW - timedelta(hours=1)).not_valid_after(NOW + timedelta(days=1))
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca, 0 if ca else None), critical=True)
    if usage is not None:
        names_of_usage = (
            "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign "
            "crl_sign encipher_only decipher_only"
        )
        flags = {name: name in usage.split() for name in names_of_usage.split()}
        builder = builder.add_extension(x509.KeyUsage(**flags), critical=True)
    if uses:
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    if dns:
        alternatives = x509.SubjectAlternativeName([x509.DNSName(name) for name in dns])
        builder = builder.add_extension(alternatives, critical=False)
    if more is not None:
        builder = builder.add_extension(more, critical=True)
    return builder.sign(signer or authority.key, hashes.SHA256()).public_bytes(DER)


def _p256() -> ec.EllipticCurvePublicKey:
    return make_key().public_key()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: build(AUTHORITY, _p256(), names=["lab-b"], dns=[tls_name("lab-b")]), "another agent: 'lab-b'"),
        (lambda: build(AUTHORITY, _p256(), names=["Lab-A"], dns=[tls_name("Lab-A")]), "another agent: 'Lab-A'"),
        (lambda: build(AUTHORITY, _p256(), dns=[tls_name("lab-b")]), "names no agent"),
        (lambda: build(AUTHORITY, _p256(), dns=[tls_name("lab-a"), tls_name("lab-b")]), "names no agent, or two"),
        (lambda: build(AUTHORITY, _p256(), dns=[tls_name("lab-a"), f"*{SUFFIX}"]), "names no agent, or two"),
        (lambda: build(AUTHORITY, _p256(), dns=["lab-a.example.org"]), "names no agent"),
        (lambda: build(AUTHORITY, _p256(), dns=[]), "names no agent"),
        (lambda: build(AUTHORITY, _p256(), names=[]), "names no agent"),
        (lambda: build(AUTHORITY, _p256(), names=["lab-a", "lab-b"]), "names no agent"),
        (lambda: build(AUTHORITY, _p256(), signer=make_key()), "not issued by this collaboration's CA"),
        (lambda: build(Authority(), _p256()), "not issued by this collaboration's CA"),
        (lambda: build(AUTHORITY, _p256(), ca=True), "that of a CA"),
        (lambda: build(AUTHORITY, _p256(), ca=None), "that of a CA"),
        (lambda: build(AUTHORITY, _p256(), usage="digital_signature key_cert_sign"), "that of a CA"),
        (lambda: build(AUTHORITY, _p256(), usage="key_agreement"), "not made for an agent's use"),
        (lambda: build(AUTHORITY, _p256(), uses=[ExtendedKeyUsageOID.SERVER_AUTH]), "not made for an agent's use"),
        (lambda: build(AUTHORITY, _p256(), uses=[ExtendedKeyUsageOID.CLIENT_AUTH]), "not made for an agent's use"),
        (lambda: build(AUTHORITY, _p256(), uses=[]), "not made for an agent's use"),
        (lambda: build(AUTHORITY, _p256(), more=x509.InhibitAnyPolicy(1)), "a condition that dimat does not know"),
        (lambda: build(AUTHORITY, ec.generate_private_key(ec.SECP384R1()).public_key()), "not P-256"),
        (lambda: build(AUTHORITY, rsa.generate_private_key(65537, 2048).public_key()), "not P-256"),
        (lambda: AUTHORITY.certificate.public_bytes(DER), "names no agent"),
        (lambda: AUTHORITY.pem, "cannot be read"),
        (lambda: b"", "cannot be read"),
        (lambda: bytes(16 * 2**10 + 1), "too many"),
    ],
)
def test_what_is_no_agents_certificate(make: Callable[[], bytes], says: str) -> None:
    """Each is spoilt in one way; built the same way without the spoiling it passes."""
    check_certificate(build(AUTHORITY, _p256()), AUTHORITY.pem, "lab-a")
    with pytest.raises(SecurityError, match=says) as caught:
        check_certificate(make(), AUTHORITY.pem, "lab-a")
    assert "\n" not in str(caught.value)


def test_a_ca_with_the_names_of_an_agent_is_none() -> None:
    """As gRPC would hand it over; the same without being a CA is the agent."""
    for ca, agent in ((False, "lab-a"), (True, None), (None, None)):
        der = build(AUTHORITY, _p256(), ca=ca)
        pem = x509.load_der_x509_certificate(der).public_bytes(PEM)
        assert agent_of({"x509_pem_cert": [pem]}) == agent


GOOD = AUTHORITY.issue("lab-a").certificate_der


@pytest.mark.filterwarnings("ignore:Parsed a serial number")  # the parser's own remark on what is refused then
@given(st.integers(0, len(GOOD) * 8 - 1))
def test_a_certificate_with_one_bit_changed_is_refused(bit: int) -> None:
    data = bytearray(GOOD)
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SecurityError):
        check_certificate(bytes(data), AUTHORITY.pem, "lab-a")


def test_unused_bits_of_a_signature_are_looked_at() -> None:
    """Where a signature ends in a zero bit, the parser takes it for unused as well, if the byte before says so."""
    der = next(d for d in (AUTHORITY.issue("lab-a").certificate_der for _ in range(200)) if d[-1] % 2 == 0)
    place = len(der) - len(x509.load_der_x509_certificate(der).signature) - 1
    assert der[place] == 0
    changed = der[:place] + b"\1" + der[place + 1 :]
    x509.load_der_x509_certificate(changed).verify_directly_issued_by(AUTHORITY.certificate)
    with pytest.raises(SecurityError, match="cannot be read"):
        check_certificate(changed, AUTHORITY.pem, "lab-a")


@given(st.binary(max_size=300) | st.integers(0, len(GOOD) - 1).map(lambda end: GOOD[:end]))
def test_garbage_is_no_certificate(data: bytes) -> None:
    with pytest.raises(SecurityError):
        check_certificate(data, AUTHORITY.pem, "lab-a")
    with pytest.raises(SecurityError):
        read_request(data)


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("lab-a.example.org:7300", "lab-a.example.org"),
        ("Lab-A.Example.ORG", "lab-a.example.org"),
        (" lab_a:7300 ", "lab_a"),
        ("10.0.0.1:7300", "10.0.0.1"),
        ("10.0.0.1", "10.0.0.1"),
        ("[2001:DB8::1]:7300", "2001:db8::1"),
        ("[::1]", "::1"),
        ("::1", "::1"),
    ],
)
def test_hosts_of_addresses(address: str, host: str) -> None:
    assert host_of(address) == host
    assert hosts_of([address, address, "x:1"]) == (host, "x")


@pytest.mark.parametrize(
    "address",
    [
        *("", ":7300", "a b:1", "lab-a:", "lab-a:0", "lab-a:65536", "lab-a:x", "lab-a:7300:1", "http://lab-a", "-a:1"),
        *("*.example.org:1", "*", "münchen.example.org:1", "a..b:1", "lab-a.:1", "[::1", "[lab-a]:1", "[::1]7300"),
        *("lab-b.agent.dimat.internal:7300", "LAB-B.Agent.Dimat.Internal", "agent.dimat.internal", "a" * 64 + ":1"),
        *("*.agent.dimat.internal", "x.lab-b.agent.dimat.internal", "lab-b.agent.dimat.internal.", "lab-a:\u0661"),
    ],
)
def test_what_is_no_host(address: str) -> None:
    """Above all no name by which another agent is checked, in any spelling."""
    with pytest.raises(ConfigError, match="address"):
        host_of(address)


@given(st.text(max_size=40) | st.text(alphabet="agentdimtrl.-:[]1*", max_size=40))
@example("lab-b" + SUFFIX)
def test_no_address_gives_the_name_of_an_agent(address: str) -> None:
    """Whatever is written as an address: refused, or a host that no agent is checked by."""
    try:
        host = host_of(address)
    except ConfigError:
        return
    assert not f".{host.lower().rstrip('.')}".endswith(SUFFIX)
    assert "*" not in host


def test_too_many_addresses() -> None:
    with pytest.raises(ConfigError, match="33 addresses are too many"):
        hosts_of([f"host-{k}:1" for k in range(33)])


def test_names_that_fit_a_certificate() -> None:
    for name in ("a", "a" * 64, "é" * 32, "lab-a.key", "_"):
        check_name(name)
    for name in ("", "a" * 65, "é" * 33, "-a", ".", "a/b", "a b", "ca", "Ca", "a\n"):
        with pytest.raises(ConfigError, match="agent name"):
            check_name(name)


def ask(
    *extensions: x509.ExtensionType,
    name: str = "lab-a",
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None,
) -> bytes:
    """Build a request by hand."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(key or make_key(), hashes.SHA256()).public_bytes(PEM)


def names(*values: str | x509.GeneralName) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.DNSName(v) if isinstance(v, str) else v for v in values])


def test_only_name_addresses_and_key_are_taken_from_a_request() -> None:
    """A request that asks to be a CA, for other uses, and for names of other kinds gets an agent's certificate."""
    key = make_key()
    other = x509.UniformResourceIdentifier("spiffe://lab-b"), x509.RFC822Name("root@lab-b")
    asked = read_request(
        ask(
            names(tls_name("lab-a"), "Lab-A.example.org", x509.IPAddress(ip_address("10.0.0.1")), *other),
            x509.BasicConstraints(ca=True, path_length=None),
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]),
            x509.SubjectKeyIdentifier(b"lab-b"),
            key=key,
        )
    )
    assert (asked.name, asked.hosts, asked.public_key) == ("lab-a", ("lab-a.example.org", "10.0.0.1"), key.public_key())
    made = make_certificate(AUTHORITY.certificate, AUTHORITY.key, asked.name, asked.hosts, asked.public_key, 9)
    check_certificate(made.public_bytes(DER), AUTHORITY.pem, "lab-a")
    alternatives = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {type(name) for name in alternatives} == {x509.DNSName, x509.IPAddress}
    assert b"lab-b" not in made.public_bytes(DER)


def test_a_request_says_what_was_asked_for() -> None:
    key = make_key()
    asked = read_request(make_request(key, "Läb.A", ["a.example.org", "::1"]).public_bytes(PEM))
    assert (asked.name, asked.hosts, asked.public_key) == ("Läb.A", ("a.example.org", "::1"), key.public_key())


def _forged() -> bytes:
    """A request with the key of one and the signature of another."""
    mine, theirs = make_key(), make_key()
    request = make_request(mine, "lab-a", []).public_bytes(DER)
    point = serialization.PublicFormat.SubjectPublicKeyInfo
    forged = request.replace(mine.public_key().public_bytes(DER, point), theirs.public_key().public_bytes(DER, point))
    assert forged != request
    return x509.load_der_x509_csr(forged).public_bytes(PEM)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_forged, "not signed by the key in it"),
        (lambda: ask(names(tls_name("lab-a"), tls_name("lab-b"))), "more than one .*lab-b.agent.dimat.internal"),
        (lambda: ask(names(tls_name("lab-b"))), "more than one .*lab-b.agent.dimat.internal"),
        (lambda: ask(names(tls_name("lab-a"), "LAB-B.AGENT.dimat.internal")), "more than one"),
        (lambda: ask(names(tls_name("lab-a"), "lab-b.agent.dimat.internal.")), "not host:port"),
        (lambda: ask(names(tls_name("lab-a"), "*.example.org")), "not host:port"),
        (lambda: ask(names(tls_name("lab-a"), *(f"h{k}" for k in range(33)))), "33 addresses are too many"),
        (lambda: ask(names("\x1b[2J" + SUFFIX)), r"more than one .*\\x1b\[2J"),
        (lambda: ask(), "names no agent"),
        (lambda: ask(names(tls_name("ca")), name="ca"), "choose another name"),
        (lambda: ask(names(tls_name("../x")), name="../x"), "may only hold letters"),
        (lambda: ask(names(tls_name("lab-a")), key=ec.generate_private_key(ec.SECP384R1())), "not P-256"),
        (lambda: ask(names(tls_name("lab-a")), key=rsa.generate_private_key(65537, 2048)), "not P-256"),
        (lambda: b"garbage", "cannot be read"),
    ],
)
def test_requests_that_are_refused(make: Callable[[], bytes], says: str) -> None:
    with pytest.raises(SecurityError, match=says) as caught:
        read_request(make())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "a\nb", "é" * 33])
def test_names_of_no_collaboration(name: str) -> None:
    with pytest.raises(ConfigError, match="one line of 1 to 64 bytes"):
        make_authority(make_key(), name, 9)
