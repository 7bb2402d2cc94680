"""Engine: the decoder for CPUs, which generates many tokens in one call of C++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tinyllm import _fused
from tinyllm.generation.decoder import KeyValueCache, keep_right
from tinyllm.generation.sampling import Sampling
from tinyllm.model import SimpleLLM
from tinyllm.ops.decoder import DECODER
from tinyllm.ops.dispatch import serves

# A prompt of so few new tokens is read by the products that a step has: more take less time as a matmul.
_FEW_TOKENS = 8

# Bytes of weights, keys and values from which on a token takes so long that calls of one are not noticed.
_LARGE_TOKEN = 512 << 20


class Written(NamedTuple):
    """Tokens int64 (B, n) that were drawn, and their log-probabilities float32 (B, n)."""

    tokens: Tensor
    logprobs: Tensor


class Engine(KeyValueCache):
    """Decoder for causal SimpleLLMs on a CPU whose modules are what their classes say: weights of float32, bfloat16,
    int8 and int4, with activations in float32.

    Of float32 weights the logits are those of the model within rounding. A row's logits depend neither on the other
    rows nor on the number of threads. Quantised weights meet the activations of a prompt as they are, and those of a
    new token rounded, see `ops.quantized_linear`.

    Args:
        model: the model, which must not be moved or cast while this object is used; in-place changes of its weights
            are seen if they are contiguous.
        batch_size: B.
        max_len: capacity, the most tokens that a row holds. The cache takes 2 * num_layers * B * max_len *
            embedding_dim numbers; its memory is taken now, and touched when it is used.
        cache_dtype: float32 or bfloat16, which has half the bytes; default: float32 for a model whose weights are all
            float32, and bfloat16 for others.
        chunk: how many tokens, of all rows together, are read at once: bounds the memory of a long prompt.
        operands: what the method of this name has returned for the model, if that is known already.

    Raises:
        ValueError: it does not serve the model, or an argument is out of range.
    """

    def __init__(
        self,
        model: SimpleLLM,
        batch_size: int,
        max_len: int,
        *,
        cache_dtype: torch.dtype | None = None,
        chunk: int = 1024,
        operands: _fused.DecoderOperands | None = None,
    ) -> None:
        found = self.operands(model) if operands is None else operands
        if isinstance(found, str):
            raise ValueError(f"the engine does not serve the model: {found}")
        if cache_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"cache_dtype is {cache_dtype}; it must be torch.float32 or torch.bfloat16")
        self._weights, self._positions, self._settings = found
        in_fewer_bits = any(x.dtype != torch.float32 for x in self._weights)
        own = torch.bfloat16 if in_fewer_bits else torch.float32
        super().__init__(model, batch_size, max_len, cache_dtype or own, "cpu", chunk)
        self._classes = model.config.vocab_size
        # Of the table, which comes first, only a row is read.
        self._bytes = sum(x.numel() * x.element_size() for x in self._weights[1:])
        # With quantised weights the activations of a step are rounded: a text would depend on what was read before.
        self._reads_alike = not any(x.dtype == torch.uint8 for x in self._weights)

    @staticmethod
    def operands(model: nn.Module) -> _fused.DecoderOperands | str:
        """Return what the operators take of a model, or why they do not serve it."""
        if not isinstance(model, SimpleLLM):
            return "it is no SimpleLLM"
        if model.config.max_seq_len == 1:
            return "its context is a single token"
        found = _fused.decoder_operands(model)
        served = isinstance(found, str) or serves("cpp", DECODER, found.positions)
        return found if served else "there are no compiled kernels, or other ones are asked for"

    @property
    def tokens_a_call(self) -> int:
        """How many tokens `write` should draw in a call: the more, the fewer bytes a token reads, since a call takes
        Python as long whatever it draws."""
        of_token = self._cache[:, :, 0, :, :1]
        size = self._bytes + sum(self.lengths()) * of_token.numel() * of_token.element_size()
        return max(1, min(16, _LARGE_TOKEN // max(1, size)))

    def read(self, prompts: Sequence[Tensor], rows: Sequence[int] | None = None) -> Tensor:
        """See `Decoder.read`."""
        texts = self._texts(prompts, rows)
        few: list[tuple[int, list[int]]] = []
        many: list[tuple[int, list[int]]] = []
        logits: dict[int, Tensor] = {}
        for row, text in texts.items():
            del self._held[row][self._num_kept(row, text) :]
            new = len(text) - len(self._held[row])
            (few if new <= _FEW_TOKENS and self._reads_alike else many).append((row, text))
        for row, text in few:
            rest = text[len(self._held[row]) :]
            places = self._places(row, len(rest))
            logits[row] = self._call(torch.ops.tinyllm.decoder_step, *places, torch.tensor(rest))[-1]
            self._held[row] += rest
        for begin, group in _neighbours(many, self._held, self._chunk):
            for row, own in zip(range(begin, begin + len(group)), self._read(begin, group), strict=True):
                logits[row] = own
        return torch.stack([logits[row] for row in texts])

    def _read(self, begin: int, texts: list[list[int]]) -> Tensor:
        """Read the texts of neighbouring rows; several ones at once, a single one in chunks."""
        end, logits = begin + len(texts), torch.empty(0)
        while any(len(text) > len(held) for text, held in zip(texts, self._held[begin:end], strict=True)):
            new = [text[len(held) :][: self._chunk] for text, held in zip(texts, self._held[begin:end], strict=True)]
            longest = max(map(len, new))
            ids = torch.tensor([own + [0] * (longest - len(own)) for own in new])
            counts = torch.tensor([len(own) for own in new])
            logits = self._call(torch.ops.tinyllm.decoder_read, *self._rows(begin, end), ids, counts)
            for held, own in zip(self._held[begin:end], new, strict=True):
                held += own
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoder.step`."""
        self._check_room(1)
        rows = self._rows(0, self.batch_size)
        logits: Tensor = self._call(torch.ops.tinyllm.decoder_step, *rows, tokens.cpu())
        for held, token in zip(self._held, tokens.tolist(), strict=True):
            held.append(token)
        return logits

    def write(
        self,
        tokens: Tensor,
        uniforms: Tensor,
        sampling: Sampling,
        seen: Tensor | None = None,
        stop_ids: Sequence[int] = (),
    ) -> Written:
        """Append tokens (B,) to the rows, then draw n more for each, of which the last is not read.

        Args:
            tokens: int64 (B,).
            uniforms: float64 (B, n), see `sampling.draw`.
            sampling: how tokens are drawn.
            seen: bool (B, V), which tokens a row has already; updated. For repetition_penalty.
            stop_ids: when each row has drawn one of these, no more are drawn: n is smaller then. A row that has drawn
                one repeats it.
        """
        n = uniforms.size(1)
        self._check_room(n)
        drawn, logprobs = self._draw(tokens, uniforms, sampling, seen, self._cache, self.lengths(), stop_ids)
        n = int((drawn[0] >= 0).sum())
        for held, first, new in zip(self._held, tokens.tolist(), drawn[:, : n - 1].tolist(), strict=True):
            held += [first, *new]
        return Written(drawn[:, :n], logprobs[:, :n])

    def verify(
        self, tokens: Tensor, uniforms: Tensor, sampling: Sampling, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Cached.verify`."""
        self._check_room(len(tokens))
        places = self._places(0, len(tokens))
        drawn, logprobs = self._draw(tokens, uniforms.unsqueeze(-1), sampling, seen, *places)
        return keep_right(self._held[0], tokens, drawn[:, 0], logprobs[:, 0])

    def _draw(
        self,
        tokens: Tensor,
        uniforms: Tensor,
        sampling: Sampling,
        seen: Tensor | None,
        cache: Tensor,
        lengths: list[int],
        stop_ids: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor]:
        how = (
            sampling.temperature,
            0 if sampling.top_k is None else sampling.top_k,
            1.0 if sampling.top_p is None else sampling.top_p,
            0.0 if sampling.min_p is None else sampling.min_p,
            sampling.repetition_penalty,
            -1 if sampling.suppress_id is None else sampling.suppress_id,
            min(sampling.ids_below or self._classes, self._classes),
        )
        operator, after = torch.ops.tinyllm.decoder_write, (*how, seen, [*stop_ids])
        drawn, logprobs = self._call(operator, cache, lengths, tokens.cpu(), uniforms, after=after)
        return drawn, logprobs

    def _rows(self, begin: int, end: int) -> tuple[Tensor, list[int]]:
        """Return the cache of some rows, and how many tokens each holds."""
        return self._cache[:, :, begin:end], self.lengths()[begin:end]

    def _places(self, row: int, n: int) -> tuple[Tensor, list[int]]:
        """Return the next n places of a row as rows of one cache, each with one token more than the one before it: the
        keys and values of all come into the cache before attention looks at any."""
        cache, (held,) = self._rows(row, row + 1)
        return cache.expand(-1, -1, n, -1, -1, -1), [*range(held, held + n)]

    def _call(self, operator, cache: Tensor, lengths: list[int], *arguments: Tensor, after: tuple = ()):  # type: ignore[no-untyped-def]
        held = torch.tensor(lengths)
        with torch.inference_mode():
            return operator(*arguments, self._weights, self._positions, cache, held, *self._settings, *after)


def _neighbours(
    texts: list[tuple[int, list[int]]], held: list[list[int]], chunk: int
) -> list[tuple[int, list[list[int]]]]:
    """Return rows that follow one another, and fit a chunk together with their padding, as groups: (row, texts)."""
    groups: list[tuple[int, list[list[int]]]] = []
    longest = 0
    for row, text in sorted(texts, key=lambda own: own[0]):
        new = len(text) - len(held[row])
        follows = bool(groups) and groups[-1][0] + len(groups[-1][1]) == row
        if follows and max(longest, new) * (len(groups[-1][1]) + 1) <= chunk:
            groups[-1][1].append(text)
            longest = max(longest, new)
        else:
            groups.append((row, [text]))
            longest = new
    return groups
