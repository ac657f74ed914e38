"""The command line's command tree, to which the other modules of this package add commands."""

from __future__ import annotations

from cyclopts import App, Group

from dimat.version import __version__

app = App(
    name="dimat",
    help="Train, align and merge neural networks among peers, without a server.",
    version=f"dimat {__version__}",
    help_on_error=False,
    suppress_keyboard_interrupt=False,  # `main` distinguishes Ctrl-C from SIGTERM and reports the stop
)
topology = App(name="topology", help="Graphs, schedules and mixing weights.")
symmetry = App(name="symmetry", help="Groups of a model's tensor axes that must be permuted together.")
keys = App(name="keys", help="Keys and certificates of a collaboration's agents.")
config = App(name="config", help="Keys and values of experiments.")
app.command(config)
app.command(topology)
app.command(symmetry)
app.command(keys)
_OPTIONS = Group("Options")
app["--help"].group = _OPTIONS
app["--version"].group = _OPTIONS
