"""`python -m dimat.cli` is `dimat`."""

from dimat.cli import main

raise SystemExit(main())
