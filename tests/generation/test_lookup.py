"""Speculation by look-up: what is guessed, and that the text stays what it is without guesses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.generation.models import VOCAB, Scripted, small_model
from tests.helpers.needs import needs_extension
from tinyllm.generation import Cached, Engine, generate, iter_tokens
from tinyllm.generation.lookup import Lookup
from tinyllm.quantization import quantize


def test_what_followed_the_same_tokens_is_guessed() -> None:
    lookup = Lookup([1, 2, 3, 4, 5, 1, 2], 3)
    assert lookup.guess() == [3, 4, 5]
    lookup.add(9)
    assert lookup.guess() == []  # the text has no 2 9 before
    assert Lookup([5, 2, 3, 7, 1, 2, 3, 8, 5, 2, 3], 2).guess() == [7, 1]  # rather after three tokens than after two
    assert Lookup([2, 3, 7, 2, 3, 8, 2, 3], 1).guess() == [8]  # rather the last place
    assert Lookup([4, 4, 4], 4).guess() == [4, 4, 4, 4]  # beyond the end, as the guess goes on
    assert Lookup([1, 2, 1, 2], 5).guess() == [1, 2, 1, 2, 1]
    assert Lookup([1], 2).guess() == []


def test_wrong_guesses_make_guesses_shorter() -> None:
    lookup = Lookup([4] * 5, 8)
    found = []
    for right in (8, 2, 0, 1, 3, 5):
        lookup.learn(len(lookup.guess()), right)
        found.append(len(lookup.guess()))
    assert found == [8, 3, 1, 3, 5, 7]


@pytest.fixture(params=[pytest.param(Engine, marks=needs_extension), Cached])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a decoder of `small_model` whose attribute `guesses` lists of each call how many were made, and right."""
    model = small_model()
    made = request.param(model, 1, model.config.max_seq_len)
    return counted(made, monkeypatch)


def counted(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    verify, decoder.guesses = decoder.verify, []

    def count(tokens: Tensor, *args: Any) -> Any:
        found = verify(tokens, *args)
        decoder.guesses.append((len(tokens) - 1, len(found[0]) - 1))
        return found

    monkeypatch.setattr(decoder, "verify", count)
    return decoder


def check_same(decoder: Any, **options: Any) -> None:
    """Check that guesses change neither tokens nor log-probabilities."""
    model = decoder.model
    found = generate(model, [1, 2, 3, 1, 2], 60, decoder=decoder, prompt_lookup_num_tokens=4, **options)
    expected = generate(model, [1, 2, 3, 1, 2], 60, **options)
    if options.get("return_logprobs"):
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)
        found, expected = found[0], expected[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0, "repetition_penalty": 1.3},
        {"temperature": 0, "overflow": "stop"},
        {"temperature": 0.2, "seed": 5},
        {"temperature": 0.3, "seed": [6], "top_k": 4, "repetition_penalty": 1.1},
        {"temperature": 0.3, "seed": 7, "top_p": 0.8, "min_p": 0.01, "suppress_id": 4},
    ],
    ids=str,
)
def test_the_text_is_that_without_guesses(decoder: Any, options: dict[str, Any]) -> None:
    check_same(decoder, **options, return_logprobs=True)
    assert sum(right for _, right in decoder.guesses) > 0
    assert all(made <= 4 for made, _ in decoder.guesses)


def test_wrong_guesses_leave_no_trace(decoder: Any) -> None:
    for seed in range(3):
        check_same(decoder, temperature=3.0, seed=seed, return_logprobs=True)
    assert sum(made - right for made, right in decoder.guesses) > 10


def test_a_stop_id_among_the_guesses_ends_the_text(decoder: Any) -> None:
    model = small_model()
    text = generate(model, [1, 2, 3, 1, 2], 60, temperature=0).tolist()
    for stop in set(text[5:]):
        check_same(decoder, temperature=0, stop_id=stop)


@pytest.mark.parametrize("seeded", [False, True])
def test_a_generator_of_the_callers_has_given_as_many_numbers_as_without(decoder: Any, seeded: bool) -> None:
    model, states, texts = decoder.model, [], []
    for guesses in ({}, {"decoder": decoder, "prompt_lookup_num_tokens": 4}):
        generator = torch.Generator().manual_seed(3) if seeded else None
        torch.manual_seed(3)
        options: dict[str, Any] = {"temperature": 0.3, "generator": generator, **guesses}
        texts.append(generate(model, [1, 2, 1, 2], 20, **options).tolist())
        states.append((generator or torch.default_generator).get_state())
    assert decoder.guesses
    assert texts[0] == texts[1]
    assert torch.equal(*states)


def test_greedy_guesses_leave_generators_alone(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    verify, drawn = decoder.verify, []

    def draw_beside(*args: Any) -> Any:
        drawn.append(float(torch.rand(())))
        return verify(*args)

    monkeypatch.setattr(decoder, "verify", draw_beside)
    generate(decoder.model, [1, 2, 1, 2], 15, temperature=0, decoder=decoder, prompt_lookup_num_tokens=4)
    assert len(set(drawn)) == len(drawn) > 1


@needs_extension
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_quantised_weights(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guess meets the weights as a token that is drawn does: the same bits."""
    model = quantize(small_model(), weights)
    made = counted(Engine(model, 1, 24), monkeypatch)
    found = generate(
        model, [1, 2, 1, 2], 20, temperature=0, decoder=made, prompt_lookup_num_tokens=7, return_logprobs=True
    )
    expected = generate(model, [1, 2, 1, 2], 20, temperature=0, return_logprobs=True)
    assert sum(right for _, right in made.guesses) > 0
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_streams_give_each_token(decoder: Any) -> None:
    stream = iter_tokens(decoder.model, [1, 2, 1, 2], 15, temperature=0, decoder=decoder, prompt_lookup_num_tokens=4)
    tokens = [int(token) for token in stream]
    assert tokens == generate(decoder.model, [1, 2, 1, 2], 15, temperature=0).tolist()[4:]
    assert stream.finish_reasons == ["length"]
    assert stream.num_tokens == [15]


def test_what_is_refused() -> None:
    model = small_model()
    for most, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"prompt_lookup_num_tokens is {most}"):
            generate(model, [1], 4, prompt_lookup_num_tokens=most)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens is 3 for 2 prompts; it is for a single one"):
        generate(model, [[1], [2]], 4, prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens is 3 with a Recompute"):
        generate(Scripted([1], VOCAB), [1], 4, prompt_lookup_num_tokens=3)  # type: ignore[arg-type]
