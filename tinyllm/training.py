"""Training: from text, or prepared data, to a run folder, and on from where one stopped. `tinyllm.loop` is the loop."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from tinyllm import checkpoint
from tinyllm.batches import TokenDataset
from tinyllm.data import TRAIN_FILE, VAL_FILE, find_files, standard_library, token_dtype, write_tokens
from tinyllm.engine import launch, on_rank_zero
from tinyllm.loop import Fitted, fit
from tinyllm.model import SimpleLLM, choose_device, init_gpt2_weights
from tinyllm.ops import _products
from tinyllm.optim import adamw, learning_rate
from tinyllm.presets import PRESETS, RESUMABLE, Preset, TrainConfig
from tinyllm.shards import is_prepared, open_shards
from tinyllm.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "PRESETS",
    "Preset",
    "TrainConfig",
    "TrainResult",
    "adamw",
    "choose_device",
    "learning_rate",
    "resume",
    "train",
]

Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainResult:
    """What came of a training.

    Attributes:
        out: the run folder.
        model: in eval mode, with the weights that `out`/model.safetensors has: their moving averages, if there are any.
        tokenizer: what its ids mean.
        steps: steps done in all: fewer than asked for if it was interrupted.
        val_loss: the last validation loss in nats per token, None if none was reached.
        val_file: the validation tokens, or the first shard of them.
        signal: the number of the signal that ended it (SIGINT: Ctrl-C; SIGTERM), or None.
    """

    out: Path
    model: SimpleLLM
    tokenizer: Tokenizer
    steps: int
    val_loss: float | None
    val_file: Path
    signal: int | None

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended it."""
        return self.signal is not None


def train(
    config: TrainConfig,
    out: str | PathLike[str] | None = None,
    data: Sequence[str | PathLike[str]] | None = None,
    *,
    overwrite: bool = False,
    progress: bool = True,
    say: Say = lambda line: None,
) -> TrainResult:
    """Train a model and leave all in `out`; `tinyllm.checkpoint` lists its files.

    A checkpoint is written at each validation, or every `config.checkpoint_interval` steps, and when SIGINT (Ctrl-C) or
    SIGTERM ends the training, which `resume` takes up. The global random state is as before.

    With more than one process (`config.devices`, `config.num_nodes`) the program is started again for each, unless a
    launcher such as torchrun did; every one of them returns a result. All nodes need to see the same files.

    Args:
        config: what to train and how.
        out: the run folder; made if missing. An earlier run's files in it are replaced, with `overwrite`, once the new
            text has been read and tokenized; other files stay. None: runs/PRESET-NUMBER, a new one.
        data: text files and directories, see `find_files`; or one directory that `tinyllm prepare` made, and its
            tokenizer with it; None: Python's standard library.
        overwrite: whether `out` may hold something already.
        progress: show a progress bar on stderr.
        say: called with a line of news at each stage, in the first process.

    Raises:
        FileExistsError, NotADirectoryError: `out` is taken.
        FileNotFoundError: a path of `data` does not exist.
        ValueError: the text is not text, or too little; a shard is damaged; the devices are not there.
        FloatingPointError: too many steps in a row had no finite gradient.
        OSError: a checkpoint could not be written, and `config.stop_on_save_error` is on.
    """
    fabric = launch(config)

    def begin() -> Path:
        if out is not None:
            _begin(config, checkpoint.check_out(out, overwrite=overwrite), data, say)
            return Path(out)
        with checkpoint.new_run_folder(config.preset) as folder:
            _begin(config, folder, data, say)
        return folder

    return _run(fabric, config, on_rank_zero(fabric, begin), progress, say)


