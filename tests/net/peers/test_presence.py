"""Whether a peer is there. References: what is told, and when, by the event loop's clock."""

from __future__ import annotations

import asyncio

from dimat.net.peers.presence import Presence


async def test_a_peer_out_of_reach_is_lost_after_a_while_and_once() -> None:
    told: list[tuple[str, str, int]] = []
    why = ["no answer"]
    presence = Presence("lab-b", 0.05, lambda *given: told.append(given), lambda: why[0])
    presence.out_of_reach()
    presence.in_reach()
    await asyncio.sleep(0.1)
    assert told == [], "it was back in time"
    presence.out_of_reach()
    why[0] = "connection refused"
    await asyncio.sleep(0.1)
    assert told == [("lab-b", "connection refused", 0)]
    assert presence.lost
    presence.out_of_reach()
    await asyncio.sleep(0.1)
    assert len(told) == 1, "it is told once"
    assert not presence.unanswered(), "it may come back"
    presence.in_reach()
    assert not presence.lost


async def test_a_peer_that_leaves_is_gone_once_it_does_not_answer() -> None:
    told: list[tuple[str, str, int]] = []
    presence = Presence("lab-b", 0.01, lambda *given: told.append(given), lambda: "no answer")
    presence.leaves("done", 7)
    assert told == [("lab-b", "it has left ('done')", 7)]
    assert presence.gone == "", "it still is connected"
    presence.out_of_reach()
    assert presence.unanswered()
    assert presence.gone == "it has left ('done')"
    await asyncio.sleep(0.05)
    assert len(told) == 1, "that it left was told"
    presence.in_reach()
    assert (presence.gone, presence.parting) == ("", "")


async def test_nothing_is_told_after_the_end() -> None:
    told: list[object] = []
    presence = Presence("lab-b", 0.01, lambda *given: told.append(given), lambda: "no answer")
    presence.in_reach()
    presence.close()
    presence.out_of_reach()
    await asyncio.sleep(0.05)
    assert told == []
