"""From a peer's tokens to own ones: which of them its predictions of a text are about.

A prediction is of the token that begins at some byte of the text, so predictions of two tokenizers are of the same
thing where their tokens begin at the same byte (or with only spaces between: some tokenizers keep a space with the next
word, others drop it). Where the peer's token is shorter than the own one that stands there, its predictions are
followed along the text until the own one ends, and their probabilities multiplied: of "the", bytes say "t", then "h",
then "e". Where an own token begins within the peer's, what it says is of how the text goes on: of its texts that begin
with what has been read of its token, the rest (as in Phan et al. 2024, arXiv 2410.09303).

Each of the peer's texts a stands for own tokens b. Where a is on the text's own way and as long as the own token that
stands there, that one. Else, by the first rule that has an answer:

1. statistics: the own tokens that have stood in the probe text where a stood (of a text that is joined of several:
   those that begin with it), each with likelihood P(a | b) = how many times both stood at one place / how often b stood
   at all; a's probability goes to them by P(a | b) times what the own model says of b there, and if it says nothing of
   any, to the one that stood there most often;
2. the own token with the same text;
3. the longest own token that a begins with, which is what an own prediction of the text would be;
4. the own token of the least edit distance, at most half of a's length, of a whole token of the peer's.

A text for which there is none says nothing. FuseLLM (Wan et al. 2024, arXiv 2401.10491) maps by least edit distance,
FuseChat (arXiv 2408.07990, 2503.04222) by statistics, to the most frequent one; multiplying along the text and dividing
by the own model's shares are dimat's, since a byte of a peer may stand for a hundred own tokens.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log

import torch
from torch import Tensor

from dimat.merge.token_logits import TokenSaid
from dimat.tasks.token_text import END, ProbeText

Shares = dict[int, float]
"""Probabilities by own token."""
Options = Sequence[tuple[int, float, int]]
"""Own tokens that a text may stand for: (token, likelihood of the text, times), most frequent first."""
SPACES = b" \t\r\n"
ALL_SPACES = re.compile(rb"[ \t\r\n]*")
MOST_OPTIONS = 64
"""Own tokens that one text may stand for by statistics: the most frequent ones."""
MOST_STEPS = 64
"""Predictions of a peer that are followed for one own token."""
LEAST = 1e-4
"""Probability that a token has at least which a model did not keep among its largest, where models are compared."""
LEAST_MASS = 0.01
"""Probability of all that a peer says of an own token; with less, the text has gone on as it did not expect."""
LONGEST_STANDING = 256
"""Bytes that a token with what follows it can be long."""
SEARCHED = 32
"""Texts of a peer for which the least edit distance is looked for: it takes a walk through the vocabulary."""


class OwnTokens:
    """An agent's own tokens and where they stand in the probe text.

    Memory: a few hundred bytes for each token of the vocabulary and each of the probe text.
    """

    def __init__(self, probe: ProbeText) -> None:
        self.text = probe.text
        self.texts = probe.texts
        self.predictions = probe.tokens.shape[1]
        self.tokens: list[int] = probe.tokens.flatten().tolist()
        self.starts: list[int] = probe.spans[..., 0].flatten().tolist()
        self.ends: list[int] = probe.spans[..., 1].flatten().tolist()
        self.ids: dict[bytes, int] = {}
        for i, text in enumerate(self.texts):
            if text:
                self.ids.setdefault(text, i)
        self._longest = max(map(len, self.ids), default=0)
        self.times = Counter(token for token in self.tokens if self.texts[token])
        self._standing = sorted((self.texts[token], token) for token in self.times)

    def beginning(self, text: bytes) -> Options:
        """Return the own tokens in the probe text that begin with a text."""
        at = bisect_left(self._standing, (text, -1))
        found: list[int] = []
        while at < len(self._standing) and self._standing[at][0].startswith(text):
            found.append(self._standing[at][1])
            at += 1
        return sorted(((b, 1.0, self.times[b]) for b in found), key=lambda each: (-each[2], each[0]))[:MOST_OPTIONS]

    def alike(self, text: bytes) -> int | None:
        """Return the token with a text, or the longest one that it begins with; also without its first space."""
        for each in (text, text.lstrip(SPACES)):
            for size in range(min(len(each), self._longest), 0, -1):
                if (found := self.ids.get(each[:size])) is not None:
                    return found
        return None

    def nearest(self, text: bytes) -> int | None:
        """Return the token of the least edit distance, the first of several; None above half of the text's length."""
        best, most = None, len(text) // 2 + 1
        for other, token in self.ids.items():
            if other != END and abs(len(other) - len(text)) < most:
                distance = edit_distance(text, other, most)
                if distance < most:
                    best, most = token, distance
        return best


