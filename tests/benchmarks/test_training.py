"""The benchmark of training compares equals, and reports what it measured. How fast anything is, no test says."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine, peers, report, training
from benchmarks.row import OURS
from benchmarks.training import BARE, COMPILED, HF, PLAIN
from benchmarks.turns import LOG_INTERVAL, Rounds, Turns, in_turns
from tests.helpers.needs import needs_extension, needs_transformers
from tinyllm.config.model import SimpleLLMConfig
from tinyllm.data.corpus import find_files
from tinyllm.model import SimpleLLM, init_gpt2_weights

from .made_up import CEILINGS

SMALL = SimpleLLMConfig(50, 16, 32, 2, 2, True, 8, 0.0, "gelu", True, True, True, "learned")
TINY: dict[str, Any] = {"seq_len": 8, "batch_size": 2, "eval_batches": 2, "sample_tokens": 0}
STEPS = 3 * LOG_INTERVAL  # the first turn warms up, and what `fit` does in the last one ends with a validation


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: on a busy machine two would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> training.Text:
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.py").write_text("def add(a, b):\n    return a + b\n\n\n" * 100, encoding="utf-8")
    return training.prepare_text(find_files([folder / "text.py"]), folder / "tokens", TINY["seq_len"], 10)


# ---- What is compared


def a_model(config: SimpleLLMConfig = SMALL) -> SimpleLLM:
    torch.manual_seed(0)
    return init_gpt2_weights(SimpleLLM.from_config(config))


def a_batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(SMALL.vocab_size, (3, SMALL.max_seq_len + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def test_the_plain_model_is_ours() -> None:
    ours = a_model()
    peer = peers.PlainLLM(ours)
    assert training.count(peer) == ours.num_parameters()
    assert training.check_same(ours, PLAIN, peer.loss, peer, a_batch()) < 1e-5
    with torch.no_grad():
        peer.ln_f.weight[0] += 0.1
    with pytest.raises(AssertionError, match="differ from ours"):
        training.check_same(ours, PLAIN, peer.loss, peer, a_batch())


@pytest.mark.parametrize(
    "change",
    [
        {"position": "sinusoidal"},
        {"activation": "relu"},
        {"activation": "gelu_tanh", "norm_eps": 1e-3},
        {"output_bias": False},
        {"causal": False},
        {"num_heads": 1},
        {"norm_first": False},
        {"bias": False},
        {"tie_embeddings": False},
    ],
)
def test_the_plain_model_has_all_options(change: dict[str, Any]) -> None:
    ours = a_model(dataclasses.replace(SMALL, **change))
    peer = peers.PlainLLM(ours)
    assert training.count(peer) == ours.num_parameters()
    assert training.check_same(ours, PLAIN, peer.loss, peer, a_batch()) < 1e-5


@pytest.mark.parametrize("change", [{}, {"num_heads": 1}, {"norm_first": False}, {"causal": False}])
def test_the_plain_model_writes_with_a_cache_of_its_own(change: dict[str, Any]) -> None:
    peer = peers.PlainLLM(a_model(dataclasses.replace(SMALL, **change))).eval()
    prompt = expected = a_batch()[0][:, :3]
    for _ in range(5):
        with torch.no_grad():
            expected = torch.cat([expected, peer(expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(peer.generate(prompt, 5, temperature=0), expected)
    assert torch.equal(peer.generate(prompt, 5, seed=1), peer.generate(prompt, 5, seed=1))
    with pytest.raises(ValueError, match=f"max_seq_len is {SMALL.max_seq_len}"):
        peer.generate(prompt, SMALL.max_seq_len)


@needs_transformers
def test_hugging_faces_model_is_ours() -> None:
    ours = a_model()
    peer = peers.HuggingFace(ours)
    assert training.count(peer) == ours.num_parameters() - SMALL.vocab_size  # the output's bias
    assert training.check_same(ours, HF, peer.loss, peer, a_batch()) < 1e-5
    with torch.no_grad():
        ours.output.bias += 1
    with pytest.raises(ValueError, match="no bias"):
        peers.HuggingFace(ours)


def test_every_weight_is_copied() -> None:
    peer = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="bias"):
        peers.copy_weights(peer, {"weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        peers.copy_weights(peer, {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})


# ---- How


def test_all_take_turns() -> None:
    done: list[tuple[str, int, int]] = []
    at = 0
    others = {name: lambda n, name=name: done.append((name, n, at)) for name in "ab"}
    turns = Turns(others, LOG_INTERVAL)
    for at in range(1, STEPS + 1):
        turns.on_step(at)
    assert sorted(done) == [(name, LOG_INTERVAL, 1 + LOG_INTERVAL * turn) for name in "ab" for turn in range(3)]
    assert [times.keys() for times in turns.rounds.times] == [{OURS, "a", "b"}]
    assert len(turns.rounds.loads) == 1

    done.clear()
    rounds = in_turns(others, 3, 2)
    assert sorted(done) == [(name, 2, STEPS) for name in "ab" for _ in range(4)]
    assert [len(rounds.of(name)) for name in "ab"] == [3, 3]


def test_disturbed_rounds_are_left_out() -> None:
    times = [{OURS: float(i)} for i in range(8)]
    some = Rounds(times, [0.0, 0.5, 0.01, 0.0, None, 0.5, 0.0, 0.09])
    assert some.undisturbed().of(OURS) == [0, 2, 3, 4, 6, 7]
    assert some.undisturbed().load() == pytest.approx(0.02)
    many = Rounds(times, [0.5] * 4 + [0.0] * 4)
    assert many.undisturbed() is many  # too few are left
    assert many.load() == 0.25
    assert Rounds(times, [None] * 8).load() is None


@needs_extension
def test_character_model(text: training.Text) -> None:
    measured = training.measure_char(text, STEPS, 2, compiled=False, **TINY)
    assert [times.keys() for times in measured.rounds.times] == [{OURS, PLAIN}] * 2
    facts = measured.details
    assert facts["parameters"][OURS] == facts["parameters"][PLAIN]
    for losses in facts["val_loss"].values():  # of 10 characters; both seeds learned
        assert len(set(losses)) == 2
        assert max(losses) < math.log(10)


@needs_extension
def test_the_way_to_a_loss(text: training.Text) -> None:
    """Each does all of its own steps, by its own recipe."""
    measured = training.measure_goal(text, 7 * LOG_INTERVAL, STEPS, **TINY)
    assert [times.keys() for times in measured.rounds.times] == [{OURS, PLAIN}]
    assert measured.details["steps"] == {OURS: STEPS, PLAIN: 7 * LOG_INTERVAL}
    assert max(measured.details["val_loss"].values()) < math.log(10)
    (times,) = measured.rounds.times
    rows = {row["provider"]: row for row in measured.rows("goal")}
    assert rows[PLAIN]["median_s"] == pytest.approx(STEPS * times[PLAIN])


@needs_extension
def test_the_bare_loop_does_the_same_to_the_bit(text: training.Text) -> None:
    measured = training.measure_engine(text, STEPS, **TINY)  # which compares the losses
    assert [times.keys() for times in measured.rounds.times] == [{OURS, BARE}]
    assert measured.details["wait_s"] > 0


def test_gpt2_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    measured = training.measure_gpt2(SMALL, 2, rounds=1)
    assert [times.keys() for times in measured.rounds.times] == [{OURS}]
    assert "pip install" in measured.failed[HF]


# ---- What is reported


@pytest.fixture
def results(text: training.Text) -> dict[str, Any]:
    sections = {
        "char": training.measure_char(text, STEPS, 1, compiled=False, **TINY),
        "goal": training.measure_goal(text, 2 * STEPS, STEPS, **TINY),
        "gpt2": training.measure_gpt2(SMALL, 2, rounds=1, compiled=False),
        "engine": training.measure_engine(text, STEPS, **TINY),
    }
    sections["char"].failed = {COMPILED: "no | compiler"}
    facts = {**machine.describe(), "quick": True}
    for measured in sections.values():
        measured.rounds.loads = [0.0] * len(measured.rounds.times)
    return training.make_results(facts, CEILINGS, sections)


@needs_extension
def test_table(results: dict[str, Any]) -> None:
    assert report.kind_of(results) == "training"
    table = report.render_tables(results)
    titles = [report.SECTIONS[section] for section in training.SECTIONS]
    for expected in (*titles, "no / compiler", "Validation loss", "A quick run", "Waiting"):
        assert expected in table
    assert "disturbed" not in table
    assert "left out" not in table
    results["rows"][0].update(other_load_cores=1.0, rounds_left_out=4)
    assert "4 rounds are left out" in report.render_tables(results)
    assert "disturbed" in report.render_tables(results)


@needs_extension
def test_the_command(
    monkeypatch: pytest.MonkeyPatch, text: training.Text, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = report.README.read_bytes(), report.PAGE.read_bytes()
    monkeypatch.setattr(machine, "ceilings", lambda quick: CEILINGS)
    monkeypatch.setattr(training, "prepare_text", lambda corpus, folder, seq_len: text)
    monkeypatch.setattr(training, "char_config", lambda *a, whole=training.char_config: whole(*a, **TINY))
    assert training.main(["--quick", "--only", "engine", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert {row["provider"] for row in found["rows"]} == {OURS, BARE}
    assert report.render_tables(found) in capsys.readouterr().out
    assert (report.README.read_bytes(), report.PAGE.read_bytes()) == kept
    with pytest.raises(SystemExit, match="2"):
        training.main(["--only", "nothing"])
