"""What a person sees of a run, on a terminal and elsewhere."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import threading

import pytest

from dimat.events import (
    WARNING,
    BasisAdopted,
    Contribution,
    Event,
    Merged,
    MergeResult,
    PeerLate,
    PeerRefused,
    RoundFinished,
    RoundSummary,
    RunStarted,
    Warned,
)
from dimat.results import Comparison, Results
from dimat.ui.terminal.run import ConsoleListener, print_comparison, print_results
from tests.ui.samples import make_events, make_results

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-79]|38;[0-9;]+|9[0-7])m")

STEPS: list[Event] = [
    PeerLate(run="r", agent="a", round=2, peer="b"),
    PeerRefused(run="r", agent="a", round=2, peer="c", reason="fc.weight: not finite"),
    BasisAdopted(run="r", agent="a", round=2, peer="b", basis="0-lab-a-00112233", moved=0.98),
    Merged(
        run="r",
        agent="a",
        round=2,
        contributions=(Contribution(agent="a", snapshot="x", round=2, weight=1.0),),
        result=MergeResult(notes=("merge backed off to 0.5",)),
    ),
    RoundFinished(run="r", agent="a", round=2, heard=0, expected=2, bytes_sent=1_881_200, bytes_received=0),
]


def shown(events: list[Event], terminal: bool = False, verbosity: int = 0) -> str:
    stream = io.StringIO()
    with ConsoleListener(stream, terminal=terminal, verbosity=verbosity) as listener:
        for event in events:
            listener(event)
    return stream.getvalue()


def test_a_note_that_warns_is_shown_at_every_verbosity() -> None:
    """Other notes of merges are shown at verbosity 1."""
    result = MergeResult(notes=("merge backed off to 0.5", f"{WARNING}the merge is not kept"))
    merged = Merged(run="r", agent="a", round=2, contributions=(), result=result)
    told = shown([merged], verbosity=-1)
    assert told == "[r] warning: round 2, agent a: the merge is not kept\n"


def last_drawing(text: str) -> str:
    """Return what stands on the screen after the last line that was erased."""
    return ANSI.sub("", text[text.rindex("\x1b[2K") :])


def test_plain_output_is_one_line_per_round() -> None:
    """Reference: the whole text, written by hand."""
    assert shown(make_events()) == (
        "[digits-ring] method dimat, seed 7, 3 agents, 3 edges, 235,146 parameters, 940.6 kB a snapshot; "
        "about 812.4 MB of memory, 5.60 MB on disk, 16.9 MB sent in all, 2 workers\n"
        "[digits-ring] samples per class of each agent:\n"
        "  agent  samples    0     1   2\n"
        "  lab-a      127  120     .   7\n"
        "  lab-b    1,043    3  1040   .\n"
        "  lab-c      180   60    60  60\n"
        "[digits-ring] round 1/3  loss 1.200  accuracy 0.600 -> 0.650 (0.640 to 0.670)  distance 0.020    bases 3"
        "  heard 6/6  sent 5.64 MB\n"
        "[digits-ring] round 2/3  loss 0.600  accuracy 0.700 -> 0.750 (0.740 to 0.770)  distance 2.0e-03  bases 1"
        "  heard 6/6  sent 11.3 MB\n"
        "[digits-ring] round 3/3  loss 0.400  accuracy 0.800 -> 0.850 (0.840 to 0.870)  distance 2.0e-04  bases 1"
        "  heard 6/6  sent 16.9 MB\n"
        "[digits-ring] done: 3 rounds in 3.8 s\n"
    )


def test_plain_output_says_nothing_of_what_was_not_measured() -> None:
    """Reference: a run without evaluation and without training."""
    summary = RoundSummary(
        round=1,
        rounds=12,
        loss=None,
        before_mean=None,
        after_mean=None,
        after_min=None,
        after_max=None,
        consensus_distance=0.0,
        bases=1,
        heard=0,
        expected=0,
        mb_sent=0.0,
    )
    line = shown([summary])
    assert line.split() == "round 1/12 loss - distance 0.000 bases 1 heard 0/0 sent 0 MB".split()
    assert shown([summary], terminal=True)


def test_a_stream_that_is_no_terminal_gets_no_escape_codes() -> None:
    """Reference: StringIO is no terminal; FORCE_COLOR and TERM must not change what a log file gets."""
    stream = io.StringIO()
    listener = ConsoleListener(stream, verbosity=2)
    for event in [*make_events(), *STEPS, Warned(run="r", message="careful")]:
        listener(event)
    listener.close()
    assert stream.getvalue().isascii()
    assert "\x1b" not in stream.getvalue()


def test_verbosity_adds_one_liners() -> None:
    """Reference: written by hand; -1 leaves warnings only."""
    warned = Warned(run="r", agent="a", message="few data")
    assert shown([*make_events("r"), *STEPS, warned], verbosity=-1) == "[r] warning: agent a: few data\n"
    assert shown([*STEPS, warned]).splitlines() == [
        "[r] warning: agent a: few data",
        "[r] peers late or not heard: 1 time (a without b, deadline: 1)",
        "[r] peers refused: 1 time (a without c: 1)",
    ]
    assert shown(STEPS, verbosity=1).splitlines() == [
        "[r] round 2, agent a: peer b late; its weight goes to self",
        "[r] round 2, agent a: peer c refused: fc.weight: not finite",
        "[r] round 2, agent a: adopted basis 0-lab-a-0011 from b, 98 % of units moved",
        "[r] round 2, agent a: merge backed off to 0.5",
    ]
    loud = shown([*make_events("r"), *STEPS], verbosity=2)
    assert "[r] round 2, agent a: merged a 1.000\n" in loud
    assert "[r] round 1, agent lab-b: trained, loss 1.200 in 0.3 s\n" in loud
    assert "[r] round 2, agent a: done, heard 0/2, sent 1.9 MB\n" in loud


@pytest.mark.parametrize("terminal", [False, True])
def test_hostile_text_moves_no_cursor(terminal: bool) -> None:
    """Reference: a peer's reason with an escape sequence, a line break, rich markup and an emoji code."""
    hostile = PeerRefused(run="r", agent="a", round=1, peer="b\x1b[2J", reason="[bold]x[/bold] :smile:\n[r] done")
    text = shown([hostile], terminal=terminal, verbosity=1)
    assert "peer b\\x1b[2J refused: [bold]x[/bold] :smile: [r] done\n" in text


