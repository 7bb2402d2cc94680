"""GraphedCache: without a GPU its step is called instead of replayed, which is all that differs."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.generation.models import VOCAB, small_model
from tests.helpers.backends import ON_GPU
from tinyllm import ops
from tinyllm.generation import Cached, GraphedCache, Recompute, generate, make_decoder
from tinyllm.generation.cuda_graph import Replayed
from tinyllm.generation.sampling import Sampling
from tinyllm.quantization import quantize

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS: list[dict[str, Any]] = [
    {},
    {"norm_first": True, "position": "sinusoidal", "num_heads": 1},
    {"num_heads": 4, "norm_first": True, "activation": "gelu", "bias": False, "tie_embeddings": True},
]
PROMPTS = [[1, 2, 3, 4, 5], [6], [7, 8, 9], [1, 2, 3]]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
# Everything that shapes a distribution, and nothing.
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"seed": 3},
    {"seed": 3, "temperature": 0.7, "top_k": 6, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
    {"seed": 3, "suppress_id": 2, "ids_below": 9},
]


def tensors(texts: list[list[int]]) -> list[Tensor]:
    return [*map(torch.tensor, texts)]


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_logits_are_those_of_recomputation(options: dict[str, Any]) -> None:
    model = small_model(**options)
    made, plain = GraphedCache(model, 4, 24, chunk=4), Recompute(model, 4)
    torch.testing.assert_close(made.read(tensors(PROMPTS)), plain.read(tensors(PROMPTS)), **TOLERANCE)
    for step in range(6):
        tokens = torch.tensor([(step * 5 + row) % VOCAB for row in range(4)])
        torch.testing.assert_close(made.step(tokens), plain.step(tokens), **TOLERANCE)
    assert made.lengths() == plain.lengths()
    last = made.step(tokens)
    made.forget_last()
    torch.testing.assert_close(made.step(tokens), last, rtol=0, atol=0)
    made.forget_last()
    assert made.lengths() == plain.lengths()
    with pytest.raises(ValueError, match=r"row 0 holds 11 tokens and is to get 14 more; a row holds 24"):
        made.write(tokens, torch.zeros(4, 14, dtype=torch.float64), Sampling(temperature=0))


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("options", MODELS, ids=str)
def test_texts_are_those_of_recomputation(options: dict[str, Any], sampling: dict[str, Any]) -> None:
    # Also beyond max_seq_len, where a row is read again, and with a row that stops before the others.
    model = small_model(**options)
    for stop_id in (None, [0, 4]):
        for prompts in (PROMPTS, PROMPTS[:1]):
            made = GraphedCache(model, len(prompts), 24)
            arguments = (model, tensors(prompts), 30)
            found = generate(*arguments, **sampling, stop_id=stop_id, return_logprobs=True, decoder=made)
            kept = Cached(model, len(prompts), 24)
            other = generate(*arguments, **sampling, stop_id=stop_id, return_logprobs=True, decoder=kept)
            assert [text.tolist() for text in found[0]] == [text.tolist() for text in other[0]]
            torch.testing.assert_close(found[1], other[1], **TOLERANCE)
    # Within max_seq_len, as no row is read again there.
    found, expected = (
        generate(model, tensors(PROMPTS), 19, **sampling, decoder=decoder)
        for decoder in (GraphedCache(model, len(PROMPTS), 24), Recompute(model, len(PROMPTS)))
    )
    assert [text.tolist() for text in found] == [text.tolist() for text in expected]


def test_what_was_drawn_is_held_up_to_where_all_rows_have_stopped() -> None:
    model = small_model()
    made = GraphedCache(model, 2, 24)
    made.read(tensors([[1, 2], [1, 2]]))
    first = torch.tensor([3, 3])
    free = made.write(first, torch.zeros(2, 8, dtype=torch.float64), Sampling(temperature=0))
    assert made.lengths() == [10, 10]
    stop = int(free.tokens[0, 3])
    end = free.tokens[0].tolist().index(stop) + 1
    made.read(tensors([[1, 2], [1, 2]]))
    seen = torch.zeros(2, VOCAB, dtype=torch.bool)
    seen[:, 1:4] = True
    one = Sampling(temperature=0, repetition_penalty=1.0 + 1e-9)
    found = made.write(first, torch.zeros(2, 8, dtype=torch.float64), one, seen, [stop])
    assert torch.equal(found.tokens, free.tokens[:, :end])
    assert made.lengths() == [2 + end, 2 + end]
    assert seen[0].nonzero().flatten().tolist() == sorted({1, 2, 3, *found.tokens[0].tolist()})


def test_the_model_is_looked_at_anew() -> None:
    model = small_model()
    made = GraphedCache(model, 1, 24)
    before = generate(model, [1, 2], 8, temperature=0, decoder=made)
    with torch.no_grad():
        model.output.weight.neg_()
    after = generate(model, [1, 2], 8, temperature=0, decoder=made)
    assert not torch.equal(before, after)
    assert torch.equal(after, generate(model, [1, 2], 8, temperature=0, decoder=Recompute(model, 1)))
    with torch.no_grad():
        model.output.weight.fill_(torch.nan)
    for arguments in ({"temperature": 0}, {"seed": 0}):
        with pytest.raises(ValueError, match="logits are not finite"):
            made.write(
                torch.tensor([1]),
                torch.full((1, 4), 0.5, dtype=torch.float64),
                Sampling(arguments.get("temperature", 1.0)),
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = small_model(norm_first=True).to(dtype)
    tolerance = 1e-5 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
    for cache_dtype in (None, torch.bfloat16):
        made, plain = GraphedCache(model, 2, 24, cache_dtype=cache_dtype), Recompute(model, 2)
        made.read(tensors(PROMPTS[:2]))
        plain.read(tensors(PROMPTS[:2]))
        tokens = torch.tensor([3, 4])
        atol = 0.05 if cache_dtype is not None else tolerance
        torch.testing.assert_close(made.step(tokens), plain.step(tokens), rtol=0.0, atol=atol)


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_weights_in_fewer_bits(weights: str) -> None:
    model = quantize(small_model(norm_first=True), weights)
    found = generate(model, tensors(PROMPTS), 15, temperature=0, decoder=GraphedCache(model, 4, 24))
    other = generate(model, tensors(PROMPTS), 15, temperature=0, decoder=Cached(model, 4, 24))
    assert [text.tolist() for text in found] == [text.tolist() for text in other]


class NoAnswers(TorchDispatchMode):
    """Refuses what has the host wait for a tensor's values."""

    ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        assert not masks, f"{name} with a mask"
        assert not name.startswith(self.ASKING), name
        return func(*args, **(kwargs or {}))


