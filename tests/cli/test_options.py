"""Tests of what the options of the commands accept, refuse and say."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.main import get_command

from tests.helpers.runs import TEXT, Here, environment, small
from tinyllm.cli import estimate
from tinyllm.cli import train as command
from tinyllm.cli._app import app, one_line_errors
from tinyllm.config import files
from tinyllm.config.presets import PRESETS, SIZES
from tinyllm.config.training import OPTIMIZERS, PRECISIONS, RESUMABLE, SCHEDULES, STRATEGIES, TrainConfig, describe
from tinyllm.training.trainer import resume, train

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ["--preset", "tutorial", "--tokenizer", "word", "--steps", 4, "--seq-len", 8, "--sample-tokens", 0]
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


def is_one_error(text: str) -> bool:
    return text.startswith("tinyllm: error: ") and text.count("\n") == 1


def in_python(error: str) -> str:
    """Return a message with Python's names, whether or not it names options as they are typed."""
    return re.sub(r"--([a-z][a-z-]*)", lambda found: found[1].replace("-", "_"), error)


def training_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "config.json").read_text(encoding="utf-8"))["training"]
    return found


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a b ü.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def run(text: Path, tmp_path: Path) -> Path:
    """Train four steps."""
    train(small(steps=4), tmp_path / "run", [text], progress=False)
    return tmp_path / "run"


# B10: what resume may change can be changed both ways


def test_switches_that_resume_turned_on_can_be_turned_off(run: Path, here: Here) -> None:
    switches = {"compile", "checkpointing", "tensorboard", "stop_on_save_error"}
    assert switches == {item.name for item in fields(TrainConfig) if item.type == "bool"} & RESUMABLE
    resume(run, progress=False, steps=4, checkpointing=True, stop_on_save_error=True, eval_interval=2)
    # What is not used by a training without a step left: compiling, which takes long, and TensorBoard, an extra.
    saved = json.loads((run / "config.json").read_text())
    saved["training"] |= {"compile": True, "tensorboard": True}
    (run / "config.json").write_text(json.dumps(saved))
    assert all(training_of(run)[name] is True for name in switches)
    options = [f"--no-{name.replace('_', '-')}" for name in sorted(switches)]
    status, _, err = here("train", "--resume", run, *options, "--steps", 5, "--eval-interval", 100)
    assert status == 0, err
    assert all(training_of(run)[name] is False for name in switches)
    assert training_of(run)["eval_interval"] == 100


def test_every_setting_that_resume_may_change_is_an_option() -> None:
    params = {param.name: param for param in COMMANDS["train"].params}
    assert set(params) >= RESUMABLE
    for item in fields(TrainConfig):
        if item.type == "bool":
            assert params[item.name].secondary_opts == [f"--no-{item.name.replace('_', '-')}"]
    groups = {name: param.rich_help_panel for name, param in params.items() if param.param_type_name == "option"}
    in_groups = {name for name, group in groups.items() if group in (command.WATCHING, command.COMPUTING)}
    assert in_groups | {"steps"} == RESUMABLE  # which the help says


CHOICES = {"preset": tuple(PRESETS), "schedule": SCHEDULES, "strategy": STRATEGIES, "precision": PRECISIONS}
CHOICES |= {"tokenizer": ("word", "char", "bpe"), "optimizer": tuple(OPTIMIZERS)}


def offered(function: Any, name: str) -> Any:
    """Return the choices that a command offers for a setting, or else the type of its value."""
    kind = get_args(inspect.signature(function).parameters[name].annotation)[0]
    inner = next((item for item in get_args(kind) if get_origin(item) is Literal), kind)
    return get_args(inner) if get_origin(inner) is Literal else kind


def test_a_setting_is_declared_once_for_options_files_and_the_docstring() -> None:
    params = {param.name: param for param in COMMANDS["train"].params}
    lines, hints = str(TrainConfig.__doc__).splitlines(), get_type_hints(TrainConfig)
    for item in fields(TrainConfig):
        assert [line for line in lines if line.startswith(f"    {item.name}: ")], item.name
        if item.name in ("min_lr_ratio", "decay_fraction", "beta1", "beta2"):
            assert item.name not in params  # for files and Python, which the help of --config says
            assert item.name in params["config"].help
            continue
        param = params[item.name]
        assert param.opts == [f"--{item.name.replace('_', '-')}"]
        assert param.default is None  # left open, so that a file or the preset counts
        assert str(offered(command.train, item.name)) == str(CHOICES.get(item.name, hints[item.name] | None))
    assert offered(estimate.estimate, "precision") == CHOICES["precision"]


