"""Tiles that the attention kernels are launched with: for each kernel, element size and width of a head a short list of
candidates, the default first.

With the Triton of constraints.txt all keep their registers in the loops over tiles: `make gpu-compile` looks at the
defaults, `make gpu-tiles` at each candidate. None has been timed yet; the defaults are near those that PyTorch's
FlexAttention found for the same chips.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from ..launch import cdiv, next_power_of_2
from ..tuning import Tile

FORWARD, BACKWARD_KEYS, BACKWARD_QUERIES = "attention_fwd", "attention_bwd_keys", "attention_bwd_queries"
# So many queries of a group of heads are split over the keys.
DECODE_ROWS = 16

# Kernel and element size -> widest head that one tile holds, and the chunks that wider ones go in.
_WIDEST = {
    (FORWARD, 2): (256, 128),
    (BACKWARD_KEYS, 2): (128, 128),
    (BACKWARD_QUERIES, 2): (256, 128),
    (FORWARD, 4): (64, 64),
    (BACKWARD_KEYS, 4): (64, 64),
    (BACKWARD_QUERIES, 4): (64, 64),
}


# Any number of columns, in chunks.
CHUNKED = 0
# For tiles that come by pointers, on any chip; by descriptors, from 9.0 on; from 10.0 on, where those spill.
POINTERS, HOPPER, BLACKWELL = 0, 9, 10


def _tiles(*sizes: tuple[int, int, int, int]) -> list[Tile]:
    return [Tile(*size) for size in sizes]


# Kernel, element size, columns up to which they serve, chips -> candidates, and those of calls with a mask or dropout,
# which need registers of their own.
TILES: dict[tuple[str, int, int, int], tuple[list[Tile], list[Tile]]] = {
    (FORWARD, 2, 64, HOPPER): (
        _tiles((128, 64, 4, 3), (128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 2)),
        _tiles((128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 2)),
    ),
    (FORWARD, 2, 64, BLACKWELL): (
        _tiles((128, 64, 4, 3), (128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 2)),
        _tiles((128, 32, 8, 3), (64, 64, 4, 3), (64, 32, 4, 2)),
    ),
    (FORWARD, 2, 64, POINTERS): (
        _tiles((128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 2)),
        _tiles((128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 2)),
    ),
    (FORWARD, 2, 128, HOPPER): (
        _tiles((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 32, 4, 2)),
        _tiles((128, 64, 8, 3), (64, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2)),
    ),
    (FORWARD, 2, 128, BLACKWELL): (
        _tiles((128, 128, 8, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 32, 4, 2)),
        _tiles((128, 32, 8, 2), (64, 32, 4, 2)),
    ),
    (FORWARD, 2, 128, POINTERS): (_tiles((128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 8, 2)), _tiles((64, 32, 8, 1))),
    (FORWARD, 2, 256, HOPPER): (
        _tiles((64, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2)),
        _tiles((64, 64, 8, 2), (64, 32, 8, 2)),
    ),
    (FORWARD, 2, 256, BLACKWELL): (_tiles((128, 32, 8, 2), (64, 32, 8, 2)), _tiles((64, 32, 8, 1), (64, 16, 4, 1))),
    (FORWARD, 2, 256, POINTERS): (_tiles((64, 32, 8, 2), (64, 32, 8, 1)), _tiles((64, 32, 8, 2), (64, 32, 8, 1))),
    (FORWARD, 2, CHUNKED, HOPPER): (
        _tiles((128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 8, 2)),
        _tiles((64, 64, 8, 2), (64, 32, 8, 2)),
    ),
    (FORWARD, 2, CHUNKED, POINTERS): (_tiles((128, 32, 8, 2), (64, 32, 8, 2)), _tiles((64, 32, 8, 2))),
    (FORWARD, 4, 64, POINTERS): (_tiles((64, 32, 8, 1)), _tiles((64, 32, 8, 1))),
    (BACKWARD_KEYS, 2, 64, HOPPER): (
        _tiles((64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (32, 64, 4, 2)),
        _tiles((32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 4, 2)),
    ),
    (BACKWARD_KEYS, 2, 64, BLACKWELL): (
        _tiles((64, 128, 8, 2), (64, 64, 8, 2)),
        _tiles((32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 4, 2)),
    ),
    (BACKWARD_KEYS, 2, 64, POINTERS): (
        _tiles((32, 128, 8, 2), (32, 64, 4, 2), (32, 32, 4, 2)),
        _tiles((32, 64, 8, 1), (32, 32, 4, 2)),
    ),
    (BACKWARD_KEYS, 2, 128, HOPPER): (
        _tiles((32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 4, 2)),
        _tiles((32, 64, 4, 1), (16, 128, 8, 1), (32, 32, 8, 1)),
    ),
    (BACKWARD_KEYS, 2, 128, BLACKWELL): (
        _tiles((32, 128, 8, 2), (64, 64, 8, 2)),
        _tiles((32, 64, 4, 1), (16, 128, 8, 1), (32, 32, 8, 1)),
    ),
    (BACKWARD_KEYS, 2, 128, POINTERS): (_tiles((32, 64, 8, 1), (32, 32, 4, 2)), _tiles((32, 32, 4, 2), (32, 32, 8, 1))),
    (BACKWARD_KEYS, 2, CHUNKED, HOPPER): (_tiles((32, 128, 8, 2), (32, 64, 4, 2)), _tiles((32, 32, 8, 1))),
    (BACKWARD_KEYS, 2, CHUNKED, BLACKWELL): (_tiles((32, 64, 4, 2)), _tiles((32, 32, 8, 1))),
    (BACKWARD_KEYS, 2, CHUNKED, POINTERS): (_tiles((32, 32, 8, 1), (32, 32, 4, 2)), _tiles((32, 32, 8, 1))),
    (BACKWARD_KEYS, 4, 64, POINTERS): (_tiles((16, 32, 8, 1), (32, 16, 4, 1)), _tiles((16, 32, 8, 1), (32, 16, 4, 1))),
    (BACKWARD_QUERIES, 2, 64, HOPPER): (
        _tiles((128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 2), (64, 32, 4, 2)),
        _tiles((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)),
    ),
    (BACKWARD_QUERIES, 2, 64, BLACKWELL): (
        _tiles((128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 2), (64, 32, 4, 2)),
        _tiles((64, 64, 4, 2), (64, 32, 4, 2)),
    ),
    (BACKWARD_QUERIES, 2, 64, POINTERS): (
        _tiles((64, 64, 8, 2), (64, 32, 4, 2)),
        _tiles((64, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2)),
    ),
    (BACKWARD_QUERIES, 2, 128, HOPPER): (
        _tiles((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)),
        _tiles((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2)),
    ),
    (BACKWARD_QUERIES, 2, 128, BLACKWELL): (
        _tiles((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)),
        _tiles((64, 64, 8, 2), (64, 32, 4, 2)),
    ),
    (BACKWARD_QUERIES, 2, 128, POINTERS): (_tiles((64, 64, 8, 2), (64, 32, 8, 1)), _tiles((64, 32, 8, 1))),
    (BACKWARD_QUERIES, 2, 256, HOPPER): (
        _tiles((128, 32, 8, 2), (64, 32, 4, 2), (64, 16, 4, 1)),
        _tiles((64, 16, 4, 1)),
    ),
    (BACKWARD_QUERIES, 2, 256, POINTERS): (_tiles((64, 32, 8, 1), (64, 16, 8, 1)), _tiles((64, 32, 8, 1))),
    (BACKWARD_QUERIES, 2, CHUNKED, HOPPER): (
        _tiles((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)),
        _tiles((64, 64, 8, 2), (64, 32, 4, 2)),
    ),
    (BACKWARD_QUERIES, 2, CHUNKED, POINTERS): (_tiles((64, 32, 8, 1)), _tiles((32, 32, 8, 1))),
    (BACKWARD_QUERIES, 4, 64, POINTERS): (
        _tiles((32, 32, 8, 1), (32, 16, 4, 1)),
        _tiles((32, 32, 8, 1), (32, 16, 4, 1)),
    ),
}

# Shared memory that a program may have, by compute capability; those not listed have at least as much as 8.6.
_SHARED_MEMORY = {(8, 0): 163 << 10, (8, 7): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10, (10, 3): 227 << 10}
_LEAST_SHARED_MEMORY = 99 << 10


class Widths(NamedTuple):
    """Columns of a tile of queries and keys (d) and of values (dv), and how many of them a head takes."""

    chunks: int
    d: int
    dv: int


@functools.lru_cache
def widths(kernel: str, head_dim: int, value_dim: int, element_size: int) -> Widths:
    """Return how a kernel divides heads of these sizes."""
    widest, chunk = _WIDEST[kernel, element_size]
    if max(head_dim, value_dim) > widest:
        return Widths(cdiv(max(head_dim, value_dim), chunk), chunk, chunk)
    return Widths(1, *(max(16, next_power_of_2(n)) for n in (head_dim, value_dim)))


def tiles(
    kernel: str,
    width: Widths,
    element_size: int,
    descriptors: bool,
    busy: bool,
    queries: int,
    capability: tuple[int, int],
) -> list[Tile]:
    """Return the candidate tiles of a launch, at least one.

    Args:
        descriptors: tiles come by tensor descriptors.
        busy: there is a mask or dropout.
        capability: of the chip, whose shared memory they fit in.
    """
    return _tiles_of(
        kernel, width, element_size, descriptors, busy, max(16, next_power_of_2(queries)), capability
    )  # fmt: skip


@functools.lru_cache(4096)
def _tiles_of(
    kernel: str,
    width: Widths,
    element_size: int,
    descriptors: bool,
    busy: bool,
    rows: int,
    capability: tuple[int, int],
) -> list[Tile]:
    wide = max(width.d, width.dv)
    columns = next(size for size in (64, 128, 256) if wide <= size)
    if width.chunks > 1 and element_size == 2:
        columns = CHUNKED
    chips = HOPPER if descriptors else POINTERS
    if descriptors and capability[0] >= BLACKWELL and (kernel, element_size, columns, BLACKWELL) in TILES:
        chips = BLACKWELL
    candidates = TILES[kernel, element_size, columns, chips][busy]
    if kernel == FORWARD:  # no more rows than there are queries
        candidates = [tile if tile.rows <= rows else tile._replace(rows=rows, warps=4) for tile in candidates]
    fitting = [tile for tile in candidates if fits(kernel, width, element_size, tile, busy, capability)]
    return list(dict.fromkeys(fitting or candidates[-1:]))


def fits(kernel: str, width: Widths, element_size: int, tile: Tile, busy: bool, capability: tuple[int, int]) -> bool:
    """Return whether a chip has the shared memory for a tile."""
    most = _SHARED_MEMORY.get(capability, _LEAST_SHARED_MEMORY)
    return _shared_memory(kernel, width, element_size, tile, busy) <= most


def _shared_memory(kernel: str, width: Widths, element_size: int, tile: Tile, busy: bool) -> int:
    """Return the most shared memory, in bytes, that a program needs: what it keeps, and the tiles being loaded."""
    columns = width.d + width.dv
    scores = tile.rows * tile.columns
    if kernel == FORWARD:
        elements = width.d * tile.rows + tile.stages * tile.columns * columns
    elif kernel == BACKWARD_KEYS:
        elements = columns * (tile.columns + tile.stages * tile.rows) + scores
    else:
        elements = columns * (tile.rows + tile.stages * tile.columns) + scores
    if busy:
        elements += (1 + tile.stages) * scores
    return elements * element_size


def decode_tile(width: Widths, element_size: int) -> Tile:
    """Return the tiles for few queries, which compute little and therefore keep many keys in flight."""
    columns = max(16, min(128, (16 << 10) // (max(width.d, width.dv) * element_size)))
    return Tile(DECODE_ROWS, columns, 4, 2 if element_size == 4 else 3)
