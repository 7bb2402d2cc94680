"""Folders as other programs write them: every kind of file of weights, their damage, tokenizers, and the Hub."""

from __future__ import annotations

import json
import math
import os
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.needs import needs_transformers
from tests.pretrained.test_gpt2 import GPT2, assert_equal, change_config, hugging_face, ours, saved
from tinyllm import SimpleLLM, SimpleLLMConfig, load_run
from tinyllm.tokenizer import BPETokenizer

Tensors = dict[str, Tensor]
LN_F, QKV = "transformer.ln_f.weight", "transformer.h.1.attn.c_attn.weight"


def weights_of(directory: Path) -> Tensors:
    return load_file(directory / "model.safetensors")


def rewrite(directory: Path, change: Callable[[Tensors], object]) -> None:
    tensors = weights_of(directory)
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


# ---- Every kind of file


def write_safetensors(directory: Path, tensors: Tensors) -> None:
    save_file(tensors, directory / "model.safetensors")


def write_pickle(directory: Path, tensors: Tensors) -> None:
    torch.save(OrderedDict(tensors), directory / "pytorch_model.bin")


def write_old_pickle(directory: Path, tensors: Tensors) -> None:
    torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def write_shards(directory: Path, tensors: Tensors, name: str = "model", suffix: str = "safetensors") -> None:
    names, where = list(tensors), {}
    for index in range(3):
        file = f"{name}-{index + 1:05}-of-00003.{suffix}"
        shard = {key: tensors[key] for key in names[index::3]}
        where |= dict.fromkeys(shard, file)
        save_file(shard, directory / file) if suffix == "safetensors" else torch.save(shard, directory / file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (directory / f"{name}.{suffix}.index.json").write_text(json.dumps(index))


def write_pickled_shards(directory: Path, tensors: Tensors) -> None:
    write_shards(directory, tensors, "pytorch_model", "bin")


WRITERS = [write_safetensors, write_pickle, write_old_pickle, write_shards, write_pickled_shards]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_every_kind_of_file(write: Callable[[Path, Tensors], None], prefix: str, tmp_path: Path) -> None:
    model = saved(tmp_path)
    tensors = {name.replace("transformer.", prefix, 1): tensor for name, tensor in weights_of(tmp_path).items()}
    for index in range(2):  # what older versions stored besides
        tensors[f"{prefix}h.{index}.attn.bias"] = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
        tensors[f"{prefix}h.{index}.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors[f"{prefix}wte.weight"].clone()
    (tmp_path / "model.safetensors").unlink()
    write(tmp_path, tensors)
    assert_equal(model, SimpleLLM.from_pretrained(tmp_path))


@needs_transformers
@pytest.mark.parametrize("whole", [True, False])
def test_folders_of_transformers(whole: bool, tmp_path: Path) -> None:
    """Shards, as one model writes them, and the names without a prefix, as the model without a head does."""
    theirs = hugging_face(vocab_size=31, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    if whole:
        theirs.save_pretrained(tmp_path, max_shard_size="10KB")
        assert len([*tmp_path.glob("*.safetensors")]) > 2
    else:
        theirs.transformer.save_pretrained(tmp_path)
        assert "wte.weight" in weights_of(tmp_path)
    ids = torch.tensor([[3, 1, 30]])
    torch.testing.assert_close(SimpleLLM.from_pretrained(tmp_path)(ids), theirs(ids).logits)


def test_safetensors_come_before_pickles(tmp_path: Path) -> None:
    model = saved(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"no")
    assert_equal(model, SimpleLLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = saved(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    assert_equal(model.to(dtype).float(), SimpleLLM.from_pretrained(tmp_path))


# ---- Tensors that do not fit


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(QKV), r"missing: h\.1\.attn\.c_attn\.weight$"),
        (lambda t: t.update(extra=torch.ones(1)), "not of this model: extra$"),
        (
            lambda t: t.update({"transformer.h.2.attn.bias": torch.ones(1)}),
            r"not of this model: transformer\.h\.2\.attn\.bias",
        ),
        (
            lambda t: t.update({QKV: t[QKV].t().contiguous()}),
            r"transformer\.h\.1\.attn\.c_attn\.weight has shape \[24, 8\]; \[8, 24\] is needed",
        ),
        (lambda t: t.update({LN_F: t[LN_F].long()}), r"ln_f\.weight has dtype torch\.int64"),
        (lambda t: t.update({LN_F: t[LN_F].double() * 1e300}), r"ln_f\.weight holds -?inf"),  # as float32
        (lambda t: t[LN_F].__setitem__(3, math.nan), r"transformer\.ln_f\.weight holds nan"),
        (lambda t: t[QKV].__setitem__((7, 23), -math.inf), r"c_attn\.weight holds -inf"),
        (lambda t: t.update({"ln_f.weight": t[LN_F].clone()}), r"there twice: .*ln_f\.weight and .*ln_f\.weight"),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(11, 8)}),
            r"lm_head\.weight is not the embedding's, though tie_word_embeddings says so",
        ),
    ],
)
def test_tensors_that_do_not_fit(change: Callable[[Tensors], object], says: str, tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=rf"the weights in .* are not those of its config\.json: .*{says}"):
        SimpleLLM.from_pretrained(tmp_path)


