"""Batches of windows of tokens, in an order that depends on the seed and on nothing else.

    shards -TokenDataset-> window at a place -ShuffledWindows-> micro-batches of this process

An epoch cuts the tokens, from a place of its own on, into windows that do not overlap, and serves each of them once.
Which windows make step s follows from the seed and s alone: a training can go on at any step, and on another number of
processes, without anything of its data being stored, skipped or read twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tinyllm.data.shards import token_dtype

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_STEPS_TOGETHER = 64  # whose windows are looked up at once: each of NumPy's calls costs more than a step's work in it

Batches = DataLoader[tuple[Tensor, Tensor]]


class TokenDataset(Dataset[tuple[Tensor, Tensor]]):
    """Windows of token files: the tokens from an index on, and those one place later.

    The files are memory-mapped: an item costs its own bytes, whatever the size of the files. A window never reaches
    from one file into the next; files too short for one are left out.

    Args:
        paths: one file or several of token ids and nothing else, such as shards.
        vocab_size: of the tokenizer that wrote them; it decides the dtype.
        seq_len: tokens in a window.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: `seq_len` is below 1, a file is no whole number of tokens, or none has a whole window.
    """

    def __init__(self, paths: Paths, vocab_size: int, seq_len: int) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}; it must be at least 1")
        given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        self.seq_len = seq_len
        self._dtype = token_dtype(vocab_size)
        sizes = {Path(path): _num_tokens(Path(path), self._dtype) for path in given}
        self.paths = [path for path, size in sizes.items() if size > seq_len]
        if not self.paths:
            name, most = max(sizes.items(), key=lambda item: item[1], default=("an empty list of files", 0))
            raise ValueError(f"{name} has {most} tokens; seq_len {seq_len} needs {seq_len + 1}")
        self._sizes = np.array([sizes[path] for path in self.paths])
        self._starts = np.concatenate([[0], np.cumsum(self._sizes - seq_len)])  # of each file's windows, by their index
        self.num_tokens = int(self._sizes.sum())
        self._tokens = self._map()

    def _map(self) -> list[NDArray[Any]]:
        return [np.memmap(path, dtype=self._dtype, mode="r") for path in self.paths]

    def __len__(self) -> int:
        """Return the number of places at which a window can begin."""
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} windows")
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the windows at `indices`: (inputs, targets), int64, each (len(indices), seq_len)."""
        at = np.asarray(indices)
        files = np.searchsorted(self._starts, at, side="right") - 1
        windows = np.empty((len(at), self.seq_len + 1), np.int64)
        for row, (file, start) in enumerate(zip(files, at - self._starts[files], strict=True)):
            windows[row] = self._tokens[file][start : start + self.seq_len + 1]
        tokens = torch.from_numpy(windows)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def tiling(self, offset: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return windows without overlap, from the `offset`-th token of each file on (or the last with a window).

        Returns:
            For each file, the index of its first window; and a cumulative count of the files' windows, from 0 on.
        """
        offsets = offset % (self._sizes - self.seq_len)
        counts = (self._sizes - 1 - offsets) // self.seq_len
        return self._starts[:-1] + offsets, np.concatenate([[0], np.cumsum(counts)])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokens": None}  # a pickled memmap is the whole array: map anew instead

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokens = self._map()


class ShuffledWindows(Sampler[list[int]]):
    """The indices of one process's micro-batches, step after step, without end; see the module.

    A step's `batch_size` windows are dealt out to its micro-batches, and each of those to the processes, so the same
    windows make a step whatever their numbers.

    Args:
        dataset: where the windows lie.
        batch_size: windows in a step, over all processes.
        seed: of the order.
        first_step: the steps before it, counted from 0, have been served.
        micro_batches: in how many parts a step is computed.
        rank, world_size: which process this is, of how many.

    Raises:
        ValueError: batch_size is not divisible by micro_batches * world_size.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        batch_size: int,
        seed: int,
        first_step: int = 0,
        micro_batches: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size % (micro_batches * world_size):
            raise ValueError(
                f"batch_size is {batch_size}; it must be divisible by micro-batches x processes, "
                f"{micro_batches} x {world_size}"
            )
        self._dataset = dataset
        self._batch_size = batch_size
        self._seed = seed
        self._first = first_step * batch_size
        self._share = batch_size // (micro_batches * world_size)
        self._rank, self._world_size = rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        served = 0  # windows of the epochs before this one
        epoch = 0
        position = self._first
        waiting: list[int] = []
        while True:
            first, counts = self._dataset.tiling(
                int(np.random.default_rng([self._seed, epoch]).integers(self._dataset.seq_len))
            )
            size = int(counts[-1])
            while position < served + size:
                wanted = self._batch_size * _STEPS_TOGETHER - len(waiting)
                places = np.arange(position - served, min(position - served + wanted, size))
                windows = shuffle(places, size, self._seed, epoch)
                files = np.searchsorted(counts, windows, side="right") - 1
                waiting += (first[files] + (windows - counts[files]) * self._dataset.seq_len).tolist()
                position += len(places)
                whole = len(waiting) // self._batch_size * self._batch_size
                for at in range(0, whole, self._batch_size):
                    yield from self._mine(waiting[at : at + self._batch_size])
                waiting = waiting[whole:]
            served += size
            epoch += 1

    def _mine(self, windows: list[int]) -> Iterator[list[int]]:
        for micro_batch in range(0, self._batch_size, self._share * self._world_size):
            start = micro_batch + self._rank * self._share
            yield windows[start : start + self._share]


def shuffle(places: NDArray[Any], size: int, seed: int, epoch: int) -> NDArray[Any]:
    """Apply the permutation of 0 .. size - 1 that (seed, epoch) choose to `places`.

    A Feistel network over the next power of four (Luby and Rackoff 1988), applied until the result is below `size`. A
    permutation that is computed, not stored: a thousand million windows take no memory, and any place is found at once.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.default_rng([seed, epoch, 1]).integers(0, 1 << 63, 6, dtype=np.uint64)
    found = places.astype(np.uint64)
    outside = np.ones(len(found), bool)
    while outside.any():
        left, right = found[outside] >> half, found[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        found[outside] = (left << half) | right
        outside = found >= size
    return found.astype(np.int64)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finalizer of SplitMix64 (Steele, Lea and Flood 2014): every bit of the result depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def train_loader(
    dataset: TokenDataset, windows: ShuffledWindows, *, workers: int = 0, pin_memory: bool = False
) -> Batches:
    """Yield the micro-batches of `windows` without end: (inputs, targets), each int64 (share, seq_len)."""
    return DataLoader(
        dataset,
        batch_sampler=windows,
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else the loader draws from the global one
    )


def val_loader(
    dataset: TokenDataset,
    *,
    batch_size: int,
    max_batches: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Batches:
    """Return this rank's part of at most `max_batches` batches of evenly spread windows, always the same.

    Every process has as many batches; one that ends up without a window in the last batch has an empty one.
    """
    first, counts = dataset.tiling(0)
    windows = int(counts[-1])
    count = min(windows, batch_size * max_batches)
    chosen = np.arange(count) * windows // count
    files = np.searchsorted(counts, chosen, side="right") - 1
    starts = (first[files] + (chosen - counts[files]) * dataset.seq_len).tolist()
    batches = [starts[at : at + batch_size][rank::world_size] for at in range(0, count, batch_size)]
    return DataLoader(dataset, batch_sampler=batches, collate_fn=_as_it_is, pin_memory=pin_memory)


def _num_tokens(path: Path, dtype: np.dtype[Any]) -> int:
    if not path.is_file():
        raise FileNotFoundError(f"there is no token file {path}")
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise ValueError(f"{path} has {size} bytes, no whole number of {dtype} tokens; is it truncated?")
    return size // dtype.itemsize


def _as_it_is(batch: Any) -> Any:
    return batch  # __getitems__ has made the batch already
