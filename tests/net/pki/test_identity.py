"""Identities in real handshakes of gRPC on loopback, and read from folders; the references are gRPC's own TLS, and what
was written on purpose to be right or wrong."""

from __future__ import annotations

import hashlib
import ssl
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc import aio

from dimat.errors import ConfigError, SecurityError
from dimat.net.pki.authority import make_certificate, make_key
from dimat.net.pki.certificates import check_certificate, tls_name
from dimat.net.pki.identity import Identity, agent_of, load_identity
from dimat.net.pki.key_files import write_file, write_key
from tests.net.keys import PEM, Authority

pytestmark = pytest.mark.anyio
EXPIRED = -20 / (24 * 60)
"""Days: a certificate that ended 20 minutes ago."""


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@asynccontextmanager
async def serving(credentials: grpc.ServerCredentials) -> AsyncGenerator[str]:
    """Serve one method that tells callers who they are; gives the address."""

    async def whoami(_: bytes, context: aio.ServicerContext[Any, Any]) -> bytes:
        return repr(agent_of(context.auth_context())).encode()

    server = aio.server()
    method = grpc.unary_unary_rpc_method_handler(whoami)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Who", {"AmI": method}),))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def whoami(address: str, credentials: grpc.ChannelCredentials | None, server: str) -> str:
    """Dial an address for an agent, and return who the server says is calling."""
    options = [("grpc.ssl_target_name_override", tls_name(server)), ("grpc.enable_retries", 0)]
    channel = (
        aio.insecure_channel(address) if credentials is None else aio.secure_channel(address, credentials, options)
    )
    async with channel:
        answer: bytes = await channel.unary_unary("/test.Who/AmI")(b"", timeout=60)
    return answer.decode()


async def refused(address: str, credentials: grpc.ChannelCredentials | None, server: str) -> None:
    """Dial an address for an agent, and be refused: by TLS, not by a time limit."""
    with pytest.raises(aio.AioRpcError) as caught:
        await whoami(address, credentials, server)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("name", ["lab-a", "Lab_A.2", "Лаборатория-β", "実験室", "a" * 64, "-".join("ab") * 20 + "-"])
async def test_both_sides_learn_who_the_other_is(authority: Authority, name: str) -> None:
    server, client = authority.issue(name), authority.issue("lab-b")
    async with serving(server.server_credentials()) as address:
        assert await whoami(address, client.channel_credentials(), name) == "'lab-b'"
    async with serving(client.server_credentials()) as address:
        assert await whoami(address, server.channel_credentials(), "lab-b") == repr(name)


async def test_clients_that_get_no_connection(authority: Authority) -> None:
    """No certificate, no TLS, a certificate of another CA (that trusts ours), one that has expired, a CA's own
    certificate, and one that an agent issued with its own key."""
    server, member, other = authority.issue("lab-a"), authority.issue("lab-b"), Authority()
    authority_itself = Identity("tests", authority.pem, authority.pem, authority.key)
    key = make_key()
    own = make_certificate_of(member, "lab-c", key)
    async with serving(server.server_credentials()) as address:
        await refused(address, grpc.ssl_channel_credentials(root_certificates=authority.pem), "lab-a")
        await refused(address, None, "lab-a")
        await refused(address, other.issue("lab-b", ca=authority.pem).channel_credentials(), "lab-a")
        await refused(address, authority.issue("lab-b", days=EXPIRED).channel_credentials(), "lab-a")
        await refused(address, authority_itself.channel_credentials(), "lab-a")
        chain = Identity("lab-c", own + member.certificate, authority.pem, key)
        await refused(address, chain.channel_credentials(), "lab-a")
        assert await whoami(address, member.channel_credentials(), "lab-a") == "'lab-b'"
    with pytest.raises(SecurityError, match="was not issued by this collaboration's CA"):
        check_certificate(Identity("lab-c", own, authority.pem, key).certificate_der, authority.pem, "lab-c")


async def test_servers_that_clients_turn_away_from(authority: Authority) -> None:
    """Another agent than was dialled, another CA's, an expired one, and one that an agent issued. With a CA's own
    certificate, which may sign nothing but certificates, gRPC does not even listen."""
    client, other = authority.issue("lab-b"), Authority()
    member = authority.issue("lab-c")
    key = make_key()
    own = make_certificate_of(member, "lab-a", key)
    for server in (
        member,
        other.issue("lab-a", ca=authority.pem),
        authority.issue("lab-a", days=EXPIRED),
        Identity("lab-a", own + member.certificate, authority.pem, key),
    ):
        async with serving(server.server_credentials()) as address:
            await refused(address, client.channel_credentials(), "lab-a")
    with pytest.raises(RuntimeError, match="bind"):
        async with serving(Identity("lab-a", authority.pem, authority.pem, authority.key).server_credentials()):
            pass


