"""Training: it learns, it repeats, and it leaves a whole run folder behind."""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.runs import RUN, TEXT, losses, small, tokens
from tinyllm.model import SimpleLLM
from tinyllm.runs.load import load_run
from tinyllm.runs.metrics import read_metrics
from tinyllm.training.trainer import PRESETS, TrainConfig, learning_rate, train

pytestmark = pytest.mark.usefixtures("one_thread")


# Learning


@pytest.mark.parametrize("preset", ["tutorial", "tiny"])
def test_the_loss_falls(preset: str, text: Path, tmp_path: Path) -> None:
    lr = 1e-2 if preset == "tutorial" else 2e-3
    result = train(small(preset=preset, lr=lr, steps=60), tmp_path / "out", [text], progress=False)
    start = losses(tmp_path / "out")[0]
    assert result.val_loss is not None
    # What comes next is certain but after "the" and "sat"; knowing words' frequencies alone gives 2.1.
    assert start > 2.1 > 1.5 > result.val_loss
    assert result.val_loss == losses(tmp_path / "out", "val")[-1]
    assert (result.steps, result.interrupted) == (60, False)


def test_the_same_seed_gives_the_same_bits(text: Path, tmp_path: Path) -> None:
    outs = []
    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        torch.manual_seed(len(outs))  # whatever the caller's random state is
        config = small(preset="tiny", steps=12, log_interval=1, eval_interval=5, dropout=0.1, seed=seed)
        train(config, tmp_path / name, [text], progress=False)
        outs.append(
            [(line["step"], line["split"], line["loss"]) for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        )
    assert len(outs[0]) == 12 + 3
    assert outs[0] == outs[1]
    assert outs[0] != outs[2]
    weights = [load_run(tmp_path / name).model.state_dict() for name in "ab"]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_the_default_text_is_the_standard_library(tmp_path: Path, monkeypatch) -> None:
    for name in ["a.py", "lib/b.py", "test/c.py", "site-packages/d.py", "notes.txt"]:
        path = tmp_path / "python" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TEXT)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "python") if name == "stdlib" else None)
    said: list[str] = []
    train(small(steps=2), tmp_path / "out", progress=False, say=said.append)
    assert any("standard library, 2 files" in line for line in said)
    assert said[1] == "Plan: 2 steps of 12 x 8 tokens; AdamW, lr 0.01, cosine to 0.001"  # what the preset decides, too


