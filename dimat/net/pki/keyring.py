"""The folder of keys: makes, renews, requests and signs agents' keys and certificates.

Nothing is overwritten unless a renewal is asked for, and that keeps the key. A file is there whole or not at all, new
files that a command could not finish are taken back, and a private key never lies open to others, not even while it is
written.
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
    """The files that a command made for an agent. `until`: end of the certificate, None for a request."""

    name: str
    hosts: tuple[str, ...]
    key_fingerprint: str
    files: tuple[Path, ...]
    until: datetime | None = None


def init_authority(folder: Path, name: str, days: float) -> KeyFiles:
    """Make a CA's key and certificate in a folder; ConfigError where either is there."""
    _refuse_existing([folder / "ca.key", folder / "ca.crt"], "a second CA belongs into another folder")
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
    """Make keys and certificates for agents, with the CA of the folder; all of them, or none where one cannot be.

    `wanted`: addresses by agent; None keeps those of the certificate that is renewed. `renew`: keep the keys, whether
    they lie here or with the agents, and make new certificates. `out`: where the agents' files lie, if not in the
    CA's folder; it gets the CA's certificate too. ConfigError, SecurityError; DataError where the disk fails.
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
        raise SecurityError(f"{ca_file} is that of another CA than {folder / 'ca.crt'}; choose another folder")
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
    """Make an agent's key and a request for its certificate, which can be shown to anybody.

    `renew`: a new request for the key that is there. ConfigError, SecurityError.
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
    """Make the certificate that a request asks for, with the CA of the folder, into the folder.

    `name`: the agent that has to be asking; None: the one that the file is named after, NAME.csr. `renew`: where the
    agent has a certificate; for the same key only. ConfigError, SecurityError.
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
            f"{file} asks for a certificate of {asked.name!r}, not of {expected!r}; if that is meant: "
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
    """Return the CA of a folder: the certificate in ca.crt that belongs to ca.key. SecurityError where it has none."""
    for path in (folder / "ca.key", folder / "ca.crt"):
        if not path.exists():
            raise SecurityError(f"no {path}: only the organiser's folder has a CA; make one with: dimat keys init-ca")
    key = read_key(folder / "ca.key")
    for certificate in authorities(read_file(folder / "ca.crt")):
        if certificate.public_key() == key.public_key():
            return certificate, key
    raise SecurityError(f"{folder / 'ca.key'} is not the key of {folder / 'ca.crt'}; put back the right one")


def key_fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """Return the SHA-256 of a public key (its DER), in hex: what two people compare by telephone."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(der)
    return digest.finalize().hex()


@contextmanager
def _all_or_none() -> Generator[list[Path]]:
    """Take back the new files in the list where what follows them fails.

    A key without its certificate would be in the way when the command is run again, and no renewal makes a CA's.
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
    """Write an agent's files; those that go with a new key are added to `new`, once they are there."""
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
    """Return the public key and the hosts of an agent that has a key here, a certificate here, or both."""
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
        # as of its first day: a certificate that has expired is what renewal is for
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
