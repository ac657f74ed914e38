"""Many agents on one host, with the daemon's round code: `run_simulation`."""

from dimat.simulate.run import run_simulation

__all__ = ["run_simulation"]