def test_what_has_the_host_wait_is_refused() -> None:
    x = torch.tensor([1, 0])
    for ask in (
        lambda: bool(x[0]),
        lambda: x[x > 0],
        lambda: torch.where(x > 0),
        lambda: x.repeat_interleave(x),
        x[0].item,
    ):
        with pytest.raises(AssertionError), NoAnswers():
            ask()


def test_the_host_asks_for_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    # Else nothing could be captured.
    model = small_model(norm_first=True)
    made = GraphedCache(model, 2, 24)
    made.read(tensors(PROMPTS[:2]))
    sampling = Sampling(0.7, top_k=6, top_p=0.9, min_p=0.01, repetition_penalty=1.3, suppress_id=2, ids_below=9)
    seen = torch.zeros(2, VOCAB, dtype=torch.bool)
    made.write(torch.tensor([1, 2]), torch.zeros(2, 2, dtype=torch.float64), sampling, seen, [3])
    assert made._writing is not None
    drawing = made._writing[1]

    def ask(_: Tensor) -> None:
        raise AssertionError("tolist")

    monkeypatch.setattr(Tensor, "tolist", ask)  # which reads a CPU's memory without being dispatched
    with torch.inference_mode(), NoAnswers():
        drawing.step(made)


def test_nothing_keeps_a_decoder_that_is_no_longer_used() -> None:
    model = small_model()
    made = GraphedCache(model, 1, 24)
    generate(model, [1, 2], 4, seed=0, decoder=made)
    made.step(torch.tensor([1]))
    there = weakref.ref(made)
    gc.disable()
    try:
        del made
        assert there() is None
    finally:
        gc.enable()


def test_a_cache_of_another_dtype_rounds_keys_and_values_alone() -> None:
    model = small_model()
    made, plain = (kind(model, 1, 24, cache_dtype=torch.bfloat16) for kind in (GraphedCache, Cached))
    for decoder in (made, plain):
        decoder.read([torch.tensor([1, 2, 3])])
    token = torch.tensor([4])
    torch.testing.assert_close(made.step(token), plain.step(token), **TOLERANCE)


def test_what_changes_the_kernels_is_captured_anew() -> None:
    made = GraphedCache(small_model(), 1, 24)
    made.read(tensors([[1]]))
    seen: list[Any] = []
    for context in (nullcontext(), ops.backend("reference"), torch.autocast("cpu", torch.bfloat16), nullcontext()):
        with context:
            for _ in range(2):
                made.step(torch.tensor([2]))
                assert made._reading is not None
                seen.append(made._reading[1])
    assert [id(a) == id(b) for a, b in pairwise(seen)] == [True, False, True, False, True, False, True]


def test_a_function_is_called_where_there_is_no_gpu() -> None:
    calls: list[int] = []
    graph = Replayed(torch.device("cpu"))
    assert not graph.prepare(lambda: calls.append(0))
    graph.run(lambda: calls.append(1))
    assert calls == [1]


needs_gpu = pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")


@needs_gpu
@pytest.mark.triton
@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_replayed_text_is_the_one_that_is_called(
    sampling: dict[str, Any], weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantize(small_model(norm_first=True).cuda(), weights)
    prompts = [prompt.cuda() for prompt in tensors(PROMPTS)]
    made = make_decoder(model, 4, 24)
    assert isinstance(made, GraphedCache)
    found = generate(model, prompts, 30, **sampling, stop_id=0, decoder=made)
    assert made._writing is not None
    assert made._writing[1].graph._graph is not None
    again = generate(model, prompts, 30, **sampling, stop_id=0, decoder=made)
    monkeypatch.setattr(Replayed, "prepare", lambda self, function: False)
    other = generate(model, prompts, 30, **sampling, stop_id=0, decoder=GraphedCache(model, 4, 24))
    for text, same, called in zip(found, again, other, strict=True):
        assert torch.equal(text, called)
        assert torch.equal(same, called)


@needs_gpu
@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replayed_logits_are_those_that_are_called(dtype: torch.dtype) -> None:
    model = small_model(norm_first=True).to("cuda", dtype)
    made, plain = GraphedCache(model, 4, 24), Cached(model, 4, 24)
    made.read(tensors(PROMPTS))
    plain.read(tensors(PROMPTS))
    for step in range(6):
        tokens = torch.tensor([(step * 5 + row) % VOCAB for row in range(4)], device="cuda")
        atol = 1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(made.step(tokens), plain.step(tokens), rtol=0.0, atol=atol)
