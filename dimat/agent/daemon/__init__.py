"""A real agent as a long-running process: asyncio, gRPC, its folder, signals, status.

Knows no simulator.
"""
