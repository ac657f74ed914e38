"""The command line: each command parses arguments, calls one function and prints the result.

Heavy modules (torch above all) are imported inside the commands, so that `dimat --help` answers at once.
"""

from __future__ import annotations

from dimat.cli import early as early  # before all that takes long

# isort: split
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from cyclopts import CycloptsError

from dimat.cli import (
    advise,
    agent,
    barrier,
    config,
    dashboard,
    dht,
    doctor,
    experiment,
    keys,
    merge,
    symmetry,
    topology,
)
from dimat.cli.agent import SAME_S
from dimat.cli.app import app
from dimat.cli.shared import say
from dimat.cli.streams import check_working_folder, open_closed_streams
from dimat.errors import ConfigError, DataError, DimatError, told_os_error
from dimat.ui.text import clean

LONGEST = 2000
"""Most characters of an error message."""
TRACEBACK = "DIMAT_TRACEBACK"
"""Environment variable that makes internal errors show their traceback."""
COMMANDS = (advise, agent, barrier, config, dashboard, dht, doctor, experiment, keys, merge, symmetry, topology)
"""The modules that add their commands to `app`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; an error becomes one line on stderr."""

    terminated, began_s = False, 0.0

    def terminate(*_: object) -> None:
        nonlocal terminated, began_s
        if terminated and time.monotonic() - began_s < SAME_S:
            return
        terminated, began_s = True, time.monotonic()
        raise KeyboardInterrupt

    def end(*_: object) -> None:
        if time.monotonic() - began_s >= SAME_S:
            os._exit(143)

    open_closed_streams()
    words = sys.argv[1:] if arguments is None else arguments
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        if not {"--help", "-h", "--version"} & set(words):
            check_working_folder()
        _check_words(words)
        code = app(
            words,
            exit_on_error=False,
            print_error=False,
            result_action="return_int_as_exit_code_else_zero",
        )
        return 143 if terminated else code
    except CycloptsError as error:
        _complain(f"{' '.join(str(error).split())} (see --help)")
        return ConfigError.exit_code
    except DimatError as error:
        _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt as stop:
        # one that was raised inside `exec` or `eval` (a dataclass being made, say) leaves a mark in CPython, by which
        # `python -m` ends with SIGINT whatever the exit code; running something else that way wipes it out
        exec("")
        say(f"dimat: {stop}" if str(stop) else "dimat: stopped")
        return 143 if terminated else 130
    except BrokenPipeError:
        # the reader of our output has gone; keep the interpreter from complaining when it flushes
        sys.stdout = None
        return 0
    except OSError as error:
        _complain(told_os_error(error))
        return DataError.exit_code
    except MemoryError:
        _complain("out of memory: this needs more than the machine has; use smaller models or batches, or fewer agents")
        return DimatError.exit_code
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        _complain(
            f"internal error, please report it: {type(error).__name__}: {error} ({Path(place.filename).name}, line "
            f"{place.lineno}); with {TRACEBACK}=1 in the environment the same command shows more"
        )
        return DimatError.exit_code
    finally:
        # what the interpreter ends with (workers, locks) is not cut off by the same signal, come twice
        signal.signal(signal.SIGTERM, end if terminated and arguments is None else before)


def _check_words(words: Sequence[str]) -> None:
    """Raise ConfigError for arguments that name nothing; read as a path, an empty one would be this very folder."""
    for number, word in enumerate(words):
        after = f" (after {words[number - 1]!r})" if number else ""
        if not word:
            raise ConfigError(f"argument {number + 1} is empty{after}; is a variable of the shell not set?")
        if "\0" in word:
            raise ConfigError(f"argument {number + 1} holds a NUL character{after}")


def _complain(text: str) -> None:
    """Print an error as one line of bounded length, whatever names and values it contains."""
    line = clean(text)
    say(f"dimat: {line if len(line) <= LONGEST else line[:LONGEST] + ' …'}")
