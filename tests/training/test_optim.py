"""Decay groups, schedules, averaged weights."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.helpers.runs import small
from tinyllm.config.training import SCHEDULES, TrainConfig
from tinyllm.model import SimpleLLM
from tinyllm.training.optim import AveragedWeights, adamw, learning_rate, make_optimizer


def test_cosine_warms_up_and_decays() -> None:
    config = small(steps=100, lr=1.0, warmup_steps=10, min_lr_ratio=0.1)
    rates = [learning_rate(step, config) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert all(earlier > later for earlier, later in itertools.pairwise(rates[9:]))
    assert rates[54] == pytest.approx(0.55)  # halfway down the cosine
    assert rates[-1] == pytest.approx(0.1)
    assert learning_rate(1, small(steps=1, lr=1.0)) == pytest.approx(0.1)  # no warmup, all of the decay
    assert learning_rate(5, small(steps=5, lr=1.0, warmup_steps=10)) == 0.5


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", {10: 1.0, 55: 0.55, 100: 0.1, 120: 0.1}),
        ("constant", {10: 1.0, 55: 1.0, 100: 1.0}),
        ("wsd", {10: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
        ("cosine", {10: 1.0, 55: 0.55, 100: 0.1}),
    ],
)
def test_schedules(schedule: str, expected: dict[int, float]) -> None:
    config = small(steps=100, lr=1.0, warmup_steps=10, schedule=schedule)
    assert {step: learning_rate(step, config) for step in expected} == pytest.approx(expected)
    assert learning_rate(5, config) == 0.5


def test_every_schedule_is_tested() -> None:
    assert set(SCHEDULES) == {"cosine", "linear", "constant", "wsd"}


def test_decay_is_for_matrices_only() -> None:
    config = TrainConfig.from_preset("tiny", weight_decay=0.3)
    model = SimpleLLM.from_config(config.model_config(50))
    optimizer = adamw(model, config)
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in free["params"]} == {1}
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))
    assert optimizer.defaults["fused"]


def test_muon_is_for_the_blocks_matrices_only() -> None:
    config = TrainConfig.from_preset("tiny", weight_decay=0.3, lr=2e-3, optimizer="muon")
    model = SimpleLLM.from_config(config.model_config(50))
    muon, decayed, free = make_optimizer(model, config).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {name.split(".", 2)[2] for name in (names[id(p)] for p in muon["params"])} == {
        *(f"attention.{part}.weight" for part in ("query", "key", "value", "out_proj")),
        *(f"feed_forward.{part}.weight" for part in (0, 2)),
    }
    assert len(muon["params"]) == 6 * config.num_layers
    assert {names[id(p)] for p in decayed["params"]} == {"embedding.embedding.weight", "positional_encoding.weight"}
    assert sum(len(group["params"]) for group in (muon, decayed, free)) == len(list(model.parameters()))
    assert (muon["weight_decay"], decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.3, 0.0)
    assert {group["lr"] for group in (muon, decayed, free)} == {2e-3}


def test_averages_are_the_recurrence() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    averages = AveragedWeights(model, 0.6)
    expected = model.weight.detach().clone()
    for update in range(1, 12):
        with torch.no_grad():
            model.weight.normal_()
        averages.update()
        keep = min(0.6, (1 + update) / (10 + update))
        expected = keep * expected + (1 - keep) * model.weight.detach()
    assert averages.updates == 11
    torch.testing.assert_close(averages.averages["weight"], expected)

    own = model.weight.detach().clone()
    with averages.in_place():
        assert torch.equal(model.weight, averages.averages["weight"])
    assert torch.equal(model.weight, own)
    with pytest.raises(RuntimeError, match="inside"), averages.in_place():
        raise RuntimeError("inside")
    assert torch.equal(model.weight, own)
