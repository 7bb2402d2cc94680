"""Tables and pictures show what was measured, and only that; the page and the README show what is stored."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import pictures, report, tables
from benchmarks.row import BACKWARD, COMPILED, CUDA, EAGER, FORWARD, OURS, TRITON, Target
from benchmarks.rows import rows
from benchmarks.rows.launch import LAUNCH
from benchmarks.training import SECTIONS
from benchmarks.writers import BF16, FLOAT32, INT4, INT8, PROVIDERS
from tinyllm.ops.backends import hardware

from .made_up import FACTS, TIMES, a_norm, a_row, measured, results_of

GPU = {"name": "Loom 9", "multiprocessors": 4, "memory_gib": 8.0, "cuda": "13", "triton": "3", "capability": "9.0"}


@pytest.fixture
def results() -> dict[str, Any]:
    found = [a_row(headline=True), a_norm()]
    entries = [measured(row, provider, time) for row in found for provider, time in TIMES.items()]
    entries += [measured(a_row(dtype=torch.bfloat16), provider, 1 / 3) for provider in TIMES]
    return results_of(*entries)


# ---- What is stored


def test_the_page_shows_the_stored_results() -> None:
    assert report.PAGE.read_text(encoding="utf-8") == report.render_page(), "run `python -m benchmarks.report`"


def test_the_readme_shows_the_stored_results() -> None:
    readme = report.README.read_text(encoding="utf-8")
    shown = report.replace_block(readme, "headline", report.render_headline())
    shown = report.replace_block(shown, "optimize", report.render_optimize())
    assert shown == readme, "run `python -m benchmarks.report`"


def test_pictures_are_those_of_the_stored_results() -> None:
    page = report.PAGE.read_text(encoding="utf-8")
    found = list(report.PICTURES.glob("*"))
    assert found
    for path in found:
        assert f"({report.PICTURES.name}/{path.name})" in page
        kind, _, rest = path.stem.partition("-")
        shown = report.stored(kind)
        shown = shown if rest in ("speedups", "writing") else shown[rest.removesuffix("-attention")]
        assert f"Source\0{pictures.digest(shown)}".encode() in path.read_bytes(), "run `python -m benchmarks.report`"


@pytest.mark.parametrize("kind", report.KINDS)
def test_stored_results_are_whole(kind: str) -> None:
    found = report.stored(kind)
    assert found or kind in ("generation", "guesses", "gpu")
    for family, results in found.items():
        assert not results["quick"]
        assert results["commit"]
        assert report.kind_of(results) == kind
        assert results["machine"].get("family", family) == family or kind == "gpu"
        sections = {row["section"] for row in results["rows"]}
        if kind == "training":
            assert sections | {"goal"} == set(SECTIONS)  # which the older results have not
            assert all(map(report.is_measured, results["rows"]))
            continue
        if kind == "generation":
            assert {f"{row['provider']}, {row['weights']}" for row in results["rows"]} == set(PROVIDERS)
            assert {row["threads"] for row in results["rows"]} == {results["machine"]["cores"]}
            continue
        if kind == "guesses":
            assert {row["weights"] for row in results["rows"]} == {FLOAT32, BF16, INT8, INT4}
            continue
        if kind == "optimize":
            assert {row.get("weights") for row in results["rows"]} == {FLOAT32, BF16, INT8, INT4, None}
            assert all("ratios" in row for row in results["rows"] if row["provider"] == OURS)
            continue
        if kind == "gpu":
            assert {row["benchmark"] for row in results["rows"]} == {row.name for row in rows(Target(gpu=True))}
            continue
        assert sections >= {"embedding", "layer_norm", "attention", "linear", "losses", "model", "length"}
        providers: dict[str, set[str]] = {}
        for row in results["rows"]:
            providers.setdefault(row["benchmark"], set()).add(row["provider"])
        assert all(names >= {OURS, EAGER} for names in providers.values())
        assert any(COMPILED in names for names in providers.values())
        assert {row["threads"] for row in results["rows"]} == {results["machine"]["threads"]}
        assert {row["threads"] for row in results["one_thread"]} == {1}
        headline = {row["benchmark"] for row in results["rows"] if row["headline"]}
        assert {row["benchmark"] for row in results["one_thread"]} == headline


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a repository without stored results."""
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "PAGE", tmp_path / "docs" / "benchmarks.md")
    monkeypatch.setattr(report, "PICTURES", tmp_path / "docs" / "benchmarks")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(hardware, "PROVEN", tmp_path / "proven.json")
    blocks = "".join(f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in ("headline", "optimize"))
    report.README.write_text(f"# Title\n{blocks}End\n", encoding="utf-8")
    return tmp_path


def test_a_whole_run_is_stored_and_shown(house: Path, results: dict[str, Any]) -> None:
    for changes in ({"quick": True}, {"only": "attention"}):
        report.publish({**results, **changes}, None)
        assert not report.RESULTS.exists()
    report.publish(results, None)
    assert report.stored("cpu") == {"abacus": results}
    page, readme = report.PAGE.read_text(encoding="utf-8"), report.README.read_text(encoding="utf-8")
    assert report.render_tables(results) in page
    assert "benchmarks/cpu-speedups.png" in page
    assert report.render_headline() in readme
    assert "old" not in readme
    assert readme.endswith("End\n")


