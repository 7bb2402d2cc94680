"""Tests of the command export: other people's programs read what it writes, and compute what we do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.helpers.runs import FOX, Here
from tinyllm import SimpleLLM, SimpleLLMConfig, load_run
from tinyllm.config.saved import save_config
from tinyllm.config.training import TrainConfig
from tinyllm.integrations.export import export
from tinyllm.runs.load import save_model
from tinyllm.tokenizer import BPETokenizer, Tokenizer, train_tokenizer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
TEXT = "the fox and the dog"
KINDS = ("weight", "bias")


def make_run(folder: Path, tokenizer: Tokenizer | None = None, **changes: Any) -> Path:
    """Make the folder of a model like the presets', with random weights."""
    tokenizer = tokenizer or BPETokenizer.from_texts([FOX * 9], 300)
    # transformers' reader of GGUF takes GPT-2's context and the usual width of the network for granted.
    sizes = {"embedding_dim": 64, "hidden_dim": 256, "num_layers": 2, "num_heads": 4, "seq_len": 1024}
    values = TrainConfig.from_preset("tiny", **sizes).model_config(tokenizer.vocab_size).to_dict()
    config = SimpleLLMConfig(**{**values, **changes})
    torch.manual_seed(0)
    model = SimpleLLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder.mkdir()
    save_config({"model": config.to_dict(), "training": {}}, folder)
    tokenizer.save(folder / "tokenizer.json")
    save_model(model, folder)
    return folder


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    return make_run(tmp_path / "gpt2")


@pytest.fixture
def short(tmp_path: Path) -> Path:
    return make_run(tmp_path / "short", max_seq_len=32)


