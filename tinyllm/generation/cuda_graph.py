"""The decoder for GPUs: a token is one CUDA graph, the draw included, and the host waits once for several tokens.

A small model's token takes the GPU less time than the host needs to launch its kernels one by one. So nothing that
changes from token to token is an argument: tokens, lengths and random numbers lie in tensors that stay where they are,
and the step reads and updates them there. Attention goes over the whole cache and is told the rows' lengths, which the
kernels look at on the device, and do no work beyond.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from tinyllm import ops
from tinyllm.generation.decoder import Cached, blocks_of, evaluating
from tinyllm.generation.engine import Written
from tinyllm.generation.sampling import NOT_FINITE, Sampling, draw_unchecked
from tinyllm.model import SimpleLLM
from tinyllm.nn import SelfAttention
from tinyllm.ops.dispatch import forced

# The most tokens between two looks of the host at what was drawn; and weights, in bytes, from which on a token takes so
# long that one look for each is not noticed.
_MOST_TOKENS = 16
_LARGE_MODEL = 2 << 30


class Replayed:
    """The CUDA graph of a function that reads and writes tensors which stay where they are; without a GPU it is called.

    It does not hold the function, whose owner holds this object: a cycle would keep the owner's memory.

    Args:
        device: where the function works.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None

    def prepare(self, function: Callable[[], None]) -> bool:
        """Capture the function, which asks the device for no number, if that is still to be done; return whether it has
        run, and its tensors have changed."""
        if self._device.type != "cuda" or self._graph is not None:
            return False
        with torch.cuda.device(self._device):
            # Once uncaptured, on another stream, as PyTorch asks for: kernels are compiled and libraries set up.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                function()
        self._graph = graph
        return True

    def run(self, function: Callable[[], None]) -> None:
        """Replay what was captured of the function, or call it."""
        if self._graph is None:
            function()
            return
        with torch.cuda.device(self._device):
            self._graph.replay()


class GraphedCache(Cached):
    """`Cached` for models on a GPU, which also draws: a token takes one launch of the host.

    Args:
        model, batch_size, max_len, cache_dtype, chunk: see `Cached`. The model must not be moved or cast while this
            object is used; in-place changes of its weights are seen.

    Attributes:
        tokens_a_call: how many tokens `write` should draw in a call.

    Raises:
        ValueError: see `Cached`.
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
        super().__init__(model, batch_size, max_len, cache_dtype=cache_dtype, chunk=chunk)
        size = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))
        self.tokens_a_call = max(1, min(_MOST_TOKENS, _LARGE_MODEL // max(1, size)))
        device = self._cache.device
        self._tokens = torch.zeros(batch_size, dtype=torch.int64, device=device)  # the next ones to be read
        self._lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._each_row = torch.arange(batch_size, device=device)
        self._next_logits = torch.zeros(batch_size, cast(Any, model.output).out_features, device=device)
        self._reading: tuple[object, Replayed] | None = None
        self._writing: tuple[object, _Drawing] | None = None

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoder.step`."""
        self._check_room(1)
        key = self._how_called()
        if self._reading is None or self._reading[0] != key:
            self._reading = key, Replayed(self._cache.device)
        step = self._reading[1]
        with evaluating(self._modules):
            self._begin(tokens)
            if step.prepare(self._read_next):
                self._begin(tokens)
            step.run(self._read_next)
        for held, token in zip(self._held, tokens.tolist(), strict=True):
            held.append(token)
        return self._next_logits.clone()

    def forget_last(self) -> None:
        """Take back the token that each row has read last, so that another may come in its place."""
        for held in self._held:
            held.pop()

    @torch.inference_mode()
    def write(
        self,
        tokens: Tensor,
        uniforms: Tensor,
        sampling: Sampling,
        seen: Tensor | None = None,
        stop_ids: Sequence[int] = (),
    ) -> Written:
        """See `Engine.write`.

        Raises:
            ValueError: a logit is not finite, or there is no room for so many tokens.
        """
        n = uniforms.size(1)
        self._check_room(n)
        key = (*self._how_called(), sampling, seen is None, tuple(stop_ids))
        if self._writing is None or self._writing[0] != key or self._writing[1].most < n:
            logits = self._next_logits
            self._writing = key, _Drawing(logits, max(n, _MOST_TOKENS), sampling, seen is not None, stop_ids)
        drawing = self._writing[1]
        step = partial(drawing.step, self)
        with evaluating(self._modules):
            self._begin(tokens)
            drawing.begin(uniforms, seen)
            if drawing.graph.prepare(step):
                self._begin(tokens)
                drawing.begin(uniforms, seen)
            for _ in range(n):
                drawing.graph.run(step)
        # Copies also where they lie on the CPU: the next tokens come into the same tensors.
        drawn, logprobs = (x[:, :n].to("cpu", copy=True) for x in (drawing.drawn, drawing.logprobs))
        if not bool(drawing.finite):
            raise ValueError(NOT_FINITE)
        if stop_ids:
            stopped = torch.isin(drawn, torch.tensor([*stop_ids])).all(dim=0)  # a row goes on to repeat its stop id
            n = min(n, int((~stopped).sum()) + 1)
        if seen is not None and drawing.seen is not None:
            seen.copy_(drawing.seen)
        for held, first, new in zip(self._held, tokens.tolist(), drawn[:, : n - 1].tolist(), strict=True):
            held += [first, *new]
        return Written(drawn[:, :n], logprobs[:, :n])

    def advance(self) -> Tensor:
        """Read the next token of each row on the device; return the logits of what follows, float32 (B, V)."""
        model = self.model
        own = model.positional_encoding.rows(self._cache.size(-2))[self._lengths].unsqueeze(1)
        x: Tensor | tuple[Tensor, Tensor] = model.embedding(self._tokens.unsqueeze(-1)).to(own.dtype) + own
        for block, cache in zip(blocks_of(model), self._cache, strict=True):
            x = block.compose(x, partial(self._attend, block.attention, cache))
        self._lengths += 1
        return self._logits(x)[:, 0]

    def _attend(self, attention: SelfAttention, cache: Tensor, x: Tensor) -> Tensor:
        query, key, value = attention.heads(x)
        new = torch.stack([key, value])[:, :, :, 0].transpose(0, 1)
        cache[:, self._each_row, :, self._lengths] = new.to(cache.dtype)  # the two indices come first
        keys, values = cache.to(query.dtype)
        return attention.join(ops.scaled_dot_product_attention(query, keys, values, key_lengths=self._lengths + 1))

    def _read_next(self) -> None:
        self._next_logits.copy_(self.advance())

    def _begin(self, tokens: Tensor) -> None:
        """Have the device know what the host does: the rows' lengths, and the tokens (B,) that come next."""
        self._tokens.copy_(tokens)
        self._lengths.copy_(torch.tensor(self.lengths()))

    def _how_called(self) -> tuple[object, ...]:
        """Return what changes the kernels of a step, besides the decoder's own arguments."""
        kind = self._cache.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return dtype, torch.get_float32_matmul_precision(), forced()


