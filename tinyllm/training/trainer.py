"""Train a model from text or prepared data into a run folder, and resume such a training."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from tinyllm._internal.files import REPLACED
from tinyllm._internal.locks import owned
from tinyllm._internal.words import count
from tinyllm.config.presets import PRESETS, Preset
from tinyllm.config.saved import CONFIG_FILE, read_config, save_config
from tinyllm.config.training import RESUMABLE, TrainConfig, describe, saved_config
from tinyllm.model import SimpleLLM, choose_device, init_gpt2_weights
from tinyllm.ops import _products
from tinyllm.runs.folder import (
    MODEL_FILE,
    TOKENIZER_FILE,
    checkpoints,
    new_run_folder,
    publish_last,
    remove_unfinished,
)
from tinyllm.runs.load import load_model
from tinyllm.runs.succession import giving_up, recover
from tinyllm.tokenizer import Tokenizer, load_tokenizer
from tinyllm.training.begin import begin, check_saved, datasets
from tinyllm.training.engine import Engine, launch
from tinyllm.training.estimate import memory_error
from tinyllm.training.loop import Fitted, fit
from tinyllm.training.optim import adamw, learning_rate

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

_PEER_GONE = re.compile("by peer|remote process exited|Broken pipe")  # gloo's words, and NCCL's


@dataclass(frozen=True)
class TrainResult:
    """Result of a training.

    Attributes:
        out: the run folder.
        model: in eval mode, with the weights that `out`/model.safetensors has: their moving averages, if there are any.
        tokenizer: what its ids mean.
        steps: steps done in all: fewer than asked for if it was interrupted.
        val_loss: the last validation loss in nats per token, None if none was reached.
        val_file: the first shard of the validation tokens.
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
        """Return whether a signal ended it."""
        return self.signal is not None


def train(
    config: TrainConfig,
    out: str | PathLike[str] | None = None,
    data: str | PathLike[str] | Sequence[str | PathLike[str]] | None = None,
    *,
    text_column: str = "text",
    skip_bad: bool = False,
    init_from: str | PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    say: Say = lambda line: None,
) -> TrainResult:
    """Train a model and leave all in `out`; `tinyllm.runs.folder` lists its files.

    A checkpoint is written at each validation, or every `config.checkpoint_interval` steps, and when SIGINT (Ctrl-C) or
    SIGTERM ends the training, which `resume` takes up. A training that fails before its first checkpoint leaves `out`
    as it was. The global random state is as before.

    With more than one process (`config.devices`, `config.num_nodes`) the program is started again for each, unless a
    launcher such as torchrun did; every one of them returns a result. All nodes need to see the same files.

    Args:
        config: what to train and how.
        out: the run folder; made if missing. Until the training ends no other process can train there. With `overwrite`
            an earlier run's files are moved aside once the new text has been read and tokenized, and removed when the
            new run's first checkpoint stands; other files stay. None: runs/PRESET-NUMBER, a new one.
        data: a path, or several: text files, .jsonl, .jsonl.gz, .jsonl.zst, .parquet and directories, see `find_files`;
            or one directory that `tinyllm prepare` made, and its tokenizer with it; None: Python's standard library.
        text_column: under which name JSON lines and Parquet files hold the text.
        skip_bad: leave out what cannot be read, and say how much.
        init_from: a run folder, whose weights are those to begin with, and whose tokenizer is kept. The optimizer is
            new. `config` has to describe its model: `TrainConfig.from_run`.
        overwrite: whether `out` may hold something already.
        progress: show a progress bar on stderr.
        say: called with a line of news at each stage, in the first process.

    Raises:
        BlockingIOError: another process is training in `out`.
        FileExistsError, NotADirectoryError: `out` is taken.
        FileNotFoundError: a path of `data` does not exist.
        ValueError: the text is not text, or too little; a shard is damaged; the devices are not there.
        MemoryError: the model does not fit in memory.
        FloatingPointError: too many steps in a row had no finite gradient.
        OSError: there is no room for the trained weights on the disk; or a checkpoint could not be written, and
            `config.stop_on_save_error` is on.
    """
    if not isinstance(config, TrainConfig):
        raise TypeError(
            f"config is a {type(config).__name__}; a TrainConfig is needed, such as TrainConfig.from_preset"
        )
    if isinstance(data, (str, PathLike)):
        data = [data]
    engine = launch(config, say)
    with ExitStack() as stack:
        stack.enter_context(engine.ending_others())

        def start() -> Path:
            folder = stack.enter_context(new_run_folder(config.preset)) if out is None else Path(out)
            stack.enter_context(owned(folder, "trained", say))
            begin(
                config,
                folder,
                data,
                init_from,
                engine.device,
                text_column=text_column,
                skip_bad=skip_bad,
                overwrite=overwrite,
                progress=progress,
                say=say,
            )
            stack.enter_context(giving_up(folder))
            return folder

        return _run(engine, config, engine.on_rank_zero(start), progress, say)