def logits_of(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids of TEXT, and our logits."""
    model, tokenizer, _ = load_run(run)
    ids = torch.tensor([tokenizer.encode(TEXT)])
    with torch.no_grad():
        return ids, model(ids)


def test_the_presets_models_are_gpt2s_in_transformers(short: Path, here: Here, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    status, shown, _ = here("export", "--run", short, "--to", "hf", "--out", out)
    assert (status, shown.startswith(f"{out} is a GPT-2:")) == (0, True)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "GPT2LMHeadModel"
    ids, expected = logits_of(short)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer(TEXT)["input_ids"] == ids[0].tolist()
    assert tokenizer.decode(ids[0]) == TEXT
    assert tokenizer.eos_token == "<|endoftext|>"
    assert {*tokenizer(TEXT)} == {"input_ids", "attention_mask"}
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    pipeline = transformers.pipeline("text-generation", model=str(out))
    written = pipeline("the", do_sample=False, pad_token_id=0, return_tensors=True)[0]["generated_token_ids"]
    assert len(written) <= model.config.n_positions
    assert json.loads((out / "tokenizer_config.json").read_text())["model_input_names"] == [
        *("input_ids", "attention_mask")
    ]


def test_other_models_are_loaded_by_us_in_transformers(here: Here, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    run = make_run(tmp_path / "run", norm_first=False, position="sinusoidal")
    out = tmp_path / "out"
    status, shown, _ = here("export", "--run", run, "--to", "hf", "--out", out)
    assert status == 0
    assert "has the model_type tinyllm, as it is no GPT-2 (norm_first is False; " in shown
    assert "position is 'sinusoidal'" in shown
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    ids, expected = logits_of(run)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(out)(TEXT)["input_ids"] == ids[0].tolist()
    again = load_run(out)
    assert torch.equal(again.model(ids), load_run(run).model(ids))
    assert here("generate", "--run", out, "--prompt", "the", "--max-new-tokens", 3)[0] == 0
    end = again.tokenizer.end_of_text_id
    assert model.generation_config.eos_token_id == model.config.bos_token_id == end
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize(
    ("weights", "most"), [("float32", 1e-5), ("bf16", 0.02), ("int8", 0.03), ("int4", 0.4)], ids=str
)
def test_gguf_is_read_by_transformers(gpt2: Path, here: Here, tmp_path: Path, weights: str, most: float) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    out = tmp_path / "files" / "model.gguf"
    status, shown, err = here("export", "--run", gpt2, "--to", "gguf", "--out", out, "--weights", weights)
    assert (status, err) == (0, "")
    assert shown == f"{out} is a GGUF file of llama.cpp's architecture gpt2, with {weights} weights.\n"
    model = transformers.AutoModelForCausalLM.from_pretrained(out.parent, gguf_file=out.name, dtype=torch.float32)
    ids, expected = logits_of(gpt2)
    with torch.no_grad():
        difference = (model(ids).logits - expected).abs().max()
    assert difference <= most * expected.abs().max()
    assert [path.name for path in out.parent.iterdir()] == ["model.gguf"]


def test_gguf_has_the_vocabulary(here: Here, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    pretrained, out = tmp_path / "pretrained", tmp_path / "model.gguf"
    tokenizer = BPETokenizer.from_texts([FOX * 9], 300)
    options = {"causal": True, "norm_first": True, "activation": "gelu", "position": "learned", "output_bias": False}
    padded = SimpleLLM(320, 64, 96, 1, num_heads=4, max_seq_len=32, **options)  # to a round number of ids
    padded.save_pretrained(pretrained, tokenizer=tokenizer)
    assert here("export", "--run", pretrained, "--to", "gguf", "--out", out)[0] == 0
    reader = gguf.GGUFReader(out)
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    kinds = reader.get_field("tokenizer.ggml.token_type").contents()
    end = tokenizer.end_of_text_id
    assert end is not None
    assert len(tokens) == 320
    assert tokens[end] == "<|endoftext|>"
    assert kinds[end] == gguf.TokenType.CONTROL
    assert set(kinds[tokenizer.vocab_size :]) == {gguf.TokenType.UNUSED}
    assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == end
    parts = ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down")
    names = {f"{name}.{kind}" for name in (*(f"blk.0.{part}" for part in parts), "output_norm") for kind in KINDS}
    assert {tensor.name for tensor in reader.tensors} == names | {
        *("output.weight", "token_embd.weight", "position_embd.weight")
    }


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_gguf_is_computed_by_llama_cpp(gpt2: Path, here: Here, tmp_path: Path, weights: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    out = tmp_path / "model.gguf"
    assert here("export", "--run", gpt2, "--to", "gguf", "--out", out, "--weights", weights)[0] == 0
    engine = llama_cpp.Llama(str(out), n_ctx=32, verbose=False, logits_all=True)
    ids, expected = logits_of(gpt2)
    assert engine.tokenize(TEXT.encode(), add_bos=False) == ids[0].tolist()
    engine.eval(ids[0].tolist())
    found = torch.tensor(engine.scores[: ids.size(1)])
    assert (found - expected[0]).abs().max() < (0.01 if weights == "float32" else 0.05) * expected.abs().max()


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        ({"position": "sinusoidal"}, ["--to", "gguf"], "position is 'sinusoidal'; GPT-2's positions are learned"),
        ({"output_bias": True, "activation": "relu"}, ["--to", "gguf"], "output_bias is True.*activation is 'relu'"),
        ({"causal": False}, ["--to", "gguf"], "causal is False"),
        ({"causal": False}, ["--to", "hf"], "causal is False"),
        (
            {"embedding_dim": 72, "hidden_dim": 100},
            ["--to", "gguf", "--weights", "int8"],
            "embedding_dim is 72 and hidden_dim is 100; weights 'int8' share scales in blocks of 32 columns",
        ),
        ({}, ["--to", "onnx"], '--to is \'onnx\'; it must be "hf" or "gguf"'),
        ({}, ["--to", "gguf", "--weights", "int3"], "--weights is 'int3'"),
        ({}, ["--to", "hf", "--weights", "int8"], "--weights is 'int8'; to 'hf' it must be 'float32'"),
    ],
)
def test_what_a_format_cannot_hold(
    here: Here, tmp_path: Path, changes: dict[str, Any], options: list[str], says: str
) -> None:
    run, out = make_run(tmp_path / "run", **changes), tmp_path / "out"
    status, _, err = here("export", "--run", run, "--out", out, *options)
    assert status == 2
    assert re.search(says, err), err
    assert not out.exists()


@pytest.mark.parametrize("kind", ["char", "word"])
@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_tokenizers_that_others_cannot_read(here: Here, tmp_path: Path, kind: str, to: str) -> None:
    run = make_run(tmp_path / "run", train_tokenizer(kind, [FOX]))
    status, _, err = here("export", "--run", run, "--to", to, "--out", tmp_path / "out")
    assert status == 2
    assert f"its tokenizer is a {kind} tokenizer" in err


def test_a_tokenizer_that_splits_words_otherwise(here: Here, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = BPETokenizer.from_texts([FOX * 9], 300)
    tokenizer._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    run = make_run(tmp_path / "run", tokenizer)
    status, _, err = here("export", "--run", run, "--to", "gguf", "--out", tmp_path / "out")
    assert status == 2
    assert "its tokenizer splits words otherwise than GPT-2's" in err


def test_a_tokenizer_without_an_end_of_text(here: Here, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    run = make_run(tmp_path / "run", BPETokenizer(library))
    status, _, err = here("export", "--run", run, "--to", "gguf", "--out", tmp_path / "out")
    assert status == 2
    assert "no token that ends a text; llama.cpp would take token 11 for it" in err


@pytest.mark.parametrize("changes", [{}, {"position": "sinusoidal"}], ids=["a GPT-2", "ours"])
def test_a_folder_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """From Python, too; and a failure on the way leaves nothing behind."""
    model, tokenizer, _ = load_run(make_run(tmp_path / "run", **changes))
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(FileExistsError, match="is not empty"):
        export(model, tokenizer, tmp_path / "run", to="hf")
    assert (tmp_path / "run" / "config.json").read_text() == before
    monkeypatch.setattr(BPETokenizer, "save", mock.Mock(side_effect=OSError("the disk is gone")))
    with pytest.raises(OSError, match="the disk is gone"):
        export(model, tokenizer, tmp_path / "out", to="hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    monkeypatch.undo()
    (tmp_path / "out").mkdir()  # an empty one may be there
    export(model, tokenizer, tmp_path / "out", to="hf")
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_nothing_else_is_overwritten(gpt2: Path, here: Here, tmp_path: Path) -> None:
    taken = tmp_path / "taken.txt"
    taken.write_text("mine")
    for to, says in (
        ("gguf", f"--out {taken} is there, and not replaced"),
        ("hf", "is a file; a new directory is needed"),
    ):
        status, _, err = here("export", "--run", gpt2, "--to", to, "--out", taken)
        assert status == 2
        assert says in err
    assert taken.read_text() == "mine"
    status, _, err = here("export", "--run", gpt2, "--to", "hf", "--out", gpt2)
    assert status == 2
    assert "is not empty" in err
    assert {path.name for path in tmp_path.iterdir()} == {"gpt2", "taken.txt"}


def test_a_quantised_run_is_refused(gpt2: Path, here: Here, tmp_path: Path) -> None:
    assert here("quantize", "--run", gpt2, "--weights", "int8", "--out", tmp_path / "small")[0] == 0
    status, _, err = here("export", "--run", tmp_path / "small", "--to", "gguf", "--out", tmp_path / "out")
    assert status == 2
    assert "stored as 'int8'; export the original" in err
