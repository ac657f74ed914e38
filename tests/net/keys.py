"""A certificate authority for tests, made by the code that `dimat keys` runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from dimat.net.pki.authority import make_authority, make_certificate, make_key
from dimat.net.pki.identity import Identity

PEM = serialization.Encoding.PEM
DER = serialization.Encoding.DER


class Authority:
    """A CA with its key; `issue` makes an agent's keys."""

    def __init__(self, name: str = "tests", days: float = 30) -> None:
        self.key = make_key()
        self.certificate = make_authority(self.key, name, days)
        self.pem = self.certificate.public_bytes(PEM)

    def issue(self, name: str, *, days: float = 10, hosts: Sequence[str] = (), ca: bytes | None = None) -> Identity:
        """Return a fresh identity of an agent, which trusts this CA unless `ca` says otherwise."""
        key = make_key()
        made = make_certificate(self.certificate, self.key, name, hosts, key.public_key(), days)
        return Identity(name, made.public_bytes(PEM), self.pem if ca is None else ca, key)


def save(identity: Identity, folder: Path) -> None:
    """Write an identity where `load_identity` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ca.crt").write_bytes(identity.ca)
    (folder / f"{identity.name}.crt").write_bytes(identity.certificate)
    key = folder / f"{identity.name}.key"
    key.touch(0o600)
    key.write_bytes(identity.key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
