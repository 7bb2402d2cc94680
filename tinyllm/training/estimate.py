"""Estimate what training a model takes, before anything is bought: parameters, computation, memory, speed.

The model is built on the meta device, so its parameters are counted, not computed. The rest is arithmetic, and tests
compare it with what small models are measured to take. B sequences of T tokens a device, D = embedding_dim,
H = hidden_dim, V = vocab_size, L = num_layers.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tinyllm._internal.memory import memory
from tinyllm._internal.words import binary_size, duration, option, short_number, size
from tinyllm.config.model import SimpleLLMConfig
from tinyllm.config.training import OPTIMIZERS, PRECISIONS, SETTINGS, TrainConfig
from tinyllm.model import SimpleLLM

# Bytes for each parameter: the weight, its gradient, an average of the optimizer's, and the copy that autocast computes
# with. AdamW has two averages for each parameter, Muon one for each number in a hidden matrix.
_BYTES = dict(zip(PRECISIONS, ((4, 4, 4, 0), (4, 4, 4, 2), (2, 2, 2, 0)), strict=True))


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, at the peak of a training step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of them. What allocators lose between tensors, some percent, comes on top."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Estimate:
    """Result of `estimate`.

    Attributes:
        parameters: how many numbers are learned; tied ones once.
        flops_per_token: of forward and backward, a multiplication and an addition as two. What gradient checkpointing
            computes again does not count, as in the usual definition of MFU.
        memory: strategy -> what each device holds.
    """

    parameters: int
    flops_per_token: int
    memory: dict[str, Memory]

    def tokens_per_second(self, devices: int, peak_flops: float, mfu: float) -> float:
        """Return tokens a second of all devices. peak_flops: of one device. mfu: the fraction of it that the model's
        own computation reaches."""
        return devices * peak_flops * mfu / self.flops_per_token


@dataclass(frozen=True)
class Settings:
    """Machines that `report` assumes, devices, B and T on each, GiB of each, its peak, the fraction of it reached, and
    the optimizer."""

    devices: int
    batch_size: int
    seq_len: int
    precision: str
    device_memory: float
    peak_tflops: float
    mfu: float
    optimizer: str = "adamw"


def estimate(
    config: SimpleLLMConfig,
    *,
    devices: int = 1,
    batch_size: int = 1,
    seq_len: int | None = None,
    precision: str = "bf16-mixed",
    checkpointing: bool = False,
    optimizer: str = "adamw",
) -> Estimate:
    """Estimate parameters, computation and memory of training a model.

    The strategies: "ddp" has everything on every device; "fsdp" a share of everything, and two blocks' weights
    gathered while one works and the next one comes; "deepspeed" (its stage 2), which does not take Muon, all weights,
    and a share of gradients and optimizer.

    Args:
        config: the model.
        devices: how many share the work.
        batch_size: B, sequences on each device at a time.
        seq_len: T; None: the model's max_seq_len.
        precision: see `TrainConfig`.
        checkpointing: keep only each block's input and compute the rest of it again in backward.
        optimizer: see `TrainConfig`.

    Raises:
        ValueError: a number below 1, seq_len above max_seq_len, an unknown precision or optimizer.
    """
    seq_len = config.max_seq_len if seq_len is None else seq_len
    for name, value in (("devices", devices), ("batch_size", batch_size), ("seq_len", seq_len)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if seq_len > config.max_seq_len:
        raise ValueError(f"seq_len is {seq_len}; the model takes at most max_seq_len, {config.max_seq_len}")
    SETTINGS["precision"].validate(precision)
    SETTINGS["optimizer"].validate(optimizer)
    with torch.device("meta"):
        model = SimpleLLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    block = sum(parameter.numel() for parameter in model.transformer_blocks[0].parameters()) if config.num_layers else 0
    activations = batch_size * seq_len * _activation_bytes(config, seq_len, precision, checkpointing)

    weight, gradient, average, copy = _BYTES[precision]
    share = -(-parameters // devices)
    averages = _averages(config, parameters, optimizer)
    one, shared = average * averages, average * -(-averages // devices)
    gathered = 2 * block * (weight if copy == 0 else copy) if devices > 1 else 0
    memory = {
        "ddp": Memory((weight + copy) * parameters, gradient * parameters, one, activations),
        "fsdp": Memory(weight * share + gathered, gradient * share, shared, activations),
        "deepspeed": Memory((weight + copy) * parameters, gradient * share, shared, activations),
    }
    if optimizer == "muon":
        del memory["deepspeed"]  # which TrainConfig refuses
    return Estimate(parameters, _flops_per_token(config, seq_len), memory)


def _hidden_weights(config: SimpleLLMConfig) -> int:
    """Return how many numbers are in the blocks' matrices."""
    projections = 4 if config.num_heads > 1 else 3  # one head has no output projection
    return config.num_layers * (projections * config.embedding_dim**2 + 2 * config.embedding_dim * config.hidden_dim)