def resume(
    out: str | PathLike[str], *, progress: bool = True, say: Say = lambda line: None, **changes: Any
) -> TrainResult:
    """Go on with the training in `out` from its last checkpoint, or from the start if it has none.

    On a CPU, with as many processes and threads as before, its losses are then bit for bit those of a training that
    never stopped; with others, those up to rounding.

    Args:
        out: the run folder.
        progress, say: see `train`.
        changes: what is to be different: fields of `RESUMABLE`, such as devices, strategy or steps. Others may be given
            if they are as they were; None leaves a field.

    Raises:
        FileNotFoundError: there is no run, or its data have gone.
        ValueError: a change would make it another training; a file is damaged; the data are not those it began with;
            there are weights, but no checkpoint that they belong to.
        As `train` besides.
    """
    out = Path(out)
    saved = checkpoint.load_config(out)
    config = _changed(_saved_config(saved, out), changes, out)
    fabric = launch(config)

    def begin() -> Path:
        there = checkpoint.checkpoints(out)
        if not there and (out / checkpoint.MODEL_FILE).exists():
            raise ValueError(
                f"{out} has weights but no checkpoint to go on from, as older versions left it; starting anew would "
                "overwrite them: train with --out of another name"
            )
        checkpoint.remove_unfinished(out)
        noted = {"training": asdict(config), "products": _products.noted(saved.get("products"))}
        checkpoint.save_config(saved | noted, out)
        say(f"Resuming {out} " + (f"after step {max(there):,}" if there else "from the start, as it has no checkpoint"))
        return out

    return _run(fabric, config, on_rank_zero(fabric, begin), progress, say)


def _run(fabric: Fabric, config: TrainConfig, out: Path, progress: bool, say: Say) -> TrainResult:
    """Train what `out` describes."""
    saved = checkpoint.load_config(out)
    tokenizer = load_tokenizer(out / checkpoint.TOKENIZER_FILE)
    train_set, val_set = _datasets(saved["data"], out, tokenizer, config.seq_len)
    if config.packing and tokenizer.end_of_text_id is None:
        raise ValueError("packing is on, but the tokenizer has no end-of-text token to find documents by")
    device = fabric.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model = _model(config, tokenizer.vocab_size)
        if fabric.is_global_zero:
            where = f"{device}" if fabric.world_size == 1 else f"{fabric.world_size} processes, {device.type}"
            say(f"Model: {config.preset}, {model.num_parameters():,} weights, on {where}")
        title = f"{config.preset} on {saved['data']['name']}"
        with _products.kept(saved.get("products")):
            fitted: Fitted = fit(
                fabric, model, tokenizer, train_set, val_set, config, out, title=title, progress_bar=progress
            )
        fabric.barrier()  # whoever goes on reads what the first process has written
        if not (out / checkpoint.MODEL_FILE).exists():
            raise OSError(f"no checkpoint could be written to {out}; the training is lost")
        trained = checkpoint.load_model(out, device)
    return TrainResult(out, trained, tokenizer, fitted.steps, fitted.val_loss, val_set.paths[0], fitted.signal)


def _begin(config: TrainConfig, out: Path, data: Sequence[str | PathLike[str]] | None, say: Say) -> None:
    """Make `out` a run folder with all that the training will need, but no checkpoint."""
    if data is not None and len(data) == 1 and is_prepared(data[0]):
        tokenizer, description = _begin_with_shards(Path(data[0]), out, config, say)
    else:
        tokenizer, description = _begin_with_text(config, out, data, say)
    with torch.device("meta"):  # its config is wanted only
        model = SimpleLLM.from_config(config.model_config(tokenizer.vocab_size))
    tokenizer.save(out / checkpoint.TOKENIZER_FILE)
    content = {"model": model.config.to_dict(), "training": asdict(config), "data": description}
    checkpoint.save_config({**content, "versions": _versions(), "products": _products.noted()}, out)


def _begin_with_text(
    config: TrainConfig, out: Path, data: Sequence[str | PathLike[str]] | None, say: Say
) -> tuple[Tokenizer, dict[str, Any]]:
    corpus = standard_library() if data is None else find_files(data)
    say(f"Text: {corpus.name}, {_count(len(corpus.files), 'file')}, {corpus.num_bytes / 1e6:.1f} MB")
    if corpus.skipped:
        say(f"Skipped {_count(len(corpus.skipped), 'binary file')}, such as {corpus.skipped[0]}")
    tokenizer = train_tokenizer(config.tokenizer, corpus.texts(config.seed), config.vocab_size)
    say(f"Tokenizer: {tokenizer.kind}, {tokenizer.vocab_size} tokens")
    # Up to here nothing is written. write_tokens puts its files in place when both are whole; from then on `out` is the
    # new run's.
    tokens = write_tokens(corpus.texts(config.seed), tokenizer, out, seq_len=config.seq_len)
    say(f"Tokens: {tokens.train_tokens:,} to train on, {tokens.val_tokens:,} to validate with")
    checkpoint.remove_run_files(out, keep=(tokens.train, tokens.val))
    return tokenizer, {
        "name": corpus.name,
        "files": len(corpus.files),
        "train_tokens": tokens.train_tokens,
        "val_tokens": tokens.val_tokens,
    }


