"""Training on what `tinyllm prepare` made: its tokenizer, its shards, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.runs import TEXT, history, losses, small
from tinyllm.config.saved import read_config
from tinyllm.data.prepare import prepare
from tinyllm.data.shards import open_shards
from tinyllm.runs.folder import checkpoint_path
from tinyllm.runs.load import load_run
from tinyllm.tokenizer import train_tokenizer
from tinyllm.training.trainer import resume, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(6):
        (folder / f"{number}.txt").write_text(TEXT[: 1500 + 100 * number])
    return folder


@pytest.fixture(scope="module")
def prepared(texts: Path) -> Path:
    out = texts.parent / "prepared"
    prepare([str(texts)], out, tokenizer="bpe", vocab_size=300, workers=1, shard_size=0.004, val_fraction=0.2)
    assert len(open_shards(out).train) > 1
    return out


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """Prepared data that a test may damage."""
    return Path(shutil.copytree(prepared, tmp_path / "prepared"))


def test_prepared_data_bring_their_tokenizer(prepared: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = small(steps=12, checkpoint_interval=6, log_interval=1, packing=True)
    result = train(config, tmp_path / "out", [prepared], progress=False, say=said.append)
    assert result.tokenizer.vocab_size == load_run(tmp_path / "out").tokenizer.vocab_size <= 300
    assert any("shards to train on" in line for line in said)
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]
    assert not (tmp_path / "out" / "train.bin").exists()  # they stay where they are
    assert read_config(tmp_path / "out")["data"]["fingerprint"] == open_shards(prepared).fingerprint

    before = history(tmp_path / "out")
    shutil.rmtree(checkpoint_path(tmp_path / "out", 12))
    resume(tmp_path / "out", progress=False)
    assert history(tmp_path / "out") == before


def test_the_data_of_another_run(texts: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    config = small(steps=2, tokenizer="word")
    train(config, one, [texts], progress=False)
    train(config, two, [one / "data"], progress=False)
    assert history(one) == history(two)
    with pytest.raises(ValueError, match=r"one/data belongs to the run in .*one, which is to be overwritten; choose"):
        train(config, one, [one / "data"], overwrite=True, progress=False)
    shutil.move(one, tmp_path / "moved")
    resume(tmp_path / "moved", progress=False, steps=3)
    with pytest.raises(FileNotFoundError, match=r"one/data holds no prepared data"):
        resume(two, progress=False, steps=3)


def test_a_damaged_shard_is_named(copy: Path, tmp_path: Path) -> None:
    shard = open_shards(copy).train[1]
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{shard.name} is damaged: its SHA-256 is"):
        train(small(), tmp_path / "out", [copy], progress=False)
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_refused(copy: Path, tmp_path: Path) -> None:
    train(small(steps=2), tmp_path / "out", [copy], progress=False)
    train_tokenizer("bpe", [TEXT + "other words"], 290).save(tmp_path / "out" / "tokenizer.json")
    with pytest.raises(ValueError, match=r"out/tokenizer.json is not the tokenizer of the shards in .*prepared"):
        resume(tmp_path / "out", progress=False, steps=3)
    shutil.copy(tmp_path / "out" / "tokenizer.json", copy / "tokenizer.json")
    with pytest.raises(ValueError, match=r"prepared/tokenizer.json is not the tokenizer of the shards"):
        train(small(), tmp_path / "new", [copy], progress=False)


def test_a_resumed_training_needs_its_own_data(texts: Path, copy: Path, tmp_path: Path) -> None:
    train(small(steps=2), tmp_path / "out", [copy], progress=False)
    prepare([str(texts)], copy, tokenizer="bpe", vocab_size=290, workers=1, val_fraction=0.2, overwrite=True)
    with pytest.raises(ValueError, match=r"holds other data than those that the training in .*out began with"):
        resume(tmp_path / "out", progress=False, steps=3)
    shutil.rmtree(copy)
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        resume(tmp_path / "out", progress=False, steps=3)


def test_a_sequence_longer_than_every_shard(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has \d+ tokens; seq_len 100000 needs 100001"):
        train(small(seq_len=100_000), tmp_path / "out", [copy], progress=False)
    assert not (tmp_path / "out").exists()
