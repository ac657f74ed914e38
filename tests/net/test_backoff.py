"""Messages at a limited rate. Reference: counted by hand on a clock that the test turns."""

from __future__ import annotations

from dimat.net.backoff import Reminders
from dimat.net.limits import MOST_RETURNS


def test_trouble_that_comes_and_goes_is_told_as_rarely_as_what_lasts() -> None:
    """Attack: a member that leaves and comes back three times a second filled its neighbours' logs."""
    said: list[str] = []
    now = [0.0]
    reminders = Reminders(said.append, lambda: now[0])
    for _ in range(3 * 3600):
        reminders.tell("reach", "gone")
        reminders.over("reach")
        now[0] += 1 / 3
    assert 1 + MOST_RETURNS <= len(said) <= 1 + MOST_RETURNS + 6  # at once; then after 1, 2, 4, 8, 16, 32 minutes
    now[0] += 3 * 3600
    reminders.tell("reach", "gone again")
    assert said[-1] == "gone again", "hours later it is news"


def test_the_end_is_told_only_of_what_was_told() -> None:
    said: list[str] = []
    reminders = Reminders(said.append, lambda: 0.0)
    for number in range(9):
        reminders.tell("reach", f"gone {number}")
        reminders.over("reach", "back")
        reminders.over("reach", "back")
    assert said == [text for number in range(1 + MOST_RETURNS) for text in (f"gone {number}", "back")]
