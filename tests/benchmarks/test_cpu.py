"""The commands of a CPU measure the rows that they are asked for. How fast anything is, no test says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cpu, measure, model_speed, report
from benchmarks.row import COMPILED, EAGER, FORWARD, OURS, Target
from benchmarks.rows import rows
from benchmarks.rows.attention import Shape, padding_mask
from tests.helpers.needs import needs_extension
from tinyllm.config.training import TrainConfig
from tinyllm.training.trainer import train


def test_padding_mask() -> None:
    mask = padding_mask(Shape(batch=4, heads=2, seq_len=8, head_dim=1))
    assert mask.shape == (4, 1, 1, 8)
    assert mask.sum(-1).flatten().tolist() == [2, 4, 6, 8]
    assert mask[:, 0, 0, 0].all()


def test_rows_have_names_of_their_own() -> None:
    found = rows(Target(gpu=False))
    assert len({row.name for row in found}) == len(found)
    assert {row.section for row in found} <= {*report.SECTIONS, "length"}


def test_rows_are_chosen_by_their_names() -> None:
    assert [row.name for row in cpu.choose("CAUSAL attention forward b12")] == [
        "causal attention forward B12 H4 T64 D32"
    ]
    assert [row.name for row in cpu.choose("add_layer_norm*768x128")] == [
        "add_layer_norm forward 768x128",
        "add_layer_norm backward 768x128",
    ]
    assert "length" not in {row.section for row in cpu.choose(quick=True)}
    assert {row.section for row in cpu.choose("over T", quick=True)} == {"length"}


@needs_extension
def test_a_pattern_that_fits_no_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert cpu.bench("no such row", quick=True) == 1
    assert "No row's name contains 'no such row'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("loads", "quick", "counted"),
    [
        ([0.0], False, 0),
        ([0.5, 0.02], False, 1),
        ([0.5, 0.3, 0.4], False, 1),
        ([0.5], True, 0),
        ([None], False, 0),
    ],
)
def test_a_disturbed_row_is_measured_again(
    loads: list[float | None], quick: bool, counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = rows(Target(gpu=False))[0]
    taken: list[list[str]] = []

    def run(names: list[str], quick: bool, threads: int | None) -> list[dict[str, Any]]:
        stats = {"median": float(len(taken)), "iqr": 0.0, "rounds": 5}
        facts = {**row.facts(), "error": 0.0, "other_load_cores": loads[len(taken)], "peers": {}}
        taken.append(list(names))
        return [{"extra_info": facts, "stats": stats}]

    monkeypatch.setattr(cpu, "_run", run)
    found = cpu.measure([row], quick)
    assert found is not None
    assert [(entry["median_s"], entry["other_load_cores"]) for entry in found] == [(counted, loads[counted])]
    assert taken == [[row.name]] * len(loads)


@needs_extension
def test_one_row_from_end_to_end(tmp_path: Path) -> None:
    kept = [report.README, report.PAGE, *report.RESULTS.glob("*/*.json")]
    before = [path.read_bytes() for path in kept]
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "tinyllm", "bench", "--quick", "--only=causal attention forward B12", "--out", str(out)],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        # One thread, so that a busy machine does not let two wait for each other.
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.read_bytes() for path in kept] == before

    results = json.loads((out / "cpu.json").read_text(encoding="utf-8"))
    assert [row["provider"] for row in results["rows"]] == [OURS, EAGER, COMPILED]
    for row in results["rows"]:
        assert row["benchmark"] == "causal attention forward B12 H4 T64 D32"
        assert row["median_s"] > 0
        assert row["rounds"] >= measure.MIN_ROUNDS
        assert row["error"] < 1e-5
        assert row["rate"] == pytest.approx(row["work"] / row["median_s"] / 1e9, rel=1e-3)
    assert results["rows"][0]["ratios"].keys() == {EAGER, COMPILED}
    assert results["quick"]
    assert results["machine"]["threads"] == 1
    assert results["machine"]["family"]
    assert results["ceilings"]["copy_gb_per_s"] > 0
    assert (out / "cpu-speedups.png").read_bytes().startswith(b"\x89PNG")
    assert report.render_tables(results) in done.stdout


@needs_extension
def test_rows_on_one_thread() -> None:
    found = cpu.measure(cpu.choose(f"add_layer_norm {FORWARD} 768x128"), quick=True, threads=1)
    assert found is not None
    assert {row["benchmark"] for row in found} == {f"add_layer_norm {FORWARD} 768x128"}
    assert {row["threads"] for row in found} == {1}


@needs_extension
def test_options_of_pytest_benchmark(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", str(cpu.BENCH_FILE), "-k", "rms_norm and backward and 768x128"]
    command += ["-p", "no:cacheprovider", f"--rootdir={report.ROOT}", "--override-ini=addopts="]

    def run(*options: str) -> str:
        done = subprocess.run(
            [*command, f"--benchmark-storage=file://{tmp_path}", *options],
            cwd=report.ROOT,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "1 passed" in run("--benchmark-disable")
    run("--benchmark-max-time=0.01", "--benchmark-save=before")
    said = run("--benchmark-max-time=0.01", "--benchmark-compare", "--benchmark-columns=median,rounds")
    assert "(0001_before)" in said
    assert "(NOW)" in said


@needs_extension
def test_model_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.py"
    text.write_text("def add(a, b):\n    return a + b\n\n\n" * 60, encoding="utf-8")
    config = TrainConfig.from_preset("tutorial", tokenizer="char", steps=2, seq_len=8, batch_size=2, device="cpu")
    out = tmp_path / "run"
    train(config, out, [text], progress=False)

    assert model_speed.main(["--run", str(out), "--steps", "2"]) == 0
    table = capsys.readouterr().out
    assert "training, 2 x 8 tokens" in table
    assert table.count("tokens/s") == 4
    assert "speed-up" in table

    assert model_speed.main(["--run", str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err
    path = out / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "training": {"steps": "many"}}))
    assert model_speed.main(["--run", str(out)]) == 2
    assert "config.json" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        model_speed.main(["--run", str(out), "--steps", "0"])
