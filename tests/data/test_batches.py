"""Windows of tokens, their order, and how processes share them."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from tinyllm.data.batches import ShuffledWindows, TokenDataset, shuffle, train_loader, val_loader


@pytest.fixture
def counting(tmp_path: Path) -> TokenDataset:
    path = tmp_path / "train.bin"
    np.arange(100, dtype=np.uint16).tofile(path)
    return TokenDataset(path, vocab_size=100, seq_len=7)


def test_windows(counting: TokenDataset) -> None:
    assert len(counting) == 93
    for index in (0, 1, 92):
        inputs, targets = counting[index]
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.tolist() == list(range(index, index + 7))
        assert targets.tolist() == list(range(index + 1, index + 8))
    for index in (-1, 93):
        with pytest.raises(IndexError, match="93 windows"):
            counting[index]


def test_a_batch_is_its_windows(counting: TokenDataset) -> None:
    inputs, targets = counting.__getitems__([5, 92, 5])
    assert inputs.shape == targets.shape == (3, 7)
    for row, index in enumerate([5, 92, 5]):
        assert torch.equal(inputs[row], counting[index][0])
        assert torch.equal(targets[row], counting[index][1])


def test_a_pickled_dataset_carries_no_tokens(counting: TokenDataset) -> None:
    assert len(pickle.dumps(counting)) < 1000
    assert torch.equal(pickle.loads(pickle.dumps(counting))[3][0], counting[3][0])


def served(dataset: TokenDataset, steps: int, **options: int) -> list[list[list[int]]]:
    """Return where the windows of each step's micro-batches start."""
    sampler = ShuffledWindows(dataset, **{"batch_size": 4, "seed": 0, **options})
    micro_batches = options.get("micro_batches", 1)
    return [list(itertools.islice(it, micro_batches)) for it in [iter(sampler)] for _ in range(steps)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 64, 65, 1000])
def test_shuffle_is_a_permutation(size: int) -> None:
    orders = [shuffle(np.arange(size), size, seed, epoch).tolist() for seed, epoch in [(0, 0), (0, 1), (1, 0), (0, 0)]]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert orders[0] == orders[3]
    if size >= 64:
        assert len({tuple(order) for order in orders}) == 3
        shuffled = np.array(orders[0])
        assert abs(np.corrcoef(shuffled, np.arange(size))[0, 1]) < 0.3
        assert (np.diff(shuffled) == 1).mean() < 0.1
    assert shuffle(np.array([size - 1]), size, 0, 0).tolist() == orders[0][-1:]  # one place is found by itself


def test_an_epoch_serves_every_window_once(counting: TokenDataset) -> None:
    """All windows of an epoch begin at one offset, modulo the window; the next epoch has an offset of its own."""
    starts = [start for (batch,) in served(counting, 40) for start in batch]
    groups = [list(group) for _, group in itertools.groupby(starts, key=lambda start: start % 7)][:-1]
    assert len(groups) >= 5
    for group in groups:
        assert sorted(set(group)) == list(range(group[0] % 7, 93, 7))
        assert len(set(Counter(group).values())) == 1  # two epochs in succession may have the same offset


def test_the_order_is_the_seeds(counting: TokenDataset) -> None:
    assert served(counting, 25, seed=1) == served(counting, 25, seed=1) != served(counting, 25, seed=2)
    assert {len(batch) for step in served(counting, 25) for batch in step} == {4}


@pytest.mark.parametrize("first_step", [0, 1, 3, 17, 40])
def test_any_step_is_where_it_would_have_been(counting: TokenDataset, first_step: int) -> None:
    assert served(counting, 5, first_step=first_step) == served(counting, first_step + 5)[first_step:]


@pytest.mark.parametrize(("micro_batches", "world_size"), [(1, 2), (2, 1), (2, 2), (4, 1), (1, 4)])
def test_processes_and_micro_batches_share_a_step(counting: TokenDataset, micro_batches: int, world_size: int) -> None:
    whole = served(counting, 6)
    parts = [
        served(counting, 6, micro_batches=micro_batches, world_size=world_size, rank=rank) for rank in range(world_size)
    ]
    for step, (batch,) in enumerate(whole):
        assert [i for m in range(micro_batches) for rank in range(world_size) for i in parts[rank][step][m]] == batch