def _averages(config: SimpleLLMConfig, parameters: int, optimizer: str) -> int:
    """Return how many numbers an optimizer keeps."""
    return 2 * parameters - (_hidden_weights(config) if optimizer == "muon" else 0)


def _flops_per_token(config: SimpleLLMConfig, seq_len: int) -> int:
    """Count the FLOPs of matmuls alone; the rest is below a percent of them."""
    size = config.embedding_dim
    weights = _hidden_weights(config) + size * config.vocab_size
    seen = (seq_len + 1) / 2 if config.causal else seq_len  # keys, for each query on average
    attention = config.num_layers * 2 * size * seen
    # A product of forward costs two of its size in backward.
    return round(3 * 2 * (weights + attention))


def _activation_bytes(config: SimpleLLMConfig, seq_len: int, precision: str, checkpointing: bool) -> int:
    """Return the bytes that forward keeps for backward, for each token.

    Of a block: the two norms' inputs and outputs, query, key, value and attention's output, the network's hidden layer
    (twice where its activation cannot be told from its output), and in float32 the norms' statistics and attention's
    log-sum-exp. Autocast leaves the norms in float32.
    """
    width = 2 if precision != "32-true" else 4
    wide = 4 if precision == "bf16-mixed" else width
    size, hidden = config.embedding_dim, config.hidden_dim * (1 if config.activation == "relu" else 2)
    block = (6 * size + hidden) * width + 2 * size * wide + (config.num_heads + 4) * 4
    if checkpointing:
        inputs = 2 if config.norm_first else 1  # pre-norm blocks leave a branch for the next one to add
        blocks = config.num_layers * inputs * size * wide + (block if config.num_layers else 0)
    else:
        blocks = config.num_layers * block
    # The final norm's input and output; the logits of a large vocabulary are never there.
    return blocks + (2 * size * wide if config.norm_first else 0)


def report(name: str, config: SimpleLLMConfig, found: Estimate, settings: Settings) -> str:
    """Return an estimate as text for a terminal."""
    alone = settings.devices == 1
    lines = [
        f"{name}: {config.num_layers} layers of {config.embedding_dim} and {config.hidden_dim}, "
        f"{config.num_heads} heads, {config.vocab_size:,} tokens",
        f"parameters   {short_number(found.parameters)}",
        f"computation  {short_number(found.flops_per_token)} FLOP a token, forward and backward",
        "",
        f"On {'one device' if alone else f'each of {settings.devices} devices'} of {settings.device_memory:g} GiB, "
        f"with {settings.batch_size} x {settings.seq_len} tokens at a time, {settings.precision}, "
        f"{OPTIMIZERS[settings.optimizer]}:",
        f"{'':<11}{'weights':>11}{'gradients':>12}{'optimizer':>12}{'activations':>13}{'in all':>11}  fits",
    ]
    for strategy, used in {"": found.memory["ddp"]}.items() if alone else found.memory.items():
        share = used.total / 2**30 / settings.device_memory
        fits = "no" if share > 1 else "yes" if share <= 0.9 else "hardly: allocators lose some percent"
        parts = (used.weights, used.gradients, used.optimizer, used.activations, used.total)
        columns = (f"{binary_size(part):>{width}}" for part, width in zip(parts, (11, 12, 12, 13, 11), strict=True))
        lines.append(f"{strategy:<11}{''.join(columns)}  {fits}")
    speed = found.tokens_per_second(settings.devices, settings.peak_tflops * 1e12, settings.mfu)
    lines += [
        "",
        f"At {settings.mfu:.0%} of {settings.peak_tflops:g} TFLOP/s a device: {short_number(speed)} tokens/s in all; "
        f"20 tokens a parameter take {duration(20 * found.parameters / speed)}",
    ]
    return "\n".join(lines)


# What PyTorch's errors say when an allocation on a CPU fails, in an operator of its own and in one of ours.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "aoti_torch_empty")


_AVERAGE_BYTES = 4  # for each parameter, where the weights are averaged


