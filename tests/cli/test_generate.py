"""Tests of the commands that use a run: generate and eval."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import runs
from tests.helpers.runs import FOX, Here, untrained_run
from tinyllm import _info, evaluation, load_run
from tinyllm._internal import words
from tinyllm.config.saved import read_config, save_config
from tinyllm.evaluation import evaluate_texts
from tinyllm.generation import TokenStream, choice, generate, stream_text
from tinyllm.model import SimpleLLM
from tinyllm.runs.folder import best_step
from tinyllm.runs.metrics import read_metrics
from tinyllm.tokenizer import BPETokenizer, CharTokenizer, WordTokenizer, load_tokenizer
from tinyllm.tokenizer.formats import load_vocabulary
from tinyllm.training.recorder import _keep_samples

pytestmark = pytest.mark.usefixtures("one_thread")


def change_weights(path: Path, change: Callable[[str, torch.Tensor], None]) -> None:
    weights = load_file(path)
    for name, tensor in weights.items():
        change(name, tensor)
    save_file(weights, path, metadata={"format": "pt"})


def is_one_error(text: str) -> bool:
    return text.startswith("tinyllm: error: ") and text.count("\n") == 1


# Weights that are not finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_end_every_command(value: float, run: Path, here: Here, tmp_path: Path) -> None:
    def damage(name: str, tensor: torch.Tensor) -> None:
        if name == "output.weight":
            tensor.view(-1)[5] = value

    change_weights(run / "model.safetensors", damage)
    (tmp_path / "text.txt").write_text(FOX)
    for command in (["eval", "--data", "text.txt"], ["generate", "--prompt", "the"]):
        status, out, err = here(*command, "--run", "run", cwd=tmp_path)
        assert (status, out) == (2, "")
        assert is_one_error(err)
        assert f"run/model.safetensors has {value} in output.weight" in err
    change_weights(run / "checkpoints" / "step-00000010" / "model.safetensors", damage)
    with pytest.raises(ValueError, match=r"step-00000010/model.safetensors has .* in output.weight"):
        load_run(run, checkpoint="best")
    load_run(run, checkpoint=20)


def test_finite_weights_that_overflow_end_eval_and_generate(run: Path, here: Here, tmp_path: Path) -> None:
    def damage(name: str, tensor: torch.Tensor) -> None:
        if name == "output.weight":
            tensor.fill_(3e38)

    change_weights(run / "model.safetensors", damage)
    (tmp_path / "text.txt").write_text(FOX)
    status, out, err = here("eval", "--run", "run", "--data", "text.txt", cwd=tmp_path)
    assert (status, out) == (2, "")
    assert is_one_error(err)
    assert re.search("the loss of these texts is (nan|inf|-inf)", err)
    status, out, err = here("generate", "--run", "run", "--prompt", "the", cwd=tmp_path)
    assert (status, out) == (2, "the\n")  # the error begins a line
    assert is_one_error(err)
    assert "the model's logits are not finite" in err


# Every loader's error names its file

LOADERS: list[tuple[str, Callable[[Path], object]]] = [
    ("config.json", load_run),
    ("config.json", read_config),
    ("tokenizer.json", load_run),
    ("tokenizer.json", load_vocabulary),
    ("model.safetensors", load_run),
    ("checkpoints/step-00000010/model.safetensors", lambda run: load_run(run, checkpoint="best")),
    ("checkpoints/step-00000020/state.json", best_step),
    ("metrics.jsonl", lambda run: read_metrics(run / "metrics.jsonl")),
    ("samples.jsonl", lambda run: _keep_samples(run / "samples.jsonl", 5)),
]


@pytest.mark.parametrize(("name", "load"), LOADERS)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\n", b"[]\n", b'{"a": {"b": 1}}\n', b'{"best_step": []}\n', b"null\n"]
)
def test_a_damaged_file_is_named(name: str, load: Callable[[Path], object], content: bytes, run: Path) -> None:
    (run / name).write_bytes(content)
    if name.endswith(".jsonl") and not content.endswith(b"\n"):
        load(run)  # no line, or half of one, which a kill leaves
        return
    with pytest.raises(ValueError, match=re.escape(name)) as error:
        load(run)
    assert "deserializing" not in str(error.value)


@pytest.mark.parametrize(("name", "load"), LOADERS)
def test_a_directory_in_place_of_a_file_is_named(name: str, load: Callable[[Path], object], run: Path) -> None:
    (run / name).unlink()
    (run / name).mkdir()
    with pytest.raises(OSError, match=re.escape(name) if load is not load_vocabulary else "no tokenizer in"):
        load(run)


@pytest.mark.skipif(os.name == "nt", reason="takes away a POSIX permission")
@pytest.mark.parametrize(("name", "load"), LOADERS)
def test_a_file_that_may_not_be_read_is_named(name: str, load: Callable[[Path], object], run: Path) -> None:
    (run / name).chmod(0)
    root = os.geteuid() == 0
    if root:  # who may read everything
        for folder in itertools.takewhile(lambda folder: str(folder) != tempfile.gettempdir(), run.parents):
            folder.chmod(0o755)  # the way down to the file is open
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError) as error:
            load(run)
    finally:
        if root:
            os.seteuid(0)
    assert str(error.value.filename).endswith(name)


def test_generate_of_the_best_checkpoint(run: Path, here: Here, tmp_path: Path) -> None:
    command = ["generate", "--run", "run", "--prompt", "the", "--max-new-tokens", 1, "--checkpoint"]
    assert here(*command, "best", cwd=tmp_path)[0] == 0
    (run / "checkpoints" / "step-00000020" / "state.json").write_text("{\n")
    status, _, err = here(*command, "best", cwd=tmp_path)
    assert status == 2
    assert is_one_error(err)
    assert "run/checkpoints/step-00000020/state.json is truncated, or not a training's" in err
    assert "--checkpoint is 'bst'; allowed are 'last', 'best' and the number of a step" in here(*command, "bst")[2]
    with pytest.raises(ValueError, match="checkpoint is 'bst'; allowed are 'last', 'best' and the number of a step"):
        load_run(run, checkpoint="bst")  # type: ignore[arg-type]


def test_other_programs_tokenizers_are_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}}
    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    for content in ({"tinyllm_tokenizer": [], "version": 1}, {**empty, **nothing}):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"tokenizer.json"):
            load_tokenizer(path)


def test_a_model_too_large_for_the_memory_is_one_error(run: Path, here: Here, tmp_path: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["model"]["hidden_dim"] = 10**14
    save_config(config, run)
    status, _, err = here("generate", "--run", "run", "--prompt", "the", cwd=tmp_path)
    assert status == 2
    assert is_one_error(err)
    assert "run/config.json describes does not fit in memory" in err


# Writing


class Piped(io.TextIOWrapper):
    def __init__(self, content: bytes, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


WRITE = ["generate", "--run", "run", "--max-new-tokens", 5, "--seed", 1]


def test_a_prompt_comes_from_an_option_a_file_or_a_pipe(
    run: Path, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, expected, err = here(*WRITE, "--prompt", "the fox", cwd=tmp_path)
    assert status == 0
    assert expected.startswith("the fox")
    assert re.fullmatch(r"5 tokens, \d+\.\d s; prefill [\d,]+\.\d tokens/s, decode [\d,]+\.\d tokens/s\n", err)
    assert re.fullmatch(
        r"1 token, \d+\.\d s; prefill [\d,]+\.\d tokens/s\n", here(*WRITE, "--prompt", "the", "--max-new-tokens", 1)[2]
    )
    for content in (b"the fox", b"the fox\n", b"the fox\r\n", b"\xef\xbb\xbfthe fox\n"):
        (tmp_path / "prompt.txt").write_bytes(content)
        assert here(*WRITE, "--prompt-file", "prompt.txt")[:2] == (0, expected)
        for arguments in ([], ["--prompt", "-"]):
            monkeypatch.setattr("sys.stdin", Piped(content))
            assert here(*WRITE, *arguments)[:2] == (0, expected)
    monkeypatch.setattr("sys.stdin", Piped(b"the\n\n"))
    assert here(*WRITE)[1].startswith("the\n")  # one line break only is the file's


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        ([], Piped(b"", terminal=True), "give --prompt TEXT, --prompt-file FILE, or text from a pipe"),
        ([], None, "give --prompt TEXT, --prompt-file FILE, or text from a pipe"),
        ([], Piped(b""), "standard input is empty; give --prompt TEXT, --prompt-file FILE, or text from a pipe"),
        ([], Piped(b"a\xff"), "standard input is not a UTF-8 text file: byte 0xff at offset 1"),
        (["--prompt-file", "latin"], None, "latin is not a UTF-8 text file: byte 0xff at offset 1"),
        (["--prompt-file", "nowhere"], None, "nowhere: No such file or directory"),
        (["--prompt-file", "run"], None, "run: Is a directory"),
        (
            ["--prompt-file", "latin", "--prompt", "a"],
            None,
            "--prompt and --prompt-file are both given; one is allowed",
        ),
        (["--prompt", "the", "--max-new-tokens", 0], None, "--max-new-tokens is 0; it must be at least 1"),
        (["--prompt", "the", "--num-samples", 0], None, "--num-samples is 0; it must be at least 1"),
        (["--prompt", "the", "--top-k", 0], None, "error: --top-k is 0; it must be at least 1\n"),
        (["--prompt", "the", "--top-k", 999], None, "error: --top-k is 999; it must be at most the size of the vocab"),
        (["--prompt", "the", "--prompt-lookup-num-tokens", 0], None, "error: --prompt-lookup-num-tokens is 0; "),
        (["--prompt", "the", "--top-p", 0], None, "error: --top-p is 0.0; it must be above 0 and at most 1\n"),
        (["--prompt", "the", "--min-p", "nan"], None, "error: --min-p is nan; it must be at least 0 and below 1\n"),
        (["--prompt", "the", "--repetition-penalty", 0], None, "error: --repetition-penalty is 0.0; it must be a pos"),
        (["--prompt", "the", "--stop", ""], None, "error: the value of --stop is empty"),
        (["--prompt", "the", "--seed", -1], None, "error: --seed is -1; it must be"),
        (["--prompt", "Z" * 99], None, f"the prompt is '{'Z' * 57}...', of which the char tokenizer knows nothing"),
    ],
)
def test_prompts_that_are_none(
    arguments: list[Any], stdin: Any, said: str, run: Path, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "latin").write_bytes(b"a\xff")
    monkeypatch.setattr("sys.stdin", stdin)
    status, out, err = here("generate", "--run", "run", *arguments, cwd=tmp_path)
    assert (status, out) == (2, "")
    assert is_one_error(err)
    assert said in err


def test_what_is_drawn_and_where_it_stops(run: Path, here: Here, tmp_path: Path) -> None:
    model, tokenizer, _ = load_run(run)
    command = ["generate", "--run", "run", "--prompt", "the fox", "--max-new-tokens", 30, "--seed", 1]
    options = {"top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.5}
    text = "".join(stream_text(model, tokenizer, "the fox", 30, 0.7, seed=1, **options))
    given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert here(*command, *given, cwd=tmp_path)[:2] == (0, f"the fox{text}\n")
    guesses = ["--prompt-lookup-num-tokens", 3]
    assert here(*command, *given, *guesses)[:2] == (0, f"the fox{text}\n")
    stops = ["--stop", text[9:12], "--stop", text[12:20]]
    status, out, err = here(*command, *given, *stops)
    assert (status, out) == (0, f"the fox{text[: text.index(text[9:12])]}\n")
    assert not err.startswith("30 tokens")


def test_a_model_that_is_not_causal_is_said_in_one_line(
    run: Path, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_has_warned", False)
    path = run / "config.json"
    config = json.loads(path.read_text())
    config["model"]["causal"] = False
    path.write_text(json.dumps(config))
    status, _, err = here(*WRITE, "--prompt", "the fox", cwd=tmp_path)
    assert status == 0
    assert err.startswith("tinyllm: the model is not causal: ")
    assert err.count("\n") == 2


def test_ctrl_c_leaves_the_text_that_is_there(
    run: Path, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = here(*WRITE, "--prompt", "the fox", cwd=tmp_path)[1]
    following, calls = TokenStream.__next__, 0

    def interrupted(stream: TokenStream) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return following(stream)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(TokenStream, "__next__", interrupted)
    status, out, err = here(*WRITE, "--prompt", "the fox", "--num-samples", 2)
    signal.signal(signal.SIGINT, before)
    assert (status, err) == (130, "tinyllm: interrupted\n")
    assert out == f"--- 1 of 2, --seed 1 ---\n{whole[: len('the fox') + 3]}\n"


def test_a_reader_that_has_gone_is_no_error(run: Path, tmp_path: Path) -> None:
    arguments = ["generate", "--run", "run", "--prompt", "the", "--max-new-tokens", 5000]
    writer = subprocess.Popen(
        runs.command(*arguments), cwd=tmp_path, env=runs.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert writer.stdout is not None
    assert writer.stdout.read(4)
    writer.stdout.close()
    assert writer.stderr is not None
    assert writer.stderr.read() == b""
    assert writer.wait(60) == 1


def test_several_samples_are_those_of_the_seeds_that_follow(run: Path, here: Here, tmp_path: Path) -> None:
    command = ["generate", "--run", "run", "--prompt", "the", "--max-new-tokens", 5]
    alone = [here(*command, "--seed", seed, cwd=tmp_path)[1] for seed in (7, 8)]
    assert alone[0] != alone[1]
    status, out, err = here(*command, "--seed", 7, "--num-samples", 2)
    assert status == 0
    assert out == f"--- 1 of 2, --seed 7 ---\n{alone[0]}--- 2 of 2, --seed 8 ---\n{alone[1]}"
    assert err.startswith("10 tokens, ")


def test_unknown_characters_of_a_prompt_are_told(run: Path, here: Here, tmp_path: Path) -> None:
    status, out, err = here(*WRITE, "--prompt", "ZZthe", cwd=tmp_path)
    assert status == 0
    assert out.startswith("ZZthe")
    assert "the char tokenizer does not know 2 of the prompt's 5 tokens" in err.splitlines()[0]


@pytest.mark.parametrize("tokenizer", [CharTokenizer.from_texts(["ab"]), WordTokenizer.from_texts(["a b"])])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 1}, {}])
def test_the_unknown_token_is_never_written(tokenizer: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = SimpleLLM(tokenizer.vocab_size, 8, 16, 1, causal=True, max_seq_len=8)
    with torch.no_grad():
        model.output.bias[tokenizer.unknown_id] = 50.0
    before = model.state_dict()["output.bias"].clone()
    assert "<UNK>" in tokenizer.decode(generate(model, [0], 20, seed=0, **options).tolist())
    stream = stream_text(model, tokenizer, "a", 20, seed=0, **options)
    text = "".join(stream)
    assert set(text.split() if tokenizer.kind == "word" else text) <= {"a", "b"}
    assert stream.num_tokens == 20
    assert torch.equal(model.state_dict()["output.bias"], before)
    with pytest.raises(ValueError, match=f"suppress_id is {tokenizer.vocab_size}"):
        generate(model, [0], 1, suppress_id=tokenizer.vocab_size)
    with pytest.raises(ValueError, match="suppress_id is 0, the only id"):
        generate(SimpleLLM(1, 8, 16, 1, causal=True), [0], 1, suppress_id=0)


# Measuring


def test_d_one_document_is_singular_and_takes_no_plural(run: Path, here: Here, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the Z")
    status, out, _ = here("eval", "--run", "run", "--data", "text.txt", cwd=tmp_path)
    assert status == 0
    assert out.splitlines()[0] == "1 document, 4 bytes, 4 tokens"
    assert out.splitlines()[-1] == "1 token is not in the vocabulary: bits per byte do not compare"


@pytest.mark.parametrize(("kind", "text", "num_bytes"), [("char", "Z fox", 4), ("word", "Zebra fox", 4)])
def test_d_an_unknown_first_token_counts_as_the_bytes_it_stands_for(
    kind: str, text: str, num_bytes: int, tmp_path: Path
) -> None:
    model, tokenizer, _ = load_run(untrained_run(tmp_path / "run", kind))
    found = evaluate_texts(model, tokenizer, [text])
    assert (found.num_bytes, found.unknown) == (num_bytes, 0)


def test_d_eval_shows_its_progress(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    model, tokenizer, _ = load_run(run)
    evaluate_texts(model, tokenizer, [FOX], show_progress=True)
    assert capsys.readouterr().err == ""  # it took less than two seconds

    tqdm = evaluation.tqdm
    monkeypatch.setattr(evaluation, "tqdm", lambda **options: tqdm(**{**options, "delay": 0, "mininterval": 0}))
    evaluate_texts(model, tokenizer, [FOX], show_progress=True)
    assert f"{len(FOX) - 1} tokens predicted" in capsys.readouterr().err
    evaluate_texts(model, tokenizer, [FOX])
    assert capsys.readouterr().err == ""


def test_d_small_models_are_estimated_in_small_units(here: Here, tmp_path: Path) -> None:
    status, out, _ = here("estimate", "--preset", "tiny", cwd=tmp_path)
    assert status == 0
    assert "0.0 " not in out
    assert re.search(r"7\.6 MiB +5\.1 MiB +7\.1 MiB +1\.2 MiB +21\.0 MiB  yes", out)
    assert "49.1M tokens/s in all; 20 tokens a parameter take 0.5 seconds" in out


def test_d_units_fit_the_size() -> None:
    sizes = [words.binary_size(size) for size in (0, 512, 2**20 - 1, 2**20, 80 * 2**30, 3 * 2**41)]
    assert sizes == ["0.0 KiB", "0.5 KiB", "1.0 MiB", "1.0 MiB", "80.0 GiB", "6.0 TiB"]
    times = [words.duration(seconds) for seconds in (0.5, 90, 3 * 3600, 36 * 3600, 5e10)]
    assert times == ["0.5 seconds", "1.5 minutes", "3.0 hours", "1.5 days", "1,584.4 years"]


def test_d_what_serves_this_machine_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def titles() -> list[str]:
        return [text.split(" ")[0] for text in _info.format_info().splitlines() if " tensors" in text[:12]]

    known = _info._gpu
    for why_not, expected in (("there is no GPU", ["CPU", "CUDA"]), (None, ["CUDA", "CPU"])):
        monkeypatch.setattr(_info, "_gpu", lambda record, why_not=why_not: {**known(record), "why_not": why_not})
        assert titles() == expected


# Python


def test_encode_of_what_is_no_text_names_its_argument() -> None:
    for kind in (BPETokenizer, CharTokenizer, WordTokenizer):
        tokenizer = kind.from_texts(["a b"])
        for text in (None, 3, b"a"):
            with pytest.raises(TypeError, match=re.escape(f"text is {text!r}; it must be a str")):
                tokenizer.encode(text)  # type: ignore[arg-type]
