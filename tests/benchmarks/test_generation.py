"""The benchmark of writing checks providers before it times them, and reports what it measured and what is missing."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import generation, generation_tables, machine, pictures, report, writers
from benchmarks.generation import Plan, Side
from benchmarks.workers import Worker, WriterError
from benchmarks.writers import FLOAT32, INT8, OURS, PROVIDERS, REFERENCE, TRANSFORMERS
from benchmarks.written_models import GPT2, MODELS, TINY, draw_prompts, make_model
from tests.helpers.needs import needs_transformers

from .made_up import FACTS

OURS_INT8, CT2, CT2_INT8 = "tinyllm, int8", "CTranslate2, float32", "CTranslate2, int8"
TEXT = [[7, 7, 8, 9]]


def side(first_s: float, token_s: float, tokens: list[list[int]] = TEXT, **changes: Any) -> Side:
    return Side(tokens, [first_s] * 3, [token_s] * 3, [0.0] * 3, 5_000_000, **changes)


@pytest.fixture
def results() -> dict[str, Any]:
    """Make up what a run with two numbers of threads gives."""
    model = dataclasses.replace(TINY, new_tokens=4)
    sides = {
        REFERENCE: side(0.4, 0.02),
        "tinyllm, float32": side(0.1, 0.01),
        OURS_INT8: side(0.1, 0.005, [[7, 7, 9, 9]]),
        "tinyllm, int4": Side(failed="ValueError: no | int4 yet"),
        CT2: side(0.3, 0.03),
        CT2_INT8: side(0.2, 0.004),
        "llama.cpp, int4": Side(failed="not installed: pip install a-package"),
    }
    load_s = dict.fromkeys(sides, 0.5)
    rows = {threads: generation.rows_of(sides, model, 1, 2, threads, load_s) for threads in (2, 1)}
    return generation.make_results(FACTS, rows, {2: 2e9, 1: 1e9})


# ---- What is measured


def test_the_bytes_of_a_step_are_those_of_weights_and_cache() -> None:
    reference = PROVIDERS[REFERENCE]
    weights = 124_439_808 - 1024 * 768  # all of GPT-2's but the positions
    cache = 2 * 12 * 768 * (256 + 32)
    assert GPT2.step_bytes(reference, 1, 256) == 4 * (weights + cache)
    assert GPT2.step_bytes(reference, 8, 256) == 4 * (weights + 8 * cache)
    assert GPT2.step_bytes(PROVIDERS[OURS_INT8], 1, 256) == pytest.approx(weights + 2 * cache, rel=0.01)
    # Of int4 the output has 8 bits.
    head, blocks = 50_257 * 768, 12 * 12 * 768**2
    assert GPT2.step_bytes(PROVIDERS["tinyllm, int4"], 1, 256) == pytest.approx(head + blocks / 2 + 2 * cache, rel=0.01)


def test_prompts_leave_room_for_the_new_tokens() -> None:
    plan = Plan(MODELS, [REFERENCE], [4, 1])
    assert plan.cases(GPT2, 4) == [(1, 1), (1, 256), (1, 960), (8, 256)]
    assert plan.cases(GPT2, 1) == [(1, 256)]
    assert plan.cases(TINY, 1) == plan.cases(TINY, 4) == [(1, 1)]
    part = Plan(MODELS, [REFERENCE], [4, 1], 5, [2], [5000])
    assert part.cases(GPT2, 1) == [(2, 960)]
    assert Plan(MODELS, [REFERENCE], [4], 5, [2, 3]).cases(GPT2, 4) == [(b, n) for n in (1, 256, 960) for b in (2, 3)]
    prompts = draw_prompts(TINY, 3, 5)
    assert [len(prompt) for prompt in prompts] == [5] * 3
    assert max(map(max, prompts)) < TINY.vocab_size - 1  # no end of the text
    assert prompts == draw_prompts(TINY, 3, 5)


def test_agreement_names_the_first_difference() -> None:
    assert generation.agreement([[1, 2], [3, 4]], [[1, 2], [3, 4]]) == (1.0, None)
    share, difference = generation.agreement([[1, 5], [6, 4]], [[1, 2], [3, 4]])
    assert share == 0.5
    assert difference == "token 0 of sequence 1 is 6, not 3"


class Scripted:
    """A process that answers what it is told to."""

    pid = None

    def __init__(self, *answers: dict[str, Any] | str) -> None:
        self.answers = list(answers)

    def ask(self, **request: Any) -> dict[str, Any]:
        answer = self.answers.pop(0)
        if isinstance(answer, str):
            raise WriterError(answer)
        return answer


def an_answer(tokens: list[list[int]], token_s: float = 0.1) -> dict[str, Any]:
    return {"tokens": tokens, "first_s": 1.0, "token_s": token_s, "peak_bytes": None}


def test_who_writes_something_else_is_not_timed() -> None:
    good, other = an_answer([[1, 2]]), an_answer([[1, 3]])
    workers: dict[str, Any] = {
        REFERENCE: Scripted(*[good] * 3),
        CT2: Scripted(other),
        CT2_INT8: Scripted(other, other, "ended with 1"),
    }
    sides = generation.measure_case(workers, TINY, 1, 1, 2)
    assert sides[REFERENCE].token_s == [0.1, 0.1]
    assert sides[CT2].failed == "other tokens: token 1 of sequence 0 is 3, not 2"
    assert sides[CT2_INT8].failed == "ended with 1"
    assert sides[CT2_INT8].tokens == [[1, 3]]
    workers = {REFERENCE: Scripted(*[good] * 3), "llama.cpp, int4": Scripted()}
    assert generation.measure_case(workers, TINY, 8, 1, 1)["llama.cpp, int4"].failed == "one sequence at a time"
    with pytest.raises(WriterError, match="no luck"):
        generation.measure_case({REFERENCE: Scripted("no luck")}, TINY, 1, 1, 1)  # type: ignore[dict-item]


def test_who_is_slow_is_timed_once() -> None:
    slow = an_answer([[1]], generation.SLOW_S)
    sides = generation.measure_case({REFERENCE: Scripted(slow, slow)}, TINY, 1, 1, 5)  # type: ignore[dict-item]
    assert len(sides[REFERENCE].token_s) == 1


def test_who_has_been_slow_is_left_out_of_what_follows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Process(Scripted):
        def __init__(self, label: str, folder: Path, threads: int) -> None:
            self.label, self.loaded = label, {"load_s": 1.0}

        def __enter__(self) -> Process:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def ask(self, **request: Any) -> dict[str, Any]:
            if self.label == writers.READ:
                return {"bytes_per_s": 1e9}
            return an_answer([[1]] * len(request["prompts"]), generation.SLOW_S if self.label in slow else 0.1)

    slow = {REFERENCE, OURS_INT8}
    monkeypatch.setattr(generation, "Worker", Process)
    monkeypatch.setattr(generation, "make_model", lambda model, folder: None)
    monkeypatch.setattr(generation, "convert", lambda labels, folder: {})
    model = dataclasses.replace(TINY, cases=((1, 1), (2, 1)), on_one_thread=((2, 1),))
    rows, _ = generation.measure(Plan((model,), (REFERENCE, OURS_INT8, CT2), (2, 1), 1), tmp_path)
    failed = {(t, row["provider"], row["batch"]): row["failed"] for t in rows for row in rows[t] if "failed" in row}
    why = "left out: 1861 s for B1 T1"
    assert failed == {(2, OURS, 2): why, (1, OURS, 2): why}


# ---- The processes


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(WriterError, match="KeyError: 'nobody'"):
        Worker("nobody", tmp_path, 1)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(generation, "find_spec", lambda module: None)
    found = generation.convert(PROVIDERS, tmp_path)
    assert found.keys() == PROVIDERS.keys()
    assert found[CT2] == "not installed: pip install ctranslate2"


def test_reading_has_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(machine, "best_time", lambda call, seconds: call() is None or 0.5)
    monkeypatch.setattr(machine, "last_level_cache_mib", lambda: -240.0)  # so that the array is small
    assert writers.read_bandwidth() == pytest.approx(2 * 16 * 2**20, rel=0.02)


@needs_transformers
def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = dataclasses.replace(TINY, vocab_size=300, width=32, layers=1, heads=2, new_tokens=6)
    labels = [REFERENCE, "tinyllm, float32", *[CT2] * (importlib.util.find_spec("ctranslate2") is not None)]
    assert generation.bench(Plan((model,), labels, [1], 1, [2], [3]), "a part", True, tmp_path) == 0
    found = json.loads((tmp_path / "generation.json").read_text(encoding="utf-8"))
    assert found["only"] == "a part"
    assert [(row["section"], row["provider"]) for row in found["rows"]] == [
        (section, PROVIDERS[label].name)
        for section in (generation_tables.READING, generation_tables.WRITING)
        for label in labels
    ]
    for row in found["rows"]:
        assert report.is_measured(row) or row["provider"] == OURS, row
    reference = next(row for row in found["rows"] if row["section"] == generation_tables.WRITING)
    assert (reference["batch"], reference["prompt"], reference["rounds"]) == (2, 3, 1)
    assert reference["load_s"] > 0
    assert found["generation"]["read_gb_per_s"]["1"] > 0
    assert report.render_tables(found) in capsys.readouterr().out


@needs_transformers
def test_the_model_is_whole(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GPT2LMHeadModel

    make_model(TINY, tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert model.num_parameters() == 4096 * 128 + 64 * 128 + 4 * (12 * 128**2 + 13 * 128) + 2 * 128
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 4096
    assert tokenizer.decode(tokenizer.encode("def é()")) == "def é()"


# ---- What is reported


def test_peers_with_narrower_weights_are_not_compared(results: dict[str, Any]) -> None:
    writing = [row for row in results["rows"] if row["section"] == generation_tables.WRITING]
    ours = {row["weights"]: row for row in writing if row["provider"] == OURS}
    assert ours[FLOAT32]["ratios"] == {REFERENCE: 2.0, CT2: 3.0}
    assert ours[INT8]["ratios"] == {REFERENCE: 4.0, CT2: 6.0, CT2_INT8: 0.8}
    assert ours[INT8]["same_tokens"] == 0.75
    assert ours[FLOAT32]["tokens_per_s"] == 100.0
    read = TINY.step_bytes(PROVIDERS["tinyllm, float32"], 1, 2)
    slightly_less = dataclasses.replace(TINY, new_tokens=4).step_bytes(PROVIDERS["tinyllm, float32"], 1, 2)
    assert slightly_less < read
    assert ours[FLOAT32]["fraction_of_bandwidth"] == pytest.approx(slightly_less / 0.01 / 2e9, rel=1e-4)
    assert "ratios" not in next(row for row in writing if row["provider"] == TRANSFORMERS)


def test_tables(results: dict[str, Any]) -> None:
    assert report.kind_of(results) == "generation"
    table = report.render_tables(results)
    lines = table.splitlines()
    for expected in (
        "Read bandwidth with 2 threads: 2.00 GB/s.",
        "Read bandwidth with 1 thread: 1.00 GB/s.",
        "**tiny preset, 2 threads: writing 4 tokens**",
        "**tiny preset, 1 thread: reading the prompt**",
        "| tinyllm, int4 | ValueError: no / int4 yet |",
        "| llama.cpp, int4 | not installed: pip install a-package |",
        "| tinyllm, float32 | 20.0 ±0%, 100 ms, **3.00x** |",
        "| CTranslate2, int8 | 500 ms | 5 MB | 5 MB | 100% | none |",
        "| tinyllm, int8 | 500 ms | 5 MB | 5 MB | 75% | B1 T2: token 2 of sequence 0 is 9, not 8 |",
    ):
        assert expected in lines
    assert any(line.startswith("| tinyllm, int8 | 200 ±0%, ") and line.endswith(" **0.80x** |") for line in lines)
    assert "(!)" not in table
    results["rows"][0]["other_load_cores"] = 1.0
    assert table.count("(!)") == 0
    assert "(!)" in report.render_tables(results)


def test_the_page_and_the_readme(monkeypatch: pytest.MonkeyPatch, results: dict[str, Any], tmp_path: Path) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "PICTURES", tmp_path / "pictures")
    assert "## Writing" in report.render_page()
    assert report.render_headline() == ""
    path = report.save(results, None)
    assert path == tmp_path / "results" / "generation" / f"{results['machine']['family']}.json"
    assert report.render_tables(results) in report.render_page()
    headline = report.render_headline()
    assert "| tiny preset writes after B1 T2, float32 weights | 10.0 ms, 2.00x |" in headline
    assert "int8 weights | 5.00 ms, 0.80x |" in headline  # a peer is faster
    assert "CTranslate2" in headline


def test_pictures(results: dict[str, Any], tmp_path: Path) -> None:
    drawn = pictures.draw("generation", {"abacus": results, "slide-rule": results}, tmp_path)
    assert drawn == [tmp_path / "generation-speedups.png", tmp_path / "generation-writing.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    for row in results["rows"]:
        row["headline"] = False
    assert pictures.draw("generation", {"abacus": results}, tmp_path) == drawn[:1]


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(generation, "bench", lambda *arguments: calls.append(arguments) or 0)
    assert generation.main([]) == 0
    assert generation.main(["--quick"]) == 0
    assert generation.main(["--providers", "CTranslate2", "--batch", "8", "--threads", "1"]) == 0
    (whole, only, quick, _), (quick_plan, _, is_quick, _), (part, part_only, _, _) = calls
    assert (whole.models, list(whole.labels), only, quick) == (MODELS, list(PROVIDERS), None, False)
    assert (quick_plan.models, quick_plan.most_rounds, is_quick) == ((TINY,), 1, True)
    assert (part.models, part.labels, part.threads) == ((GPT2,), [REFERENCE, CT2, CT2_INT8], [1])
    assert part.cases(GPT2, 1) == [(8, 1), (8, 256), (8, 960)]
    assert part_only == "providers ['CTranslate2']; threads [1]; batch [8]"
    for wrong in (["--threads", "0"], ["--providers", "nobody"]):
        with pytest.raises(SystemExit, match="2"):
            generation.main(wrong)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_peak_memory_begins_anew() -> None:
    held = bytearray(64 << 20)
    peak = writers.resident_bytes("VmHWM")
    assert peak is not None
    assert peak >= len(held)
    now = writers.resident_bytes("VmRSS")
    assert now is not None
    assert now <= peak