Say = Callable[[str], None]


def check_memory(config: TrainConfig, vocab_size: int, device: torch.device, say: Say) -> None:
    """Compare what training takes with what is there; `say` a warning where it may be too little.

    Args:
        config: the training.
        vocab_size: the tokenizer's, or 1 while it is not known, for which less is needed.
        device: the first of those that it runs on.
        say: called with the warning.

    Raises:
        MemoryError: it is more than there is in all. What is available is no reason to refuse: a system may call
            memory used that it would give, such as the cache of some file systems.
    """
    room = memory(device)
    if room is None:
        return
    needed = _needed(config, vocab_size, device)
    parts = (
        f"weights {size(needed.weights)}, gradients {size(needed.gradients)}, optimizer {size(needed.optimizer)}, "
        f"activations {size(needed.activations)}"
    )
    if needed.total > room.total:
        raise MemoryError(
            f"training {config.preset} takes {size(needed.total)} of memory: {parts}; {device.type} has "
            f"{size(room.total)}, {size(room.available)} of it free. A smaller preset, --seq-len or --batch-size, "
            f"--micro-batches and --checkpointing take less: tinyllm estimate --preset {config.preset}"
        )
    if needed.total > room.available:
        say(
            f"Memory: about {size(needed.total)} is needed ({parts}), and {size(room.available)} is free; "
            f"{_remedy(config)}"
        )


def memory_error(
    config: TrainConfig, vocab_size: int, device: torch.device, error: BaseException
) -> MemoryError | None:
    """Return what to raise for an error of PyTorch's that means that memory has run out; None for any other."""
    if isinstance(error, MemoryError) and error.args:  # it says itself what to do
        return error
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    ):
        return None
    needed, room = _needed(config, vocab_size, device), memory(device)
    there = "" if room is None else f", {size(room.available)} is free now"
    return MemoryError(
        f"memory has run out on {device.type}: training {config.preset} takes about {size(needed.total)}{there}; "
        f"{_remedy(config)}"
    )


def checkpoint_bytes(config: TrainConfig, parameters: int) -> tuple[int, int]:
    """Return the size of a checkpoint and that of the weights alone, which is what a trained model is."""
    width = _BYTES[config.precision][0]
    averages = _AVERAGE_BYTES if config.ema is not None else 0
    kept = _averages(config.model_config(1), parameters, config.optimizer)
    # The averages are the model's weights then.
    return parameters * (width + averages) + kept * width, parameters * (averages or width)


def check_disk(config: TrainConfig, parameters: int, out: Path, say: Say) -> None:
    """Compare two checkpoints, as one is only removed when the next one is there, with the room on `out`'s disk.

    Raises:
        OSError: there is no room for the weights alone.
    """
    disk = shutil.disk_usage(_existing(out))
    if disk.total == 0:  # a file system that does not say
        return
    free = disk.free
    whole, weights = checkpoint_bytes(config, parameters)
    if free < weights:
        raise OSError(
            f"the disk is full: the trained weights alone take {size(weights)}, and {size(free)} is free in {out}; "
            f"make room, or choose another folder with {option('out')}"
        )
    if free < 2 * whole:
        then = "only the weights can be saved, and a resume is not possible" if free < whole else "only one fits"
        say(f"Disk: a checkpoint takes {size(whole)}, two are needed, and {size(free)} is free in {out}: {then}")


def _needed(config: TrainConfig, vocab_size: int, device: torch.device) -> Memory:
    """Return the bytes in the memory that `device` stands for: a GPU's own, or the machine's with all its processes."""
    processes = config.devices * config.num_nodes
    found = estimate(
        config.model_config(vocab_size),
        devices=processes,
        batch_size=config.batch_size // (config.micro_batches * processes),
        precision=config.precision,
        checkpointing=config.checkpointing,
        optimizer=config.optimizer,
    )
    one = found.memory["ddp" if config.strategy == "auto" else config.strategy]
    averages = 0 if config.ema is None else _AVERAGE_BYTES * found.parameters
    here = 1 if device.type == "cuda" else config.devices
    parts = (one.weights + averages, one.gradients, one.optimizer, one.activations)
    return Memory(*(here * part for part in parts))


def _remedy(config: TrainConfig) -> str:
    smaller = f"{option('micro_batches')}, {option('checkpointing')} and a smaller preset take less"
    return f"{smaller}: tinyllm estimate --preset {config.preset}"


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.resolve().parents) if folder.exists())
