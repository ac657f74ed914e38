"""README and docs/: every command and every piece of code on a page is run, in order, as pasted, or the page's source
says why not (`tests/pages.py` says how). Training is short; what pages say of results is for the tests they name."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
import tomllib
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from dimat.config import ExperimentConfig, TopologyConfig, build
from dimat.topology import build_topology, summarise
from tests.forks import program
from tests.pages import DOCS, OWN_TESTS, README, ROOT, Block, Step, blocks, name_of, steps

PATIENCE_S = 150.0
SHORT = {
    "DIMAT_SCHEDULE__ROUNDS": "1",
    "DIMAT_TRAIN__FIRST_ROUND_EPOCHS": "0.2",
    "DIMAT_TRAIN__EPOCHS_PER_ROUND": "0.2",
    "DIMAT_SIMULATE__WORKERS": "1",  # results are the same, and importing torch in workers takes longer than training
}
OTHERWISE_SHORT: dict[str, dict[str, str]] = {
    "docs/labs.md": {},  # agents run until they are stopped, so that commands can look at them
    # tasks of a few hundred examples, and one that counts in steps
    "docs/tasks.md": {"DIMAT_SCHEDULE__ROUNDS": "2", "DIMAT_SIMULATE__WORKERS": "1"},
    "docs/own-loops.md": {"DIMAT_SCHEDULE__ROUNDS": "2"},
}
PAGES = [*DOCS, README]
FOLDERS = ("benchmarks", "deploy", "examples", "topology")
ALL_BLOCKS = [(page, block) for page in PAGES for block in blocks(page)]


def here(page: Path, block: Block) -> bool:
    """Whether this file runs a block."""
    marked = block.notes.keys() & {"run by", "not run", "file"} or block.place == "as root"
    return block.runs and not marked and not (block.place and name_of(page) in OWN_TESTS)


@pytest.mark.parametrize(("page", "block"), ALL_BLOCKS, ids=[f"{p.name}:{b.line}" for p, b in ALL_BLOCKS])
def test_every_block_is_run_or_says_why_not(page: Path, block: Block) -> None:
    """A block that another test runs names one that exists and reads the page; a reason is more than a word."""
    known = {"file", "exit", "run by", "not run", "fragment"}
    assert block.notes.keys() <= known, f"unknown mark; there are {sorted(known)}"
    if "run by" in block.notes:
        file = ROOT / block.notes["run by"]
        assert page.name in file.read_text(encoding="utf-8"), f"{file.name} does not name {page.name}"
    for mark in ("not run", "fragment"):
        assert len(block.notes.get(mark, "a reason of several words").split()) >= 4
    if block.runs and name_of(page) in OWN_TESTS and not block.notes:
        assert block.place, "say where it runs in its first line, or mark it"
    if block.language == "toml" and not block.notes:
        tree = tomllib.loads(block.text)
        build(ExperimentConfig, tree, f"{page.name}:{block.line}")


def test_other_pages_have_no_commands_that_nobody_runs() -> None:
    """Those of the examples are run by tests/test_examples.py; deploy/README.md and its like name commands of docs/."""
    others = {page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md")} | set(ROOT.glob("*.md"))
    others -= {*PAGES, *(ROOT / "examples").glob("*/README.md")}
    assert {page.parent.name for page in others} >= {"benchmarks", "deploy", "topology"}
    assert [f"{page}:{block.line}" for page in sorted(others) for block in blocks(page) if block.runs] == []


def test_something_is_run() -> None:
    """The checks above are of something: most blocks are run, and this file runs some of most pages."""
    runnable = [(page, block) for page, block in ALL_BLOCKS if block.runs]
    assert len(runnable) > 60
    assert len([1 for _, block in runnable if "not run" in block.notes or block.place == "as root"]) < 25
    assert len({page for page, block in runnable if here(page, block)}) >= 6


@pytest.mark.page
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(here(page, block) for block in blocks(page))], ids=lambda page: page.stem
)
@pytest.mark.timeout(1500)  # the longest page takes two minutes of an idle core
def test_page_as_pasted(tmp_path: Path, page: Path) -> None:
    """Every command of the page, in order, each building on those before."""
    Reading(tmp_path, page).go()


class Reading:
    """A person who follows a page, at one machine or, where the page has several, in a folder for each of them."""

    def __init__(self, folder: Path, page: Path) -> None:
        self.folder = folder
        self.page = page
        self.groups: list[int] = []
        bin_folder = folder / "bin"
        program(bin_folder / "dimat", "-m", "dimat.cli")
        self.python = program(bin_folder / "python")
        self.env = {
            **os.environ,
            **OTHERWISE_SHORT.get(name_of(page), SHORT),
            "PATH": f"{bin_folder}:/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        address = r"(?:127\.0\.0\.1|[\w-]+\.example\.org):73\d\d"
        hosts = sorted({host for block in blocks(page) for host in re.findall(address, block.text)})
        with ExitStack() as stack:  # whatever addresses the page has, here they are on this machine, on free ports
            taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in hosts]
            ports = [each.getsockname()[1] for each in taken]
        self.addresses = {host: f"127.0.0.1:{port}" for host, port in zip(hosts, ports, strict=True)}

    def go(self) -> None:
        try:
            for step in steps(self.page):
                if isinstance(step, Step):
                    self.between(step)
                elif (name := step.notes.get("file")) is not None:
                    place, _, rest = name.rpartition("/")
                    self.at(place or "here").joinpath(rest).write_text(self.text(step), encoding="utf-8")
                elif here(self.page, step):
                    self.run(step)
        finally:
            for group in self.groups:  # what a block left in the background
                with suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)

    def run(self, block: Block) -> None:
        words = [self.python, "-c"] if block.language == "python" else ["bash", "-euc"]
        process = subprocess.Popen(
            [*words, self.text(block)],
            cwd=self.at(block.place or "here"),
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.groups.append(process.pid)
        said, _ = process.communicate()
        expected = int(block.notes.get("exit", "0"))
        assert process.returncode == expected, f"{self.page.name}:{block.line}\n{said}"

    def between(self, step: Step) -> None:
        if step.kind == "sent":
            source, *targets = step.words
            for target in targets:
                path = self.at(target) / Path(source).name
                path.write_bytes((self.folder / source).read_bytes())
            return
        name, text = step.words
        ends = time.monotonic() + PATIENCE_S
        file = self.folder / name
        while not (file.exists() and text in file.read_text(encoding="utf-8", errors="replace")):
            assert time.monotonic() < ends, f"{self.page.name}:{step.line}: {text} never came\n{self.said()}"
            time.sleep(0.1)

    def at(self, place: str) -> Path:
        folder = self.folder / place
        if not folder.exists():
            folder.mkdir(parents=True)
        for name in ("topology", "examples"):
            if "/" not in place and not (folder / name).is_symlink():
                (folder / name).symlink_to(ROOT / name)
        return folder

    def text(self, block: Block) -> str:
        text = block.text
        for host, address in self.addresses.items():
            text = text.replace(host, address)
        return text

    def said(self) -> str:
        return "\n".join(f"== {file}\n{file.read_text(errors='replace')}" for file in self.folder.glob("*/*.log"))


def test_topology_tables_are_what_the_code_computes() -> None:
    """ "Choose a topology": each row of its tables, from the topology package itself."""
    text = (ROOT / "docs" / "topologies.md").read_text(encoding="utf-8")

    def look(agents: int, graph: str = "complete", schedule: object = "static") -> dict[str, str]:
        table = {"graph": graph, "agents": agents, "schedule": schedule}
        topology = build_topology(build(TopologyConfig, table, "the page"))
        found = summarise(topology.schedule)
        peers = sorted({found.min_peers, found.max_peers})
        gap = "" if found.spectral_gap is None else f"{found.spectral_gap:.3f}"
        return {
            "peers": "–".join(map(str, peers)),
            "sent": f"{found.models_sent:.3g}",
            "diameter": str(found.diameter),
            "gap": gap,
            "rounds": f"{found.rounds_to_consensus:,}",
        }

    rows = re.findall(
        r"^\| `([\w-]+)`[^|]*\| ([\d–]+) \| ([\d.]+) \| (\d+) \| ([\d.]+) \| (\d+) \|$", text, re.MULTILINE
    )
    assert len(rows) == 10
    for graph, *cells in rows:
        found = look(16, graph)
        assert cells == [found[key] for key in ("peers", "sent", "diameter", "gap", "rounds")], graph
    columns: list[dict[str, object]] = [
        {"graph": "ring"},
        {"graph": "torus"},
        {"graph": "random-regular"},
        {"graph": "exponential"},
        {"schedule": "one-peer-exponential"},
        {"schedule": "random-matching"},
        {"schedule": "epidemic"},
        {"schedule": "base-k"},
        {"schedule": {"name": "base-k", "options": {"k": 2}}},
    ]
    changing = text.split("| schedule |")[1].split("\n\n")[0]
    drawn = re.findall(r"^\| `[\w-]+`.*? \| [^|]+ \| ([\d.]+) \| (\d+)[^|]* \|$", changing, re.MULTILINE)
    by_schedule = [columns[k] for k in (4, 7, 8, 5, 6)]
    assert drawn == [(found["sent"], found["rounds"]) for found in (look(16, **kind) for kind in by_schedule)]  # type: ignore[arg-type]
    grown = re.findall(r"^\| (\d+) \| (.+) \|$", text.split("## How it grows")[1], re.MULTILINE)
    assert len(grown) == 5
    for agents, cells in grown:
        for cell, column in zip(cells.split(" | "), columns, strict=True):
            if cell != "–":
                assert cell == look(int(agents), **column)["rounds"], (agents, column)  # type: ignore[arg-type]
