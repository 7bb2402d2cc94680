"""Training: it learns, it repeats, and it leaves a whole run folder behind."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinyllm import training
from tinyllm.checkpoint import RUN_FILES, load_run
from tinyllm.data import TokenDataset, val_loader
from tinyllm.metrics import plot_loss, read_metrics
from tinyllm.model import SimpleLLM
from tinyllm.training import PRESETS, TrainConfig, adamw, evaluate, learning_rate, next_token_loss, train

TEXT = "the cat sat on the mat and the dog sat on the cat .\n" * 60


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from more, and lose much when other processes want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def small(**changes: Any) -> TrainConfig:
    values = {"preset": "tutorial", "tokenizer": "word", "steps": 40, "seq_len": 8, "lr": 1e-2, **changes}
    return TrainConfig.from_preset(**values)


def losses(out: Path, split: str = "train") -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if line["split"] == split]


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


def test_fit_trains_a_model_that_comes_in_eval_mode(text: Path, tmp_path: Path, monkeypatch) -> None:
    modes = []
    real = training.next_token_loss
    monkeypatch.setattr(
        training, "next_token_loss", lambda model, *batch: modes.append(model.training) or real(model, *batch)
    )
    monkeypatch.setattr(training, "init_gpt2_weights", lambda model: model.eval())
    train(small(preset="tiny", steps=2), tmp_path / "out", [text], progress=False)
    assert modes[:2] == [True, True]
    assert not any(modes[2:])


def test_the_default_text_is_the_standard_library(tmp_path: Path, monkeypatch) -> None:
    for name in ["a.py", "lib/b.py", "test/c.py", "site-packages/d.py", "notes.txt"]:
        path = tmp_path / "python" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TEXT)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "python") if name == "stdlib" else None)
    said: list[str] = []
    train(small(steps=2), tmp_path / "out", progress=False, say=said.append)
    assert "standard library, 2 files" in said[0]


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
    assert sorted(os.listdir(out)) == sorted(RUN_FILES)

    lines = read_metrics(out / "metrics.jsonl")
    for line in lines:
        assert list(line) == ["step", "split", "loss", "lr", "tokens_per_s", "elapsed_s"]
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
    assert saved["data"]["train_tokens"] * 2 == (out / "train.bin").stat().st_size
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


def test_tiny_is_the_benchmarks_shape() -> None:
    config = TrainConfig.from_preset("tiny")
    assert (config.seq_len, config.batch_size) == (64, 12)


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
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(FileExistsError, match="not empty"):
        train(small(steps=3), out, [text], progress=False)
    # Errors that come late must not have cost the old run anything either.
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    (tmp_path / "short.txt").write_text("too short")
    for bad in ("latin.txt", "short.txt"):
        with pytest.raises(ValueError, match=bad if bad == "latin.txt" else "too short"):
            train(small(steps=3), out, [tmp_path / bad], overwrite=True, progress=False)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    train(small(steps=4, tokenizer="char"), out, [text], overwrite=True, progress=False)
    assert (out / "notes.txt").read_text() == "mine"
    assert sorted(os.listdir(out)) == sorted([*RUN_FILES, "notes.txt"])
    assert load_run(out).tokenizer.kind == "char"


def test_a_small_corpus_validates_on_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("hello world how are you\nhow are you hello world\n" * 2)
    result = train(small(steps=3, seq_len=12), tmp_path / "out", [tmp_path / "two.txt"], progress=False)
    assert (tmp_path / "out" / "val.bin").stat().st_size == 4  # 2 tokens: one prediction
    assert result.val_loss is not None


@pytest.mark.parametrize("content", ["", " \n "])
def test_an_empty_corpus(content: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(content)
    with pytest.raises(ValueError, match="corpus is empty"):
        train(small(), tmp_path / "out", [tmp_path / "empty.txt"], progress=False)
    assert not (tmp_path / "out").exists()


# The parts


def test_learning_rate_warms_up_and_decays() -> None:
    config = small(steps=100, lr=1.0, warmup_steps=10, min_lr_ratio=0.1)
    rates = [learning_rate(step, config) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert all(earlier > later for earlier, later in itertools.pairwise(rates[9:]))
    assert rates[54] == pytest.approx(0.55)  # halfway down the cosine
    assert rates[-1] == pytest.approx(0.1)
    assert learning_rate(1, small(steps=1, lr=1.0)) == pytest.approx(0.1)  # no warmup, all of the decay
    assert learning_rate(5, small(steps=5, lr=1.0, warmup_steps=10)) == 0.5


def test_decay_is_for_matrices_only() -> None:
    config = TrainConfig.from_preset("tiny", weight_decay=0.3)
    model = SimpleLLM.from_config(config.model_config(50))
    optimizer = adamw(model, config)
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in free["params"]} == {1}
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))
    assert optimizer.defaults["fused"]


def test_the_gradient_is_clipped(text: Path, tmp_path: Path, monkeypatch) -> None:
    limits, norms = [], []
    real = torch.nn.utils.clip_grad_norm_

    def spy(parameters, limit):
        parameters = list(parameters)
        before = real(parameters, limit)
        limits.append(limit)
        norms.append(math.sqrt(sum(float(p.grad.norm()) ** 2 for p in parameters)))
        return before

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    train(small(steps=5, grad_clip=0.01), tmp_path / "out", [text], progress=False)
    assert limits == [0.01] * 5
    assert norms == pytest.approx([0.01] * 5, rel=1e-3)


def test_evaluate_is_the_mean_over_tokens_without_dropout(tmp_path: Path) -> None:
    np.random.default_rng(0).integers(0, 9, 100).astype(np.uint16).tofile(tmp_path / "val.bin")
    dataset = TokenDataset(tmp_path / "val.bin", 9, 8)
    torch.manual_seed(0)
    model = SimpleLLM(9, 8, 16, 1, causal=True, dropout=0.5)
    loss, tokens = evaluate(model, val_loader(dataset, batch_size=5, max_batches=99))
    assert tokens == 12 * 8  # in batches of 5, 5 and 2
    assert model.training
    model.eval()
    inputs, targets = dataset.__getitems__(list(range(0, 96, 8)))
    assert loss == pytest.approx(next_token_loss(model, inputs, targets).item(), rel=1e-6)
    assert loss == pytest.approx(
        -torch.log_softmax(model(inputs), -1).gather(-1, targets.unsqueeze(-1)).mean().item(), rel=1e-5
    )


def test_plot_of_unfinished_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "p.png", title="nothing yet")
    assert (tmp_path / "p.png").stat().st_size > 1000
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 2.0}\n{"step"\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2"):
        plot_loss(tmp_path / "metrics.jsonl", tmp_path / "p.png", title="")


# When it goes wrong


def test_sigint_keeps_what_was_trained(text: Path, tmp_path: Path, monkeypatch) -> None:
    real = training.next_token_loss
    calls = []

    def loss(*args):
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(training, "next_token_loss", loss)
    before = signal.getsignal(signal.SIGINT)
    result = train(small(steps=1000), tmp_path / "out", [text], progress=False)
    assert signal.getsignal(signal.SIGINT) is before
    assert result.interrupted
    assert result.steps == 7
    assert losses(tmp_path / "out")[-1] > 0
    assert sorted(os.listdir(tmp_path / "out")) == sorted(RUN_FILES)
    ids = torch.tensor([[0, 1, 2]])
    assert torch.equal(load_run(tmp_path / "out").model(ids), result.model(ids))


def test_a_second_sigint_stops_at_once() -> None:
    with training._sigint() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_training_in_a_thread(text: Path, tmp_path: Path) -> None:
    results = []
    thread = threading.Thread(
        target=lambda: results.append(train(small(steps=2), tmp_path / "out", [text], progress=False))
    )
    thread.start()
    thread.join()
    assert results[0].steps == 2


def test_divergence_stops_and_keeps_the_last_good_weights(text: Path, tmp_path: Path, monkeypatch) -> None:
    real = training.next_token_loss
    calls = []

    def loss(model, inputs, targets):
        calls.append(model.training)
        value = real(model, inputs, targets)
        return value * math.nan if sum(calls) > 15 else value

    monkeypatch.setattr(training, "next_token_loss", loss)
    with pytest.raises(FloatingPointError, match=r"nan at step 18.*lr was 0.01"):
        train(small(steps=100, eval_interval=9), tmp_path / "out", [text], progress=False)
    assert [line["step"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl")] == [1, 9, 9, 10]
    model = load_run(tmp_path / "out").model
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


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
