"""A real agent from start to end: folder, keys, checkpoint, network, rounds, leaving.

`dimat agent` runs `Daemon.run` and handles signals; `dimat.Agent` (`dimat.agent.attach`) runs the same daemon in a
thread beside your own training loop.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from dimat import events
from dimat.agent.daemon.event_teller import EventTeller
from dimat.agent.daemon.folder import AgentFolder
from dimat.agent.daemon.key_watch import KeyWatch, certificate_facts
from dimat.agent.daemon.lateness import Lateness
from dimat.agent.daemon.map_follower import MapFollower
from dimat.agent.daemon.mid_round import MidRound
from dimat.agent.daemon.network_monitor import NetworkMonitor
from dimat.agent.daemon.peer_discovery import PeerDiscovery, check_discovery
from dimat.agent.daemon.removal import Removal
from dimat.agent.daemon.resources import check_room, disk_shares, needs_of
from dimat.agent.daemon.runner import Runner
from dimat.agent.daemon.service_manager import feed_watchdog, notify, status_line
from dimat.agent.daemon.status_socket import StatusSocket, for_members, plain_view, with_refused
from dimat.agent.daemon.transport import make_transport
from dimat.agent.daemon.worker import AgentWorker, WorkThread
from dimat.agent.learner.checkpoint_store import CheckpointStore
from dimat.agent.lineage.compaction import Compaction
from dimat.agent.lineage.manifest_log import ManifestLedger
from dimat.agent.setup.machine import machine_for
from dimat.agent.setup.prepare import PreparedAgent, neighbours_of
from dimat.config import agent_folder
from dimat.errors import ConfigError, DimatError
from dimat.merge.weight_views import content_hash
from dimat.net.pki.identity import Identity, load_identity
from dimat.net.threads import beside, first_of
from dimat.seeds import derive_seed
from dimat.train.base import ModelTrainer
from dimat.version import __version__
from dimat.weights.snapshot import RecordedSnapshot, SnapshotStore

_TURNS = (events.AgentStarted, events.Trained, events.Published, events.Merged, events.Checkpointed)


class Daemon:
    """One agent of one run.

    `listeners` are told every event; `trainer`: trains the model, where that is not dimat's own trainer.

    Made outside the event loop (it reads keys and the newest checkpoint, and may take long); `run` belongs to the loop,
    as do `stop` and `reload`.
    """

    def __init__(
        self, setup: PreparedAgent, listeners: Sequence[events.Listener] = (), *, trainer: ModelTrainer | None = None
    ) -> None:
        config = setup.config
        agent = config.agent
        self.setup = setup
        self.listeners = list(listeners)
        self.address = ""
        """Where it listens, once it does."""
        base = Path(config.folder)
        path = agent_folder(config, setup.name)
        self.identity: Identity | None = None if agent.insecure else load_identity(base / agent.keys, setup.name)
        self._keys = self.identity and KeyWatch(self.identity, base / agent.keys, self._renewed, self._notice)
        finds = check_discovery(config)
        self.folder = AgentFolder(path, config.run, setup.name)
        self._discovery: PeerDiscovery | None = None
        self._teller = EventTeller(self.listeners, lambda message: self.runner.noticed(message))
        self._started_s = time.time()
        self._leaving = asyncio.Event()
        self._early = list(setup.experiment.loaded.notes)  # to be said once there is a run to say it in
        self._tasks = asyncio.TaskGroup()
        self._following: list[asyncio.Task[None]] = []
        self._up = self._reload_wanted = False
        self._removal = Removal(
            setup.name, config.exchange.lost_after_s, config.agent.go_on_alone, self._notice, self.stop
        )
        try:
            if finds and self.identity is not None:
                self._discovery = PeerDiscovery(config, setup.name, self.folder.dht, self.identity, self._notice)
            self._prepare(trainer)
        except BaseException:
            self.folder.close()
            raise

    def _prepare(self, trainer: ModelTrainer | None) -> None:
        setup, folder, config = self.setup, self.folder, self.setup.config
        agent = config.agent
        self._schedule = setup.schedule
        self._learner = setup.learner(folder.snapshots, trainer)
        keep = setup.schedule.snapshots_kept(agent.keep_snapshots)
        self._store = SnapshotStore(folder.snapshots, keep=keep)
        listened = len(setup.schedule.plan(setup.name).peers)
        needs = needs_of(self._learner.trainer, setup, listened)
        size = needs.snapshot_bytes
        if warning := check_room(folder.path, needs):
            self._notice(warning)
        checkpoints = CheckpointStore(folder.checkpoints, agent.keep_checkpoints, elsewhere=(folder.snapshots,))
        middle = MidRound(
            self._learner, checkpoints, agent.checkpoint_every_s, lambda fault: self.runner.saved_soon(fault)
        )
        self.shares = disk_shares(agent.disk_quota_mb, size, listened, agent.logs_kept)
        self._ledger = ManifestLedger(folder.manifests, self.shares.manifests)
        compaction = Compaction(setup.name, folder.lineage, self._ledger, self.shares.lineage)
        self._work = AgentWorker(
            self._learner, config.run, checkpoints, folder.lineage, agent.evaluate, folder.weights, middle, compaction
        )
        found = self._work.restore()()
        if found is not None:
            self._early += (f"{fault}; the previous one is used" for fault in found.passed_over)
            self._early += (note for note in (found.note, middle.fault) if note)
        self._new = found is None
        state = None if found is None else found.state
        self._kept = RecordedSnapshot.addresses(folder.snapshots, "" if state is None else state.root)
        published = 0 if found is None else found.published
        founding = content_hash(self._learner.trainer.weights(copy=False)) if state is None else ""
        self._machine = machine_for(setup.schedule, setup.name, state, published, founding)
        self._transport = make_transport(
            setup,
            self.identity,
            self._learner.trainer.model,
            self._store,
            folder.received,
            snapshot_bytes=size,
            disk_bytes=self.shares.received,
            status=self._status_for_members,
            address_lookup=None if self._discovery is None else self._discovery.addresses,
        )
        self.thread = WorkThread()
        self.runner = Runner(
            self._machine,
            self._work,
            self.thread,
            self._transport,
            self._emit,
            self._ledger.note,
            max_time_s=config.schedule.max_time_s,
            lateness=self._lateness() if config.schedule.mode == "sync" else None,
        )
        self._observing = NetworkMonitor(
            setup.name,
            config.run,
            lambda: self._machine.round,
            self._transport,
            None if (discovery := self._discovery) is None else lambda: discovery.state,
            (folder.snapshots, folder.received),
            self.runner.emit,
            config.monitor.observe_s,
        )

    # ── its life ─────────────────────────────────────────────────────────────────────────────────────────────
    async def run(self, ready: Callable[[], None] | None = None) -> str:
        """Run until the agent leaves, and return why; raises what ended it otherwise.

        `ready` is called once it listens.
        """
        async with beside(self._tasks):
            self._tasks.create_task(feed_watchdog(), name="watchdog")
            self._until_it_leaves(self._observing.go_on(), "network monitor")
            return await self._live(ready)

    async def _live(self, ready: Callable[[], None] | None) -> str:
        config = self.setup.config
        socket = StatusSocket(self.folder.path, self.status)
        try:
            neighbours = neighbours_of(self._schedule, self.setup.name)
            self._transport.update_neighbours(neighbours)
            await self._transport.start(self.runner)
            self._store.sweep(self._kept)
            self.address = f"{self.setup.listen_address().rpartition(':')[0]}:{self._transport.port}"
            if self._discovery is not None:
                await self._discovery.start(neighbours, self.address)
                self._follow(self._discovery)
            await socket.start()
            self._introduce()
            self._up = True
            if self._keys is not None:
                self._until_it_leaves(self._keys.go_on(), "watch over the keys")
            if self._reload_wanted:
                self.reload_soon()
            notify("READY=1")
            if ready is not None:
                ready()
            reason = await self.runner.run(join=self._new and not config.agent.founder)
            await self._part(reason)
            if self._removal.over:
                raise ConfigError(
                    f"agent {self.setup.name} is no longer on the network map; put it back on the map, or set "
                    "agent.go_on_alone = true to train alone"
                )
            return reason
        finally:
            notify("STOPPING=1")
            for task in self._following:
                task.cancel()
            self._removal.cancel()
            if self.address:
                self._observing.tell()
            await asyncio.gather(self._transport.close(config.agent.drain_s), self.runner.save(config.agent.drain_s))
            if self._discovery is not None:
                await self._discovery.close()
            await socket.close()
            self._ledger.close()
            self.folder.close()

    def stop(self, reason: str = "stopped") -> None:
        """Leave: a restart continues from the newest checkpoint, or in the middle of the round after it."""
        if self.runner.ended is None:
            self.runner.stop(reason)
        self._work.middle.interrupt()
        self._leaving.set()

    def reload_soon(self) -> None:
        """Run `reload` beside the agent's other work, once the agent is up."""
        if self._up:
            self._tasks.create_task(self._beside_training(self.reload(), "reading of keys and map"))
        else:
            self._reload_wanted = True

    async def reload(self) -> None:
        """Read keys and network map again from their files; of the map, the published version if it is newer.

        Where one of them cannot be used, the old one stands.
        """
        if self._keys is not None:
            await self._keys.read_anew()
        await self._read_map()

    async def _renewed(self, new_key: bool, new_ca: bool) -> None:
        """Go by keys that were read anew, without a connection less."""
        assert self.identity is not None
        if new_key:
            self._transport.sign_again()
        if new_ca and self._discovery is not None:
            await self._discovery.update_ca(self.identity.ca)
        self._tell_keys()
        self.runner.noticed(
            f"the keys were read again: certificate {self.identity.fingerprint[:16]}…, valid until "
            f"{self.identity.until:%Y-%m-%d}"
        )

    def _tell_keys(self) -> None:
        if (identity := self.identity) is not None:
            self.runner.emit(
                events.KeysRead(
                    agent=self.setup.name,
                    round=self._machine.round,
                    fingerprint=identity.fingerprint,
                    until_s=identity.until.timestamp(),
                )
            )

    async def _read_map(self) -> None:
        try:
            schedule = await asyncio.to_thread(self.setup.schedule_now)
        except DimatError as error:
            self.runner.noticed(f"the new network map is not used: {error}; the current one stays in use")
            return
        self._schedule = schedule
        neighbours = neighbours_of(schedule, self.setup.name)
        self._transport.update_neighbours(neighbours)
        if self._discovery is not None:
            self._discovery.update_neighbours(neighbours)
        self.runner.remap(schedule.plan(self.setup.name))
        self.runner.emit(
            events.MapRead(
                agent=self.setup.name,
                round=self._machine.round,
                members=tuple(schedule.agents),
                peers=tuple(sorted(schedule.plan(self.setup.name).peers)),
            )
        )
        from_file = schedule.config.topology.map == self.setup.config.topology.map
        followed = "" if from_file else ", as published in the DHT"
        self.runner.noticed(f"the network map was read again: {len(schedule.agents)} agents{followed}")
        self._removal.look(schedule.agents)

    @property
    def round(self) -> int:
        """The agent's current round; the only member that any thread may use."""
        return self._machine.round

    def status(self) -> dict[str, object]:
        """Return the agent's status as plain values."""
        machine = self._machine
        return {
            **plain_view(self.runner.view),
            "started": self._started_s,
            "time": time.time(),
            "version": __version__,
            "pid": os.getpid(),
            "address": self.address,
            "folder": str(self.folder.path),
            "secure": self.identity is not None,
            **({} if self.identity is None else {"certificate": certificate_facts(self.identity)}),
            "round": machine.round,
            "rounds": self._schedule.rounds,
            "phase": machine.phase.value,
            "basis": str(machine.basis),
            "sent_bytes": sum(self._transport.sent_bytes.values()),
            "received_bytes": sum(self._transport.received_bytes.values()),
            "peers": with_refused(self._transport.peers, machine.refusals.counts),
            **({} if self._discovery is None else {"dht": self._discovery.state}),
        }

    def _status_for_members(self) -> dict[str, object]:
        """Return the status as other members get it: without this machine's paths and process."""
        return for_members(self.status(), (self.folder.path, Path(self.setup.config.folder)))

    # ── parts ────────────────────────────────────────────────────────────────────────────────────────────────
    def _until_it_leaves(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self._following.append(self._tasks.create_task(self._beside_training(work, name), name=name))

    async def _beside_training(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Do work that training does not rest on: a fault that nobody foresaw in it is told, and ends no agent."""
        try:
            await work
        except Exception as error:
            self._notice(f"the {name} ended: {type(error).__name__}: {error}; training continues without it")

    def _follow(self, discovery: PeerDiscovery) -> None:
        """Begin to look for network maps that the organiser publishes, where they are to be followed."""
        identity = self.identity
        if not self.setup.config.dht.follow_map or identity is None:
            return
        follower = MapFollower(
            self.setup.config,
            self.folder.dht,
            discovery.dht,
            lambda: identity.ca,
            check=self.setup.schedule_on,
            take=self._read_map,
            notice=self._notice,
            generator=random.Random(derive_seed(self.setup.config.seed, "map", self.setup.name)),
        )
        self._until_it_leaves(follower.follow(), "following the map")

    def _lateness(self) -> Lateness:
        return Lateness(
            self.setup.config.schedule.round_deadline_s,
            lambda peer, number: self._schedule.round_plan(self.setup.name, number).mixing.get(peer, 0.0) > 0,
            lambda: [peer for peer, state in self._transport.peers.items() if state["connected"]],
            self._notice,
        )

    def _introduce(self) -> None:
        machine, model = self._machine, self._learner.trainer.model
        self.runner.emit(
            events.AgentStarted(
                agent=self.setup.name,
                round=machine.round,
                address=self.address,
                peers=tuple(sorted(self._schedule.plan(self.setup.name).peers)),
                samples=len(self.setup.indices),
                parameters=sum(p.numel() for p in model.parameters()),
                secure=self.identity is not None,
                members=tuple(self._schedule.agents),
                rounds=self._schedule.rounds,
                metric=self._schedule.metric,
                version=__version__,
                histogram=self.setup.histogram(),
            )
        )
        self._tell_keys()
        for message in self._early:
            self.runner.noticed(message)

    async def _part(self, reason: str) -> None:
        """Be there for those who still need what this agent offers, unless it was told to go."""
        if reason != "done":
            self._transport.leave(reason)
        if self._leaving.is_set():
            return
        await self._transport.unfollow_all()
        readers = self._schedule.readers(self.setup.name, self._machine.round)
        await first_of(self._transport.served(readers), self._leaving.wait(), most_s=self.setup.config.agent.linger_s)

    def _notice(self, message: str) -> None:
        if self.address:
            self.runner.noticed(message)
        else:
            self._early.append(message)

    def _emit(self, fact: events.Event) -> None:
        if isinstance(fact, events.Published) and self._discovery is not None:
            self._discovery.tell(fact.round, fact.snapshot)
        self._teller.tell(fact)
        if isinstance(fact, _TURNS):
            machine, peers = self._machine, self._transport.peers.values()
            notify(f"STATUS={status_line(machine.round, self._schedule.rounds, machine.phase.value, peers)}")
        if isinstance(fact, events.RoundFinished):
            self._observing.round_over()