def test_the_histogram_of_equal_data_is_shown_once() -> None:
    """Reference: a comparison runs several methods on one split."""
    text = shown([*make_events("a"), *make_events("b")])
    assert text.count("samples per class") == 1
    assert text.count("method dimat") == 2


def test_terminal_ends_with_a_static_table_of_the_rounds() -> None:
    """Reference: what follows the last cursor movement holds every round once, warnings stand above."""
    events = make_events()
    text = shown([*events[:5], Warned(run="digits-ring", message="careful"), *events[5:]], terminal=True)
    assert "\x1b[?25l" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again
    final = last_drawing(text)
    for cell in ("1/3", "2/3", "3/3", "0.850", "0.840–0.870", "2.0e-04", "16.9", "done, 3.8 s"):
        assert final.count(cell) == 1, cell
    assert "warning: careful" in ANSI.sub("", text)
    assert "warning" not in final


def test_live_table_has_a_row_per_active_run() -> None:
    """Reference: two runs interleaved; a finished one leaves the live table and stands in the final one."""
    one, two = make_events("alpha"), make_events("beta")
    stream = io.StringIO()
    listener = ConsoleListener(stream, terminal=True)
    for a, b in zip(one[:-1], two[:-1]):
        listener(a)
        listener(b)
    stream.truncate(0)
    stream.seek(0)
    listener(one[-1])
    live = ANSI.sub("", stream.getvalue())
    assert "beta" in live
    assert "alpha" not in live
    assert "2 runs, 1 done" in live
    listener(two[-1])
    listener.close()
    listener(Warned(message="after the end"))
    final = last_drawing(stream.getvalue())
    assert [line.split()[0] for line in final.splitlines() if "3/3" in line] == ["alpha", "beta"]
    assert final.count("done, 3.8 s") == 2
    assert "after the end" not in final


