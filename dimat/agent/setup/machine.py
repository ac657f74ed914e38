"""Makes an agent's round machine, new or from a checkpoint, for daemon and simulator."""

from __future__ import annotations

from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.round import RoundMachine
from dimat.agent.protocol.state import MachineState
from dimat.agent.setup.schedule import RunSchedule
from dimat.seeds import derive_seed


def machine_for(schedule: RunSchedule, agent: str, state: MachineState | None, published: int) -> RoundMachine:
    """Return the round machine of an agent. `state`: of its newest checkpoint, None at its first start; `published`:
    the last round whose snapshot it has recorded, 0 for none."""
    config = schedule.config
    nonce = f"{derive_seed(config.seed, 'basis', agent):016x}"
    return RoundMachine(
        agent,
        config.run,
        schedule.plan(agent),
        schedule.rules(),
        basis=BasisId(0, agent, nonce),
        base=schedule.base,
        state=state,
        published=published,
    )
