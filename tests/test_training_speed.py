"""The benchmark of training compares equals, and reports what it measured. How fast anything is, no test says."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tinyllm.config.model import SimpleLLMConfig
from tinyllm.data.corpus import find_files
from tinyllm.model import SimpleLLM, init_gpt2_weights
from tinyllm.ops.backends import cpp

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks are not part of the installed package

from benchmarks import machine, report, training_peers, training_report, training_speed, training_turns
from benchmarks.harness import OURS
from benchmarks.training_speed import BARE, COMPILED, HF, PLAIN
from benchmarks.training_turns import LOG_INTERVAL

needs_extension = pytest.mark.skipif(not cpp.loaded, reason=f"there are no compiled kernels: {cpp.why_not}")
SMALL = SimpleLLMConfig(50, 16, 32, 2, 2, True, 8, 0.0, "gelu", True, True, True, "learned")
TINY: dict[str, Any] = {"seq_len": 8, "batch_size": 2, "eval_batches": 2, "sample_tokens": 0}
STEPS = 3 * LOG_INTERVAL  # the first turn warms up, and what `fit` does in the last one ends with a validation


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So that a busy machine does not let two wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> training_speed.Text:
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.py").write_text("def add(a, b):\n    return a + b\n\n\n" * 100, encoding="utf-8")
    return training_speed.prepare_text(find_files([folder / "text.py"]), folder / "tokens", TINY["seq_len"], 10)


# ---- What is compared


def a_model(config: SimpleLLMConfig = SMALL) -> SimpleLLM:
    torch.manual_seed(0)
    return init_gpt2_weights(SimpleLLM.from_config(config))


def a_batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(SMALL.vocab_size, (3, SMALL.max_seq_len + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def test_the_plain_model_is_ours() -> None:
    ours = a_model()
    peer = training_peers.plain_gpt(ours)
    assert training_speed.count(peer) == ours.num_parameters()
    assert training_speed.check_same(ours, PLAIN, peer, peer, a_batch()) < 1e-5
    with torch.no_grad():
        peer.ln_f.weight[0] += 0.1
    with pytest.raises(AssertionError, match="differ from ours"):
        training_speed.check_same(ours, PLAIN, peer, peer, a_batch())


def test_there_is_no_plain_model_of_other_options() -> None:
    for change in ({"position": "sinusoidal"}, {"activation": "relu"}, {"causal": False}, {"num_heads": 1}):
        with pytest.raises(ValueError, match="no such options"):
            training_peers.plain_gpt(a_model(dataclasses.replace(SMALL, **change)))


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_hugging_faces_model_is_ours() -> None:
    ours = a_model()
    peer = training_peers.hugging_face(ours)
    assert training_speed.count(peer) == ours.num_parameters() - SMALL.vocab_size  # the output's bias
    assert training_speed.check_same(ours, HF, peer, peer, a_batch(), "model.transformer.") < 1e-5
    with torch.no_grad():
        ours.output.bias += 1
    with pytest.raises(ValueError, match="no bias"):
        training_peers.hugging_face(ours)


def test_every_weight_is_copied() -> None:
    peer = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="bias"):
        training_peers.load(peer, {"weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        training_peers.load(peer, {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})


# ---- How


def test_all_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(training_turns.loop, "seed_step", lambda seed, step, rank, device: seeded.append(step))
    done: list[tuple[str, int, int]] = []
    turns = training_turns.Turns({name: lambda n, name=name: done.append((name, n, len(seeded))) for name in "ab"}, 0)
    for step in range(1, STEPS + 1):
        turns(0, step, 0, torch.device("cpu"))
    assert seeded == list(range(1, STEPS + 1))
    assert sorted(done) == [(name, LOG_INTERVAL, LOG_INTERVAL * turn) for name in "ab" for turn in range(3)]
    assert [times.keys() for times in turns.rounds.times] == [{OURS, "a", "b"}]
    assert len(turns.rounds.loads) == 1

    done.clear()
    rounds = training_turns.in_turns({name: lambda n, name=name: done.append((name, n, 0)) for name in "ab"}, 3, 2)
    assert sorted(done) == [(name, 2, 0) for name in "ab" for _ in range(4)]
    assert [len(rounds.of(name)) for name in "ab"] == [3, 3]


def test_disturbed_rounds_are_left_out() -> None:
    times = [{OURS: float(i)} for i in range(8)]
    some = training_turns.Rounds(times, [0.0, 0.5, 0.01, 0.0, None, 0.5, 0.0, 0.09])
    assert some.undisturbed().of(OURS) == [0, 2, 3, 4, 6, 7]
    assert some.undisturbed().load() == pytest.approx(0.02)
    many = training_turns.Rounds(times, [0.5] * 4 + [0.0] * 4)
    assert many.undisturbed() is many  # too few are left
    assert many.load() == 0.25
    assert training_turns.Rounds(times, [None] * 8).load() is None


@needs_extension
def test_character_model(text: training_speed.Text) -> None:
    measured = training_speed.measure_char(text, STEPS, 2, compiled=False, **TINY)
    assert [times.keys() for times in measured["rounds"].times] == [{OURS, PLAIN}] * 2
    facts = measured["facts"]
    assert facts["parameters"][OURS] == facts["parameters"][PLAIN]
    for losses in facts["val_loss"].values():  # of 10 characters; both seeds learned
        assert len(set(losses)) == 2
        assert max(losses) < math.log(10)


@needs_extension
def test_the_bare_loop_does_the_same_to_the_bit(text: training_speed.Text) -> None:
    measured = training_speed.measure_engine(text, STEPS, **TINY)  # which compares the losses
    assert [times.keys() for times in measured["rounds"].times] == [{OURS, BARE}]
    assert measured["facts"]["wait_s"] > 0


def test_gpt2_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    measured = training_speed.measure_gpt2(SMALL, 2, rounds=1)
    assert [times.keys() for times in measured["rounds"].times] == [{OURS}]
    assert "pip install" in measured["failed"][HF]


@pytest.mark.parametrize(
    ("loads", "counted"), [([0.0], 0), ([0.5, 0.01], 1), ([0.5, 0.3, 0.4, 0.6, 0.7], 1), ([None], 0)]
)
def test_disturbed_ceilings_are_measured_again(
    loads: list[float | None], counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, taken = iter(loads), iter(range(9))
    monkeypatch.setattr(machine, "ceilings", lambda quick: {"attempt": next(taken)})
    monkeypatch.setattr(machine.OtherLoad, "cores", lambda self: next(left))
    assert training_speed.undisturbed_ceilings(quick=False) == {"attempt": counted}
    assert next(taken) == len(loads)


# ---- What is reported


@pytest.fixture
def results(text: training_speed.Text) -> dict[str, Any]:
    sections = {
        "char": training_speed.measure_char(text, STEPS, 1, compiled=False, **TINY),
        "gpt2": training_speed.measure_gpt2(SMALL, 2, rounds=1, compiled=False),
        "engine": training_speed.measure_engine(text, STEPS, **TINY),
    }
    sections["char"]["failed"] = {COMPILED: "no | compiler"}
    ceilings = {"gemm_gflops": {"float32": 100.0, "bfloat16": 100.0}, "copy_gb_per_s": 10.0}
    facts = {**machine.describe(), "quick": True}
    for measured in sections.values():
        measured["rounds"].loads = [0.0] * len(measured["rounds"].times)
    return training_speed.make_results(facts, ceilings, sections)


@needs_extension
def test_table(results: dict[str, Any], tmp_path: Path) -> None:
    path = training_report.save(results, tmp_path)
    assert training_report.load(tmp_path) == results
    table = training_report.render_table(results)
    for expected in (*training_report.TITLES.values(), "no / compiler", "Validation loss", "A quick run", "Waiting"):
        assert expected in table
    assert "disturbed" not in table
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n<!-- benchmarks:training -->\n<!-- /benchmarks:training -->\nEnd\n", encoding="utf-8")
    training_report.update_readme(training_report.load(path.parent), readme)
    assert table in readme.read_text(encoding="utf-8")
    results["rows"][0]["other_load_cores"] = 1.0
    assert "disturbed" in training_report.render_table(results)


@needs_extension
def test_the_command(
    monkeypatch: pytest.MonkeyPatch, text: training_speed.Text, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = report.README.read_bytes()
    ceilings = {"gemm_gflops": {"float32": 100.0, "bfloat16": 100.0}, "copy_gb_per_s": 10.0}
    monkeypatch.setattr(machine, "ceilings", lambda quick: ceilings)
    monkeypatch.setattr(training_speed, "prepare_text", lambda corpus, folder, seq_len: text)
    monkeypatch.setattr(training_speed, "char_config", lambda *a, whole=training_speed.char_config: whole(*a, **TINY))
    assert training_speed.main(["--quick", "--only", "engine", "--out", str(tmp_path)]) == 0
    found = training_report.load(tmp_path)
    assert {row["provider"] for row in found["rows"]} == {OURS, BARE}
    assert training_report.render_table(found) in capsys.readouterr().out
    assert report.README.read_bytes() == readme
    with pytest.raises(SystemExit, match="2"):
        training_speed.main(["--only", "nothing"])


def test_readme_shows_the_stored_results() -> None:
    readme = report.README.read_text(encoding="utf-8")
    table = training_report.render_table(training_report.load())
    assert "<!-- benchmarks:training -->" in readme
    assert report.replace_block(readme, "training", table) == readme, (
        "README.md is out of date: `python -m benchmarks.training_speed --render`"
    )


def test_stored_results_are_whole() -> None:
    results = training_report.load()
    assert not results["quick"]
    assert results["commit"]
    assert {row["section"] for row in results["rows"]} == set(training_speed.SECTIONS)
    assert all(report.is_measured(row) for row in results["rows"])