def test_the_live_table_stays_within_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: 200 rounds on 20 lines of 44 columns; no line is longer, no drawing higher; the end has all rounds."""
    monkeypatch.setenv("COLUMNS", "44")
    monkeypatch.setenv("LINES", "20")
    events = [e for e in make_events(rounds=200) if isinstance(e, RoundSummary)]
    started = make_events(rounds=200)[0]
    stream = io.StringIO()
    listener = ConsoleListener(stream, terminal=True)
    listener(started)
    for event in events:
        stream.truncate(0)
        stream.seek(0)
        listener(event)
        lines = ANSI.sub("", stream.getvalue()).splitlines()
        assert len(lines) <= 20
        assert max(map(len, lines)) <= 44
    listener.close()
    assert len([line for line in last_drawing(stream.getvalue()).splitlines() if "/200" in line]) == 200


def test_no_color_is_heeded(monkeypatch: pytest.MonkeyPatch, comparison: Comparison) -> None:
    """Reference: no-color.org: no colour codes; bold is allowed."""
    stream = io.StringIO()
    print_comparison(comparison, stream, terminal=True)
    assert COLOUR.search(stream.getvalue())
    monkeypatch.setenv("NO_COLOR", "1")
    stream = io.StringIO()
    print_comparison(comparison, stream, terminal=True)
    assert not COLOUR.search(stream.getvalue())
    assert not COLOUR.search(shown([*make_events(), Warned(message="careful")], terminal=True))


def test_a_broken_stream_does_not_stop_the_run() -> None:
    """Reference: a stream whose reader went away; events go on being taken."""

    class Gone(io.StringIO):
        def write(self, s: str, /) -> int:
            raise BrokenPipeError

    for terminal in (False, True):
        listener = ConsoleListener(Gone(), terminal=terminal)
        for event in make_events():
            listener(event)
        listener.close()


def test_a_narrow_encoding_gets_question_marks_not_errors(comparison: Comparison) -> None:
    """Reference: ASCII has no plus-minus sign."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    print_comparison(comparison, stream)
    assert b"0.703 ? 0.012" in raw.getvalue()