class PeerTokens:
    """What a peer says of the probe text, as shares of own tokens. `temperature`: T of softmax(z / T).

    Everything that is kept is bounded by the sizes of the peer's tensors and of the own probe text.
    """

    def __init__(self, said: TokenSaid, own: OwnTokens, temperature: float) -> None:
        self._own = own
        self._said = said
        self._starts: list[int] = said.starts.tolist()
        self._ids = said.ids.numpy()
        self._shares = said.shares(temperature).numpy()
        self._rows = {start: row for row, start in enumerate(self._starts)}
        known = set(own.starts)
        self._words = {_word(own.text, start): row for start, row in self._rows.items() if start not in known}
        self._table = {text: i for i, text in enumerate(said.texts)}
        self._stands, self._ends = zip(*map(self._standing, range(len(self._starts))), strict=True)
        self._met = self._statistics()
        self._single: dict[int, Options] = {}
        self._joined: dict[bytes, Options] = {}
        self._rest: dict[bytes, Options] = {}
        self._searched = 0

    def row_of(self, start: int) -> int | None:
        """Return the row of what the peer says of an own token that begins at a byte; None if it says nothing: that of
        its own token there, or within which that byte is, or but for spaces there."""
        if (row := self._rows.get(start)) is not None:
            return row
        row = bisect_right(self._starts, start) - 1
        if row >= 0 and self._ends[row] > start:
            return row
        return self._words.get(_word(self._own.text, start))

    def shares(self, place: int, prior: Mapping[int, float]) -> Shares:
        """Return what the peer says of the own token at `place` (an index of own predictions), sum 1; nothing if it
        says nothing of it. `prior`: what the own model says there."""
        found: Shares = {}
        for options, share in self._followed(place):
            self._give(found, options, share, prior)
        total = sum(found.values())
        return {token: share / total for token, share in found.items()} if total >= LEAST_MASS else {}

    def _followed(self, place: int) -> Iterator[tuple[Options, float]]:
        """Yield what the peer's texts from a place on stand for, each with its probability."""
        own = self._own
        start, end = own.starts[place], own.ends[place]
        row = self.row_of(start)
        if row is None:
            return
        actual: Options = [(own.tokens[place], 1.0, 1)] if own.texts[own.tokens[place]] else []
        begin, mass = self._starts[row], 1.0
        within = own.text[begin:start] if begin < start < self._ends[row] else b""
        for _ in range(MOST_STEPS):
            read = own.text[begin : self._starts[row]]
            stands = self._stands[row]
            on = row + 1 < len(self._starts) and self._starts[row + 1] < end
            further = 0.0
            for i, share in zip(self._ids[row].tolist(), self._shares[row].tolist(), strict=True):
                text = read + self._said.texts[i]
                if within and not (text.startswith(within) and len(text) > len(within)):
                    continue  # the text has gone on in another way
                if i == stands and on:
                    further = mass * share
                elif i == stands or self._reaches(begin, text, end):
                    yield actual, mass * share
                elif read:
                    yield self._joined_options(text[len(within) :]), mass * share
                elif within:
                    yield self._rest_options(text[len(within) :]), mass * share
                else:
                    yield self._options(i), mass * share
            if further == 0:
                return
            mass, row = further, row + 1

    def _reaches(self, begin: int, text: bytes, end: int) -> bool:
        """Say whether the probe text goes on with a text, up to the end of an own token or further."""
        return begin + len(text) >= end and self._own.text.startswith(text, begin)

    @staticmethod
    def _give(found: Shares, options: Options, share: float, prior: Mapping[int, float]) -> None:
        if len(options) == 1:
            found[options[0][0]] = found.get(options[0][0], 0.0) + share
            return
        parts = [(token, likelihood * prior[token]) for token, likelihood, _ in options if token in prior]
        total = sum(part for _, part in parts)
        if total <= 0:
            parts, total = [(token, 1.0) for token, _, _ in options[:1]], 1.0
        for token, part in parts:
            found[token] = found.get(token, 0.0) + share * part / total

    def _standing(self, row: int) -> tuple[int | None, int]:
        """Return the peer's text that stands at a row (up to where its next row begins, but for spaces) and where it
        ends; None, and its start, where that is none of those that are kept."""
        start = self._starts[row]
        stop = self._starts[row + 1] if row + 1 < len(self._starts) else len(self._own.text)
        if stop - start > LONGEST_STANDING:  # no token is that long: the next rows are missing
            return None, start
        whole, said = self._own.text[start:stop], self._ids[row].tolist()
        for text in (whole, whole.rstrip(SPACES + END)):
            for form in (text, b" " + text):  # some tokenizers give the first word of a text a space that is not there
                if (found := self._table.get(form)) is not None and found in said:
                    return found, start + len(text)
        return None, start

    def _statistics(self) -> dict[int, Options]:
        """Return for each of the peer's texts the own tokens that stood where it stood."""
        met: defaultdict[int, Counter[int]] = defaultdict(Counter)
        own = self._own
        for token, start in zip(own.tokens, own.starts, strict=True):
            row = self._rows.get(start, self._words.get(_word(own.text, start)))
            if row is not None and own.texts[token] and (stands := self._stands[row]) is not None:
                met[stands][token] += 1
        return {
            text: [(b, times / own.times[b], times) for b, times in found.most_common(MOST_OPTIONS)]
            for text, found in met.items()
        }

    def _options(self, text: int) -> Options:
        if text in self._met:
            return self._met[text]
        if text not in self._single:
            self._single[text] = self._alone(self._said.texts[text]) or self._nearest(self._said.texts[text])
        return self._single[text]

    def _joined_options(self, text: bytes) -> Options:
        if text not in self._joined:
            self._joined[text] = self._own.beginning(text) or self._alone(text)
        return self._joined[text]

    def _rest_options(self, text: bytes) -> Options:
        if text not in self._rest:
            self._rest[text] = self._alone(text)
        return self._rest[text]

    def _alone(self, text: bytes) -> Options:
        found = self._own.alike(text)
        return [] if found is None else [(found, 1.0, 0)]

    def _nearest(self, text: bytes) -> Options:
        self._searched += 1
        found = self._own.nearest(text) if self._searched <= SEARCHED else None
        return [] if found is None else [(found, 1.0, 0)]


