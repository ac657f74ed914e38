"""Two processes under one name. References: the order of their calls, and real transports on loopback."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from dimat.errors import SecurityError
from dimat.net.limits import AGAIN_S, LIVING_S, PASSED_ON_S
from dimat.net.peers.lives import Life, Lives, OwnLife
from dimat.net.pki.certificates import check_certificate, check_signature
from dimat.net.pki.identity import Identity
from dimat.wire import LIFE_HEADER
from tests.net.agents import QUICK, Agent, Ears, make, started, update_neighbours
from tests.net.keys import Authority

OLD, YOUNG = Life("old", 100.0, 100.0), Life("young", 200.0, 200.0)


@dataclass
class ByName(Ears):
    """Ears that hear of an older process too."""

    twins: list[str] = field(default_factory=list[str])

    def twin(self, reason: str) -> None:
        self.twins.append(reason)
        self.noticed(reason)


class Clock:
    """A clock that is set by hand."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_a_restart_is_no_twin_and_a_life_that_comes_back_is() -> None:
    """Old, old, young, young: a restart. Once the old one calls again both live; the younger one is refused, and gets
    the older one's newest word, whichever calls; the older one goes on."""
    said: list[str] = []
    lives = Lives(said.append, Clock())
    assert [lives.heard("b", life) for life in (OLD, OLD, YOUNG, YOUNG)] == [None] * 4
    assert not said
    assert lives.heard("b", replace(OLD, said_s=250.0)) is None
    older = lives.heard("b", YOUNG)
    assert older is not None
    assert (older.id, older.said_s) == ("old", 250.0)
    assert lives.heard("b", OLD) is None
    (message,) = said
    begun = "1970-01-01 00:01:40 and 1970-01-01 00:03:20"
    assert message.startswith(f"two processes run as b at once, begun at {begun} UTC")
    assert lives.heard("c", YOUNG) is None, "another name's life is its own affair"


def test_whoever_is_gone_is_a_twin_no_more() -> None:
    clock, said = Clock(), list[str]()
    lives = Lives(said.append, clock)
    for life in (OLD, YOUNG, OLD):
        lives.heard("b", life)
    assert lives.heard("b", YOUNG)
    clock.now += LIVING_S + 1
    assert lives.heard("b", YOUNG) is None, "the older one has not called for long: it was stopped"


def test_others_are_told_once_and_pass_it_on_for_a_while() -> None:
    """The word of another member counts once an hour for each name of the map, however often it comes."""
    clock, said = Clock(), list[str]()
    lives = Lives(said.append, clock)
    assert lives.trailer == ()
    word = b'["b", "stranger", 7]'
    for value in (word, word, b"nonsense", b"7", "text", None):
        lives.take_word("c", value, ("a", "b"))
    assert said == ["c says that two processes run as b at once; the younger one is to leave"]
    ((name, value),) = lives.trailer
    assert (name, value) == ("dimat-twins-bin", b'["b"]')
    clock.now += PASSED_ON_S + 1
    lives.take_word("c", word, ("a", "b"))
    assert lives.trailer == ()
    clock.now += AGAIN_S
    lives.take_word("c", word, ("a", "b"))
    assert len(said) == 2


def test_only_a_proof_makes_a_life_leave() -> None:
    """A member may send anything. What counts is a statement signed with the own key, of an older life of this name and
    run, of a time when this one had begun: those of lives that are over are worth nothing."""
    identity = Authority().issue("b")

    def verify(data: bytes, signature: bytes) -> None:
        check_signature(check_certificate(identity.certificate_der, identity.ca, "b"), data, signature)

    clock = Clock(100.0)

    def life(run: str = "run", agent: str = "b", signs: Identity = identity) -> OwnLife:
        return OwnLife(run, agent, signs.sign, verify, clock)

    old, other_run, forged = life(), life("other"), life(signs=Authority().issue("b"))
    clock.now = 150.0
    over = old.header()
    clock.now = 200.0
    young = life()
    assert over[0] == LIFE_HEADER
    assert young.proven_older(over[1]) is None, "it may have ended before this one began"
    clock.now = 201.0
    assert young.proven_older(old.header()[1]) is not None
    assert old.proven_older(young.header()[1]) is None
    for text in (other_run.header()[1], forged.header()[1], young.header()[1], "nonsense", "[1]", '["a", 1, 2, "zz"]'):
        assert young.proven_older(text) is None
    said = Life.parse(old.header()[1])
    assert said is not None
    assert young.proven_older(replace(said, said_s=said.said_s + 1).text()) is None, "another time than was signed"
    with pytest.raises(SecurityError):
        verify(b"", b"")


@pytest.mark.anyio
@pytest.mark.live
async def test_the_younger_of_two_processes_is_told_to_leave_and_all_others_hear_of_it(tmp_path: Path) -> None:
    """a hears both, of which only one is on the map; c hears of it by a alone."""
    authority = Authority()
    limits = replace(QUICK, poll_s=0.2)

    def one(folder: str, name: str) -> Agent:
        return replace(make(tmp_path / folder, name, identity=identities[name], limits=limits), ears=ByName())

    identities = {name: authority.issue(name) for name in "abc"}
    a, older, c = one("a", "a"), one("older", "b"), one("c", "c")
    await asyncio.sleep(0.01)
    younger = one("younger", "b")
    async with started(a, older, younger, c):
        update_neighbours([older, younger], {"a": a.address, "b": older.address})
        update_neighbours([a, c], {"a": a.address, "b": older.address, "c": c.address})
        await younger.ears.until(lambda: told_to_leave(younger))
        assert told_to_leave(younger)[0].startswith("another process runs as b, since ")
        await a.ears.until(lambda: [said for said in a.ears.notices if said.startswith("two processes run as b")])
        for told in (c, older):
            await told.ears.until(lambda told=told: [s for s in told.ears.notices if "two processes run as b" in s])
        assert not told_to_leave(older)
        assert not told_to_leave(a)


def told_to_leave(agent: Agent) -> list[str]:
    assert isinstance(agent.ears, ByName)
    return agent.ears.twins