async def test_while_a_ca_is_replaced_agents_of_both_get_along() -> None:
    """Two CAs of the same name; each agent trusts both, and has its certificate of one."""
    old, new = Authority("ours"), Authority("ours")
    both = new.pem + old.pem
    a, b = old.issue("lab-a", ca=both), new.issue("lab-b", ca=both)
    async with serving(a.server_credentials()) as address:
        assert await whoami(address, b.channel_credentials(), "lab-a") == "'lab-b'"
    async with serving(b.server_credentials()) as address:
        assert await whoami(address, a.channel_credentials(), "lab-b") == "'lab-a'"
    for identity in (a, b):
        check_certificate(identity.certificate_der, both, identity.name)
    with pytest.raises(SecurityError):
        check_certificate(a.certificate_der, new.pem, "lab-a")


def test_nobody_is_an_agent_without_an_agents_certificate(authority: Authority) -> None:
    """`agent_of` on what gRPC may hand over; that it names agents, the handshakes show."""
    good = authority.issue("lab-a").certificate
    assert agent_of({"x509_pem_cert": [good]}) == "lab-a"
    two = make_certificate(
        authority.certificate, authority.key, "lab-a", [tls_name("lab-b")], make_key().public_key(), 9
    )
    for context in (
        {},
        {"transport_security_type": [b"ssl"], "x509_common_name": [b"lab-a"]},
        {"x509_pem_cert": []},
        {"x509_pem_cert": [b"lab-a"]},
        {"x509_pem_cert": [good[:200]]},
        {"x509_pem_cert": [authority.pem]},
        {"x509_pem_cert": [two.public_bytes(PEM)]},
    ):
        assert agent_of(context) is None


def test_what_is_said_of_an_identity(authority: Authority) -> None:
    """Fingerprint and DER as openssl's conventions have them; the key shows nowhere."""
    identity = authority.issue("lab-a")
    assert repr(identity) == "Identity(name='lab-a')"
    pem = serialization.load_pem_private_key(identity._key_pem, None)
    assert isinstance(pem, ec.EllipticCurvePrivateKey)
    assert pem.private_numbers() == identity.key.private_numbers()
    der = ssl.PEM_cert_to_DER_cert(identity.certificate.decode())
    assert identity.certificate_der == der
    assert identity.fingerprint == hashlib.sha256(der).hexdigest()


def test_checks_come_without_grpc() -> None:
    """The DHT's sidecar imports this module, and neither gRPC nor torch may come with it."""
    code = "import sys, dimat.net.pki.identity; print([m for m in ('grpc', 'torch', 'asyncio') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def put(folder: Path, identity: Identity) -> None:
    write_key(folder / f"{identity.name}.key", identity.key)
    write_file(folder / f"{identity.name}.crt", identity.certificate, 0o644)
    write_file(folder / "ca.crt", identity.ca, 0o644)


@pytest.mark.parametrize("name", ["lab-a", "Läb_A.2"])
def test_an_identity_is_read_as_it_was_written(tmp_path: Path, authority: Authority, name: str) -> None:
    identity = authority.issue(name)
    put(tmp_path, identity)
    loaded = load_identity(tmp_path, name)
    assert replace(loaded, key=identity.key) == identity
    assert loaded.key.private_numbers() == identity.key.private_numbers()
    (tmp_path / f"{name}.key").chmod(0o400)
    assert load_identity(tmp_path, name).name == name


def test_several_cas_are_kept(tmp_path: Path, authority: Authority) -> None:
    both = Authority().pem + authority.pem
    put(tmp_path, authority.issue("lab-a", ca=b"text that openssl puts before\n" + both))
    assert load_identity(tmp_path, "lab-a").ca == both


def _remove(*names: str) -> Callable[[Path, Authority], None]:
    return lambda folder, _: [(folder / name).unlink() for name in names] and None


def _write(name: str, data: bytes) -> Callable[[Path, Authority], None]:
    return lambda folder, _: write_file(folder / name, data, 0o600)


