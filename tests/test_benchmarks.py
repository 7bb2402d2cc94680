"""The benchmarks count, compare and report correctly. How fast anything is, no test says."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tinyllm import reference
from tinyllm.config.training import TrainConfig
from tinyllm.ops.backends import cpp
from tinyllm.training.trainer import train

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks are not part of the installed package

from benchmarks import bench_attention_length, harness, machine, model_speed, report, run, timing, work
from benchmarks.bench_attention import Shape, padding_mask
from benchmarks.harness import (
    BACKWARD,
    BYTES,
    COMPILED,
    EAGER,
    FLOPS,
    FORWARD,
    OURS,
    STEP,
    Case,
    Provider,
    Row,
    passes,
    randn,
    relative_error,
    verify,
)

needs_extension = pytest.mark.skipif(not cpp.loaded, reason=f"there are no compiled kernels: {cpp.why_not}")
ROOT = Path(__file__).parents[1]


# ---- What is in the repository


@pytest.mark.parametrize(("name", "headline"), [("cpu", False), ("headline", True)])
def test_readme_shows_the_stored_results(name: str, headline: bool) -> None:
    if not (report.RESULTS / "cpu.json").exists():
        pytest.fail("benchmarks/results/cpu.json is missing: `make bench` writes it")
    readme = report.README.read_text(encoding="utf-8")
    if f"<!-- benchmarks:{name} -->" not in readme:
        pytest.fail(f"README.md has no place for the table: <!-- benchmarks:{name} --> and <!-- /benchmarks:{name} -->")
    table = report.render_table(report.load(), headline)
    assert report.replace_block(readme, name, table) == readme, (
        "README.md is out of date: `python -m benchmarks.run --render`"
    )


def test_stored_results_are_whole() -> None:
    if not (report.RESULTS / "cpu.json").exists():
        pytest.fail("benchmarks/results/cpu.json is missing: `make bench` writes it")
    results = report.load()
    assert not results["quick"]
    assert results["commit"]
    assert (report.RESULTS / "cpu.png").read_bytes().startswith(b"\x89PNG")
    providers: dict[str, set[str]] = {}
    for row in results["rows"]:
        providers.setdefault(row["benchmark"], set()).add(row["provider"])
    assert all(found >= {OURS, EAGER} for found in providers.values())
    assert any(COMPILED in found for found in providers.values())
    assert {row["section"] for row in results["rows"]} == {*report.SECTIONS, "length"}
    assert {row["threads"] for row in results["rows"]} == {results["machine"]["threads"]}
    assert {row["threads"] for row in results["one_thread"]} == {1}
    headline = {row["benchmark"] for row in results["rows"] if row["headline"]}
    assert {row["benchmark"] for row in results["one_thread"]} == headline
    assert (report.RESULTS / "cpu_attention_length.png").read_bytes().startswith(b"\x89PNG")


# ---- What counts as work


def test_layer_norm_bytes() -> None:
    size = 768 * 128 * 4
    assert work.layer_norm_bytes(FORWARD, 768, 128) == 2 * size + 2 * 128 * 4
    assert work.layer_norm_bytes(BACKWARD, 768, 128) == 3 * size + 3 * 128 * 4
    assert work.layer_norm_bytes(STEP, 768, 128) == 5 * size + 5 * 128 * 4
    assert work.layer_norm_bytes(FORWARD, 768, 128, itemsize=2) == size + 128 * 4
    assert work.add_layer_norm_bytes(FORWARD, 768, 128) == 4 * size + 2 * 128 * 4
    assert work.add_layer_norm_bytes(BACKWARD, 768, 128) == 4 * size + 3 * 128 * 4


def test_linear_flops_are_those_of_the_formula() -> None:
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = torch.nn.functional.linear(x, weight)
        assert work.linear_flops(FORWARD, 6, 4, 9) == counter.get_total_flops()
        out.sum().backward()
    assert work.linear_flops(STEP, 6, 4, 9) == counter.get_total_flops()


def test_linear_bytes() -> None:
    assert work.linear_bytes(FORWARD, 1, 768, 3072) == (768 + 3072 * 768 + 3072 + 3072) * 4


def test_cross_entropy_bytes() -> None:
    assert work.cross_entropy_bytes(FORWARD, 1024, 50257) == 1024 * 50257 * 4
    assert work.cross_entropy_bytes(STEP, 1024, 50257) == 2 * 1024 * 50257 * 4


def test_linear_cross_entropy_flops_are_those_of_the_formula() -> None:
    input, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        loss = reference.linear_cross_entropy(input, weight, torch.arange(6))
        assert work.linear_cross_entropy_flops(FORWARD, 6, 4, 9) == counter.get_total_flops()
        loss.backward()
    assert work.linear_cross_entropy_flops(STEP, 6, 4, 9) == counter.get_total_flops()


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (4, 4), (5, 3), (3, 5)])
def test_visible_pairs(queries: int, keys: int) -> None:
    mask = torch.ones(queries, keys, dtype=torch.bool)
    assert work.visible_pairs(queries, keys, causal=False) == mask.sum()
    assert work.visible_pairs(queries, keys, causal=True) == mask.tril().sum()


def test_attention_flops_are_those_of_the_formula() -> None:
    query, key, value = (torch.randn(2, 3, 8, 4) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        reference.scaled_dot_product_attention(query, key, value)
    pairs = 2 * 3 * work.visible_pairs(8, 8, causal=False)
    assert work.attention_flops(FORWARD, pairs, 4) == counter.get_total_flops()
    # Backward: two products for each of forward's, and Q K^T again.
    assert work.attention_flops(BACKWARD, pairs, 4) == 2.5 * work.attention_flops(FORWARD, pairs, 4)
    assert work.attention_flops(STEP, pairs, 4) == 3.5 * work.attention_flops(FORWARD, pairs, 4)


def test_model_flops_are_those_of_the_model() -> None:
    sizes = {"vocab_size": 11, "embedding_dim": 8, "hidden_dim": 20, "num_layers": 2}
    model, ids = reference.SimpleLLM(**sizes), torch.randint(11, (3, 5))
    with FlopCounterMode(display=False) as counter:
        loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        forward = counter.get_total_flops()
        loss.backward()
        step = counter.get_total_flops()
    assert work.model_flops(FORWARD, batch=3, seq_len=5, **sizes) == forward
    assert work.model_flops(STEP, batch=3, seq_len=5, **sizes) == step


def test_padding_mask() -> None:
    mask = padding_mask(Shape(batch=4, heads=2, seq_len=8, head_dim=1))
    assert mask.shape == (4, 1, 1, 8)
    assert mask.sum(-1).flatten().tolist() == [2, 4, 6, 8]
    assert mask[:, 0, 0, 0].all()


# ---- Checking before timing


def a_row(**changes: Any) -> Row:
    return Row("attention", "an operation", FORWARD, "4x4", 2e9, FLOPS, lambda: Case({}, tuple), **changes)


def square(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x * x, x * y


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD, STEP])
def test_providers_compute_the_direction(direction: str) -> None:
    inputs = [randn((4, 3), seed) for seed in range(2)]
    case = passes({OURS: square, EAGER: square, COMPILED: square}, direction, inputs)
    exact = case.exact()
    assert [x.dtype for x in exact] == [torch.float64] * 2
    assert verify(a_row(), case).keys() == {OURS, EAGER, COMPILED}
    if direction == FORWARD:
        assert torch.equal(exact[0], inputs[0].double() ** 2)
    else:
        grads = [randn((4, 3), seed=7 + i).double() for i in range(2)]
        assert torch.allclose(exact[1], inputs[0].double() * grads[1])
        assert torch.allclose(exact[0], 2 * inputs[0].double() * grads[0] + inputs[1].double() * grads[1])


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD, STEP])
@pytest.mark.parametrize("error", [1e-5, 1.0, math.nan])
def test_a_wrong_provider_is_not_timed(direction: str, error: float) -> None:
    def wrong(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * x, x * y * (1 + error)

    inputs = [randn((4, 3), seed) for seed in range(2)]
    case = passes({OURS: wrong, EAGER: square, COMPILED: square}, direction, inputs)
    with pytest.raises(AssertionError, match="tinyllm has error"):
        verify(a_row(), case)


def test_relative_error() -> None:
    exact = [torch.tensor([3.0, 0.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)]
    assert relative_error([torch.tensor([3.0, 0.0]), torch.tensor([4.0])], exact) == 0
    assert relative_error([torch.tensor([3.0, 1.0]), torch.tensor([4.0])], exact) == pytest.approx(0.2)
    assert relative_error([torch.tensor([3.0, math.nan]), torch.tensor([4.0])], exact) == math.inf
    with pytest.raises(AssertionError, match="shape"):
        relative_error([torch.tensor([3.0]), torch.tensor([4.0])], exact)
    with pytest.raises(AssertionError, match="tensors"):
        relative_error([torch.tensor([3.0, 0.0])], exact)


def test_functions_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BLOCK_S", 0.0)  # one call a round
    order: list[str] = []
    functions = {name: lambda name=name: order.append(name) for name in "abc"}
    calls, times = timing.take_turns(functions, seconds=0.0)
    assert calls == 1
    assert {name: len(seconds) for name, seconds in times.items()} == dict.fromkeys("abc", timing.MIN_ROUNDS)
    turns = order[3 * timing.WARM_UP_CALLS :]
    rounds = [turns[i : i + 3] for i in range(0, len(turns), 3)]
    assert len(rounds) == timing.MIN_ROUNDS
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len(set(map(tuple, rounds))) > 1
    assert len(timing.take_turns(functions, seconds=0.0, rounds=2)[1]["a"]) == 2


@pytest.mark.parametrize(
    ("loads", "attempts", "counted"),
    [([0.0], 3, 0), ([0.5, 0.02], 3, 1), ([0.5, 0.3, 0.4], 3, 1), ([0.5], 1, 0), ([None], 3, 0)],
)
def test_a_disturbed_row_is_timed_again(
    loads: list[float | None], attempts: int, counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = iter(range(10))
    left = iter(loads)
    monkeypatch.setattr(harness, "take_turns", lambda functions, seconds: (1, {OURS: [float(next(taken))]}))
    monkeypatch.setattr(harness.OtherLoad, "cores", lambda self: next(left))
    monkeypatch.setattr(harness, "verify", lambda row, case: {OURS: 0.0})
    monkeypatch.setattr(harness.ops, "backend", lambda name: nullcontext())
    row = dataclasses.replace(a_row(), build=lambda: Case({OURS: Provider(tuple)}, tuple))
    measured = harness.compare(row, 0.0, attempts)[OURS]
    assert (measured.seconds, measured.other_load) == ([counted], loads[counted])
    assert next(taken) == len(loads)


def test_other_load_is_a_number_of_cores() -> None:
    load = machine.OtherLoad().cores()
    assert load is None or load >= 0


# ---- Reporting


def measured(row: Row, provider: str, median: float) -> dict[str, Any]:
    """What pytest-benchmark's JSON says of a provider."""
    info = {**row.facts(), "provider": provider, "error": 0.0, "calls_per_round": 3, "other_load_cores": 0.05}
    return {"extra_info": info, "stats": {"median": median, "iqr": median / 10, "rounds": 7}}


