"""`dimat keys …`: commands as they are typed, in a folder of their own. References: the identities that an agent reads
from what they wrote, the modes of the files on the disk, and openssl."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from dimat.cli import main
from dimat.errors import DataError, SecurityError
from dimat.net.pki.authority import make_key, make_request
from dimat.net.pki.identity import load_identity
from dimat.net.pki.key_files import write_file, write_key
from tests.net.keys import Authority

MAP = """
graph = "complete"
[[agents]]
name = "lab-a"
addresses = ["lab-a.example.org:7300", "10.8.0.3:7300"]
[[agents]]
name = "Läb_B"
addresses = ["lab-b.example.org:7300"]
[[agents]]
name = "lab-c"
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "map.toml").write_text(MAP, encoding="utf-8")
    return tmp_path


def run(command: str) -> int:
    return main(["keys", *command.split()])


def shown(capsys: pytest.CaptureFixture[str], what: str = "") -> tuple[int, dict[str, dict[str, Any]]]:
    """Return the exit code of `dimat keys show … --json`, and what it says by file and name."""
    capsys.readouterr()
    code = run(f"show {what} --json")
    return code, {f"{Path(e['file']).name}:{e['name']}": e for e in json.loads(capsys.readouterr().out)["keys"]}


def mode(path: str) -> int:
    return stat.S_IMODE(Path(path).stat().st_mode)


def contents() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(".").rglob("*")) if path.is_file()}


def test_an_organiser_issues_all(capsys: pytest.CaptureFixture[str]) -> None:
    """With any umask a private key is its owner's alone; each agent of the map can start with what was made."""
    before = os.umask(0)
    try:
        assert run("init-ca --name ours") == 0
        assert run("issue --map map.toml") == 0
    finally:
        os.umask(before)
    assert {path.name for path in Path("keys").iterdir()} == {
        f"{name}.{end}" for name in ("ca", "lab-a", "Läb_B", "lab-c") for end in ("key", "crt")
    }
    assert mode("keys") == 0o700
    for path in Path("keys").iterdir():
        assert mode(str(path)) == (0o600 if path.suffix == ".key" else 0o644)
    for name in ("lab-a", "Läb_B", "lab-c"):
        assert load_identity("keys", name).name == name
    said = capsys.readouterr()
    assert said.out == ""
    assert "certificate of Läb_B at lab-b.example.org, until" in said.err
    code, found = shown(capsys)
    assert code == 0
    assert list(found) == ["ca.crt:ours", "Läb_B.crt:Läb_B", "lab-a.crt:lab-a", "lab-c.crt:lab-c"]
    lab = found["lab-a.crt:lab-a"]
    assert lab["fingerprint"] == load_identity("keys", "lab-a").fingerprint
    assert lab["hosts"] == ["lab-a.example.org", "10.8.0.3"]
    assert (lab["kind"], lab["issuer"], lab["key"], lab["days_left"]) == ("agent", "ours", "here", 364)
    assert (lab["faults"], lab["warnings"]) == ([], [])
    assert (found["ca.crt:ours"]["kind"], found["ca.crt:ours"]["key"]) == ("ca", "here")
    assert found["ca.crt:ours"]["days_left"] == 3649
    assert found["lab-c.crt:lab-c"]["hosts"] == []


