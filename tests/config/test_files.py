"""Settings in YAML, TOML and JSON: what is written is read back, and what is wrong is named."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import small
from tinyllm.config import files
from tinyllm.config.training import TrainConfig

FORMATS = ("yaml", "yml", "toml", "json")

# Each field with another value than its default.
CHANGED: dict[str, Any] = {
    "preset": "small",
    "num_layers": 3,
    "num_heads": 5,
    "embedding_dim": 65,
    "hidden_dim": 7,
    "tokenizer": "word",
    "vocab_size": 123,
    "steps": 7,
    "batch_size": 24,
    "seq_len": 9,
    "optimizer": "muon",
    "lr": 1e-5,
    "warmup_steps": 0,
    "min_lr_ratio": 0.0,
    "schedule": "wsd",
    "decay_fraction": 1 / 3,
    "weight_decay": 1e-300,
    "beta1": 0.1 + 0.2,
    "beta2": 5e-324,
    "grad_clip": 1e22,
    "dropout": 0.5,
    "label_smoothing": 1.0,
    "packing": True,
    "ema": 0.999,
    "seed": 2**63 - 1,
    "eval_interval": 11,
    "eval_batches": 2,
    "log_interval": 3,
    "sample_tokens": 0,
    "checkpoint_interval": 13,
    "keep_checkpoints": 1,
    "stop_on_save_error": True,
    "max_skipped_steps": 0,
    "device": "cuda:1",
    "strategy": "fsdp",
    "devices": 2,
    "num_nodes": 2,
    "precision": "bf16-true",
    "micro_batches": 3,
    "checkpointing": True,
    "compile": True,
    "workers": 4,
    "tensorboard": True,
}
PATHS = [
    "with spaces/ü",
    "日本語.txt",
    "it's \"quoted\" \\ #: {x} [y], 'z'",
    "1e3",
    "yes",
    "010",
    "null",
    "~",
    "- a",
    "<<",
]
PATHS += [
    "two\nlines",
    "tab\t",
    "\x7f",
    "\x85",
    "a\u2028b",
    "\ufeffbom",
    "\u00a0",
    "\U0001f600",
    "\U000e0001",
    "\x01",
    "%",
]


def read(folder: Path, text: str, suffix: str = "yaml") -> dict[str, Any]:
    path = folder / f"f.{suffix}"
    path.write_text(text, encoding="utf-8")
    return files.load(path)


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_setting_and_path_is_read_back_exactly(suffix: str, tmp_path: Path) -> None:
    config = TrainConfig(**CHANGED)
    default = asdict(TrainConfig())
    assert set(CHANGED) == {item.name for item in fields(TrainConfig)}
    assert not [name for name, value in CHANGED.items() if value == default[name]]
    path = tmp_path / f"ü and spaces.{suffix}"
    for out in PATHS:
        files.save(path, config, PATHS, out, overwrite=True)
        found = files.load(path)
        assert found.pop("data") == PATHS
        assert found.pop("out") == out
        assert found == CHANGED
        assert {name: type(value) for name, value in found.items()} == {k: type(v) for k, v in CHANGED.items()}
    assert TrainConfig.from_preset(found.pop("preset"), **found) == config


@pytest.mark.parametrize("preset", ["tutorial", "tiny", "gpt3"])
@pytest.mark.parametrize("tokenizer", ["bpe", "char", "word"])
@pytest.mark.parametrize("suffix", FORMATS[1:])
def test_settings_that_are_none_are_left_out_and_come_back(
    suffix: str, tokenizer: str, preset: str, tmp_path: Path
) -> None:
    config = TrainConfig.from_preset(preset, tokenizer=tokenizer)
    path = tmp_path / f"f.{suffix}"
    files.save(path, config)
    found = files.load(path)
    assert not {"ema", "data", "out", "eval_interval"} & set(found)
    assert TrainConfig.from_preset(found.pop("preset"), **found) == config


def test_what_others_wrote(tmp_path: Path) -> None:
    yaml = "# notes\nlr: 1e-3\nmin-lr-ratio: 1\nsteps: 1_000\ncompile: yes\nema: ~\nbeta1: .5\ndata: a b\nout: x\n"
    expected = {
        "lr": 1e-3,
        "min_lr_ratio": 1.0,
        "steps": 1000,
        "compile": True,
        "beta1": 0.5,
        "data": ["a b"],
        "out": "x",
    }
    assert read(tmp_path, yaml) == expected
    assert read(tmp_path, "\ufefflr = 1e-3\ndata = ['a', \"b\"]", "toml") == {"lr": 1e-3, "data": ["a", "b"]}
    assert read(tmp_path, '{"lr": 1, "ema": null}', "json") == {"lr": 1.0}
    assert read(tmp_path, "a: &x [1]\n".replace("a", "data").replace("1", "p")) == {"data": ["p"]}
    assert isinstance(read(tmp_path, "lr: 1")["lr"], float)


def test_a_runs_config_is_a_file_of_settings(tmp_path: Path) -> None:
    config = small(dropout=0.5, num_layers=3)
    run = {"model": {"vocab_size": 5}, "training": asdict(config), "data": {"name": "text"}, "versions": {}}
    found = read(tmp_path, json.dumps(run), "json")
    assert TrainConfig.from_preset(found.pop("preset"), **found) == config


@pytest.mark.parametrize(
    ("suffix", "text", "said"),
    [
        ("yaml", "seqlen: 3", "there is no setting 'seqlen'; did you mean seq_len?"),
        ("yaml", "layers: 3", "there is no setting 'layers'; did you mean num_layers?"),
        (
            "toml",
            "colour = 3",
            "there is no setting 'colour'; allowed are data, out and the settings that `tinyllm train",
        ),
        ("json", '{"resume": "run"}', "there is no setting 'resume'; allowed are"),
        ("yaml", "steps: true", "steps is true; it must be a whole number"),
        ("yaml", "steps: 1e3", "steps is 1000.0; it must be a whole number"),
        ("yaml", "seq-len: 010", 'seq-len is "010"; it must be a whole number'),
        ("yaml", "seq_len: 1:30", 'seq_len is "1:30"; it must be a whole number'),
        ("yaml", "steps:", "steps is empty; it must be a whole number"),
        ("yaml", "lr: fast", 'lr is "fast"; it must be a number'),
        ("yaml", "lr: '1e-3'", 'lr is "1e-3"; it must be a number'),
        ("yaml", "lr: .inf", "lr is Infinity; it must be a number"),
        ("toml", "lr = nan", "lr is NaN; it must be a number"),
        ("json", '{"lr": false}', "lr is false; it must be a number"),
        ("toml", "compile = 1", "compile is 1; it must be true or false"),
        ("yaml", "compile: 'yes'", 'compile is "yes"; it must be true or false'),
        ("yaml", "device: 1", "device is 1; it must be text"),
        ("toml", "preset = ['tiny']", "preset is a list; it must be text"),
        ("toml", "[lr]\npeak = 1", "lr is a table; it must be a number"),
        ("yaml", "data: [a, 3]", "data is a list; it must be a path or a list of paths"),
        ("yaml", "data: []", "data is a list; it must be a path or a list of paths"),
        ("yaml", "out: 5", "out is 5; it must be a path"),
        ("yaml", "out: ''", 'out is ""; it must be a path'),
        ("yaml", "steps: 1\nsteps: 2", "'steps' is there twice (at line 2, column 1)"),
        ("yaml", "seq_len: 1\nseq-len: 1", "seq-len is there twice, with a dash and with an underscore"),
        ("json", '{"steps": 1, "steps": 1}', "'steps' is there twice"),
        ("toml", "steps = 1\nsteps = 1\nlr = 1", "cannot be read: Cannot overwrite a value (at line 2"),
        ("yaml", "lr: 1\n  x: [", "cannot be read: mapping values are not allowed here (at line 2, column 4)"),
        ("toml", "lr = 1\nlr 2", "cannot be read: Expected '=' after a key in a key/value pair (at line 2"),
        ("json", '{"lr": 1,\n,}', "cannot be read: Expecting property name enclosed in double quotes: line 2 column 1"),
        ("yaml", "lr: \x00", "cannot be read: unacceptable character #x0000"),
        ("json", "[" * 100_000, "cannot be read: "),
        ("yaml", "- lr", "is a list; it must be a table of settings, such as steps and lr"),
        ("yaml", "", "is empty; it must be a table of settings"),
        ("json", "3", "is 3; it must be a table of settings"),
        ("ini", "lr=1", "has the suffix '.ini'; allowed are .yaml, .yml, .toml, .json"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(suffix: str, text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        read(tmp_path, text, suffix)
    assert str(error.value).startswith(str(tmp_path / f"f.{suffix}"))
    assert "\n" not in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.yaml"):
        files.load(tmp_path / "nowhere.yaml")
    with pytest.raises(IsADirectoryError, match=r"is a directory; a file of settings is needed"):
        files.load(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"out = '\xe4'")
    with pytest.raises(ValueError, match=r"latin\.toml is not UTF-8 text: byte 7 is wrong"):
        files.load(tmp_path / "latin.toml")


@pytest.mark.parametrize("suffix", FORMATS)
def test_nothing_is_replaced_or_half_written(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"f.{suffix}"
    with pytest.raises(ValueError, match="is not valid Unicode"):
        files.save(path, TrainConfig(), ["\udcff"])
    assert not path.exists()
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="exists; --overwrite replaces it"):
        files.save(path, TrainConfig())
    assert path.read_text() == "mine"


def test_a_runs_own_config_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model": {}, "training": {}}')
    with pytest.raises(FileExistsError, match="is a run's own, which needs it"):
        files.save(path, TrainConfig(), overwrite=True)
    assert path.read_text() == '{"model": {}, "training": {}}'


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        ("json", '{"lr": 1' + 400 * "0" + "}"),
        ("json", '{"steps": 1' + 5000 * "0" + "}"),
        ("yaml", 'steps: !!int ""'),
        ("yaml", 'lr: !!float ""'),
        ("yaml", "out: !!timestamp foo"),
        ("yaml", "steps: !!bool foo"),
    ],
)
def test_values_that_a_parser_stumbles_over(suffix: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lr is 1000|a value in it is broken|steps is") as error:
        read(tmp_path, text, suffix)
    assert "sys." not in str(error.value)
