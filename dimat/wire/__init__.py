"""The wire protocol, version 1: names of services and headers; messages are in `v1`."""

PROTOCOL = 1
"""Version of the protocol; agents of different versions refuse each other."""
PEER_SERVICE = "dimat.wire.v1.Peer"
"""Service of short calls: Hello, Manifests, Status, DialBack."""
DATA_SERVICE = "dimat.wire.v1.Data"
"""Service of transfers, in raw bytes."""
FETCH = "Fetch"
"""Method of `DATA_SERVICE`."""
AGENT_HEADER = "dimat-agent"
"""Header that names the caller on an insecure network, where no certificate does."""
QUERY_HEADER = "dimat-asking"
"""Header of a person's tool that calls in an agent's name: its hello does not count as the agent's."""