def test_threads_may_share_a_listener() -> None:
    """Reference: 6 runs from 6 threads; every line is whole and every round is there, live and plain."""
    for terminal in (False, True):
        stream = io.StringIO()
        listener = ConsoleListener(stream, terminal=terminal, verbosity=1)
        runs = [make_events(f"run-{i}", rounds=10) for i in range(6)]

        def emit(events: list[Event], listener: ConsoleListener = listener) -> None:
            for event in events:
                listener(event)

        threads = [threading.Thread(target=emit, args=(events,)) for events in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert not any(thread.is_alive() for thread in threads)
        listener.close()
        lines = stream.getvalue().splitlines()
        if terminal:
            assert last_drawing(stream.getvalue()).count("10/10") == 6
        else:
            for i in range(6):
                own = [line for line in lines if line.startswith(f"[run-{i}] round")]
                assert [line.split()[2] for line in own] == [f"{n}/10" for n in range(1, 11)]


def test_a_run_name_used_again_starts_afresh() -> None:
    """Reference: a restarted run shows its own rounds only."""
    text = shown([*make_events(rounds=3), *make_events(rounds=2)], terminal=True)
    final = last_drawing(text)
    assert "2/2" in final
    assert "3/3" not in final


def test_print_comparison_plain(comparison: Comparison) -> None:
    """Reference: the first table, written by hand from the curves of the sample."""
    stream = io.StringIO()
    print_comparison(comparison, stream)
    verdict, table, _ = stream.getvalue().split("\n\n")
    assert verdict.startswith("iid: dimat: merging beat training alone by 0.074 (accuracy 0.953 against 0.879")
    assert table.splitlines() == [
        "iid: accuracy after a merge, mean ± standard deviation over 3 seeds",
        "method             merge 1        merge 2        merge 3        merge 5       merge 10  rounds to 90 %"
        "  MB to 90 %  MB in all",
        "centralised  0.930 ± 0.002  0.947 ± 0.002  0.958 ± 0.002  0.969 ± 0.002  0.974 ± 0.002               1"
        "           0          0",
        "isolated     0.801 ± 0.007  0.832 ± 0.007  0.851 ± 0.006  0.869 ± 0.005  0.879 ± 0.005               8"
        "           0          0",
        "average      0.487 ± 0.024  0.661 ± 0.022  0.767 ± 0.018  0.870 ± 0.017  0.925 ± 0.016               6"
        "        11.3       18.8",
        "dimat        0.800 ± 0.005  0.861 ± 0.004  0.898 ± 0.004  0.934 ± 0.003  0.953 ± 0.003               3"
        "        5.64       18.8",
        "dimat-paper  0.786 ± 0.007  0.851 ± 0.007  0.890 ± 0.006  0.928 ± 0.005  0.948 ± 0.005               3"
        "        5.64       18.8",
        "90 % of the ceiling (centralised) is 0.877; MB sent per agent",
    ]


def test_print_comparison_emphasises_the_best_on_a_terminal(comparison: Comparison) -> None:
    """Reference: the best of a column is bold green (SGR 1;32), a lesser one is not."""
    stream = io.StringIO()
    print_comparison(comparison, stream, terminal=True)
    assert "\x1b[1;32m0.937 ± 0.008\x1b[0m" in stream.getvalue()
    assert "\x1b[1;32m0.927 ± 0.012\x1b[0m" not in stream.getvalue()


def test_print_results(results: Results) -> None:
    """Reference: one row per agent and the mean, plain and on a narrow terminal."""
    stream = io.StringIO()
    print_results(results, stream)
    verdict, _, *lines = stream.getvalue().splitlines()
    assert verdict.startswith("whether merging beat training alone was not measured; 10 merges changed test accuracy")
    assert lines[0] == "digits-ring (dimat): agents at the end"
    assert [line.split()[0] for line in lines[2:8]] == [*results.agents, "mean"]
    stream = io.StringIO()
    print_results(make_results(names=["a[red]", "b\x1b[1m"]), stream, terminal=True)
    assert "a[red]" in stream.getvalue()
    assert "b\\x1b[1m" in stream.getvalue()


def test_importing_the_console_is_light() -> None:
    """Reference: neither rich nor pydantic, numpy, matplotlib or torch is imported before something is shown."""
    code = (
        "import sys, dimat.ui.terminal.run as c\n"
        "heavy = {'rich', 'pydantic', 'numpy', 'matplotlib', 'torch', 'networkx'}\n"
        "sys.stdout.write(', '.join(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_run_started_without_estimates_is_short() -> None:
    """Reference: a daemon knows no estimate."""
    event = RunStarted(
        method="isolated", seed=0, agents=("a",), edges=(), rounds=1, parameters=10, snapshot_bytes=40
    )  # fmt: skip
    assert shown([event]) == "method isolated, seed 0, 1 agent, 0 edges, 10 parameters, 40 B a snapshot\n"


def test_a_log_on_a_full_disk_stops_no_run() -> None:
    class Full(io.StringIO):
        def write(self, text: str, /) -> int:
            raise OSError(28, "No space left on device")

    with ConsoleListener(Full(), terminal=False) as listener:
        for event in make_events():
            listener(event)
