"""Drives all agents' round machines on a virtual clock, over links that may fail.

Events wait in a queue ordered by virtual time, then by when they were put there. Work (training, merging) is
handed out at once and its outcome is queued for the virtual time at which it ends; the loop waits for it only when
its turn comes. So workers run ahead in parallel, while the order in which machines see events, and with it every
result, depends on the experiment alone. Each node brings its own `Work`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

from dimat import events
from dimat.agent.protocol import messages as m
from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.round import RoundMachine
from dimat.agent.protocol.state import MachineState
from dimat.errors import DimatError
from dimat.simulate.announcements import Announcer
from dimat.simulate.in_process_network import MemoryNetwork
from dimat.simulate.node import Node, StepListener
from dimat.simulate.transfers import TransferScheduler
from dimat.simulate.world.clock import Clock
from dimat.simulate.world.faults import Crash, CrashPoint, Cut, Fault, FaultPlan, Heal, Join, Leave, Restart
from dimat.simulate.world.link_model import Links
from dimat.weights.snapshot import RecordedSnapshot


class Driver:
    """All agents of one run.

    `nodes`: each agent's plan, work and machine factory, by agent; `emit`: called with every event.

    `max_time_s`: time at which all agents finish their round and leave.
    """

    def __init__(
        self,
        run: str,
        nodes: Mapping[str, Node],
        network: MemoryNetwork,
        links: Links,
        faults: FaultPlan,
        emit: Callable[[events.Event], None],
        readers: Callable[[str, int], Sequence[str]],
        *,
        max_time_s: float | None = None,
    ) -> None:
        self.clock = Clock()
        self.nodes = dict(nodes)
        self._run = run
        self._network = network
        self._links = links
        self._points: dict[tuple[str, int, str], CrashPoint] = {(p.agent, p.round, p.on): p for p in faults.on_action}
        self._emit = emit
        self._readers = readers
        self.trace: StepListener | None = None
        self._late = faults.late
        self._max_time_s = max_time_s
        self._announcer = Announcer(self.clock, network, links, self.nodes, self._post)
        self._transfers = TransferScheduler(self.clock, network, links, self.nodes, self._post, self._handle, emit)
        self._stopping = threading.Event()
        self._up = 0
        self._through = 0
        self._coming = len(faults.late)  # newcomers, and agents that are down and will be back
        for name in self.nodes:
            if name not in self._late:
                self._up += 1
                self.clock.put(0.0, self._start, name, False)
        for fault in faults.timed:
            self.clock.put(fault.at_s, self._apply_fault, fault)
        if max_time_s is not None:
            self.clock.put(max_time_s, self._time_up)

    def stop(self) -> None:
        """End the run as Ctrl-C does, from another thread."""
        self._stopping.set()

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping.is_set()

    def run(self) -> None:
        """Run until every agent has left or is down for good."""
        while self._up or self._coming:
            if self._stopping.is_set():
                raise KeyboardInterrupt
            if not self.clock.step():
                waiting = [f"{a} ({n.machine.phase.value})" for a, n in self.nodes.items() if n.machine is not None]
                raise DimatError(f"the simulation has nothing left to do, yet agents wait: {', '.join(waiting)}")

    @property
    def spared(self) -> Sequence[CrashPoint]:
        """Crashes that never happened, because their agent never reached their step."""
        return list(self._points.values())

    @property
    def deserted(self) -> bool:
        """Whether all agents left or crashed for good before they had finished."""
        return not self._through

    # ── lives ────────────────────────────────────────────────────────────────────────────────────────────────
    def _start(self, name: str, join: bool, state: MachineState | None = None, published: int = 0) -> None:
        node = self.nodes[name]
        back = node.life > 0 or join
        node.life += 1
        node.state = "up"
        node.machine = node.make(state, published)
        if self.trace is not None:
            self.trace.begin(self.clock.now, name, state, published)
        self._handle(name, m.Started(join=join))
        if self._max_time_s is not None and self.clock.now >= self._max_time_s:
            self._handle(name, m.TimeUp())
        if back:
            self._announcer.connect(name)
            self._transfers.retry()

    def _crash(self, name: str, cause: Crash | CrashPoint) -> None:
        node = self.nodes[name]
        if node.machine is None:
            return
        self._emit(events.AgentCrashed(agent=name, round=node.machine.round, back_s=cause.restart_after_s))
        self._take_down(name, "down")
        self.nodes[name].work.crash()
        if cause.restart_after_s is not None:
            node.outage = cause
            self._coming += 1

    def _restart(self, name: str, cause: Crash | CrashPoint) -> None:
        node = self.nodes[name]
        if node.outage is not cause:
            return  # that crash found it down already, or it has left meanwhile
        node.outage = None
        self._coming -= 1
        self._up += 1
        found = node.work.restore()()
        if found is None:
            self._start(name, join=name in self._late)
        else:
            self._start(name, join=False, state=found.state, published=found.published)

    def _leave(self, name: str) -> None:
        """An agent goes for good: in the middle of its rounds, while it still serves, or while it is down."""
        node = self.nodes[name]
        node.leaves = True
        if node.state == "up":
            self._handle(name, m.Stop("left"))
        elif node.state == "through":
            self._take_down(name, "gone")
            self._announcer.farewell(name, "left", 0)
        elif node.state == "down":
            # it can tell nobody, and will not be back
            self._coming -= node.outage is not None
            node.outage = None
            self._emit(events.AgentLeft(agent=name, round=node.round, reason="left"))

    def _take_down(self, name: str, state: str) -> None:
        """End an agent's process: transfers to it are lost, transfers from it break off."""
        node = self.nodes[name]
        node.settle()
        if node.state == "up":
            self._up -= 1
        if node.machine is not None:
            node.round = node.machine.round
        node.state, node.machine = state, None
        node.life += 1
        if node.timer:
            self.clock.call_off(node.timer)
            node.timer = 0
        self._transfers.drop_all(name)
        if not node.serves:
            self._transfers.break_off(lambda _, publisher: publisher == name)
        if state == "gone":
            self._transfers.retry()  # readers that wait for its offers must learn that they will not come

    def _apply_fault(self, fault: Fault) -> None:
        match fault:
            case Crash(agent=name):
                self._crash(name, fault)
            case Restart(agent=name, crash=crash):
                self._restart(name, crash)
            case Join(agent=name):
                self._coming -= 1
                self._up += 1
                self._start(name, join=True)
            case Leave(agent=name):
                self._leave(name)
            case Cut(id=number, groups=groups):
                self._links.cut(number, groups)
                self._emit(events.LinksCut(groups=groups))
                reachable = self._links.reachable
                self._transfers.break_off(lambda a, b: not reachable(a, b))
            case Heal(id=number):
                self._links.heal(number)
                self._emit(events.LinksHealed())
                self._announcer.connect_all()
                self._transfers.retry()
            case _:
                pass  # slow-downs are the computers' affair

    def _time_up(self) -> None:
        for name in self.nodes:
            self._handle(name, m.TimeUp())

    # ── events in, actions out ───────────────────────────────────────────────────────────────────────────────
    def _post(self, name: str, time_s: float, event: m.Event | Callable[[], m.Event]) -> None:
        """Hand an agent an event (or what a function gives then) at a time, if it still lives the same life."""
        self.clock.put(time_s, self._deliver, name, self.nodes[name].life, event)

    def _deliver(self, name: str, life: int, event: m.Event | Callable[[], m.Event]) -> None:
        if self.nodes[name].life == life:
            self._handle(name, event() if callable(event) else event)

    def _set_timer(self, name: str, number: int, seconds: float) -> None:
        """Set an agent's timer; the one before is over: a machine sets its next one when the round has changed."""
        node = self.nodes[name]
        if node.timer:
            self.clock.call_off(node.timer)
        node.timer = self.clock.put(self.clock.now + seconds, self._ring, name, number)

    def _ring(self, name: str, number: int) -> None:
        self.nodes[name].timer = 0
        self._handle(name, m.Deadline(number))

    def _handle(self, name: str, event: m.Event) -> None:
        node = self.nodes[name]
        machine = node.machine
        if machine is None:
            return
        if node.unsure is not None:
            node.settle()
        actions = machine.handle(event)
        if self.trace is not None:
            self.trace.step(self.clock.now, name, event, actions)
        for action in actions:
            point = self._points.pop((name, *moment(action, machine.round)), None) if self._points else None
            if point is not None:
                self._crash(name, point)
                if point.restart_after_s is not None:
                    self.clock.put(self.clock.now + point.restart_after_s, self._restart, name, point)
                return
            self._perform(name, machine, action)

    def _perform(self, name: str, machine: RoundMachine, action: m.Action) -> None:
        now, node = self.clock.now, self.nodes[name]
        match action:
            case m.Emit(fact=fact):
                self._emit(fact)
            case m.SetTimer(round=number, seconds=seconds):
                self._set_timer(name, number, seconds)
            case m.Fetch():
                self._transfers.fetch(name, machine.round, action)
            case m.Release(peer=peer, round=number, root=root):
                self._transfers.drop(name, peer, number, root)
            case m.Train():
                self._train(name, action)
            case m.CheckpointAction(round=number, stage=stage):
                # not waited for here: agents' work goes on side by side until one of them is to act on its checkpoint
                node.unsure = node.work.checkpoint(action)
                self._emit(events.Checkpointed(agent=name, round=number, stage=stage))
            case m.Publish():
                self._publish(name, action)
            case m.AdoptBasis():
                self._adopt_basis(name, machine.basis, action)
            case m.AdoptWeights():
                wait = node.work.adopt_weights(action, self._transfers.source(name, action.peer, action.root))
                self._post(name, now, lambda: m.WeightsAdopted(action.root, wait()))
            case m.MergeAction():
                sources = {part.peer: self._transfers.source(name, part.peer, part.root) for part in action.parts}
                merge = node.work.merge(action, sources)
                self._post(name, now + node.work.merge_s(action, now), lambda: m.MergeDone(action.round, merge()))
            case m.Exit(reason=reason):
                self._exit(name, machine.round, reason)

    def _train(self, name: str, action: m.Train) -> None:
        node, now = self.nodes[name], self.clock.now
        # both at once, one after the other: another agent's work need not wait for the driver in between
        train, record = node.work.train(action), node.work.record(action)

        def trained() -> m.Event:
            result, recorded = train(), record()
            self._keep(node.recorded, recorded)
            if action.learn:
                train_s = result.cpu_s.get("train", 0.0)
                self._emit(events.Trained(agent=name, round=action.round, result=result, train_s=train_s))
            return m.TrainingDone(action.round, recorded.payload.root)

        self._post(name, now + node.work.train_s(action, now), trained)

    def _keep(self, held: dict[str, RecordedSnapshot], recorded: RecordedSnapshot) -> None:
        """Hold a snapshot that was recorded, whoever else lets equal content go, and the one before: an agent whose
        newest checkpoint is damaged publishes that again."""
        root = recorded.payload.root
        self._network.hold(root)
        over = [root] if root in held else list(held)[:-1]
        for old in over:
            del held[old]
            self._network.release(old)
        held[root] = recorded

    def _publish(self, name: str, action: m.Publish) -> None:
        node = self.nodes[name]
        node.settle()
        recorded = node.recorded.get(action.root)
        if recorded is None:
            raise DimatError(f"{name} was asked to publish a snapshot that it has not recorded")
        manifest = action.manifest(self._run, name, recorded)
        self._network.publish(manifest)
        self._emit(
            events.Published(
                agent=name,
                round=action.round,
                snapshot=action.root,
                bytes=recorded.payload.bytes,
                basis=manifest.basis,
            )
        )
        for reader in self._readers(name, action.round):
            self._announcer.tell(manifest, reader, action.basis)

    def _adopt_basis(self, name: str, own: BasisId, action: m.AdoptBasis) -> None:
        wait = self.nodes[name].work.adopt_basis(action, self._transfers.source(name, action.peer, action.root))

        def done() -> m.Event:
            return m.BasisChanged.after(action, own, wait())

        self._post(name, self.clock.now, done)

    def _exit(self, name: str, number: int, reason: str) -> None:
        """An agent is through. It says so, unless all end with the same round, and what it offers stays to be had as
        long as its process serves."""
        self._emit(events.AgentLeft(agent=name, round=number, reason=reason))
        offered = self._network.offered(name)
        leaves = self.nodes[name].leaves
        self._through += not leaves
        self._take_down(name, "gone" if leaves else "through")
        if reason != "done":
            self._announcer.farewell(name, reason, offered[-1].round if offered and not leaves else 0)


def moment(action: m.Action, number: int) -> tuple[int, str]:
    """Return an action's round, and the word by which a script of faults names it.

    `number`: the round that the agent is in, for actions that do not say.
    """
    match action:
        case m.Train():
            return action.round, "train"
        case m.CheckpointAction():
            return action.round, action.stage
        case m.Publish():
            return action.round, "publish"
        case m.Fetch():
            return number, "fetch"
        case m.AdoptBasis() | m.AdoptWeights():
            return action.round, "adopt"
        case m.MergeAction():
            return action.round, "merge"
        case _:
            return number, ""
