"""Shows runs to people: terminal, reports, trackers, dashboard.

Gets events; nothing below imports it.
"""