class _Drawing:
    """Reading and drawing tokens without the host: what one step does, and the tensors that it works on.

    Attributes:
        most: how many tokens can be drawn before the host begins anew.
        drawn, logprobs: (B, most), of the steps since `begin`.
        finite: bool (), whether all logits since then were.
        seen: bool (B, V), see `sampling.draw`, or None.
        graph: that of `step`.
    """

    def __init__(self, logits: Tensor, most: int, sampling: Sampling, penalised: bool, stop_ids: Sequence[int]) -> None:
        self.most = most
        self._sampling = sampling
        device, rows = logits.device, logits.size(0)
        self.drawn = torch.zeros(rows, most, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, most, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.seen: Tensor | None = None
        if penalised:
            self.seen = torch.zeros_like(logits, dtype=torch.bool)
        self._uniforms = torch.zeros(rows, most, dtype=torch.float64, device=device)
        self._column = torch.zeros(1, dtype=torch.int64, device=device)
        self._stopped = torch.zeros(rows, dtype=torch.bool, device=device)
        self._stop_ids = torch.tensor([*stop_ids], dtype=torch.int64, device=device)
        self.graph = Replayed(device)

    def begin(self, uniforms: Tensor, seen: Tensor | None) -> None:
        self._uniforms[:, : uniforms.size(1)].copy_(uniforms)
        self._column.zero_()
        self._stopped.zero_()
        self.finite.fill_(True)
        if self.seen is not None and seen is not None:
            self.seen.copy_(seen)

    def step(self, decoder: GraphedCache) -> None:
        """Have the decoder read a token, and draw the next one."""
        logits = decoder.advance()
        uniforms = self._uniforms.index_select(1, self._column)[:, 0]
        tokens, logprobs, finite = draw_unchecked(logits, self._sampling, uniforms, self.seen)
        self.finite &= finite
        # Whatever comes of numbers that are not finite, the next step has to find a row for it.
        tokens = tokens.clamp(max=logits.size(-1) - 1)
        if self._stop_ids.numel() > 0:
            tokens = torch.where(self._stopped, decoder._tokens, tokens)
            self._stopped |= (tokens.unsqueeze(-1) == self._stop_ids).any(dim=-1)
        if self.seen is not None:
            self.seen.scatter_(-1, tokens.unsqueeze(-1), True)
        self.drawn.index_copy_(1, self._column, tokens.unsqueeze(-1))
        self.logprobs.index_copy_(1, self._column, logprobs.unsqueeze(-1))
        self._column += 1
        decoder._tokens.copy_(tokens)
