"""Speculation without a second model: guesses at what comes next, taken from the text itself."""

from __future__ import annotations

from collections.abc import Iterable

# How many of the last tokens have to be alike for what followed them to be guessed: the longer place goes first. One
# token alone says too little.
_SIZES = (3, 2)


class Lookup:
    """Guesses that a text goes on as it did after the same tokens before (Saxena, 2023, "Prompt Lookup Decoding").

    A guess that is wrong costs time, so the number of tokens guessed follows what came of the guesses before.

    Args:
        tokens: the text so far.
        most: the most tokens to guess at once.
    """

    def __init__(self, tokens: Iterable[int], most: int) -> None:
        self._most = self._length = most
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # where the text last went on from these
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """Append a token to the text."""
        for size in _SIZES:
            if len(self._tokens) >= size:
                self._after[tuple(self._tokens[-size:])] = len(self._tokens)
        self._tokens.append(token)

    def guess(self) -> list[int]:
        """Return the tokens that may come next; none where the text's end is new."""
        for size in _SIZES:
            at = self._after.get(tuple(self._tokens[-size:]))
            if at is not None:
                # What repeats itself goes on to do so: a guess may follow from another.
                guessed = self._tokens[at : at + self._length]
                while len(guessed) < self._length:
                    guessed.append(guessed[at - len(self._tokens)])
                return guessed
        return []

    def learn(self, guessed: int, right: int) -> None:
        """Take how many of the tokens guessed were right: the next guess goes one beyond them, or grows if all were."""
        self._length = min(self._most, self._length + 2 if right == guessed else right + 1)
