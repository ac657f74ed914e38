"""Shows runs to people: terminal, reports, trackers, dashboard.

Receives events; no lower package imports it.
"""
