"""Makes an agent's round machine, new or from a checkpoint, for daemon and simulator."""

from __future__ import annotations

from dimat.agent.protocol.basis import BasisId
from dimat.agent.protocol.round import RoundMachine
from dimat.agent.protocol.state import MachineState
from dimat.agent.setup.schedule import RunSchedule
from dimat.seeds import derive_seed

ALL = "all"
"""The founder of a basis in which all agents begin."""


def machine_for(
    schedule: RunSchedule, agent: str, state: MachineState | None, published: int, founding: str = ""
) -> RoundMachine:
    """Return the round machine of an agent. `state`: of its newest checkpoint, None at its first start; `published`:
    the last round whose snapshot it has recorded, 0 for none.

    If agents come to share a basis and all begin with the same weights (`train.initialisation = "shared"`), they
    begin in one basis, and are never aligned. `founding`: hash of the weights with which this agent begins, since
    another build of torch may begin with others; agents with other weights are in other bases, and come to share one
    as usual.
    """
    config, rules = schedule.config, schedule.rules()
    shared = rules.basis_gossip and config.train.initialisation == "shared"
    nonce = f"{derive_seed(config.seed, 'basis', founding if shared else agent):016x}"
    return RoundMachine(
        agent,
        config.run,
        schedule.plan(agent),
        rules,
        basis=BasisId(0, ALL if shared else agent, nonce),
        base=schedule.base,
        state=state,
        published=published,
    )
