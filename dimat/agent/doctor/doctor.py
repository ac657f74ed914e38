"""`dimat doctor`: checks everything an agent needs here and in the network, read-only.

`examine` works whether the agent runs or not. The slow part is done once: the task is loaded, since its model's
schema decides which peers fit.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dimat.agent.daemon.folder import owner_of_folder, read_mark
from dimat.agent.daemon.key_watch import certificate_facts
from dimat.agent.daemon.resources import Needs, available_memory, held_bytes, needs_of
from dimat.agent.daemon.status_socket import ask
from dimat.agent.doctor.check import Check, fail, failed, ok, warn
from dimat.agent.doctor.class_checks import check_classes
from dimat.agent.doctor.network_checks import AgentEndpoint, check_network
from dimat.agent.learner.checkpoint import read_checkpoint
from dimat.agent.learner.checkpoint_store import look
from dimat.agent.learner.learner import Learner
from dimat.agent.learner.own_data import compare_data
from dimat.agent.setup.prepare import PreparedAgent, neighbours_of, prepare_agent
from dimat.config import ExperimentConfig, agent_folder
from dimat.device import resolve_device
from dimat.errors import ConfigError, DataError, DimatError
from dimat.net.pki.identity import Identity, load_identity
from dimat.net.pki.key_info import SOON

MB = 1e6
IMPORT_S = 120.0


@dataclass(frozen=True, slots=True)
class RunningAgent:
    """The agent's own process. `pid`: 0 where none runs; `address`: `host:port`, "" where it is not known;
    `certificate`: the facts about its keys that it tells, none where it does not."""

    pid: int = 0
    address: str = ""
    certificate: Mapping[str, object] = field(default_factory=dict[str, object])


def examine(config: ExperimentConfig) -> Iterator[Check]:
    """Check an agent's configuration, keys, machine, folder, port and peers; yields each check when it is done."""
    try:
        setup = prepare_agent(config)
    except DimatError as error:
        yield failed("config", error)
        yield from _machine(config)
        return
    peers = sorted(setup.schedule.plan(setup.name).peers)
    yield ok("config", f"agent {setup.name} of run {config.run}, task {setup.experiment.task.name}")
    for note in setup.experiment.loaded.notes:
        yield warn("task", note, "fix it, unless you meant it")
    if peers:
        yield ok("map", f"{len(setup.schedule.agents)} agents; {setup.name} listens to {', '.join(peers)}")
    else:
        yield warn("map", f"{setup.name} has no peers", "give the map another agent, or another graph")
    yield from check_classes(setup)
    identity, check = _keys(config, setup.name)
    yield check
    yield from _machine(config)
    path = agent_folder(config, setup.name)
    running = running_in(path)
    if identity is not None and running.certificate:
        yield _keys_in_use(identity, running)
    learner = _learner(setup)
    model = learner.trainer.model
    yield from _disk_and_memory(path, needs_of(learner.trainer, setup, len(peers)))
    yield from _folder(config, setup.name, path, running, learner.data_now())
    if identity is None and not config.agent.insecure:
        yield warn("peers", "not asked: there are no keys", "see to the keys first")
        return
    endpoint = AgentEndpoint(
        run=config.run,
        agent=setup.name,
        identity=identity,
        profile=setup.profile(model),
        listen=running.address or setup.listen_address(),
        running=running.pid,
        neighbours=neighbours_of(setup.schedule, setup.name),
        bootstraps=config.dht.bootstraps,
    )
    yield from check_network(endpoint)


def running_in(folder: Path) -> RunningAgent:
    """Return the process that holds a folder's lock, and its address."""
    owner = owner_of_folder(folder)
    if owner is None:
        return RunningAgent()
    try:
        status = ask(folder)
    except DataError:
        status = dict[str, Any]()  # it is about to start, or to end
    return RunningAgent(owner or -1, str(status.get("address", "")), status.get("certificate") or {})


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────
def _keys(config: ExperimentConfig, name: str) -> tuple[Identity | None, Check]:
    if config.agent.insecure:
        mend = "make keys with `dimat keys` and drop agent.insecure before others take part"
        return None, warn("keys", "none: agent.insecure is set, so loopback only", mend)
    try:
        identity = load_identity(Path(config.folder) / config.agent.keys, name)
    except DimatError as error:
        return None, failed("keys", error)
    until = identity.until
    left = until - datetime.now(UTC)
    what = f"certificate of {name}, and its CA's, are valid for {left.days} more days, until {until:%Y-%m-%d}"
    if left < SOON:
        return identity, warn("keys", what, f"renew it: dimat keys issue {name} --renew (or request and sign)")
    return identity, ok("keys", what)


def _keys_in_use(identity: Identity, running: RunningAgent) -> Check:
    """Say whether the running process goes by the keys that lie in the files."""
    in_files, used = certificate_facts(identity), running.certificate
    if all(used.get(name) == value for name, value in in_files.items()):
        return ok("keys in use", f"process {running.pid} goes by these keys")
    ends = used.get("until")
    until = f", valid until {datetime.fromtimestamp(ends, UTC):%Y-%m-%d}" if isinstance(ends, int | float) else ""
    what = f"process {running.pid} uses other keys than the files hold (certificate {_short(used)}…{until})"
    return warn("keys in use", what, f"let it read them anew: kill -HUP {running.pid}")


def _short(certificate: Mapping[str, object]) -> str:
    return str(certificate.get("fingerprint", ""))[:16]