def test_all_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    saved(tmp_path)

    def spoil(tensors: Tensors) -> None:
        del tensors["transformer.wpe.weight"], tensors["transformer.h.0.ln_1.bias"]
        tensors |= {"more": torch.ones(2), "yet.more": torch.ones(2)}
        tensors[LN_F] = torch.ones(9)
        tensors["transformer.h.1.ln_2.weight"] = torch.ones(3)
        tensors[QKV][0, 0] = math.inf
        tensors["transformer.wte.weight"][2, 2] = math.nan

    rewrite(tmp_path, spoil)
    with pytest.raises(ValueError, match="are not those of its config") as caught:
        SimpleLLM.from_pretrained(tmp_path)
    for part in (
        "missing: wpe.weight, h.0.ln_1.bias",
        "not of this model: more, yet.more",
        "ln_f.weight has shape [9]; [8] is needed",
        "h.1.ln_2.weight has shape [3]",
        "c_attn.weight holds inf",
        "wte.weight holds nan",
    ):
        assert part in str(caught.value)


def test_a_copy_of_a_bad_embedding_is_not_one_more_problem(tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"transformer.wte.weight": torch.ones(3), "lm_head.weight": torch.ones(3)}))
    with pytest.raises(
        ValueError, match=r"config\.json: transformer\.wte\.weight has shape \[3\]; \[11, 8\] is needed$"
    ):
        SimpleLLM.from_pretrained(tmp_path)


def test_a_config_of_far_more_layers(tmp_path: Path) -> None:
    saved(tmp_path)
    change_config(tmp_path, n_layer=10**12)
    with pytest.raises(ValueError, match=r"config\.json has n_layer 1000000000000; the weights are 28 tensors"):
        SimpleLLM.from_pretrained(tmp_path)


def test_an_untied_model_without_a_head(tmp_path: Path) -> None:
    saved(tmp_path)
    change_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        SimpleLLM.from_pretrained(tmp_path)


