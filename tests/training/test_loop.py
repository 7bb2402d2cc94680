"""The loop: what a step does, what ends it, what is skipped, what a full disk does."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from tests.helpers.runs import RUN, TEXT, history, losses, small, tokens
from tinyllm._internal.interrupt import noting_signals
from tinyllm.config.training import OPTIMIZERS
from tinyllm.data.batches import TokenDataset, val_loader
from tinyllm.evaluation import evaluate_texts
from tinyllm.model import SimpleLLM
from tinyllm.runs.folder import checkpoints
from tinyllm.runs.load import load_run
from tinyllm.runs.metrics import read_metrics
from tinyllm.training import checkpoint, loop, recorder, trainer
from tinyllm.training.engine import Engine, TrainingModule, launch
from tinyllm.training.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")


Change = Callable[[int, torch.Tensor], torch.Tensor]


@pytest.fixture
def change_loss(monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], list[bool]]:
    """Replace the loss of the n-th training step by a function of n and the loss; return the modes of the calls."""

    def change(function: Change) -> list[bool]:
        real = SimpleLLM.loss
        modes: list[bool] = []

        def loss(self: SimpleLLM, *args: Any, **options: Any) -> torch.Tensor:
            modes.append(self.training)
            value = real(self, *args, **options)
            return function(sum(modes), value) if self.training else value

        monkeypatch.setattr(SimpleLLM, "loss", loss)
        return modes

    return change


def test_training_is_in_train_mode_and_validation_is_not(text: Path, tmp_path: Path, change_loss) -> None:
    modes = change_loss(lambda step, loss: loss)
    train(small(steps=2), tmp_path / "out", [text], progress=False)
    assert modes[:2] == [True, True]
    assert len(modes) > 2
    assert not any(modes[2:])


def test_a_step_is_adamws(text: Path, tmp_path: Path) -> None:
    """The weights after three steps are those of a loop written out, on the same windows, with clipping and decay."""
    from tinyllm.data.batches import ShuffledWindows
    from tinyllm.training.optim import learning_rate

    config = small(steps=3, grad_clip=0.05, batch_size=6)
    result = train(config, tmp_path / "out", [text], progress=False)
    torch.manual_seed(config.seed)
    model = SimpleLLM.from_config(result.model.config)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    data = TokenDataset(tokens(tmp_path / "out"), result.tokenizer.vocab_size, 8)
    norms = []
    for step, windows in zip(range(1, 4), ShuffledWindows(data, batch_size=6, seed=0), strict=False):
        inputs, targets = data.__getitems__(windows)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
        optimizer.step()
    expected = dict(model.named_parameters())
    for name, trained in result.model.named_parameters():
        if not name.endswith("key.bias"):  # its gradient is 0 but for rounding, of which Adam makes steps
            torch.testing.assert_close(trained, expected[name], rtol=1e-4, atol=1e-6)
    assert read_metrics(tmp_path / "out" / "metrics.jsonl")[-2]["grad_norm"] == pytest.approx(norms[-1], rel=1e-4)


@pytest.mark.parametrize("changes", [{"micro_batches": 3}, {"checkpointing": True}, {"workers": 1}])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_how_a_step_is_computed_does_not_change_it(
    optimizer: str, changes: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    options = {"steps": 6, "log_interval": 1, "preset": "tiny", "lr": 2e-3, "dropout": 0.0, "optimizer": optimizer}
    train(small(**options), tmp_path / "a", [text], progress=False)
    train(small(**options, **changes), tmp_path / "b", [text], progress=False)
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-5)
    assert losses(tmp_path / "b", "val") == pytest.approx(losses(tmp_path / "a", "val"), rel=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_compile(optimizer: str, text: Path, tmp_path: Path) -> None:
    options = {"steps": 2, "log_interval": 1, "seq_len": 8, "sample_tokens": 0, "optimizer": optimizer}
    train(small(**options), tmp_path / "a", [text], progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler, about itself
        train(small(**options, compile=True), tmp_path / "b", [text], progress=False)
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-5)


def test_bfloat16(text: Path, tmp_path: Path) -> None:
    full = train(small(steps=20), tmp_path / "full", [text], progress=False)
    assert full.val_loss is not None
    for precision in ("bf16-mixed", "bf16-true"):
        result = train(small(steps=20, precision=precision), tmp_path / precision, [text], progress=False)
        assert result.val_loss == pytest.approx(full.val_loss, rel=0.1)
        assert next(result.model.parameters()).dtype == torch.float32  # whatever it was saved in


def test_label_smoothing_is_for_training_only() -> None:
    torch.manual_seed(0)
    model = SimpleLLM(9, 8, 16, 1, causal=True, norm_first=True)
    ids, targets = torch.randint(9, (2, 2, 5))
    module = TrainingModule(model, label_smoothing=0.2)
    logits = model(ids).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, targets.flatten(), label_smoothing=0.2)
    torch.testing.assert_close(module(ids, targets), expected)
    torch.testing.assert_close(
        module.eval()(ids, targets), torch.nn.functional.cross_entropy(logits, targets.flatten())
    )
    torch.testing.assert_close(module(ids), model(ids))


@pytest.mark.parametrize(("heads", "norm_first"), [(1, False), (2, True)])
def test_packing_stops_attention_where_documents_end(heads: int, norm_first: bool) -> None:
    """Each document's losses are those of the document alone, begun with the end-of-text token as evaluation does."""
    torch.manual_seed(0)
    options = {"num_heads": heads, "norm_first": norm_first, "causal": True, "max_seq_len": 16, "position": "learned"}
    model = SimpleLLM(9, 8, 16, 2, **options)
    with torch.no_grad():
        model.positional_encoding.weight.zero_()  # a document alone lies at other positions
    end = 8
    documents = [[end, 1, 2, 3, 4], [end, 5, 6], [end, 7, 1, 2]]
    ids = torch.tensor([[token for document in documents for token in document]])
    inputs, targets = ids[:, :-1], ids[:, 1:]
    module = TrainingModule(model, end_of_text_id=end)
    total = module(inputs, targets) * targets.numel()
    alone = 0.0
    for number, document in enumerate(documents):
        following = [*document[1:], end] if number + 1 < len(documents) else document[1:]
        seen = torch.tensor([document[: len(following)]])
        alone += model.loss(seen, torch.tensor([following])).item() * len(following)
    assert total.item() == pytest.approx(alone, rel=1e-5)
    assert (model.loss(inputs, targets) * targets.numel()).item() != pytest.approx(alone, rel=1e-3)


