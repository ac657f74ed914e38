"""From a peer's tokens to own ones. References: probabilities by hand, on a text of which all tokens are seen."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from math import exp, log

import pytest
import torch

from dimat.merge.token_logits import TokenSaid
from dimat.merge.token_map import OwnTokens, PeerTokens, edit_distance, teachers_mean
from dimat.tasks.token_text import END, ProbeText

TEXT = b"the red cat the old cat" + END
WORDS = (b"the", b" red", b" old", b" cat", b" the", b" dog", END)
WORD_CUTS = (0, 3, 7, 11, 15, 19, 23, 24)
BYTES = (*(bytes([value]) for value in range(255)), END)


def probe(texts: tuple[bytes, ...], cuts: tuple[int, ...]) -> ProbeText:
    """Return one example: all tokens between the cuts."""
    spans = torch.tensor([list(pair) for pair in pairwise(cuts)])
    tokens = torch.tensor([texts.index(TEXT[a:b]) for a, b in spans.tolist()])
    return ProbeText(TEXT, texts, tokens[None], spans[None])


WORDY = probe(WORDS, WORD_CUTS)
BYTEWISE = probe(BYTES, tuple(range(25)))


def says(rows: Mapping[int, Mapping[bytes, float]]) -> TokenSaid:
    """Return what a peer says, by where its tokens begin: probabilities of texts. Shorter rows are filled up with
    texts of next to no probability."""
    most = max(map(len, rows.values()))
    rows = {start: {**row, **{b"%%%d" % k: 1e-12 for k in range(most - len(row))}} for start, row in rows.items()}
    texts = sorted({text for row in rows.values() for text in row})
    shares = torch.tensor([list(row.values()) for row in rows.values()])
    ids = torch.tensor([[texts.index(text) for text in row] for row in rows.values()])
    return TokenSaid(shares.log(), ids, torch.tensor(list(rows)), tuple(texts))


def certain(own: ProbeText, change: Mapping[int, Mapping[bytes, float]]) -> TokenSaid:
    """Return a peer with the tokens of `own` that expects what stands there but for 1/100, and else what is given."""
    rows: dict[int, Mapping[bytes, float]] = {}
    for token, (start, _) in zip(own.tokens[0].tolist(), own.spans[0].tolist(), strict=True):
        rows[start] = change.get(start, {own.texts[token]: 0.99, b"z": 0.01})
    return says(rows)


def named(own: ProbeText, shares: Mapping[int, float]) -> dict[bytes, float]:
    return {own.texts[token]: share for token, share in shares.items()}


def test_the_same_tokens_are_told_as_they_are() -> None:
    """Every own text, whether it stands in the text or not, is itself; the peer's shares are unchanged."""
    said = certain(WORDY, {3: {b" red": 0.5, b" dog": 0.3, b"the": 0.2}, 7: {b" cat": 0.6, b" red": 0.3, END: 0.1}})
    peer = PeerTokens(said, OwnTokens(WORDY), 1.0)
    assert named(WORDY, peer.shares(1, {})) == pytest.approx({b" red": 0.5, b" dog": 0.3, b"the": 0.2})
    assert named(WORDY, peer.shares(2, {})) == pytest.approx({b" cat": 0.6, b" red": 0.3, END: 0.1})


def test_bytes_are_followed_to_the_end_of_a_word() -> None:
    """Of " red" bytes say " ", then "r": the product; " o" is what begins so, " old"; nothing is lost."""
    change = {3: {b" ": 0.9, b"z": 0.1}, 4: {b"r": 0.6, b"o": 0.4}}
    peer = PeerTokens(certain(BYTEWISE, change), OwnTokens(WORDY), 1.0)
    found = named(WORDY, peer.shares(1, {}))
    on = 0.9 * 0.6 * 0.99 * 0.99  # "e" and "d" are as good as certain
    total = on + 0.9 * 0.4  # "z", " rz" and " rez" are the beginning of nothing, and nothing begins them
    assert found == pytest.approx({b" red": on / total, b" old": 0.36 / total})


def test_a_byte_goes_to_words_by_what_the_own_model_says_of_them() -> None:
    """A space in the place of "the" may be any word that has stood where one stood: by the own model's shares of those,
    and without any to the most frequent."""
    peer = PeerTokens(certain(BYTEWISE, {0: {b"t": 0.5, b" ": 0.5}}), OwnTokens(WORDY), 1.0)
    on = 0.5 * 0.99 * 0.99
    total = on + 0.5
    prior = {WORDS.index(b" red"): 0.1, WORDS.index(b" cat"): 0.3, WORDS.index(b" dog"): 0.6}
    found = named(WORDY, peer.shares(0, prior))
    assert found == pytest.approx({b"the": on / total, b" red": 0.125 / total, b" cat": 0.375 / total})
    assert named(WORDY, peer.shares(0, {})) == pytest.approx({b"the": on / total, b" cat": 0.5 / total})


