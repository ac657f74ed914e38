"""The command line's tree of commands, which the other modules of this package fill."""

from __future__ import annotations

from cyclopts import App, Group

from dimat.version import __version__

app = App(
    name="dimat",
    help="Train, align and merge neural networks among peers, without a server.",
    version=f"dimat {__version__}",
    help_on_error=False,
    suppress_keyboard_interrupt=False,  # `main` tells Ctrl-C from SIGTERM, and says that it stops
)
topology = App(name="topology", help="Graphs, schedules and mixing weights.")
symmetry = App(name="symmetry", help="Which axes of a model's tensors move together.")
keys = App(name="keys", help="Keys and certificates of a collaboration's agents.")
app.command(topology)
app.command(symmetry)
app.command(keys)
_OPTIONS = Group("Options")
app["--help"].group = _OPTIONS
app["--version"].group = _OPTIONS
