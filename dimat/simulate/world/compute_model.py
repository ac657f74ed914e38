"""Computers in virtual time: how long an agent's local training takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dimat.config import ComputeConfig
from dimat.errors import ConfigError, unknown_agent
from dimat.simulate.world.faults import Fault, Slow
from dimat.simulate.world.link_model import log_uniform


class Compute:
    """The agents' computers. `faults`: faults of the network, of which only slow-downs count.

    Speeds depend only on `seed` and the agent's name. Raises ConfigError for the speed of an unknown agent.
    """

    def __init__(self, config: ComputeConfig, agents: Sequence[str], seed: int, faults: Iterable[Fault] = ()) -> None:
        known = set(agents)
        for name in config.speeds:
            if name not in known:
                raise ConfigError(unknown_agent("simulate.compute.speeds", name, agents))
        self._config = config
        self._seed = seed
        self._speeds: dict[str, float] = dict(config.speeds)
        self._slow: dict[str, list[Slow]] = {}
        for fault in faults:
            if isinstance(fault, Slow):
                self._slow.setdefault(fault.agent, []).append(fault)

    def speed(self, agent: str) -> float:
        """Return an agent's speed before anything slows it."""
        found = self._speeds.get(agent)
        if found is None:
            found = self._speeds[agent] = log_uniform(self._config.speed, self._seed, "compute", "speed", agent)
        return found

    def train_s(self, agent: str, steps: int, learn: bool, now: float) -> float:
        """Return the virtual seconds of a round's training that begins now; 0 where the agent does not `learn`.

        If the agent is slowed down meanwhile, the rest of its work takes longer by that factor.
        """
        if not learn:
            return 0.0
        config = self._config
        left = (config.round_s if config.step_s is None else config.step_s * steps) / self.speed(agent)
        slow = self._slow.get(agent)
        if slow is None:
            return left
        time, factor = now, 1.0
        for change in slow:
            if change.at_s > time:
                worked = (change.at_s - time) / factor
                if worked >= left:
                    break
                left -= worked
                time = change.at_s
            factor = change.factor
        return time + left * factor - now
