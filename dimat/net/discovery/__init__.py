"""Finding peers: addresses on the map, and signed records in the DHT.

Knows nothing of transfers.
"""
