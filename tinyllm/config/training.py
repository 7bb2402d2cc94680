"""What to train and how: the presets, and the config that takes every choice. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllm._internal.words import count
from tinyllm.config.presets import PRESETS, SIZES

if TYPE_CHECKING:
    from tinyllm.config.model import SimpleLLMConfig


SCHEDULES = ("cosine", "linear", "constant", "wsd")
STRATEGIES = ("auto", "ddp", "fsdp", "deepspeed")
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


# What may differ when a run is resumed: how it is computed and watched, and how long it goes on. A default that follows
# other settings (`eval_every`, `checkpoint_every`) has no way back but its number: None leaves a setting as it was.
RESUMABLE = frozenset(
    {"steps", "eval_interval", "eval_batches", "log_interval", "sample_tokens", "checkpoint_interval"}
    | {"keep_checkpoints", "stop_on_save_error", "max_skipped_steps", "workers", "tensorboard", "compile"}
    | {"device", "strategy", "devices", "num_nodes", "precision", "micro_batches", "checkpointing"}
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All that decides a training: the same config on the same text gives the same losses.

    `TrainConfig.from_preset(name, **changes)` fills in what suits the preset's model.

    Attributes:
        preset: the model's kind, and its sizes where those below are None: a key of `PRESETS`.
        num_layers, num_heads, embedding_dim: the sizes that are to differ from the preset's; None: the preset's.
        hidden_dim: likewise; None: as many times embedding_dim as in the preset. None stands in a call only: the
            config that is made has the numbers.
        tokenizer: `"word"`, `"char"` or `"bpe"`, built from the text.
        vocab_size: the largest vocabulary wanted; None: every word or character, 4096 for BPE.
        steps: optimizer steps.
        batch_size: sequences in a step, over all its micro-batches and processes.
        seq_len: tokens in a sequence; also the model's context, `max_seq_len`.
        lr: the learning rate at its peak.
        warmup_steps: steps in which the learning rate rises to it; None: 5 % of all, at most 500.
        min_lr_ratio: where the cosine ends, as a fraction of `lr`.
        schedule: how it goes on: `"cosine"`, `"linear"`, `"constant"`, or `"wsd"` (warmup, stable, decay).
        decay_fraction: the part of all steps in which "wsd" decays.
        weight_decay: on matrices only; norms and biases are left alone.
        beta1, beta2: AdamW's decay rates.
        grad_clip: the largest global norm of the gradient.
        dropout: probability in [0, 1).
        label_smoothing: the part of the target's probability that is spread over all tokens, in [0, 1]. Validation does
            without.
        packing: attention stops at the ends of documents, which may lie anywhere in a sequence; needs a tokenizer with
            an end-of-text token. Off: a sequence is one text, as GPT-2's training has it.
        ema: decay of an exponential moving average of the weights, in [0, 1): validated, saved as the run's model, and
            stored in each checkpoint; None: no average.
        seed: of the document order, the weights, the batches and the dropout.
        eval_interval: steps between validations; None: ten in all, but 100 steps apart at least.
        eval_batches: batches in a validation, the same ones each time.
        log_interval: steps between lines of metrics.jsonl.
        sample_tokens: how much text to write at each validation, into samples.jsonl; 0: none.
        checkpoint_interval: steps between checkpoints; None: one at each validation.
        keep_checkpoints: how many of the last ones stay; the best one stays, too.
        stop_on_save_error: whether a checkpoint that cannot be written (a full disk) ends the training. Off: it is
            said, and the training goes on; the checkpoints before stay in both cases.
        max_skipped_steps: how many steps in a row may be skipped because the loss or the gradient is not finite; one
            more ends the training.
        device: `"cpu"`, `"cuda"` (or `"cuda:1"`), or `"auto"`: a GPU if there is one.
        strategy: how processes share the work: `"ddp"` (each has the model), `"fsdp"` (each has a part of it),
            `"deepspeed"` (ZeRO, stage 2), or `"auto"`: ddp if there is more than one.
        devices: devices of this machine, a process for each; on a CPU: processes.
        num_nodes: machines.
        precision: `"32-true"`, `"bf16-mixed"` (computes in bfloat16, weights in float32), or `"bf16-true"`.
        micro_batches: in how many parts a step's sequences are computed, one after the other, to save memory.
        checkpointing: keep only the blocks' inputs for backward, and compute the rest again.
        compile: run the model through torch.compile.
        workers: processes that read data ahead, for each training process; 0: it reads itself.
        tensorboard: whether to write TensorBoard's files, too.

    Raises:
        ValueError: a value is out of range; the message names it and what is allowed.
    """

    preset: str = "tiny"
    num_layers: int | None = None
    num_heads: int | None = None
    embedding_dim: int | None = None
    hidden_dim: int | None = None
    tokenizer: str = "bpe"
    vocab_size: int | None = None
    steps: int = 1000
    batch_size: int = 12
    seq_len: int = 64
    lr: float = 3e-3
    warmup_steps: int | None = None
    min_lr_ratio: float = 0.1
    schedule: str = "cosine"
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    dropout: float = 0.0
    label_smoothing: float = 0.0
    packing: bool = False
    ema: float | None = None
    seed: int = 0
    eval_interval: int | None = None
    eval_batches: int = 32
    log_interval: int = 10
    sample_tokens: int = 40
    checkpoint_interval: int | None = None
    keep_checkpoints: int = 2
    stop_on_save_error: bool = False
    max_skipped_steps: int = 10
    device: str = "auto"
    strategy: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    precision: str = "32-true"
    micro_batches: int = 1
    checkpointing: bool = False
    compile: bool = False
    workers: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _one_of("preset", self.preset, PRESETS)
        _one_of("tokenizer", self.tokenizer, ("word", "char", "bpe"))
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("strategy", self.strategy, STRATEGIES)
        _one_of("precision", self.precision, PRECISIONS)
        self._take_sizes()
        positive = ("steps", "batch_size", "seq_len", "eval_batches", "log_interval", "keep_checkpoints")
        for name in (*positive, "devices", "num_nodes", "micro_batches"):
            _in_range(name, getattr(self, name), 1)
        for name in ("sample_tokens", "max_skipped_steps", "workers"):
            _in_range(name, getattr(self, name), 0)
        for name in ("vocab_size", "eval_interval", "checkpoint_interval"):
            if getattr(self, name) is not None:
                _in_range(name, getattr(self, name), 1)
        if self.warmup_steps is not None:
            _in_range("warmup_steps", self.warmup_steps, 0)
        _in_range("seed", self.seed, 0, 2**63 - 1)
        _positive("lr", self.lr)
        _positive("grad_clip", self.grad_clip)
        _in_range("weight_decay", self.weight_decay, 0)
        for name in ("min_lr_ratio", "decay_fraction", "label_smoothing"):
            _in_range(name, getattr(self, name), 0, 1)
        for name in ("dropout", "beta1", "beta2", "ema"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 0 and below 1")
        processes = self.devices * self.num_nodes
        if self.batch_size % (self.micro_batches * processes):
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be divisible by micro_batches x devices x num_nodes, "
                f"{self.micro_batches} x {self.devices} x {self.num_nodes}"
            )

    def _take_sizes(self) -> None:
        """Replace sizes that are None by the preset's, and check them all."""
        preset = PRESETS[self.preset]
        given = {name: getattr(self, name) for name in SIZES}
        for name, value in given.items():
            if value is not None:
                _in_range(name, value, 1)
        sizes = {name: getattr(preset, name) if value is None else value for name, value in given.items()}
        if given["hidden_dim"] is None:
            sizes["hidden_dim"] = max(1, sizes["embedding_dim"] * preset.hidden_dim // preset.embedding_dim)
        for name, value in sizes.items():
            object.__setattr__(self, name, value)  # the class is frozen for all others
        if sizes["embedding_dim"] % sizes["num_heads"]:
            # Begins with the one that was given, or else with the preset's that does not fit it.
            which = "embedding_dim" if given["num_heads"] is None else "num_heads"
            other = "num_heads" if which == "embedding_dim" else "embedding_dim"
            raise ValueError(
                f"{which} is {sizes[which]}; num_heads must divide embedding_dim, and {other} is {sizes[other]}"
                + (f", the {self.preset} preset's" if given[other] is None else "")
            )

    @property
    def warmup(self) -> int:
        """Steps in which the learning rate rises."""
        return min(500, self.steps // 20) if self.warmup_steps is None else self.warmup_steps

    @property
    def eval_every(self) -> int:
        """Steps between validations; the last step has one, too."""
        return self.eval_interval or max(100, self.steps // 10)

    @property
    def checkpoint_every(self) -> int:
        """Steps between checkpoints; the last step has one, too."""
        return self.checkpoint_interval or self.eval_every

    @classmethod
    def from_preset(cls, preset: str, **changes: Any) -> TrainConfig:
        """Return the config that suits `preset`; `changes` that are None leave the preset's value."""
        _one_of("preset", preset, PRESETS)
        chosen = PRESETS[preset]
        names = {field.name for field in fields(cls)} - set(SIZES)  # which the constructor takes from the preset
        values = {name: value for name, value in asdict(chosen).items() if name in names}
        values.update({name: value for name, value in changes.items() if value is not None})
        if values.get("tokenizer", "bpe") != "bpe" and changes.get("vocab_size") is None:
            # The preset counts BPE tokens. Characters are few; words are many more than tokens.
            values["vocab_size"] = None if values["tokenizer"] == "char" else 4 * chosen.vocab_size
        return cls(preset=preset, **values)

    @classmethod
    def from_run(cls, run: str | PathLike[str], **changes: Any) -> TrainConfig:
        """Return a config for going on from the weights of `run` in a new training, see `tinyllm.train`.

        The model, its context `seq_len` and the tokenizer are the run's; all else suits the preset, or is in `changes`.

        Raises:
            FileNotFoundError: there is no run.
            ValueError: a change would make it another model or tokenizer; a value is out of range; config.json is
                damaged.
        """
        from tinyllm.config.saved import read_config

        before = saved_config(read_config(run), run)
        values = {name: value for name, value in changes.items() if value is not None}
        for name in ("preset", *SIZES, "seq_len", "tokenizer", "vocab_size"):
            if values.setdefault(name, getattr(before, name)) != getattr(before, name):
                raise ValueError(
                    f"{name} is {values[name]!r}, but the training in {run} has {getattr(before, name)!r}; its weights "
                    "are taken with their model and their tokenizer as they are"
                )
        return cls.from_preset(**values)

    def model_config(self, vocab_size: int) -> SimpleLLMConfig:
        """Return the config of the model to train, for a tokenizer of `vocab_size`."""
        from tinyllm.config.model import SimpleLLMConfig

        preset = PRESETS[self.preset]
        return SimpleLLMConfig(
            vocab_size=vocab_size,
            **{name: getattr(self, name) for name in SIZES},
            causal=True,
            max_seq_len=self.seq_len,  # at positions it was not trained on it would write nonsense
            dropout=self.dropout,
            activation="gelu" if preset.modern else "relu",
            norm_first=preset.modern,
            tie_embeddings=preset.modern,
            position="learned" if preset.modern else "sinusoidal",
        )


def saved_config(saved: dict[str, Any], run: str | PathLike[str]) -> TrainConfig:
    """Return the config that the content of `run`'s config.json has.

    Raises:
        ValueError: it has none, or a broken one.
    """
    try:
        return TrainConfig(**saved["training"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{Path(run, 'config.json')} does not say how the model was trained: {error}") from error


def describe(config: TrainConfig) -> str:
    """Return what a training will do in three lines: the model, the steps with their learning rate, and the rest."""
    c = config
    peak = f"lr {c.lr:g}"
    if c.warmup:
        peak += f" after {count(c.warmup, 'warmup step')}"
    low = f"{c.lr * c.min_lr_ratio:g}"
    after = {
        "constant": "constant",
        "cosine": f"cosine to {low}",
        "linear": f"linear to {low}",
        "wsd": f"constant, and linear to {low} in the last {c.decay_fraction:.0%} of the steps",
    }[c.schedule]
    parts = f" in {c.micro_batches} parts" if c.micro_batches > 1 else ""
    rest = [f"weight decay {c.weight_decay:g}", f"dropout {c.dropout:g}"]
    if c.label_smoothing:
        rest.append(f"label smoothing {c.label_smoothing:g}")
    if c.ema is not None:
        rest.append(f"averaged weights {c.ema:g}")
    rest += [name for name in ("packing", "checkpointing", "compile") if getattr(c, name)]
    rest.append(c.precision)
    if c.eval_every == c.checkpoint_every:
        rest.append(f"validation and checkpoint every {count(c.eval_every, 'step')}")
    else:
        rest.append(f"validation every {count(c.eval_every, 'step')}, checkpoint every {c.checkpoint_every:,}")
    return (
        f"Preset: {c.preset}, with {count(c.num_layers or 0, 'layer')}, {count(c.num_heads or 0, 'head')}, "
        f"embedding dimension {c.embedding_dim:,}, hidden dimension {c.hidden_dim:,}\n"
        f"Plan: {count(c.steps, 'step')} of {c.batch_size:,} x {c.seq_len:,} tokens{parts}; {peak}, {after}\n"
        f"Settings: {', '.join(rest)}; seed {c.seed}"
    )


def _one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}")


def _in_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    if not low <= value <= high:  # false for nan, too
        raise ValueError(
            f"{name} is {value}; it must be at least {low}" + (f", at most {high}" if high < math.inf else "")
        )


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; it must be a positive number")