def test_results_from_elsewhere_are_adopted(house: Path, results: dict[str, Any]) -> None:
    results["machine"]["family"] = "slide-rule"
    report.publish(results, house / "out")
    assert report.main(["--adopt", str(house / "out" / "cpu.json")]) == 0
    assert report.stored("cpu") == {"slide-rule": results}
    for refused in ({"quick": True}, {"only": "norm"}, {"gpu": None}):
        report.save({**results, **refused}, house / "no")
        (path,) = (house / "no").iterdir()
        assert report.main(["--adopt", str(path)]) == 2
        path.unlink()
    report.save({**results, "gpu": GPU}, house / "out")
    assert report.main(["--adopt", str(house / "out" / "gpu.json")]) == 0
    assert report.stored("gpu").keys() == {"loom-9"}
    assert json.loads(hardware.PROVEN.read_text(encoding="utf-8")) == {}  # no row of these is of a GPU's operators


def test_blocks_are_there_once() -> None:
    text = "before\n<!-- headline:begin -->\nold\nold\n<!-- headline:end -->\nafter\n"
    new = "before\n<!-- headline:begin -->\n\\1 new\n<!-- headline:end -->\nafter\n"
    assert report.replace_block(text, "headline", "\\1 new") == new
    assert report.replace_block(new, "headline", "\\1 new") == new
    for broken in (text.replace(":end", ":begin"), text.replace("<!-- headline:end -->", ""), text + text, "nothing"):
        with pytest.raises(ValueError, match="each be there once"):
            report.replace_block(broken, "headline", "new")


# ---- Tables


def test_rates_fractions_and_ratios(results: dict[str, Any]) -> None:
    found = {(row["benchmark"], row["provider"]): row for row in results["rows"]}
    ours = found["an operation forward 4x4", OURS]
    assert (ours["rate"], ours["fraction_of_ceiling"]) == (20.0, 0.2)
    assert ours["ratios"] == {EAGER: 4.0, COMPILED: 2.0}
    assert report.factor(ours) == 2.0
    assert (ours["rounds"], ours["calls_per_round"], ours["median_s"], ours["iqr_s"]) == (7, 3, 0.1, 0.01)
    assert "ratios" not in found["an operation forward 4x4", EAGER]
    norm = found["a norm backward 2x2", OURS]
    assert (norm["rate"], norm["fraction_of_ceiling"]) == (3.0, 0.3)
    bfloat16 = found["an operation forward 4x4 bfloat16", OURS]
    assert bfloat16["fraction_of_ceiling"] == 0.015  # of bfloat16's ceiling
    assert bfloat16["median_s"] == 0.33333


def test_tables(results: dict[str, Any]) -> None:
    line = "| an operation forward 4x4 | 100 ms ±5% | 20.0 GFLOP/s | 20% | 400 ms ±5%, 4.00x | 200 ms ±5%, **2.00x** |"
    table = report.render_tables(results)
    assert line in table.splitlines()
    assert "| a norm backward 2x2 | 100 ms ±5% | 3.00 GB/s | 30% |" in table
    assert "Abacus (beads), 2 cores, 1 threads" in table
    assert "commit c0ffee, 2000-01-01" in table


def test_tables_say_what_stands_against_trusting_them(results: dict[str, Any]) -> None:
    table = report.render_tables(results)
    assert "A quick run" not in table
    assert "disturbed" not in table
    results["quick"] = True
    for row in results["rows"]:
        if row["benchmark"] == "a norm backward 2x2":
            row["other_load_cores"] = 0.7
    table = report.render_tables(results)
    assert "A quick run" in table
    assert "disturbed" in table
    assert "| a norm backward 2x2 (!) |" in table
    assert "| an operation forward 4x4 |" in table


def test_rows_on_one_thread_have_a_table_of_their_own(results: dict[str, Any]) -> None:
    one = [measured(a_row(headline=True), provider, time) for provider, time in {OURS: 0.2, EAGER: 0.3}.items()]
    both = results_of(measured(a_row(), OURS, 0.1), measured(a_row(), EAGER, 0.4), one_thread=one)
    before, after = report.render_tables(both).split("**On one thread**")
    assert "4.00x" in before
    assert "1.50x" in after
    assert "1.50x" not in before
    assert "one thread" not in report.render_tables(results)


