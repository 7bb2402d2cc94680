"""Tests of how run folders are described, and of the commands `tinyllm runs` and `tinyllm plot`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import environment
from tinyllm import cli
from tinyllm._internal import locks
from tinyllm._internal.locks import owned
from tinyllm._internal.words import short_number
from tinyllm.config.model import SimpleLLMConfig
from tinyllm.config.saved import read_config
from tinyllm.model import SimpleLLM
from tinyllm.runs.listing import count_parameters, describe_run, find_runs, run_names

MODEL = {"vocab_size": 11, "embedding_dim": 6, "hidden_dim": 7, "num_layers": 2}
PNG = b"\x89PNG\r\n\x1a\n"


def line(step: int, split: str = "train", loss: float | None = 2.5, **more: Any) -> dict[str, Any]:
    return {"step": step, "split": split, "loss": loss, "lr": 1e-3, "tokens_per_s": 10.0, "elapsed_s": step, **more}


def make(folder: Path, metrics: list[dict[str, Any]] | None = None, *, steps: Any = 20, age: float = 0) -> Path:
    """Make a run folder whose last line is `age` seconds old."""
    folder.mkdir(parents=True)
    training = {"preset": "tiny", "steps": steps, "batch_size": 2, "seq_len": 8}
    (folder / "config.json").write_text(json.dumps({"model": MODEL, "training": training, "data": {"name": "a text"}}))
    if metrics is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
        if any(line["step"] == steps for line in metrics):
            (folder / "model.safetensors").touch()
    for path in folder.iterdir():
        os.utime(path, (time.time() - age,) * 2)
    return folder


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return a function that runs the command line in `tmp_path`: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["tinyllm", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.app()
        return exit.value.code, *capsys.readouterr()

    return run


# Describing


def test_a_finished_run(tmp_path: Path) -> None:
    metrics = [line(1), line(10, tokens_per_s=30.0), line(10, "val", 1.5), line(20, tokens_per_s=20.0)]
    run = make(tmp_path / "a", [*metrics, line(20, "val", 1.75, elapsed_s=33.5)], age=1000)
    found = describe_run(run)
    assert (found.path, found.state, found.problem, found.preset) == (run, "finished", None, "tiny")
    assert (found.step, found.steps, found.tokens_per_s, found.elapsed_s) == (20, 20, 20.0, 33.5)
    assert (found.val_loss, found.best_val_loss, found.best_step) == (1.75, 1.5, 10)
    assert found.when == pytest.approx(time.time() - 1000, abs=60)
    assert json.loads(json.dumps(found.to_dict()))["path"] == str(run)
    assert datetime.fromisoformat(found.to_dict()["when"]).timestamp() == pytest.approx(found.when, abs=1)


def test_checkpoints_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> dict[int, Path]:
        raise PermissionError(folder)

    monkeypatch.setattr("tinyllm.runs.listing.checkpoints", refuse)
    assert describe_run(make(tmp_path / "a", [{"step": 1, "split": "val", "loss": 1.0}])).state == "killed"


def test_a_run_without_validation_or_numbers(tmp_path: Path) -> None:
    (found,) = [describe_run(make(tmp_path / "a", [{"step": 1, "split": "val", "loss": None}]))]
    assert (found.step, found.val_loss, found.best_val_loss, found.tokens_per_s) == (1, None, None, None)


@pytest.mark.parametrize(
    ("metrics", "saved", "state"),
    [
        ([line(1), line(10)], False, "killed"),
        ([line(1), line(10)], True, "interrupted"),
        ([line(20)], True, "finished"),
        ([line(20)], False, "killed"),  # before it was saved
        ([], False, "killed"),
        (None, True, "killed"),
    ],
)
def test_states(metrics: Any, saved: bool, state: str, tmp_path: Path) -> None:
    run = make(tmp_path / "a", metrics, age=300)
    if saved:
        (run / "model.safetensors").touch()
    else:
        (run / "model.safetensors").unlink(missing_ok=True)
    assert describe_run(run).state == state
    (run / locks.LOCK_FILE).touch()  # of a killed owner
    assert describe_run(run).state == state
    with owned(run, "trained"):
        assert describe_run(run).state == "running"
    assert describe_run(run).state == state


def test_a_state_that_nobody_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    run = make(tmp_path / "a", [line(10)])
    with owned(run, "trained"):
        assert describe_run(run).state == "running?"
    assert describe_run(run).state == "killed"


@pytest.mark.parametrize(("step", "state"), [(10, "interrupted"), (9, "killed")])
def test_checkpoints_are_saves(step: int, state: str, tmp_path: Path) -> None:
    run = make(tmp_path / "a", [line(1), line(10)], age=300)
    for number in (2, step):
        (run / "checkpoints" / f"step-{number:08}").mkdir(parents=True)
    (run / "checkpoints" / "step-best").mkdir()
    assert describe_run(run).state == state


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", '{"model": {', "config.json is not JSON, or is truncated"),
        ("config.json", "[]", 'has no "model" object'),
        ("config.json", '{"model": {}, "training": 3}', 'has no "training" object'),
        ("config.json", '{"model": {}, "training": {"steps": "all"}}', "does not say how many steps"),
        ("metrics.jsonl", "half\n", "metrics.jsonl, line 1, is not JSON"),
    ],
)
def test_broken_runs_are_described_as_such(name: str, content: str | None, problem: str, tmp_path: Path) -> None:
    run = make(tmp_path / "a", [line(1)])
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content)
    found = describe_run(run)
    assert found.state == "broken"
    assert problem in str(found.problem)
    assert find_runs([tmp_path]) == [run]


@pytest.mark.parametrize("config", [None, "[]", '{"architectures": ["GPT2LMHeadModel"]}', '{"model": {'])
def test_other_folders_are_no_runs(config: str | None, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert find_runs([tmp_path]) == []


def test_finding(tmp_path: Path) -> None:
    wanted = [make(tmp_path / name, []) for name in ("a/b-2", "b", "b/inner", "c")]
    make(tmp_path / ".hidden" / "d", [])
    (tmp_path / "circle").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "again").symlink_to(wanted[-1], target_is_directory=True)
    (tmp_path / "notes.txt").write_text("mine")
    expected = [tmp_path / name for name in ("a/b-2", "again", "b")]  # c is again, inner is b's own
    assert find_runs([tmp_path]) == expected
    assert find_runs([wanted[1], tmp_path / "a", wanted[1]]) == [wanted[1], wanted[0]]
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(NotADirectoryError, match=r"notes.txt is a file"):
        find_runs([tmp_path / "notes.txt"])


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("num_heads", "position"), [(1, "sinusoidal"), (2, "learned")])
def test_parameters_are_counted_without_the_model(
    num_heads: int, position: str, bias: bool, norm_first: bool, tie_embeddings: bool
) -> None:
    switches = {"bias": bias, "norm_first": norm_first, "tie_embeddings": tie_embeddings}
    config = SimpleLLMConfig(**MODEL, num_heads=num_heads, position=position, max_seq_len=5, **switches)
    assert count_parameters(config.to_dict()) == SimpleLLM.from_config(config).num_parameters()


def test_parameters_that_nobody_knows() -> None:
    assert count_parameters({}) is None
    assert count_parameters({**MODEL, "hidden_dim": "wide"}) is None
    assert count_parameters(MODEL) == SimpleLLM.from_config(SimpleLLMConfig(**MODEL)).num_parameters()


def test_names_are_as_short_as_tells_them_apart() -> None:
    assert run_names(["/runs/a", "/runs/b"]) == ["a", "b"]
    assert run_names(["/x/1/a", "/x/2/a", "/y/1/a", "/x/b"]) == ["x/1/a", "2/a", "y/1/a", "b"]
    assert run_names(["/a", "/x/a"]) == ["/a", "x/a"]


def test_short_numbers() -> None:
    numbers = [0, 7, 999, 999.7, 1234, 999_600, 1.5e6, 175e9, 2e12]
    assert [short_number(number) for number in numbers] == ["0", "7", "999", "1k", "1.23k", "1M", "1.5M", "175G", "2T"]


def test_missing_configs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no run folder .*nowhere"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        read_config(tmp_path)


# tinyllm runs


def test_the_table(here: Any, tmp_path: Path) -> None:
    make(tmp_path / "runs" / "tiny-1", [line(1000), line(1000, "val", 1.25)], steps=1000, age=500)
    make(tmp_path / "runs" / "tiny-2", [line(5)], age=1000)
    make(tmp_path / "runs" / "tiny-3", [line(5)], steps=None, age=2000)
    status, out, err = here("runs")
    assert (status, err) == (0, "")
    rows = [row.split() for row in out.splitlines()]
    assert rows[0] == ["run", "preset", "parameters", "steps", "loss", "best", "tokens/s", "when", "state"]
    when = datetime.fromtimestamp(describe_run(tmp_path / "runs" / "tiny-1").when or 0)
    day, minute = when.strftime("%Y-%m-%d %H:%M").split()
    assert rows[1] == ["runs/tiny-1", "tiny", "637", "1,000/1,000", "1.250", "1.250", "10", day, minute, "finished"]
    assert rows[2][:4] + rows[2][-1:] == ["runs/tiny-2", "tiny", "637", "5/20", "killed"]
    assert rows[3][0] + rows[3][-1] == "runs/tiny-3broken"
    assert out.splitlines()[-1].startswith("runs/tiny-3 is broken: runs/tiny-3/config.json does not say how many steps")


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 100, 200])
def test_the_table_fits_the_terminal(columns: int, here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "runs" / "a", [line(20), line(20, "val", 1.25)])
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = here("runs", "--sort", "speed")
    assert max(map(len, out.splitlines())) <= columns
    if columns >= 40:
        assert "runs/a" in out
        assert "finished" in out
        assert "tokens/s" in out  # what it is sorted by stays
    assert ("preset" in out) == (columns >= 80)


def test_sorting(here: Any, tmp_path: Path) -> None:
    make(tmp_path / "runs" / "a", [line(20), line(10, "val", 1.0), line(20, "val", 3.0)], age=100)
    make(tmp_path / "runs" / "b", [line(12, tokens_per_s=99.0), line(12, "val", 2.0)], age=50)
    make(tmp_path / "runs" / "c", [line(4, tokens_per_s=5.0)], age=200)

    def order(*options: str) -> str:
        return "".join(Path(run["path"]).name for run in json.loads(here("runs", "--json", *options)[1]))

    assert order() == "bac"
    by = {"when": "bac", "name": "abc", "loss": "bac", "best": "abc", "steps": "abc", "speed": "bac"}
    assert {key: order("--sort", key) for key in by} == by


def test_runs_elsewhere_or_nowhere(here: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make(tmp_path / "x" / "y", [])
    assert here("runs", "empty") == (0, "No runs below empty.\n", "")
    assert here("runs", "empty", "--json") == (0, "[]\n", "")
    assert "x/y" in here("runs", "empty", "x")[1]
    assert "x/y" in here("runs", "x/y")[1]
    status, _, err = here("runs")
    assert status == 2
    assert err == "tinyllm: error: there is no folder runs; tinyllm train makes runs, in runs/ if not told where\n"


def test_listing_runs_does_not_import_torch(tmp_path: Path) -> None:
    make(tmp_path / "a", [line(1)])
    code = "import sys, tinyllm.cli; tinyllm.cli.app(['runs', sys.argv[1]], standalone_mode=False); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment(), capture_output=True, text=True, check=True
    )
    assert "1/20" in done.stdout
    assert not {"torch", "numpy", "matplotlib"} & set(done.stdout.split())


# tinyllm plot


def test_one_run_is_drawn_into_its_folder(here: Any, tmp_path: Path) -> None:
    run = make(tmp_path / "runs" / "a", [line(1), line(20, "val")])
    (run / "loss_curve.png").write_bytes(b"the training's")
    for options in ([], ["--x", "tokens"], [run]):
        assert here("plot", "runs/a", *options) == (0, "Drawn: runs/a/loss_curve.png\n", "")
        assert (run / "loss_curve.png").read_bytes().startswith(PNG)
    assert here("plot", "runs/a", "--out", "b.svg", "--x", "time")[0] == 0
    assert (tmp_path / "b.svg").read_text().startswith("<?xml")


def test_several_runs_are_compared(here: Any, tmp_path: Path) -> None:
    for name in "ab":
        make(tmp_path / name, [line(1), line(20, "val")])
    for _ in range(2):  # its own picture it may replace
        assert here("plot", "a", "b", "--split", "val") == (0, "Drawn: comparison.png\n", "")
    assert (tmp_path / "comparison.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    "options", [["a", "b"], ["a", "b", "--out", "comparison.png"], ["a", "--out", "comparison.png"]]
)
def test_a_foreign_file_stays(options: list[str], here: Any, tmp_path: Path) -> None:
    for name in "ab":
        make(tmp_path / name, [line(1)])
    (tmp_path / "comparison.png").write_bytes(b"mine")
    status, _, err = here("plot", *options)
    assert status == 2
    assert err.startswith("tinyllm: error: --out comparison.png is there, and tinyllm did not draw it")
    assert (tmp_path / "comparison.png").read_bytes() == b"mine"
    assert here("plot", *options, "--overwrite")[0] == 0
    assert (tmp_path / "comparison.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["nowhere"], "there is no run folder nowhere"),
        (["a", "nowhere"], "there is no run folder nowhere"),
        (["a", "--out", "p.gif"], "out is 'p.gif'; allowed are names that end in .png, .svg, .pdf"),
        (["a", "--x", "epochs"], "'--x'"),
        ([], "RUN"),
    ],
)
def test_bad_plots(options: list[str], reason: str, here: Any, tmp_path: Path) -> None:
    make(tmp_path / "a", [line(1)])
    status, _, err = here("plot", *options)
    assert status == 2
    assert reason in err
