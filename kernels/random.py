"""Counter-based random bits for dropout (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3":
Philox4x32-10): a kernel makes an element's bits from its place, the seed and the offset, in any order and as often as
it needs them.

A matrix's rows are numbered as if they were a multiple of 64 columns wide, and four neighbouring columns share a
counter, whose four words are theirs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch_options

ROUNDS = tl.constexpr(10)


@triton.jit
def kept_elements(
    rng,  # (2): seed and offset
    row,  # (M), int64
    first,  # first column, a multiple of 4
    columns,
    threshold,
    N: tl.constexpr,
):
    """Return whether dropout keeps the elements (row, first ... first + N), (M, N)."""
    seed, offset = tl.load(rng), tl.load(rng + 1)
    counter = row[:, None] * ((columns + 63) // 64 * 16) + (first // 4 + tl.arange(0, N // 4))[None, :]
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    nothing = tl.zeros_like(low)
    a, b, c, d = tl.philox(
        seed, low, high, nothing + offset.to(tl.uint32), nothing + (offset >> 32).to(tl.uint32), ROUNDS
    )
    least = threshold.to(tl.uint32)
    a, b, c, d = a >= least, b >= least, c >= least, d >= least
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [row.shape[0], N])


def drop_threshold(p: float) -> int:
    """Return the threshold below which an element's 32 random bits drop it. An int64, which a kernel takes as an
    argument, not as a constant."""
    return min(round(p * 2**32), 2**32 - 1)


def kept_scale(p: float) -> float:
    """Return the factor by which kept elements are multiplied."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


@triton.jit(do_not_specialize=["threshold"])
def factors_kernel(
    rng,  # (2)
    out,  # (rows, columns)
    rows,
    columns,
    threshold,
    scale,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    across = tl.cdiv(columns, BLOCK)  # not the grid's second dimension, which ends at 65,535
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) % across * BLOCK
    column = first + tl.arange(0, BLOCK)
    factors = tl.where(kept_elements(rng, row, first, columns, threshold, BLOCK), scale, 0.0)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + row[:, None] * columns + column[None, :], factors, inside)


def dropout_factors(rng: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Return the float32 factors of dropout with this state, (seed, offset), for a (rows, columns) matrix."""
    out = torch.empty((rows, columns), dtype=torch.float32, device=rng.device)
    if out.numel() > 0:
        grid = (cdiv(rows, 16) * cdiv(columns, 64),)
        factors_kernel[grid](
            rng, out, rows, columns, drop_threshold(p), kept_scale(p), ROWS=16, BLOCK=64, **launch_options(4)
        )
    return out
