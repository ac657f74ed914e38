"""From a peer's tokens to own ones: which own tokens its predictions of the probe text are about.

A prediction is of the token that begins at some byte of the text, so predictions of two tokenizers are of the same
thing where their tokens begin at the same byte (or with only spaces between: some tokenizers keep a space with the next
word, others drop it). Where the peer's token is shorter than the own one that stands there, its predictions are
followed along the text until the own one ends, and their probabilities multiplied: of "the", bytes say "t", then "h",
then "e".

Each of the peer's texts a stands for own tokens b. Where a is on the text's own way and as long as the own token that
stands there, that one. Else, by the first rule that has an answer:

1. statistics: the own tokens that have stood in the probe text where a stood (of a text that is joined of several:
   those that begin with it), each with likelihood P(a | b) = how many times both stood at one place / how often b stood
   at all; a's probability goes to them by P(a | b) times what the own model says of b there, and if it says nothing of
   any, to the one that stood there most often;
2. the own token with the same text;
3. the longest own token that a begins with, which is what an own prediction of the text would be;
4. the own token of the least edit distance, at most half of a's length.

A text for which there is none says nothing. FuseLLM (Wan et al. 2024, arXiv 2401.10491) maps by least edit distance,
FuseChat (arXiv 2408.07990, 2503.04222) by statistics, to the most frequent one; multiplying along the text and dividing
by the own model's shares are dimat's, since a byte of a peer may stand for a hundred own tokens.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dimat.merge.token_logits import TokenSaid
from dimat.tasks.token_text import END, ProbeText

Shares = dict[int, float]
"""Probabilities by own token."""
Options = Sequence[tuple[int, float, int]]
"""Own tokens that a text may stand for: (token, likelihood of the text, times), most frequent first."""
SPACES = b" \t\r\n"
MOST_OPTIONS = 64
"""Own tokens that one text may stand for by statistics: the most frequent ones."""
MOST_STEPS = 64
"""Predictions of a peer that are followed for one own token."""
SEARCHED = 64
"""Texts of a peer for which the least edit distance is looked for: it takes a walk through the vocabulary."""


class OwnTokens:
    """An agent's own tokens and where they stand in the probe text.

    Memory: a few hundred bytes for each token of the vocabulary and each of the probe text.
    """

    def __init__(self, probe: ProbeText) -> None:
        self.text = probe.text
        self.texts = probe.texts
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
                distance = edit_distance(text, other)
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
        self._words: dict[int, int] = {}
        for row, start in enumerate(self._starts):
            self._words[_word(own.text, start)] = row  # of several, the last has read most
        self._table = {text: i for i, text in enumerate(said.texts)}
        self._stands = [self._standing(row) for row in range(len(self._starts))]
        self._met = self._statistics()
        self._single: dict[int, Options] = {}
        self._joined: dict[bytes, Options] = {}
        self._searched = 0

    def row_at(self, start: int) -> int | None:
        """Return the row of what the peer says of the token that begins at a byte; None if it says nothing."""
        row = self._rows.get(start)
        return self._words.get(_word(self._own.text, start)) if row is None else row

    def shares(self, place: int, prior: Mapping[int, float]) -> Shares:
        """Return what the peer says of the own token at `place` (an index of own predictions), sum 1; nothing if it
        says nothing of it. `prior`: what the own model says there."""
        found: Shares = {}
        for options, share in self._followed(place):
            self._give(found, options, share, prior)
        total = sum(found.values())
        return {token: share / total for token, share in found.items()} if total > 0 else {}

    def _followed(self, place: int) -> Iterator[tuple[Options, float]]:
        """Yield what the peer's texts from a place on stand for, each with its probability."""
        own = self._own
        row = self.row_at(own.starts[place])
        if row is None:
            return
        actual: Options = [(own.tokens[place], 1.0, 1)] if own.texts[own.tokens[place]] else []
        begin, end, mass = self._starts[row], own.ends[place], 1.0
        for _ in range(MOST_STEPS):
            read = own.text[begin : self._starts[row]]
            stands = self._stands[row]
            on = row + 1 < len(self._starts) and self._starts[row + 1] < end
            further = 0.0
            for text, share in zip(self._ids[row].tolist(), self._shares[row].tolist(), strict=True):
                if text == stands and on:
                    further = mass * share
                elif text == stands or self._reaches(begin, read + self._said.texts[text], end):
                    yield actual, mass * share
                elif read:
                    yield self._joined_options(read + self._said.texts[text]), mass * share
                else:
                    yield self._options(text), mass * share
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

    def _standing(self, row: int) -> int | None:
        """Return the peer's text that stands at a row: up to where its next row begins, but for spaces."""
        start = self._starts[row]
        stop = self._starts[row + 1] if row + 1 < len(self._starts) else len(self._own.text)
        if stop - start > 256:  # no token is that long: the next rows are missing
            return None
        whole, said = self._own.text[start:stop], self._ids[row].tolist()
        for text in (whole, whole.rstrip(SPACES + END), whole.lstrip(SPACES)):
            for form in (text, b" " + text):
                if (found := self._table.get(form)) is not None and found in said:
                    return found
        return None

    def _statistics(self) -> dict[int, Options]:
        """Return for each of the peer's texts the own tokens that stood where it stood."""
        met: defaultdict[int, Counter[int]] = defaultdict(Counter)
        own = self._own
        for token, start in zip(own.tokens, own.starts, strict=True):
            row = self.row_at(start)
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
            self._single[text] = self._alone(self._said.texts[text])
        return self._single[text]

    def _joined_options(self, text: bytes) -> Options:
        if text not in self._joined:
            self._joined[text] = self._own.beginning(text) or self._alone(text)
        return self._joined[text]

    def _alone(self, text: bytes) -> Options:
        found = self._own.alike(text)
        if found is None and self._searched < SEARCHED:
            self._searched += 1
            found = self._own.nearest(text)
        return [] if found is None else [(found, 1.0, 0)]


