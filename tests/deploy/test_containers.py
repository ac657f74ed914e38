"""Dockerfile and compose. References: hadolint; the Compose specification's schema; and what the files say, done here
without a container engine: the wheel's inputs, and five real agents started with compose's own commands and variables.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from dimat.cli import main
from dimat.config import load_experiment
from tests.agent.processes import Life, Network
from tests.deploy.tools import DEPLOY, ROOT, documents, passes, program, run, tool

FILE = DEPLOY / "docker" / "Dockerfile"
TEXT = re.sub(r"\\\n\s*", "", FILE.read_text(encoding="utf-8"))
COMPOSE: dict[str, Any] = documents(DEPLOY / "compose" / "compose.yaml")[0]
AGENTS: dict[str, Any] = {name: each for name, each in COMPOSE["services"].items() if name.startswith("agent-")}
MONITORING: dict[str, Any] = {name: each for name, each in COMPOSE["services"].items() if name not in AGENTS}


def stages() -> dict[str, list[list[str]]]:
    """Return the Dockerfile's instructions by stage, each as its words; the first is where the stage comes from."""
    found: dict[str, list[list[str]]] = {}
    stage = ""
    for line in TEXT.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        words = line.split(None, 1)
        if words[0] == "FROM":
            base, stage = re.fullmatch(r"(\S+) AS (\S+)", words[1]).groups()  # type: ignore[union-attr]
            found[stage] = [["FROM", base]]
        elif stage:
            found[stage].append(words)
    return found


def settings(target: str) -> dict[str, str]:
    """Return ENV and the last of each other instruction of a target, with those of the stage that it comes from."""
    every = stages()
    base = every[target][0][1]
    found = settings(base) if base in every else {}
    for name, *rest in every[target]:
        if name == "ENV":
            found |= dict(word.split("=", 1) for word in shlex.split(rest[0]))
        else:
            found[name] = rest[0]
    return found


def test_hadolint_has_nothing_to_say(tmp_path: Path) -> None:
    """And it looks: a package without a version, say, would be seen."""
    hadolint = tool("hadolint")
    assert passes(hadolint, FILE) == ""
    file = tmp_path / "Dockerfile"
    file.write_text(FILE.read_text().replace("pip wheel --no-cache-dir", "pip install numpy && pip wheel"))
    assert "DL3013" in run(hadolint, file).stdout


def test_the_images_are_as_promised() -> None:
    """Both targets: not root, tini first, SIGTERM, a health check on the agent's folder, pinned bases, and no pip cache
    in a layer; the cpu target's torch comes from the CPU index."""
    every = stages()
    for target in ("cpu", "cuda"):
        found = settings(target)
        assert found["USER"] == "10001:10001"
        assert json.loads(found["ENTRYPOINT"])[:2] == ["tini", "--"]
        assert found["STOPSIGNAL"] == "SIGTERM"
        check = json.loads(found["HEALTHCHECK"].partition("CMD ")[2])
        assert check == ["dimat", "status", found["DIMAT_AGENT__FOLDER"]]
        assert found["DIMAT_AGENT__KEYS"].startswith("/run/")
    for stage, (first, *rest) in every.items():
        assert first[1] in every or re.fullmatch(r"python:\$\{PYTHON\}-slim-bookworm", first[1]), stage
        for name, text in rest:
            if name == "RUN" and "pip " in text:
                assert text.count("--no-cache-dir") == len(re.findall(r"pip (?:install|wheel)", text)), text
            assert not re.search(r"password|token|secret|\.key", text, re.IGNORECASE), text
    assert re.search(r"^ARG PYTHON=\d+\.\d+\.\d+$", TEXT, re.MULTILINE)
    assert any("download.pytorch.org/whl/cpu" in text for _, text in every["cpu-packages"][1:])
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert set(re.findall(r"ARG TORCH=(\S+)", TEXT)) == {pinned[1]}


