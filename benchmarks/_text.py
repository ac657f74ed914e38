"""Text to learn from: sentences of a small random language, or a file of the user's."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MOST_CHARACTERS = 128
"""Different characters kept of a file; rarer ones all become one more."""


@dataclass(frozen=True)
class Text:
    """`numbers`: (length,) int64, each below `characters`; `source`: what the text is, in a few words."""

    numbers: Tensor
    characters: int
    source: str


def grammar(length: int, seed: int) -> Text:
    """Return `length` characters of sentences of a random language, drawn with `seed`.

    It has nouns and verbs that agree in number, adjectives, names, clauses within clauses to any depth, and words as
    frequent as Zipf's law has it: some of what comes next is told by the last few letters, some by the last words.
    """
    return numbered("".join(sentences(length, seed))[:length], "random grammar")


def sentences(length: int, seed: int) -> list[str]:
    """Return sentences of the language of `grammar`, each with what follows it: `length` characters, or a few more."""
    draw = random.Random(seed)
    words = _Words(draw)
    pieces: list[str] = []
    written = 0
    while written < length:
        sentence = f"{words.sentence()}{draw.choice('...!')}{' ' if draw.random() < 0.9 else chr(10)}"
        pieces.append(sentence)
        written += len(sentence)
    return pieces


def from_file(path: Path, length: int) -> Text:
    """Return the first `length` characters of a UTF-8 file."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return numbered(file.read(length), path.name)


def numbered(text: str, source: str) -> Text:
    """Return a text as numbers: the most frequent characters first, rare ones as one and the same."""
    counts: dict[str, int] = {}
    for character in text:
        counts[character] = counts.get(character, 0) + 1
    order = sorted(counts, key=lambda character: (-counts[character], character))[:MOST_CHARACTERS]
    number = {character: i for i, character in enumerate(order)}
    rare = len(order)
    numbers = torch.tensor([number.get(character, rare) for character in text], dtype=torch.int64)
    return Text(numbers, rare + (len(counts) > rare), source)


class _Words:
    """The words of one random language, and sentences of them."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._taken: set[str] = set()
        self._nouns, self._verbs = self._many(120), self._many(60)
        self._adjectives, self._names = self._many(60), [name.capitalize() for name in self._many(20)]
        self._articles, self._that, self._links = self._many(3), self._many(1)[0], self._many(3)
        self._plural, self._singular = draw.choice(("s", "en", "i")), draw.choice(("t", "os", "a"))

    def sentence(self) -> str:
        first = self._clause(0)
        return f"{first}, {self._zipf(self._links)} {self._clause(0)}" if self._draw.random() < 0.25 else first

    def _clause(self, depth: int) -> str:
        subject, plural = self._phrase(depth)
        verb = self._zipf(self._verbs) + ("" if plural else self._singular)
        return f"{subject} {verb} {self._phrase(depth)[0]}" if self._draw.random() < 0.7 else f"{subject} {verb}"

    def _phrase(self, depth: int) -> tuple[str, bool]:
        if self._draw.random() < 0.2:
            return self._zipf(self._names), False
        plural = self._draw.random() < 0.4
        parts = [self._zipf(self._articles)]
        if self._draw.random() < 0.4:
            parts.append(self._zipf(self._adjectives))
        parts.append(self._zipf(self._nouns) + (self._plural if plural else ""))
        if self._draw.random() < 0.25 / (1 + depth):
            parts += [self._that, self._clause(depth + 1)]
        return " ".join(parts), plural

    def _zipf(self, words: list[str]) -> str:
        return self._draw.choices(words, [1 / (rank + 1) for rank in range(len(words))])[0]

    def _many(self, count: int) -> list[str]:
        """Return words that no other list has."""
        words: list[str] = []
        while len(words) < count:
            syllables = self._draw.choice((1, 2, 2, 3))
            word = "".join(self._draw.choice("bdfgklmnprstvz") + self._draw.choice("aeiou") for _ in range(syllables))
            word += self._draw.choice(("", "", "n", "r", "l"))
            if word not in self._taken:
                self._taken.add(word)
                words.append(word)
        return words