def resume(
    out: str | PathLike[str], *, progress: bool = True, say: Say = lambda line: None, **changes: Any
) -> TrainResult:
    """Go on with the training in `out` from its last checkpoint, or from the start if it has none.

    On a CPU, with as many processes and threads as before, its losses are then bit for bit those of a training that
    never stopped; with others, those up to rounding. The tokens that it learns from are compared with their checksums.

    Args:
        out: the run folder.
        progress, say: see `train`.
        changes: what is to be different: fields of `RESUMABLE`, such as devices, strategy or steps. Others may be given
            if they are as they were; None leaves a field.

    Raises:
        BlockingIOError: another process is training in `out`.
        FileNotFoundError: there is no run, or its data have gone.
        ValueError: a change would make it another training; it has done more steps already; a file is damaged; the data
            are not those it began with; there are weights, but no checkpoint that they belong to.
        As `train` besides.
    """
    out = Path(out)
    saved = read_config(out, parts=["model"])
    config = _changed(saved_config(saved, out), changes, out)
    engine = launch(config, say)
    with ExitStack() as stack:
        stack.enter_context(engine.ending_others())

        def start() -> Path:
            stack.enter_context(owned(out, "trained", say))
            recover(out)
            if read_config(out, parts=["model"]) != saved:  # by another training, before this one owned the folder
                raise ValueError(f"{out / CONFIG_FILE} has just been changed; give the command again")
            there = checkpoints(out)
            if not there and (out / MODEL_FILE).exists():
                raise ValueError(
                    f"{out} has weights but no checkpoint to go on from: no room was left for one, or an older version "
                    "wrote them; --init-from begins a new training with them"
                )
            check_saved(saved, config, out, engine.device, say)
            remove_unfinished(out)
            if there:
                publish_last(out)
            noted = {"training": asdict(config), "products": _products.noted(saved.get("products"))}
            save_config(saved | noted, out)
            from_where = f"after step {max(there):,}" if there else "from the start, as it has no checkpoint"
            say(f"Resuming {out} {from_where}")
            if (out / REPLACED).is_dir():
                say(f"The run before it is kept in {out / REPLACED} until it has a checkpoint")
            for line in describe(config).splitlines():
                say(line)
            return out

        return _run(engine, config, engine.on_rank_zero(start), progress, say)


def _run(engine: Engine, config: TrainConfig, out: Path, progress: bool, say: Say) -> TrainResult:
    """Train what `out` describes."""
    saved = read_config(out, parts=["model"])
    tokenizer = load_tokenizer(out / TOKENIZER_FILE)
    train_set, val_set = datasets(saved["data"], out, tokenizer, config.seq_len)
    weights = Path(saved["init"]["weights"]) if "init" in saved else None
    device = engine.device
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        _naming_causes(config, tokenizer.vocab_size, engine),
    ):
        model = _model(config, tokenizer.vocab_size)
        if engine.rank == 0:
            where = f"{device}" if engine.world_size == 1 else f"{engine.world_size} processes, {device.type}"
            if device.type == "cpu":
                where += f", {count(torch.get_num_threads(), 'thread')}{' each' * (engine.world_size > 1)}"
            say(f"Model: {model.num_parameters():,} weights, on {where}")
        title = f"{config.preset} on {saved['data']['name']}"
        with _products.kept(saved.get("products")):
            fitted: Fitted = fit(
                engine, model, tokenizer, train_set, val_set, config, out,
                title=title, progress_bar=progress, weights=weights,
            )  # fmt: skip
        engine.barrier()  # whoever goes on reads what the first process has written
        if not (out / MODEL_FILE).exists() and not checkpoints(out):
            raise OSError(f"nothing could be written to {out}, not even the weights alone; the training is lost")
        trained = load_model(out, device)
    engine.close_at_exit()
    return TrainResult(out, trained, tokenizer, fitted.steps, fitted.val_loss, val_set.paths[0], fitted.signal)


@contextmanager
def _naming_causes(config: TrainConfig, vocab_size: int, engine: Engine) -> Iterator[None]:
    """Say what is behind an error of PyTorch's: memory that has run out, or another process that has gone."""
    try:
        yield
    except Exception as error:
        if (named := memory_error(config, vocab_size, engine.device, error)) is not None:
            raise named from error
        if engine.world_size > 1 and isinstance(error, RuntimeError) and _PEER_GONE.search(str(error)):
            raise ConnectionError(
                "another process of this training has ended, perhaps for want of memory; --resume goes on from the "
                "last checkpoint, if there is one"
            ) from error
        raise


def _model(config: TrainConfig, vocab_size: int) -> SimpleLLM:
    """Return the model with its first weights, which the seed decides; fsdp's has none yet, see `Engine.setup`."""
    modern = PRESETS[config.preset].modern  # the article's model keeps the article's first weights
    later = modern and config.strategy == "fsdp"
    with torch.device("meta" if later else "cpu"):
        torch.manual_seed(config.seed)
        model = SimpleLLM.from_config(config.model_config(vocab_size))
    if modern and not later:
        init_gpt2_weights(model, generator=torch.Generator().manual_seed(config.seed))
    return model


def _changed(config: TrainConfig, changes: dict[str, Any], out: Path) -> TrainConfig:
    names = {item.name for item in fields(TrainConfig)}
    wanted = {name: value for name, value in changes.items() if value is not None}
    for name, value in wanted.items():
        if name not in names:
            raise TypeError(f"a training has no {name}")
        if name not in RESUMABLE and value != getattr(config, name):
            raise ValueError(
                f"{name} is {value!r}, but the training in {out} has {getattr(config, name)!r}; a resumed training may "
                "change its steps, how it is computed and how it is watched, not what it learns: see `tinyllm train "
                "--help`"
            )
    return replace(config, **wanted)
