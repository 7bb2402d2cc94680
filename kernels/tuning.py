"""The choice of a kernel's tile: the first of its candidates, or the fastest when they were timed.

With TINYLLM_AUTOTUNE=1 the first call of a kind times every candidate (some seconds, mostly compilation) and remembers
the fastest in a file beside Triton's cache, from which later processes take it, with or without the variable.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor


class Tile(NamedTuple):
    """rows x columns for each program, warps that share them, and how many tiles are on their way at once."""

    rows: int
    columns: int
    warps: int
    stages: int


_chosen: dict[str, Tile] | None = None


def path() -> Path:
    """Return the path of the file of choices."""
    return Path(triton.knobs.cache.dir) / "tinyllm_tiles.json"


def choose_tile(
    kernel: str, like: Tensor, key: Sequence[Any], tiles: Sequence[Tile], run: Callable[[Tile], Any]
) -> Tile:
    """Return the tile for a launch.

    Args:
        kernel: its name.
        like: a tensor on the device.
        key: what the best tile depends on.
        tiles: candidates that the device can run, the default first.
        run: launches with a tile; may be called often.
    """
    global _chosen
    if not like.is_cuda:
        return tiles[0]
    if _chosen is None:
        _chosen = _read()
    name = _name(kernel, tuple(key), like.device)
    tile = _chosen.get(name)
    if tile is None and os.environ.get("TINYLLM_AUTOTUNE") == "1" and not torch.cuda.is_current_stream_capturing():
        times = {tile: triton.testing.do_bench(lambda tile=tile: run(tile), warmup=10, rep=40) for tile in tiles}
        tile = _chosen[name] = min(times, key=times.__getitem__)
        _write(_chosen)
    return tile if tile is not None and tile in tiles else tiles[0]


@functools.lru_cache(4096)
def _name(kernel: str, key: tuple[Any, ...], device: torch.device) -> str:
    """Return the line of a choice in the file."""
    return " ".join(map(str, (kernel, *key, torch.cuda.get_device_name(device), triton.__version__)))


def _read() -> dict[str, Tile]:
    try:
        return {name: Tile(*tile) for name, tile in json.loads(path().read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # no choices yet, or not ours: the defaults serve


def _write(chosen: dict[str, Tile]) -> None:
    """Beside the file, then in its place: another process may be reading it."""
    target = path()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(chosen, indent=1), encoding="utf-8")
    scratch.replace(target)
