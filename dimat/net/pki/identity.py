"""Who an agent is: its key and certificate, read from the folder of keys, and used for TLS and signatures.

gRPC is imported only where credentials are made: the DHT's process checks certificates and signatures without it.
"""

from __future__ import annotations

import os
import shlex
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dimat.errors import SecurityError
from dimat.net.pki.certificates import (
    agent_name,
    authorities,
    check_certificate,
    check_name,
    check_signature,
    is_p256,
    readable,
    tls_name,
)

if TYPE_CHECKING:
    import grpc

__all__ = ["Identity", "agent_of", "check_certificate", "check_signature", "load_identity", "read_key", "tls_name"]

LONGEST_FILE = 2**20
"""Bytes that are read of a key or certificate file."""


@dataclass(frozen=True, slots=True)
class Identity:
    """An agent's name with what proves it; `load_identity` makes one. The key never shows in a repr."""

    name: str
    """Agent, as in the certificate and on the map."""
    certificate: bytes = field(repr=False)
    """PEM."""
    ca: bytes = field(repr=False)
    """PEM of the CA certificates that are trusted: several while a CA is being replaced."""
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    def sign(self, data: bytes) -> bytes:
        """Return the signature of the agent's key: ECDSA over SHA-256, DER."""
        return self.key.sign(data, ec.ECDSA(hashes.SHA256()))

    @property
    def certificate_der(self) -> bytes:
        return self._loaded.public_bytes(serialization.Encoding.DER)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate's DER, in hex."""
        return self._loaded.fingerprint(hashes.SHA256()).hex()

    def server_credentials(self) -> grpc.ServerCredentials:
        """Return what a server listens with: a client without a certificate of the CA gets no connection."""
        import grpc

        return grpc.ssl_server_credentials(
            [(self._key_pem, self.certificate)], root_certificates=self.ca, require_client_auth=True
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Return what a client dials with; it has to set "grpc.ssl_target_name_override" to `tls_name(peer)`."""
        import grpc

        return grpc.ssl_channel_credentials(
            root_certificates=self.ca, private_key=self._key_pem, certificate_chain=self.certificate
        )

    @property
    def _loaded(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.certificate)

    @property
    def _key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


def load_identity(folder: str | Path, name: str) -> Identity:
    """Read an agent's identity from NAME.key, NAME.crt and ca.crt in a folder, and check that they go together.

    SecurityError, one line that says what to do: a file is missing or garbage, others can read the key, it is not the
    certificate's, or the certificate is another's, out of date or of another CA.
    """
    check_name(name)
    folder = Path(folder)
    files = (folder / f"{name}.key", folder / f"{name}.crt", folder / "ca.crt")
    missing = [path.name for path in files if not path.exists()]
    if missing:
        raise SecurityError(_how_to_make(folder, name, missing))
    key = read_key(files[0])
    with readable(str(files[1])):
        certificate = x509.load_pem_x509_certificate(read_file(files[1]))
        public = certificate.public_key()
    if public != key.public_key():
        raise SecurityError(
            f"{files[0]} is not the key of {files[1]}; put back the one that it was made with, or make both anew"
        )
    der = certificate.public_bytes(serialization.Encoding.DER)
    with readable(str(files[2])):
        found = authorities(read_file(files[2]))
    ca = b"".join(authority.public_bytes(serialization.Encoding.PEM) for authority in found)
    try:
        check_certificate(der, ca, name)
    except SecurityError as error:
        raise SecurityError(f"{files[1]}: {error}") from error
    return Identity(name, certificate.public_bytes(serialization.Encoding.PEM), ca, key)


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a private key (PEM, P-256, no passphrase); SecurityError too where others than its owner can get at it."""
    data = read_file(path, private=True)
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except TypeError as error:
        raise SecurityError(
            f"{path} is locked with a passphrase; an agent that starts by itself cannot open it"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SecurityError(f"{path} is not a private key in PEM; put back the right file, or make new keys") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not is_p256(key):
        raise SecurityError(f"{path} is not a P-256 key; make one with `dimat keys`")
    return key


def read_file(path: Path, *, private: bool = False) -> bytes:
    """Read a small file; SecurityError if it cannot be, or if it is `private` and others have any right to it."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if private and mode & 0o077 and not only_ours(file.fileno(), mode):
                raise SecurityError(f"{path} is open to others (mode {mode:04o}); run: chmod 600 {path}")
            data = file.read(LONGEST_FILE + 1)
    except OSError as error:
        raise SecurityError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > LONGEST_FILE:
        raise SecurityError(f"{path} is too long to be a key or certificate")
    return data


def agent_of(auth_context: Mapping[str, Iterable[bytes]]) -> str | None:
    """Return the agent that a client proved to be, from gRPC's `ServicerContext.auth_context()`.

    None where it has shown no certificate, or one whose two names disagree or that is not an agent's. That the CA
    issued it, and that the client holds its key, TLS has checked before.
    """
    for pem in auth_context.get("x509_pem_cert", ()):
        try:
            with readable("client certificate"):
                certificate = x509.load_pem_x509_certificate(pem)
                return None if _is_authority(certificate) else agent_name(certificate)
        except SecurityError:
            return None
    return None


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return True  # every certificate of `dimat keys` says what it is


def _how_to_make(folder: Path, name: str, missing: list[str]) -> str:
    """Compose the message for files that are not there, after who has to make them."""
    lacks = f"no keys for agent {name!r}: {folder} lacks {', '.join(missing)}"
    place = f"--folder {shlex.quote(str(folder))}"
    if missing == ["ca.crt"]:
        return f"{lacks}; ask the organiser for it (`dimat keys init-ca` made it)"
    if (folder / "ca.key").exists():
        renew = "" if f"{name}.key" in missing else " --renew"
        return f"{lacks}; make them with: dimat keys issue {name}{renew} {place}"
    if f"{name}.key" in missing:
        return (
            f"{lacks}; get them from the organiser, or run: dimat keys request {name} {place} (whoever organises "
            f"begins with: dimat keys init-ca {place})"
        )
    return f"{lacks}; send {name}.csr to the organiser, who runs: dimat keys sign {name}.csr"


ATTRIBUTE = "system.posix_acl_access"
VERSION = 2
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
"""Kinds of entries: the owner, a named user, the file's group, a named group, the mask, everybody else."""


def only_ours(descriptor: int, mode: int) -> bool:
    """Whether an open file's ACL lets nobody in but its owner, this process's user and root. False where it has no ACL,
    or none that is understood; then its `mode` says all there is to say."""
    if mode & 0o007 or not hasattr(os, "getxattr"):
        return False
    try:
        data = os.getxattr(descriptor, ATTRIBUTE)
    except OSError:  # no list, or a file system without any
        return False
    if len(data) % 8 != 4 or struct.unpack_from("<I", data)[0] != VERSION:
        return False
    entries: list[tuple[int, int, int]] = list(struct.iter_unpack("<HHI", data[4:]))
    us = (0, os.geteuid())
    return all(
        not rights or kind in (USER_OBJ, MASK) or (kind == USER and user in us) for kind, rights, user in entries
    )
