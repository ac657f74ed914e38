"""The page on keys: its commands run as they stand there, at an organiser's and a lab's machine (two folders), and
agents' identities are read from what comes out."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dimat.errors import SecurityError
from dimat.net.pki.certificates import check_certificate
from dimat.net.pki.identity import Identity, load_identity
from tests.forks import program

pytestmark = pytest.mark.page

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")
LABS = ("lab-a", "lab-b", "lab-c", "lab-d", "lab-e")


def blocks() -> list[tuple[str, str]]:
    """Return (place, commands) of each block of the page, in order."""
    return re.findall(r"^```\n# at (?:the )?([\w-]+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


class Places:
    """Folders that stand for machines, with `dimat` on the path, and the network maps of the project."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        program(folder / "bin" / "dimat", "-m", "dimat.cli", env={"PYTHONPATH": str(ROOT)})
        self._left = blocks()

    def at(self, name: str) -> Path:
        place = self.folder / name
        if not place.exists():
            place.mkdir()
            (place / "topology").symlink_to(ROOT / "topology")
        return place

    def run(self, place: str) -> str:
        """Run the page's next block, which has to be of that place; return what it says."""
        named, commands = self._left.pop(0)
        assert named == place
        done = subprocess.run(
            ["bash", "-euc", commands],
            cwd=self.at(place),
            env={"PATH": f"{self.folder / 'bin'}:/usr/bin:/bin", "LANG": "C.UTF-8"},
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, f"{commands}\n{done.stderr}"
        return done.stdout + done.stderr

    def send(self, source: str, target: str) -> None:
        """Carry a file from one machine to another: PLACE/FILE."""
        (self.folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.folder / source, self.folder / target)

    def done(self) -> bool:
        return not self._left


def trusted(identity: Identity, ca: Path) -> bool:
    try:
        check_certificate(identity.certificate_der, ca.read_bytes(), identity.name)
    except SecurityError:
        return False
    return True


def test_every_block_says_where_it_runs() -> None:
    assert len(blocks()) == PAGE.count("```") / 2 == 9


def test_the_commands_of_the_page(tmp_path: Path) -> None:
    """From the first CA to its successor, each step with what the page says of it."""
    places = Places(tmp_path)
    keys, new = tmp_path / "organiser/keys", tmp_path / "organiser/new-keys"
    listed = places.run("organiser")
    assert all(name in listed for name in LABS[:3])
    places.run("organiser")  # lab-e
    first = {name: load_identity(keys, name) for name in ("lab-a", "lab-b", "lab-c", "lab-e")}

    told = places.run("lab-d")
    (fingerprint,) = re.findall(r"sha256\): (\w{64})", told)
    places.send("lab-d/keys/lab-d.csr", "organiser/lab-d.csr")
    assert fingerprint in places.run("organiser")
    for name in ("lab-d.crt", "ca.crt"):
        places.send(f"organiser/keys/{name}", f"lab-d/keys/{name}")
    assert fingerprint in places.run("lab-d")
    first["lab-d"] = load_identity(tmp_path / "lab-d/keys", "lab-d")
    assert not (keys / "lab-d.key").exists()

    places.run("organiser")  # renewal
    places.send("organiser/keys/lab-d.crt", "lab-d/keys/lab-d.crt")
    renewed = {name: load_identity(keys, name) for name in ("lab-a", "lab-b", "lab-c")}
    renewed["lab-d"] = load_identity(tmp_path / "lab-d/keys", "lab-d")
    for name, identity in renewed.items():
        assert identity.fingerprint != first[name].fingerprint
        assert identity.key.public_key() == first[name].key.public_key()

    places.run("organiser")  # another CA, trusted beside the old one
    both, only_new = tmp_path / "organiser/both.crt", tmp_path / "organiser/new.crt"
    assert all(trusted(identity, both) and not trusted(identity, only_new) for identity in renewed.values())
    places.send("organiser/both.crt", "lab-d/keys/ca.crt")
    load_identity(tmp_path / "lab-d/keys", "lab-d")
    places.run("organiser")  # its certificates for the same keys
    places.send("organiser/new-keys/lab-d.crt", "lab-d/keys/lab-d.crt")
    moved = load_identity(tmp_path / "lab-d/keys", "lab-d")
    assert moved.key.public_key() == first["lab-d"].key.public_key()
    assert trusted(moved, only_new)
    assert not trusted(moved, keys / "ca.crt")
    listed = places.run("organiser")
    assert all(name in listed for name in LABS)
    assert "fault" not in listed
    assert (new / "ca.crt").read_bytes() == only_new.read_bytes()
    assert places.done()