def test_words_teach_the_bytes_within_them() -> None:
    """After " r" of the peer's " red" and " rat" the byte is "e" or "a"; what begins otherwise says nothing there."""
    peer = PeerTokens(certain(WORDY, {3: {b" red": 0.6, b" rat": 0.2, b" old": 0.2}}), OwnTokens(BYTEWISE), 1.0)
    expected = {3: {b" ": 1.0}, 4: {b"r": 0.8, b"o": 0.2}, 5: {b"e": 0.75, b"a": 0.25}, 6: {b"d": 1.0}}
    for place, shares in {**expected, 23: {END: 0.99, b"z": 0.01}}.items():
        found = {text: share for text, share in named(BYTEWISE, peer.shares(place, {})).items() if share > 1e-9}
        assert found == pytest.approx(shares)


def test_nothing_is_said_of_what_a_peer_did_not_expect() -> None:
    """A peer that expects another word than stands there knows nothing of how that word goes on."""
    peer = PeerTokens(certain(WORDY, {3: {b" old": 0.995, b" red": 0.005}}), OwnTokens(BYTEWISE), 1.0)
    assert named(BYTEWISE, peer.shares(4, {})) == pytest.approx({b"o": 0.995, b"r": 0.005})
    assert peer.shares(5, {}) == {}


def test_words_without_their_spaces_fit_words_with_them() -> None:
    """A tokenizer that drops spaces says "red" at 4 where ours has " red" at 3, by statistics, or else by the text."""
    rows = {0: {b"the": 0.9, b"dog": 0.1}, 4: {b"red": 0.7, b"dog": 0.3}, 8: {b"cat": 0.8, b"red": 0.2}}
    rows |= {12: {b"the": 0.9, b"cat": 0.1}, 16: {b"old": 0.5, b"cat": 0.5}, 20: {b"cat": 0.9, b"old": 0.1}}
    peer = PeerTokens(says(rows), OwnTokens(WORDY), 1.0)
    assert named(WORDY, peer.shares(2, {})) == pytest.approx({b" cat": 0.8, b" red": 0.2})
    assert named(WORDY, peer.shares(4, {})) == pytest.approx({b" old": 0.5, b" cat": 0.5})


def test_the_least_edit_distance_comes_last() -> None:
    """What no own token is, begins or stands for: the nearest, if it is near."""
    own = OwnTokens(ProbeText(TEXT, (b"red", b"old", END), torch.zeros(1, 0), torch.zeros(1, 0, 2)))
    assert own.nearest(b"Red") == 0
    assert own.nearest(b"Q") is None
    assert own.alike(b"redder") == 0
    assert own.alike(b" old") == 1
    assert own.alike(b"Red") is None
    assert edit_distance(b"kitten", b"sitting", 9) == 3
    assert edit_distance(b"kitten", b"sitting", 2) == 2
    assert edit_distance(b"", b"abc", 9) == 3


def test_teachers_count_by_how_well_they_know_the_text() -> None:
    """v = w exp(−mean −log p(what stands there)); the text has its share; only places of which a peer speaks."""
    own = OwnTokens(WORDY)
    told = {3: {b" red": 0.5, b" dog": 0.5}, 7: {b" cat": 0.8, b" dog": 0.2}}
    peer = PeerTokens(says(told), own, 1.0)
    ids = torch.tensor([[token, 5] for token in WORDY.tokens[0].tolist()])
    shares = torch.tensor([[0.3, 0.7]], dtype=torch.float64).repeat(7, 1)
    said = teachers_mean(own, ids, shares, [peer], [0.4, 0.6], most=8, text=0.25)
    assert said.rows.tolist() == [1, 2]
    trust = 0.4 * 0.3, 0.6 * exp((log(0.5) + log(0.8)) / 2)
    v = trust[1] / sum(trust)
    for row, (right, stands) in enumerate(((0.5, b" red"), (0.8, b" cat"))):
        mean = (1 - v) * 0.3 + v * right
        found = dict(zip(said.ids[row].tolist(), said.shares[row].tolist(), strict=True))
        assert named(WORDY, found) == pytest.approx({stands: 0.25 + 0.75 * mean, b" dog": 0.75 * (1 - mean)}, rel=1e-5)


def test_the_largest_shares_are_kept_and_nobody_heard_is_nothing() -> None:
    """Rows are as wide as asked for, and sum to 1; a peer of other places teaches nothing."""
    own = OwnTokens(WORDY)
    ids, shares = torch.arange(7)[None].repeat(7, 1), torch.full((7, 7), 1 / 7, dtype=torch.float64)
    peer = PeerTokens(says({7: {b" cat": 0.8, b" dog": 0.2}}), own, 1.0)
    said = teachers_mean(own, ids, shares, [peer], [0.5, 0.5], most=3, text=0.0)
    assert said.ids.shape == (1, 3)
    torch.testing.assert_close(said.shares.sum(1), torch.ones(1))
    assert said.ids[0, 0] == WORDS.index(b" cat")
    odd = PeerTokens(says({5: {b"q": 0.9, b"y": 0.1}}), own, 1.0)
    nothing = teachers_mean(own, ids, shares, [odd], [1, 1], most=3, text=0.0)
    assert len(nothing.rows) == 0