# ── the machine ──────────────────────────────────────────────────────────────────────────────────────────────
def _machine(config: ExperimentConfig) -> Iterator[Check]:
    found = [f"python {platform.python_version()}"]
    missing: list[str] = []
    for name in ("dimat", "torch", "grpcio", "protobuf"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        yield warn("versions", ", ".join(found) + f"; not installed: {', '.join(missing)}", "pip install dimat")
    else:
        yield ok("versions", ", ".join(found))
    yield _hivemind(needed=bool(config.dht.bootstraps))
    yield _device(config)


def _hivemind(*, needed: bool) -> Check:
    if not needed:  # whether it can be imported takes seconds to find out
        try:
            return ok("hivemind", f"{version('hivemind')} is installed; not needed, without dht.bootstraps")
        except PackageNotFoundError:
            return ok("hivemind", "not installed; not needed, without dht.bootstraps")
    # in a process of its own, as in the agent: its imports and threads stay out of this one
    program = "import hivemind; print(hivemind.__version__)"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=IMPORT_S, check=False
        )
        fault = done.stderr.strip().splitlines()[-1:] if done.returncode else []
        found = "" if done.returncode else done.stdout.strip()
    except subprocess.TimeoutExpired:
        found, fault = "", [f"it takes more than {IMPORT_S:.0f} s"]
    if found:
        return ok("hivemind", f"{found} can be imported")
    # an agent without it goes on with the addresses of the map
    return warn(
        "hivemind",
        f"cannot be imported: {' '.join(fault) or 'it ended without a message'}",
        "pip install hivemind, or use only the map's addresses: drop dht.bootstraps",
    )


def _device(config: ExperimentConfig) -> Check:
    import torch

    try:
        device = resolve_device(config.train.device)
    except ConfigError as error:
        return failed("device", error, 'set train.device to "auto" or "cpu", or repair the driver (nvidia-smi)')
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        return ok("device", f"trains on {device}: {name}, {free / MB:,.0f} of {total / MB:,.0f} MB free")
    gpus = torch.cuda.device_count()
    if gpus and device.type == "cpu":
        return warn("device", f"trains on the cpu, and {gpus} GPU is available", 'set train.device to "auto"')
    return ok("device", f"trains on {device} with {torch.get_num_threads()} threads")


def _disk_and_memory(path: Path, needs: Needs) -> Iterator[Check]:
    """Say whether disk and memory hold what a round needs."""
    needed = needs.disk_bytes
    place = path.absolute()
    while not place.exists():
        place = place.parent
    held = held_bytes(path)
    free = shutil.disk_usage(place).free
    what = f"{free / MB:,.0f} MB free at {place}, about {max(needed - held, 0) / MB:,.0f} MB more are needed"
    if free + held < needed:
        yield fail("disk", what, "make room, or set agent.folder to another disk", DataError)
    elif not os.access(place, os.W_OK):
        mend = "give the agent's user the right to, or set agent.folder"
        yield fail("disk", f"{place} cannot be written to", mend, DataError)
    else:
        yield ok("disk", what)
    available = available_memory()
    what = f"{available / MB:,.0f} MB free, the model takes about {needs.memory_bytes / MB:,.1f} MB"
    if available < needs.memory_bytes:
        yield warn("memory", what, "stop other programs, or give the agent fewer peers or a smaller model")
    else:
        yield ok("memory", f"{what} of them")


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────
def _folder(
    config: ExperimentConfig, name: str, path: Path, running: RunningAgent, data: Mapping[str, int | float | str]
) -> Iterator[Check]:
    """Look at the agent's folder and its newest checkpoint; `data`: those that it would go on with."""
    try:
        mark = read_mark(path)
    except DataError as error:
        yield failed("folder", error, f"move {path} away, or restore its agent.json")
        return
    if mark is None:
        yield ok("folder", f"{path} is new: the agent starts there")
        return
    if mark != {"run": config.run, "agent": name}:
        what = f"{path} is that of agent {mark.get('agent')!r} in run {mark.get('run')!r}"
        yield fail("folder", what, "choose another agent.folder", DataError)
        return
    if running.pid:
        heard = f" and listens on {running.address}" if running.address else ", and does not answer on its socket yet"
        yield ok("folder", f"{path} is held by process {running.pid}, which runs the agent{heard}")
        return
    try:
        found = look(path / "checkpoints")
    except DataError as error:
        yield failed("checkpoint", error, f"give the agent's user the right to read {path}")
        return
    yield ok("folder", f"{path}: no agent runs there")
    if not found:
        yield ok("checkpoint", "none yet")
        return
    damaged = [fault for _, fault in found if fault]
    newest = next((file for file, fault in found if not fault), None)
    if newest is None:
        mend = "restore one from a backup, or remove the folder to begin as a newcomer"
        yield fail("checkpoint", f"none of {len(found)} can be read: {damaged[0]}", mend, DataError)
    elif found[0][1]:
        what = f"{damaged[0]}; the agent continues from {newest}"
        yield warn("checkpoint", what, "check the disk (dmesg, smartctl); the round is trained again")
    else:
        yield ok("checkpoint", f"{newest} can be read, {len(found)} are kept")
    if newest is not None:
        try:
            note = compare_data(
                read_checkpoint(path / "checkpoints" / newest).data, data, accepted=config.agent.accept_new_data
            )
        except DataError as error:
            yield failed("data", error)
            return
        what, _, then = note.rpartition("; ")
        yield warn("data", what, then) if note else ok("data", f"{data['rows']} examples, as at the checkpoint")


# ── the model ────────────────────────────────────────────────────────────────────────────────────────────────
def _learner(setup: PreparedAgent) -> Learner:
    """Return a learner as the agent's, to be asked about its model and data; it records nothing."""
    with tempfile.TemporaryDirectory() as folder:
        return setup.learner(Path(folder))
