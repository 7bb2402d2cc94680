"""Engine: many tokens in one call, whatever the threads, the batch and the kind of weights."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.generation.models import VOCAB, small_model
from tests.helpers.needs import needs_extension
from tinyllm import ops
from tinyllm.generation import Cached, Engine, Sampling, draw, generate
from tinyllm.model import SimpleLLM
from tinyllm.nn import QuantizedEmbedding, QuantizedLinear
from tinyllm.quantization import quantize

pytestmark = needs_extension

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 1]]


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def larger_model(**changes: Any) -> SimpleLLM:
    """Return a model whose matrices are worth several threads, even with weights of 4 bits, and whose sizes are no
    multiples of vectors."""
    torch.manual_seed(1)
    options: dict[str, Any] = {"num_heads": 3, "causal": True, "norm_first": True, "max_seq_len": 600, **changes}
    return SimpleLLM(211, 606, 2001, 2, position="learned", tie_embeddings=True, activation="gelu", **options).eval()


def written(
    model: SimpleLLM, prompts: list[list[int]], count: int, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    tokens, logprobs = generate(model, [*map(torch.tensor, prompts)], count, return_logprobs=True, **options)
    return tokens, logprobs


@pytest.mark.parametrize("weights", ["float32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_and_the_batch_change_no_bit(threads: Any, weights: str, cache_dtype: Any) -> None:
    model = quantize(larger_model(), weights)
    found = []
    for count in (1, 2, 3, 8):
        threads(count)
        found.append(written(model, PROMPTS, 20, seed=[3, 4, 5], cache_dtype=cache_dtype))
    alone = [written(model, [prompt], 20, seed=[3 + i], cache_dtype=cache_dtype) for i, prompt in enumerate(PROMPTS)]
    found.append(([texts[0] for texts, _ in alone], [logprobs[0] for _, logprobs in alone]))
    texts, logprobs = written(model, PROMPTS * 4, 20, seed=[3, 4, 5] * 4, cache_dtype=cache_dtype)  # more than a tile
    found += [(texts[i : i + 3], logprobs[i : i + 3]) for i in range(0, 12, 3)]
    for texts, logprobs in found[1:]:
        assert all(map(torch.equal, texts, found[0][0]))
        assert all(map(torch.equal, logprobs, found[0][1]))


def test_large_models_draw_few_tokens_a_call_and_the_text_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = larger_model(), {}
    for limit in (1, 80 << 20, 1 << 40):
        monkeypatch.setattr("tinyllm.generation.engine._LARGE_TOKEN", limit)
        found[Engine(model, 3, 100).tokens_a_call] = written(model, PROMPTS, 20, seed=1)
    assert list(found) == [1, 2, 16]
    assert all(map(torch.equal, found[1][0] + found[2][0], found[16][0] * 2))


@pytest.mark.parametrize("count", [2, 4])
def test_many_short_calls_end(threads: Any, count: int) -> None:
    """Threads that come late to a region, or leave it late, meet all states of its phases."""
    threads(count)
    torch.manual_seed(0)
    model = SimpleLLM(VOCAB, 384, 768, 2, num_heads=1, causal=True, max_seq_len=2)  # large enough for several threads
    engine = Engine(model, 1, 2)
    tokens = torch.tensor([1])
    engine.read([torch.tensor([2])])
    expected = engine.step(tokens)
    for _ in range(1_000):
        engine.read([torch.tensor([2])])
        assert torch.equal(engine.step(tokens), expected)


@pytest.mark.parametrize(("kept", "new"), [(100, 6), (10, 8), (100, 9), (100, 20)])
def test_a_prompt_that_is_read_on_does_not_depend_on_the_other_rows(kept: int, new: int) -> None:
    model = larger_model()
    text = torch.randint(200, (kept + new,))
    found = []
    for others in ([], [(100, 126)], [(3, 5), (20, 30)], [(100, 200)]):  # the last: more rows than are unpacked for
        engine = Engine(model, 1 + len(others), 600)
        for i, _ in enumerate(("read", "read on")):
            lengths = [(kept, kept + new)[i], *(pair[i] for pair in others)]
            longer = [text[:1].expand(length) if row else text[:length] for row, length in enumerate(lengths)]
            logits = engine.read(longer)
        found.append(logits[0])
    assert all(torch.equal(found[0], logits) for logits in found[1:])


def test_regions_within_regions_and_beside_others(threads: Any) -> None:
    """Whatever threads there are, a call ends: the same text comes from several threads of Python at once."""
    model = larger_model()
    threads(2)
    expected = written(model, PROMPTS, 30, seed=1)[0]
    found: list[Any] = []

    def write() -> None:
        torch.set_num_threads(3)
        found.append(written(model, PROMPTS, 30, seed=1)[0])

    workers = [threading.Thread(target=write) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert len(found) == 4
    assert all(torch.equal(a, b) for texts in found for a, b in zip(texts, expected, strict=True))


@pytest.mark.parametrize("options", [{}, {"norm_first": True, "tie_embeddings": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_quantised_models_are_those_of_their_modules(options: dict[str, Any], weights: str) -> None:
    plain = small_model(**options)
    model = quantize(copy.deepcopy(plain), weights)
    assert isinstance(model.output, QuantizedLinear)
    assert isinstance(model.embedding.embedding, QuantizedEmbedding)
    ends = "int8" if weights == "int4" else weights
    assert (model.output.weight.kind, model.embedding.embedding.weight.kind) == (ends, ends)
    assert (model.output.data is model.embedding.embedding.data) == plain.config.tie_embeddings
    prompts = [torch.arange(20) % VOCAB, torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])]
    kept: dict[str, Any] = {"cache_dtype": torch.float32}
    engine, cached = Engine(model, 2, 24, **kept), Cached(model, 2, 24)
    # The few rows of the output, and of a step, are rounded to 8 bits.
    close = {"rtol": 0, "atol": 1e-4 if weights == "bf16" else 0.05}
    torch.testing.assert_close(engine.read(prompts), cached.read(prompts), **close)
    tokens = torch.tensor([7, 7])
    torch.testing.assert_close(engine.step(tokens), cached.step(tokens), **close)
    with torch.no_grad():
        whole = model(prompts[0].unsqueeze(0))[:, -1]
        torch.testing.assert_close(Engine(model, 1, 24, **kept).read(prompts[:1]), whole, **close)
        torch.testing.assert_close(whole, plain(prompts[0].unsqueeze(0))[:, -1], rtol=0, atol=0.5)


def test_a_model_of_bfloat16_is_computed_in_float32() -> None:
    model = small_model(norm_first=True).bfloat16()
    reference = copy.deepcopy(model).float()
    prompts = [torch.tensor([1, 2, 3, 4, 5, 6])]
    engine = Engine(model, 1, 24, cache_dtype=torch.float32)
    torch.testing.assert_close(engine.read(prompts), Cached(reference, 1, 24).read(prompts))


def test_weights_in_fewer_bits_have_a_bfloat16_cache() -> None:
    plain = small_model()
    prompt = [torch.arange(20) % VOCAB]
    assert Engine(plain, 1, 24)._cache.dtype == torch.float32
    assert Engine(small_model().bfloat16(), 1, 24)._cache.dtype == torch.bfloat16
    for weights in ("bf16", "int8", "int4"):
        model = quantize(copy.deepcopy(plain), weights)
        short, whole = Engine(model, 1, 24), Engine(model, 1, 24, cache_dtype=torch.float32)
        assert short._cache.dtype == torch.bfloat16
        torch.testing.assert_close(short.read(prompt), whole.read(prompt), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.0),
        Sampling(1.0),
        Sampling(0.7, top_k=5),
        Sampling(1.3, top_p=0.8),
        Sampling(1.0, min_p=0.05),
        Sampling(0.9, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.4, suppress_id=7),
        Sampling(0.0, repetition_penalty=2.0),
        Sampling(1.0, top_k=150, top_p=0.95),
        Sampling(1.5, ids_below=20),
        Sampling(0.0, ids_below=20),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_from_the_logits(sampling: Sampling) -> None:
    model = larger_model()
    with torch.no_grad():
        model.output.weight.mul_(20.0)  # so that the distribution has likely tokens
    uniforms = torch.rand(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prompts, first = [*map(torch.tensor, PROMPTS)], torch.tensor([1, 2, 3])
    seen = torch.zeros(3, 211, dtype=torch.bool).scatter_(1, first.unsqueeze(1), True)
    many, single, marks = Engine(model, 3, 60), Engine(model, 3, 60), seen.clone()
    many.read(prompts)
    tokens, logprobs = many.write(first, uniforms, sampling, seen)
    single.read(prompts)
    last = first
    for step in range(12):
        drawn, expected = draw(single.step(last), sampling, uniforms[:, step], marks)
        assert torch.equal(tokens[:, step], drawn), step
        torch.testing.assert_close(logprobs[:, step], expected, rtol=1e-5, atol=1e-5)
        marks.scatter_(1, drawn.unsqueeze(1), True)
        last = drawn
    if sampling.repetition_penalty != 1:
        assert torch.equal(seen, marks)
    assert many.lengths() == single.lengths()
    torch.testing.assert_close(many.step(last), single.step(last), rtol=0, atol=0)


def test_drawing_stops_when_all_rows_have_come_to_a_stop_id() -> None:
    model = larger_model()
    engine = Engine(model, 2, 60)
    engine.read([torch.tensor([1]), torch.tensor([2])])
    free = engine.write(torch.tensor([3, 4]), torch.full((2, 10), 0.5, dtype=torch.float64), Sampling(1.0)).tokens
    stops = [int(free[0, 2]), int(free[1, 5])]
    where = [min(row.tolist().index(stop) for stop in stops if stop in row.tolist()) for row in free]
    engine.read([torch.tensor([1]), torch.tensor([2])])
    uniforms = torch.full((2, 10), 0.5, dtype=torch.float64)
    tokens = engine.write(torch.tensor([3, 4]), uniforms, Sampling(1.0), stop_ids=stops).tokens
    assert tokens.size(1) == max(where) + 1
    for row, end in enumerate(where):
        assert torch.equal(tokens[row, : end + 1], free[row, : end + 1])
        assert (tokens[row, end:] == tokens[row, end]).all()
    assert engine.lengths() == [1 + tokens.size(1)] * 2


def test_keys_beyond_one_range_of_attention() -> None:
    model = larger_model()
    texts = [torch.arange(550) % 211, torch.arange(520) % 199, torch.arange(4)]
    engine, cached = Engine(model, 3, 600, chunk=100), Cached(model, 3, 600)
    torch.testing.assert_close(engine.read(texts), cached.read(texts), rtol=1e-4, atol=1e-4)
    for token in range(3):
        tokens = torch.tensor([token, 2, 7])
        torch.testing.assert_close(engine.step(tokens), cached.step(tokens), rtol=1e-4, atol=1e-4)


def test_logits_that_are_not_finite_are_an_error() -> None:
    model = small_model()
    with torch.no_grad():
        model.output.weight[3] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        generate(model, [1, 2], 3)
    engine = Engine(model, 1, 24)
    engine.read([torch.tensor([1])])
    with pytest.raises(ValueError, match="logits are not finite"):
        engine.write(torch.tensor([1]), torch.zeros(1, 2, dtype=torch.float64), Sampling(1.0))
    assert engine.lengths() == [1]


def test_why_a_model_is_not_served() -> None:
    def served(model: nn.Module) -> str:
        why = Engine.operands(model)
        assert isinstance(why, str)
        return why

    assert "not causal" in served(small_model(causal=False))
    assert "float64" in served(small_model().double())
    assert "no SimpleLLM" in served(nn.Linear(1, 1))
    with ops.backend("reference"):
        assert "kernels" in served(small_model())
    other = small_model()
    other.transformer_blocks[0].norm1.eps = 1e-3  # type: ignore[union-attr, assignment]
    assert "differ" in served(other)
    with pytest.raises(ValueError, match="the engine does not serve the model: the model is not causal"):
        Engine(small_model(causal=False), 1, 24)


def test_the_operators_check_their_arguments() -> None:
    model = small_model()
    operands = Engine.operands(model)
    assert not isinstance(operands, str)
    weights, positions, settings = operands
    raw = torch.ops.tinyllm
    cache = torch.zeros(2, 2, 1, 2, 24, 8)
    ids, zero = torch.tensor([1]), torch.tensor([0])
    good = [ids, weights, positions, cache, zero, *settings]
    assert raw.decoder_step(*good).shape == (1, VOCAB)
    for index, wrong in (
        (0, torch.tensor([VOCAB])),
        (0, torch.tensor([-1])),
        (0, torch.tensor([[1]])),
        (0, torch.tensor([1.0])),
        (1, weights[:-2]),
        (1, [weights[0].double(), *weights[1:]]),
        (1, [*weights[:-1], weights[-1][:5]]),
        (2, positions[:0]),
        (2, positions.double()),
        (3, cache[:, :, :, :, :0]),
        (3, cache.transpose(3, 4)),
        (3, cache.half()),
        (4, torch.tensor([24])),
        (4, torch.tensor([-1])),
        (5, 3),
        (6, 5),
        (8, "tanh"),
    ):
        with pytest.raises((RuntimeError, ValueError), match="decoder_step: "):
            raw.decoder_step(*good[:index], wrong, *good[index + 1 :])
    counts = torch.tensor([3])
    with pytest.raises((RuntimeError, ValueError), match="a count is 3"):
        raw.decoder_read(torch.tensor([[1, 2]]), counts, weights, positions, cache, zero, *settings)
    uniforms = torch.zeros(1, 2, dtype=torch.float64)
    with pytest.raises((RuntimeError, ValueError), match=r"top_p 0, .* out of range"):
        raw.decoder_write(ids, uniforms, *good[1:], 1.0, 0, 0.0, 0.0, 1.0, -1, VOCAB, None, [])


def test_a_kept_decoder_of_quantised_weights_writes_the_same() -> None:
    model = quantize(larger_model(), "int8")
    kept = Engine(model, 1, 60)
    for seed in (1, 2, 3):
        fresh = generate(model, [1, 2, 3, 4, 5, 6], 30, seed=seed)
        assert torch.equal(generate(model, [1, 2, 3, 4, 5, 6], 30, seed=seed, decoder=kept), fresh)


def test_what_cannot_be_drawn_is_an_error() -> None:
    model = small_model()
    with torch.no_grad():
        model.output.weight.zero_()
        model.output.bias.zero_()
    engine = Engine(model, 1, 24)
    seen = torch.ones(1, VOCAB, dtype=torch.bool)
    uniforms = torch.zeros(1, 2, dtype=torch.float64)
    for sampling in (Sampling(0.0, suppress_id=0, ids_below=1), Sampling(1.0, suppress_id=0, ids_below=1)):
        engine.read([torch.tensor([1])])
        with pytest.raises(ValueError, match="no token is left to draw"):
            engine.write(torch.tensor([1]), uniforms, sampling, seen)
    for sampling in (Sampling(0.0, repetition_penalty=1e-46), Sampling(1e-39), Sampling(1e300, top_p=0.9)):
        engine.read([torch.tensor([1])])
        assert (engine.write(torch.tensor([1]), uniforms, sampling, seen).tokens < VOCAB).all()
