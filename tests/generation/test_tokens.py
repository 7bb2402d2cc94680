"""Generation of ids: what the model is shown, where texts end, what is drawn for a seed, and what is refused."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.generation.models import VOCAB, Fixed, Interrupted, Rows, Scripted, small_model
from tinyllm.generation import generate, iter_tokens
from tinyllm.model import SimpleLLM

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model() -> SimpleLLM:
    torch.manual_seed(0)
    return SimpleLLM(VOCAB, 8, 16, 2, causal=True, max_seq_len=6, dropout=0.5, position="learned")


# Texts


def test_shapes_and_the_prompt_comes_first(model: SimpleLLM) -> None:
    out = generate(model, [1, 2, 3], 4, seed=0)
    assert out.shape == (7,)
    assert out.dtype == torch.int64
    assert out[:3].tolist() == [1, 2, 3]
    batch = generate(model, torch.tensor([[1, 2], [3, 4]], dtype=torch.int32), 5, seed=0)
    assert batch.shape == (2, 7)
    assert batch[:, :2].tolist() == [[1, 2], [3, 4]]
    assert int(batch.min()) >= 0
    assert int(batch.max()) < VOCAB
    assert generate(model, [1], 0).tolist() == [1]


def test_temperature_0_takes_the_likeliest(model: SimpleLLM) -> None:
    out = generate(model, [1, 2], 4, temperature=0)
    model.eval()
    ids = [1, 2]
    for _ in range(4):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert out.tolist() == ids


def test_the_seed_decides(model: SimpleLLM) -> None:
    outs = [generate(model, [1], 30, temperature=2.0, seed=seed).tolist() for seed in (0, 0, 1)]
    assert outs[0] == outs[1] != outs[2]
    generator = torch.Generator().manual_seed(0)
    assert generate(model, [1], 30, temperature=2.0, generator=generator).tolist() == outs[0]
    torch.manual_seed(5)
    first = generate(model, [1], 30, temperature=2.0)
    torch.manual_seed(5)
    assert torch.equal(first, generate(model, [1], 30, temperature=2.0))


# What the model sees, and the state it is left in


def test_the_context_is_cropped_to_max_seq_len(model: SimpleLLM) -> None:
    long = [1, 2, 3, 4, 5, 6, 7, 8]
    out = generate(model, long, 10, temperature=0)
    assert len(out) == 18
    assert torch.equal(out[2:], generate(model, long[2:], 10, temperature=0))
    scripted = Scripted([3, 1, 4], 5, max_seq_len=4)
    generate(scripted, [0, 1, 2], 3)  # type: ignore[arg-type]
    assert [ids.tolist() for ids in scripted.shown] == [[[0, 1, 2]], [[0, 1, 2, 3]], [[1, 2, 3, 1]]]


def test_the_model_keeps_its_mode_and_gets_no_gradient(model: SimpleLLM) -> None:
    model.train()
    first = generate(model, [1, 2], 3, temperature=0)
    assert model.training
    model.eval()
    assert torch.equal(first, generate(model, [1, 2], 3, temperature=0))  # dropout was off
    assert not model.training
    assert not first.requires_grad


def test_stop_id() -> None:
    out = generate(Scripted([3, 4, 2, 1], 5), [0], 10, stop_id=2)  # type: ignore[arg-type]
    assert out.tolist() == [0, 3, 4, 2]


def test_stopped_rows_of_a_batch_are_filled_up() -> None:
    out = generate(Rows([[2, 1, 1, 1], [3, 3, 2, 1]], 5), [[0], [0]], 10, stop_id=2)  # type: ignore[arg-type]
    assert out.tolist() == [[0, 2, 2, 2], [0, 3, 3, 2]]


def test_both_functions_take_the_same_arguments() -> None:
    assert inspect.signature(generate).parameters == inspect.signature(iter_tokens).parameters


# Refusals


@pytest.mark.parametrize(
    ("ids", "options", "error", "reason"),
    [
        ([], {}, ValueError, r"ids has shape \(0,\)"),
        ([[[1]]], {}, ValueError, r"shape \(1, 1, 1\)"),
        (torch.tensor(1), {}, ValueError, r"shape \(\)"),
        ([1.5], {}, TypeError, "float32"),
        ([True], {}, TypeError, "bool"),
        ([0, VOCAB], {}, ValueError, f"token id {VOCAB}.* 0 .. {VOCAB - 1}"),
        ([-1, 0], {}, ValueError, "token id -1"),
        ([1], {"max_new_tokens": -1}, ValueError, "max_new_tokens is -1"),
        ([1], {"temperature": -0.1}, ValueError, "temperature is -0.1"),
        ([1], {"temperature": math.nan}, ValueError, "temperature is nan"),
        ([1], {"temperature": math.inf}, ValueError, "temperature is inf"),
        ([1], {"seed": -1}, ValueError, "seed is -1"),
        ([1], {"seed": 2**70}, ValueError, f"seed is {2**70}"),
        ([1], {"top_k": 0}, ValueError, "top_k is 0"),
        ([1], {"stop_id": VOCAB}, ValueError, f"stop_id is {VOCAB}"),
        ([1], {"stop_id": [0, -1]}, ValueError, "stop_id is -1"),
        ([1], {"top_k": VOCAB + 1}, ValueError, f"top_k is {VOCAB + 1}; it must be at most .*, {VOCAB}"),
        ([1], {"top_p": 0.0}, ValueError, "top_p is 0.0"),
        ([1], {"min_p": 1.0}, ValueError, "min_p is 1.0"),
        ([1], {"repetition_penalty": -1.0}, ValueError, "repetition_penalty is -1.0"),
        ([1], {"seed": [1, 2]}, ValueError, "seed has 2 seeds; the number of prompts is 1"),
        ([[1], [2]], {"seed": 2**63 - 1}, ValueError, f"seed is {2**63}"),
        ([1], {"overflow": "wrap"}, ValueError, 'overflow is \'wrap\'; it must be "slide" or "stop"'),
        ([1] * 7, {"overflow": "stop"}, ValueError, "ids has 7 tokens; .* may have max_seq_len, 6"),
        ([[1], [2, VOCAB]], {}, ValueError, rf"ids\[1\] has the token id {VOCAB}"),
        ([torch.tensor([1]), torch.tensor([])], {}, ValueError, r"ids\[1\] has shape \(0,\)"),
        ([[1], [1.5, 2]], {}, TypeError, r"ids\[1\] has dtype torch.float32"),
        ([1], {"seed": 1, "generator": torch.Generator()}, ValueError, "not both"),
        ([1], {"generator": 3}, TypeError, "generator is 3; it must be a torch.Generator"),
        ([1], {"max_new_tokens": True}, TypeError, "max_new_tokens is True; it must be an integer"),
        ([1], {"max_new_tokens": 1.5}, TypeError, "max_new_tokens is 1.5; it must be an integer"),
        ("def", {}, TypeError, r"ids is 'def'; it must be token ids, .* \(generate_text takes text\)"),
        (["def"], {}, TypeError, r"ids is \['def'\]; .*generate_text takes text"),
        (["def", "if"], {}, TypeError, r"ids\[0\] is 'def'; .*generate_text takes text"),
        (None, {}, TypeError, "ids is None; it must be token ids"),
        ({1, 2}, {}, TypeError, "ids is {1, 2}; it must be token ids"),
        ([1, [2]], {}, TypeError, r"ids is \[1, \[2\]\]; it must be token ids"),
        ([[1], None], {}, TypeError, r"ids is \[\[1\], None\]; it must be token ids"),
        ([[]], {}, ValueError, r"ids has shape \(1, 0\)"),
        ([[], [1]], {}, ValueError, r"ids\[0\] has shape \(0,\); each prompt must be \(T,\), with at least one token"),
        *(
            ([1], {name: value}, TypeError, re.escape(f"{name} is {value!r}; it must be an integer, or a list of"))
            for name in ("seed", "stop_id")
            for value in ("5", b"5", 1.5, True, {1, 2}, torch.tensor([1, 2]), [1.5], [True], ["a"], [[1]])
        ),
    ],
)
def test_bad_arguments_are_refused_at_the_call(model: SimpleLLM, ids, options, error, reason) -> None:
    options = {"max_new_tokens": 3, **options}
    with pytest.raises(error, match=reason):
        generate(model, ids, **options)
    with pytest.raises(error, match=reason):
        iter_tokens(model, ids, **options)  # nothing drawn yet


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor])
def test_integers_of_other_libraries_are_integers(model: SimpleLLM, kind: Any) -> None:
    expected = generate(model, [1, 2], 4, seed=3, stop_id=5)
    assert torch.equal(generate(model, [kind(1), kind(2)], kind(4), seed=kind(3), stop_id=kind(5)), expected)
    assert torch.equal(generate(model, [1, 2], 4, seed=[kind(3)], stop_id=[kind(5)]), expected)


# Batches


PROMPTS = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]


def test_prompts_of_different_lengths_give_a_list() -> None:
    model = small_model()
    out = generate(model, PROMPTS, 4, temperature=0)
    assert [text.tolist()[: len(prompt)] for text, prompt in zip(out, PROMPTS, strict=True)] == PROMPTS
    assert [len(text) for text in out] == [9, 5, 7]
    assert all(text.dtype == torch.int64 for text in out)
    alike = generate(model, [torch.tensor([1, 2]), torch.tensor([3, 4])], 4, temperature=0)
    assert isinstance(alike, list)
    assert torch.equal(torch.stack(alike), generate(model, [[1, 2], [3, 4]], 4, temperature=0))
    steps = [*iter_tokens(model, PROMPTS, 4, temperature=0)]
    assert [step.tolist() for step in steps] == [
        [int(text[len(p) + i]) for text, p in zip(out, PROMPTS, strict=True)] for i in range(4)
    ]
    assert [text.tolist() for text in generate(model, PROMPTS, 0)] == PROMPTS


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.filterwarnings("ignore:the model is not causal")
def test_a_text_depends_on_its_seed_alone(causal: bool) -> None:
    model = small_model(causal=causal)
    options: dict[str, Any] = {"temperature": 2.0, "top_p": 0.95, "repetition_penalty": 1.3}
    out = generate(model, PROMPTS, 12, seed=5, **options)
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(out[row], generate(model, prompt, 12, seed=5 + row, **options))
    turned = generate(model, PROMPTS[::-1], 12, seed=[7, 6, 5], **options)
    assert all(torch.equal(a, b) for a, b in zip(turned[::-1], out, strict=True))
    same = generate(model, [[1]] * 3, 12, seed=[4, 4, 9], **options)
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])


def test_rows_draw_from_a_generator_of_the_callers_in_turn() -> None:
    logits = [0.0] * 8
    generator = torch.Generator().manual_seed(3)
    numbers = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    out = generate(Fixed(logits), [[0], [0]], 3, generator=generator)[:, 1:]  # type: ignore[arg-type]
    assert out.T.flatten().tolist() == (numbers * 8).long().tolist()
    state = generator.get_state()
    generate(Fixed(logits), [[0], [0]], 3, temperature=0, generator=generator)  # type: ignore[arg-type]
    assert torch.equal(state, generator.get_state())  # nothing to draw


def test_several_stop_ids_and_rows_that_end_before_others() -> None:
    scripts = [[0, 3, 1, 3, 3], [3, 3, 2, 3, 3], [3, 3, 3, 3, 4]]
    stream = iter_tokens(Rows(scripts, 5), [[0]] * 3, 5, stop_id=[2, 1])  # type: ignore[arg-type]
    assert [step.tolist() for step in stream] == [[0, 3, 3], [3, 3, 3], [1, 2, 3], [2, 2, 3], [2, 2, 4]]
    assert stream.num_tokens == [3, 3, 5]
    assert stream.finish_reasons == ["stop", "stop", "length"]
    assert stream.prefill_seconds > 0
    assert stream.decode_seconds > 0
    out = generate(Rows(scripts, 5), [torch.tensor([0])] * 3, 5, stop_id=(2, 1))  # type: ignore[arg-type]
    assert [text.tolist() for text in out] == [[0, 0, 3, 1], [0, 3, 3, 2], [0, 3, 3, 3, 3, 4]]


def test_a_row_may_be_ended_by_its_reader() -> None:
    stream = iter_tokens(Rows([[3] * 5, [2] * 5], 5), [[0]] * 2, 5)  # type: ignore[arg-type]
    next(stream)
    stream.end(0, "enough")
    assert [step.tolist() for step in stream] == [[-1, 2]] * 4
    assert (stream.finish_reasons, stream.num_tokens) == (["enough", "length"], [1, 5])


def test_an_exception_ends_the_stream() -> None:
    stream = iter_tokens(Interrupted([1, 2, 3], 5, 1), [0], 3)  # type: ignore[arg-type]
    assert int(next(stream)) == 1
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert next(stream, None) is None
    assert stream.finish_reasons == ["interrupt"]


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_ctrl_c_leaves_the_tokens_that_are_there(calls: int) -> None:
    def write(ids: Any, **options: Any) -> Any:
        return generate(Interrupted([1, 2, 3, 4], 5, calls), ids, 4, **options)  # type: ignore[arg-type]

    new = [1, 2, 3][:calls]
    assert write([0]).tolist() == [0, *new]
    assert write([[0], [3]]).tolist() == [[0, *new], [3, *new]]
    texts, logprobs = write([torch.tensor([0])] * 2, return_logprobs=True)
    assert [text.tolist() for text in texts] == [[0, *new]] * 2
    assert [own.tolist() for own in logprobs] == [[0.0] * calls] * 2


# Log-probabilities


def test_log_probabilities_are_those_of_the_whole_text() -> None:
    model = small_model(norm_first=True)
    options: dict[str, Any] = {"seed": 1, "temperature": 0.5, "top_k": 5, "return_logprobs": True}

    def wanted(text: Tensor, prompt_tokens: int) -> Tensor:
        with torch.no_grad():
            logprobs = model(text[None, :-1])[0].log_softmax(-1)
        return logprobs.gather(-1, text[1:, None])[prompt_tokens - 1 :, 0]

    text, logprobs = generate(model, [1, 2, 3], 6, **options)
    assert logprobs.shape == (6,)
    torch.testing.assert_close(logprobs, wanted(text, 3))
    texts, found = generate(model, PROMPTS, 6, **options)
    for own, logprobs, prompt in zip(texts, found, PROMPTS, strict=True):
        torch.testing.assert_close(logprobs, wanted(own, len(prompt)))
    assert generate(model, [[1], [2]], 0, **options)[1].shape == (2, 0)
    token, logprob = next(iter_tokens(model, [1, 2, 3], 6, **options))
    assert (int(token), float(logprob)) == (int(text[3]), pytest.approx(float(wanted(text, 3)[0]), rel=1e-4))


def test_filled_up_places_have_log_probability_0() -> None:
    model: Any = Rows([[2, 1, 1], [3, 3, 2]], 5)
    assert generate(model, [[0], [0]], 3, stop_id=2, return_logprobs=True)[1].tolist() == [[0.0] * 3] * 2
    model = Fixed([0.0] * 4)
    out, logprobs = generate(model, [[0]] * 9, 8, seed=0, stop_id=2, return_logprobs=True)
    ended = (out[:, 1:] == 2).cumsum(-1) - (out[:, 1:] == 2).int() > 0
    assert torch.equal(logprobs, torch.where(ended, 0.0, math.log(0.25)))
    assert ended.any()


# At max_seq_len


def by_hand(model: SimpleLLM, text: list[int], count: int) -> list[int]:
    """Return a greedy text whose context is halved whenever it is full."""
    size = model.config.max_seq_len
    context = text[-size:]
    for _ in range(count):
        with torch.no_grad():
            token = int(model(torch.tensor([context]))[0, -1].argmax())
        text = [*text, token]
        context = [*context, token]
        if len(context) > size:
            context = context[-max(size // 2, 2) :]
    return text


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("norm_first", [False, True])
def test_sliding_reads_the_last_half_again(size: int, norm_first: bool) -> None:
    model = small_model(max_seq_len=size, norm_first=norm_first)
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [6], [7, 8, 9]]
    out = generate(model, prompts, 20, temperature=0)
    for text, prompt in zip(out, prompts, strict=True):
        assert text.tolist() == by_hand(model, prompt, 20)
        assert text.tolist() == generate(model, prompt, 20, temperature=0).tolist()


def test_a_context_of_one_token() -> None:
    model = small_model(max_seq_len=1)
    ids = [1, 2]
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids[-1:]]))[0, -1].argmax()))
    assert generate(model, [1, 2], 4, temperature=0).tolist() == ids


@pytest.mark.filterwarnings("ignore:the model is not causal")
def test_without_a_cache_the_context_slides_by_one() -> None:
    model = small_model(max_seq_len=5, causal=False)
    ids = [1, 2, 3]
    for _ in range(10):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids[-5:]]))[0, -1].argmax()))
    assert generate(model, [1, 2, 3], 10, temperature=0).tolist() == ids


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.filterwarnings("ignore:the model is not causal")
def test_stopping_at_max_seq_len(causal: bool) -> None:
    model = small_model(max_seq_len=8, causal=causal)
    prompts = [[1, 2, 3, 4, 5, 6], [6], [1] * 8]
    stream = iter_tokens(model, prompts, 20, temperature=0, overflow="stop")
    steps = [step.tolist() for step in stream]
    assert stream.num_tokens == [2, 7, 0]
    assert stream.finish_reasons == ["length"] * 3
    assert [step[0] for step in steps[2:]] == [-1] * 5
    whole = generate(model, prompts, 20, temperature=0, overflow="stop")
    for text, prompt in zip(whole, prompts, strict=True):
        assert len(text) == 8
        alone = generate(model, prompt, 20, temperature=0, overflow="stop")
        assert torch.equal(text, alone)
        assert torch.equal(text, generate(model, prompt, 8 - len(prompt), temperature=0))
    assert len(generate(model, [[1, 2], [3, 4]], 3, overflow="stop", seed=0)[0]) == 5
    with pytest.raises(ValueError, match=r"ids has 9 tokens; with overflow='stop' .* max_seq_len, 8"):
        generate(model, [[1], [2] * 9], 3, overflow="stop")
