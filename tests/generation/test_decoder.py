"""Decoders: the cache gives what computing all of it anew gives, for rows of any lengths, chunks and beginnings."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.generation.models import VOCAB, Scripted, small_model
from tests.helpers.needs import needs_extension
from tinyllm.generation import Cached, Decoder, Engine, Recompute, choice, generate, iter_tokens, make_decoder
from tinyllm.model import SimpleLLM
from tinyllm.ops.backends import cpp

pytestmark = pytest.mark.usefixtures("one_thread")

# What a model may look like inside.
MODELS: list[dict[str, Any]] = [
    {},
    {"norm_first": True},
    {"position": "sinusoidal"},
    {"num_heads": 1},
    {"num_heads": 4, "norm_first": True, "activation": "gelu", "bias": False, "tie_embeddings": True},
    {"num_heads": 16, "dropout": 0.5, "position": "sinusoidal", "norm_first": True},
]
CACHES = [Cached, pytest.param(Engine, marks=needs_extension)]  # the decoders that keep something
PROMPTS = [[1, 2, 3, 4, 5], [6], [7, 8, 9], [1, 2, 3]]

# How far the logits of a cache may be from those of a whole pass, both of float32 and of the order of 1: sums of at
# most a hundred products in another order.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def whole(model: SimpleLLM, texts: list[list[int]]) -> Tensor:
    """Return the logits behind each text, by calling the model."""
    with torch.no_grad():
        return torch.cat([model(torch.tensor([text]))[:, -1] for text in texts])


def tensors(texts: list[list[int]]) -> list[Tensor]:
    return [*map(torch.tensor, texts)]


def greedy(model: SimpleLLM, prompts: list[list[int]], count: int, decoder: Decoder | None = None) -> list[list[int]]:
    out = generate(model, tensors(prompts), count, temperature=0, decoder=decoder)
    return [text.tolist() for text in out]


@pytest.mark.parametrize("options", MODELS, ids=str)
@pytest.mark.parametrize("kind", [*CACHES, Recompute])
def test_logits_are_those_of_the_whole_text(kind: Any, options: dict[str, Any]) -> None:
    model = small_model(**options)
    made = Recompute(model, 4) if kind is Recompute else kind(model, 4, 24, chunk=4)
    texts = [*map(list, PROMPTS)]
    torch.testing.assert_close(made.read(tensors(texts)), whole(model, texts), **TOLERANCE)
    for step in range(6):
        tokens = torch.tensor([(step * 5 + row) % VOCAB for row in range(4)])
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.append(token)
        logits = made.step(tokens)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, whole(model, texts), **TOLERANCE)
    assert made.lengths() == [*map(len, texts)]


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_greedy_texts_are_those_of_recomputation_and_of_each_row_alone(options: dict[str, Any]) -> None:
    model = small_model(**options)
    assert isinstance(make_decoder(model, 4, 24), Engine if cpp.loaded else Cached)
    texts = greedy(model, PROMPTS, 15)
    assert texts == greedy(model, PROMPTS, 15, Cached(model, 4, 24))
    assert texts == greedy(model, PROMPTS, 15, Recompute(model, 4))
    assert texts == [greedy(model, [prompt], 15)[0] for prompt in PROMPTS]
    assert len({*map(tuple, texts)}) == 4
    text = PROMPTS[0]
    for _ in range(15):
        text = [*text, int(whole(model, [text]).argmax())]
    assert texts[0] == text


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", CACHES)
def test_a_prompt_in_chunks_is_the_whole_prompt(kind: Any, chunk: int, norm_first: bool) -> None:
    model = small_model(norm_first=norm_first)
    texts = [[i % VOCAB for i in range(start, start + 20)] for start in (0, 3, 5)]
    made = kind(model, 3, 24, chunk=chunk)
    torch.testing.assert_close(made.read(tensors(texts)), whole(model, texts), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = small_model(norm_first=True).to(dtype)
    made = Cached(model, 4, 24, chunk=3)
    assert made._cache.dtype == dtype
    texts = [*map(list, PROMPTS)]
    # The rounding of the weights is the same; that of a few hundred sums and products may add up.
    tolerance = {"rtol": 0.0, "atol": 1e-5 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps}
    torch.testing.assert_close(made.read(tensors(texts)), whole(model, texts).float(), **tolerance)
    tokens = torch.tensor([3, 1, 4, 1])
    texts = [[*text, token] for text, token in zip(texts, tokens.tolist(), strict=True)]
    torch.testing.assert_close(made.step(tokens), whole(model, texts).float(), **tolerance)


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_in_another_dtype(kind: Any) -> None:
    model = small_model()
    made = kind(model, 1, 24, cache_dtype=torch.bfloat16)
    assert made._cache.dtype == torch.bfloat16
    made.read(tensors([[1, 2, 3]]))
    torch.testing.assert_close(made.step(torch.tensor([4])), whole(model, [[1, 2, 3, 4]]), rtol=0.0, atol=0.05)
    assert len(generate(model, [1, 2], 5, seed=0, cache_dtype=torch.bfloat16)) == 7
    with pytest.raises(TypeError, match=r"cache_dtype is 'half'; it must be a torch\.dtype"):
        generate(model, [1, 2], 5, decoder=made, cache_dtype="half")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="decoder is 3; it must be one that make_decoder has made"):
        generate(model, [1, 2], 5, decoder=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cache_dtype is torch.int8; it must be "):
        kind(model, 1, 24, cache_dtype=torch.int8)
    with pytest.raises(ValueError, match="cache_dtype is 'half'; it must be a floating dtype"):
        make_decoder(small_model(causal=False), 1, 24, cache_dtype="half")  # type: ignore[arg-type]


def test_under_autocast() -> None:
    model = small_model(norm_first=True)
    with torch.autocast("cpu", torch.bfloat16):
        made = Cached(model, 2, 24)
        found = made.read(tensors([[1, 2, 3], [4]]))
        torch.testing.assert_close(found, whole(model, [[1, 2, 3], [4]]).float(), rtol=0.0, atol=0.1)
        made.step(torch.tensor([1, 2]))


# What a row holds already


def computed(model: SimpleLLM) -> list[int]:
    """Return a list that grows by the number of tokens of each pass through the model."""
    found: list[int] = []
    inner = model.transformer_blocks[0].compose

    def noted(x: Tensor, attend: Any) -> Any:
        found.append(x.size(0) * x.size(1))
        return inner(x, attend)

    model.transformer_blocks[0].compose = noted  # type: ignore[method-assign, assignment]
    return found


@pytest.mark.parametrize("kind", CACHES)
def test_the_beginning_that_a_row_holds_is_not_computed_again(kind: Any) -> None:
    model = small_model(norm_first=True)
    passes = computed(model)
    made = kind(model, 2, 24)
    made.read(tensors([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]))
    made.step(torch.tensor([6, 7]))
    cases = [
        ([1, 2, 3, 4, 5, 6, 7, 8], 2),  # it goes on
        ([1, 2, 3, 9, 9], 2),  # it turns off
        ([1, 2, 3], 1),  # only the logits are wanted again
        ([1, 2, 3, 9, 9], 2),  # what was behind the last end is not held any longer
        ([9, 2, 3], 3),
    ]
    for text, count in cases:
        passes.clear()
        torch.testing.assert_close(made.read(tensors([text]), [0]), whole(model, [text]), **TOLERANCE)
        assert passes == [count] or kind is Engine  # which does not call the modules
    assert made.lengths() == [3, 6]  # the other row is untouched
    torch.testing.assert_close(
        made.step(torch.tensor([1, 1])), whole(model, [[9, 2, 3, 1], [1, 2, 3, 4, 5, 7, 1]]), **TOLERANCE
    )


@pytest.mark.parametrize("kind", CACHES)
def test_rows_in_any_order(kind: Any) -> None:
    model = small_model()
    made = kind(model, 4, 24, chunk=3)
    order = [2, 0, 3]
    texts = [[1, 2, 3, 4], [5, 6, 7, 8], [9]]
    torch.testing.assert_close(made.read(tensors(texts), order), whole(model, texts), **TOLERANCE)
    assert made.lengths() == [4, 0, 4, 1]
    texts = [[5, 6, 7, 8, 0], [1], [1, 2, 3, 4, 2], [9, 3]]
    torch.testing.assert_close(made.step(torch.tensor([0, 1, 2, 3])), whole(model, texts), **TOLERANCE)


def test_a_decoder_that_is_kept_writes_the_same() -> None:
    model = small_model()
    kept = make_decoder(model, 1, 24)
    for prompt in ([1, 2, 3], [1, 2, 3], [1, 2, 4], [1]):
        assert greedy(model, [prompt], 10, kept) == greedy(model, [prompt], 10)
    with pytest.raises(ValueError, match="decoder has 1 rows; the number of prompts is 2"):
        generate(model, [[1], [2]], 3, decoder=kept)
    with pytest.raises(ValueError, match="decoder holds 5 tokens a row; prompt and text may have 6"):
        generate(model, [1], 6, decoder=make_decoder(model, 1, 5))


@pytest.mark.parametrize("kind", [*CACHES, Recompute])
def test_a_decoder_is_of_one_model(kind: Any) -> None:
    model, twin = small_model(), small_model()
    made = Recompute(model, 1) if kind is Recompute else kind(model, 1, 24)
    assert made.model is model
    for write in (generate, iter_tokens):
        with pytest.raises(ValueError, match=f"decoder is a {kind.__name__} of another model"):
            write(twin, [1, 2], 3, decoder=made)


@pytest.mark.parametrize("kind", [*CACHES, Recompute])
def test_a_decoder_writes_one_text_at_a_time(kind: Any) -> None:
    model = small_model()
    made = Recompute(model, 1) if kind is Recompute else kind(model, 1, 24)
    one, other = (iter_tokens(model, prompt, 20, seed=0, decoder=made) for prompt in ([1, 2, 3], [4, 5, 6]))
    next(one)
    for _ in range(3):
        next(other)  # whatever the lengths are
    with pytest.raises(RuntimeError, match="decoder has been used elsewhere since this stream's last token"):
        next(one)
    assert next(one, None) is None
    assert one.finish_reasons == ["error"]
    made.read(tensors([[7]]))
    with pytest.raises(RuntimeError, match="decoder has been used elsewhere"):
        next(other)
    assert greedy(model, [[4, 5, 6]], 8, made) == greedy(model, [[4, 5, 6]], 8)


def test_streams_of_equally_long_texts_are_told_apart() -> None:
    model = small_model()
    made = Cached(model, 1, 24)
    one, other = (iter_tokens(model, prompt, 20, seed=0, decoder=made) for prompt in ([1, 2, 3], [4, 5, 6]))
    next(one)
    next(other)
    with pytest.raises(RuntimeError, match="decoder has been used elsewhere"):
        next(one)
    next(other)
    made.read(tensors([[7] * made.lengths()[0]]))  # no stream, and as long
    with pytest.raises(RuntimeError, match="decoder has been used elsewhere"):
        next(other)


def test_a_decoder_that_is_kept_holds_no_stream() -> None:
    model = small_model()
    made = Cached(model, 1, 24)
    stream = iter_tokens(model, [1, 2, 3], 20, decoder=made)
    next(stream)
    reference = weakref.ref(stream)
    gc.disable()
    try:
        del stream
        assert reference() is None
    finally:
        gc.enable()


def test_an_interrupted_prompt_leaves_what_has_been_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    made = Cached(model, 1, 24, chunk=4)
    passes = computed(model)
    block = model.transformer_blocks[1]
    compose = block.compose
    calls = 0

    def interrupted(x: Any, attend: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return compose(x, attend)

    monkeypatch.setattr(block, "compose", interrupted)
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    with pytest.raises(KeyboardInterrupt):
        made.read(tensors([text]))
    assert made.lengths() == [8]
    passes.clear()
    torch.testing.assert_close(made.read(tensors([text])), whole(model, [text]), **TOLERANCE)
    assert passes == [2]


# Which decoder, and what it asks for


def test_models_that_are_called_otherwise_are_recomputed() -> None:
    def hooked(model: SimpleLLM) -> None:
        model.transformer_blocks[1].feed_forward[0].register_forward_hook(lambda *_: None)  # type: ignore[index, union-attr]

    def replaced(model: SimpleLLM) -> None:
        model.transformer_blocks[0].feed_forward[1] = nn.SiLU()  # type: ignore[index, operator]

    def patched(model: SimpleLLM) -> None:
        model.features = lambda ids: model.embedding(ids)  # type: ignore[method-assign, assignment, misc]

    def parametrized(model: SimpleLLM) -> None:
        nn.utils.parametrizations.weight_norm(model.output)

    def mixed(model: SimpleLLM) -> None:
        model.transformer_blocks[1].attention.causal = False  # type: ignore[union-attr, assignment]

    for change in (hooked, replaced, patched, parametrized, mixed):
        model = small_model()
        change(model)
        assert isinstance(make_decoder(model, 1, 24), Recompute), change
        with pytest.raises(ValueError, match="model has no valid cache: "):
            Cached(model, 1, 24)
        assert greedy(model, [[1, 2]], 5)[0][2] == int(whole(model, [[1, 2]]).argmax()), change

    class Own(SimpleLLM):
        pass

    own = Own(VOCAB, 8, 16, 1, causal=True)
    assert isinstance(make_decoder(own, 1, 24), Recompute)
    assert isinstance(make_decoder(small_model(max_seq_len=1), 1, 24), Recompute)
    assert isinstance(make_decoder(Scripted([], 5), 1, 24), Recompute)


def test_hooks_of_the_model_see_the_whole_call() -> None:
    model = small_model()
    shapes: list[Any] = []
    model.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    greedy(model, [[1, 2, 3]], 2)
    assert shapes == [(1, 3, VOCAB), (1, 4, VOCAB)]


def test_only_the_last_logits_are_computed() -> None:
    model = small_model(causal=False)
    shapes: list[Any] = []
    model.output.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    made = Recompute(model, 2)
    torch.testing.assert_close(made.read(tensors([[1, 2, 3], [4, 5, 6]])), whole(model, [[1, 2, 3], [4, 5, 6]]))
    assert shapes[0] == (2, 1, VOCAB)


def test_a_model_that_is_not_causal_is_recomputed_which_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_has_warned", False)
    model = small_model(causal=False)
    with pytest.warns(UserWarning, match="the model is not causal"):
        texts = greedy(model, PROMPTS, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert texts == [greedy(model, [prompt], 8)[0] for prompt in PROMPTS]
        monkeypatch.setattr(choice, "_has_warned", False)
        generate(small_model(), [1], 2)
        generate(Scripted([1, 2], 5), [1], 2)  # type: ignore[arg-type]
    text = PROMPTS[0]
    for _ in range(8):
        text = [*text, int(whole(model, [text]).argmax())]
    assert texts[0] == text


@pytest.mark.parametrize("kind", [Cached, Recompute])
def test_modules_keep_their_modes(kind: Any) -> None:
    model = small_model(dropout=0.5)
    model.train()
    model.transformer_blocks[0].eval()
    before = [module.training for module in model.modules()]
    made = Cached(model, 1, 24) if kind is Cached else Recompute(model, 1)
    first = made.read(tensors([[1, 2, 3]]))
    assert [module.training for module in model.modules()] == before
    model.eval()
    torch.testing.assert_close(first, whole(model, [[1, 2, 3]]), **TOLERANCE)  # dropout was off
    assert not first.requires_grad


@pytest.mark.parametrize("kind", CACHES)
def test_what_does_not_fit_is_refused(kind: Any) -> None:
    model = small_model()
    made = kind(model, 2, 4)
    one = torch.tensor([1])
    for prompts, rows, reason in (
        ([one], None, r"rows is \[0, 1\] for 1 prompts; each needs one of its own in 0 .. 1"),
        ([one, one], [1, 1], r"rows is \[1, 1\]"),
        ([one], [2], r"rows is \[2\]"),
        ([one, one[:0]], None, r"the prompt for row 1 has shape \(0,\)"),
        ([one, one.repeat(5)], None, "the prompt for row 1 has 5 tokens; a row holds 4"),
    ):
        with pytest.raises(ValueError, match=reason):
            made.read(prompts, rows)
    made.read([one, one.repeat(4)])
    with pytest.raises(ValueError, match="row 1 holds 4 tokens and is to get 1 more; a row holds 4"):
        made.step(torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="max_len is 25; the model's max_seq_len is 24"):
        kind(model, 2, 25)
    with pytest.raises(ValueError, match="max_len is 0"):
        kind(model, 2, 0)
    with pytest.raises(ValueError, match="chunk is 0"):
        kind(model, 2, 4, chunk=0)
