"""An agent's identity for TLS and signatures: its key and certificate, as loaded.

This module imports gRPC only to make credentials: the DHT's process checks certificates and signatures without it.
"""

from __future__ import annotations

import shlex
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dimat.errors import SecurityError
from dimat.net.pki.certificates import agent_name, authorities, check_certificate, check_name, readable
from dimat.net.pki.key_files import read_file, read_key

if TYPE_CHECKING:
    import grpc


@dataclass(slots=True)
class Identity:
    """An agent's name, certificate and key; `load_identity` makes one. The key never shows in a repr.

    All parts of an agent share one Identity, so when `take_over` replaces the keys, all parts use them at once.
    """

    name: str
    """The agent's name, as in the certificate and on the map."""
    certificate: bytes = field(repr=False)
    """PEM."""
    ca: bytes = field(repr=False)
    """PEM of the trusted CA certificates; there are several while a CA is being replaced."""
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    _whole: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def take_over(self, fresh: Identity) -> None:
        """Replace the certificates and the key by those of `fresh`, which has the same name.

        New connections use them.
        """
        with self._whole:
            self.certificate, self.ca, self.key = fresh.certificate, fresh.ca, fresh.key

    def sign(self, data: bytes) -> bytes:
        """Sign `data` with the agent's key: ECDSA over SHA-256, DER."""
        return self.key.sign(data, ec.ECDSA(hashes.SHA256()))

    @property
    def certificate_der(self) -> bytes:
        return self._loaded.public_bytes(serialization.Encoding.DER)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate's DER, in hex."""
        return self._loaded.fingerprint(hashes.SHA256()).hex()

    @property
    def until(self) -> datetime:
        """When the agent's certificate ends, or the certificate of the CA that issued it, whichever is first."""
        issuers = [ca for ca in authorities(self.ca) if _issued(ca, self._loaded)]
        ends = [authority.not_valid_after_utc for authority in issuers]
        return min([self._loaded.not_valid_after_utc, *([max(ends)] if ends else [])])

    def server_credentials(self) -> grpc.ServerCredentials:
        """Return a server's credentials, which refuse clients without a certificate of the CA.

        Each handshake uses the keys that the identity holds at that moment.
        """
        import grpc

        shown: list[bytes] = []

        def changed() -> grpc.ServerCertificateConfiguration | None:
            # None while nothing has changed: gRPC replaces credentials that other threads' handshakes may be using
            with self._whole:
                held = [self.certificate, self.ca]
                if held == shown:
                    return None
                shown[:] = held
                pair = self._key_pem, self.certificate
                return grpc.ssl_server_certificate_configuration([pair], root_certificates=self.ca)

        first = changed()
        assert first is not None
        # gRPC's documentation allows None, its type does not
        return grpc.dynamic_ssl_server_credentials(first, cast("Any", changed), require_client_authentication=True)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Return a client's credentials; its channel must set "grpc.ssl_target_name_override" to `tls_name(peer)`."""
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


def _issued(authority: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def load_identity(folder: str | Path, name: str) -> Identity:
    """Read an agent's identity from NAME.key, NAME.crt and ca.crt in a folder, and check that they match.

    Raises SecurityError, with one line that says what to do, if a file is missing or cannot be read, if other users can
    read the key, if key and certificate do not match, or if the certificate is another agent's, has expired or comes
    from another CA.
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
            f"{files[0]} is not the key of {files[1]}; put back the key that it was made with, or make both anew"
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


def agent_of(auth_context: Mapping[str, Iterable[bytes]]) -> str | None:
    """Return the agent that a client proved to be, from gRPC's `ServicerContext.auth_context()`.

    None if the client has shown no certificate, one whose two names disagree, or one that is not an agent's. TLS has
    already checked that the CA issued the certificate and that the client holds its key.
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
    """Return the message for missing files, with the commands that make them."""
    lacks = f"no keys for agent {name!r}: {folder} lacks {', '.join(missing)}"
    place = f"--folder {shlex.quote(str(folder))}"
    if missing == ["ca.crt"]:
        return f"{lacks}; ask the organiser for it (`dimat keys init-ca` made it)"
    if (folder / "ca.key").exists():
        renew = "" if f"{name}.key" in missing else " --renew"
        return f"{lacks}; make them with: dimat keys issue {name}{renew} {place}"
    if f"{name}.key" in missing:
        return (
            f"{lacks}; get them from the organiser, or run: dimat keys request {name} {place} (an organiser "
            f"begins with: dimat keys init-ca {place})"
        )
    return f"{lacks}; send {name}.csr to the organiser, who runs: dimat keys sign {name}.csr"
