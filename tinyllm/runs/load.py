"""Bring a trained model back from its run folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model as load_safetensors
from safetensors.torch import save_model as save_safetensors

from tinyllm.config.model import SimpleLLMConfig
from tinyllm.config.saved import CONFIG_FILE, existing_file, read_config
from tinyllm.model import SimpleLLM
from tinyllm.pretrained import gpt2
from tinyllm.pretrained.tensors import new_safetensors_file, not_finite
from tinyllm.runs.folder import MODEL_FILE, TOKENIZER_FILE, best_step, checkpoints, weights_in
from tinyllm.tokenizer import Tokenizer, load_tokenizer, load_vocabulary


class Run(NamedTuple):
    """A training, or another program's model, brought back: its model in eval mode, its tokenizer, its config.json."""

    model: SimpleLLM
    tokenizer: Tokenizer
    config: dict[str, Any]


def save_model(model: SimpleLLM, directory: str | os.PathLike[str]) -> Path:
    """Write the weights to `directory`/model.safetensors, whole or not at all; returns the path.

    Tied weights are stored once. A file that was there before stays until the new one is complete.
    """
    path = Path(directory, MODEL_FILE)
    with new_safetensors_file(path) as temporary:
        save_safetensors(model, str(temporary), metadata={"format": "pt"})
    return path


Which = int | Literal["last", "best"]


def load_model(
    directory: str | os.PathLike[str], device: str | torch.device = "cpu", *, checkpoint: Which = "last"
) -> SimpleLLM:
    """Build the model that `directory`/config.json describes and load its weights; in eval mode.

    Args:
        directory: the run folder.
        device: where the model is to lie.
        checkpoint: "last"; "best": the one with the lowest validation loss; or the step of one that is there.

    Raises:
        FileNotFoundError: a file, or the checkpoint, is missing.
        ValueError: a file is truncated or foreign, the weights do not fit the config, or they are not finite.
    """
    config_path = Path(directory, CONFIG_FILE)
    config = read_config(directory, parts=["model"])["model"]
    if checkpoint != "last":
        path = _weights_of(directory, checkpoint)
    elif not Path(directory, MODEL_FILE).exists() and (there := checkpoints(directory)):
        path = weights_in(there[max(there)])  # there was no room for a second copy, or a kill came between
    else:
        path = existing_file(directory, MODEL_FILE)
    try:
        model = SimpleLLM.from_config(SimpleLLMConfig.from_dict(config))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{config_path} does not describe a model: {error}") from error
    except (MemoryError, RuntimeError) as error:
        raise ValueError(f"the model that {config_path} describes does not fit in memory") from error
    with path.open("rb"):  # for Python's words: the library says of whatever it cannot read that there is no such file
        pass
    try:
        load_safetensors(model, str(path), strict=True)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is truncated") from error
    except RuntimeError as error:  # load_state_dict: a line for each key that is missing or differs
        first, *others = str(error).splitlines()[1:] or [str(error)]
        more = f", and {len(others)} more" if others else ""
        raise ValueError(
            f"the weights in {path} do not fit the model in {config_path}: {first.strip()}{more}"
        ) from error
    _check_finite(model, path)
    return model.to(device).eval()


def load_run(
    directory: str | os.PathLike[str], device: str | torch.device = "cpu", *, checkpoint: Which = "last"
) -> Run:
    """Bring a training back: `model, tokenizer, config = load_run("runs/tiny-1")`.

    Args:
        directory: the run folder; or the folder of a GPT-2 with its tokenizer (tokenizer.json, or vocab.json and
            merges.txt) in Hugging Face's format, see `SimpleLLM.from_pretrained`. Such a model may have more ids than
            its tokenizer, to which no text belongs: vocabularies are padded to round numbers.
        device, checkpoint: as for `load_model`; without checkpoints there is "last" alone.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated or foreign, or the three do not belong together.
    """
    if gpt2.is_pretrained(directory):
        return _load_pretrained(Path(directory), device, checkpoint)
    config = read_config(directory, parts=["model"])
    tokenizer = load_tokenizer(existing_file(directory, TOKENIZER_FILE))
    model = load_model(directory, device, checkpoint=checkpoint)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{Path(directory, TOKENIZER_FILE)} has {tokenizer.vocab_size} tokens, but the "
            f"model in {directory} has vocab_size {model.config.vocab_size}: they are not of one run"
        )
    return Run(model, tokenizer, config)


def _load_pretrained(folder: Path, device: str | torch.device, checkpoint: Which) -> Run:
    if checkpoint != "last":
        raise ValueError(f"checkpoint is {checkpoint!r}; {folder} is not a training's, and has no checkpoints")
    _, config = gpt2.read_config(folder)
    tokenizer = load_vocabulary(folder)
    model = SimpleLLM.from_pretrained(folder, device=device)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, more than the model's vocab_size, "
            f"{model.config.vocab_size}: they do not belong together"
        )
    return Run(model, tokenizer, config)


def _check_finite(model: SimpleLLM, path: Path) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and (wrong := not_finite(tensor)) is not None:
            raise ValueError(f"{path} has {wrong} in {name}: the training diverged, or the file is damaged")


def _weights_of(directory: str | os.PathLike[str], checkpoint: Which) -> Path:
    there = checkpoints(directory)
    if isinstance(checkpoint, str) and checkpoint != "best":
        raise ValueError(f"checkpoint is {checkpoint!r}; allowed are 'last', 'best' and the number of a step")
    step = best_step(directory) if checkpoint == "best" else checkpoint
    if step not in there:
        steps = ", ".join(map(str, there)) or "none"
        missing = "no best checkpoint" if checkpoint == "best" else f"no checkpoint of step {checkpoint}"
        raise FileNotFoundError(f"{directory} has {missing}; those there are of the steps {steps}")
    return weights_in(there[step])
