"""From text to text: streams of whole characters, and where they stop."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, overload

import torch

from tinyllm.generation.tokens import TokenStream, iter_tokens
from tinyllm.model import SimpleLLM
from tinyllm.tokenizer import Tokenizer


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the ids of a prompt. Raises ValueError if it is empty or none of its tokens is known."""
    ids = tokenizer.encode(prompt)
    shown = prompt if len(prompt) <= 60 else f"{prompt[:57]}..."
    if not ids:
        raise ValueError(f"the prompt is {shown!r}, which has no token; write at least one to go on from")
    if all(index == tokenizer.unknown_id for index in ids):
        raise ValueError(
            f"the prompt is {shown!r}, of which the {tokenizer.kind} tokenizer knows nothing; "
            f"write something that its {tokenizer.vocab_size} tokens cover"
        )
    return ids


def stream_text(
    model: SimpleLLM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    *,
    stop: str | Sequence[str] = (),
    **options: Any,
) -> TextStream:
    """Continue `prompt` and return an iterator over the new text, each piece as soon as it is certain.

    A token of a byte-level BPE may hold part of a character only; such bytes wait for the rest of
    it. The end-of-text token ends the text and is not part of it. The unknown token is never drawn.

    Args:
        prompt: text, or the ids of one sequence.
        stop: strings at which the text ends. They are found across the borders of tokens, and are not part of the text:
            what may be the beginning of one waits. What the prompt has does not count.
        options: top_p, min_p, repetition_penalty, seed, generator, overflow, prompt_lookup_num_tokens, cache_dtype and
            decoder, as in `generate`.
        others: as in `generate`; all are checked at the call, not at the first piece.

    Raises:
        TypeError, ValueError: the prompt has no known token, a stop string is empty, or an argument is out of range.
    """
    if isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
        raise TypeError(f"prompt is {prompt!r}; it must be a str, or the token ids of one")
    ids = encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else [*prompt]
    return TextStream(
        tokenizer, ids, _tokens(model, tokenizer, ids, max_new_tokens, temperature, top_k, options), _stops(stop)
    )


@overload
def generate_text(
    model: SimpleLLM, tokenizer: Tokenizer, prompts: str, max_new_tokens: int, *args: Any, **options: Any
) -> str: ...
@overload
def generate_text(
    model: SimpleLLM, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int, *args: Any, **options: Any
) -> list[str]: ...
def generate_text(
    model: SimpleLLM,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    *,
    stop: str | Sequence[str] = (),
    **options: Any,
) -> str | list[str]:
    """Continue one prompt, or a batch of prompts together; return the new text of each, without its prompt.

    Args, Raises: as `stream_text`. Prompts may be of any lengths; with a seed the one at place b gets the text that it
    gets alone with seed + b. Ctrl-C ends the texts where they are, as it ends a stream: it raises no KeyboardInterrupt.
    """
    stops = _stops(stop)
    ids = [encode_prompt(tokenizer, prompt) for prompt in _strings("prompts", prompts)]
    if not ids:
        raise ValueError(f"prompts is {prompts!r}; it must have at least one prompt")
    tokens = _tokens(model, tokenizer, [torch.tensor(own) for own in ids], max_new_tokens, temperature, top_k, options)
    rows = [_Text(tokenizer, own, stops) for own in ids]
    texts = [""] * len(rows)
    going = [row for row in range(len(rows)) if tokens.finish_reasons[row] is None]
    with suppress(KeyboardInterrupt):
        for drawn in tokens:
            drawn = drawn.tolist()
            for row in going:
                texts[row] += rows[row].add(drawn[row])
                if rows[row].found_stop:
                    tokens.end(row, "stop_string")
                if tokens.finish_reasons[row] is not None:
                    texts[row] += rows[row].rest()
            going = [row for row in going if tokens.finish_reasons[row] is None]
    return texts[0] if isinstance(prompts, str) else texts


