"""The choice of tiles, without a GPU: the clock is made up."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
import triton

from tinyllm.kernels import tuning
from tinyllm.kernels.tuning import Tile

pytestmark = pytest.mark.triton

TILES = [Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 32, 4, 1)]
SECONDS = {TILES[0]: 3.0, TILES[1]: 1.0, TILES[2]: 2.0}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Return a tensor on a GPU that is not there, and a record of what was timed on it."""
    timed = []

    def do_bench(run, **_):
        timed.append(run())
        return SECONDS[timed[-1]]

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "path", lambda: tmp_path / "cache" / "tiles.json")
    monkeypatch.setattr(tuning, "_chosen", None)
    return SimpleNamespace(is_cuda=True, device="cuda:0"), timed


def choose(tensor, key=(64, True), tiles=TILES):
    return tuning.choose_tile("kernel", tensor, key, tiles, lambda tile: tile)


def test_the_default_is_taken_and_nothing_timed(gpu):
    tensor, timed = gpu
    assert choose(tensor) == TILES[0]
    assert not timed


def test_tuning_takes_the_fastest_and_remembers_it(gpu, monkeypatch):
    tensor, timed = gpu
    monkeypatch.setenv("TINYLLM_AUTOTUNE", "1")
    assert choose(tensor) == TILES[1]
    assert timed == TILES
    assert choose(tensor) == TILES[1]
    assert timed == TILES  # once
    choose(tensor, key=(128, True))
    assert timed == TILES * 2  # another kind of call
    # A later process, not tuning.
    monkeypatch.delenv("TINYLLM_AUTOTUNE")
    monkeypatch.setattr(tuning, "_chosen", None)
    assert choose(tensor) == TILES[1]
    assert timed == TILES * 2


def test_a_choice_that_is_no_candidate_any_more_is_not_taken(gpu, monkeypatch):
    tensor, _ = gpu
    monkeypatch.setenv("TINYLLM_AUTOTUNE", "1")
    choose(tensor)
    assert choose(tensor, tiles=[TILES[0], TILES[2]]) == TILES[0]


def test_nothing_is_timed_while_a_graph_is_captured(gpu, monkeypatch):
    tensor, timed = gpu
    monkeypatch.setenv("TINYLLM_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(tensor) == TILES[0]
    assert not timed


def test_the_device_is_asked_for_its_name_once(gpu, monkeypatch):
    # Each launch looks its tile up.
    tensor, _ = gpu
    tuning._name.cache_clear()
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: asked.append(device) or "a GPU")
    for _ in range(3):
        assert choose(tensor, key=(torch.bfloat16, 64)) == TILES[0]
    assert asked == ["cuda:0"]


@pytest.mark.parametrize("text", ["", "[]", '{"kernel": 3}'])
def test_a_spoilt_file_is_no_error(gpu, text):
    tensor, _ = gpu
    tuning.path().parent.mkdir()
    tuning.path().write_text(text)
    assert choose(tensor) == TILES[0]


def test_the_file_is_json(gpu, monkeypatch):
    tensor, _ = gpu
    monkeypatch.setenv("TINYLLM_AUTOTUNE", "1")
    choose(tensor)
    assert list(json.loads(tuning.path().read_text()).values()) == [list(TILES[1])]
    assert [p.name for p in tuning.path().parent.iterdir()] == ["tiles.json"]