def _begin_with_shards(path: Path, out: Path, config: TrainConfig, say: Say) -> tuple[Tokenizer, dict[str, Any]]:
    shards = open_shards(path)
    say(f"Data: {path}, {_count(len(shards.train), 'shard')} to train on; comparing checksums")
    shards.verify()
    tokenizer = shards.tokenizer()
    say(f"Tokenizer: {tokenizer.kind}, {tokenizer.vocab_size} tokens")
    say(f"Tokens: {shards.num_train_tokens:,} to train on, {shards.num_val_tokens:,} to validate with")
    TokenDataset(shards.train, shards.vocab_size, config.seq_len)  # is there a whole window? before anything is removed
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.remove_run_files(out)
    return tokenizer, {
        "name": path.name,
        "prepared": str(path.resolve()),
        "fingerprint": shards.fingerprint,
        "train_tokens": shards.num_train_tokens,
        "val_tokens": shards.num_val_tokens,
    }


def _model(config: TrainConfig, vocab_size: int) -> SimpleLLM:
    """With the weights to begin with, which depend on the seed alone; fsdp's has none yet, see `engine.setup`."""
    modern = PRESETS[config.preset].modern  # the article's model keeps the article's first weights
    later = modern and config.strategy == "fsdp"
    with torch.device("meta" if later else "cpu"):
        torch.manual_seed(config.seed)
        model = SimpleLLM.from_config(config.model_config(vocab_size))
    if modern and not later:
        init_gpt2_weights(model, generator=torch.Generator().manual_seed(config.seed))
    return model


def _datasets(
    description: dict[str, Any], out: Path, tokenizer: Tokenizer, seq_len: int
) -> tuple[TokenDataset, TokenDataset]:
    """What to train on and to validate with, as `_begin` described it."""
    train: Sequence[Path] = (out / TRAIN_FILE,)
    val: Sequence[Path] = (out / VAL_FILE,)
    if "prepared" in description:
        shards = open_shards(description["prepared"])
        if shards.fingerprint != description["fingerprint"]:
            raise ValueError(
                f"{shards.directory} holds other data than those that the training in {out} began with: the manifest's "
                f"SHA-256 is {shards.fingerprint}, it was {description['fingerprint']}"
            )
        shards.check_tokenizer(out / checkpoint.TOKENIZER_FILE)
        train, val = shards.train, shards.val
    vocab_size = tokenizer.vocab_size
    # Of a small corpus the validation part may be shorter than a sequence.
    longest = max(path.stat().st_size for path in val) // token_dtype(vocab_size).itemsize - 1
    return TokenDataset(train, vocab_size, seq_len), TokenDataset(val, vocab_size, min(seq_len, max(longest, 1)))


def _saved_config(saved: dict[str, Any], out: Path) -> TrainConfig:
    try:
        return TrainConfig(**saved["training"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{out / checkpoint.CONFIG_FILE} does not say how the model was trained: {error}") from error


def _changed(config: TrainConfig, changes: dict[str, Any], out: Path) -> TrainConfig:
    names = {item.name for item in fields(TrainConfig)}
    wanted = {name: value for name, value in changes.items() if value is not None}
    for name, value in wanted.items():
        if name not in names:
            raise TypeError(f"a training has no {name}")
        if name not in RESUMABLE and value != getattr(config, name):
            raise ValueError(
                f"{name} is {value!r}, but the training in {out} has {getattr(config, name)!r}; a resumed training may "
                f"change {', '.join(sorted(RESUMABLE))}"
            )
    return replace(config, **wanted)


def _versions() -> dict[str, str | None]:
    packages = ("tinyllm", "torch", "lightning-fabric", "tokenizers", "numpy", "safetensors")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from the sources, not installed
        return None
