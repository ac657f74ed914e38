"""The door: `python agent.py lab-a.toml` is `dimat agent lab-a.toml`."""

import sys

from dimat.cli import main

if __name__ == "__main__":
    sys.exit(main(["agent", *sys.argv[1:]]))
