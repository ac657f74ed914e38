"""Many agents on one host, with the round code of the daemon: `run_simulation` and what it is made of."""

from dimat.simulate.run import run_simulation

__all__ = ["run_simulation"]
