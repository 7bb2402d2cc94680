"""Decoders: a model together with what it has read, which gives the logits of what follows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from tinyllm import _fused, ops
from tinyllm._internal.checks import check_int
from tinyllm.generation.sampling import Sampling, draw
from tinyllm.model import SimpleLLM
from tinyllm.nn import SelfAttention, TransformerBlock


class Decoder(Protocol):
    """A model and what it has read: B sequences, the rows, each with a length of its own.

    Attributes:
        batch_size: B.
        capacity: the most tokens that a row can hold: whoever writes on has to `read` fewer ones again. None: a row
            forgets its first ones by itself.
        used_by: a mark of the stream that has used it last; None after any other use. Streams set it, and all methods
            that change what is held take it away.
    """

    batch_size: int
    capacity: int | None
    used_by: object

    @property
    def model(self) -> nn.Module:
        """The model."""

    def read(self, prompts: Sequence[Tensor], rows: Sequence[int] | None = None) -> Tensor:
        """Make prompts the contexts of rows. What a row holds already of the prompt's beginning need not be computed.

        Args:
            prompts: int64 (T,), of any lengths from 1 to capacity.
            rows: of which row each is to be the context, none twice; default: all, in order.

        Returns:
            Logits of what follows each: float32 (len(prompts), V).
        """

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row, int64 (B,); return logits of what follows: float32 (B, V)."""

    def lengths(self) -> list[int]:
        """Return how many tokens each row holds."""


class Recompute:
    """Decoder that computes the whole context anew for each token: right for any model, also one that is not causal.

    A row holds the last `model.config.max_seq_len` tokens. Rows are computed together where they are equally long, so
    that there is no padding. Of a SimpleLLM only the last position's logits are computed.

    Args:
        model: a module from ids (B, T) to logits (B, T, V), with a `config` that has max_seq_len. It runs in eval mode
            and keeps the mode that it was in.
        batch_size: B.
    """

    capacity: int | None = None

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        self.used_by: object = None
        self._max_seq_len: int = model.config.max_seq_len  # type: ignore[union-attr, assignment]
        self._device = next(model.parameters()).device
        self._contexts = [torch.empty(0, dtype=torch.int64, device=self._device)] * batch_size

    def read(self, prompts: Sequence[Tensor], rows: Sequence[int] | None = None) -> Tensor:
        rows, self.used_by = checked_rows(self.batch_size, prompts, rows), None
        for row, prompt in zip(rows, prompts, strict=True):
            self._contexts[row] = prompt[-self._max_seq_len :].to(self._device)
        return self._logits(rows)

    def step(self, tokens: Tensor) -> Tensor:
        self.used_by = None
        for row, token in enumerate(tokens.to(self._device).unsqueeze(-1)):
            self._contexts[row] = torch.cat([self._contexts[row], token])[-self._max_seq_len :]
        return self._logits(range(self.batch_size))

    def lengths(self) -> list[int]:
        return [len(context) for context in self._contexts]

    def _logits(self, rows: Sequence[int]) -> Tensor:
        contexts = [self._contexts[row] for row in rows]
        return together(list(map(len, contexts)), lambda group: self._last(torch.stack([contexts[i] for i in group])))

    def _last(self, ids: Tensor) -> Tensor:
        """Return the last position's logits: (B, T) to (B, V)."""
        model = self.model
        with torch.inference_mode(), evaluating(model.modules()):
            if isinstance(model, SimpleLLM) and _fused.calls_features_and_output(model):
                return _fused.call_linear(model.output, model.features(ids)[:, -1:])[:, 0].float()
            return cast(Tensor, model(ids)[:, -1].float())