def test_a_batch_must_be_divisible(counting: TokenDataset) -> None:
    with pytest.raises(ValueError, match="batch_size is 4; it must be divisible by micro-batches x processes, 3 x 1"):
        served(counting, 1, micro_batches=3)


def test_several_files_are_one_dataset(tmp_path: Path) -> None:
    paths = []
    for name, (first, end) in {"a": (0, 30), "b": (30, 35), "c": (35, 80)}.items():
        paths.append(tmp_path / name)
        np.arange(first, end, dtype=np.uint16).tofile(paths[-1])
    dataset = TokenDataset(paths, 100, 7)
    assert [path.name for path in dataset.paths] == ["a", "c"]  # b has no whole window
    assert len(dataset) == 23 + 38
    inputs, targets = dataset.__getitems__(range(len(dataset)))
    assert inputs[:, 0].tolist() == [*range(23), *range(35, 73)]
    assert torch.equal(inputs + 1, targets)  # none reaches from one file into the next
    (batch,) = served(dataset, 1, batch_size=8)[0]
    assert len(set(batch)) == 8  # of the 8 or 9 of an epoch
    starts = [i for batch, _ in val_loader(dataset, batch_size=4, max_batches=9) for i in batch[:, 0].tolist()]
    assert starts == [0, 7, 14, 21, 35, 42, 49, 56, 63, 70]


def test_a_file_of_one_window_serves_it_for_ever(tmp_path: Path) -> None:
    np.arange(8, dtype=np.uint16).tofile(tmp_path / "one")
    assert served(TokenDataset(tmp_path / "one", 100, 7), 3) == [[[0, 0, 0, 0]]] * 3


def test_the_loader_draws_nothing_from_the_global_generator(counting: TokenDataset) -> None:
    state = torch.get_rng_state()
    batches = iter(train_loader(counting, ShuffledWindows(counting, batch_size=4, seed=0)))
    inputs, targets = next(batches)
    assert inputs[:, 0].tolist() == served(counting, 1)[0][0]
    assert torch.equal(inputs + 1, targets)
    assert torch.equal(torch.get_rng_state(), state)


def test_processes_share_a_validation(counting: TokenDataset) -> None:
    whole = [inputs[:, 0].tolist() for inputs, _ in val_loader(counting, batch_size=3, max_batches=9)]
    parts = [
        [inputs[:, 0].tolist() for inputs, _ in val_loader(counting, batch_size=3, max_batches=9, rank=r, world_size=4)]
        for r in range(4)
    ]
    assert [len(part) for part in parts] == [len(whole)] * 4  # empty ones included
    for number, batch in enumerate(whole):
        assert sorted(start for part in parts for start in part[number]) == batch


def test_val_loader_covers_the_file_without_overlap(counting: TokenDataset) -> None:
    starts = [i for inputs, _ in val_loader(counting, batch_size=4, max_batches=99) for i in inputs[:, 0].tolist()]
    assert starts == list(range(0, 98, 7))  # 14 windows of 7, the last with its target at 98
    few = [i for inputs, _ in val_loader(counting, batch_size=2, max_batches=2) for i in inputs[:, 0].tolist()]
    assert few == [0, 21, 49, 70]


def test_bad_token_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.bin"):
        TokenDataset(tmp_path / "none.bin", 10, 4)
    path = tmp_path / "odd.bin"
    path.write_bytes(b"\0" * 31)
    with pytest.raises(ValueError, match=r"odd.bin.*truncated"):
        TokenDataset(path, 10, 4)
    path.write_bytes(b"\0" * 8)
    with pytest.raises(ValueError, match="4 tokens; seq_len 4 needs 5"):
        TokenDataset(path, 10, 4)
    with pytest.raises(ValueError, match="seq_len is 0"):
        TokenDataset(path, 10, 0)
