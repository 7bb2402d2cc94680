"""TrainConfig: every choice of a training. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllm._internal.words import count
from tinyllm.config.presets import PRESETS, SIZES
from tinyllm.config.settings import at_least, below_one, between, documented, positive, setting, settings_of

if TYPE_CHECKING:
    from tinyllm.config.model import SimpleLLMConfig


OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}  # with the names that they have in texts
SCHEDULES = ("cosine", "linear", "constant", "wsd")
STRATEGIES = ("auto", "ddp", "fsdp", "deepspeed")
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")

# The groups of options in the help; the last two, and steps, are what a resumed training may change.
TEXT = "Text"
MODEL = "Model"
LEARNING = "Learning"
WATCHING = "Validation and checkpoints (--resume may change these)"
COMPUTING = "Devices, speed and memory (--resume may change these)"

_SIZES_OF_PRESETS = "; ".join(f"{name} {p.num_layers}/{p.num_heads}/{p.embedding_dim}" for name, p in PRESETS.items())


@documented
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All that decides a training: the same config on the same text gives the same losses.

    `TrainConfig.from_preset(name, **changes)` fills in what suits the preset's model. The sizes of the model that are
    None become the preset's: the config that is made has the numbers. A `vocab_size` of None stays: it stands for
    every word or character, and for 4,096 tokens of bpe.

    Raises:
        ValueError: a value is out of range; the message names it and what is allowed.
    """

    preset: str = setting(
        "tiny",
        MODEL,
        "A model and the training that suits it; other options change parts of it. The names, with layers/heads/"
        f"embedding dimension: {_SIZES_OF_PRESETS}. Default: {{default}}.",
        tuple(PRESETS),
        metavar="NAME",
    )
    num_layers: int | None = setting(None, MODEL, "Number of transformer blocks. Default: the preset's.", at_least(1))
    num_heads: int | None = setting(
        None, MODEL, "Attention heads of a block; they must divide --embedding-dim. Default: the preset's.", at_least(1)
    )
    embedding_dim: int | None = setting(
        None, MODEL, "Width of the model: the numbers that stand for a token. Default: the preset's.", at_least(1)
    )
    hidden_dim: int | None = setting(
        None,
        MODEL,
        "Width of the feed-forward layers. Default: as many times --embedding-dim as in the preset (tiny: "
        f"{PRESETS['tiny'].hidden_dim // PRESETS['tiny'].embedding_dim} times).",
        at_least(1),
    )
    tokenizer: str = setting(
        "bpe",
        TEXT,
        "What a token is: a word, a character, or a piece of a word that the text teaches. Default: {default}. "
        "Prepared data bring their own.",
        ("word", "char", "bpe"),
    )
    vocab_size: int | None = setting(
        None,
        TEXT,
        "The largest number of tokens that the tokenizer may know. Default: {default}; four times as many for word, "
        "and every character for char.",
        at_least(1),
        by_preset=True,
    )
    steps: int = setting(1000, LEARNING, "Training steps in all; --resume may change it.", at_least(1), by_preset=True)
    batch_size: int = setting(
        12, LEARNING, "Sequences in a step, on all devices together.", at_least(1), by_preset=True
    )
    seq_len: int = setting(
        64, MODEL, "Tokens in a sequence, which is as far back as the model can look.", at_least(1), by_preset=True
    )
    optimizer: str = setting(
        "adamw",
        LEARNING,
        "What makes steps of gradients: adamw, or muon for the blocks' matrices and adamw for all else. A step of muon "
        "takes longer and learns more; deepspeed cannot have it.",
        tuple(OPTIMIZERS),
        by_preset=True,
    )
    lr: float = setting(3e-3, LEARNING, "Learning rate at its peak.", positive, by_preset=True)
    warmup_steps: int | None = setting(
        None, LEARNING, "Steps in which the learning rate rises. Default: 5 % of all, at most 500.", at_least(0)
    )
    min_lr_ratio: float = setting(
        0.1, "", "Where the learning rate ends, as a fraction of `lr`, if it falls.", between(0, 1)
    )
    schedule: str = setting(
        "cosine",
        LEARNING,
        "How the learning rate goes on after its rise: cosine and linear fall to a tenth, constant stays, and wsd "
        "stays and falls in the last fifth of the steps.",
        SCHEDULES,
    )
    decay_fraction: float = setting(0.2, "", 'Share of the steps in which the schedule "wsd" falls.', between(0, 1))
    weight_decay: float = setting(
        0.1, LEARNING, "Weight decay, of matrices only; norms and biases have none.", at_least(0)
    )
    beta1: float = setting(0.9, "", "The decay rate of the gradient's average.", below_one)
    beta2: float = setting(0.95, "", "AdamW's decay rate of the squared gradient's average.", below_one, by_preset=True)
    grad_clip: float = setting(
        1.0, LEARNING, "The largest norm of the gradient; longer ones are scaled down.", positive
    )
    dropout: float = setting(
        0.0,
        MODEL,
        "Share of the activations that training sets to zero, at least 0 and below 1.",
        below_one,
        by_preset=True,
    )
    label_smoothing: float = setting(
        0.0,
        LEARNING,
        "Share of the target's probability that is spread over all tokens in training, from 0 to 1.",
        between(0, 1),
    )
    packing: bool = setting(
        False,
        LEARNING,
        "Attention stops where a document ends, for which the tokenizer needs an end-of-text token. Default: "
        "{default}, as GPT-2 was trained.",
    )
    ema: float | None = setting(
        None,
        LEARNING,
        "Validate and save an average of the weights over the steps, with this decay, such as 0.999: at least 0 and "
        "below 1. Default: no average.",
        below_one,
        metavar="DECAY",
    )
    seed: int = setting(0, LEARNING, "The same seed, text and machine give the same model.", between(0, 2**63 - 1))
    eval_interval: int | None = setting(
        None, WATCHING, "Steps between validations. Default: a tenth of all steps, but at least 100.", at_least(1)
    )
    eval_batches: int = setting(32, WATCHING, "Batches in a validation, the same ones each time.", at_least(1))
    log_interval: int = setting(10, WATCHING, "Steps between lines of metrics.", at_least(1))
    sample_tokens: int = setting(
        40, WATCHING, "Tokens to write at each validation, into samples.jsonl; 0 for none.", at_least(0)
    )
    checkpoint_interval: int | None = setting(
        None, WATCHING, "Steps between checkpoints. Default: one at each validation.", at_least(1)
    )
    keep_checkpoints: int = setting(
        2, WATCHING, "How many of the last checkpoints stay, besides the best one.", at_least(1)
    )
    stop_on_save_error: bool = setting(
        False,
        WATCHING,
        "End the training if a checkpoint cannot be written, as on a full disk; those before it stay. Default: "
        "{default}, which says so and goes on.",
    )
    max_skipped_steps: int = setting(
        10,
        WATCHING,
        "Steps in a row that may be skipped because their gradient is not finite; one more ends the training.",
        at_least(0),
    )
    device: str = setting("auto", COMPUTING, "cpu, cuda (or cuda:1), or auto, which takes a GPU if there is one.")
    strategy: str = setting(
        "auto",
        COMPUTING,
        "How devices share the work: with ddp each has the whole model, with fsdp a part of it, and deepspeed is its "
        "ZeRO stage 2. Default: {default}, which is ddp where there is more than one device.",
        STRATEGIES,
    )
    devices: int = setting(1, COMPUTING, "GPUs of this machine, or processes on its CPU.", at_least(1))
    num_nodes: int = setting(1, COMPUTING, "Machines that train together.", at_least(1))
    precision: str = setting(
        "32-true",
        COMPUTING,
        "Number formats: 32-true computes in float32, bf16-mixed in bfloat16 with float32 weights, and bf16-true has "
        "bfloat16 for both.",
        PRECISIONS,
    )
    micro_batches: int = setting(
        1,
        COMPUTING,
        "Parts of a step's sequences that are computed one after the other, which takes less memory.",
        at_least(1),
    )
    checkpointing: bool = setting(
        False,
        COMPUTING,
        "Keep only the blocks' inputs for backward, and compute the rest again, which takes less memory.",
    )
    compile: bool = setting(
        False,
        COMPUTING,
        "Run the model through torch.compile, which takes a while at first. With --dropout it drops others than "
        "without, so the losses differ a little.",
    )
    workers: int = setting(
        0, COMPUTING, "Processes that read data ahead, for each device; with 0 the training reads itself.", at_least(0)
    )
    tensorboard: bool = setting(False, WATCHING, "Write TensorBoard's files as well.")

    def __post_init__(self) -> None:
        for name, declared in SETTINGS.items():
            declared.validate(getattr(self, name))
        self._take_sizes()
        if self.optimizer == "muon" and self.strategy == "deepspeed":
            raise ValueError(
                "optimizer is 'muon', which needs whole matrices, and strategy 'deepspeed' cuts them anywhere; take "
                "'adamw', or one of the strategies 'ddp' and 'fsdp'"
            )
        processes = self.devices * self.num_nodes
        if self.batch_size % (self.micro_batches * processes):
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be divisible by micro_batches x devices x num_nodes, "
                f"{self.micro_batches} x {self.devices} x {self.num_nodes}"
            )

    def _take_sizes(self) -> None:
        """Replace sizes that are None by the preset's, and check that they fit each other."""
        preset = PRESETS[self.preset]
        given = {name: getattr(self, name) for name in SIZES}
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
        """Return the number of steps in which the learning rate rises."""
        return min(500, self.steps // 20) if self.warmup_steps is None else self.warmup_steps

    @property
    def eval_every(self) -> int:
        """Return the number of steps between validations; the last step has one, too."""
        return self.eval_interval or max(100, self.steps // 10)

    @property
    def checkpoint_every(self) -> int:
        """Return the number of steps between checkpoints; the last step has one, too."""
        return self.checkpoint_interval or self.eval_every

    @classmethod
    def from_preset(cls, preset: str, **changes: Any) -> TrainConfig:
        """Return the config that suits `preset`; `changes` that are None leave the preset's value."""
        SETTINGS["preset"].validate(preset)
        chosen = PRESETS[preset]
        names = {field.name for field in fields(cls)} - set(SIZES)  # which the constructor takes from the preset
        values = {name: value for name, value in asdict(chosen).items() if name in names}
        given = {name: value for name, value in changes.items() if value is not None}
        if given.get("strategy") == "deepspeed":
            values["optimizer"] = "adamw"
        if given.get("optimizer", values["optimizer"]) == "adamw":
            values.update(chosen.with_adamw)
        values.update(given)
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
            activation="gelu_tanh" if preset.modern else "relu",
            norm_first=preset.modern,
            tie_embeddings=preset.modern,
            position="learned" if preset.modern else "sinusoidal",
            output_bias=not preset.modern,
        )


SETTINGS = settings_of(TrainConfig)

# What may differ when a run is resumed: how it is computed and watched, and how long it goes on. A default that follows
# other settings (`eval_every`, `checkpoint_every`) has no way back but its number: None leaves a setting as it was.
RESUMABLE = frozenset({"steps"} | {name for name, item in SETTINGS.items() if item.group in (WATCHING, COMPUTING)})


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
    peak = f"{OPTIMIZERS[c.optimizer]}, lr {c.lr:g}"
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
