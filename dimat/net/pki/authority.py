"""Makes the CA's certificate, agents' certificates, and requests for agents' certificates."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dimat.errors import ConfigError, DimatError, SecurityError
from dimat.net.limits import MAX_CERTIFICATE_HOSTS, MAX_NAME_BYTES
from dimat.net.pki.certificates import SUFFIX, agent_name, check_name, dns_names, hosts, is_p256, readable, tls_name

BACKDATED = timedelta(hours=1)
"""A new certificate is valid from this long before now, for machines whose clocks are slow."""

_ADDRESS = re.compile(r"(?:\[(?P<six>[^\[\]]+)\]|(?P<host>[^:\[\]]+))(?::(?P<port>[0-9]{1,5}))?")
_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*")


@dataclass(frozen=True, slots=True)
class CertificateRequest:
    """The part of a certificate request that an organiser uses; the rest is ignored."""

    name: str
    hosts: tuple[str, ...]
    public_key: ec.EllipticCurvePublicKey


def make_key() -> ec.EllipticCurvePrivateKey:
    """Generate a private key from the operating system's random numbers."""
    return ec.generate_private_key(ec.SECP256R1())


def make_authority(key: ec.EllipticCurvePrivateKey, name: str, days: float) -> x509.Certificate:
    """Make the certificate of a CA that may issue agents' certificates and nothing else.

    `name`: the collaboration's name, 1 to `MAX_NAME_BYTES` bytes of UTF-8. Raises ConfigError for any other name.
    """
    if not name.isprintable() or not 1 <= len(name.encode()) <= MAX_NAME_BYTES:
        raise ConfigError(f"name {name!r} of the collaboration must be one line of 1 to {MAX_NAME_BYTES} bytes")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = _now()
    public = key.public_key()
    builder = _begun(subject, subject, public, now - BACKDATED, now + timedelta(days=days))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    return builder.sign(key, hashes.SHA256())


def make_certificate(
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    name: str,
    hosts: Iterable[str],
    public_key: ec.EllipticCurvePublicKey,
    days: float,
) -> x509.Certificate:
    """Make an agent's certificate, which the agent uses both to listen and to dial.

    The certificate ends no later than the CA's. `hosts`: as `host_of` returns them. Raises SecurityError if the CA's
    own certificate has expired.
    """
    check_name(name)
    now = _now()
    if authority.not_valid_after_utc <= now:
        raise SecurityError(f"the CA's certificate expired at {authority.not_valid_after_utc:%Y-%m-%d}; make a new CA")
    last = min(now + timedelta(days=days), authority.not_valid_after_utc)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = _begun(subject, authority.subject, public_key, now - BACKDATED, last)
    uses = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(digital_signature=True), critical=True)
    builder = builder.add_extension(uses, critical=False)
    builder = builder.add_extension(_alternatives(name, hosts), critical=False)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    builder = builder.add_extension(issuer, critical=False)
    return builder.sign(authority_key, hashes.SHA256())


def make_request(key: ec.EllipticCurvePrivateKey, name: str, hosts: Iterable[str]) -> x509.CertificateSigningRequest:
    """Make a request for an agent's certificate, signed with the agent's key to prove possession of it."""
    check_name(name)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return builder.add_extension(_alternatives(name, hosts), critical=False).sign(key, hashes.SHA256())


def read_request(pem: bytes) -> CertificateRequest:
    """Return the name, public key and hosts in a certificate request; ignore the rest of it.

    Raises SecurityError if the request cannot be read, is not signed by its own key, or asks for something that no
    agent may have.
    """
    with readable("request"):
        request = x509.load_pem_x509_csr(pem)
        try:
            proven = request.is_signature_valid
        except InvalidSignature:
            proven = False
        if not proven:
            raise SecurityError("request is not signed by the key in it")
        key, name = request.public_key(), agent_name(request)
        if name is None:
            others = [host for host in dns_names(request) if host.lower().endswith(SUFFIX)]
            raise SecurityError(f"request names no agent, or more than one (names of agents in it: {others})")
        found = hosts(request)
    if not isinstance(key, ec.EllipticCurvePublicKey) or not is_p256(key):
        raise SecurityError("request holds a key that is not P-256; make it with `dimat keys request`")
    try:
        check_name(name)
        return CertificateRequest(name, hosts_of(found), key)
    except DimatError as error:
        raise SecurityError(f"request: {error}") from error


def hosts_of(addresses: Iterable[str]) -> tuple[str, ...]:
    """Return the hosts of some addresses, in order and without duplicates.

    Raises ConfigError for an invalid address, and for more hosts than a certificate may have.
    """
    found = tuple(dict.fromkeys(map(host_of, addresses)))
    if len(found) > MAX_CERTIFICATE_HOSTS:
        raise ConfigError(f"{len(found)} addresses are too many for one agent (at most {MAX_CERTIFICATE_HOSTS})")
    return found


def host_of(address: str) -> str:
    """Return the host of `host:port`, `host`, `[IPv6]:port` or an IP address: lower-case name or plain IP.

    Raises ConfigError for an invalid host, for a wildcard, and for the DNS names that identify agents: an agent whose
    certificate held another agent's DNS name could impersonate that agent.
    """
    text = address.strip()
    parts = _ADDRESS.fullmatch(text)  # None for a bare IPv6 address, too
    inner = text if parts is None else parts["six"] or parts["host"]
    wrong = f"address {address!r} is not host:port, with a DNS name (in ASCII) or an IP address as host"
    if parts is not None and parts["port"] is not None and not 0 < int(parts["port"]) < 65536:
        raise ConfigError(wrong)
    try:
        return str(ip_address(inner))
    except ValueError:
        host = inner.lower()
    if parts is None or parts["host"] is None or not _HOST.fullmatch(host):
        raise ConfigError(wrong)
    if host.endswith(SUFFIX) or host == SUFFIX[1:]:
        raise ConfigError(f"address {address!r}: names that end in {SUFFIX} are reserved for agents' identities")
    return host


def _begun(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, first: datetime, last: datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(first).not_valid_after(last)


def _alternatives(name: str, hosts: Iterable[str]) -> x509.SubjectAlternativeName:
    names: list[x509.GeneralName] = [x509.DNSName(tls_name(name))]
    for host in hosts:
        try:
            names.append(x509.IPAddress(ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    return x509.SubjectAlternativeName(names)


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
