"""Sampling: the distribution that is drawn from, the draw itself, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.generation.models import Fixed
from tinyllm.generation import Sampling, draw, generate

pytestmark = pytest.mark.usefixtures("one_thread")


def shares(logits: list[float], seen: list[int] | None = None, count: int = 4000, **options: Any) -> Tensor:
    """Return how large a part of the distribution each token has, within 1 / count: float64 (V,)."""
    each = torch.tensor([logits]).expand(count, -1)
    known = None
    if seen is not None:
        known = torch.zeros(count, len(logits), dtype=torch.bool)
        known[:, seen] = True
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens, _ = draw(each, Sampling(**options), uniforms, known)
    return torch.bincount(tokens, minlength=len(logits)).double() / count


def expected(
    logits: list[float],
    seen: list[int] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    suppress_id: int | None = None,
) -> list[float]:
    """Return the distribution, step by step in Python's float64."""
    scores = [*logits]
    for i in seen or []:
        scores[i] = scores[i] / repetition_penalty if scores[i] > 0 else scores[i] * repetition_penalty
    if suppress_id is not None:
        scores[suppress_id] = -math.inf
    weights = [math.exp((score - max(scores)) / temperature) for score in scores]
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    kept = order[:top_k]
    total, sum_before, nucleus = sum(weights[i] for i in kept), 0.0, []
    for i in kept:
        if not nucleus or top_p is None or sum_before < top_p * total:
            nucleus.append(i)
        sum_before += weights[i]
    kept = [i for i in nucleus if weights[i] >= (min_p or 0.0)]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


LOGITS = [0.5, 2.0, -1.0, 2.0, 1.0, 0.0, -3.0, 2.0]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"top_k": 1},
    {"top_k": 2},  # of three equal ones
    {"top_k": 5},
    {"top_k": 8},
    {"top_p": 1e-9},
    {"top_p": 0.3},  # likewise
    {"top_p": 0.9},
    {"top_p": 1.0},
    {"min_p": 0.0},
    {"min_p": 0.2},
    {"min_p": 0.99},
    {"repetition_penalty": 1.7, "seen": [1, 2, 5]},
    {"repetition_penalty": 0.5, "seen": [1, 2, 5]},
    {"suppress_id": 1},
    {"temperature": 0.8, "top_k": 6, "top_p": 0.85, "min_p": 0.2, "repetition_penalty": 1.2, "seen": [0, 3]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_distribution_is_that_of_a_plain_computation(options: dict[str, Any]) -> None:
    found, wanted = shares(LOGITS, **options), torch.tensor(expected(LOGITS, **options), dtype=torch.float64)
    assert (found - wanted).abs().max() <= 1 / 4000
    assert ((found > 0) == (wanted > 1 / 4000)).all()


def test_it_is_also_hugging_faces() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    logits, seen = (3 * torch.randn(50)).tolist(), [3, 10, 10, 11]
    processors = [
        transformers.RepetitionPenaltyLogitsProcessor(1.3),
        transformers.TemperatureLogitsWarper(0.9),
        transformers.TopKLogitsWarper(20),
        transformers.TopPLogitsWarper(0.8),
        transformers.MinPLogitsWarper(0.1),
    ]
    options = {"repetition_penalty": 1.3, "temperature": 0.9, "top_k": 20, "top_p": 0.8, "min_p": 0.1}
    for count in range(1, 6):
        scores = torch.tensor([logits], dtype=torch.float64)
        for processor in processors[:count]:
            scores = processor(torch.tensor([seen]), scores)
        found = shares(logits, seen, **dict([*options.items()][:count]))
        assert (found - scores.softmax(-1)[0]).abs().max() <= 1 / 4000
        assert not found[scores[0] == -math.inf].any()


def test_a_token_is_where_the_sum_of_weights_in_order_of_ids_exceeds_the_number() -> None:
    logits = torch.tensor([[0.25, 0.5, 0.0, 0.25]]).log().expand(7, -1)
    uniforms = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 0.9999, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs = draw(logits, Sampling(), uniforms)
    assert tokens.tolist() == [0, 0, 1, 1, 3, 3, 3]
    torch.testing.assert_close(logprobs, torch.tensor([0.25, 0.25, 0.5, 0.5, 0.25, 0.25, 0.25]).log())
    assert tokens.dtype == torch.int64


def test_the_largest_number_never_draws_what_is_filtered_out() -> None:
    torch.manual_seed(0)
    logits = torch.randn(200, 301) * 5
    tokens, _ = draw(logits, Sampling(top_p=0.7), torch.full((200,), 1 - 2**-53, dtype=torch.float64))
    for row, token in zip(logits, tokens.tolist(), strict=True):
        assert expected(row.tolist(), top_p=0.7)[token] > 0


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 2, "repetition_penalty": 3.0}])
def test_log_probabilities_are_the_models_own(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 9, dtype=torch.bfloat16) * 4
    seen = torch.rand(5, 9) < 0.5
    before = logits.clone()
    tokens, logprobs = draw(logits, Sampling(**options), torch.rand(5, dtype=torch.float64), seen)
    wanted = logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, wanted)
    assert torch.equal(logits, before)


