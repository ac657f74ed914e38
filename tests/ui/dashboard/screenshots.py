"""Takes pictures of the dashboard over a real simulated run: `make screenshots`.

Each view at 1280 and 360 px, light and dark, as `docs/screenshots/VIEW-WIDTH-SCHEME.png`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.agent.processes import ROOT
from tests.ui.dashboard.serving import page, serving, started_browser, views

PICTURES = ROOT / "docs" / "screenshots"


def simulate(folder: Path) -> Path:
    """Simulate the starter's experiment, and return the run folder."""
    dimat = [sys.executable, "-m", "dimat.cli"]
    subprocess.run([*dimat, "init", str(folder / "ring.toml")], check=True, cwd=ROOT)
    run = folder / "run"
    subprocess.run([*dimat, "simulate", str(folder / "ring.toml"), "--out", str(run), "--quiet"], check=True, cwd=ROOT)
    return run


def main() -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        run = simulate(Path(name))
        with serving(run, Path(name) / "said") as address:
            for scheme in ("light", "dark"):
                for width in (1280, 360):
                    take(address, scheme, width)
    print(f"wrote {len(list(PICTURES.glob('*.png')))} pictures to {PICTURES.relative_to(ROOT)}")


def take(address: str, scheme: str, width: int) -> None:
    """Take a picture of each view."""
    with (
        started_browser() as browser,
        page(browser, color_scheme=scheme, viewport={"width": width, "height": 800}) as looking,
    ):
        looking.open("network", address)
        for view in views():
            looking.open(view)
            looking.page.wait_for_timeout(700)  # for what a view asks the server, and for the canvas
            looking.page.screenshot(path=PICTURES / f"{view}-{width}-{scheme}.png", full_page=True)
        if looking.faults:
            raise RuntimeError("\n".join(looking.faults))


if __name__ == "__main__":
    main()
