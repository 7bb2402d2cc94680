"""Generation: what is drawn, what the model is shown, what is refused, and text that comes in pieces."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tinyllm.config.model import SimpleLLMConfig
from tinyllm.generation import encode_prompt, generate, iter_tokens, stream_text
from tinyllm.model import SimpleLLM
from tinyllm.tokenizer import BPETokenizer, CharTokenizer, WordTokenizer

VOCAB = 11


@pytest.fixture
def model() -> SimpleLLM:
    torch.manual_seed(0)
    return SimpleLLM(VOCAB, 8, 16, 2, causal=True, max_seq_len=6, dropout=0.5, position="learned")


class Scripted(nn.Module):
    """Stands in for a model: certain of a given next token, and remembers what it was shown."""

    def __init__(self, script: list[int], vocab_size: int, max_seq_len: int = 64) -> None:
        super().__init__()
        self.config = SimpleLLMConfig(vocab_size, 1, 1, 1, max_seq_len=max_seq_len)
        self.weight = nn.Parameter(torch.zeros(()))
        self.script = iter(script)
        self.shown: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        self.shown.append(ids)
        logits = torch.full((*ids.shape, self.config.vocab_size), -math.inf)
        logits[:, -1, next(self.script)] = 0.0
        return logits


class Fixed(Scripted):
    """Stands in for a model that always gives the same logits."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__([], len(logits))
        self.logits = torch.tensor(logits)

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits.expand(*ids.shape, -1)


# Drawing


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


def test_draws_follow_temperature_and_top_k() -> None:
    logits = [2.0, 1.0, 0.0, -1.0]
    count = 20_000
    prompt = torch.zeros(count, 1, dtype=torch.int64)

    def shares(**options: float) -> Tensor:
        drawn = generate(Fixed(logits), prompt, 1, seed=0, **options)[:, -1]  # type: ignore[arg-type]
        return torch.bincount(drawn, minlength=4) / count

    for temperature in (0.5, 1.0, 3.0):
        expected = torch.softmax(torch.tensor(logits) / temperature, 0)
        # 5 standard deviations of a share of `count` draws are at most 0.018
        assert (shares(temperature=temperature) - expected).abs().max() < 0.018
    top = shares(top_k=2)
    assert top[2:].tolist() == [0, 0]
    assert abs(float(top[0]) - 1 / (1 + math.exp(-1))) < 0.018
    assert shares(top_k=1).tolist() == [1, 0, 0, 0]
    assert torch.equal(shares(top_k=99), shares())


@pytest.mark.parametrize("temperature", [1e-30, 1e30])
def test_extreme_temperatures_do_not_overflow(temperature: float) -> None:
    out = generate(Fixed([500.0, -500.0, 499.0]), [0], 5, temperature=temperature, seed=0)  # type: ignore[arg-type]
    if temperature < 1:
        assert out[1:].tolist() == [0] * 5