def test_a_lab_keeps_its_key(capsys: pytest.CaptureFixture[str]) -> None:
    """The private key is never in the organiser's folder, and both are shown the same fingerprint of it."""
    assert run("init-ca --folder organiser") == 0
    assert (
        run("request lab-a --addresses lab-a.example.org:7300,10.0.0.1:7300 --addresses [::1]:7300 --folder lab") == 0
    )
    fingerprint = capsys.readouterr().err.split("its key (sha256): ")[2].split()[0]
    assert mode("lab/lab-a.key") == 0o600
    shutil.copy("lab/lab-a.csr", "lab-a.csr")
    assert run("sign lab-a.csr --folder organiser --days 90") == 0
    told = capsys.readouterr().err
    assert "lab-a at lab-a.example.org, 10.0.0.1, ::1, until" in told
    assert fingerprint in told
    for name in ("lab-a.crt", "ca.crt"):
        shutil.copy(f"organiser/{name}", f"lab/{name}")
    load_identity("lab", "lab-a")
    assert sorted(path.name for path in Path("organiser").iterdir()) == ["ca.crt", "ca.key", "lab-a.crt"]
    assert shown(capsys, "organiser")[1]["lab-a.crt:lab-a"]["key"] == "not here"
    code, found = shown(capsys, "lab")
    assert (code, found["lab-a.crt:lab-a"]["key"], found["lab-a.crt:lab-a"]["days_left"]) == (0, "here", 89)
    assert "ca.key" not in str(contents().keys() - {"organiser/ca.key"})


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_a_request_that_openssl_made(capsys: pytest.CaptureFixture[str]) -> None:
    """A lab may make its key and request with tools that it trusts; the agent takes them all the same."""
    assert run("init-ca") == 0
    subprocess.run(
        [
            *("openssl", "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", "keys/lab-a.key", "-out", "lab-a.csr", "-subj", "/CN=lab-a"),
            *("-addext", "subjectAltName=DNS:lab-a.agent.dimat.internal,DNS:lab-a.example.org"),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    Path("keys/lab-a.key").chmod(0o600)
    assert run("sign lab-a.csr") == 0
    load_identity("keys", "lab-a")
    assert shown(capsys)[1]["lab-a.crt:lab-a"]["hosts"] == ["lab-a.example.org"]


def test_renewal_keeps_the_key_and_the_addresses(capsys: pytest.CaptureFixture[str]) -> None:
    """Of agents whose key is here and of those whose key is not; with new addresses where they are given."""
    assert run("init-ca") == 0
    assert run("issue lab-a --addresses old.example.org:7300 --days 20") == 0
    assert run("request lab-b --addresses lab-b.example.org:7300 --folder lab") == 0
    assert run("sign lab/lab-b.csr --days 20") == 0
    before = shown(capsys)[1]
    assert before["lab-a.crt:lab-a"]["warnings"] == ["ends soon, renew it"]
    key = Path("keys/lab-a.key").read_bytes()
    assert run("issue lab-a lab-b --renew") == 0
    after = shown(capsys)[1]
    for entry, host in (("lab-a.crt:lab-a", "old.example.org"), ("lab-b.crt:lab-b", "lab-b.example.org")):
        assert after[entry]["key_fingerprint"] == before[entry]["key_fingerprint"]
        assert after[entry]["fingerprint"] != before[entry]["fingerprint"]
        assert (after[entry]["hosts"], after[entry]["days_left"], after[entry]["warnings"]) == ([host], 364, [])
    assert Path("keys/lab-a.key").read_bytes() == key
    assert not Path("keys/lab-b.key").exists()
    assert run("issue lab-a --renew --addresses new.example.org:7300") == 0
    assert run("request lab-b --renew --addresses new-b.example.org:7300 --folder lab") == 0
    assert run("sign lab/lab-b.csr --renew") == 0
    after = shown(capsys)[1]
    assert after["lab-a.crt:lab-a"]["hosts"] == ["new.example.org"]
    assert after["lab-b.crt:lab-b"]["hosts"] == ["new-b.example.org"]
    assert after["lab-b.crt:lab-b"]["key_fingerprint"] == before["lab-b.crt:lab-b"]["key_fingerprint"]
    load_identity("keys", "lab-a")


def test_an_expired_certificate_is_renewed(capsys: pytest.CaptureFixture[str]) -> None:
    authority = Authority(days=365)
    identity = authority.issue("lab-a", days=-0.02, hosts=["lab-a.example.org"])
    write_key(Path("keys/ca.key"), authority.key)
    for name, data in (("ca", authority.pem), ("lab-a", identity.certificate)):
        write_file(Path(f"keys/{name}.crt"), data, 0o644)
    code, found = shown(capsys)
    assert (code, found["lab-a.crt:lab-a"]["days_left"]) == (4, -1)
    assert "expired at" in found["lab-a.crt:lab-a"]["faults"][0]
    assert run("issue lab-a --renew --days 90") == 0
    code, found = shown(capsys)
    assert (code, found["lab-a.crt:lab-a"]["days_left"]) == (0, 89)
    assert found["lab-a.crt:lab-a"]["hosts"] == ["lab-a.example.org"]


def refuse(capsys: pytest.CaptureFixture[str], command: str, code: int, says: str) -> None:
    """Check that a command fails in one line, and changes no file."""
    before = contents()
    capsys.readouterr()
    assert run(command) == code, command
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("dimat: ")
    assert said.err.count("\n") == 1
    assert says in said.err
    assert contents() == before


def test_nothing_is_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    """Of several agents none is made where one is there."""
    assert run("init-ca") == 0
    assert run("issue lab-a") == 0
    assert run("request lab-b") == 0
    refuse(capsys, "init-ca", 2, "keys/ca.key, keys/ca.crt exist already")
    refuse(capsys, "issue lab-c lab-a", 2, "keys/lab-a.key, keys/lab-a.crt exist already; --renew")
    refuse(capsys, "issue --map map.toml", 2, "--renew")
    refuse(capsys, "issue lab-b", 2, "keys/lab-b.key exists already")
    refuse(capsys, "request lab-b", 2, "keys/lab-b.key, keys/lab-b.csr exist already")
    assert run("sign keys/lab-b.csr") == 0
    refuse(capsys, "sign keys/lab-b.csr", 2, "keys/lab-b.crt exists already; --renew")
    Path("keys/ca.key").unlink()
    refuse(capsys, "init-ca", 2, "keys/ca.crt exists already")


def test_commands_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    refuse(capsys, "issue lab-a", 4, "no keys/ca.key: only the organiser's folder has a CA")
    refuse(capsys, "sign lab-a.csr", 4, "cannot read lab-a.csr")
    refuse(capsys, "show", 2, "keys")
    assert run("init-ca") == 0
    for command, says in (
        ("issue", "name the agents"),
        ("issue lab-a lab-b --addresses a:1", "one agent"),
        ("issue lab-a --addresses a:1 --map map.toml", "give --addresses or --map, not both"),
        ("issue lab-x --map map.toml", "map.toml: no agent 'lab-x' in the topology; did you mean 'lab-"),
        ("issue lab-a --addresses lab-b.agent.dimat.internal:7300", "reserved for agents' identities"),
        ("issue lab-a --addresses nonsense:x", "not host:port"),
        ("issue ../lab-a", "may only hold letters"),
        ("issue ca", "choose another name"),
        ("issue lab-a --renew", "nothing to renew for 'lab-a'"),
        ("issue lab-a --days 0", "days"),
        ("request " + "é" * 40, "too long"),
        ("show map.toml", "no folder of keys"),
        ("show keys/lab-a.crt", "no file keys/lab-a.crt"),
    ):
        refuse(capsys, command, 2, says)


def test_requests_that_an_organiser_does_not_sign(capsys: pytest.CaptureFixture[str]) -> None:
    """A request under another agent's file name, one with another key than the agent has, and garbage."""
    assert run("init-ca") == 0
    assert run("request lab-a --folder lab") == 0
    shutil.copy("lab/lab-a.csr", "lab-b.csr")
    refuse(capsys, "sign lab-b.csr", 4, "lab-b.csr asks for a certificate of 'lab-a', not of 'lab-b'")
    refuse(capsys, "sign lab/lab-a.csr --name lab-b", 4, "asks for a certificate of 'lab-a', not of 'lab-b'")
    refuse(capsys, "sign lab/lab-a.csr --name ../b", 2, "may only hold letters")
    assert run("sign lab-b.csr --name lab-a") == 0
    assert not Path("keys/lab-b.crt").exists()
    other = make_request(make_key(), "lab-a", []).public_bytes(Encoding.PEM)
    write_file(Path("lab-a.csr"), other, 0o644)
    refuse(capsys, "sign lab-a.csr --renew", 4, "lab-a.csr has another key than keys/lab-a.crt")
    Path("lab-c.csr").write_bytes(b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n")
    refuse(capsys, "sign lab-c.csr", 4, "lab-c.csr: request cannot be read")


def test_keys_that_do_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    """`show` says what is wrong with each, with exit code 4, and renewal will have none of it."""
    assert run("init-ca") == 0
    assert run("issue lab-a lab-b lab-c lab-d") == 0
    write_key(Path("keys/lab-a.key"), make_key())
    Path("keys/lab-b.key").chmod(0o644)
    write_file(Path("keys/lab-c.crt"), Authority().issue("lab-c").certificate, 0o644)
    shutil.copy("keys/lab-d.crt", "keys/lab-e.crt")
    write_key(Path("keys/lab-f.key"), make_key())
    write_file(Path("keys/lab-g.csr"), b"garbage", 0o644)
    code, found = shown(capsys)
    assert code == 4
    faults = {name: " ".join(entry["faults"]) for name, entry in found.items()}
    assert "keys/lab-a.key is not its key" in faults["lab-a.crt:lab-a"]
    assert "run: chmod 600 keys/lab-b.key" in faults["lab-b.crt:lab-b"]
    assert "not issued by this collaboration's CA" in faults["lab-c.crt:lab-c"]
    assert faults["lab-d.crt:lab-d"] == ""
    assert "another agent: 'lab-d'" in faults["lab-e.crt:lab-d"]
    assert faults["lab-f.key:lab-f"] == ""
    assert found["lab-f.key:lab-f"]["warnings"] == ["has neither a certificate nor a request beside it"]
    assert "cannot be read" in faults["lab-g.csr:lab-g"]
    assert run("show") == 4
    text = capsys.readouterr().out
    assert "fault: keys/lab-a.crt: keys/lab-a.key is not its key" in text
    assert "warning: keys/lab-f.key" in text
    refuse(capsys, "issue lab-a --renew", 4, "keys/lab-a.key is not the key of keys/lab-a.crt")
    refuse(capsys, "issue lab-c --renew", 4, "not issued by this collaboration's CA")
    refuse(capsys, "issue lab-e --renew", 4, "keys/lab-e.crt is not the certificate of 'lab-e'")
    assert shown(capsys, "keys/lab-d.crt")[0] == 0
    write_key(Path("keys/ca.key"), make_key())
    refuse(capsys, "issue lab-h", 4, "keys/ca.key is not the key of keys/ca.crt")
    assert "keys/ca.key is not its key" in shown(capsys)[1]["ca.crt:dimat collaboration"]["faults"][0]


def test_text_that_a_certificate_brings_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    """Names in certificates of others are shown spelled out."""
    key, name = (
        make_key(),
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "evil\N{RIGHT-TO-LEFT OVERRIDE}\x1b[2J")]),
    )
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 7, now, now + timedelta(days=90))
    write_file(Path("keys/lab-a.crt"), builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM), 0o644)
    assert run("show") == 0
    shown = capsys.readouterr().out
    assert "evil" in shown
    assert "\N{RIGHT-TO-LEFT OVERRIDE}" not in shown
    assert "\x1b" not in shown


