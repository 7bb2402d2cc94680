"""Pictures of runs: what is in them, on which scale, and where they go."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.runs import environment
from tinyllm.runs import plot
from tinyllm.runs.plot import compared_limits, limits, plot_comparison, plot_run, running_median, smooth

FIRST_BYTES = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml", ".pdf": b"%PDF"}


def line(step: int, split: str = "train", loss: float | None = None, **more: Any) -> dict[str, Any]:
    known = {"lr": 1e-3, "tokens_per_s": 1000.0, "elapsed_s": step / 10}
    return {"step": step, "split": split, "loss": 2 + 8 / step if loss is None else loss, **known, **more}


def lines(steps: int, val: bool = True, shift: float = 0.0) -> list[dict[str, Any]]:
    train = [line(step, loss=2 + shift + 8 / step) for step in range(1, steps + 1)]
    return [*train, line(steps, "val", 2.25 + shift)] if val else train


def run_folder(path: Path, metrics: list[dict[str, Any]], **changes: Any) -> Path:
    path.mkdir(parents=True)
    training = {"preset": "tiny", "tokenizer": "bpe", "steps": 100, "batch_size": 2, "seq_len": 8}
    config = {"model": {"vocab_size": 9}, "training": training, "data": {"name": "a text"}, **changes}
    (path / "config.json").write_text(json.dumps(config))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return path


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the figures that are drawn, in place of saving them."""
    drawn: list[Any] = []
    monkeypatch.setattr(plot, "_save", lambda figure, out: drawn.append(figure))
    return drawn


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


# One run


@pytest.mark.parametrize("suffix", list(FIRST_BYTES))
@pytest.mark.parametrize("steps", [0, 1, 2, 6, 300])
def test_a_run_of_any_length(steps: int, suffix: str, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", lines(steps) if steps else [])
    out = tmp_path / f"picture{suffix}"
    plot_run(run / "metrics.jsonl", out, title="a title with $ and _")
    assert out.read_bytes().startswith(FIRST_BYTES[suffix])
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, "run"]