# ---- Damaged and hostile files


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
def test_truncated_files_are_named(write: Callable[[Path, Tensors], None], keep: float, tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = weights_of(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    write(tmp_path, tensors)
    path = sorted(tmp_path.glob("*.safetensors")) or sorted(tmp_path.glob("*.bin"))
    content = path[0].read_bytes()
    path[0].write_bytes(content[: int(len(content) * keep) if keep == 0.5 else int(keep)])
    with pytest.raises(ValueError, match=rf"{path[0].name} is not a .*, or is truncated"):
        SimpleLLM.from_pretrained(tmp_path)


class Code:
    """Run code while a pickle is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save({"wte.weight": torch.ones(1), "x": Code()}, path),
        lambda path: torch.save(Code(), path, _use_new_zipfile_serialization=False),
        lambda path: torch.save(SimpleNamespace(a=1), path),
        lambda path: path.write_bytes(pickle.dumps(Code(), protocol=2)),
    ],
)
def test_a_pickle_that_holds_code_is_refused(
    write: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    write(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle that asks for .* nothing in it was run"):
        SimpleLLM.from_pretrained(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([torch.ones(1)], "holds a list; a dict of names and tensors is needed"),
        ({"epoch": 3, "lr": 0.1, "w": torch.ones(1)}, "has 'epoch', 'lr', which are not tensors"),
    ],
)
def test_a_pickle_of_other_things(content: Any, says: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=says):
        SimpleLLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_an_index_of_shards_that_is_none(content: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "b.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is not an index of shards"):
        SimpleLLM.from_pretrained(tmp_path)


def test_missing_and_repeating_shards(tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = weights_of(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    write_shards(tmp_path, tensors)
    first, second, third = sorted(tmp_path.glob("model-*"))
    content = third.read_bytes()
    third.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match=rf"{third.name} has .*, which .*{second.name} has, too"):
        SimpleLLM.from_pretrained(tmp_path)
    third.write_bytes(content)
    first.unlink()
    second.unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {first.name}, {second.name}, of which model.safe"):
        SimpleLLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(("name", "says"), [("config.json", r"no config\.json"), ("model.safetensors", "no weights: ")])
def test_a_missing_file_is_named(name: str, says: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=says):
        SimpleLLM.from_pretrained(tmp_path)


# ---- Tokenizers, and load_run


def with_tokenizer(directory: Path, padding: int = 0) -> tuple[SimpleLLM, BPETokenizer]:
    tokenizer = BPETokenizer.from_texts(["the cat sat on the mat, and the dog sat on the cat. " * 9], 290)
    values = GPT2.to_dict() | {"vocab_size": tokenizer.vocab_size + padding}
    model = ours(config=SimpleLLMConfig.from_dict(values))
    model.save_pretrained(directory, tokenizer=tokenizer)
    return model, tokenizer


TEXT = "the cat's 42 mats,  não 🙂\n<|endoftext|>"


def test_load_run_takes_such_a_folder(tmp_path: Path) -> None:
    model, tokenizer = with_tokenizer(tmp_path)
    loaded, read, config = load_run(tmp_path)
    assert_equal(model, loaded)
    assert read.encode(TEXT) == tokenizer.encode(TEXT)
    assert read.end_of_text_id == tokenizer.end_of_text_id == config["eos_token_id"]
    assert config["model_type"] == "gpt2"
    with pytest.raises(ValueError, match=r"checkpoint is 'best'; .* is not a training's"):
        load_run(tmp_path, checkpoint="best")
    change_config(tmp_path, model_type="llama")
    with pytest.raises(ValueError, match=r"config\.json has the model_type 'llama'"):
        load_run(tmp_path)


def test_a_padded_vocabulary_loads_and_one_too_large_does_not(tmp_path: Path) -> None:
    _, tokenizer = with_tokenizer(tmp_path / "padded", padding=14)
    loaded = load_run(tmp_path / "padded")
    assert loaded.model.config.vocab_size == loaded.tokenizer.vocab_size + 14
    saved(tmp_path / "small")
    tokenizer.save(tmp_path / "small" / "tokenizer.json")
    with pytest.raises(ValueError, match=rf"has {tokenizer.vocab_size} tokens, more than the model's vocab_size, 11"):
        load_run(tmp_path / "small")


def test_vocab_json_and_merges(tmp_path: Path) -> None:
    model, tokenizer = with_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*: no tokenizer\.json, no vocab\.json with merges"):
        load_run(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({**content["vocab"], "<|endoftext|>": 0}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, content["merges"])))
    loaded = load_run(tmp_path)
    assert_equal(model, loaded.model)
    assert loaded.tokenizer.encode(TEXT) == tokenizer.encode(TEXT)


@needs_transformers
def test_transformers_reads_the_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    _, tokenizer = with_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = TEXT.removesuffix("<|endoftext|>")
    assert theirs.encode(text) == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.eos_token_id == tokenizer.end_of_text_id
    assert theirs.model_max_length == GPT2.max_seq_len


def test_a_tokenizer_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"has a tokenizer\.json without a config\.json .* not replaced"):
        with_tokenizer(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


# ---- Names


@pytest.mark.parametrize("path", ["/no/where", "./nowhere", "../nowhere", "a/b/c", "~/x", "a b"])
def test_a_path_that_cannot_be_a_models_name(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=f"there is no folder {path}$"):
        SimpleLLM.from_pretrained(path)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file; the folder"):
        SimpleLLM.from_pretrained(tmp_path / "file")


def test_a_name_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"no folder some/gpt2; .* need: pip install huggingface_hub"):
        SimpleLLM.from_pretrained("some/gpt2")


@pytest.mark.parametrize("write", [write_safetensors, write_pickle])
def test_a_name_on_the_hub(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = saved(tmp_path), []
    tensors = weights_of(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    write(tmp_path, tensors)

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, "*.safetensors" in allow_patterns, "pytorch_model*.bin" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    assert_equal(model, SimpleLLM.from_pretrained("some/gpt2"))
    assert asked == [("some/gpt2", True, False), ("some/gpt2", False, True)][: 1 + (write is write_pickle)]


def test_a_name_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no network here\nand more")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    with pytest.raises(FileNotFoundError, match=r"no folder gpt2, and no model .* Hub: no network here$"):
        SimpleLLM.from_pretrained("gpt2")
