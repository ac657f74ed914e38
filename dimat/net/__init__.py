"""The network between agents."""

import os

# gRPC writes lines for its own developers to stderr, also of errors, before we can say what is wrong; what matters it
# raises. It reads this when it is loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