def test_the_same_numbers_give_the_same_picture(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", lines(9))
    for name in "ab":
        plot_run(run / "metrics.jsonl", tmp_path / f"{name}.png", title="")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_three_panels_share_the_x_axis(tmp_path: Path, figures: list[Any]) -> None:
    run = run_folder(tmp_path / "run", lines(50))
    plot_run(run / "metrics.jsonl", tmp_path / "p.png", title="")
    loss, rate, speed = figures[0].axes
    assert [axes.get_title(loc="left") for axes in (loss, rate, speed)] == [
        "Loss, nats per token",
        "Learning rate",
        "Throughput, tokens/s",
    ]
    assert loss.get_xlim() == rate.get_xlim() == speed.get_xlim()
    assert loss.get_xlim()[1] >= 50
    assert loss.texts[0].get_text() == "2.25"
    assert rate.texts[0].get_text() == "1e-3"
    assert speed.get_title(loc="right") == "median 1k"


@pytest.mark.parametrize(
    ("x", "last", "label"), [("step", 600, "step"), ("tokens", 600 * 16, "tokens"), ("time", 60, "time, seconds")]
)
def test_x(x: Any, last: float, label: str, tmp_path: Path, figures: list[Any]) -> None:
    run = run_folder(tmp_path / "run", lines(600))
    plot_run(run / "metrics.jsonl", tmp_path / "p.png", title="", x=x, tokens_per_step=16)
    plot_comparison([run], tmp_path / "p.png", x=x)
    for figure in figures:
        axes = figure.axes[-1]
        assert axes.get_xlabel() == label
        assert max(line.get_xdata().max() for line in axes.lines) == pytest.approx(last)


def test_long_times_are_in_hours(tmp_path: Path, figures: list[Any]) -> None:
    run = run_folder(tmp_path / "run", [line(step, elapsed_s=step * 3600.0) for step in range(1, 11)])
    plot_run(run / "metrics.jsonl", tmp_path / "p.png", title="", x="time")
    axes = figures[0].axes[-1]
    assert axes.get_xlabel() == "time, hours"
    ticks = axes.get_xticks()
    assert [axes.xaxis.get_major_formatter()(tick, 0) for tick in ticks] == [f"{tick / 3600:g}" for tick in ticks]
    assert 10 * 3600 in ticks


def test_lines_of_older_versions_and_without_a_loss(tmp_path: Path, figures: list[Any]) -> None:
    old = [{"step": 1, "split": "train", "loss": 3.0}, {"step": 2, "split": "train", "loss": None, "lr": None}]
    run = run_folder(tmp_path / "run", old)
    for x in ("step", "time"):
        plot_run(run / "metrics.jsonl", tmp_path / "p.png", title="", x=x)  # type: ignore[arg-type]
    loss, rate, speed = figures[0].axes
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training, smoothed", "skipped steps"]
    assert [axes.texts[0].get_text() for axes in (rate, speed)] == ["nothing yet", "nothing yet"]
    assert [axes.texts[0].get_text() for axes in figures[1].axes] == ["nothing yet"] * 3


def test_what_train_lines_know_more_is_told(tmp_path: Path, figures: list[Any]) -> None:
    more = {"peak_fraction": 0.31, "wait_s": 0.01, "grad_norm": 1.0}
    run = run_folder(tmp_path / "run", [line(step, skipped=int(step == 7), **more) for step in range(1, 21)])
    plot_run(run / "metrics.jsonl", tmp_path / "p.png", title="")
    loss, _, speed = figures[0].axes
    assert speed.get_title(loc="right") == "median 1k, 31% of peak, 10.0% waiting for data"
    skipped = next(line for line in loss.lines if line.get_label() == "skipped steps")
    assert list(skipped.get_xdata()) == [7]


def test_spikes_do_not_decide_the_scale(tmp_path: Path, figures: list[Any]) -> None:
    metrics = lines(300)
    metrics[150] = line(151, loss=500.0)
    metrics[222] = line(223, loss=90.0)
    plot_run(run_folder(tmp_path / "run", metrics) / "metrics.jsonl", tmp_path / "p.png", title="")
    loss = figures[0].axes[0]
    assert 10 <= loss.get_ylim()[1] < 12
    beyond = next(line for line in loss.lines if line.get_label() == "up to 500")
    assert list(beyond.get_xdata()) == [151, 223]
    strong = next(line for line in loss.lines if line.get_label() == "training, smoothed")
    assert strong.get_ydata()[140:160].max() < 2.1


@pytest.mark.parametrize("bad", ["p.jpg", "p", "png"])
def test_other_pictures_are_refused(bad: str, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", lines(3))
    for draw in (lambda: plot_run(run / "metrics.jsonl", bad, title=""), lambda: plot_comparison([run], bad)):
        with pytest.raises(ValueError, match=f"out is '{bad}'; allowed are names that end in .png, .svg, .pdf"):
            draw()


def test_bad_axes(tmp_path: Path) -> None:
    metrics = run_folder(tmp_path / "run", lines(3)) / "metrics.jsonl"
    with pytest.raises(ValueError, match="x is 'epoch'; allowed are 'step', 'tokens' and 'time'"):
        plot_run(metrics, tmp_path / "p.png", title="", x="epoch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x is 'tokens', but .*metrics.jsonl has is not known"):
        plot_run(metrics, tmp_path / "p.png", title="", x="tokens")
    with pytest.raises(ValueError, match="split is 'test'; allowed are 'val', 'train' and 'both'"):
        plot_comparison([metrics.parent], tmp_path / "p.png", split="test")  # type: ignore[arg-type]


def test_neither_pyplot_nor_a_display_is_needed(tmp_path: Path) -> None:
    metrics = run_folder(tmp_path / "run", lines(3)) / "metrics.jsonl"
    code = (
        "import sys; from tinyllm.runs.plot import plot_run; assert 'matplotlib' not in sys.modules; "
        "plot_run(*sys.argv[1:], title=''); assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(metrics), str(tmp_path / "p.png")]
    subprocess.run(command, env=environment(), check=True)
    assert (tmp_path / "p.png").exists()


# Several


def test_a_comparison_names_its_runs_by_their_last_loss(tmp_path: Path, figures: list[Any]) -> None:
    runs = [
        run_folder(tmp_path / "a" / "tiny-1", lines(20)),
        run_folder(tmp_path / "b" / "tiny-1", lines(20, shift=1)),
        run_folder(tmp_path / "b" / "_$hidden$", lines(20, val=False)),
        run_folder(tmp_path / "b" / "new", []),
    ]
    plot_comparison([*runs, runs[0]], tmp_path / "p.png")
    names = [label.replace("\u2007", "").strip() for label in legend(figures[0])]
    assert names == ["3.250  b/tiny-1", "2.400  _$hidden$ (training)", "2.250  a/tiny-1", "new: nothing yet"]
    colours = [line.get_color() for line in figures[0].legends[0].get_lines()]
    assert len(set(colours)) == 4
    assert figures[0].axes[0].get_title(loc="left") == "Validation loss"


def test_splits(tmp_path: Path, figures: list[Any]) -> None:
    runs = [run_folder(tmp_path / name, lines(20)) for name in "ab"]
    for split in ("val", "train", "both"):
        plot_comparison(runs, tmp_path / "p.png", split=split)  # type: ignore[arg-type]
    assert [len(figure.axes[0].lines) for figure in figures] == [2, 2, 4]
    assert [figure.axes[0].get_title(loc="left") for figure in figures] == [
        "Validation loss",
        "Training loss, smoothed",
        "Validation loss",
    ]
    assert len(figures[0].axes[0].lines[0].get_xdata()) == 1
    assert len(figures[1].axes[0].lines[0].get_xdata()) == 20


def test_losses_that_do_not_compare_are_told(tmp_path: Path, figures: list[Any]) -> None:
    training = {"preset": "tiny", "tokenizer": "char", "steps": 100, "batch_size": 2, "seq_len": 8}
    same = [run_folder(tmp_path / name, lines(9)) for name in "ab"]
    other = run_folder(tmp_path / "c", lines(9), training=training, data={"name": "another"})
    plot_comparison(same, tmp_path / "p.png")
    plot_comparison([*same, other], tmp_path / "p.png")
    assert [text.get_text() for text in figures[0].axes[0].texts] == []
    assert [text.get_text() for text in figures[1].axes[0].texts] == [
        "The tokenizers and texts differ:\nthese losses do not compare."
    ]


def test_many_runs_are_told_apart(tmp_path: Path, figures: list[Any]) -> None:
    runs = [run_folder(tmp_path / f"run-{index}", lines(5, shift=index)) for index in range(28)]
    plot_comparison(runs, tmp_path / "p.png")
    shown = {(line.get_color(), str(line._unscaled_dash_pattern)) for line in figures[0].legends[0].get_lines()}
    assert len(shown) == 28


@pytest.mark.parametrize("suffix", list(FIRST_BYTES))
def test_a_comparison_is_written(suffix: str, tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / name, lines(9)) for name in ("a", "a_long_name_" * 9)]
    out = tmp_path / f"picture{suffix}"
    plot_comparison(runs, out)
    assert out.read_bytes().startswith(FIRST_BYTES[suffix])
    assert plot.is_ours(out)


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    empty = run_folder(tmp_path / "empty", [])
    with pytest.raises(ValueError, match="runs is empty"):
        plot_comparison([], tmp_path / "p.png")
    with pytest.raises(ValueError, match=r"nothing to draw yet: no loss in .*empty"):
        plot_comparison([empty], tmp_path / "p.png")
    with pytest.raises(FileNotFoundError, match=r"no run folder .*nowhere"):
        plot_comparison([empty, tmp_path / "nowhere"], tmp_path / "p.png")
    (empty / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1"):
        plot_comparison([empty], tmp_path / "p.png")
    (empty / "metrics.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"metrics.jsonl"):
        plot_comparison([empty], tmp_path / "p.png")
    broken = run_folder(tmp_path / "broken", lines(3), training={"preset": "tiny"})
    with pytest.raises(ValueError, match=r"how many tokens a step of .*broken has is not known"):
        plot_comparison([broken], tmp_path / "p.png", x="tokens")
    assert not (tmp_path / "p.png").exists()


def test_whose_a_picture_is(tmp_path: Path) -> None:
    (tmp_path / "foreign.png").write_bytes(FIRST_BYTES[".png"] + b"of others")
    assert not plot.is_ours(tmp_path / "foreign.png")
    assert not plot.is_ours(tmp_path)
    assert plot.is_ours(tmp_path / "nothing.png")


# The numbers behind


@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 40, 1000])
def test_a_straight_line_stays_one_and_a_spike_goes(count: int) -> None:
    values = np.linspace(9, 2, count)
    np.testing.assert_allclose(smooth(values), values, atol=0.15)  # an average lags by a fiftieth of the picture
    if count > 6:
        spike = values.copy()
        spike[count // 2] = 500
        np.testing.assert_allclose(smooth(spike), values, atol=0.2)


def test_smoothing_is_an_exponential_moving_average() -> None:
    values = np.repeat([3.0, 5.0], 500)
    keep = 1 - 50 / 1000
    since = np.arange(1, 401)
    np.testing.assert_allclose(smooth(values)[500:900], 5 - 2 * keep**since, atol=1e-6)
    noise = np.random.default_rng(0).normal(size=1000)
    assert smooth(3 + noise)[30:].std() < 0.3
    assert abs(smooth(3 + noise)[-1] - 3) < 0.5


@pytest.mark.parametrize("count", [0, 1, 30, 1000])
def test_a_sudden_change_of_speed_stays_sudden(count: int) -> None:
    speeds = np.array([9.0] * count + [4.0] * count)
    reach = count // 25
    assert np.array_equal(running_median(speeds, reach), speeds)
    if count == 1000:
        speeds[20::50] = 1.0  # a line now and then that waited for a disk
        assert set(running_median(speeds, reach)) == {9.0, 4.0}


def test_a_speed_that_halves_is_in_the_picture(tmp_path: Path, figures: list[Any]) -> None:
    metrics = [line(step, tokens_per_s=9000.0 if step < 45 else 3600.0) for step in range(1, 101)]
    metrics[70]["tokens_per_s"] = 1e9  # a clock that was set
    plot_run(run_folder(tmp_path / "run", metrics) / "metrics.jsonl", tmp_path / "p.png", title="")
    assert 9000 < figures[0].axes[2].get_ylim()[1] < 20_000


@pytest.mark.parametrize("values", [[], [3.0], [3.0, 3.0], [0.0]])
def test_a_scale_always_has_a_height(values: list[float]) -> None:
    low, high = limits(np.array(values), np.empty(0))
    assert math.isfinite(low)
    assert low < high
    assert compared_limits([], "both") == (0.0, 1.0)


def test_a_long_runs_first_fall_does_not_decide_the_scale() -> None:
    steps = np.arange(1, 2001)
    assert limits(2 + 8 / steps, np.empty(0))[1] < 3
    assert limits(2 + 8 / steps[:100], np.empty(0))[1] >= 10


def test_a_training_that_diverges_is_seen() -> None:
    diverging = np.concatenate([np.linspace(9, 3, 50), np.linspace(3, 40, 50)])
    assert limits(diverging, np.empty(0))[1] >= 40


def test_a_run_that_diverges_leaves_the_others_their_scale(tmp_path: Path, figures: list[Any]) -> None:
    val = [line(step, "val", 3 - step / 100) for step in range(0, 100, 10)]
    worse = [line(step, "val", 3 + step) for step in range(0, 100, 10)]
    runs = [run_folder(tmp_path / name, metrics) for name, metrics in (("a", val), ("b", val), ("c", worse))]
    plot_comparison(runs, tmp_path / "p.png")
    low, high = figures[0].axes[0].get_ylim()
    assert 1.5 < low < 2.1
    assert 3 <= high < 5