def test_a_file_that_cannot_be_written_leaves_nothing_behind() -> None:
    """Where the last step fails, here because a folder is in the way, no half or temporary file stays."""
    Path("keys/lab-a.key/inside").mkdir(parents=True)
    with pytest.raises(DataError, match=r"cannot write keys/lab-a\.key: Is a directory"):
        write_key(Path("keys/lab-a.key"), make_key())
    assert os.listdir("keys") == ["lab-a.key"]


def test_an_agents_files_in_a_folder_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    """All that an agent needs and no more, whatever becomes of the organiser's folder; renewed where it lies."""
    assert run("init-ca") == 0
    assert run("issue lab-a --addresses lab-a.example.org:7300 --out lab-a") == 0
    assert "lab-a/lab-a.key, lab-a/lab-a.crt, lab-a/ca.crt" in capsys.readouterr().err
    assert sorted(os.listdir("lab-a")) == ["ca.crt", "lab-a.crt", "lab-a.key"]
    assert sorted(os.listdir("keys")) == ["ca.crt", "ca.key"]
    first = load_identity("lab-a", "lab-a")
    refuse(capsys, "issue lab-a --out lab-a", 2, "lab-a/lab-a.key, lab-a/lab-a.crt exist already")
    assert run("issue lab-a --out lab-a --renew") == 0
    renewed = load_identity("lab-a", "lab-a")
    assert renewed.fingerprint != first.fingerprint
    assert renewed.key.private_numbers() == first.key.private_numbers()
    assert shown(capsys, "lab-a/lab-a.crt")[1]["lab-a.crt:lab-a"]["hosts"] == ["lab-a.example.org"]
    assert run("init-ca --folder other") == 0
    refuse(capsys, "issue lab-b --folder other --out lab-a", 4, "lab-a/ca.crt is from another CA than other/ca.crt")
    both = Path("other/ca.crt").read_bytes() + Path("keys/ca.crt").read_bytes()
    Path("lab-a/ca.crt").write_bytes(both)
    assert run("issue lab-b --folder other --out lab-a") == 0
    assert Path("lab-a/ca.crt").read_bytes() == both
    load_identity("lab-a", "lab-b")


