"""No text of a picture is drawn over another, and what it shows is seen."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.runs.test_plot import line, run_folder
from tinyllm.runs.plot import plot_comparison, plot_run

CHARS = {"preset": "tiny", "tokenizer": "char", "steps": 100, "batch_size": 2, "seq_len": 8}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Return the texts of the figure that was drawn last, and the rectangles that they fill."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    found: list[tuple[str, Any]] = []
    draw, draw_figure = Text.draw, Figure.draw

    def anew(figure: Any, renderer: Any) -> None:  # a figure is drawn twice, the first time to find its layout
        found.clear()
        draw_figure(figure, renderer)

    def noted(text: Any, renderer: Any, *rest: Any, **more: Any) -> None:
        draw(text, renderer, *rest, **more)
        if text.get_visible() and text.get_text():
            found.append((text.get_text(), text.get_window_extent(renderer)))

    monkeypatch.setattr(Figure, "draw", anew)
    monkeypatch.setattr(Text, "draw", noted)
    return found


def overlapping(texts: list[tuple[str, Any]]) -> list[tuple[str, str]]:
    return [
        (one, other)
        for (one, box), (other, its) in itertools.combinations(texts, 2)
        if min(box.x1, its.x1) - max(box.x0, its.x0) > 1 and min(box.y1, its.y1) - max(box.y0, its.y0) > 1
    ]


def metrics(steps: int, interval: int, shift: float = 0.0) -> list[dict[str, Any]]:
    train = [line(step, loss=2 + shift + 8 / step) for step in range(1, steps + 1)]
    return train + [line(step, "val", 2.2 + shift + 8 / step) for step in range(interval, steps + 1, interval)]


@pytest.mark.parametrize("split", ["both", "val", "train"])
@pytest.mark.parametrize("x", ["step", "tokens", "time"])
@pytest.mark.parametrize("names", [("a", "b"), ("long_name_" * 9, "W" * 60, "c"), tuple(map(str, range(40)))])
def test_no_text_of_a_comparison_is_drawn_over_another(
    names: tuple[str, ...], x: Any, split: Any, tmp_path: Path, drawn: list[tuple[str, Any]]
) -> None:
    runs = []
    for index, name in enumerate(names):  # other tokenizers and texts, and one run without validation
        changes: dict[str, Any] = {"training": CHARS, "data": {"name": "another"}} if index % 2 else {}
        runs.append(run_folder(tmp_path / name, metrics(40, 41 if index == 1 else 10, index / 9), **changes))
    plot_comparison(runs, tmp_path / "p.png", x=x, split=split)
    shown = dict(drawn)
    note = shown["The tokenizers and texts differ:\nthese losses do not compare."]
    legend = shown["with the last loss" + ";\nthin: training, smoothed" * (split == "both")]
    assert note.x1 < legend.x0  # below which lie the legend's lines
    assert overlapping(drawn) == []
    for text, box in drawn:  # 150 dots an inch
        assert 0 <= box.x0 < box.x1 <= 9.5 * 150, text
        assert box.y0 >= 0, text


def test_nor_of_a_runs_picture(tmp_path: Path, drawn: list[tuple[str, Any]]) -> None:
    run = run_folder(tmp_path / "run", [*metrics(300, 20), line(301, loss=1e6), line(302, loss=None, skipped=3)])
    plot_run(run / "metrics.jsonl", tmp_path / "p.png", title="W" * 90)
    assert len(drawn) > 20
    assert overlapping(drawn) == []


def test_the_training_that_led_to_a_single_validation_is_seen(tmp_path: Path, monkeypatch) -> None:
    from tinyllm.runs import plot

    figures: list[Any] = []
    monkeypatch.setattr(plot, "_save", lambda figure, out: figures.append(figure))
    runs = [run_folder(tmp_path / name, metrics(40, 40)) for name in "ab"]
    plot_comparison(runs, tmp_path / "p.png")
    low, high = figures[0].axes[0].get_ylim()
    assert low < 2 + 8 / 40  # where the training ends
    assert high > 3
