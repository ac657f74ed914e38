"""Finding peers: addresses of the map, and signed records in the DHT.

Knows nothing of transfers.
"""