@pytest.fixture
def results() -> dict[str, Any]:
    facts = {
        "machine": {
            "processor": "Abacus",
            "cores": 2,
            "threads": 1,
            "isa": "beads",
            "memory_gib": 0.5,
            "cache_mib": None,
        },
        "versions": {"tinyllm": "0", "torch": "1", "python": "2", "system": "Desk"},
        "commit": "c0ffee",
        "date": "2000-01-01T00:00:00+00:00",
        "allocator": {},
        "quick": False,
    }
    ceilings = {"gemm_gflops": {"float32": 100.0, "bfloat16": 400.0}, "copy_gb_per_s": 10.0}
    times = {OURS: 0.1, EAGER: 0.4, COMPILED: 0.2}
    rows = [a_row(headline=True), Row("layer_norm", "a norm", BACKWARD, "2x2", 3e8, BYTES, lambda: Case({}, tuple))]
    benchmarks = [measured(row, provider, time) for row in rows for provider, time in times.items()]
    benchmarks += [measured(a_row(dtype=torch.bfloat16), provider, 1 / 3) for provider in times]
    return report.make_results(facts, ceilings, benchmarks)


def test_rates_fractions_and_ratios(results: dict[str, Any]) -> None:
    rows = {(row["benchmark"], row["provider"]): row for row in results["rows"]}
    ours = rows["an operation forward 4x4", OURS]
    assert (ours["rate"], ours["fraction_of_ceiling"]) == (20.0, 0.2)
    assert ours["ratios"] == {EAGER: 4.0, COMPILED: 2.0}
    assert report.best_peer(ours) == 2.0
    assert (ours["rounds"], ours["calls_per_round"], ours["median_s"], ours["iqr_s"]) == (7, 3, 0.1, 0.01)
    assert rows["an operation forward 4x4", EAGER]["ratios"] == {OURS: 0.25, COMPILED: 0.5}
    norm = rows["a norm backward 2x2", OURS]
    assert (norm["rate"], norm["fraction_of_ceiling"]) == (3.0, 0.3)
    bfloat16 = rows["an operation forward 4x4 bfloat16", OURS]
    assert bfloat16["fraction_of_ceiling"] == 0.015  # of bfloat16's ceiling
    assert bfloat16["median_s"] == 0.33333


