"""Writing with a model: one token after the other, each drawn from what the model expects next."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tinyllm.model import SimpleLLM
from tinyllm.tokenizer import Tokenizer


def generate(
    model: SimpleLLM,
    ids: Tensor | Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    stop_id: int | None = None,
    suppress_id: int | None = None,
) -> Tensor:
    """Continue `ids` by up to `max_new_tokens` tokens.

    The model sees the last `model.config.max_seq_len` tokens: what lies further back is forgotten,
    so text of any length can be written.

    Args:
        model: any SimpleLLM; it runs in eval mode and keeps the mode that it was in.
        ids: the prompt: integers of shape (T,), or (B, T) for B prompts of one length; T >= 1.
        max_new_tokens: at least 0.
        temperature: divides the logits: below 1 bolder on likely tokens, above 1 more varied; 0
            always takes the likeliest token.
        top_k: draw from the k likeliest tokens only; None draws from all.
        seed: for the same draw every time; None draws from torch's global generator.
        generator: instead of `seed`, a generator of the caller's; draws are made on its device.
        stop_id: stop after this token, such as the tokenizer's `end_of_text_id`. In a batch a row
            that has stopped is filled up with it until the last one has.
        suppress_id: never draw this token, such as the tokenizer's `unknown_id`, which stands for no text.

    Returns:
        int64, the prompt with its continuation: (T + new,) or (B, T + new), on the model's device.

    Raises:
        TypeError: `ids` are not integers.
        ValueError: an argument is out of range, or both `seed` and `generator` are given.
    """
    prompt = _prompt(model, ids)
    steps = iter_tokens(
        model,
        prompt,
        max_new_tokens,
        temperature,
        top_k,
        seed=seed,
        generator=generator,
        stop_id=stop_id,
        suppress_id=suppress_id,
    )
    return torch.cat([prompt, *(token.unsqueeze(-1) for token in steps)], dim=-1)


def iter_tokens(
    model: SimpleLLM,
    ids: Tensor | Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    stop_id: int | None = None,
    suppress_id: int | None = None,
) -> Iterator[Tensor]:
    """Like `generate`, but yields each new token when it is drawn: int64 of shape () or (B,).

    Arguments are checked at the call, not at the first token.
    """
    prompt = _prompt(model, ids)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 0")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}; it must be 0 or a positive number")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it must be at least 0 and below 2**63")
    if seed is not None and generator is not None:
        raise ValueError("pass seed or generator, not both")
    if stop_id is not None and not 0 <= stop_id < model.config.vocab_size:
        raise ValueError(f"stop_id is {stop_id}; the model's ids are 0 .. {model.config.vocab_size - 1}")
    if suppress_id is not None and not 0 <= suppress_id < model.config.vocab_size:
        raise ValueError(f"suppress_id is {suppress_id}; the model's ids are 0 .. {model.config.vocab_size - 1}")
    if suppress_id is not None and model.config.vocab_size == 1:
        raise ValueError(f"suppress_id is {suppress_id}, the only id that the model has")
    if generator is None:
        generator = torch.default_generator if seed is None else torch.Generator().manual_seed(seed)

    def steps(context: Tensor, draw: torch.Generator) -> Iterator[Tensor]:
        stopped = torch.zeros(context.shape[0], dtype=torch.bool, device=context.device)
        for _ in range(max_new_tokens):
            context = context[:, -model.config.max_seq_len :]
            with torch.inference_mode(), _evaluating(model):
                logits = model(context)[:, -1]
            token = _draw(logits, temperature, top_k, draw, suppress_id)
            if stop_id is not None:
                token = token.masked_fill(stopped, stop_id)
                stopped = stopped | (token == stop_id)
            yield token[0] if prompt.dim() == 1 else token
            if stop_id is not None and bool(stopped.all()):
                return
            context = torch.cat([context, token.unsqueeze(-1)], dim=-1)

    return steps(prompt.reshape(-1, prompt.shape[-1]), generator)


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
    seed: int | None = None,
) -> TextStream:
    """Continue `prompt` and return an iterator over the new text, each piece as soon as it is certain.

    A token of a byte-level BPE may hold part of a character only; such bytes wait for the rest of
    it. The end-of-text token ends the text and is not part of it. The unknown token is never drawn.

    Args:
        prompt: text, or the ids of one sequence.
        others: as in `generate`; all are checked at the call, not at the first piece.

    Raises:
        ValueError: the prompt has no known token, or an argument is out of range.
    """
    ids = encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
    tokens = iter_tokens(
        model,
        ids,
        max_new_tokens,
        temperature,
        top_k,
        seed=seed,
        stop_id=tokenizer.end_of_text_id,
        suppress_id=tokenizer.unknown_id,
    )
    return TextStream(tokenizer, ids, tokens)


class TextStream(Iterator[str]):
    """Pieces of text, which are written while they are asked for.

    Attributes:
        num_tokens: how many tokens have been drawn so far, the end-of-text token included.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], tokens: Iterator[Tensor]) -> None:
        self.num_tokens = 0
        self._stop = tokenizer.end_of_text_id
        self._pieces = _decode_stream(tokenizer.decode, prompt, self._counted(tokens))

    def __next__(self) -> str:
        return next(self._pieces)

    def _counted(self, tokens: Iterator[Tensor]) -> Iterator[int]:
        for token in tokens:
            self.num_tokens += 1
            if (index := int(token)) != self._stop:
                yield index


