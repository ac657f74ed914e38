"""An agent's DHT node: starts its process, probes it, restarts it, and sends it requests.

hivemind's processes die, hang and become orphans without hivemind's notice, so it runs outside the agent:
`dimat.net.discovery.dht_process` holds it, and `DhtNode` sends requests to that process, probes it, and replaces it.
While the DHT is down, `announce` returns False and `lookup` None; neither raises.
"""

from __future__ import annotations

import asyncio
import base64
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dimat.errors import ConfigError, NetworkError, SecurityError
from dimat.net.backoff import Backoff, Reminders
from dimat.net.discovery.address_records import AddressRecord, open_record, record_key, seal_record
from dimat.net.discovery.child_process import TOKEN_VARIABLE, ChildProcess, PidFile, RequestError
from dimat.net.discovery.dht_addresses import check_bootstrap, port_of, split_listen
from dimat.net.discovery.map_records import MapRecord, map_key, open_map
from dimat.net.limits import (
    DHT_JOIN_FIRST_S,
    DHT_JOIN_LAST_S,
    DHT_MISSES,
    DHT_PROBE_S,
    DHT_REQUEST_S,
    DHT_RESTART_FIRST_S,
    DHT_RESTART_S,
    DHT_START_S,
    DHT_STEADY_S,
    DHT_STOP_S,
    MAX_CA_BYTES,
)


