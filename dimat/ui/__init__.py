"""What people see of a run: terminal, reports, trackers, dashboard.

Is told through events; nothing below imports it.
"""
