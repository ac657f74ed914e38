"""Agents' names in certificates, and the checks of certificates and signatures.

A collaboration has a certificate authority (CA), which an organiser keeps, and one P-256 key per agent. An agent's
certificate contains its name twice: as it is, in the subject's common name, and as the DNS name `tls_name(agent)`. TLS
compares the DNS name when the agent is dialled, at any of its addresses.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b32encode
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from dimat.errors import ConfigError, SecurityError
from dimat.net.limits import CLOCK_SKEW_S, MAX_CERTIFICATE_BYTES, MAX_NAME_BYTES

SUFFIX = ".agent.dimat.internal"
"""Suffix of every agent's DNS name; no address of an agent may end with it."""
CLOCK_SKEW = timedelta(seconds=CLOCK_SKEW_S)
"""How far this machine's clock may be off when a certificate's dates are checked."""

E = TypeVar("E", bound=x509.ExtensionType)

_NAME = re.compile(r"\w[\w.-]*")
_PLAIN = re.compile(r"(?!..--)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_UNDERSTOOD = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
    }
)


def check_name(agent: str) -> None:
    """Raise ConfigError unless an agent of this name can have a certificate and key files."""
    if not _NAME.fullmatch(agent):
        raise ConfigError(f"agent name {agent!r} may only hold letters, digits, '_', '.' and '-'")
    if len(agent.encode()) > MAX_NAME_BYTES:
        raise ConfigError(
            f"agent name {agent!r} is too long for a certificate (at most {MAX_NAME_BYTES} bytes of UTF-8)"
        )
    if agent.lower() == "ca":
        raise ConfigError(f"agent name {agent!r}: ca.key and ca.crt are the CA's own; choose another name")


def tls_name(agent: str) -> str:
    """Return the DNS name by which an agent's certificate is checked; no two agents have the same.

    `lab-a` becomes lab-a.agent.dimat.internal. A name that is not a lower-case DNS label (it has capitals, `_`, `.`,
    letters beyond ASCII, or over 63 characters) is hashed, and gets one more label so that it cannot equal a plain one.
    """
    if _PLAIN.fullmatch(agent):
        return agent + SUFFIX
    digest = hashlib.sha256(agent.encode()).digest()
    return b32encode(digest).decode().rstrip("=").lower() + ".hash" + SUFFIX


def check_certificate(der: bytes, ca: bytes, name: str, now: datetime | None = None) -> ec.EllipticCurvePublicKey:
    """Return the public key of an agent's certificate, after checking that it is that agent's.

    `ca`: PEM of the CA certificates, one of which must have issued it. `now`: an aware time; default: the clock. Checks
    the name, the dates, the issuer and its signature, and that the certificate is meant for an agent. Raises
    SecurityError, which names the agent and the fault.
    """
    now = now or datetime.now(UTC)
    what = f"certificate of {name!r}"
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise SecurityError(f"{what}: {len(der)} bytes are too many (at most {MAX_CERTIFICATE_BYTES})")
    with readable(what):
        certificate = x509.load_der_x509_certificate(der)
        if not der.endswith(b"\0" + certificate.signature):  # the parser lets unused bits of it be anything
            raise SecurityError(f"{what} cannot be read: its last part is not DER")
        found = agent_name(certificate)
        if found is None:
            raise SecurityError(f"{what} names no agent, or two; only certificates made with `dimat keys` will do")
        if found != name:
            raise SecurityError(f"{what} is that of another agent: {found!r}")
        _check_dates(certificate, what, now)
        _check_issuer(certificate, ca, what, now)
        _check_use(certificate, what)
        key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not is_p256(key):
        raise SecurityError(f"{what} holds a key that is not P-256; make it with `dimat keys`")
    return key


def check_signature(public_key: ec.EllipticCurvePublicKey, data: bytes, signature: bytes) -> None:
    """Check a signature made by `Identity.sign` (ECDSA over SHA-256, DER).

    Raises SecurityError if the key did not make it.
    """
    try:
        public_key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError) as error:
        raise SecurityError("signature is wrong: the data were changed, or another key signed them") from error