def test_tables(results: dict[str, Any]) -> None:
    line = "| an operation forward 4x4 | 100 ms ±5% | 20.0 GFLOP/s | 20% | 400 ms ±5%, 4.00x | 200 ms ±5%, **2.00x** |"
    table = report.render_table(results)
    assert line in table.splitlines()
    assert "| a norm backward 2x2 | 100 ms ±5% | 3.00 GB/s | 30% |" in table
    assert "Abacus (beads), 2 cores, 1 threads" in table
    headline = report.render_table(results, headline=True)
    assert "| an operation forward 4x4 | 100 ms ±5% | 400 ms ±5%, 4.00x | 200 ms ±5%, **2.00x** |" in headline
    assert "bfloat16" not in headline


def test_tables_say_what_stands_against_trusting_them(results: dict[str, Any]) -> None:
    table = report.render_table(results)
    assert "A quick run" not in table
    assert "disturbed" not in table
    results["quick"] = True
    for row in results["rows"]:
        if row["benchmark"] == "a norm backward 2x2":
            row["other_load_cores"] = 0.7
    table = report.render_table(results)
    assert "A quick run" in table
    assert "disturbed" in table
    assert "| a norm backward 2x2 (!) |" in table
    assert "disturbed" not in report.render_table(results, headline=True)  # which does not show that row
    assert "| an operation forward 4x4 |" in table


