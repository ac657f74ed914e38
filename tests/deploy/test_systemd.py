"""The systemd unit. References: systemd-analyze itself; the datagrams and exit codes of the unit's own ExecStart line,
run as a service manager runs it, under its own system call filter; the score that deploy/README.md states."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dimat.agent.daemon.status_socket import ask
from dimat.cli import main
from tests.agent.bound import bound
from tests.agent.daemon.test_daemon_faults import WIDE, comes_in, widen
from tests.agent.processes import ROOT, Life, Network, network
from tests.deploy.tools import DEPLOY, passes, run, tool
from tests.deploy.unit import UNIT, command, expanded, value, values

AB = ("lab-a", "lab-b")
HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")


# ── the unit as systemd sees it ──────────────────────────────────────────────────────────────────────────────────
def installed(folder: Path) -> Path:
    """Write the unit as an instance, with a program that is there."""
    text = UNIT.read_text(encoding="utf-8").replace("/opt/dimat/bin/dimat", "/bin/true")
    file = folder / "dimat-agent@lab-a.service"
    file.write_text(text)
    return file


def test_systemd_takes_every_line(tmp_path: Path) -> None:
    """Nothing to say about the unit; and a setting that does not exist is seen."""
    analyze = tool("systemd-analyze")
    file = installed(tmp_path)
    words = ("verify", "--man=no", "--recursive-errors=no", file)
    assert passes(analyze, *words) == ""
    file.write_text(file.read_text().replace("ProtectClock=yes", "ProtectClocks=yes"))
    assert "ProtectClocks" in run(analyze, *words).stderr


def test_exposure_is_the_stated_one(tmp_path: Path) -> None:
    """`systemd-analyze security` gives the score of deploy/README.md. Other versions weigh other things, so a tenth or
    two apart is theirs; 2.0 is the most that is let pass."""
    analyze = tool("systemd-analyze")
    said = passes(analyze, "security", "--offline=true", "--no-pager", "--threshold=20", installed(tmp_path))
    (score,) = re.findall(r"exposure level for \S+: ([\d.]+)", said)
    (stated,) = re.findall(r"exposure[^.]*?\*\*([\d.]+)\*\*", (DEPLOY / "README.md").read_text(encoding="utf-8"))
    assert abs(float(score) - float(stated)) < 0.25


def test_what_gpus_and_the_jit_need_is_left() -> None:
    for key in ("MemoryDenyWriteExecute", "PrivateDevices", "ProcSubset", "NoExecPaths"):
        assert not values(key)
    assert value("DevicePolicy") == "closed"
    assert {"char-nvidia* rw", "char-drm rw", "char-kfd rw"} == set(values("DeviceAllow"))


# ── the unit as the agent sees it ────────────────────────────────────────────────────────────────────────────────
def test_the_unit_runs_the_command_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """The unit's command line is taken by `dimat`, up to the file that is not there; it is a notifying service that is
    started again after a crash, and not after what only a person can mend."""
    specifiers = {"i": "lab-a", "S": "/var/lib", "d": "/run/credentials/dimat-agent@lab-a.service"}
    words = command(specifiers, {"/etc/dimat": Path("/nowhere")})
    assert words[0].endswith("/dimat")
    assert main(words[1:]) == 2
    assert "no file /nowhere/lab-a.toml" in capsys.readouterr().err
    assert (value("Type"), value("Restart")) == ("notify", "on-failure")
    assert value("SuccessExitStatus") == "143"
    assert set(value("RestartPreventExitStatus").split()) == {"2", "4"}
    assert "-HUP" in value("ExecReload")
    assert int(value("WatchdogSec")) > 0


class Manager:
    """Does for one agent what systemd does for the unit: state folder, credentials, notify socket, ExecStart.

    `told`: the datagrams that came, in order."""

    def __init__(self, net: Network, name: str, *, watchdog_s: float, driver: tuple[str, ...] = ()) -> None:
        self.net = net
        self.told: list[str] = []
        folder = net.folder / "manager"
        state, self.credentials = folder / "lib", folder / "credentials"
        (state / "dimat").mkdir(parents=True)
        (state / "dimat" / name).symlink_to(net.folder / name, target_is_directory=True)
        (net.folder / name).mkdir(mode=0o700)
        specifiers = {"i": name, "S": str(state), "d": str(self.credentials)}
        self._hand_over(specifiers)
        config = folder / "etc"
        config.mkdir()
        for file in ("agents.toml", "map.toml", "tiny_task.py"):
            shutil.copy(net.folder / file, config / file.replace("agents", name))
        words = command(specifiers, {"/etc/dimat": config})[1:]
        words += ["--set", f"agent.listen={net.address(name)}"]  # the map's port, and not for other machines here
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(folder / "notify"))
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()
        environment = {
            "NOTIFY_SOCKET": str(folder / "notify"),
            "CREDENTIALS_DIRECTORY": str(self.credentials),
            "WATCHDOG_USEC": str(int(watchdog_s * 1e6)),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        said = net.folder / f"{name}.unit.err"
        with said.open("wb") as stream:
            process = subprocess.Popen(
                [*bound(*driver, "dimat.cli"), *words],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stream,
            )
        self.life = Life(name, process, said)
        net.lives.append(self.life)

    def _hand_over(self, specifiers: dict[str, str]) -> None:
        """LoadCredential=: copies that may be read only, in a folder that may be read only. A copy has root's access
        list with an entry for the service's user where the file system has such lists; its mode shows 0440 then."""
        self.credentials.mkdir(mode=0o700)
        for line in values("LoadCredential"):
            credential, source = expanded(line, specifiers).split(":")
            data = (self.net.folder / source.removeprefix("/etc/dimat/")).read_bytes()
            file = self.credentials / credential
            file.write_bytes(data)
            file.chmod(0o400)
            with_access_list(file, user=os.geteuid())
        self.credentials.chmod(0o500)

    def _listen(self) -> None:
        while (message := self._socket.recv(4096).decode()) != "over":
            self.told.append(message)

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"over", self._socket.getsockname())
        self._listener.join()
        self._socket.close()
        self.credentials.chmod(0o700)