def agent_name(certificate: x509.Certificate | x509.CertificateSigningRequest) -> str | None:
    """Return the name of the agent that a certificate or request claims to be for.

    None unless it has exactly one common name, and the DNS name of that agent and of no other. Raises ValueError and
    the other errors in `readable` for bytes that only look like a certificate.
    """
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1 or not isinstance(names[0].value, str):
        return None
    name = names[0].value
    agents = {host.lower() for host in dns_names(certificate) if host.lower().endswith(SUFFIX)}
    return name if agents == {tls_name(name)} else None


def dns_names(certificate: x509.Certificate | x509.CertificateSigningRequest) -> list[str]:
    """Return the DNS names of a certificate or request, including the agent's own."""
    found = _alternatives(certificate)
    return [] if found is None else found.get_values_for_type(x509.DNSName)


def hosts(certificate: x509.Certificate | x509.CertificateSigningRequest) -> tuple[str, ...]:
    """Return the hosts (DNS names and IP addresses) that a certificate or request gives for its agent."""
    found = _alternatives(certificate)
    if found is None:
        return ()
    named = [host for host in found.get_values_for_type(x509.DNSName) if not host.lower().endswith(SUFFIX)]
    return (*named, *map(str, found.get_values_for_type(x509.IPAddress)))


def is_p256(key: object) -> bool:
    """Whether a public or private key is one on the curve P-256."""
    return isinstance(key, (ec.EllipticCurvePublicKey, ec.EllipticCurvePrivateKey)) and isinstance(
        key.curve, ec.SECP256R1
    )


@lru_cache(maxsize=8)
def authorities(ca: bytes) -> tuple[x509.Certificate, ...]:
    """Return the CA certificates in a PEM text.

    Raises SecurityError if it contains none, or one that does not belong to a CA.
    """
    with readable("CA certificate"):
        found = tuple(x509.load_pem_x509_certificates(ca))
        for certificate in found:
            constraints = _extension(certificate, x509.BasicConstraints)
            usage = _extension(certificate, x509.KeyUsage)
            if constraints is None or not constraints.ca or usage is None or not usage.key_cert_sign:
                raise SecurityError("CA certificate: it may not issue certificates; take the ca.crt of `dimat keys`")
    return found


@contextmanager
def readable(what: str) -> Generator[None]:
    """Turn the parser's errors for unreadable data, raised at once or later, into one SecurityError."""
    try:
        yield
    except (
        ValueError,
        TypeError,
        UnsupportedAlgorithm,
        x509.DuplicateExtension,
        x509.InvalidVersion,
        x509.UnsupportedGeneralNameType,
    ) as error:
        reason = " ".join(str(error).split())
        raise SecurityError(f"{what} cannot be read: {reason or type(error).__name__}") from error


def _check_dates(certificate: x509.Certificate, what: str, now: datetime) -> None:
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < first - CLOCK_SKEW:
        raise SecurityError(f"{what} is valid only from {_date(first)} on, and the clock says {_date(now)}; set it")
    if now > last + CLOCK_SKEW:
        raise SecurityError(f"{what} expired at {_date(last)}; renew it (see `dimat keys issue --help`)")


def _check_issuer(certificate: x509.Certificate, ca: bytes, what: str, now: datetime) -> None:
    for authority in authorities(ca):
        try:
            certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            continue
        _check_dates(authority, f"CA certificate that issued the {what}", now)
        return
    raise SecurityError(f"{what} was not issued by this collaboration's CA (ca.crt)")


def _check_use(certificate: x509.Certificate, what: str) -> None:
    """Refuse uses that an agent's certificate may not have, and critical extensions that dimat does not know."""
    constraints = _extension(certificate, x509.BasicConstraints)
    usage = _extension(certificate, x509.KeyUsage)
    uses = _extension(certificate, x509.ExtendedKeyUsage)
    if constraints is None or constraints.ca or usage is None or usage.key_cert_sign:
        raise SecurityError(f"{what} is that of a CA, not of an agent")
    wanted = {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
    if not usage.digital_signature or uses is None or not wanted <= set(uses):
        raise SecurityError(f"{what} is not made for an agent's use; make it with `dimat keys`")
    for extension in certificate.extensions:
        if extension.critical and extension.oid not in _UNDERSTOOD:
            raise SecurityError(f"{what} sets a condition that dimat does not know ({extension.oid.dotted_string})")


def _extension(certificate: x509.Certificate, kind: type[E]) -> E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _alternatives(
    certificate: x509.Certificate | x509.CertificateSigningRequest,
) -> x509.SubjectAlternativeName | None:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None


def _date(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