def test_a_refused_change_is_short_and_points_to_the_help(run: Path, here: Here) -> None:
    status, _, err = here("train", "--resume", run, "--lr", 1)
    assert status == 2
    assert is_one_error(err)
    assert "lr is 1.0, but the training in" in err
    assert "see `tinyllm train --help`" in err
    assert len(err) < 250 + len(str(run))


# C3: sizes, and settings in files


def test_sizes_over_any_preset(text: Path, here: Here, tmp_path: Path) -> None:
    sizes = ["--num-layers", 3, "--num-heads", 2, "--embedding-dim", 20]
    status, _, err = here("train", "--data", text, *QUICK, *sizes, "--out", tmp_path / "out")
    assert status == 0, err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for part in ("model", "training"):
        assert [config[part][name] for name in SIZES] == [3, 2, 20, 40]  # twice as wide inside, as the preset
    assert here("train", "--resume", tmp_path / "out", "--num-layers", 3, "--steps", 5)[0] == 0
    status, _, err = here("train", "--resume", tmp_path / "out", "--num-layers", 2)
    assert status == 2
    assert "num_layers is 2, but the training in" in in_python(err)


def test_sizes_in_an_estimate(here: Here) -> None:
    given = ["--num-layers", 3, "--num-heads", 2, "--embedding-dim", 64, "--hidden-dim", 100]
    status, out, _ = here("estimate", "--preset", "tiny", *given)
    assert status == 0
    assert "3 layers of 64 and 100, 2 heads" in out
    assert "layers of 64 and 256" in here("estimate", "--preset", "tiny", "--embedding-dim", 64)[1]