def _certificate(name: str, days: float = 10) -> Callable[[Path, Authority], None]:
    """Put another certificate for the same key in place."""

    def change(folder: Path, authority: Authority) -> None:
        key = load_identity(folder, "lab-a").key.public_key()
        made = make_certificate(authority.certificate, authority.key, name, [], key, days)
        write_file(folder / "lab-a.crt", made.public_bytes(PEM), 0o644)

    return change


def _locked(folder: Path, _: Authority) -> None:
    key = load_identity(folder, "lab-a").key
    locked = serialization.BestAvailableEncryption(b"secret")
    write_file(folder / "lab-a.key", key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, locked), 0o600)


def _curve(folder: Path, _: Authority) -> None:
    write_key(folder / "lab-a.key", ec.generate_private_key(ec.SECP384R1()))


def _directory(folder: Path, _: Authority) -> None:
    (folder / "lab-a.key").unlink()
    (folder / "lab-a.key").mkdir()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_remove("lab-a.key", "lab-a.crt", "ca.crt"), "lacks lab-a.key, lab-a.crt, ca.crt; .*dimat keys request lab-a"),
        (_remove("lab-a.key"), "lacks lab-a.key; .*dimat keys request lab-a --folder"),
        (_remove("lab-a.crt"), "lacks lab-a.crt; .*dimat keys sign lab-a.csr"),
        (_remove("ca.crt"), "lacks ca.crt; ask the organiser"),
        (lambda folder, _: (folder / "lab-a.key").chmod(0o640), r"open to others \(mode 0640\); run: chmod 600 .*key"),
        (lambda folder, _: (folder / "lab-a.key").chmod(0o604), r"open to others \(mode 0604\); run: chmod 600 .*key"),
        (lambda folder, _: write_key(folder / "lab-a.key", make_key()), "lab-a.key is not the key of .*lab-a.crt"),
        (_certificate("lab-b"), "is that of another agent: 'lab-b'"),
        (_certificate("lab-a", days=EXPIRED), "expired at .*; renew it"),
        (lambda folder, _: write_file(folder / "ca.crt", Authority().pem, 0o644), "not issued by this collaboration"),
        (lambda folder, _: write_file(folder / "ca.crt", (folder / "lab-a.crt").read_bytes(), 0o644), "may not issue"),
        (_write("lab-a.key", b"garbage"), "lab-a.key is not a private key in PEM"),
        (_write("lab-a.key", b""), "lab-a.key is not a private key in PEM"),
        (_write("lab-a.crt", b"\xff\x00garbage"), "lab-a.crt cannot be read"),
        (_write("ca.crt", b"garbage"), "cannot be read"),
        (_write("ca.crt", b"x" * (2**20 + 1)), "too long"),
        (_locked, "locked with a passphrase"),
        (_curve, "not a P-256 key"),
        (_directory, "cannot read .*lab-a.key: Is a directory"),
    ],
)
def test_what_is_not_an_identity(
    tmp_path: Path, authority: Authority, change: Callable[[Path, Authority], None], says: str
) -> None:
    """Each in one line, with the exit code of security."""
    put(tmp_path, authority.issue("lab-a"))
    load_identity(tmp_path, "lab-a")
    change(tmp_path, authority)
    with pytest.raises(SecurityError, match=says) as caught:
        load_identity(tmp_path, "lab-a")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


def test_missing_keys_in_an_organisers_folder(tmp_path: Path, authority: Authority) -> None:
    """Where the CA is at hand, the advice is to issue; a folder with a blank in its name is quoted."""
    folder = tmp_path / "our keys"
    put(folder, authority.issue("lab-a"))
    write_key(folder / "ca.key", authority.key)
    with pytest.raises(SecurityError, match=r"dimat keys issue lab-b --folder '.*our keys'$"):
        load_identity(folder, "lab-b")
    (folder / "lab-a.crt").unlink()
    with pytest.raises(SecurityError, match="dimat keys issue lab-a --renew --folder"):
        load_identity(folder, "lab-a")


@pytest.mark.parametrize("name", ["../lab-a", "", "ca", "CA", "a/b", "é" * 33])
def test_names_that_no_agent_has(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="agent name"):
        load_identity(tmp_path, name)


def make_certificate_of(issuer: Identity, name: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """Make a certificate with an agent's key in the place of a CA's."""
    certificate = x509.load_pem_x509_certificate(issuer.certificate)
    return make_certificate(certificate, issuer.key, name, [], key.public_key(), 9).public_bytes(PEM)
