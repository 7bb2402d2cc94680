"""scaled_dot_product_attention on NVIDIA GPUs: the launchers. The kernels are in forward.py, decode.py,
backward.py and backward_keys.py.

bfloat16 and float16 multiply as they are and add in float32. float32 multiplies as torch.set_float32_matmul_precision
says: "highest", PyTorch's default, as three tf32 products, which keep about 22 bits; otherwise as one, which keeps 11.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import tuning
from ..launch import capability, cdiv, interpreted, launch_options, multiprocessors, next_power_of_2
from ..random import drop_threshold, kept_scale
from ..tuning import Tile
from . import configs
from .backward import delta_kernel, queries_kernel
from .backward_keys import keys_kernel
from .decode import decode_kernel, join_kernel
from .forward import forward_kernel

_LOG2_E = 1.4426950408889634
_DELTA_ROWS, _JOINED_AT_ONCE = 32, 16


def attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    key_lengths: Tensor | None = None,
    causal_offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    call = _Call(query, key, value, attn_mask, is_causal, scale, dropout_p, rng, key_lengths, causal_offset)
    out = _heads_inside(query, value.size(-1))
    shape = (2, *query.shape[:3]) if call.additive else query.shape[:3]
    saved = torch.empty(shape, dtype=torch.float32, device=query.device)
    if saved.numel() == 0:
        return out, saved
    if call.keys == 0:
        return out.zero_(), saved.fill_(float("-inf"))  # which backward does not read
    lse = call.lse(saved)
    width = call.widths(configs.FORWARD)
    if call.group * call.queries <= configs.DECODE_ROWS and width.chunks == 1:
        _decode(call, width, out, lse)
        return out, saved

    def run(tile: Tile) -> None:
        sources = call.sources(tile, (query, width.d), (key, width.d), (value, width.dv))
        grid = (cdiv(call.queries, tile.rows) * width.chunks * call.batch * call.heads,)
        forward_kernel[grid](
            *sources, query, key, value, attn_mask, *call.sequences, rng, out, *lse, *call.strides(query, key, value),
            *out.stride()[:3], *call.sizes(), *call.numbers(), CHUNKS=width.chunks, SCALE_FIRST=scale <= 0,
            **call.constants(tile, width),
        )  # fmt: skip

    run(call.choose(configs.FORWARD, width, run))
    return out, saved


def attention_bwd(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    key_lengths: Tensor | None = None,
    causal_offset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(query, key, value, attn_mask, is_causal, scale, dropout_p, rng, key_lengths, causal_offset, grad)
    grad_query = _heads_inside(query, query.size(-1))
    grad_key, grad_value = _heads_inside(key, key.size(-1)), _heads_inside(value, value.size(-1))
    if lse.numel() == 0 or key.size(1) * call.keys == 0:
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_()
    expected = [2, *query.shape[:3]] if call.additive else list(query.shape[:3])
    if list(lse.shape) != expected:
        raise ValueError(f"attention_bwd: lse has shape {list(lse.shape)}; {expected} is needed")
    statistics = call.lse(lse)
    delta = torch.empty_like(statistics[0])
    delta_kernel[(cdiv(call.queries, _DELTA_ROWS) * call.batch * call.heads,)](
        grad, out, delta, *grad.stride(), *out.stride(), call.heads, call.queries, call.value_dim, ROWS=_DELTA_ROWS,
        DV=min(next_power_of_2(call.value_dim), 256), **launch_options(4),
    )  # fmt: skip
    strides = call.strides(query, key, value, grad)
    numbers = (call.scale, scale, *call.numbers()[1:])

    keys_width, queries_width = call.widths(configs.BACKWARD_KEYS), call.widths(configs.BACKWARD_QUERIES)

    def run_keys(tile: Tile) -> None:
        chunks, d, dv = keys_width
        sources = call.sources(tile, (query, d), (key, d), (value, dv), (grad, dv))
        grid = (cdiv(call.keys, tile.columns) * chunks * call.batch * call.heads // call.group,)
        keys_kernel[grid](
            *sources, attn_mask, *call.sequences, rng, *statistics, delta, grad_key, grad_value, *strides,
            *grad_key.stride()[:3], *grad_value.stride()[:3], *call.sizes(), *numbers, CHUNKS=chunks,
            **call.constants(tile, keys_width),
        )  # fmt: skip

    def run_queries(tile: Tile) -> None:
        chunks, d, dv = queries_width
        sources = call.sources(tile, (query, d), (key, d), (value, dv), (grad, dv))
        grid = (cdiv(call.queries, tile.rows) * chunks * call.batch * call.heads,)
        queries_kernel[grid](
            *sources, query, key, value, grad, attn_mask, *call.sequences, rng, *statistics, delta, grad_query,
            *strides, *grad_query.stride()[:3], *call.sizes(), *numbers, CHUNKS=chunks, **call.constants(tile,
            queries_width),
        )  # fmt: skip

    run_keys(call.choose(configs.BACKWARD_KEYS, keys_width, run_keys))
    run_queries(call.choose(configs.BACKWARD_QUERIES, queries_width, run_queries))
    return grad_query, grad_key, grad_value


def _decode(call: _Call, width: configs.Widths, out: Tensor, lse: tuple[Tensor, Tensor | None]) -> None:
    """Few queries: the keys are split over so many programs that every multiprocessor has some."""
    query, key, value = call.query, call.key, call.value
    tile = configs.decode_tile(width, query.element_size())
    groups = call.batch * call.heads // call.group
    most = cdiv(call.keys, 2 * tile.columns)
    splits = max(1, min(cdiv(2 * multiprocessors(query), groups), most))
    split = cdiv(cdiv(call.keys, splits), tile.columns) * tile.columns
    splits = cdiv(call.keys, split)
    parts = torch.empty((splits, *lse[0].shape, call.value_dim), dtype=torch.float32, device=query.device)
    statistics = torch.empty((2, splits, *lse[0].shape), dtype=torch.float32, device=query.device)
    _, k, v = call.sources(tile, (query, width.d), (key, width.d), (value, width.dv))
    decode_kernel[(groups, splits)](  # a grid has room for 65,535 along its second dimension
        query, k, v, call.mask, *call.sequences, call.rng, parts, statistics, *call.strides(query, key, value),
        call.batch, *call.sizes(), *call.numbers(), split, SCALE_FIRST=call.scale <= 0, **call.constants(tile, width),
    )  # fmt: skip
    join_kernel[(lse[0].numel(),)](
        parts, statistics, out, *lse, *out.stride()[:3], lse[0].numel(), call.heads, call.queries, call.value_dim,
        splits, SPLITS=_JOINED_AT_ONCE, DV=width.dv, MASK=call.mask_kind, **launch_options(4),
    )  # fmt: skip


class _Call:
    """The sizes and constants that follow from a call's arguments."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float,
        dropout_p: float,
        rng: Tensor | None,
        key_lengths: Tensor | None,
        causal_offset: Tensor | None,
        grad: Tensor | None = None,
    ) -> None:
        self.query, self.key, self.value = query, key, value
        self.mask, self.rng = attn_mask, rng
        # A number for each sequence.
        self.sequences = [None if x is None else x.contiguous() for x in (key_lengths, causal_offset)]
        self.batch, self.heads, self.queries, self.head_dim = query.shape
        self.keys, self.value_dim = key.size(2), value.size(3)
        self.group = max(1, self.heads // max(1, key.size(1)))
        self.scale = scale * _LOG2_E
        self.causal, self.dropout_p = is_causal, dropout_p
        self.mask_kind = 0 if attn_mask is None else 1 if attn_mask.dtype == torch.bool else 2
        self.additive = self.mask_kind == 2
        # Descriptors if the chip has them and can describe every tensor. float32 does without: on its way from shared
        # memory into three products, each tile would take more registers than there are.
        self.descriptors = (
            capability(query) >= (9, 0)
            and query.element_size() == 2
            and all(_describable(tensor) for tensor in (query, key, value, grad) if tensor is not None)
        )
        self.precision = "widened" if interpreted() and query.dtype == torch.bfloat16 else "ieee"
        if query.dtype == torch.float32:
            self.precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"

    def lse(self, saved: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the rows' log-sum-exp and, with an additive mask, what rounding took from it."""
        return (saved[0], saved[1]) if self.additive else (saved, None)

    def widths(self, kernel: str) -> configs.Widths:
        return configs.widths(kernel, self.head_dim, self.value_dim, self.query.element_size())

    def choose(self, kernel: str, width: configs.Widths, run: Callable[[Tile], None]) -> Tile:
        dropout = self.rng is not None
        busy = self.mask_kind > 0 or dropout
        candidates = configs.tiles(
            kernel, width, self.query.element_size(), self.descriptors, busy, self.queries, capability(self.query)
        )
        key = (self.query.dtype, *width, self.descriptors, self.causal, self.mask_kind, dropout)
        lengths = (next_power_of_2(n) for n in (self.queries, self.keys))
        return tuning.choose_tile(kernel, self.query, (*key, *lengths), candidates, run)

    def sources(self, tile: Tile, *tensors: tuple[Tensor, int]) -> list[Tensor | TensorDescriptor]:
        """Return what tiles of queries, keys, values and gradient are loaded from, each with its number of columns."""
        if not self.descriptors:
            return [tensor for tensor, _ in tensors]
        heights = (tile.rows, tile.columns, tile.columns, tile.rows)
        return [
            TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, rows, columns])
            for (tensor, columns), rows in zip(tensors, heights, strict=False)
        ]

    def strides(self, *tensors: Tensor) -> list[int]:
        """Return the strides of the tensors over batch, head, row and column, followed by those of the mask."""
        mask = (0, 0, 0, 0) if self.mask is None else self.mask.stride()
        return [stride for tensor in tensors for stride in tensor.stride()] + list(mask)

    def sizes(self) -> tuple[int, ...]:
        return self.heads, self.group, self.queries, self.keys, self.head_dim, self.value_dim

    def numbers(self) -> tuple[float, ...]:
        return self.scale, drop_threshold(self.dropout_p), kept_scale(self.dropout_p)

    def constants(self, tile: Tile, width: configs.Widths) -> dict[str, Any]:
        return {
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "D": width.d,
            "DV": width.dv,
            "CHECK_D": width.chunks * width.d != self.head_dim,
            "CHECK_DV": width.chunks * width.dv != self.value_dim,
            "DESCRIPTORS": self.descriptors,
            "CAUSAL": self.causal,
            "MASK": self.mask_kind,
            "DROPOUT": self.rng is not None,
            "PRECISION": self.precision,
            **launch_options(tile.warps),
            "num_stages": tile.stages,
        }


def _describable(tensor: Tensor) -> bool:
    """Return whether a TMA descriptor can describe `x`: contiguous rows, every offset a multiple of 16 bytes, and no
    dimension of stride 0."""
    size = tensor.element_size()
    return (
        tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and all(stride > 0 and stride * size % 16 == 0 and stride * size < 2**40 for stride in tensor.stride()[:-1])
    )


def _heads_inside(like: Tensor, columns: int) -> Tensor:
    """Allocate (B, H, T, columns) in memory in the order (B, T, H, columns): joining the heads afterwards is free."""
    batch, heads, rows, _ = like.shape
    return torch.empty((batch, rows, heads, columns), dtype=like.dtype, device=like.device).transpose(1, 2)
