"""Measures of how well a model predicts text: loss, perplexity, and bits per byte, which also compares tokenizers."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from tinyllm._internal.extras import from_extra
from tinyllm.model import SimpleLLM
from tinyllm.tokenizer import CharTokenizer, Tokenizer, WordTokenizer

with from_extra("train"):
    from tqdm import tqdm

_T = TypeVar("_T")

_DOCUMENTS = 64  # tokenized at once
_NOTHING = -100  # the target where there is none


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate_texts`.

    Attributes:
        documents, tokens, num_bytes: how much was predicted; bytes of UTF-8.
        unknown: tokens that stand for text outside the vocabulary. What they hide was not predicted, so bits_per_byte
            does not compare where there are any.
        loss: the mean over the tokens, in nats.
    """

    documents: int
    tokens: int
    num_bytes: int
    unknown: int
    loss: float

    @property
    def perplexity(self) -> float:
        """Return exp(loss): among how many equally likely tokens the model is, as it were, undecided."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Return the bits that a byte of the text takes when the model's predictions compress it."""
        return self.loss * self.tokens / self.num_bytes / math.log(2)


@torch.no_grad()
def evaluate_texts(
    model: SimpleLLM,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    batch_size: int = 16,
    *,
    show_progress: bool = False,
) -> Evaluation:
    """Predict every token of every text once.

    A text longer than the model's context is cut into pieces of that length, each of which begins with no context but
    the token before it. The first token of a text is predicted from the end-of-text token, as in training, and left out
    where the tokenizer has none. Memory is bounded: texts are read as a stream.

    Args:
        model: causal; evaluated without dropout, on the device where it lies.
        tokenizer: the one that it was trained with.
        texts: the documents.
        batch_size: pieces at a time.
        show_progress: say on stderr how many tokens were predicted, when it takes over two seconds.

    Raises:
        ValueError: the model is not causal, the vocabularies differ, batch_size is below 1, there is nothing to
            predict, or the loss is not finite.
    """
    if not model.config.causal:
        raise ValueError("the model is not causal: it sees the tokens that it should predict")
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}: they do not belong "
            "together"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    counts = _Counts()
    total = 0.0
    pieces = _pieces(texts, tokenizer, model.config.max_seq_len, counts)
    bar = tqdm(
        disable=not show_progress,
        delay=2,
        leave=False,
        mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file keeps every state of the bar
        bar_format="{n:,} tokens predicted, {elapsed}",
    )
    try:
        for batch in _batches(pieces, batch_size):
            inputs, targets = _padded(batch)
            tokens = int((targets != _NOTHING).sum())
            # In float64, because a mean over few tokens would count as much as one over many.
            total += model.loss(inputs.to(device), targets.to(device)).double().item() * tokens
            bar.update(tokens)
    finally:
        bar.close()
        model.train(was_training)
    if counts.tokens == 0:
        raise ValueError("there is no token to predict: the texts are empty, or too short")
    if not math.isfinite(total):
        raise ValueError(f"the loss of these texts is {total}: the training diverged, or the weights are damaged")
    return Evaluation(counts.documents, counts.tokens, counts.num_bytes, counts.unknown, total / counts.tokens)


@dataclass
class _Counts:
    documents: int = 0
    tokens: int = 0
    num_bytes: int = 0
    unknown: int = 0


def _pieces(texts: Iterable[str], tokenizer: Tokenizer, length: int, counts: _Counts) -> Iterator[list[int]]:
    """Yield pieces of at most length + 1 ids: the inputs, and the successor of each."""
    begin = tokenizer.end_of_text_id
    for group in _batches(texts, _DOCUMENTS):
        for text, ids in zip(group, tokenizer.encode_batch(group), strict=True):
            counts.documents += 1
            num_bytes = len(text.encode())
            if begin is not None:
                ids = [begin, *ids]
            elif ids:
                num_bytes -= len(_first(text, ids, tokenizer).encode())
            if len(ids) < 2:
                continue
            counts.tokens += len(ids) - 1
            counts.num_bytes += num_bytes
            counts.unknown += ids[1:].count(tokenizer.unknown_id) if tokenizer.unknown_id is not None else 0
            for first in range(0, len(ids) - 1, length):
                yield ids[first : first + length + 1]


def _first(text: str, ids: list[int], tokenizer: Tokenizer) -> str:
    """Return the text that the first token of `text` stands for, which its decoding does not say if it is unknown."""
    if ids[0] == tokenizer.unknown_id and isinstance(tokenizer, CharTokenizer | WordTokenizer):
        return next(iter(tokenizer.split(text)))
    return tokenizer.decode(ids[:1])


def _batches(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    batch: list[_T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _padded(pieces: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, (pieces, longest). No token of a piece sees the padding after its end."""
    longest = max(map(len, pieces)) - 1
    inputs = torch.zeros(len(pieces), longest, dtype=torch.int64)
    targets = torch.full((len(pieces), longest), _NOTHING)
    for row, ids in enumerate(pieces):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, : len(ids) - 1] = torch.tensor(ids[1:])
    return inputs, targets