def test_exactly_k_of_equal_logits() -> None:
    drawn = generate(Fixed([1.0] * 8), torch.zeros(500, 1, dtype=torch.int64), 1, top_k=3, seed=0)  # type: ignore[arg-type]
    assert len(drawn[:, -1].unique()) == 3


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
    class Rows(Scripted):
        def forward(self, ids: Tensor) -> Tensor:
            logits = torch.full((2, ids.shape[1], 5), -math.inf)
            for row, script in enumerate([[2, 1, 1, 1], [3, 3, 2, 1]]):
                logits[row, -1, script[ids.shape[1] - 1]] = 0.0
            return logits

    out = generate(Rows([], 5), [[0], [0]], 10, stop_id=2)  # type: ignore[arg-type]
    assert out.tolist() == [[0, 2, 2, 2], [0, 3, 3, 2]]


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
        ([1], {"seed": 1, "generator": torch.Generator()}, ValueError, "not both"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(model: SimpleLLM, ids, options, error, reason) -> None:
    options = {"max_new_tokens": 3, **options}
    with pytest.raises(error, match=reason):
        generate(model, ids, **options)
    with pytest.raises(error, match=reason):
        iter_tokens(model, ids, **options)  # nothing drawn yet


def test_a_diverged_model_is_named() -> None:
    with pytest.raises(ValueError, match="nan"):
        generate(Fixed([math.nan, 1.0]), [0], 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", ["", "  \n", "unheard of", "<UNK>"])
def test_a_prompt_with_no_known_word(prompt: str, model: SimpleLLM) -> None:
    tokenizer = WordTokenizer({"hello": 0, "<UNK>": 1})
    with pytest.raises(ValueError, match="prompt is"):
        encode_prompt(tokenizer, prompt)
    with pytest.raises(ValueError, match="prompt is"):
        stream_text(model, tokenizer, prompt, 3)
    assert encode_prompt(tokenizer, "unheard hello") == [1, 0]


def test_an_empty_prompt_for_bytes_and_characters() -> None:
    for tokenizer in (BPETokenizer.from_texts(["ab"]), CharTokenizer.from_texts(["ab"])):
        with pytest.raises(ValueError, match="prompt is ''"):
            encode_prompt(tokenizer, "")
    with pytest.raises(ValueError, match="prompt is 'xyz'"):
        encode_prompt(CharTokenizer.from_texts(["ab"]), "xyz")


# Text in pieces


def pieces(tokenizer, ids: list[int], prompt: str) -> list[str]:
    model = Scripted(ids, tokenizer.vocab_size)
    return list(stream_text(model, tokenizer, prompt, len(ids)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["plain words\n  and code()", "é🙂👩‍👩‍👧‍👦", "日本語テキスト", "a\ufffdb\ufffd", " \n\n "]
)
def test_bytes_come_out_as_whole_characters(text: str) -> None:
    tokenizer = BPETokenizer.from_texts(["x"])  # no merges: one token for each byte
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    out = pieces(tokenizer, ids, "é")
    assert "".join(out) == text
    for piece in out:
        assert piece
        assert "\ufffd" not in piece or "\ufffd" in text
    if "\ufffd" not in text:
        assert len(out) == len(text)  # each character as soon as it is whole


def test_bytes_that_are_no_character_come_out_as_the_replacement_character() -> None:
    tokenizer = BPETokenizer.from_texts(["x"])
    emoji, letter = tokenizer.encode("🙂"), tokenizer.encode("a")
    for ids in (emoji[:2] + letter, emoji[:3], [emoji[1]] * 6 + letter, emoji[:1] + emoji):
        out = pieces(tokenizer, ids, "x")
        assert "".join(out) == tokenizer.decode(ids)
    assert pieces(tokenizer, emoji[:1] + emoji, "x") == ["\ufffd", "🙂"]


def test_words_are_set_apart() -> None:
    tokenizer = WordTokenizer.from_texts(["hello world how are you"])
    out = pieces(tokenizer, tokenizer.encode("how are you"), "hello world")
    assert out == [" how", " are", " you"]


def test_merged_tokens_and_characters_stream() -> None:
    text = "def f():\n    return 'ü🙂'\n"
    for cls in (BPETokenizer, CharTokenizer):
        tokenizer = cls.from_texts([text * 5])
        assert "".join(pieces(tokenizer, tokenizer.encode(text), "def ")) == text


def test_end_of_text_ends_the_text() -> None:
    tokenizer = BPETokenizer.from_texts(["x"])
    assert tokenizer.end_of_text_id is not None
    ids = [*tokenizer.encode("ab"), tokenizer.end_of_text_id, *tokenizer.encode("cd")]
    assert "".join(pieces(tokenizer, ids, "x")) == "ab"


def test_pieces_come_while_the_model_writes() -> None:
    tokenizer = CharTokenizer.from_texts(["abc"])
    model = Scripted([0, 1, 2], tokenizer.vocab_size)
    stream = stream_text(model, tokenizer, "a", 3)  # type: ignore[arg-type]
    assert next(stream) == "a"
    assert len(model.shown) == 1
