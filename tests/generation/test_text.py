"""Text in pieces: whole characters, where it stops, and what is told of it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.generation.models import Interrupted, Rows, Scripted
from tinyllm.generation import TextStream, encode_prompt, generate_text, stream_text
from tinyllm.model import SimpleLLM
from tinyllm.tokenizer import BPETokenizer, CharTokenizer, WordTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("prompt", ["", "  \n", "unheard of", "<UNK>"])
def test_a_prompt_with_no_known_word(prompt: str) -> None:
    tokenizer = WordTokenizer({"hello": 0, "<UNK>": 1})
    with pytest.raises(ValueError, match="prompt is"):
        encode_prompt(tokenizer, prompt)
    with pytest.raises(ValueError, match="prompt is"):
        stream_text(SimpleLLM(2, 8, 16, 1, causal=True), tokenizer, prompt, 3)
    assert encode_prompt(tokenizer, "unheard hello") == [1, 0]


def test_an_empty_prompt_for_bytes_and_characters() -> None:
    for tokenizer in (BPETokenizer.from_texts(["ab"]), CharTokenizer.from_texts(["ab"])):
        with pytest.raises(ValueError, match="prompt is ''"):
            encode_prompt(tokenizer, "")
    with pytest.raises(ValueError, match="prompt is 'xyz'"):
        encode_prompt(CharTokenizer.from_texts(["ab"]), "xyz")


@pytest.mark.parametrize(
    ("prompts", "error", "reason"),
    [
        ([], ValueError, r"prompts is \[\]; it must have at least one prompt"),
        (None, TypeError, "prompts is None; it must be a str, or a list of them"),
        (["a", 3], TypeError, r"prompts is \['a', 3\]; it must be a str, or a list of them"),
        (b"ab", TypeError, "prompts is b'ab'; it must be a str, or a list of them"),
    ],
)
def test_prompts_that_are_none(prompts: Any, error: Any, reason: str) -> None:
    with pytest.raises(error, match=reason):
        generate_text(Scripted([1], BYTES.vocab_size), BYTES, prompts, 1)  # type: ignore[arg-type]
    if not isinstance(prompts, list):
        with pytest.raises(error, match=reason.replace("prompts", "prompt").replace("a list of them", "the token ids")):
            stream(BYTES, [1], prompts)


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


# Stop strings


def stream(tokenizer: Any, ids: list[int], prompt: str, **options: Any) -> TextStream:
    return stream_text(Scripted(ids, tokenizer.vocab_size), tokenizer, prompt, len(ids), **options)  # type: ignore[arg-type]


BYTES = BPETokenizer.from_texts(["x"])  # no merges: one token for each byte
TEXTS = ["one two stop three", "stop", "s st sto stop", "no end s", "🙂é stop", "\n\nUser: a", "aab aabaab"]
STOPS: list[Any] = ["stop", "é", "🙂é", ["\n\nUser:", "two"], "aabaab", ["sto", "stop"], ["op", "stop", "t"], ()]


def division(text: str, sizes: list[int]) -> list[str]:
    """Return the text in pieces of these sizes, which repeat."""
    found, rest = [], text
    for size in itertools.cycle(sizes):
        if not rest:
            return found
        found.append(rest[:size])
        rest = rest[size:]
    return found


def before(text: str, stops: Any) -> str:
    """Return the text before the stop string that is complete first."""
    for end in range(len(text)):
        at = [end + 1 - len(s) for s in ([stops] if isinstance(stops, str) else stops) if text[: end + 1].endswith(s)]
        if at:
            return text[: min(at)]
    return text


@pytest.mark.parametrize("stops", STOPS, ids=str)
@pytest.mark.parametrize("text", TEXTS)
def test_stop_strings_are_found_across_tokens_and_no_part_of_one_leaks(text: str, stops: Any) -> None:
    wanted = before(text, stops)
    merged = BPETokenizer.from_texts([" ".join(TEXTS) * 20], 300)
    for tokenizer in (BYTES, merged):
        ids = tokenizer.encode(text)
        written = stream(tokenizer, ids, "x", stop=stops)
        out = [*written]
        assert "".join(out) == wanted
        assert all(out)
        assert written.finish_reason == ("length" if wanted == text else "stop_string")
        if wanted != text:  # nothing is drawn after the token that completes it
            *earlier, _ = ids[: written.num_tokens]
            assert before(tokenizer.decode(earlier), stops) == tokenizer.decode(earlier)


class Parts:
    """A tokenizer that divides one text in given parts."""

    kind, end_of_text_id, unknown_id = "parts", None, None

    def __init__(self, parts: list[str]) -> None:
        self.parts = parts
        self.vocab_size = len(parts)

    def decode(self, ids: list[int]) -> str:
        return "".join(self.parts[index] for index in ids)


@pytest.mark.parametrize("sizes", [[1], [2], [3, 1], [7], [100]], ids=str)
@pytest.mark.parametrize("stops", STOPS, ids=str)
def test_the_text_does_not_depend_on_how_tokens_divide_it(stops: Any, sizes: list[int]) -> None:
    for text in TEXTS:
        tokenizer = Parts(["prompt", *division(text, sizes)])
        ids = [*range(1, tokenizer.vocab_size)]
        model: Any = Scripted(ids, tokenizer.vocab_size)
        written = stream_text(model, tokenizer, [0], len(ids), stop=stops)  # type: ignore[arg-type]
        assert "".join(written) == before(text, stops)


def test_what_may_be_a_stop_waits_until_it_is_none() -> None:
    assert [*stream(BYTES, BYTES.encode("a stoa"), "x", stop="stop")] == ["a", " ", "stoa"]
    assert [*stream(BYTES, BYTES.encode("a sto"), "x", stop="stop")] == ["a", " ", "sto"]  # it can be none any more
    assert [*stream(BYTES, BYTES.encode("aaab"), "x", stop="aab")] == ["a"]


def test_a_stop_in_the_prompt_does_not_count() -> None:
    assert "".join(stream(BYTES, BYTES.encode("op then stop"), "stop st", stop="stop")) == "op then "


@pytest.mark.parametrize(
    ("stop", "error", "reason"),
    [
        ("", ValueError, "stop has the string ''"),
        (["a", ""], ValueError, "the string ''"),
        ([3], TypeError, r"stop is \[3\]; it must be a str, or a list of them"),
        (3, TypeError, "stop is 3; it must be a str, or a list of them"),
    ],
)
def test_stop_strings_that_are_none(stop: Any, error: Any, reason: str) -> None:
    with pytest.raises(error, match=reason):
        stream(BYTES, [1], "x", stop=stop)
    with pytest.raises(error, match=reason):
        generate_text(Scripted([1], BYTES.vocab_size), BYTES, "x", 1, stop=stop)  # type: ignore[arg-type]


# What is told


def test_the_end_and_the_counts() -> None:
    ids = BYTES.encode("abc")
    written = stream(BYTES, ids, "xyz")
    assert (written.prompt_tokens, written.num_tokens, written.finish_reason) == (3, 0, None)
    next(written)
    assert (written.num_tokens, written.finish_reason) == (1, None)
    assert written.prefill_seconds > 0
    assert written.decode_seconds == 0
    assert [*written] == ["b", "c"]
    assert (written.num_tokens, written.finish_reason) == (3, "length")
    assert written.decode_seconds > 0
    assert BYTES.end_of_text_id is not None
    written = stream(BYTES, [*ids, BYTES.end_of_text_id, *ids], "xyz")
    assert [*written] == ["a", "b", "c"]
    assert (written.num_tokens, written.finish_reason) == (4, "stop")
    assert next(written, None) is None


def test_ctrl_c_ends_the_stream_and_what_is_there_stays() -> None:
    model: Any = Interrupted(BYTES.encode("abst"), BYTES.vocab_size, 3)
    written = stream_text(model, BYTES, "x", 10, stop="stop")
    assert [*written] == ["a", "b"]  # the s may have been the beginning of a stop
    assert (written.finish_reason, written.num_tokens) == ("interrupt", 3)
    assert next(written, None) is None


@pytest.mark.parametrize("calls", range(5))
def test_ctrl_c_ends_a_batch_as_it_ends_a_stream(calls: int) -> None:
    def interrupted() -> Any:
        return Interrupted(BYTES.encode("é sto"), BYTES.vocab_size, calls)

    expected = "".join(stream_text(interrupted(), BYTES, "x", 10, stop="stop"))
    assert expected == ("" if calls < 2 else "é " if calls > 2 else "é")
    assert generate_text(interrupted(), BYTES, "x", 10, stop="stop") == expected
    assert generate_text(interrupted(), BYTES, ["x", "y"], 10, stop="stop") == [expected] * 2


def test_ctrl_c_leaves_texts_that_had_ended_whole() -> None:
    class Both(Rows):
        def forward(self, ids: Tensor) -> Tensor:
            if ids.shape[1] == 5:
                raise KeyboardInterrupt
            return super().forward(ids)

    assert BYTES.end_of_text_id is not None
    scripts = [[0, *BYTES.encode(text), BYTES.end_of_text_id, 0] for text in ("as", "abcs")]
    model: Any = Both(scripts, BYTES.vocab_size)
    assert generate_text(model, BYTES, ["xy"] * 2, 9, stop="stop") == ["as", "abc"]


# Batches


def test_a_batch_of_texts_stops_in_each_row_by_itself() -> None:
    assert BYTES.end_of_text_id is not None
    texts = ["ab stop", "abcdefgh", "é🙂"]
    scripts = [[0, 0, *BYTES.encode(text), BYTES.end_of_text_id, *[0] * 9] for text in texts]
    model: Any = Rows(scripts, BYTES.vocab_size)  # of three tokens for a prompt: the script begins at the third
    assert generate_text(model, BYTES, ["xyz"] * 3, 9, stop=["sto", "zz"]) == ["ab ", "abcdefgh", "é🙂"]
    assert generate_text(model, BYTES, ["xyz"] * 3, 1) == ["a", "a", "\ufffd"]


def test_a_prompt_that_fills_the_context_gets_no_text() -> None:
    tokenizer = CharTokenizer.from_texts(["ab"])  # without an end of text, with which to fill rows up
    model = SimpleLLM(tokenizer.vocab_size, 8, 16, 1, causal=True, max_seq_len=4)
    texts = generate_text(model, tokenizer, ["abab", "a"], 9, seed=0, overflow="stop")
    assert [*map(len, texts)] == [0, 3]


def test_a_batch_of_texts_is_each_alone() -> None:
    torch.manual_seed(0)
    tokenizer = CharTokenizer.from_texts(["abcdefgh"])
    model = SimpleLLM(tokenizer.vocab_size, 16, 32, 2, causal=True, num_heads=2, max_seq_len=32)
    prompts = ["abc", "h", "gfedc"]
    texts = generate_text(model, tokenizer, prompts, 20, 1.5, seed=3)
    assert len({*texts}) == 3
    for index, prompt in enumerate(prompts):
        assert generate_text(model, tokenizer, prompt, 20, 1.5, seed=3 + index) == texts[index]
        assert "".join(stream_text(model, tokenizer, prompt, 20, 1.5, seed=3 + index)) == texts[index]
