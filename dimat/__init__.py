"""dimat: a peer-to-peer agent that trains and merges neural networks.

The names below are the library's stable interface. They are imported lazily, so that `import dimat` and the command
line start fast, without loading torch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dimat.version import __version__ as __version__

# A process that is forked beside an agent (a DataLoader's worker) dies in gRPC's fork handlers, though it does not use
# gRPC. The variable is read when gRPC is loaded, so it is set before that.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

_HOME = {
    "derive_symmetry": "dimat.symmetry",
    "verify_symmetry": "dimat.symmetry",
    "permute_weights": "dimat.symmetry",
    "align_weights": "dimat.merge",
    "merge_weights": "dimat.merge",
    "barrier": "dimat.merge.barrier",
    "run_simulation": "dimat.simulate",
    "Agent": "dimat.agent.attach",
}

__all__ = [  # noqa: RUF022  (the order in which they are used)
    "derive_symmetry",
    "verify_symmetry",
    "permute_weights",
    "align_weights",
    "merge_weights",
    "barrier",
    "run_simulation",
    "Agent",
]

if TYPE_CHECKING:
    from dimat.agent.attach import Agent
    from dimat.merge import align_weights, merge_weights
    from dimat.merge.barrier import barrier
    from dimat.simulate import run_simulation
    from dimat.symmetry import derive_symmetry, permute_weights, verify_symmetry


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'dimat' has no attribute {name!r}")