@pytest.mark.parametrize("name", ["train", "estimate"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--num-heads", 3], "3; num_heads must divide embedding_dim, and embedding_dim is 128, the tiny preset's"),
        (["--embedding-dim", 130], "130; num_heads must divide embedding_dim, and num_heads is 4, the tiny preset's"),
        (["--embedding-dim", 64, "--num-heads", 3], "3; num_heads must divide embedding_dim, and embedding_dim is 64"),
        (["--num-layers", 0], "0; it must be at least 1"),
        (["--hidden-dim", -1], "-1; it must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit(name: str, options: list[Any], said: str, here: Here, tmp_path: Path) -> None:
    missing = ["--data", "nowhere.txt"] if name == "train" else []  # sizes are checked before any text is read
    status, _, err = here(name, "--preset", "tiny", *options, *missing, cwd=tmp_path)
    assert status == 2
    assert is_one_error(err)
    assert said in in_python(err)


def test_a_run_from_before_there_were_sizes_is_resumed(run: Path) -> None:
    saved = json.loads((run / "config.json").read_text())
    before = [saved["training"].pop(name) for name in SIZES]
    (run / "config.json").write_text(json.dumps(saved))
    assert resume(run, progress=False, steps=5, num_layers=before[0]).steps == 5
    assert [training_of(run)[name] for name in SIZES] == before
    with pytest.raises(ValueError, match="hidden_dim is 7, but"):
        resume(run, progress=False, hidden_dim=7)


def test_what_is_typed_counts_before_the_file_and_that_before_the_preset(
    text: Path, here: Here, tmp_path: Path
) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(
        f"preset: tutorial\ntokenizer: word\nsteps: 3\nseq-len: 8\nlr: 1e-3\nsample_tokens: 0\npacking: yes\n"
        f"beta1: 0.8\ndata: [{text}]\nout: {tmp_path / 'in file'}\n"
    )
    status, out, err = here("train", "--config", file, "--steps", 4, "--no-packing", cwd=tmp_path)
    assert status == 0, err
    assert "a b ü.txt, 1 file" in out
    assert "4 steps" in out
    found = training_of(tmp_path / "in file")
    expected = {"steps": 4, "lr": 1e-3, "beta1": 0.8, "batch_size": 12, "packing": False, "seq_len": 8}
    assert {name: found[name] for name in expected} == expected
    other = tmp_path / "other.txt"
    other.write_text(TEXT)
    status, out, err = here("train", "--config", file, "--data", other, "--out", "typed", "--no-packing", cwd=tmp_path)
    assert status == 0, err
    assert "other.txt, 1 file" in out
    assert training_of(tmp_path / "typed")["steps"] == 3
    # A run's own config, for other text.
    options = ["--data", other, "--seed", 3, "--out", "again"]
    status, _, err = here("train", "--config", tmp_path / "typed" / "config.json", *options, cwd=tmp_path)
    assert status == 0, err
    assert training_of(tmp_path / "again") == training_of(tmp_path / "typed") | {"seed": 3}


@pytest.mark.parametrize("suffix", ["yaml", "toml", "json"])
def test_settings_are_saved_and_nothing_is_trained(
    suffix: str, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "prepare_process", lambda: pytest.fail("it trains"))
    file = f"mine ü.{suffix}"
    data = ["--data", "a b/ü.txt", "c.txt"]
    status, out, err = here("train", *data, "--preset", "small", "--out", "o o", "--save-config", file, cwd=tmp_path)
    assert (status, err) == (0, "")
    assert f"Wrote {file}" in out
    assert os.listdir(tmp_path) == [file]
    expected = {name: value for name, value in asdict(TrainConfig.from_preset("small")).items() if value is not None}
    assert files.load(tmp_path / file) == {"data": ["a b/ü.txt", "c.txt"], "out": "o o"} | expected
    before = (tmp_path / file).read_bytes()
    status, _, err = here("train", "--config", file, "--save-config", file, cwd=tmp_path)
    assert status == 2
    assert f"{file} exists; --overwrite replaces it" in err
    assert here("train", "--config", file, "--save-config", file, "--overwrite", cwd=tmp_path)[0] == 0
    assert (tmp_path / file).read_bytes() == before


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ("lr: -1", [], "f.yaml: lr is -1.0; it must be a positive number"),
        ("dropout: 1", ["--lr", 1], "f.yaml: dropout is 1.0; it must be at least 0 and below 1"),
        ("preset: huge", [], "f.yaml: preset is 'huge'; allowed are 'tutorial', 'tiny'"),
        ("stepz: 1", [], "f.yaml: there is no setting 'stepz'; did you mean steps?"),
        ("preset: tiny\nnum_layers: 3", ["--preset", "gpt2"], "preset is 'gpt2', but f.yaml has the sizes of another"),
        ("out: x", ["--resume", "run"], "it takes no out of f.yaml"),
        ("data: x", ["--resume", "run"], "it takes no data of f.yaml"),
        ("lr: 1", ["--resume", "run", "--save-config", "g.yaml", "--out", "o"], "it takes no --out or --save-config"),
        ("lr: 1", ["--save-config", "g.ini"], "g.ini has the suffix '.ini'; allowed are .yaml, .yml, .toml, .json"),
    ],
)
def test_a_files_mistakes_are_told_from_typed_ones(
    content: str, options: list[Any], said: str, here: Here, tmp_path: Path
) -> None:
    (tmp_path / "f.yaml").write_text(content)
    status, _, err = here("train", "--config", "f.yaml", *options, cwd=tmp_path)
    assert status == 2
    assert is_one_error(err)
    assert in_python(said) in in_python(err)
    assert os.listdir(tmp_path) == ["f.yaml"]


def test_a_typed_mistake_is_not_the_files(here: Here, tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("lr: 1\nbatch_size: 7")
    _, _, err = here("train", "--config", "f.yaml", "--lr", -1, cwd=tmp_path)
    assert "lr is -1.0" in err
    assert "f.yaml" not in err
    # What the file alone would not allow, an option may mend.
    saved = ["--save-config", "g.yaml"]
    (tmp_path / "f.yaml").write_text("batch_size: 7\ndevices: 2")
    assert here("train", "--config", "f.yaml", "--batch-size", 8, *saved, cwd=tmp_path)[0] == 0


def test_a_resumed_training_takes_changes_from_a_file(run: Path, here: Here, tmp_path: Path) -> None:
    (tmp_path / "f.toml").write_text("steps = 6\nlog_interval = 2\nlr = 0.01")
    status, out, err = here("train", "--resume", run, "--config", tmp_path / "f.toml", "--steps", 5)
    assert status == 0, err
    assert "5 steps" in out
    assert training_of(run)["log_interval"] == 2
    (tmp_path / "f.toml").write_text("lr = 1")
    status, _, err = here("train", "--resume", run, "--config", tmp_path / "f.toml")
    assert status == 2
    assert "lr is 1.0, but the training in" in err


def test_what_a_preset_decides_is_described() -> None:
    assert describe(TrainConfig.from_preset("tiny", seed=3)).splitlines() == [
        "Preset: tiny, with 4 layers, 4 heads, embedding dimension 128, hidden dimension 512",
        "Plan: 500 steps of 24 x 64 tokens; Muon, lr 0.02 after 25 warmup steps, cosine to 0.002",
        "Settings: weight decay 0.1, dropout 0, 32-true, validation and checkpoint every 100 steps; seed 3",
    ]
    changed = small(steps=1, schedule="wsd", dropout=0.5, packing=True, compile=True, ema=0.9, micro_batches=4)
    said = describe(changed)
    for part in ("1 step of", " in 4 parts", "dropout 0.5", "packing, compile", "averaged weights 0.9", "lr 0.01, "):
        assert part in said
    assert "constant, and linear to 0.001 in the last 20% of the steps" in said
    assert "validation every 5 steps, checkpoint every 3" in describe(small(eval_interval=5, checkpoint_interval=3))
    assert max(map(len, "\n".join(describe(TrainConfig.from_preset(name)) for name in PRESETS).splitlines())) <= 110


def test_the_default_device_is_auto_in_python_and_on_the_command_line(here: Here, tmp_path: Path) -> None:
    assert TrainConfig().device == "auto"
    here("train", "--save-config", "f.json", cwd=tmp_path)
    assert json.loads((tmp_path / "f.json").read_text())["device"] == "auto"


# C3: going on from finished weights, and how text is read


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Record the arguments that the command gives to `training.train`, which does nothing."""
    found: dict[str, Any] = {}

    def instead(config: TrainConfig, out: Path | None, data: list[Path] | None, **more: Any) -> None:
        found.update(more, config=config, out=out, data=data)
        raise ValueError("enough")

    monkeypatch.setattr("tinyllm.training.trainer.train", instead)
    return found


def test_how_text_is_read_is_handed_on(here: Here, asked: dict[str, Any], tmp_path: Path) -> None:
    here("train", cwd=tmp_path)
    assert [asked[name] for name in ("text_column", "skip_bad", "init_from")] == ["text", False, None]
    here("train", "--text-column", "content", "--skip-bad", cwd=tmp_path)
    assert [asked[name] for name in ("text_column", "skip_bad")] == ["content", True]


def test_init_from_takes_the_sizes_of_the_run(run: Path, here: Here, asked: dict[str, Any], tmp_path: Path) -> None:
    saved = json.loads((run / "config.json").read_text())
    saved["training"] |= {"num_layers": 3, "seq_len": 7, "lr": 0.5}
    (run / "config.json").write_text(json.dumps(saved))
    here("train", "--init-from", run, "--data", "a.txt", "--steps", 9, cwd=tmp_path)
    config = asked["config"]
    assert asked["init_from"] == run
    assert (config.preset, config.tokenizer, config.num_layers, config.seq_len) == ("tutorial", "word", 3, 7)
    assert (config.steps, config.lr) == (9, PRESETS["tutorial"].lr)  # how it learns is not the run's
    here("train", "--init-from", run, "--seq-len", 7, "--num-layers", 3, "--vocab-size", 2048, cwd=tmp_path)
    assert asked["config"] == config.from_preset("tutorial", tokenizer="word", num_layers=3, seq_len=7)


def test_a_training_goes_on_from_finished_weights(run: Path, text: Path, here: Here, tmp_path: Path) -> None:
    options = ["--data", text, "--lr", 1e-30, "--steps", 1, "--weight-decay", 0]
    status, _, err = here("train", "--init-from", run, *options, "--out", "next", cwd=tmp_path)
    assert status == 0, err
    first, second = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "next"))
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--num-layers", 3], "num_layers is 3, but the training in run has 2; its weights are taken"),
        (["--preset", "tiny"], "preset is 'tiny', but the training in run has 'tutorial'"),
        (["--seq-len", 9], "seq_len is 9, but the training in run has 8"),
        (["--tokenizer", "char"], "tokenizer is 'char', but the training in run has 'word'"),
        (["--resume", "run"], "it takes no --init-from"),
        (["--save-config", "f.yaml"], "--save-config keeps settings and paths, but no --init-from"),
    ],
)
def test_what_init_from_does_not_go_with(
    options: list[Any], said: str, run: Path, here: Here, asked: dict[str, Any], tmp_path: Path
) -> None:
    status, _, err = here("train", "--init-from", "run", *options, cwd=tmp_path)
    assert status == 2
    assert in_python(said) in in_python(err)
    assert not asked


def test_resume_reads_no_text(run: Path, here: Here, tmp_path: Path) -> None:
    for options in (["--text-column", "x"], ["--skip-bad"], ["--data", "x"]):
        status, _, err = here("train", "--resume", run, *options, cwd=tmp_path)
        assert status == 2
        assert f"it takes no {options[0]}" in err
    status, _, err = here("train", "--init-from", "nowhere", cwd=tmp_path)
    assert status == 2
    assert "no run folder nowhere" in err


# C5: shell completion


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_without_torch(tmp_path: Path) -> None:
    (tmp_path / "tinyllm").write_text(
        f"#!{sys.executable}\nimport sys\nfrom tinyllm.__main__ import main\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    (tmp_path / "tinyllm").chmod(0o755)
    script = """
        eval "$(tinyllm --show-completion bash)"
        for line in "tinyllm pre" "tinyllm train --no-c" "tinyllm train --preset gpt2-" "tinyllm plot --x t"; do
            COMP_WORDS=($line)
            COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
            _tinyllm_completion tinyllm
            echo "${COMPREPLY[*]}"
        done
    """
    env = environment(PATH=os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
    # Otherwise the shell is guessed from the processes above, which the tests' need not be.
    env["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, encoding="utf-8", timeout=60)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "prepare",
        "--no-checkpointing --no-compile",
        "gpt2-medium gpt2-large gpt2-xl",
        "tokens time",
    ]


# D: help and messages


def test_d_the_programs_help_cuts_no_summary(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = here("--help")
    assert "--install-completion" in out
    assert "..." not in out.replace("[ARGS]...", "")
    for name, found in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(found.help.splitlines()[0])}$", out, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_d_help_has_no_type_names_and_names_defaults(name: str, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = here(name, "--help")
    assert not re.search(r"list\[|<(int|float|str|path|Path|bool)>", out)
    assert max(map(len, out.splitlines())) <= 80
    for param in COMMANDS[name].params:
        assert (param.help or "").endswith("."), param.name


def test_d_every_option_of_train_names_its_default() -> None:
    silent = {"overwrite", "resume", "config", "save_config", "init_from", "skip_bad", "help", "paths"}
    for param in COMMANDS["train"].params:
        assert param.name in silent or "Default: " in param.help, param.name
        if param.name in silent:
            continue
        if param.name in {"vocab_size", "seq_len", "dropout", "steps", "batch_size", "lr", "optimizer"}:
            value = getattr(PRESETS["tiny"], param.name)
            assert f"(tiny: {value if isinstance(value, str) else f'{value:g}'})" in param.help
            continue
        default = {item.name: item.default for item in fields(TrainConfig)}.get(param.name)
        if isinstance(default, bool):
            assert not default
            assert f"Default: --no-{param.name.replace('_', '-')}" in param.help
        elif default is not None:
            assert (
                f"Default: {default:g}." in param.help
                if isinstance(default, float | int)
                else (f"Default: {default}" in param.help)
            )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ImportError("this needs pyarrow; the extra tinyllm[data]"),
            "this needs pyarrow; the extra tinyllm[data]",
        ),
        (ModuleNotFoundError("No module named 'x'"), "No module named 'x'"),
        (MemoryError("the model needs 9 GB"), "the model needs 9 GB"),
        (MemoryError(), "out of memory"),
    ],
)
def test_d_missing_packages_and_memory_are_one_line(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TINYLLM_TRACEBACK", raising=False)
    with pytest.raises(typer.Exit) as exit, one_line_errors():
        raise error
    assert exit.value.exit_code == 2
    assert capsys.readouterr().err == f"tinyllm: error: {said}\n"


def test_the_help_lists_the_presets(here: Here) -> None:
    out = " ".join(here("train", "--help")[1].split())
    for name, preset in PRESETS.items():
        assert f"{name} {preset.num_layers}/{preset.num_heads}/{preset.embedding_dim}" in out