def test_temperature_0_takes_the_lowest_of_equal_ids_and_needs_no_numbers() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [-math.inf, -math.inf, 0.0]])
    assert draw(logits, Sampling(temperature=0))[0].tolist() == [1, 0, 2]
    seen = torch.tensor([[False, True, False]]).expand(3, -1)
    assert draw(logits, Sampling(temperature=0, repetition_penalty=2.0), None, seen)[0].tolist() == [2, 0, 2]
    assert draw(logits, Sampling(temperature=0, suppress_id=1))[0].tolist() == [2, 0, 2]
    with pytest.raises(ValueError, match="uniforms is None; above temperature 0"):
        draw(logits, Sampling())


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"temperature": math.nan}, ValueError, "temperature is nan; it must be 0 or a positive number"),
        ({"temperature": -1}, ValueError, "temperature is -1"),
        ({"temperature": "1"}, TypeError, "temperature is '1'"),
        ({"temperature": True}, TypeError, "temperature is True"),
        ({"top_k": 0}, ValueError, "top_k is 0; it must be at least 1"),
        ({"top_k": 1.5}, TypeError, "top_k is 1.5; it must be an integer"),
        ({"top_p": 0.0}, ValueError, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.1}, ValueError, "top_p is 1.1"),
        ({"top_p": math.nan}, ValueError, "top_p is nan"),
        ({"min_p": 1.0}, ValueError, "min_p is 1.0; it must be at least 0 and below 1"),
        ({"min_p": -0.1}, ValueError, "min_p is -0.1"),
        ({"min_p": math.nan}, ValueError, "min_p is nan"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty is 0.0; it must be a positive number"),
        ({"repetition_penalty": math.inf}, ValueError, "repetition_penalty is inf"),
        ({"repetition_penalty": math.nan}, ValueError, "repetition_penalty is nan"),
        ({"suppress_id": -1}, ValueError, "suppress_id is -1"),
    ],
)
def test_what_is_out_of_range_is_refused_when_it_is_made(options: Any, error: Any, reason: str) -> None:
    with pytest.raises(error, match=reason):
        Sampling(**options)


def test_what_does_not_fit_the_vocabulary_is_refused_where_that_is_known() -> None:
    Sampling(top_k=5, suppress_id=4).check_vocabulary(5)
    for options, reason in (
        ({"top_k": 6}, "top_k is 6; it must be at most the size of the vocabulary, 5"),
        ({"suppress_id": 5}, "suppress_id is 5; the model's ids are 0 .. 4"),
    ):
        with pytest.raises(ValueError, match=reason):
            Sampling(**options).check_vocabulary(5)
    with pytest.raises(ValueError, match="top_k is 9; it must be at most the size of the vocabulary, 4"):
        generate(Fixed([0.0] * 4), [0], 1, top_k=9)  # type: ignore[arg-type]


# Whole draws


def test_n_numbers_of_a_generator_are_n_times_one() -> None:
    one, many = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    each = torch.cat([torch.rand(1, dtype=torch.float64, generator=one) for _ in range(100)])
    assert torch.equal(each, torch.rand(100, dtype=torch.float64, generator=many))


def test_draws_follow_temperature_and_top_k() -> None:
    logits = [2.0, 1.0, 0.0, -1.0]
    count = 5_000
    prompt = torch.zeros(count, 1, dtype=torch.int64)

    def drawn_shares(**options: float) -> Tensor:
        drawn = generate(Fixed(logits), prompt, 1, generator=torch.Generator().manual_seed(0), **options)[:, -1]  # type: ignore[arg-type]
        return torch.bincount(drawn, minlength=4) / count

    for temperature in (0.5, 1.0, 3.0):
        expected = torch.softmax(torch.tensor(logits) / temperature, 0)
        # 5 standard deviations of a share of `count` draws are at most 0.036
        assert (drawn_shares(temperature=temperature) - expected).abs().max() < 0.036
    top = drawn_shares(top_k=2)
    assert top[2:].tolist() == [0, 0]
    assert abs(float(top[0]) - 1 / (1 + math.exp(-1))) < 0.036
    assert drawn_shares(top_k=1).tolist() == [1, 0, 0, 0]
    assert torch.equal(drawn_shares(top_k=4), drawn_shares())


@pytest.mark.parametrize("temperature", [1e-30, 1e30])
def test_extreme_temperatures_do_not_overflow(temperature: float) -> None:
    out = generate(Fixed([500.0, -500.0, 499.0]), [0], 5, temperature=temperature, seed=0)  # type: ignore[arg-type]
    if temperature < 1:
        assert out[1:].tolist() == [0] * 5


def test_exactly_k_of_equal_logits() -> None:
    drawn = generate(Fixed([1.0] * 8), torch.zeros(500, 1, dtype=torch.int64), 1, top_k=3, seed=0)  # type: ignore[arg-type]
    assert len(drawn[:, -1].unique()) == 3


def test_a_diverged_model_is_named() -> None:
    for logits in ([math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]):
        with pytest.raises(ValueError, match=r"the model's logits are not finite \(nan or inf\)"):
            generate(Fixed(logits), [0], 1)  # type: ignore[arg-type]
    assert generate(Fixed([-math.inf, 1.0]), [0], 1).tolist() == [0, 1]  # type: ignore[arg-type]