@dataclass(frozen=True, slots=True)
class Taught:
    """What teachers say together of own predictions of the probe text. `rows`: (n,) int64, of which ones, by index;
    `ids`, `shares`: (n, W) of own tokens, each row of shares sums to 1 and ends with zeros where it has fewer."""

    rows: Tensor
    ids: Tensor
    shares: Tensor


def teachers_mean(
    own: OwnTokens,
    ids: Tensor,
    shares: Tensor,
    peers: Sequence[PeerTokens],
    weights: Sequence[float],
    *,
    most: int,
    text: float,
) -> Taught:
    """Return p̄ = (1 − g) Σ v_k p_k / Σ v_k + g δ of predictions of which a peer says something; δ is the token that
    stands there, g = `text`.

    The sums are over own (k = 0) and the peers that say something of a prediction. v_k = w_k exp(−c_k), with the mixing
    weights w_k (`weights`, own first) and c_k the mean of −log p_k(the token that stands there) over the predictions of
    the example of which k says something: who does not know what a text is about teaches little about it. (FuseLLM,
    arXiv 2401.10491, takes the model with the least c_k alone, and trains on the text itself too.)

    `ids`, `shares`: (examples × P, kept) own largest ones; `most`: own tokens that a row may have, the largest shares,
    made to sum to 1 again. Memory: 12 bytes for each share that a row of W has, twice meanwhile.
    """
    rows, sizes, told, said = array("q"), array("q"), array("q"), array("f")
    for begin in range(0, len(own.tokens), own.predictions):
        places = range(begin, begin + own.predictions)
        priors: list[Shares] = [
            dict(zip(*pair, strict=True))
            for pair in zip(ids[begin : places.stop].tolist(), shares[begin : places.stop].tolist(), strict=True)
        ]
        models = [priors]
        models += [[peer.shares(p, prior) for p, prior in zip(places, priors, strict=True)] for peer in peers]
        trusted = [w * exp(-_surprise(own, places, each)) for w, each in zip(weights, models, strict=True)]
        for k, place in enumerate(places):
            heard = [(each[k], weight) for each, weight in zip(models, trusted, strict=True) if each[k]]
            total = sum(weight for _, weight in heard)
            if total <= 0 or not any(each[k] for each in models[1:]):
                continue
            known = bool(own.texts[own.tokens[place]])
            mean: Shares = {own.tokens[place]: text} if known and text > 0 else {}
            for each, weight in heard:
                for token, share in each.items():
                    mean[token] = mean.get(token, 0.0) + (1 - text * known) * weight / total * share
            kept = sorted(mean.items(), key=lambda item: (-item[1], item[0]))[:most]
            total = sum(share for _, share in kept)
            rows.append(place)
            sizes.append(len(kept))
            told.extend(token for token, _ in kept)
            said.extend(share / total for _, share in kept)
    filled = torch.arange(max(sizes, default=1)) < torch.tensor(sizes, dtype=torch.int64)[:, None]
    table = torch.zeros(filled.shape, dtype=torch.int64), torch.zeros(filled.shape)
    table[0][filled], table[1][filled] = torch.tensor(told, dtype=torch.int64), torch.tensor(said)
    return Taught(torch.tensor(rows, dtype=torch.int64), *table)


def _surprise(own: OwnTokens, places: range, said: Sequence[Shares]) -> float:
    """Return the mean of −log p(the token that stands there) over the places of which something is said."""
    found = [
        -log(max(each.get(own.tokens[place], 0.0), LEAST)) for place, each in zip(places, said, strict=True) if each
    ]
    return sum(found) / len(found) if found else 0.0


def edit_distance(one: bytes, other: bytes, most: int) -> int:
    """Return how many bytes must be put in, left out or replaced to make one text of the other (Levenshtein), or `most`
    if they are no fewer."""
    row = list(range(len(other) + 1))
    for i, byte in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, second in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (byte != second))
        if min(row) >= most:
            return most
    return min(row[-1], most)


def _word(text: bytes, start: int) -> int:
    """Return where the first byte from a place on stands that is no space."""
    found = ALL_SPACES.match(text, start)
    return start if found is None else found.end()
