"""The dashboard: a run's events as a web page, live or afterwards.

`state` folds events into what the page shows (pure), `follow` and `folder` read logs, `watched` holds the model that
is served, `server` answers requests, `guard` decides whose, `agent` serves from within an agent; `static/` is the page.
"""