class KeyValueCache:
    """Memory for the keys and values of B rows, and the tokens that they belong to: what `Cached` and `Engine` share.

    Args:
        dtype, device: of the keys and values.
        others: see `Cached`.

    Raises:
        ValueError: batch_size or chunk is not positive, or max_len not in 1 .. max_seq_len.
    """

    def __init__(
        self,
        model: SimpleLLM,
        batch_size: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device | str,
        chunk: int,
    ) -> None:
        config = model.config
        self.batch_size = check_int("batch_size", batch_size, 1)
        self.capacity: int | None = check_int("max_len", max_len, 1)
        if max_len > config.max_seq_len:
            raise ValueError(f"max_len is {max_len}; the model's max_seq_len is {config.max_seq_len}")
        self.model = model
        self.used_by: object = None
        self._chunk = check_int("chunk", chunk, 1)
        self._held: list[list[int]] = [[] for _ in range(batch_size)]
        head_dim = config.embedding_dim // config.num_heads
        shape = (config.num_layers, 2, batch_size, config.num_heads, max_len, head_dim)
        self._cache = torch.empty(shape, dtype=dtype, device=device)

    def lengths(self) -> list[int]:
        """Return how many tokens each row holds."""
        return [len(held) for held in self._held]

    def _texts(self, prompts: Sequence[Tensor], rows: Sequence[int] | None) -> dict[int, list[int]]:
        """Begin to read: return the prompt of each row, in the order of `rows`. Raises ValueError if one does not
        fit."""
        capacity, self.used_by = self._cache.size(-2), None
        texts: dict[int, list[int]] = {}
        for row, prompt in zip(checked_rows(self.batch_size, prompts, rows), prompts, strict=True):
            if len(prompt) > capacity:
                raise ValueError(f"the prompt for row {row} has {len(prompt)} tokens; a row holds {capacity}")
            texts[row] = prompt.tolist()
        return texts

    def _num_kept(self, row: int, text: Sequence[int]) -> int:
        """Return how many tokens of `text` a row holds already and need not be read again: all but the last, at most,
        whose logits are wanted."""
        return min(common_prefix(self._held[row], text), len(text) - 1)

    def _check_room(self, n: int) -> None:
        """Begin to append n tokens: raise ValueError if there is a row without room for them."""
        lengths, capacity = self.lengths(), self._cache.size(-2)
        self.used_by = None
        if max(lengths) + n > capacity:
            row = lengths.index(max(lengths))
            raise ValueError(f"row {row} holds {max(lengths)} tokens and is to get {n} more; a row holds {capacity}")