def with_access_list(file: Path, user: int) -> None:
    """Give a user the right to read a file, as `setfacl -m u:USER:r` does; skips the test where that cannot be."""
    none = 0xFFFFFFFF
    entries = [(0x01, 4, none), (0x02, 4, user), (0x04, 0, none), (0x10, 4, none), (0x20, 0, none)]
    data = b"\x02\0\0\0" + b"".join(
        kind.to_bytes(2, "little") + rights.to_bytes(2, "little") + who.to_bytes(4, "little")
        for kind, rights, who in entries
    )
    try:
        os.setxattr(file, "system.posix_acl_access", data)
    except OSError as error:
        pytest.skip(f"no access lists in {file.parent}: {error}")


@contextmanager
def managed(net: Network, name: str, *, watchdog_s: float = 0.4, driver: tuple[str, ...] = ()) -> Iterator[Manager]:
    manager = Manager(net, name, watchdog_s=watchdog_s, driver=driver)
    try:
        yield manager
    finally:
        net.end()
        manager.close()


@pytest.mark.live
def test_a_stop_by_the_manager(tmp_path: Path, free_ports: list[int]) -> None:
    """READY, and WATCHDOG again and again while it trains; SIGTERM during a transfer: STOPPING, the transfer ends, the
    peer has the whole snapshot, and the exit code is the one that the unit takes for success. Keys are credentials."""
    schedule = "rounds = 0\nround_deadline_s = 60\njoin_wait_s = 3"
    tables = {
        "schedule": schedule,
        "train": WIDE,
        "exchange": "idle_s = 60\nrate_limit_mb_s = 0.3",
        "agent": "founder = true\ndrain_s = 60",
    }
    with network(tmp_path, AB, free_ports, **tables) as net:
        widen(net)
        with managed(net, "lab-a") as manager:
            net.start("lab-b")
            net.until(lambda: comes_in(net, "lab-b", "lab-a"), "lab-b has begun to fetch")
            before = len(net.events("lab-b", "SnapshotFetched", peer="lab-a"))
            (round_,) = {event["round"] for event in net.events("lab-a", "Published")[-1:]}
            assert manager.told.count("READY=1") == 1
            net.until(lambda: manager.told.count("WATCHDOG=1") > 2, "the watchdog is fed")
            assert ask(tmp_path / "lab-a")["secure"] is True
            manager.life.signal(signal.SIGTERM)
            assert manager.life.wait() == int(value("SuccessExitStatus"))
            net.until(lambda: "STOPPING=1" in manager.told, "STOPPING=1")
            assert net.events("lab-a", "AgentLeft")[-1]["reason"] == "stopped"
            fetched = net.wait_for("lab-b", "SnapshotFetched", before + 1, peer="lab-a")
            assert fetched[before]["round"] == round_
            ready, stopping = manager.told.index("READY=1"), manager.told.index("STOPPING=1")
            assert ready < stopping
            assert any(message.startswith("STATUS=round ") for message in manager.told[ready:stopping])