def test_families_stand_side_by_side_with_each_rows_worst_and_best(house: Path, results: dict[str, Any]) -> None:
    other = copy.deepcopy(results)
    other["machine"]["family"] = "slide-rule"
    other["rows"] = [row for row in other["rows"] if row["section"] == "layer_norm"]
    for row in other["rows"]:
        if row["provider"] == OURS:
            row["ratios"] = {EAGER: 0.8, COMPILED: 3.0}
    for each in (results, other):
        report.publish(each, None)
    page = report.PAGE.read_text(encoding="utf-8")
    assert "|  | abacus | slide-rule | worst | best |" in page
    assert "| an operation forward 4x4 | 100 ms, 2.00x |  | 2.00x | 2.00x |" in page
    assert "| a norm backward 2x2 | 100 ms, 2.00x | 100 ms, 0.80x | 0.80x | 2.00x |" in page
    # The README shows the headline's rows, and those in which a peer is faster.
    headline = report.render_headline()
    assert "| an operation forward 4x4 |" in headline
    assert "| a norm backward 2x2 |" in headline
    assert "bfloat16" not in headline
    assert "in 1 of the 3 rows" in headline
    report.RESULTS.joinpath("cpu", "slide-rule.json").unlink()
    assert "a norm" not in report.render_headline()
    assert "worst" not in report.render_headline()


def test_times_have_three_digits() -> None:
    times = (1.234e-6, 99.96e-6, 0.9994e-3, 0.9996e-3, 12.34e-3, 0.9999, 12.0, 4e-8)
    shown = ["1.23 µs", "100 µs", "999 µs", "1.00 ms", "12.3 ms", "1.00 s", "12.0 s", "0.04 µs"]
    assert [tables.format_time(s) for s in times] == shown


# ---- Of a GPU


def gpu_results(times: dict[str, float | None], **changes: Any) -> dict[str, Any]:
    """One row of a GPU; without a time it failed."""
    row = a_norm(ours=(CUDA, TRITON), shows_memory=True, **changes)
    entries = [
        {**measured(row, name, time), "peak_bytes": 3 << 30}
        if time is not None
        else {**row.facts(), "provider": name, "other_load_cores": None, "failed": "not | built"}
        for name, time in times.items()
    ]
    return results_of(*entries, facts={**FACTS, "gpu": GPU})


def cells(results: dict[str, Any]) -> dict[str, str]:
    header, _, line = report.section_table(results["rows"])
    names, values = ([cell.strip() for cell in text.split("|")[1:-1]] for text in (header, line))
    return dict(zip(names, values, strict=True))


def test_peers_are_compared_with_the_faster_one_of_ours() -> None:
    found = cells(gpu_results({CUDA: 2e-5, TRITON: 3e-5, EAGER: 1e-5, LAUNCH: 1e-6}))
    assert found[CUDA] == "20.0 µs ±5%, 3.00 GiB"
    assert found[TRITON].startswith("30.0 µs")
    assert found[EAGER].endswith(", **0.50x**")
    assert found[LAUNCH] == "1.00 µs ±5%, 3.00 GiB"  # a part of ours is nobody's peer
    found = cells(gpu_results({CUDA: 4e-5, TRITON: 2e-5, EAGER: 4e-5}))
    assert found[EAGER].endswith(", **2.00x**")


def test_who_was_not_measured_has_no_figure() -> None:
    results = gpu_results({CUDA: None, TRITON: 2e-5, EAGER: 4e-5})
    assert cells(results)[CUDA] == "not / built"
    assert cells(results)[EAGER].endswith(", **2.00x**")
    assert "median_s" not in results["rows"][0]
    assert "Loom 9 (4 multiprocessors, 8 GiB)" in report.render_tables(results)
    nothing = gpu_results({CUDA: None, TRITON: None})
    assert "of ceiling" not in cells(nothing)
    assert report.side_by_side({"loom": nothing})[2:] == []


def test_launches_show_what_the_gpu_does_of_them() -> None:
    results = gpu_results({CUDA: 2e-5, EAGER: 4e-5})
    results["rows"][0]["gpu_s"] = 3e-6
    assert cells(results)[CUDA].endswith(", GPU 3.00 µs")


# ---- Pictures


def test_pictures(results: dict[str, Any], tmp_path: Path) -> None:
    assert pictures.draw("cpu", {"abacus": results}, tmp_path) == [tmp_path / "cpu-speedups.png"]
    over_length = [
        a_row(section="length", direction=direction, shape=f"T{n}", facts_of_shape={"seq_len": n})
        for direction in (FORWARD, BACKWARD)
        for n in (64, 512, 2048)
    ]
    lengths = results_of(*(measured(row, provider, 0.1) for row in over_length for provider in (OURS, EAGER)))
    assert pictures.draw("cpu", {"abacus": lengths}, tmp_path) == [tmp_path / "cpu-abacus-attention.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
    assert pictures.draw("gpu", {}, tmp_path) == []


def test_pictures_of_a_gpu(tmp_path: Path) -> None:
    entries = [
        {**measured(row, provider, 1e-3 * (i + 1)), "peak_bytes": None}
        for i, row in enumerate(rows(Target(gpu=True)))
        for provider in (*row.ours, EAGER)
    ]
    results = results_of(*entries, facts={**FACTS, "gpu": GPU})
    assert {row["section"] for row in results["rows"]} <= report.SECTIONS.keys()
    assert "TFLOP/s" in report.render_tables(results)
    names = [path.name for path in pictures.draw("gpu", {"loom": results}, tmp_path)]
    assert names == ["gpu-speedups.png", "gpu-loom-attention.png"]
