"""The run folder: round trips, damage, and what must not be lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyllm.config.model import SimpleLLMConfig
from tinyllm.config.saved import read_config, save_config
from tinyllm.model import SimpleLLM
from tinyllm.runs import load
from tinyllm.runs.folder import check_out
from tinyllm.runs.load import load_model, load_run, save_model
from tinyllm.tokenizer import WordTokenizer

TOKENIZER = WordTokenizer({"hello": 0, "world": 1, "<UNK>": 2})
ARTICLE = SimpleLLMConfig(3, 8, 12, 2)
SCALED = SimpleLLMConfig(
    3, 8, 12, 2, 2, True, 16, 0.1, "gelu", norm_first=True, bias=False, tie_embeddings=True, position="learned"
)


def save_run(directory: Path, config: SimpleLLMConfig = ARTICLE) -> SimpleLLM:
    torch.manual_seed(0)
    model = SimpleLLM.from_config(config)
    save_config({"model": config.to_dict(), "training": {"seed": 7}}, directory)
    TOKENIZER.save(directory / "tokenizer.json")
    save_model(model, directory)
    return model.eval()


@pytest.mark.parametrize("config", [ARTICLE, SCALED])
def test_round_trip(config: SimpleLLMConfig, tmp_path: Path) -> None:
    model = save_run(tmp_path / "run", config)
    loaded, tokenizer, rest = load_run(tmp_path / "run")
    assert loaded.config == config
    assert not loaded.training
    assert rest["training"] == {"seed": 7}
    assert tokenizer.encode("world hello") == [1, 0]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    ids = torch.tensor([[0, 1, 2]])
    assert torch.equal(loaded(ids), model(ids))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(
        ["config.json", "model.safetensors", "tokenizer.json"]
    )


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    save_run(tmp_path, SCALED)
    stored = load_file(tmp_path / "model.safetensors")
    assert ("output.weight" in stored) != ("embedding.embedding.weight" in stored)
    loaded = load_model(tmp_path)
    assert loaded.output.weight is loaded.embedding.embedding.weight


def test_weights_are_as_readable_as_the_other_files(tmp_path: Path) -> None:
    save_run(tmp_path)
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_a_failed_save_leaves_the_old_weights(tmp_path: Path, monkeypatch) -> None:
    save_run(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def half(model, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(load, "save_safetensors", half)
    with pytest.raises(OSError, match="disk full"):
        save_model(SimpleLLM.from_config(ARTICLE), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


# Damage


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    save_run(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_run(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no run folder .*nowhere"):
        load_run(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
def test_truncated_files_are_named(name: str, keep: float, tmp_path: Path) -> None:
    save_run(tmp_path)
    path = tmp_path / name
    size = path.stat().st_size
    content = path.read_bytes().rstrip()
    path.write_bytes(content[: int(size * keep) if keep == 0.5 else int(keep)])
    with pytest.raises(ValueError, match=name):
        load_run(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"\x80\x02}q\x00.", b"[]", b'{"a": 1}', b"\xff" * 100])
def test_foreign_files_are_named(name: str, content: bytes, tmp_path: Path) -> None:
    save_run(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        load_run(tmp_path)


def test_a_model_of_other_sizes(tmp_path: Path) -> None:
    save_run(tmp_path)
    save_model(SimpleLLM(3, 8, 16, 2), tmp_path)
    with pytest.raises(ValueError, match=r"model.safetensors do not fit .*size mismatch"):
        load_run(tmp_path)
    save_model(SimpleLLM(3, 8, 12, 3), tmp_path)
    with pytest.raises(ValueError, match="do not fit"):
        load_run(tmp_path)
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit"):
        load_run(tmp_path)


def test_a_tokenizer_of_another_run(tmp_path: Path) -> None:
    save_run(tmp_path)
    WordTokenizer({"a": 0, "<UNK>": 1}).save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"has 2 tokens.*vocab_size 3"):
        load_run(tmp_path)


@pytest.mark.parametrize("change", [{"embedding_dim": 0}, {"num_heads": 3}, {"layers": 1}, {"bias": "yes"}])
def test_a_config_that_is_no_model(change: dict, tmp_path: Path) -> None:
    save_run(tmp_path)
    config = read_config(tmp_path)
    config["model"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json does not describe a model"):
        load_run(tmp_path)


# The folder


def test_check_out(tmp_path: Path) -> None:
    assert check_out(tmp_path / "new", overwrite=False) == tmp_path / "new"
    assert not (tmp_path / "new").exists()
    assert check_out(str(tmp_path), overwrite=False) == tmp_path  # empty
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        check_out(tmp_path, overwrite=False)
    assert check_out(tmp_path, overwrite=True) == tmp_path
    save_run(tmp_path)
    (tmp_path / "train.bin").touch()
    assert check_out(tmp_path, overwrite=True) == tmp_path
    with pytest.raises(NotADirectoryError, match=r"notes.txt is a file"):
        check_out(tmp_path / "notes.txt", overwrite=True)


@pytest.mark.parametrize(
    ("name", "content"), [("config.json", '{"model": {}}'), ("config.json", "x"), ("tokenizer.json", "{}")]
)
def test_check_out_protects_other_programs_files(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(FileExistsError, match=f"has a {name} that no training wrote"):
        check_out(tmp_path, overwrite=True)
    assert (tmp_path / name).read_text() == content