def test_packing_needs_an_end_of_text(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="packing is on, but the tokenizer has no end-of-text token"):
        train(small(packing=True), tmp_path / "out", [text], progress=False)
    result = train(
        small(packing=True, tokenizer="bpe", vocab_size=300, steps=3), tmp_path / "bpe", [text], progress=False
    )
    assert result.val_loss is not None


def engine_of(module: TrainingModule) -> Engine:
    engine = launch(small(device="cpu"))
    engine.setup(module, lambda m: torch.optim.AdamW(m.parameters()))
    return engine


def test_averaged_weights_are_what_is_validated_and_saved(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = train(small(steps=12, ema=0.9, tokenizer="bpe", vocab_size=300), out, [text], progress=False)
    from safetensors.torch import load_file

    raw = load_file(out / "checkpoints" / "step-00000012" / "model.safetensors")
    averages = load_file(out / "checkpoints" / "step-00000012" / "averages.safetensors")
    saved = load_run(out).model.state_dict()
    assert any(not torch.equal(raw[name], averages[name]) for name in raw)
    assert all(torch.equal(saved[name], averages[name]) for name in averages)
    engine = engine_of(TrainingModule(load_run(out).model))
    val = TokenDataset(tokens(out, "val"), result.tokenizer.vocab_size, 8)
    assert loop.evaluate(engine, val_loader(val, batch_size=12, max_batches=32))[0] == result.val_loss
    assert evaluate_texts(load_run(out).model, result.tokenizer, [TEXT]).tokens > 0


def test_evaluate_is_the_mean_over_tokens_without_dropout(tmp_path: Path) -> None:
    np.random.default_rng(0).integers(0, 9, 100).astype(np.uint16).tofile(tmp_path / "val.bin")
    dataset = TokenDataset(tmp_path / "val.bin", 9, 8)
    torch.manual_seed(0)
    module = TrainingModule(SimpleLLM(9, 8, 16, 1, causal=True, dropout=0.5))
    loss, tokens = loop.evaluate(engine_of(module), val_loader(dataset, batch_size=5, max_batches=99))
    assert tokens == 12 * 8  # in batches of 5, 5 and 2
    assert module.training
    module.eval()
    inputs, targets = dataset.__getitems__(list(range(0, 96, 8)))
    assert loss == pytest.approx(module(inputs, targets).item(), rel=1e-6)


def test_on_step_is_told_each_step_before_it_begins(text: Path, tmp_path: Path, monkeypatch) -> None:
    config = small(steps=3, dropout=0.1)
    train(config, tmp_path / "plain", [text], progress=False)
    seen = []

    def fit(engine: Any, model: SimpleLLM, *args: Any, **options: Any) -> loop.Fitted:
        def on_step(step: int) -> None:
            seen.append((step, [float(weight.detach().double().sum()) for weight in model.parameters()]))
            torch.rand(step)

        return loop.fit(engine, model, *args, **options, on_step=on_step)

    monkeypatch.setattr(trainer, "fit", fit)
    train(config, tmp_path / "out", [text], progress=False)
    assert [step for step, _ in seen] == [1, 2, 3]
    assert len({str(weights) for _, weights in seen}) == 3  # a step's work is done when the next one is announced
    assert history(tmp_path / "out") == history(tmp_path / "plain")  # and what was drawn meanwhile changed nothing


# What is recorded


def test_metrics_table_picture_and_samples(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(small(steps=25, log_interval=10, eval_interval=10), out, [text], progress=False)
    lines = read_metrics(out / "metrics.jsonl")
    for line in lines:
        if line["split"] == "train":
            assert line["wait_s"] > 0
            assert 0 < line["peak_fraction"] < 1
            assert line["skipped"] == 0
    rows = (out / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + len(lines)
    assert {"step", "train/loss", "val/loss", "train/grad_norm"} <= set(rows[0].split(","))
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [10, 20, 25]
    assert all(len(sample["text"].split()) == 3 for sample in samples)
    assert (out / "loss_curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_peak_measured_too_low_is_raised_by_what_training_reaches(text, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Engine, "peak_flops", lambda self, precision: 1.0)
    train(small(steps=8, log_interval=2), tmp_path / "out", [text])
    lines = [line for line in read_metrics(tmp_path / "out" / "metrics.jsonl") if line["split"] == "train"]
    assert len(lines) > 3
    assert all(0 < line["peak_fraction"] <= 1 for line in lines)
    assert lines[0]["peak_fraction"] == 1
    shown = [int(percent) for percent in re.findall(r"(\d+)% of peak", capsys.readouterr().err)]
    assert shown
    assert max(shown) <= 100


def test_the_picture_is_refreshed_while_it_trains(text: Path, tmp_path: Path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(recorder, "plot_run", lambda *args, **options: drawn.append(1))
    monkeypatch.setattr(recorder, "_PICTURE_SHARE", math.inf)
    train(small(steps=25, eval_interval=10), tmp_path / "out", [text], progress=False)
    assert len(drawn) == 3


def test_tensorboard(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(small(steps=3, tensorboard=True), tmp_path / "out", [text], progress=False)
    assert list((tmp_path / "out" / "tensorboard").glob("events.out.*"))


# What ends it


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_was_trained(number: int, text: Path, tmp_path: Path, change_loss) -> None:
    def change(step: int, loss: torch.Tensor) -> torch.Tensor:
        if step == 7:
            os.kill(os.getpid(), number)
        return loss

    change_loss(change)
    before = signal.getsignal(number)
    result = train(small(steps=1000), tmp_path / "out", [text], progress=False)
    assert signal.getsignal(number) is before
    assert result.interrupted
    assert (result.signal, result.steps) == (number, 7)
    assert losses(tmp_path / "out")[-1] > 0
    assert set(os.listdir(tmp_path / "out")) == RUN - {"loss_curve.png", "samples.jsonl"}
    assert list(checkpoints(tmp_path / "out")) == [7]
    ids = torch.tensor([[0, 1, 2]])
    assert torch.equal(load_run(tmp_path / "out").model(ids), result.model(ids))


def test_a_second_signal_acts_as_ever() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored
    try:
        with noting_signals() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.number == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_loss_that_is_not_finite_costs_its_step_only(text: Path, tmp_path: Path, change_loss, capsys) -> None:
    """The step is left out; the next ones have their own windows and rate."""
    change_loss(lambda step, loss: loss * math.nan if step in (4, 5, 9) else loss)
    train(small(steps=12, log_interval=3, max_skipped_steps=2), tmp_path / "out", [text])
    lines = [line for line in read_metrics(tmp_path / "out" / "metrics.jsonl") if line["split"] == "train"]
    assert [(line["step"], line["skipped"]) for line in lines] == [(1, 0), (3, 0), (6, 2), (9, 1), (12, 0)]
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "out"))
    assert "step 5: the loss or the gradient is not finite; the step is skipped" in capsys.readouterr().err
    assert all(bool(p.isfinite().all()) for p in load_run(tmp_path / "out").model.parameters())


def test_divergence_stops_and_keeps_the_last_good_weights(text: Path, tmp_path: Path, change_loss) -> None:
    change_loss(lambda step, loss: loss * math.inf if step > 15 else loss)
    with pytest.raises(FloatingPointError, match=r"4 steps in a row, up to step 19.*lr was 0.01.*of step 18"):
        train(small(steps=100, eval_interval=9, max_skipped_steps=3), tmp_path / "out", [text], progress=False)
    model = load_run(tmp_path / "out").model
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


# What a full disk does


@pytest.mark.parametrize("stop", [False, True])
def test_a_full_disk_leaves_the_last_checkpoint(
    stop: bool, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    real = checkpoint.save_file

    def save(tensors: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        real(tensors, path, **options)
        if path.name == "optimizer.safetensors" and path.parent.name != ".step-00000010.tmp":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", save)
    out = tmp_path / "out"
    config = small(steps=30, eval_interval=10, stop_on_save_error=stop)
    if stop:
        with pytest.raises(OSError, match=r"checkpoint of step 20 could not be written.*No space left.*of step 10"):
            train(config, out, [text])
    else:
        assert train(config, out, [text]).steps == 30
        assert "checkpoint of step 30 could not be written" in capsys.readouterr().err
    assert list(checkpoints(out)) == [10]
    assert sorted(os.listdir(out / "checkpoints")) == ["step-00000010"]  # and nothing half-written
    assert load_run(out).config["training"]["steps"] == 30
    assert history(out)[0][0] == 1


def test_metrics_that_cannot_be_written_are_said_once(text: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def fail(*args: object, **options: object) -> float:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(recorder.MetricsLogger, "log_metrics", fail)
    monkeypatch.setattr(recorder, "plot_run", fail)
    assert train(small(steps=30, eval_interval=10), tmp_path / "out", [text]).steps == 30
    assert capsys.readouterr().err.count("not everything about this training can be written") == 1
    assert max(checkpoints(tmp_path / "out")) == 30