def test_rows_on_one_thread_have_a_table_of_their_own(results: dict[str, Any]) -> None:
    one = [measured(a_row(headline=True), provider, time) for provider, time in {OURS: 0.2, EAGER: 0.3}.items()]
    benchmarks = [measured(a_row(headline=True), provider, time) for provider, time in {OURS: 0.1, EAGER: 0.4}.items()]
    both = report.make_results(results, results["ceilings"], benchmarks, one)
    assert len(both["rows"]) == len(both["one_thread"]) == 2
    headline = report.render_table(both, headline=True)
    before, after = headline.split("The same on one thread:")
    assert "4.00x" in before
    assert "1.50x" in after
    assert "1.50x" not in report.render_table(both)
    assert "one thread" not in report.render_table(results, headline=True)


def test_pictures(results: dict[str, Any], tmp_path: Path) -> None:
    assert report.draw_pictures(results, tmp_path) == [tmp_path / "cpu.png"]
    rows = [
        Row(
            "length",
            "attention",
            direction,
            f"T{n}",
            1e9,
            FLOPS,
            lambda: Case({}, tuple),
            facts_of_shape={"seq_len": n},
        )
        for direction in (FORWARD, BACKWARD)
        for n in (64, 2048)
    ]
    benchmarks = [measured(row, provider, 0.1) for row in rows for provider in (OURS, EAGER)]
    lengths = report.make_results(results, results["ceilings"], benchmarks)
    assert report.draw_pictures(lengths, tmp_path) == [tmp_path / "cpu_attention_length.png"]
    for name in ("cpu", "cpu_attention_length"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_lengths_are_verified_by_one_head() -> None:
    row = next(row for row in bench_attention_length._rows() if row.direction == BACKWARD)
    errors = verify(row, case := row.build())
    assert errors.keys() == {OURS, EAGER}
    wrong = dataclasses.replace(case.providers[OURS], call=lambda: [x * 1.01 for x in case.providers[EAGER].call()])
    with pytest.raises(AssertionError, match="tinyllm has error"):
        verify(row, Case({**case.providers, OURS: wrong}, case.exact))


def test_times_have_three_digits() -> None:
    shown = [timing.format_time(s) for s in (1.234e-6, 99.96e-6, 0.9994e-3, 0.9996e-3, 12.34e-3, 0.9999, 12.0, 4e-8)]
    assert shown == ["1.23 µs", "100 µs", "999 µs", "1.00 ms", "12.3 ms", "1.00 s", "12.0 s", "0.04 µs"]


def test_replace_block() -> None:
    text = "before\n<!-- benchmarks:cpu -->\nold\nold\n<!-- /benchmarks:cpu -->\nafter\n"
    new = "before\n<!-- benchmarks:cpu -->\n\\1 new\n<!-- /benchmarks:cpu -->\nafter\n"
    assert report.replace_block(text, "cpu", "\\1 new") == new
    assert report.replace_block(new, "cpu", "\\1 new") == new
    assert report.replace_block(text, "headline", "new") == text
    for broken in (
        text.replace("/benchmarks", "benchmarks"),
        text.replace("<!-- /benchmarks:cpu -->", ""),
        text + text,
    ):
        with pytest.raises(ValueError, match="each be there once"):
            report.replace_block(broken, "cpu", "new")


def test_update_readme(results: dict[str, Any], tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    blocks = "".join(f"<!-- benchmarks:{name} -->\n<!-- /benchmarks:{name} -->\n" for name in ("headline", "cpu"))
    readme.write_text(f"# Title\n{blocks}The end\n", encoding="utf-8")
    report.update_readme(results, readme)
    text = readme.read_text(encoding="utf-8")
    assert report.render_table(results) in text
    assert report.render_table(results, headline=True) in text
    assert text.startswith("# Title\n")
    assert text.endswith("The end\n")


# ---- The commands


@needs_extension
def test_one_row_from_end_to_end(tmp_path: Path) -> None:
    kept = [path for path in (report.README, report.RESULTS / "cpu.json") if path.exists()]
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

    results = report.load(out)
    assert [row["provider"] for row in results["rows"]] == [OURS, EAGER, COMPILED]
    for row in results["rows"]:
        assert row["benchmark"] == "causal attention forward B12 H4 T64 D32"
        assert row["median_s"] > 0
        assert row["rounds"] >= timing.MIN_ROUNDS
        assert row["error"] < 1e-5
        assert row["rate"] == pytest.approx(row["work"] / row["median_s"] / 1e9, rel=1e-3)
    assert results["quick"]
    assert results["machine"]["threads"] == 1
    assert results["ceilings"]["copy_gb_per_s"] > 0
    assert (out / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert report.render_table(results) in done.stdout


@needs_extension
def test_only_the_short_tables_rows_on_one_thread() -> None:
    found = run.measure(f"add_layer_norm {FORWARD}", quick=True, headline=True, threads=1)
    assert found is not None
    assert {row["extra_info"]["benchmark"] for row in found} == {f"add_layer_norm {FORWARD} 8192x1024"}
    assert {row["extra_info"]["threads"] for row in found} == {1}


@needs_extension
def test_a_pattern_that_fits_no_row(capfd: pytest.CaptureFixture[str]) -> None:
    assert run.measure("no such row", quick=True) is None
    assert "No row's name contains 'no such row'" in capfd.readouterr().err


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