def test_the_wheel_is_made_of_what_is_copied(tmp_path: Path) -> None:
    """What the first stage copies is what .dockerignore lets through, and makes a wheel that has every module."""
    copied = [word for name, text in stages()["wheel"][1:] if name == "COPY" for word in text.split()[:-1]]
    ignored = (FILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignored if line and line[0] != "#"]
    assert rules[0] == "*"  # nothing, but for:
    assert {line[1:] for line in rules if line[0] == "!"} == set(copied)
    source = tmp_path / "source"
    source.mkdir()
    for name in copied:
        (source / name).symlink_to(ROOT / name)
    passes(tool("hatchling"), "build", "-t", "wheel", "-d", str(tmp_path / "wheels"), cwd=source)
    (wheel,) = (tmp_path / "wheels").glob("dimat-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "dimat").rglob("*.py")}
    assert modules <= packed


def test_a_health_check_is_cheap(tmp_path: Path) -> None:
    """It comes every 30 seconds, so it must not load torch; where no agent answers it fails."""
    done = run(sys.executable, "-X", "importtime", "-m", "dimat.cli", "status", tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 5
    assert "dimat.agent.daemon.status_socket" in done.stderr
    assert not re.search(r"\| +(torch|pydantic|grpc)$", done.stderr, re.MULTILINE)


def test_compose_follows_its_schema(tmp_path: Path) -> None:
    schema = ("--builtin-schema", "vendor.compose-spec")
    passes(tool("check-jsonschema"), *schema, DEPLOY / "compose" / "compose.yaml")
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((DEPLOY / "compose" / "compose.yaml").read_text().replace("cap_drop:", "cap_dropped:"))
    assert run(tool("check-jsonschema"), *schema, wrong).returncode != 0


def test_compose_is_confined() -> None:
    """Agents: state in a volume of their own, own keys alone, nothing else writable, more time to stop than they drain;
    all services: no capabilities, limits, health checks, and ports on loopback only."""
    config = load_experiment(DEPLOY / "compose" / "agents.toml", (), env={})
    for name, service in AGENTS.items():
        assert service["read_only"]
        assert service["tmpfs"]
        assert "ports" not in service
        assert int(service["stop_grace_period"].rstrip("s")) > config.agent.drain_s + 10
        mounts = {volume.split(":")[1]: volume for volume in service["volumes"]}
        assert mounts["/run/dimat/keys"] == f"./keys/{name}:/run/dimat/keys:ro"
        assert mounts["/var/lib/dimat"].split(":")[0] == name
        assert set(mounts) == {"/etc/dimat/agents.toml", "/etc/dimat/map.toml", "/run/dimat/keys", "/var/lib/dimat"}
        assert service["healthcheck"]["test"] == ["CMD", "dimat", "status", "/var/lib/dimat/agent"]
    for service in COMPOSE["services"].values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["deploy"]["resources"]["limits"]
        assert service["healthcheck"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    for service in MONITORING.values():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (DEPLOY / "compose" / source).exists(), volume
    (targets,) = documents(DEPLOY / "compose" / "targets.yml")[0]
    ports = {service["command"][-1].split(":")[1] for service in AGENTS.values()}
    assert set(targets["targets"]) == {f"{name}:{port}" for name in AGENTS for port in ports}


@pytest.mark.live
def test_the_five_agents_of_compose(tmp_path: Path, free_ports: list[int]) -> None:
    """Compose's own files and commands with the image's variables, on loopback instead of in containers: keys by the
    script, five agents, the health check of each passes, all merge with their neighbours; on SIGTERM all end with 143,
    and the health check fails. (Only `--metrics` is left to where agents serve some.)"""
    folder = tmp_path / "compose"
    folder.mkdir()
    map_text = (DEPLOY / "compose" / "map.toml").read_text()
    for number, port in enumerate(free_ports[:5]):
        map_text = map_text.replace(f'"agent-{number}:7300"', f'"127.0.0.1:{port}"')
    (folder / "map.toml").write_text(map_text)
    (folder / "agents.toml").write_text((DEPLOY / "compose" / "agents.toml").read_text())
    path = f"{program(tmp_path / 'bin')}:{os.environ['PATH']}"
    passes(DEPLOY / "issue-keys.sh", "--map", folder / "map.toml", "--folder", folder / "keys", PATH=path)
    ports = dict(zip(AGENTS, free_ports))
    net = Network(tmp_path, tuple(AGENTS), ports)
    check = json.loads(settings("cpu")["HEALTHCHECK"].partition("CMD ")[2])
    try:
        for name, service in AGENTS.items():
            words = [word.replace("/etc/dimat", str(folder)) for word in service["command"]]
            words = words[: words.index("--metrics")]
            environment = {
                "DIMAT_AGENT__FOLDER": str(tmp_path / name),
                "DIMAT_AGENT__KEYS": str(folder / "keys" / name),
                "DIMAT_AGENT__LISTEN": f"127.0.0.1:{ports[name]}",
                "DIMAT_TRAIN__FIRST_ROUND_EPOCHS": "0.2",
                "DIMAT_TRAIN__EPOCHS_PER_ROUND": "0.2",
                "PATH": path,
                **service["environment"],
            }
            said = tmp_path / f"{name}.err"
            with said.open("wb") as stream:
                process = subprocess.Popen(
                    ["dimat", *words], env={**os.environ, **environment}, stdout=stream, stderr=stream, cwd=tmp_path
                )
            net.lives.append(Life(name, process, said))
        around = {f"agent-{i}": {f"agent-{j % 5}" for j in (i - 1, i, i + 1)} for i in range(5)}
        net.until(lambda: all(net.partners(name) == around[name] for name in AGENTS), "each merges with its two")
        for name in AGENTS:
            passes(*(word.replace("/var/lib/dimat/agent", str(tmp_path / name)) for word in check), PATH=path)
        for life in net.lives:
            life.signal(signal.SIGTERM)
        assert [life.wait() for life in net.lives] == [143] * 5
        assert main(["status", str(tmp_path / "agent-0")]) == 5
    finally:
        net.end()