def test_keys_that_others_can_read_are_no_credentials(tmp_path: Path, free_ports: list[int]) -> None:
    """An access list that lets somebody else in is refused with the code that prevents a restart."""
    with network(tmp_path, AB, free_ports) as net:
        key = tmp_path / "keys" / "lab-a.key"
        with_access_list(key, user=os.geteuid() + 1234)
        life = net.start("lab-a")
        assert str(life.wait()) in value("RestartPreventExitStatus").split()
        assert "lab-a.key is open to others (mode 0640)" in life.text() or "(mode 0440)" in life.text()


# ── the unit's filter of system calls ────────────────────────────────────────────────────────────────────────────
def numbers() -> dict[str, int]:
    """Return the system calls of this machine by name, from the kernel's header."""
    if platform.machine() != "x86_64" or not HEADER.exists():
        pytest.skip(f"needs x86-64 and {HEADER}")
    return {name: int(number) for name, number in re.findall(r"#define __NR_(\w+) (\d+)", HEADER.read_text())}


def members(group: str) -> set[str]:
    """Return the system calls of a group of systemd's, groups within it resolved."""
    lines = passes(tool("systemd-analyze"), "syscall-filter", group).splitlines()[1:]
    words = {line.strip() for line in lines} - {""}
    found = {word for word in words if word[0] not in "@#"}
    return found.union(*(members(word) for word in words if word[0] == "@"))


def allowed() -> set[str]:
    """Return what the unit's SystemCallFilter= lines allow, in their order; @default always is."""
    found = members("@default")
    for line in values("SystemCallFilter"):
        named = {name for word in line.lstrip("~").split() for name in (members(word) if word[0] == "@" else {word})}
        found = found - named if line[0] == "~" else found | named
    return found


@pytest.mark.live
def test_an_agent_runs_under_the_filter(tmp_path: Path, free_ports: list[int]) -> None:
    """Two agents train and merge, one of them under the unit's own system call filter and address families, and it ends
    with 0; the filter is in force, for it refuses what it must."""
    table = numbers()
    families = [int(getattr(socket, name)) for name in value("RestrictAddressFamilies").split()]
    may = allowed()
    file = tmp_path / "filter.json"
    code = {name: [table[call] for call in calls if call in table] for name, calls in (("allowed", may),)}
    file.write_text(json.dumps({**code, "known": list(table.values()), "families": families}))
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import errno, os, socket\n"
        "def refused(function, *words):\n"
        "    try: function(*words)\n"
        "    except OSError as error: return errno.errorcode[error.errno]\n"
        "print(refused(os.chroot, '/'), refused(os.chown, __file__, os.getuid(), -1), refused(socket.socket, 17, 3))\n"
    )
    probed = passes(*bound("tests.deploy.confined", str(file), "probe"), PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert probed.split() == ["EPERM", "EPERM", "EAFNOSUPPORT"]
    with (
        network(tmp_path, AB, free_ports) as net,
        managed(net, "lab-a", driver=("tests.deploy.confined", str(file))) as manager,
    ):
        other = net.start("lab-b")
        assert (manager.life.wait(), other.wait()) == (0, 0), manager.life.text()
        assert net.partners("lab-a") == set(AB)
