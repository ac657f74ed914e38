"""The network between agents."""

import os

# gRPC writes lines for its own developers to stderr, read when it is loaded; what matters is raised or said by us
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
