"""The folder of keys: makes, renews, requests and signs agents' keys and certificates.

Only a renewal overwrites files, and it keeps the key. Files are written atomically. A command that fails removes the
new files that it has written. Other users can never read a private key, not even while it is being written.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dimat.errors import ConfigError, SecurityError
from dimat.net.pki import authority as issuing
from dimat.net.pki.certificates import agent_name, authorities, check_certificate, check_name, hosts, readable
from dimat.net.pki.key_files import PUBLIC, read_file, read_key, write_file, write_key


@dataclass(frozen=True, slots=True)
class KeyFiles:
    """The files that a command made for an agent. `until`: when the certificate ends; None for a request."""

    name: str
    hosts: tuple[str, ...]
    key_fingerprint: str
    files: tuple[Path, ...]
    until: datetime | None = None


def init_authority(folder: Path, name: str, days: float) -> KeyFiles:
    """Make a CA's key and certificate in a folder; ConfigError if it has either already."""
    _refuse_existing([folder / "ca.key", folder / "ca.crt"], "make a second CA in another folder")
    key = issuing.make_key()
    certificate = issuing.make_authority(key, name, days)
    files = (folder / "ca.key", folder / "ca.crt")
    with _all_or_none() as new:
        write_key(files[0], key)
        new.append(files[0])
        write_file(files[1], _pem(certificate), PUBLIC)
    return KeyFiles(name, (), key_fingerprint(key.public_key()), files, certificate.not_valid_after_utc)


def issue(
    folder: Path,
    wanted: Mapping[str, Sequence[str] | None],
    days: float,
    *,
    renew: bool = False,
    out: Path | None = None,
) -> list[KeyFiles]:
    """Make keys and certificates for agents with the folder's CA: for all of them, or for none if one fails.

    `wanted`: addresses by agent; None keeps the addresses of the certificate that is renewed. `renew`: keep the keys,
    whether they are here or with the agents, and make new certificates. `out`: the folder of the agents' files, if it
    is not the CA's folder; the CA's certificate is copied into it. Raises ConfigError, SecurityError, and DataError if
    the disk fails.
    """
    place = folder if out is None else out
    for name in wanted:
        check_name(name)
    if not renew:
        made = [place / f"{name}{end}" for name in wanted for end in (".key", ".crt")]
        _refuse_existing(made, "--renew keeps keys and makes new certificates")
    authority, authority_key = authority_of(folder)
    ca, ca_file = read_file(folder / "ca.crt"), place / "ca.crt"
    ca_there = ca_file.exists()
    if ca_there and authority not in authorities(read_file(ca_file)):
        raise SecurityError(f"{ca_file} is from another CA than {folder / 'ca.crt'}; choose another folder")
    plans: list[tuple[str, ec.EllipticCurvePrivateKey | None, x509.Certificate]] = []
    for name, addresses in wanted.items():
        key: ec.EllipticCurvePrivateKey | None = None if renew else issuing.make_key()
        public, former = _renewed(place, name, ca) if key is None else (key.public_key(), ())
        reached = former if addresses is None else issuing.hosts_of(addresses)
        plans.append((name, key, issuing.make_certificate(authority, authority_key, name, reached, public, days)))
    results: list[KeyFiles] = []
    with _all_or_none() as new:
        if not ca_there:
            write_file(ca_file, ca, PUBLIC)
            new.append(ca_file)
        for name, key, certificate in plans:
            results.append(_written(place, name, key, certificate, new))
    if not ca_there and results:
        results[-1] = replace(results[-1], files=(*results[-1].files, ca_file))
    return results


def request(folder: Path, name: str, addresses: Sequence[str], *, renew: bool = False) -> KeyFiles:
    """Make an agent's key and a request for its certificate; the request is not secret.

    `renew`: make a new request for the existing key. Raises ConfigError and SecurityError.
    """
    check_name(name)
    reached = issuing.hosts_of(addresses)
    files = (folder / f"{name}.key", folder / f"{name}.csr")
    if renew:
        key = read_key(files[0])
    else:
        _refuse_existing(files, "--renew keeps the key and makes a new request")
        key = issuing.make_key()
    made = issuing.make_request(key, name, reached)
    with _all_or_none() as new:
        if not renew:
            write_key(files[0], key)
            new.append(files[0])
        write_file(files[1], made.public_bytes(serialization.Encoding.PEM), PUBLIC)
    return KeyFiles(name, reached, key_fingerprint(key.public_key()), files[1:] if renew else files)


