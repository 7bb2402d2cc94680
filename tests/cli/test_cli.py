"""The command line, as a user runs it: in a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from tests.helpers.runs import Here
from tinyllm import cli
from tinyllm.config.presets import PRESETS

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "def add(a, b):\n    return a + b\n\n\ndef double(a):\n    return add(a, a)\n\n\n" * 40
QUICK = ["--preset", "tutorial", "--steps", "8", "--seq-len", "16", "--vocab-size", "300"]
ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    # Found like this process finds it, installed or not, but from another folder.
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "200", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}


def tinyllm(*arguments: object, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "tinyllm", *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    (path / "text.py").write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def trained(folder: Path) -> subprocess.CompletedProcess[str]:
    """Train a run into `folder`/run, for the tests that need one."""
    return tinyllm("train", "--data", "text.py", *QUICK, "--out", "run", cwd=folder)


def is_one_error(text: str) -> bool:
    return text.startswith("tinyllm: error: ") and text.count("\n") == 1


# Help


def test_help(here: Here, tmp_path: Path) -> None:
    commands = tinyllm("--help", cwd=tmp_path).stdout
    flags = {
        "train": "data preset tokenizer vocab-size steps batch-size seq-len lr schedule warmup-steps weight-decay "
        "grad-clip dropout label-smoothing ema packing no-packing seed out overwrite resume config "
        "save-config num-layers num-heads embedding-dim hidden-dim eval-interval eval-batches "
        "checkpoint-interval keep-checkpoints stop-on-save-error no-stop-on-save-error max-skipped-steps "
        "log-interval sample-tokens tensorboard text-column skip-bad init-from no-tensorboard device "
        "devices num-nodes strategy precision micro-batches checkpointing no-checkpointing compile "
        "no-compile workers",
        "generate": "run prompt prompt-file max-new-tokens num-samples temperature top-k top-p min-p "
        "repetition-penalty stop seed weights prompt-lookup-num-tokens checkpoint device",
        "quantize": "run weights out data group-size checkpoint",
        "bench": "quick only out report",
        "eval": "run data text-column skip-bad batch-size checkpoint device",
        "estimate": "preset devices batch-size seq-len num-layers num-heads embedding-dim hidden-dim precision "
        "checkpointing device-memory peak-tflops mfu",
        "info": "help",
        "doctor": "help",
        "export": "run to out weights checkpoint",
        "check": "help",
        "prepare": "data out tokenizer vocab-size tokenizer-sample text-column workers shard-size val-fraction "
        "skip-bad seed overwrite check",
        "plot": "out x split overwrite",
        "runs": "json sort",
    }
    assert {*flags} == {*typer.main.get_command(cli.app).commands}  # type: ignore[attr-defined]
    assert sorted(re.findall(r"^  ([a-z]+) ", commands, re.MULTILINE)) == sorted(flags)
    for command, names in flags.items():
        status, out, _ = here(command, "--help", cwd=tmp_path)
        assert status == 0
        assert not [name for name in names.split() if f"--{name}" not in out]


def test_the_modules_that_help_needs_do_not_import_torch() -> None:
    heavy = {"torch", "numpy", "matplotlib", "tokenizers"}
    code = "import sys, tinyllm.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    out = done.stdout
    assert not heavy & set(out.split())


def test_version(here: Here, tmp_path: Path) -> None:
    assert re.match(r"tinyllm( \d|, run from its sources)", here("--version", cwd=tmp_path)[1])


def test_bench_says_what_is_missing(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.bench, "find_spec", lambda name: None if name == "pytest_benchmark" else object())
    status, _, err = here("bench", "--quick", cwd=tmp_path)
    assert status == 2
    assert "pytest_benchmark missing; the extra tinyllm[test] brings what bench needs" in err


def test_info(here: Here, tmp_path: Path) -> None:
    status, out, _ = here("info", cwd=tmp_path)
    assert status == 0
    assert "layer_norm" in out


# Train, then generate


def test_estimate(here: Here, tmp_path: Path) -> None:
    status, out, _ = here("estimate", "--preset", "gpt3", "--devices", "64", "--checkpointing", cwd=tmp_path)
    assert status == 0
    assert "parameters   175G" in out
    fits = {line.split()[0]: line.split()[-1] for line in out.splitlines() if line.startswith(("ddp", "fsdp", "deep"))}
    assert fits == {"ddp": "no", "fsdp": "yes", "deepspeed": "no"}
    _, out, _ = here("estimate", "--mfu", "0.5", "--peak-tflops", "100", cwd=tmp_path)
    assert "On one device of 80 GiB, with 1 x 1024 tokens" in out
    assert "At 50% of 100 TFLOP/s" in out


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--mfu", "1.5", "--mfu is 1.5; at most 1 is allowed"),
        ("--mfu", "nan", "--mfu is nan; a positive number is needed"),
        ("--device-memory", "-8", "--device-memory is -8.0; a positive number is needed"),
        ("--devices", "0", "--devices is 0; it must be at least 1"),
        ("--seq-len", "0", "--seq-len is 0; it must be at least 1"),
    ],
)
def test_bad_estimates(option: str, value: str, said: str, here: Here, tmp_path: Path) -> None:
    status, _, error = here("estimate", option, value, cwd=tmp_path)
    assert status == 2
    assert said in error


def test_train_says_what_it_does_and_shows_a_sample(folder: Path, trained) -> None:
    out = trained.stdout
    assert "text.py, 1 file, " in out
    assert "8 steps" in out
    assert "validation loss" in out
    assert "tinyllm generate --run run" in out
    assert "tokens/s" in trained.stderr
    for name in ["config.json", "tokenizer.json", "model.safetensors", "metrics.jsonl", "loss_curve.png"]:
        assert (folder / "run" / name).is_file()
        assert name in out
    config = json.loads((folder / "run" / "config.json").read_text())
    assert config["training"]["steps"] == 8


def test_generate(folder: Path, trained, here: Here) -> None:
    command = ["generate", "--run", "run", "--prompt", "def ", "--max-new-tokens", 20, "--seed"]
    first = tinyllm(*command, 1, "--top-k", 50, cwd=folder).stdout
    assert first.startswith("def ")
    assert len(first) > len("def ") + 5
    status, out, err = here(*command, 1, "--top-k", 50, cwd=folder)
    assert (status, out) == (0, first)
    assert re.fullmatch(r"20 tokens, \d+\.\d s; prefill [\d,.]+ tokens/s, decode [\d,.]+ tokens/s\n", err)
    assert here(*command, 2, "--top-k", 50, cwd=folder)[1] != first
    greedy = [here(*command, seed, "--temperature", 0, cwd=folder)[1] for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def test_eval(folder: Path, trained, here: Here) -> None:
    status, out, _ = here("eval", "--run", "run", "--data", "text.py", cwd=folder)
    assert status == 0
    assert f"1 document, {len(TEXT):,} bytes" in out
    names = [line.split("  ")[0] for line in out.splitlines()[1:]]
    assert names == ["loss", "perplexity", "bits per byte"]
    status, _, error = here("eval", "--run", "run", "--data", "nowhere.txt", cwd=folder)
    assert status == 2
    assert "nowhere.txt" in error


def test_default_out_is_a_new_folder(folder: Path, here: Here, tmp_path: Path) -> None:
    (tmp_path / "runs" / "tutorial-1").mkdir(parents=True)
    (tmp_path / "runs" / "tutorial-1" / "notes.txt").write_text("taken")
    status, out, _ = here("train", folder / "text.py", *QUICK, cwd=tmp_path)
    assert status == 0
    assert "Everything is in runs/tutorial-2" in out
    assert (tmp_path / "runs" / "tutorial-2" / "model.safetensors").is_file()
    assert os.listdir(tmp_path / "runs" / "tutorial-1") == ["notes.txt"]


def test_many_files_after_data_as_a_shell_expands_them(here: Here, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(TEXT)
    _, out, _ = here("train", "--data", "a.txt", "b.txt", "c.txt", *QUICK, "--tokenizer", "char", cwd=tmp_path)
    assert "3 files" in out


def test_words(here: Here, tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("hello world how are you\nhow are you hello world\n" * 10)
    options = ["--preset", "tutorial", "--tokenizer", "word", "--seq-len", 4, "--steps", 150, "--lr", 0.03]
    assert here("train", "--data", "two.txt", *options, "--out", "words", cwd=tmp_path)[0] == 0
    command = ["generate", "--run", "words", "--max-new-tokens", 3, "--temperature", 0]
    assert here(*command, "--prompt", "hello world how", cwd=tmp_path)[1].startswith("hello world how are")
    status, out, error = here(*command, "--prompt", "good evening", cwd=tmp_path)
    assert (status, out) == (2, "")
    assert is_one_error(error)
    assert "'good evening'" in error


# Bad input


def test_a_folder_in_use_is_refused(folder: Path, trained) -> None:
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    done = tinyllm("train", "--data", "text.py", *QUICK, "--out", "run", cwd=folder, status=2)
    assert is_one_error(done.stderr)
    assert "--out run is not empty" in done.stderr
    assert "--overwrite" in done.stderr
    assert {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()} == before


def test_overwrite(folder: Path, here: Here, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    status, _, _ = here("train", folder / "text.py", *QUICK, "--out", "out", "--overwrite", cwd=tmp_path)
    assert status == 0
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    done = tinyllm("train", "--data", "picture.png", *QUICK, cwd=tmp_path, status=2)
    assert is_one_error(done.stderr)
    assert "picture.png is a binary file" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_an_unknown_preset(tmp_path: Path) -> None:
    error = tinyllm("train", "--preset", "huge", cwd=tmp_path, status=2).stderr
    assert "--preset" in error
    for name in PRESETS:
        assert f"'{name}'" in error


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("nowhere.txt", None, "no file or directory nowhere.txt"),
        ("empty.txt", "", "corpus is empty"),
        ("short.txt", "too short", "corpus is too short"),
        (".", "", "corpus is empty"),
    ],
)
def test_bad_data(name: str, content: str | None, reason: str, here: Here, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / ("a.txt" if name == "." else name)).write_text(content)
    status, _, error = here("train", "--data", name, *QUICK, cwd=tmp_path)
    assert status == 2
    assert is_one_error(error)
    assert reason in error


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["train", "--steps", "three"], "'--steps'"),
        (["train", "--lr", "-1"], "lr is -1.0"),
        (["train", "--dropout", "1"], "dropout is 1.0"),
        (["train", "--vocab-size", "256"], "--vocab-size is 256"),
        (["train", "--device", "tpu"], "device is 'tpu'"),
        (["train", "--out", "text.py"], "--out text.py is a file"),
        (["generate", "--run", "run", "--prompt", "def ", "--temperature", "-1"], "--temperature is -1.0"),
        (["generate", "--run", "run", "--prompt", "def ", "--top-k", "0"], "--top-k is 0; it must be at least 1"),
        (["generate", "--run", "run", "--prompt", "def ", "--max-new-tokens", "-5"], "--max-new-tokens is -5"),
        (["generate", "--run", "run", "--prompt", ""], "the value of --prompt is empty"),
        (["generate", "--run", "run", "--prompt", "a\udcff"], "not valid Unicode"),
        (["generate", "--run", "nowhere", "--prompt", "x"], "no run folder nowhere"),
    ],
)
def test_bad_options(arguments: list[str], reason: str, folder: Path, trained, here: Here) -> None:
    status, _, error = here(*arguments, cwd=folder)
    assert status == 2
    assert reason in error


def test_a_truncated_model(folder: Path, trained, here: Here, tmp_path: Path) -> None:
    for name in ["config.json", "tokenizer.json", "model.safetensors"]:
        (tmp_path / name).write_bytes((folder / "run" / name).read_bytes())
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    status, _, error = here("generate", "--run", tmp_path, "--prompt", "def ", cwd=folder)
    assert status == 2
    assert is_one_error(error)
    assert "model.safetensors is not a safetensors file, or is truncated" in error


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_ctrl_c_keeps_the_model(folder: Path, here: Here, tmp_path: Path) -> None:
    options = [*QUICK, "--steps", "1000000", "--out", "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tinyllm", "train", str(folder / "text.py"), *options],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Interrupted: the model is saved" in out
    assert "Traceback" not in err
    assert here("generate", "--run", "out", "--prompt", "def", "--max-new-tokens", 2, cwd=tmp_path)[0] == 0


# What the libraries would say in their own words


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["train", "--steps", "1.5"], "Invalid value for '--steps': a whole number is needed"),
        (["train", "--lr", "abc"], "Invalid value for '--lr': a number is needed"),
        (["train", "--preset", "foo"], "Invalid value for '--preset': 'foo' is not one of 'tutorial'"),
        (
            ["train", "--data", ""],
            "tinyllm: error: the value of --data is empty (a shell variable that is not set?)",
        ),
        (["eval", "--run", "run"], "tinyllm: error: --data is missing"),
    ],
)
def test_values_that_are_none(arguments: list[str], problem: str, here: Here, tmp_path: Path) -> None:
    status, _, err = here(*arguments, cwd=tmp_path)
    assert status == 2
    assert problem in err


def test_a_folder_called_like_an_option_is_no_option(here: Here, folder: Path, trained: object, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "data")
    assert here("train", "--data", "./data", cwd=tmp_path)[2] == (
        "tinyllm: error: data is the folder of a training, not text\n"
    )


@pytest.mark.parametrize("variable", ["TINYLLM_LINEAR", "TINYLLM_CPU_ISA"])
def test_variables_that_are_none(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "fast")
    for arguments in (["info"], ["generate", "--run", "run", "--prompt", "a"]):
        done = tinyllm(*arguments, cwd=tmp_path, status=2)
        assert done.stderr.startswith(f"tinyllm: error: {variable} is 'fast'; ")
        assert done.stderr.count("\n") == 1