@pytest.fixture
def disk(folder: Path) -> Iterator[Callable[[int], None]]:
    """A file system of its own at `disk`; called with a number of KiB it has that size."""
    (folder / "disk").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", "disk"], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield lambda kib: subprocess.run(["mount", "-o", f"remount,size={kib}k", "disk"], check=True) and None
    finally:
        subprocess.run(["umount", str(folder / "disk")], check=True)


def test_a_full_disk_leaves_nothing_in_the_way(capsys: pytest.CaptureFixture[str], disk: Callable[[int], None]) -> None:
    """Each command fails at its second file or later, takes back the ones before, and works once there is room. A file
    takes a page of 4 KiB here."""
    refuse(capsys, "init-ca --folder disk", 5, "cannot write disk/ca.crt: No space left on device")
    disk(8)
    assert run("init-ca --folder disk") == 0
    disk(20)
    refuse(capsys, "issue lab-a lab-b --folder disk", 5, "cannot write disk/lab-b.crt: No space left on device")
    assert sorted(os.listdir("disk")) == ["ca.crt", "ca.key"]
    disk(24)
    assert run("issue lab-a lab-b --folder disk") == 0
    load_identity("disk", "lab-b")
    disk(28)
    refuse(capsys, "request lab-c --folder disk", 5, "cannot write disk/lab-c.csr: No space left on device")
    refuse(capsys, "issue lab-c --folder disk", 5, "cannot write disk/lab-c.crt: No space left on device")
    assert run("issue lab-a --folder disk --renew") == 0
    refuse(capsys, "issue lab-b lab-a lab-x --folder disk --renew", 2, "nothing to renew for 'lab-x'")
    disk(24)
    refuse(capsys, "issue lab-b --folder disk --renew", 5, "cannot write disk/lab-b.crt: No space left on device")
    load_identity("disk", "lab-b")


def test_an_agent_that_is_asked_to_start_without_keys(capsys: pytest.CaptureFixture[str]) -> None:
    """What the agent says leads, command by command, to keys with which it can start."""
    with pytest.raises(SecurityError) as caught:
        load_identity("keys", "lab-a")
    assert "(an organiser begins with: dimat keys init-ca --folder keys)" in str(caught.value)
    assert run("init-ca --folder keys") == 0
    with pytest.raises(SecurityError) as caught:
        load_identity("keys", "lab-a")
    assert str(caught.value).endswith("dimat keys issue lab-a --folder keys")
    assert run("issue lab-a --folder keys") == 0
    load_identity("keys", "lab-a")


def test_help_comes_without_cryptography() -> None:
    """`dimat --help` has to answer at once."""
    code = (
        "import sys, dimat.cli; print([m for m in ('cryptography', 'torch', 'grpc', 'networkx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
