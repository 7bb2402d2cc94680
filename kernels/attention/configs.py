"""Tiles that the attention kernels are launched with: for each kernel and head a short list of candidates, the default
first. Defaults are those that PyTorch's FlexAttention found for the same chips, and their neighbours."""

from __future__ import annotations

import triton

from ..tuning import Tile

# Widest head that one tile holds; wider ones go in chunks.
WIDEST, CHUNK = 256, 128
# So many queries of a group of heads are split over the keys.
DECODE_ROWS = 16

# Shared memory that a program may have, by compute capability; those not listed have at least as much as 8.6.
_SHARED_MEMORY = {(8, 0): 163 << 10, (8, 7): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10, (10, 3): 227 << 10}
_LEAST_SHARED_MEMORY = 99 << 10


def forward_tiles(
    d: int, dv: int, element_size: int, queries: int, chunks: int, capability: tuple[int, int]
) -> list[Tile]:
    """Of attention's forward pass; d and dv columns of queries and values, padded."""
    wide = max(d, dv)
    if element_size == 4:
        tiles = [Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 16, 4, 1)]
    elif wide <= 64:
        tiles = [Tile(128, 64, 4, 3), Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)]
    elif wide <= 128:
        tiles = [Tile(128, 64, 8, 3), Tile(128, 128, 8, 2), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)]
    else:
        tiles = [Tile(64, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 16, 4, 1)]
    if chunks > 1:
        tiles = [Tile(64, 64 if element_size == 2 else 32, 4, 2), Tile(32, 32, 4, 1)]
    # No more rows than there are queries.
    rows = max(16, triton.next_power_of_2(queries))
    tiles = [tile if tile.rows <= rows else tile._replace(rows=rows, warps=4) for tile in tiles]
    needs = [d * tile.rows + tile.stages * tile.columns * (d + dv) for tile in tiles]
    return _fitting(tiles, [n * element_size for n in needs], capability)


def backward_keys_tiles(
    d: int, dv: int, element_size: int, queries: int, chunks: int, capability: tuple[int, int]
) -> list[Tile]:
    """Of the pass that makes the gradients of keys and values: rows of queries, columns of keys."""
    wide = max(d, dv)
    if element_size == 4:
        tiles = [Tile(32, 32, 4, 2), Tile(16, 32, 4, 1), Tile(16, 16, 4, 1)]
    elif wide <= 64:
        tiles = [Tile(64, 128, 8, 2), Tile(64, 64, 4, 2), Tile(32, 128, 4, 3), Tile(32, 64, 4, 2)]
    elif wide <= 128:
        tiles = [Tile(64, 128, 8, 2), Tile(32, 128, 8, 2), Tile(32, 64, 4, 2), Tile(32, 32, 4, 1)]
    else:
        tiles = [Tile(32, 64, 8, 2), Tile(32, 32, 4, 1), Tile(16, 32, 4, 1)]
    if chunks > 1:
        tiles = [Tile(32, 64 if element_size == 2 else 32, 4, 1), Tile(16, 32, 4, 1)]
    needs = [(d + dv) * (tile.columns + tile.stages * tile.rows) + tile.rows * tile.columns for tile in tiles]
    return _fitting(tiles, [n * element_size for n in needs], capability)


def backward_queries_tiles(
    d: int, dv: int, element_size: int, queries: int, chunks: int, capability: tuple[int, int]
) -> list[Tile]:
    """Of the pass that makes the gradient of the queries."""
    wide = max(d, dv)
    if element_size == 4:
        tiles = [Tile(32, 32, 4, 2), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)]
    elif wide <= 64:
        tiles = [Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(128, 32, 4, 3), Tile(64, 32, 4, 2)]
    elif wide <= 128:
        tiles = [Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 1)]
    else:
        tiles = [Tile(64, 32, 8, 2), Tile(32, 32, 4, 1), Tile(32, 16, 4, 1)]
    if chunks > 1:
        tiles = [Tile(64 if element_size == 2 else 32, 32, 4, 1), Tile(32, 16, 4, 1)]
    needs = [(d + dv) * (tile.rows + tile.stages * tile.columns) + tile.rows * tile.columns for tile in tiles]
    return _fitting(tiles, [n * element_size for n in needs], capability)


def decode_tile(d: int, dv: int, element_size: int) -> Tile:
    """Of few queries: little to compute, so many keys on their way."""
    columns = max(16, min(128, (16 << 10) // (max(d, dv) * element_size)))
    return Tile(DECODE_ROWS, columns, 4, 2 if element_size == 4 else 3)


def _fitting(tiles: list[Tile], needed_bytes: list[int], capability: tuple[int, int]) -> list[Tile]:
    """Those that the chip has the shared memory for; the last if none is sure to have."""
    most = _SHARED_MEMORY.get(capability, _LEAST_SHARED_MEMORY)
    fitting = [tile for tile, needed in zip(tiles, needed_bytes, strict=True) if needed <= most]
    return list(dict.fromkeys(fitting or tiles[-1:]))