class TextStream(Iterator[str]):
    """Pieces of text, which are written while they are asked for; made by `stream_text`.

    Ctrl-C while a piece is being written ends the stream: it raises no KeyboardInterrupt, and finish_reason says so.

    Attributes:
        num_tokens: how many tokens have been drawn so far, the end-of-text token included.
        prompt_tokens: how many tokens the prompt has.
        finish_reason: why the text has ended: "stop", the model has ended it; "length", for want of further tokens or
            of room; "stop_string"; "interrupt". None while it is being written.
        prefill_seconds, decode_seconds: wall time until the first token, and for all others; see `TokenStream`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], tokens: TokenStream, stops: Sequence[str] = ()) -> None:
        self.prompt_tokens = len(prompt)
        self.finish_reason: str | None = None
        self._tokens = tokens
        self._text = _Text(tokenizer, prompt, stops)

    @property
    def num_tokens(self) -> int:
        return self._tokens.num_tokens[0]

    @property
    def prefill_seconds(self) -> float:
        return self._tokens.prefill_seconds

    @property
    def decode_seconds(self) -> float:
        return self._tokens.decode_seconds

    def __next__(self) -> str:
        while self.finish_reason is None:
            try:
                token = next(self._tokens, None)
            except KeyboardInterrupt:
                self.finish_reason = "interrupt"
                break
            piece = "" if token is None else self._text.add(int(token))
            if self._text.found_stop:
                self.finish_reason = "stop_string"
            elif token is None or self._tokens.finish_reasons[0] is not None:
                self.finish_reason = self._tokens.finish_reasons[0]
                piece += self._text.rest()
            if piece:
                return piece
        raise StopIteration


def _tokens(
    model: SimpleLLM,
    tokenizer: Tokenizer,
    ids: Any,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    options: dict[str, Any],
) -> TokenStream:
    own: dict[str, Any] = {
        "stop_id": tokenizer.end_of_text_id,
        "suppress_id": tokenizer.unknown_id,
        "ids_below": min(tokenizer.vocab_size, model.config.vocab_size),
    }
    return iter_tokens(model, ids, max_new_tokens, temperature, top_k, **own, **options)


def _strings(name: str, value: str | Sequence[str]) -> list[str]:
    """Return a str, or several, as a list. TypeError."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Collection) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} is {reprlib.repr(value)}; it must be a str, or a list of them")
    return [*texts]


def _stops(stop: str | Sequence[str]) -> list[str]:
    stops = _strings("stop", stop)
    if "" in stops:
        raise ValueError("stop has the string ''; it must have at least one character")
    return stops


class _Text:
    """The new text of one row: ids go in, pieces of text that can no longer change come out.

    Attributes:
        found_stop: whether a stop string has ended the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stops: Sequence[str]) -> None:
        self.found_stop = False
        self._end = tokenizer.end_of_text_id
        self._characters = _Characters(tokenizer.decode, prompt)
        self._stops = stops
        self._held = ""  # which may be the beginning of a stop string

    def add(self, index: int) -> str:
        return "" if index == self._end else self._pass_on(self._characters.add(index))

    def rest(self) -> str:
        """Return what is still held back when no more ids come."""
        if self.found_stop:
            return ""
        piece = self._pass_on(self._characters.rest())
        return piece if self.found_stop else piece + self._held

    def _pass_on(self, piece: str) -> str:
        text = self._held + piece
        # Of several the one that ends first, and of those the longest: the text is the same however tokens divide it.
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.found_stop = True
            return text[: min(found)[1]]
        waiting = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - waiting :]
        return text[: len(text) - waiting]


def _overlap(text: str, stop: str) -> int:
    """Return how long an end of `text` is the beginning of `stop`, without being all of it."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))


class _Characters:
    """The text that ids add to a prompt, in pieces of whole characters.

    Decoding each id by itself would be wrong (words need spaces between them, bytes make up
    characters), and decoding everything again for each id slow. So only a window is decoded: the
    ids since the last place where the text ended in a whole character, and before them those of the
    piece that came before, as context.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: list[int]) -> None:
        self._decode = decode
        self._window = [*prompt[-8:]]
        self._context = len(self._window)  # ids in the window whose text is out already
        self._shown = decode(self._window)

    def add(self, index: int) -> str:
        """Return the characters that are whole now."""
        self._window.append(index)
        text = self._decode(self._window)
        # Only a replacement character at the very end can still change: half a character's bytes.
        whole = text.removesuffix("\ufffd")
        piece = ""
        if len(whole) > len(self._shown):
            piece = whole[len(self._shown) :]
            self._shown = whole
        if whole == text:
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._shown = self._decode(self._window)
        return piece

    def rest(self) -> str:
        """Return what half a character is shown as, at the end of the text."""
        return self._decode(self._window)[len(self._shown) :]