def test_the_callers_random_state_stays(text: Path, tmp_path: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    train(small(steps=2), tmp_path / "out", [text], progress=False)
    assert torch.equal(torch.rand(3), expected)


# The run folder


def test_run_folder(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    said: list[str] = []
    config = small(steps=25, log_interval=10, eval_interval=10)
    result = train(config, out, [text], progress=False, say=said.append)
    assert set(os.listdir(out)) == RUN

    lines = read_metrics(out / "metrics.jsonl")
    for line in lines:
        assert list(line)[:6] == ["step", "split", "loss", "lr", "tokens_per_s", "elapsed_s"]
        assert line["tokens_per_s"] > 0
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 10, 20, 25]
    assert [line["step"] for line in lines if line["split"] == "val"] == [10, 20, 25]
    elapsed = [line["elapsed_s"] for line in lines]
    assert elapsed == sorted(elapsed)
    assert lines[1]["lr"] == learning_rate(10, config)

    saved = json.loads((out / "config.json").read_text())
    assert saved["training"]["steps"] == 25
    assert saved["training"]["preset"] == "tutorial"
    assert saved["versions"]["torch"] == torch.__version__
    assert saved["data"]["train_tokens"] * 2 == tokens(out).stat().st_size
    assert saved["data"]["name"] == str(text)

    assert (out / "loss_curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert any("1 file, " in line for line in said)

    model, tokenizer, _ = load_run(out)
    ids = torch.tensor([tokenizer.encode("the cat sat on")])
    assert torch.equal(model(ids), result.model(ids))
    assert not result.model.training


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_the_sizes_promised(name: str) -> None:
    sizes = {
        "tutorial": (16, 32, 2, 1),
        "tiny": (128, 512, 4, 4),
        "small": (512, 2048, 12, 8),
        "gpt2": (768, 3072, 12, 12),
        "gpt2-medium": (1024, 4096, 24, 16),
        "gpt2-large": (1280, 5120, 36, 20),
        "gpt2-xl": (1600, 6400, 48, 25),
        "gpt3": (12_288, 49_152, 96, 96),
    }
    config = TrainConfig.from_preset(name, dropout=0.25, seq_len=48).model_config(1000)
    assert (config.embedding_dim, config.hidden_dim, config.num_layers, config.num_heads) == sizes[name]
    assert config.causal
    assert config.norm_first == (name != "tutorial")
    assert (config.max_seq_len, config.dropout, config.vocab_size) == (48, 0.25, 1000)
    with torch.device("meta"):
        assert SimpleLLM.from_config(config).config == config


def test_a_preset_has_a_recipe_for_each_optimizer() -> None:
    names = ("optimizer", "batch_size", "seq_len", "steps", "lr", "beta2")

    def recipe(**changes: Any) -> tuple[Any, ...]:
        config = TrainConfig.from_preset("tiny", **changes)
        return tuple(getattr(config, name) for name in names)

    assert recipe() == recipe(optimizer="muon") == ("muon", 24, 64, 500, 2e-2, 0.99)
    assert recipe(optimizer="adamw") == ("adamw", 12, 64, 1000, 3e-3, 0.95)  # the shape of the benchmarks, too
    assert recipe(optimizer="adamw", lr=1.0, batch_size=3)[1::3] == (3, 1.0)
    assert recipe(strategy="deepspeed") == recipe(optimizer="adamw")  # it cannot have Muon
    assert TrainConfig().optimizer == "adamw"


def test_from_preset_takes_changes_that_are_not_none() -> None:
    config = TrainConfig.from_preset("tiny", lr=0.5, steps=None, vocab_size=None)
    assert config.lr == 0.5
    assert config.steps == PRESETS["tiny"].steps
    assert config.vocab_size == PRESETS["tiny"].vocab_size
    assert TrainConfig.from_preset("tiny", tokenizer="char").vocab_size is None
    assert TrainConfig.from_preset("tiny", tokenizer="word", vocab_size=99).vocab_size == 99


def test_overwrite_replaces_a_run_and_nothing_else(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(small(steps=3), out, [text], progress=False)
    (out / "notes.txt").write_text("mine")

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    before = content()
    with pytest.raises(FileExistsError, match="not empty"):
        train(small(steps=3), out, [text], progress=False)
    # Errors that come late must not have cost the old run anything either.
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    (tmp_path / "short.txt").write_text("too short")
    for bad in ("latin.txt", "short.txt"):
        with pytest.raises(ValueError, match=bad if bad == "latin.txt" else "too short"):
            train(small(steps=3), out, [tmp_path / bad], overwrite=True, progress=False)
    assert content() == before

    train(small(steps=4, tokenizer="char"), out, [text], overwrite=True, progress=False)
    assert (out / "notes.txt").read_text() == "mine"
    assert set(os.listdir(out)) == {*RUN, "notes.txt"}
    assert load_run(out).tokenizer.kind == "char"


def test_a_small_corpus_validates_on_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("hello world how are you\nhow are you hello world\n" * 2)
    result = train(small(steps=3, seq_len=12), tmp_path / "out", [tmp_path / "two.txt"], progress=False)
    assert tokens(tmp_path / "out", "val").stat().st_size == 4  # 2 tokens: one prediction
    assert result.val_loss is not None


@pytest.mark.parametrize("content", ["", " \n "])
def test_an_empty_corpus(content: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(content)
    with pytest.raises(ValueError, match="corpus is empty"):
        train(small(), tmp_path / "out", [tmp_path / "empty.txt"], progress=False)
    assert not (tmp_path / "out").exists()


# The parts


# When it goes wrong


def test_training_in_a_thread(text: Path, tmp_path: Path) -> None:
    results = []
    thread = threading.Thread(
        target=lambda: results.append(train(small(steps=2), tmp_path / "out", [text], progress=False))
    )
    thread.start()
    thread.join()
    assert results[0].steps == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"preset": "huge"}, "preset is 'huge'; allowed are 'tutorial', 'tiny', 'small', 'gpt2'"),
        ({"tokenizer": "byte"}, "tokenizer is 'byte'"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"batch_size": -3}, "batch_size is -3"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"lr": 0.0}, "lr is 0.0; it must be a positive number"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": math.inf}, "lr is inf"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"seed": -1}, "seed is -1"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio is 1.5.*at most 1"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"eval_interval": 0}, "eval_interval is 0"),
    ],
)
def test_bad_settings(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        small(**changes)


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:99", "mps"])
def test_a_device_that_is_not_here(device: str, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"device is '{device}'"):
        train(small(device=device), tmp_path / "out", [text], progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["lr", "steps", "seq_len", "grad_clip", "seed", "workers"])
def test_a_setting_that_is_not_open_may_not_be_none(name: str) -> None:
    with pytest.raises((TypeError, ValueError)):
        TrainConfig(**{name: None})
    assert TrainConfig(vocab_size=None).vocab_size is None


def test_one_path_is_enough(text: Path, tmp_path: Path) -> None:
    train(small(steps=1), tmp_path / "run", str(text), progress=False)
    assert losses(tmp_path / "run")