def sign(folder: Path, file: Path, days: float, *, name: str | None = None, renew: bool = False) -> KeyFiles:
    """Make the certificate that a request asks for, with the folder's CA, and write it to that folder.

    `name`: the agent that the request must be from; None: the agent that the file NAME.csr is named after. `renew`:
    replace the agent's existing certificate, for the same key only. Raises ConfigError and SecurityError.
    """
    if name is not None:
        check_name(name)
    data = read_file(file)
    try:
        asked = issuing.read_request(data)
    except SecurityError as error:
        raise SecurityError(f"{file}: {error}") from error
    expected = file.stem if name is None else name
    if expected != asked.name:
        raise SecurityError(
            f"{file} asks for a certificate of {asked.name!r}, not of {expected!r}; if you want that, add "
            f"--name {asked.name}"
        )
    target = folder / f"{asked.name}.crt"
    authority, authority_key = authority_of(folder)
    if target.exists():
        if not renew:
            _refuse_existing([target], "--renew makes a new certificate for the same key")
        public, _ = _renewed(folder, asked.name, read_file(folder / "ca.crt"))
        if public != asked.public_key:
            raise SecurityError(
                f"{file} has another key than {target}; ask {asked.name} whether its key is new (a new key needs the "
                "old certificate moved away first)"
            )
    certificate = issuing.make_certificate(authority, authority_key, asked.name, asked.hosts, asked.public_key, days)
    return _written(folder, asked.name, None, certificate, [])


def authority_of(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Return the folder's CA: the certificate in ca.crt that belongs to ca.key, and that key.

    Raises SecurityError if the folder has no CA, or if none of the certificates is for that key.
    """
    for path in (folder / "ca.key", folder / "ca.crt"):
        if not path.exists():
            raise SecurityError(f"no {path}: only the organiser's folder has a CA; make one with: dimat keys init-ca")
    key = read_key(folder / "ca.key")
    for certificate in authorities(read_file(folder / "ca.crt")):
        if certificate.public_key() == key.public_key():
            return certificate, key
    raise SecurityError(f"{folder / 'ca.key'} is not the key of {folder / 'ca.crt'}; put back the right one")


def key_fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """Return the SHA-256 of a public key's DER in hex, which two people compare by telephone."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(der)
    return digest.finalize().hex()


@contextmanager
def _all_or_none() -> Generator[list[Path]]:
    """Delete the new files in the list if the block fails.

    A key without its certificate would block a second run of the command, and no renewal makes a CA's certificate.
    """
    new: list[Path] = []
    try:
        yield new
    except BaseException:
        for path in new:
            path.unlink(missing_ok=True)
        raise


def _written(
    folder: Path,
    name: str,
    key: ec.EllipticCurvePrivateKey | None,
    certificate: x509.Certificate,
    new: list[Path],
) -> KeyFiles:
    """Write an agent's files; if the key is new, add each file to `new` once it is written."""
    public = certificate.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    files = (folder / f"{name}.key", folder / f"{name}.crt")
    if key is not None:
        write_key(files[0], key)
        new.append(files[0])
    write_file(files[1], _pem(certificate), PUBLIC)
    if key is not None:
        new.append(files[1])
    written = files if key is not None else files[1:]
    return KeyFiles(name, hosts(certificate), key_fingerprint(public), written, certificate.not_valid_after_utc)


def _renewed(folder: Path, name: str, ca: bytes) -> tuple[ec.EllipticCurvePublicKey, tuple[str, ...]]:
    """Return the public key and hosts of an agent that has a key, a certificate or both in the folder."""
    key_file, file = folder / f"{name}.key", folder / f"{name}.crt"
    if not file.exists():
        if not key_file.exists():
            raise ConfigError(f"nothing to renew for {name!r}: {folder} has neither {name}.key nor {name}.crt")
        return read_key(key_file).public_key(), ()
    with readable(str(file)):
        certificate = x509.load_pem_x509_certificate(read_file(file))
        if agent_name(certificate) != name:
            raise SecurityError(f"{file} is not the certificate of {name!r}; put back the right one")
        former = hosts(certificate)
        der = certificate.public_bytes(serialization.Encoding.DER)
        # checked as of its first day: renewal must accept an expired certificate
        public = check_certificate(der, ca, name, certificate.not_valid_before_utc)
    if key_file.exists() and (own := read_key(key_file).public_key()) != public:
        raise SecurityError(
            f"{key_file} is not the key of {file} (that has {key_fingerprint(public)[:16]}…, this "
            f"{key_fingerprint(own)[:16]}…); move the wrong one away"
        )
    return public, former


def _refuse_existing(files: Iterable[Path], advice: str) -> None:
    there = [str(path) for path in files if path.exists()]
    if there:
        more = f" and {len(there) - 3} more" if len(there) > 3 else ""
        raise ConfigError(f"{', '.join(there[:3])}{more} exist{'s' if len(there) == 1 else ''} already; {advice}")


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
