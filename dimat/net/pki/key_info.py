"""`dimat keys show`: facts about certificates, keys and requests, and their faults."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from dimat.errors import ConfigError, SecurityError
from dimat.net.pki.authority import read_request
from dimat.net.pki.certificates import agent_name, authorities, check_certificate, hosts, readable
from dimat.net.pki.key_files import read_file, read_key
from dimat.net.pki.keyring import key_fingerprint

SOON = timedelta(days=30)
"""A certificate that ends sooner gets a warning."""
_ENDINGS = (".crt", ".csr", ".key")


@dataclass(slots=True)
class KeyInfo:
    """One certificate, one request, or one key that has neither.

    `key`: whether the private key is in the same folder: "here", "not here", "another's" or "unusable". `faults`: why
    it cannot be used; `warnings`: what needs attention. Dates are aware; None if it has none.
    """

    file: Path
    kind: Literal["ca", "agent", "request", "key"]
    name: str
    hosts: tuple[str, ...] = ()
    fingerprint: str | None = None
    key_fingerprint: str | None = None
    issuer: str | None = None
    first: datetime | None = None
    until: datetime | None = None
    key: Literal["here", "not here", "another's", "unusable"] = "not here"
    faults: list[str] = field(default_factory=list[str])
    warnings: list[str] = field(default_factory=list[str])


def look_at(paths: Iterable[Path], now: datetime | None = None) -> list[KeyInfo]:
    """Return the facts about key files and folders of keys, CAs first; ConfigError if there are none."""
    now = now or datetime.now(UTC)
    found: list[KeyInfo] = []
    for stem in dict.fromkeys(stem for path in paths for stem in _stems(path)):
        found += _authorities(stem, now) if stem.name == "ca" else [_agent(stem, now)]
    return found


def _stems(path: Path) -> list[Path]:
    """Return the files of one agent, or of all agents in a folder, as paths without their suffix."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _ENDINGS and not file.name.startswith("."))
        if not files:
            raise ConfigError(f"{path} holds no keys; make some with `dimat keys`")
        return sorted({file.with_suffix("") for file in files}, key=lambda stem: (stem.name != "ca", stem.name))
    if path.suffix not in _ENDINGS:
        raise ConfigError(f"{path} is no folder of keys, and not named .crt, .csr or .key")
    if not path.exists():
        raise ConfigError(f"no file {path}")
    return [path.with_suffix("")]


def _authorities(stem: Path, now: datetime) -> list[KeyInfo]:
    file, key_file = _with(stem, ".crt"), _with(stem, ".key")
    try:
        certificates = authorities(read_file(file))
    except SecurityError as error:
        return [KeyInfo(file, "ca", stem.name, faults=[str(error)])]
    found: list[KeyInfo] = []
    for certificate in certificates:
        facts = KeyInfo(file, "ca", _common_name(certificate.subject))
        _describe(facts, certificate, now)
        first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if not first <= now <= last:
            facts.faults.append(f"valid from {first:%Y-%m-%d} to {last:%Y-%m-%d} only")
        found.append(facts)
    if key_file.exists():
        _compare(found, key_file)
    return found


def _agent(stem: Path, now: datetime) -> KeyInfo:
    file, key_file = _with(stem, ".crt"), _with(stem, ".key")
    if not file.exists():
        file = _with(stem, ".csr")
    if file.exists():
        facts = _certificate(file, now) if file.suffix == ".crt" else _request(file)
        if key_file.exists():
            _compare([facts], key_file)
        return facts
    facts = KeyInfo(key_file, "key", stem.name, warnings=["has neither a certificate nor a request beside it"])
    try:
        facts.key_fingerprint = key_fingerprint(read_key(key_file).public_key())
        facts.key = "here"
    except SecurityError as error:
        facts.key = "unusable"
        facts.faults.append(str(error))
    return facts


def _certificate(file: Path, now: datetime) -> KeyInfo:
    facts = KeyInfo(file, "agent", file.stem)
    try:
        with readable("certificate"):
            certificate = x509.load_pem_x509_certificate(read_file(file))
            facts.name = agent_name(certificate) or _common_name(certificate.subject)
            facts.hosts = hosts(certificate)
            _describe(facts, certificate, now)
        ca = file.with_name("ca.crt")
        if ca.exists():
            der = certificate.public_bytes(serialization.Encoding.DER)
            check_certificate(der, read_file(ca), file.stem, now)
        else:
            facts.warnings.append("no ca.crt beside it, so its issuer was not checked")
    except SecurityError as error:
        facts.faults.append(str(error))
    return facts


def _request(file: Path) -> KeyInfo:
    facts = KeyInfo(file, "request", file.stem)
    try:
        asked = read_request(read_file(file))
        facts.name, facts.hosts, facts.key_fingerprint = asked.name, asked.hosts, key_fingerprint(asked.public_key)
        if asked.name != file.stem:
            facts.faults.append(f"asks for a certificate of {asked.name!r}, not of {file.stem!r}")
    except SecurityError as error:
        facts.faults.append(str(error))
    return facts


def _describe(facts: KeyInfo, certificate: x509.Certificate, now: datetime) -> None:
    facts.first, facts.until = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    facts.fingerprint = certificate.fingerprint(hashes.SHA256()).hex()
    facts.issuer = _common_name(certificate.issuer)
    key = certificate.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey):
        facts.key_fingerprint = key_fingerprint(key)
    if now <= facts.until < now + SOON:
        facts.warnings.append("ends soon, renew it")


def _compare(found: list[KeyInfo], key_file: Path) -> None:
    """Note on each certificate (one agent's, or the CA's several) whether the private key belongs to it."""
    try:
        own = key_fingerprint(read_key(key_file).public_key())
    except SecurityError as error:
        for facts in found:
            facts.key = "unusable"
            facts.faults.append(str(error))
        return
    matching = [facts for facts in found if facts.key_fingerprint == own]
    for facts in matching:
        facts.key = "here"
    if not matching:
        for facts in found:
            facts.key = "another's"
            facts.faults.append(f"{key_file} is not its key")


def _common_name(name: x509.Name) -> str:
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else name.rfc4514_string()


def _with(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)
