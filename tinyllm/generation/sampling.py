"""Draw a token from logits: what shapes the distribution, and the draw itself.

All of it is a function of the logits and one number of [0, 1) for each row, written so that another implementation can
do exactly the same: the kept tokens' weights are summed in float64 in order of token ids, and the first token at which
the sum exceeds that part of the total is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from tinyllm._internal.checks import check_int

NOT_FINITE = "the model's logits are not finite (nan or inf): its training diverged, or its weights are damaged"


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. The steps are done in this order, which is Hugging Face's; most are off by default.

    Args:
        suppress_id: never draw this token.
        ids_below: draw ids below this alone; of a model with more ids than its tokenizer, whose others stand for no
            text.
        repetition_penalty: above 0. Logits of tokens that the prompt or the text has already are divided by it where
            they are positive and multiplied by it elsewhere: above 1 it discourages them (Keskar et al., 2019, "CTRL").
        temperature: divides the logits: below 1 bolder on likely tokens, above 1 more varied; 0 always takes the
            likeliest token (the one of the lowest id, if there are several), and none of the following matters.
        top_k: draw from the k likeliest tokens only; of equally likely ones those of the lowest ids are kept.
        top_p: in (0, 1]: draw from the fewest tokens whose probabilities sum to this (Holtzman et al., 2020, "The
            Curious Case of Neural Text Degeneration").
        min_p: in [0, 1): draw from the tokens that are at least this times as likely as the likeliest (Nguyen et al.,
            2024, "Min-p sampling").

    Raises:
        TypeError, ValueError: an argument is no number or out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    suppress_id: int | None = None
    ids_below: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, "0 or a positive number", lambda x: 0 <= x < math.inf)
        if self.top_k is not None:
            check_int("top_k", self.top_k, 1)
        if self.top_p is not None:
            _check("top_p", self.top_p, "above 0 and at most 1", lambda x: 0 < x <= 1)
        if self.min_p is not None:
            _check("min_p", self.min_p, "at least 0 and below 1", lambda x: 0 <= x < 1)
        _check("repetition_penalty", self.repetition_penalty, "a positive number", lambda x: 0 < x < math.inf)
        if self.suppress_id is not None:
            check_int("suppress_id", self.suppress_id, 0)
        if self.ids_below is not None:
            check_int("ids_below", self.ids_below, 1)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError if an argument does not fit a vocabulary of this size."""
        if self.top_k is not None and self.top_k > vocab_size:
            raise ValueError(f"top_k is {self.top_k}; it must be at most the size of the vocabulary, {vocab_size}")
        if self.suppress_id is not None and self.suppress_id >= vocab_size:
            raise ValueError(f"suppress_id is {self.suppress_id}; the model's ids are 0 .. {vocab_size - 1}")
        if self.suppress_id == 0 and min(vocab_size, self.ids_below or vocab_size) == 1:
            raise ValueError("suppress_id is 0, the only id that can be drawn")


def _check(name: str, value: object, allowed: str, is_allowed: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; it must be {allowed}")
    if not is_allowed(float(value)):  # NaN is not
        raise ValueError(f"{name} is {value}; it must be {allowed}")


def draw(
    logits: Tensor, sampling: Sampling, uniforms: Tensor | None = None, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw a token for each row.

    Args:
        logits: (B, V), floating. They are not modified.
        sampling: how; it has to fit V, see `Sampling.check_vocabulary`.
        uniforms: float64 (B,), each in [0, 1), where in the distribution a row's token is taken; not used at
            temperature 0.
        seen: bool (B, V), which tokens a row has already; for repetition_penalty.

    Returns:
        The tokens, int64 (B,), and their log-probabilities, float32 (B,), in nats. The latter are the model's own:
        of the softmax of the logits as they came, whatever `sampling` makes of them.

    Raises:
        ValueError: a logit is NaN or infinite (-inf stands for a token that cannot be), or no token is left.
    """
    if sampling.temperature != 0 and uniforms is None:
        raise ValueError("uniforms is None; above temperature 0 each row needs a number in [0, 1)")
    tokens, logprobs, finite = draw_unchecked(logits, sampling, uniforms, seen)
    if not bool(finite):
        raise ValueError(NOT_FINITE)
    return tokens, logprobs


def draw_unchecked(
    logits: Tensor, sampling: Sampling, uniforms: Tensor | None, seen: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `draw` does without looking at any number on the host, which would wait for a GPU. The last result says
    whether the logits are finite, bool (); if not, the others mean nothing, and tokens may be V."""
    raw = logits.float()
    total = raw.logsumexp(dim=-1)
    scores = raw
    if seen is not None and sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        scores = torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
    if sampling.ids_below is not None and sampling.ids_below < raw.size(-1):
        rest = raw.new_full((raw.size(0), raw.size(-1) - sampling.ids_below), -math.inf)
        scores = torch.cat([scores[:, : sampling.ids_below], rest], dim=-1)
    if sampling.suppress_id is not None:
        scores = scores.clone()
        scores[:, sampling.suppress_id] = -math.inf
    top = scores.amax(dim=-1)
    # A NaN or an infinity anywhere in a row is one in its sum: there is no need to look at all of them once more.
    finite = (total.isfinite() & top.isfinite()).all()
    if sampling.temperature == 0:
        tokens = scores.argmax(dim=-1)
    else:
        assert uniforms is not None
        weights = _weights(scores.double() - top.double().unsqueeze(-1), sampling)
        sums = weights.cumsum(dim=-1)
        # Below the total for every number below 1: the largest weight is 1, so that rounding cannot reach it.
        part = uniforms.to(sums.device) * sums[:, -1]
        tokens = torch.searchsorted(sums, part.unsqueeze(-1), right=True).squeeze(-1)
    # Without finite weights there may be none at which the sum exceeds its part.
    own = raw.gather(-1, tokens.clamp(max=raw.size(-1) - 1).unsqueeze(-1)).squeeze(-1)
    return tokens, own - total, finite


def _weights(scores: Tensor, sampling: Sampling) -> Tensor:
    """Return probabilities relative to the likeliest token's, 0 for those that are not drawn: (B, V).

    scores: (B, V), float64, the largest of each row 0: divided by a small temperature it would overflow otherwise.
    """
    scores = scores / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.size(-1):
        scores = scores.masked_fill(~_is_among_top(scores, sampling.top_k), -math.inf)
    weights = scores.exp()
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        beyond = before >= sampling.top_p * ordered.sum(dim=-1, keepdim=True)
        beyond[:, 0] = False
        weights = weights.masked_fill(beyond.scatter(-1, order, beyond), 0.0)
    if sampling.min_p is not None:
        weights = weights.masked_fill(weights < sampling.min_p, 0.0)
    return weights


def _is_among_top(scores: Tensor, k: int) -> Tensor:
    """Return which k scores of each row are the largest, exactly k; of equal ones those that come first."""
    smallest = scores.topk(k, dim=-1).values[:, -1:]
    above, equal = scores > smallest, scores == smallest
    return above | (equal & (equal.cumsum(dim=-1) <= k - above.sum(dim=-1, keepdim=True)))
