"""metrics.jsonl: what is written is read again, also when a run was killed or went on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tinyllm.runs.metrics import read_metrics
from tinyllm.training.recorder import MetricsLogger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def write(path: Path, *lines: object) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def line(step: int, split: str = "train", **changes: object) -> dict[str, object]:
    return {
        "step": step,
        "split": split,
        "loss": 2.5,
        "lr": 0.1,
        "tokens_per_s": 10.0,
        "elapsed_s": step / 2,
        **changes,
    }


def log(path: Path, step: int, split: str = "train", resume_step: int | None = None, **values: float) -> None:
    """Log a line as a training does that starts, or goes on after `resume_step`."""
    logger = MetricsLogger(path, resume_step)
    known = {"loss": 1.0, "lr": 0.1, "tokens_per_s": 10.0, **values}
    logger.log_metrics({f"{split}/{name}": value for name, value in known.items()}, step)
    logger.finalize("success")


def test_what_is_written_is_read(path: Path) -> None:
    logger = MetricsLogger(path)
    values = {"train/skipped": 0, "train/grad_norm": 0.5, "train/loss": 2.125, "train/lr": 1e-3}
    logger.log_metrics({**values, "train/tokens_per_s": 5.5}, 1)
    assert len(read_metrics(path)) == 1  # on the disk at once
    logger.log_metrics({"val/loss": 1 / 3, "val/lr": 1e-3, "val/tokens_per_s": 7.0}, 1)
    logger.finalize("success")
    train, val = read_metrics(path)
    assert train == {
        "step": 1,
        "split": "train",
        "loss": 2.125,
        "lr": 1e-3,
        "tokens_per_s": 5.5,
        "elapsed_s": train["elapsed_s"],
        "grad_norm": 0.5,
        "skipped": 0,
    }
    assert list(val) == ["step", "split", "loss", "lr", "tokens_per_s", "elapsed_s"]
    assert val["loss"] == 1 / 3
    assert 0 <= train["elapsed_s"] <= val["elapsed_s"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_null(value: float, path: Path) -> None:
    log(path, 1, loss=value, grad_norm=value)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse)["loss"] is None
    (found,) = read_metrics(path)
    assert (found["loss"], found["grad_norm"]) == (None, None)


def test_nan_of_other_programs_is_read_as_none(path: Path) -> None:
    path.write_text('{"step": 1, "split": "train", "loss": NaN}\n')
    assert read_metrics(path) == [{"step": 1, "split": "train", "loss": None}]


def test_a_new_file_replaces_the_old(path: Path) -> None:
    write(path, line(1))
    log(path, 7)
    assert [found["step"] for found in read_metrics(path)] == [7]


@pytest.mark.parametrize("end", ["", '{"step": 30, "spl', '{"step": 20, "split": "val", "loss": 1.0}', "\0\0\0"])
def test_resuming_keeps_the_lines_up_to_the_step(end: str, path: Path) -> None:
    kept = [line(10, grad_norm=1 / 3), line(10, "val", loss=None), line(20)]
    write(path, *kept, line(30), line(30, "val"))
    path.write_text(path.read_text() + end)
    whole = [json.loads(end)] if end.endswith("}") else []
    MetricsLogger(path, 20).finalize("failed")
    assert read_metrics(path) == [*kept, *whole]  # before anything new is known
    log(path, 21, resume_step=20)
    lines = read_metrics(path)
    assert lines[:-1] == [*kept, *whole]
    assert lines[-1]["step"] == 21
    assert lines[-1]["elapsed_s"] >= 10.0  # after the last line kept, not after line 30
    assert lines[-1]["elapsed_s"] < 15.0
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("content", [None, ""])
def test_resuming_with_nothing_kept(content: str | None, path: Path) -> None:
    if content is not None:
        path.write_text(content)
    log(path, 1, resume_step=0)
    assert [found["step"] for found in read_metrics(path)] == [1]


def test_resuming_changes_nothing_that_it_does_not_understand(path: Path) -> None:
    write(path, line(1), {"time": 3}, line(2))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="line 2, is not a line of metrics"):
        MetricsLogger(path, 5)
    assert path.read_bytes() == before


@pytest.mark.parametrize("end", [b"{", b'{"step": 2, "split"', b'{"step": 2, "split": "\xc3', b" "])
def test_a_last_line_under_way_is_not_counted(end: bytes, path: Path) -> None:
    write(path, line(1))
    path.write_bytes(path.read_bytes() + end)
    assert [found["step"] for found in read_metrics(path)] == [1]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('{"step"', "is not JSON"),
        ("", "is not JSON"),
        ("[1]", r"it is \[1\], not an object"),
        ('{"step": 1, "loss": 2}', 'it has no "split"'),
        ('{"step": 1, "split": "train"}', 'it has no "loss"'),
        ('{"step": 1.5, "split": "train", "loss": 2}', '"step" is 1.5'),
        ('{"step": 1, "split": "test", "loss": 2}', "\"split\" is 'test'; allowed are"),
        ('{"step": 1, "split": "val", "loss": "low"}', "\"loss\" is 'low', not a number"),
        ('{"step": 1, "split": "val", "loss": 2, "elapsed_s": [1]}', '"elapsed_s" is'),
    ],
)
def test_other_bad_lines_are_named(bad: str, reason: str, path: Path) -> None:
    write(path, line(1))
    path.write_text(path.read_text() + bad + "\n")
    with pytest.raises(ValueError, match=f"metrics.jsonl, line 2, .*{reason}"):
        read_metrics(path)


def test_a_missing_file(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        read_metrics(path)
