"""The dashboard in a real Chromium, over real agents in processes of their own. References: what their logs tell, and
axe-core's rules for accessibility."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.agent.processes import network
from tests.ui.dashboard.runs import MARKUP
from tests.ui.dashboard.serving import Looking, page, serving, views

pytestmark = pytest.mark.live

ABC = ("lab-a", "lab-b", "lab-c")
SCHEDULE = "rounds = 0\nround_deadline_s = 5\njoin_wait_s = 3"
TRAIN = "epochs_per_round = 20\nbatch_size = 8\noptimizer = { name = 'adam', lr = 0.003 }"
EXCHANGE = "lost_after_s = 1\nidle_s = 4"
RED = "rgb(208,32,42)"
NODES = "(document.getElementById('graph')._cyreg?.cy.nodes() ?? [])"


def node(name: str) -> str:
    return f"document.getElementById('graph')._cyreg.cy.$id('{name}')"


def state(name: str) -> str:
    return f"document.querySelector('#agents tr[data-key={name}]')?.dataset.state"


def check_axe(looking: Looking, where: str) -> None:
    """Check that axe-core finds no serious or critical fault."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    faults = axe.run(looking.page).response["violations"]
    grave = [
        (fault["id"], fault["impact"], [n["html"] for n in fault["nodes"]][:3])
        for fault in faults
        if fault["impact"] in ("serious", "critical")
    ]
    assert not grave, f"{where}: {grave}"


@pytest.mark.slow
def test_a_network_lives_dies_and_comes_back(tmp_path: Path, free_ports: list[int], browser: Any) -> None:
    """Three nodes appear, the curve of the metric grows, a killed agent turns red, and comes back."""
    with network(tmp_path, ABC, free_ports, schedule=SCHEDULE, train=TRAIN, exchange=EXCHANGE) as net:
        lives = {name: net.start(name) for name in ABC}
        net.wait_for("lab-a", "AgentStarted")
        with serving(tmp_path, tmp_path / "dashboard.err") as address, page(browser) as looking:
            looking.open("network", address)
            looking.until(f"{NODES}.length === 3")
            for name in ABC:
                net.wait_for(name, "Merged")
                looking.until(f"{state(name)} !== undefined && {node(name)}.data('state') === {state(name)}")
            looking.until(" && ".join(f"{state(name)} === 'running'" for name in ABC))

            looking.open("curves")
            points = "Number(document.getElementById('chart-metric').dataset.points)"
            looking.until(f"{points} >= 2")
            before = looking.page.evaluate(points)
            looking.until(f"{points} > {before}")
            drawn = "document.getElementById('curve-keys').innerText"
            assert all(name in looking.page.evaluate(drawn) for name in ABC)

            looking.open("network")
            lives["lab-b"].signal(signal.SIGKILL)
            lives["lab-b"].wait()
            looking.until(f"{state('lab-b')} === 'lost'")
            looking.until(f"{node('lab-b')}.style('background-color') === '{RED}'")
            assert looking.page.evaluate(f"{node('lab-b')}.data('label')") == "lab-b\nlost"
            assert looking.page.evaluate(f"{state('lab-a')}") in ("running", "late")

            net.start("lab-b")
            net.wait_for("lab-b", "AgentStarted", 2)
            looking.until(f"{state('lab-b')} === 'running'")
            looking.until(f"{node('lab-b')}.style('background-color') !== '{RED}'")

            looking.page.set_viewport_size({"width": 360, "height": 740})
            for view in views():
                looking.open(view)
                looking.until("document.getElementById('notices').hidden")
                assert looking.overflow() <= 0, view
            assert not looking.faults


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible_by_axe(served: str, browser: Any, scheme: str) -> None:
    """No serious or critical fault by axe-core's rules, in any view, wide and narrow; nothing overflows, and nothing is
    said on the console."""
    with page(browser, color_scheme=scheme) as looking:
        looking.open("network", served)
        for view in views():
            looking.open(view)
            for width in (1280, 360):
                looking.page.set_viewport_size({"width": width, "height": 740})
                check_axe(looking, f"{view} at {width} px")
                assert looking.overflow() <= 0, f"{view} at {width} px"
        assert not looking.faults


def test_nothing_is_hidden_on_a_narrow_screen(served: str, browser: Any) -> None:
    """At 360 px every view's link is within the window, no word or number of a table of shares is broken, names in the
    picture stand outside of the circle, and columns without a word in them are left out. Reference: the run of
    `tests.ui.dashboard.runs`, in which an agent is lost and nobody is doing anything."""
    narrow = {"width": 360, "height": 740}
    with page(browser, viewport=narrow) as looking:
        looking.open("network", served)
        looking.until(f"{NODES}.length === 3")
        right = "Math.max(...[...document.querySelectorAll('nav a')].map((a) => a.getBoundingClientRect().right))"
        assert 0 < looking.page.evaluate(right) <= 360
        sides = [looking.page.evaluate(f"{node(name)}.data('side')") for name in ABC]
        assert sides == ["top", "right", "left"]
        heads = looking.page.evaluate("[...document.querySelectorAll('#agents thead th')].map((th) => th.textContent)")
        assert "Why" in heads
        assert "Doing" not in heads
        assert "round\n1 to 3 of 3" in looking.page.inner_text("#facts")
        looking.open("alignment")
        looking.until("document.querySelectorAll('#groups td').length > 0")
        tall = "[...document.querySelectorAll('#groups thead th')].map((cell) => cell.getBoundingClientRect().height)"
        assert max(looking.page.evaluate(tall)) < 40  # one line
        assert not looking.faults


def test_by_keyboard_alone(served: str, browser: Any) -> None:
    """The skip link comes first, each view is reached with Tab and Enter, focus is seen, an agent is chosen from the
    table, and a peer's text is never markup."""
    with page(browser, reduced_motion="reduce") as looking:
        looking.open("network", served)
        looking.until(f"{state('lab-a')} !== undefined")
        keyboard = looking.page.keyboard
        keyboard.press("Tab")
        assert looking.page.evaluate("document.activeElement.className") == "skip"
        assert looking.page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
        for view in views():
            keyboard.press("Tab")
            assert looking.page.evaluate("document.activeElement.hash") == f"#{view}"
            assert looking.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            keyboard.press("Enter")
            looking.until(f"!document.getElementById('view-{view}').hidden")
        looking.open("network")
        reached: list[str] = []
        for _ in range(12):
            keyboard.press("Tab")
            reached.append(looking.page.evaluate("document.activeElement.id || document.activeElement.innerText"))
            if reached[-1] == "lab-b":
                break
        assert reached[:5] == ["agent", "layout", "zoom-in", "zoom-out", "zoom-fit"]
        assert reached[-1] == "lab-b", reached
        keyboard.press("Enter")
        looking.until("document.getElementById('agent').value === 'lab-b'")
        looking.until("document.querySelector('#agents tr.chosen')?.dataset.key === 'lab-b'")
        looking.open("log")
        looking.until("document.getElementById('log-lines').childElementCount > 0")
        looking.page.select_option("#agent", "")
        looking.until(f"document.getElementById('log-lines').innerText.includes({MARKUP!r})")
        assert looking.page.evaluate("document.querySelectorAll('main img').length") == 0
        assert not looking.faults