@dataclass(frozen=True, slots=True)
class Taught:
    """What teachers say together of own predictions of the probe text. `rows`: (n,) int64, of which ones, by index;
    `ids`, `shares`: (n, W) of own tokens, each row of shares sums to 1 and ends with zeros where it has fewer."""

    rows: Tensor
    ids: Tensor
    shares: Tensor


def teachers_mean(
    ids: Tensor,
    shares: Tensor,
    peers: Sequence[PeerTokens],
    weights: Sequence[float],
    most: int,
) -> Taught:
    """Return p̄ = Σ w_k p_k / Σ w_k over own (k = 0) and the peers that say something, of predictions of which one does.

    `ids`, `shares`: (places, kept) own largest ones; `weights`: own first; `most`: own tokens that a row may have, the
    largest shares, made to sum to 1 again. Memory: 12 bytes for each share that a row of W has, twice meanwhile.
    """
    rows, sizes, told, said_shares = array("q"), array("q"), array("q"), array("f")
    for place, (tokens, parts) in enumerate(zip(ids.numpy(), shares.numpy(), strict=True)):
        prior: dict[int, float] = dict(zip(tokens.tolist(), parts.tolist(), strict=True))
        said = [(peer.shares(place, prior), weight) for peer, weight in zip(peers, weights[1:], strict=True)]
        if not any(heard for heard, _ in said):
            continue
        mean: Shares = {}
        for each, weight in ((prior, weights[0]), *said):
            for token, share in each.items():
                mean[token] = mean.get(token, 0.0) + weight * share
        kept = sorted(mean.items(), key=lambda item: (-item[1], item[0]))[:most]
        total = sum(share for _, share in kept)
        if total > 0:
            rows.append(place)
            sizes.append(len(kept))
            told.extend(token for token, _ in kept)
            said_shares.extend(share / total for _, share in kept)
    filled = torch.arange(max(sizes, default=1)) < torch.tensor(sizes, dtype=torch.int64)[:, None]
    table = torch.zeros(filled.shape, dtype=torch.int64), torch.zeros(filled.shape)
    table[0][filled], table[1][filled] = torch.tensor(told, dtype=torch.int64), torch.tensor(said_shares)
    return Taught(torch.tensor(rows, dtype=torch.int64), *table)


def edit_distance(one: bytes, other: bytes) -> int:
    """Return how many bytes must be put in, left out or replaced to make one text of the other (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, byte in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, second in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (byte != second))
    return row[-1]


def _word(text: bytes, start: int) -> int:
    """Return where the first byte from a place on stands that is no space."""
    while start < len(text) and text[start] in SPACES:
        start += 1
    return start