def _decode_stream(decode: Callable[[list[int]], str], prompt: list[int], ids: Iterator[int]) -> Iterator[str]:
    """Yield the text that `ids` add to `prompt`, in pieces of whole characters.

    Decoding each id by itself would be wrong (words need spaces between them, bytes make up
    characters), and decoding everything again for each id slow. So only a window is decoded: the
    ids since the last place where the text ended in a whole character, and before them those of the
    piece that came before, as context.
    """
    window = list(prompt[-8:])
    context = len(window)  # ids in the window whose text is out already
    shown = decode(window)
    for index in ids:
        window.append(index)
        text = decode(window)
        # Only a replacement character at the very end can still change: half a character's bytes.
        whole = text.removesuffix("\ufffd")
        if len(whole) > len(shown):
            yield whole[len(shown) :]
            shown = whole
        if whole == text:
            window = window[context:]
            context = len(window)
            shown = decode(window)
    rest = decode(window)[len(shown) :]
    if rest:
        yield rest


def _prompt(model: SimpleLLM, ids: Tensor | Sequence[int]) -> Tensor:
    """Return `ids` as int64 on the model's device, checked."""
    prompt = torch.as_tensor(ids)
    if prompt.numel() == 0 or prompt.dim() not in (1, 2):
        raise ValueError(f"ids has shape {tuple(prompt.shape)}; it must be (T,) or (B, T), with at least one token")
    if prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool:
        raise TypeError(f"ids has dtype {prompt.dtype}; token ids are integers")
    vocab_size = model.config.vocab_size
    low, high = int(prompt.min()), int(prompt.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"ids has the token id {low if low < 0 else high}; the model's ids are 0 .. {vocab_size - 1}")
    return prompt.to(device=next(model.parameters()).device, dtype=torch.int64)


def _draw(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator, suppress_id: int | None
) -> Tensor:
    """One token id for each row of logits (B, V): int64 (B,) on the logits' device."""
    scores = logits.float()
    if bool((scores.isnan() | (scores == math.inf)).any()):
        raise ValueError(
            "the model's logits are not finite (nan or inf): its training diverged, or its weights are damaged"
        )
    if suppress_id is not None:
        scores = scores.clone()  # the model's own tensor is left alone
        scores[:, suppress_id] = -math.inf
    if temperature == 0:
        return scores.argmax(dim=-1)
    scores = scores.to(generator.device)
    kept = None
    if top_k is not None and top_k < scores.shape[-1]:
        scores, kept = scores.topk(top_k, dim=-1)
    # The largest score is subtracted first: divided by a small temperature it would overflow.
    weights = torch.softmax((scores - scores.amax(dim=-1, keepdim=True)) / temperature, dim=-1)
    token = torch.multinomial(weights, 1, generator=generator)
    if kept is not None:
        token = kept.gather(-1, token)
    return token.squeeze(-1).to(logits.device)


@contextmanager
def _evaluating(model: SimpleLLM) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
