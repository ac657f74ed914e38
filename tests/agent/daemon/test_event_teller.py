"""An agent's listeners, one of which writes to a full disk. References: what each was told, by hand."""

from __future__ import annotations

from dimat import events
from dimat.agent.daemon.event_teller import EventTeller
from dimat.errors import DataError


def test_a_log_that_fails_is_told_once_and_holds_nobody_up() -> None:
    heard: list[events.Event] = []
    notices: list[str] = []
    full = [False]

    def log(event: events.Event) -> None:
        if full[0]:
            raise DataError("events.jsonl cannot be written: no space left on device")

    listeners: list[events.Listener] = [log]
    teller = EventTeller(listeners, notices.append)
    listeners.append(heard.append)  # a caller adds its own once the agent is made
    event = events.Checkpointed(agent="lab-a", round=1, stage="trained")
    teller.tell(event)
    assert (heard, notices) == ([event], [])
    full[0] = True
    teller.tell(event)
    teller.tell(event)
    assert heard == [event] * 3
    assert notices == [
        "events.jsonl cannot be written: no space left on device; the agent continues, and logs again once it can"
    ]
    full[0] = False
    teller.tell(event)
    assert notices[1:] == ["events are logged again"]