class DhtNode:
    """One DHT node, of an agent or a bootstrap node; its identity and log lie in `folder`.

    `run`: the run whose records it accepts, None for all; `bootstraps`: multiaddresses of other nodes; `ca`: the CA's
    certificate as PEM, None if records are not signed; `listen`: IP:port; `notice` receives messages for a person;
    `generator` draws the jitter of waits; `seal` makes the bytes of this agent's records, unsigned by default;
    `probe_s`: interval of probes. `changed` is set whenever the node has come up or joined others again.
    """

    def __init__(
        self,
        folder: Path,
        *,
        run: str | None,
        bootstraps: Sequence[str],
        ca: bytes | None,
        listen: str,
        notice: Callable[[str], None],
        generator: random.Random,
        seal: Callable[[AddressRecord], bytes] | None = None,
        probe_s: float = DHT_PROBE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if ca is not None and len(ca) > MAX_CA_BYTES:
            raise ConfigError(f"the CA's certificates have {len(ca)} bytes; the DHT takes {MAX_CA_BYTES}")
        self.healthy = False
        self.missing = False
        """Whether hivemind cannot be imported: the node will not start."""
        self.known = 0
        """The number of other nodes that this one knows."""
        self.refused = 0
        """The number of records that this node has refused since it started."""
        self.restarts = 0
        """The number of restarts of the process since `start`."""
        self.peer = ""
        self.changed = asyncio.Event()
        self._folder = folder
        self._run = run
        self._bootstraps = tuple(dict.fromkeys(map(check_bootstrap, bootstraps)))
        self._ca = ca
        self._host, self._port = split_listen(listen)
        self._any_port = self._port == 0
        self._reminders = Reminders(notice)
        self._generator = generator
        self._seal = seal or _unsigned
        self._probe_s = probe_s
        self._clock = clock
        self._pid_file = PidFile(folder / "dht.pid")
        self._scratch = ""
        self._child: ChildProcess | None = None
        self._task: asyncio.Task[None] | None = None
        self._addresses: tuple[str, ...] = ()
        self._newest: dict[str, AddressRecord] = {}
        # by bootstrap: when it is joined next, and its back-off, None while it answers
        self._due: dict[str, tuple[float, Backoff | None]] = {}
        self._first: asyncio.Future[None] | None = None

    @property
    def addresses(self) -> tuple[str, ...]:
        """The node's multiaddresses as seen from outside, for others' `bootstraps`. Empty until it is up."""
        return self._addresses

    @property
    def now(self) -> float:
        """The time against which records are checked, Unix seconds."""
        return self._clock()

    def spawn(self) -> None:
        """Start the process; return at once. To be called before torch has threads and before gRPC.

        Raises NetworkError if another living process runs a node from the folder.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        # sockets have names of 107 bytes at most: not in the folder
        self._remove_scratch()
        self._scratch = tempfile.mkdtemp(prefix="dimat-dht-")
        try:
            token, ended = self._pid_file.claim(self._scratch)
        except (NetworkError, OSError):
            self._remove_scratch()
            raise
        if ended:
            self._reminders.tell("orphans", f"the DHT: ended {ended} processes left over from an earlier run")
        start = {
            "op": "start",
            "run": self._run,
            "ca": None if self._ca is None else self._ca.decode(),
            "host": self._host,
            "port": self._port,
            "identity": str((self._folder / "dht.key").resolve()),
            "sockets": self._scratch,
        }
        self._child = ChildProcess(
            "dimat.net.discovery.dht_process",
            environment=_environment(token),
            log=self._folder / "dht.log",
            first=start,
        )

    async def start(self) -> None:
        """Begin to supervise the process, and start it unless `spawn` did; return at once."""
        self._first = asyncio.get_running_loop().create_future()
        if self._child is None:
            self.spawn()
        # a plain task: a group's end would raise its fault in `close`, which has the processes to end, whatever it is
        self._task = asyncio.create_task(self._supervise(), name="dht")

    async def ready(self) -> None:
        """Wait until the node listens for the first time; NetworkError if it cannot: port taken, no hivemind."""
        if self._first is None:
            raise NetworkError("the DHT node was not started")
        await asyncio.shield(self._first)

    async def update_ca(self, ca: bytes | None) -> None:
        """Check records with other CA certificates from now on; the node's process, which checks too, is restarted."""
        if ca != self._ca:
            self._ca = ca
            if self._child is not None and self.healthy:
                with suppress(NetworkError):  # one that does not answer is noticed by its next probe
                    await self._child.ask("stop", DHT_STOP_S)

    async def announce(self, record: AddressRecord) -> bool:
        """Store this agent's record with other nodes; return whether any accepted it. ConfigError for an invalid
        one."""
        data = self._seal(record)
        key = record_key(record.run, record.agent).hex()
        value = base64.b64encode(data).decode()
        try:
            reply = await self._ask("store", key=key, value=value, expires=record.expires_s)
            return int(reply["stored"]) > 0
        except (NetworkError, KeyError, ValueError):
            return False

    async def lookup(self, agent: str, *, elsewhere: bool = False) -> AddressRecord | None:
        """Return the newest valid record of an agent of this run, None if there is none or the DHT is down.

        With `elsewhere`, only records of other nodes count. Otherwise a record that was seen before and is still valid
        wins over an older one.
        """
        if self._run is None:
            return None
        now = self._clock()
        best = None if elsewhere else self._newest.get(agent)
        if best is not None and best.expires_s <= now:
            best = None
        for data in await self._find(agent, elsewhere):
            try:
                record = open_record(data, ca=self._ca, run=self._run, agent=agent, now=now)
            except SecurityError:
                continue  # an invalid value of a neighbour in the DHT does no harm
            if best is None or (record.seq, record.time_s) > (best.seq, best.time_s):
                best = record
        seen = self._newest.get(agent)
        if best is not None and (seen is None or (best.seq, best.time_s) > (seen.seq, seen.time_s)):
            self._newest[agent] = best
        return best

    async def announce_map(self, sealed: bytes, record: MapRecord) -> int:
        """Store a network map with other nodes; return how many accepted it."""
        value = base64.b64encode(sealed).decode()
        try:
            reply = await self._ask("store", key=map_key(record.run).hex(), value=value, expires=record.expires_s)
            return int(reply["stored"])
        except (NetworkError, KeyError, ValueError):
            return 0

    async def lookup_map(self) -> tuple[MapRecord, bytes] | None:
        """Return this run's newest valid map with its sealed bytes, None if there is none or the DHT is down."""
        if self._run is None:
            return None
        try:
            reply = await self._ask("map", key=map_key(self._run).hex())
            if reply["value"] is None:
                return None
            sealed = base64.b64decode(reply["value"], validate=True)
            return open_map(sealed, ca=self._ca, run=self._run, now=self._clock()), sealed
        except (NetworkError, SecurityError, KeyError, ValueError, TypeError):
            return None

    async def close(self) -> None:
        """Stop the node and end its processes."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
        child, self._child = self._child, None
        if child is not None:
            if self.healthy:
                with suppress(NetworkError):
                    await child.ask("stop", DHT_STOP_S)
            await child.kill()
            self._pid_file.release()
        self._remove_scratch()
        self._down()

    async def _find(self, agent: str, elsewhere: bool) -> list[bytes]:
        try:
            reply = await self._ask("get", key=record_key(self._run or "", agent).hex())
            texts = [*reply["others"], *([] if elsewhere or reply["own"] is None else [reply["own"]])]
            return [base64.b64decode(text, validate=True) for text in texts]
        except (NetworkError, KeyError, ValueError, TypeError):
            return []

    async def _ask(self, op: str, **values: Any) -> dict[str, Any]:
        if self._child is None or not self.healthy:
            raise NetworkError("the DHT is down")
        return await self._child.ask(op, DHT_REQUEST_S, **values)

    async def _supervise(self) -> None:
        """Keep a node running until cancelled, or until hivemind turns out to be missing."""
        backoff = Backoff(DHT_RESTART_FIRST_S, DHT_RESTART_S, self._generator)
        while True:
            began = time.monotonic()
            reason = await self._run_once()
            self._down()
            child, self._child = self._child, None
            if child is not None:
                await child.kill()
            if self.missing:
                self._pid_file.release()
                return
            if time.monotonic() - began > DHT_STEADY_S:
                backoff.reset()
            self._reminders.tell("down", f"the DHT is down and is being restarted: {reason}")
            await asyncio.sleep(backoff.next())
            self.restarts += 1

    async def _run_once(self) -> str:
        """Run one process as long as it works; return the reason why it stopped."""
        try:
            if self._child is None:
                self.spawn()
            assert self._child is not None
            return await self._serve(self._child)
        except RequestError as refusal:
            if refusal.kind == "port" and self._any_port:
                self._port = 0  # another process took the earlier port
            self.missing = refusal.kind == "missing"
            if self.missing:
                self._reminders.tell("missing", f"no DHT, static addresses only: {refusal}")
            reason = str(refusal)
        except (NetworkError, OSError) as error:
            reason = str(error)
        if self._first is not None and not self._first.done():
            self._first.set_exception(NetworkError(f"the DHT node does not start: {reason}"))
            self._first.exception()  # it need not be awaited
        return reason

    async def _serve(self, child: ChildProcess) -> str:
        self._take(await child.attach(DHT_START_S))
        self._port = self._port or port_of(self._addresses)  # a restarted node keeps its port, by which others know it
        self._due.clear()
        self.healthy = True
        self.changed.set()
        self._reminders.over("down", "the DHT is up again")
        if self._first is not None and not self._first.done():
            self._first.set_result(None)
        misses = 0
        while True:
            if not await self._join(child):  # else it knows others now, and callers wait for that
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._probe_s):
                        await child.gone.wait()
                    return "its process has ended"
            try:
                self._take(await child.ask("probe", DHT_REQUEST_S))
                misses = 0
            except NetworkError as error:
                # a refused probe tells that p2pd is gone, which nothing else would
                misses += 1
                late = not isinstance(error, RequestError) or error.kind == "late"
                if misses == DHT_MISSES or not late or child.gone.is_set():
                    raise

    def _take(self, reply: Mapping[str, Any]) -> None:
        """Take over the reply to a probe; NetworkError if it is malformed."""
        known = self.known
        try:
            self.peer = str(reply["peer"])
            self._addresses = tuple(map(str, reply["addresses"]))
            self.known, self.refused = int(reply["known"]), int(reply["refused"])
        except (KeyError, TypeError, ValueError) as error:
            raise NetworkError(f"the child process answered a probe with an invalid reply: {error}") from None
        if self.known and not known:
            self.changed.set()

    async def _join(self, child: ChildProcess) -> bool:
        """Join all bootstraps, not only the first that answers: a DHT may be split, with each in another part. Return
        whether one was joined that had not been before.
        """
        now = time.monotonic()
        due = [address for address in self._bootstraps if self._due.get(address, (now, None))[0] <= now]
        new = False
        if not due:
            return new
        try:
            failed: Any = (await child.ask("join", DHT_REQUEST_S, bootstraps=due))["failed"]
            reasons = {address: str(failed[address]) for address in due if address in failed}
        except (NetworkError, KeyError, TypeError) as error:
            reasons = dict.fromkeys(due, str(error))
        for address in due:
            joined = address in self._due and self._due[address][1] is None
            if address in reasons:
                earlier = self._due.get(address, (now, None))[1]
                backoff = earlier or Backoff(DHT_JOIN_FIRST_S, DHT_JOIN_LAST_S, self._generator)
                self._due[address] = (now + backoff.next(), backoff)
                self._reminders.tell(address, f"the DHT's bootstrap {address} is out of reach: {reasons[address]}")
            else:
                self._due[address] = (now, None)
                self._reminders.over(address, f"the DHT's bootstrap {address} is back")
                if not joined:
                    new = True
                    self.changed.set()
        return new

    def _down(self) -> None:
        self.healthy = False
        self.known = 0

    def _remove_scratch(self) -> None:
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = ""


def _unsigned(record: AddressRecord) -> bytes:
    return seal_record(record, None, b"")


def _environment(token: str) -> dict[str, str]:
    """Return the child's environment: that of this process, with the path of this dimat, without warnings and GPUs."""
    root = str(Path(__file__).resolve().parents[3])
    path = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        TOKEN_VARIABLE: token,
        "PYTHONPATH": os.pathsep.join([root, path] if path else [root]),
        "PYTHONWARNINGS": "ignore",
        "HIVEMIND_LOGLEVEL": "WARNING",
        "HIVEMIND_COLORS": "0",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