class Cached(KeyValueCache):
    """Decoder that keeps keys and values of what it has read: a token costs one pass over the weights and the cache.

    It is for causal SimpleLLMs whose modules are what their classes say, of any floating dtype and on any device;
    positions are counted in each row by itself. Where its modules are called otherwise, see `refuses`.

    Args:
        model: the model. It runs in eval mode and keeps the mode that it was in.
        batch_size: B.
        max_len: capacity, the most tokens that a row holds. The cache takes 2 * num_layers * B * max_len *
            embedding_dim numbers; its memory is taken now, and touched when it is used.
        cache_dtype: a floating dtype; default: the model's. In bfloat16 the cache has half of float32's bytes.
        chunk: how many tokens, of all rows together, are read at once: bounds the memory of a long prompt.

    Raises:
        ValueError: the model has no valid cache, or max_len is not in 1 .. max_seq_len.
    """

    def __init__(
        self,
        model: SimpleLLM,
        batch_size: int,
        max_len: int,
        *,
        cache_dtype: torch.dtype | None = None,
        chunk: int = 512,
    ) -> None:
        if (reason := self.refuses(model)) is not None:
            raise ValueError(f"model has no valid cache: {reason}")
        check_cache_dtype(cache_dtype)
        weight = next(model.parameters())
        super().__init__(model, batch_size, max_len, cache_dtype or weight.dtype, weight.device, chunk)
        self._modules = [*model.modules()]

    @staticmethod
    def refuses(model: nn.Module) -> str | None:
        """Return why a model has no valid cache; None if it has one."""
        if not isinstance(model, SimpleLLM) or not _fused.is_as_its_classes_say(model):
            return "it is no SimpleLLM whose modules are called as their classes say"
        if not all(block.attention.causal for block in blocks_of(model)):
            return "it is not causal: each token changes what came before it"
        return "its context is a single token" if model.config.max_seq_len == 1 else None

    @torch.inference_mode()
    def read(self, prompts: Sequence[Tensor], rows: Sequence[int] | None = None) -> Tensor:
        texts = self._texts(prompts, rows)
        order = [*texts]
        keys = [(self._num_kept(row, text), len(text)) for row, text in texts.items()]
        with evaluating(self._modules):
            return together(keys, lambda group: self._read([order[i] for i in group], [texts[order[i]] for i in group]))

    def _read(self, rows: list[int], texts: list[list[int]]) -> Tensor:
        """Read equally long texts, of which the rows hold equally many tokens already."""
        start, end = self._num_kept(rows[0], texts[0]), len(texts[0])
        for row in rows:
            del self._held[row][start:]
        step = max(1, self._chunk // len(rows))
        for begin in range(start, end, step):
            ids = torch.tensor([text[begin : begin + step] for text in texts], device=self._cache.device)
            x = self._features(ids, _place(rows, begin, ids))
            for row, text in zip(rows, texts, strict=True):  # one chunk after the other, in case of an interruption
                self._held[row] += text[begin : begin + step]
        return self._logits(x)[:, 0]

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        self._check_room(1)
        lengths = self.lengths()
        longest = max(lengths)
        ids = tokens.to(self._cache.device).unsqueeze(-1)
        place = _Place(slice(None), longest, longest + 1)
        if min(lengths) < longest:
            place = place._replace(lengths=torch.tensor(lengths, device=ids.device))
        with evaluating(self._modules):
            logits = self._logits(self._features(ids, place))[:, 0]
        for held, token in zip(self._held, tokens.tolist(), strict=True):
            held.append(token)
        return logits

    @torch.inference_mode()
    def verify(
        self, tokens: Tensor, uniforms: Tensor, sampling: Sampling, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Append to the only row a token and guesses at what follows it, and draw what follows each of them. The row
        keeps the token and the guesses that were drawn, up to the first that was not.

        A token costs little more than the first one, for the weights are read once for all.

        Args:
            tokens: int64 (n,), the token and n - 1 guesses.
            uniforms: float64 (n,), see `sampling.draw`.
            sampling: how tokens are drawn.
            seen: bool (n, V), for each of them what the text has up to it. For repetition_penalty.

        Returns:
            The tokens that were drawn, int64 (m,), m - 1 being the number of guesses that were right, and their
            log-probabilities, float32 (m,): what one token at a time would give, within rounding.
        """
        self._check_room(len(tokens))
        ids = tokens.to(self._cache.device).unsqueeze(0)
        with evaluating(self._modules):
            features = self._features(ids, _place([0], len(self._held[0]), ids))
            logits = self._logits(features, last=len(tokens))[0]
        return keep_right(self._held[0], tokens, *draw(logits, sampling, uniforms, seen))

    def _features(self, ids: Tensor, place: _Place) -> Tensor | tuple[Tensor, Tensor]:
        """Take ids (n, T) into the cache; return what the last block makes of them."""
        model, table = self.model, self.model.positional_encoding.rows(self._cache.size(-2))
        own = table[place.past : place.end] if place.lengths is None else table[place.lengths].unsqueeze(1)
        x: Tensor | tuple[Tensor, Tensor] = model.embedding(ids).to(own.dtype) + own
        for block, cache in zip(blocks_of(model), self._cache, strict=True):
            x = block.compose(x, partial(_attend, block.attention, cache, place))
        return x

    def _logits(self, x: Tensor | tuple[Tensor, Tensor], last: int = 1) -> Tensor:
        """Return the logits (n, last, V) of the last positions of what the last block gave."""
        model = self.model
        if model.final_norm is None:
            return _fused.call_linear(model.output, cast(Tensor, x)[:, -last:]).float()
        if isinstance(x, tuple):  # not summed yet: see TransformerBlock
            normed = model.final_norm(x[0][:, -last:], x[1][:, -last:])[0]
        else:
            normed = model.final_norm(x[:, -last:])
        return _fused.call_linear(model.output, normed).float()


def blocks_of(model: SimpleLLM) -> list[TransformerBlock]:
    return cast("list[TransformerBlock]", [*model.transformer_blocks])


class _Place(NamedTuple):
    """The place of new tokens in a cache.

    rows are all rows or some, as an index of the cache; each has `past` tokens already, `end` with the new ones. With
    `lengths`, (B,), there is one new token for each of all rows, which have so many tokens already; past is the most.
    """

    rows: slice | Tensor
    past: int
    end: int
    lengths: Tensor | None = None


def _place(rows: list[int], past: int, ids: Tensor) -> _Place:
    """Return the place of ids (n, T) in rows that have `past` tokens."""
    # What a slice selects is not copied.
    follow = all(row == rows[0] + i for i, row in enumerate(rows))
    index = slice(rows[0], rows[0] + len(rows)) if follow else torch.tensor(rows, device=ids.device)
    return _Place(index, past, past + ids.size(1))


def _attend(attention: SelfAttention, cache: Tensor, place: _Place, x: Tensor) -> Tensor:
    """Return the attention of x (n, T, D) over a layer's cache, (2, B, H, max_len, head_dim), which x comes into."""
    query, key, value = attention.heads(x)
    new, (rows, past, end, lengths) = torch.stack([key, value]), place
    if lengths is not None:
        each = torch.arange(len(lengths), device=x.device)
        cache[:, each, :, lengths] = new[:, :, :, 0].transpose(0, 1).to(cache.dtype)  # the two indices come first
        key, value = cache[:, :, :, :end].to(query.dtype)
        return attention.join(ops.scaled_dot_product_attention(query, key, value, key_lengths=lengths + 1))
    cache[:, rows, :, past:end] = new.to(cache.dtype)
    if past > 0:
        key, value = cache[:, rows, :, :end].to(query.dtype)
    return attention.join(ops.scaled_dot_product_attention(query, key, value, is_causal=True, causal_offset=past))


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules in eval mode for a while; each gets its own mode back."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_cache_dtype(cache_dtype: torch.dtype | None) -> None:
    if cache_dtype is not None and not getattr(cache_dtype, "is_floating_point", False):
        raise ValueError(f"cache_dtype is {cache_dtype!r}; it must be a floating dtype")


def checked_rows(batch_size: int, prompts: Sequence[Tensor], rows: Sequence[int] | None) -> Sequence[int]:
    """Return the rows that prompts are for. Raises ValueError if they do not fit each other, or a prompt is empty."""
    rows = range(batch_size) if rows is None else rows
    if len(rows) != len(prompts) or len(set(rows)) != len(rows) or not all(0 <= row < batch_size for row in rows):
        raise ValueError(
            f"rows is {list(rows)} for {len(prompts)} prompts; each needs one of its own in 0 .. {batch_size - 1}"
        )
    for row, prompt in zip(rows, prompts, strict=True):
        if prompt.dim() != 1 or len(prompt) == 0:
            raise ValueError(f"the prompt for row {row} has shape {tuple(prompt.shape)}; it must be (T,), T at least 1")
    return rows


def together(keys: Sequence[Hashable], compute: Callable[[list[int]], Tensor]) -> Tensor:
    """Return what `compute` gives for the indices of `keys`, those of equal keys in one call, in the order of keys."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    parts = [compute(group) for group in groups.values()]
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([index for group in groups.values() for index in group], device=parts[0].device)
    return torch.cat(parts)[order.argsort()]


def keep_right(held: list[int], tokens: Tensor, drawn: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Append to what a row holds the token and the guesses that were drawn; return the latter, see `Cached.verify`."""
    ids = tokens.tolist()
    n = 1 + common_prefix(ids[1:], drawn.tolist())
    held += ids[:n]
    return drawn[:n], logprobs[:n]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
