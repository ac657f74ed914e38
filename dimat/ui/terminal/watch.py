"""Shows a text repeatedly: on a terminal, each one replaces the one before."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from dimat.ui.terminal.run import is_terminal

if TYPE_CHECKING:
    from rich.live import Live


class LiveText:
    """Shows one text at a time on `stream` (stdout, if none is given). The last text stays on the terminal. Texts must
    not have control characters (`dimat.ui.text.clean`)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._live: Live | None = None
        self._shown = False

    def __enter__(self) -> LiveText:
        if is_terminal(self._stream):
            from rich.live import Live

            from dimat.ui.terminal.run import open_screen

            # no thread draws, so that nothing comes between what others write
            self._live = Live(console=open_screen(self._stream), auto_refresh=False, redirect_stdout=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()  # gives the cursor back

    def show(self, text: str) -> None:
        """Show a text of one or more lines in place of the one before."""
        if self._live is not None:
            from rich.text import Text

            # a row that is too long is cut rather than broken, so that columns stay under each other
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
            return
        self._stream.write("\n" * self._shown + text + "\n")
        self._stream.flush()  # a log or a pipe is read meanwhile
        self._shown = True
