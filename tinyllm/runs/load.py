"""Bring a trained model back from its run folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from safetensors.torch import load_model as load_safetensors
from safetensors.torch import save_model as save_safetensors

from tinyllm._internal.files import check_new_folder
from tinyllm._internal.finite import not_finite
from tinyllm.config.model import SimpleLLMConfig
from tinyllm.config.saved import CONFIG_FILE, existing_file, read_config, save_config
from tinyllm.model import SimpleLLM
from tinyllm.pretrained import gpt2, own
from tinyllm.pretrained.tensors import new_safetensors_file
from tinyllm.quantization import check_weights, group_size_of, model_of, quantize, weights_of
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


def save_quantized(
    model: SimpleLLM,
    tokenizer: Tokenizer,
    directory: str | os.PathLike[str],
    *,
    made_from: dict[str, Any] | None = None,
) -> None:
    """Write a model with weights in fewer bits, and its tokenizer, to a new directory, for `load_run`.

    Args:
        model: one whose weights `tinyllm.quantization.quantize` has stored.
        tokenizer: the model's.
        directory: a name that is not taken, or an empty directory.
        made_from: what config.json is to say of the original.

    Raises:
        FileExistsError, NotADirectoryError: something is there.
    """
    path = check_new_folder(directory)
    path.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    if model.config.tie_embeddings:  # once
        state = {name: tensor for name, tensor in state.items() if not name.startswith("embedding.embedding.")}
    with new_safetensors_file(path / MODEL_FILE) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary, metadata={"format": "pt"})
    tokenizer.save(path / TOKENIZER_FILE)
    config = {"model": model.config.to_dict(), "weights": weights_of(model), "group_size": group_size_of(model)}
    save_config({**config, "made_from": made_from or {}}, path)


Which = int | Literal["last", "best"]


def load_model(
    directory: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    checkpoint: Which = "last",
    weights: str | None = None,
) -> SimpleLLM:
    """Build the model that `directory`/config.json describes and load its weights; in eval mode.

    Args:
        directory: the run folder; or one that `tinyllm quantize` has made, whose file stays mapped.
        device: where the model is to lie.
        checkpoint: "last"; "best": the one with the lowest validation loss; or the step of one that is there.
        weights: how the model is to store them, see `tinyllm.quantization.quantize`; default: as they are there.

    Raises:
        FileNotFoundError: a file, or the checkpoint, is missing.
        ValueError: a file is truncated or foreign, the weights do not fit the config, they are not finite, or they are
            stored in another way already.
    """
    if weights is not None:
        check_weights(weights)
    config_path = Path(directory, CONFIG_FILE)
    whole = read_config(directory, parts=["model"])
    config, there_as = whole["model"], whole.get("weights", "float32")
    if weights not in (None, there_as) and there_as != "float32":
        raise ValueError(f"weights is {weights!r}; {directory} has them as {there_as!r} already")
    if checkpoint != "last":
        path = _weights_of(directory, checkpoint)
    elif not Path(directory, MODEL_FILE).exists() and (there := checkpoints(directory)):
        path = weights_in(there[max(there)])  # there was no room for a second copy, or a kill came between
    else:
        path = existing_file(directory, MODEL_FILE)
    if there_as != "float32":
        return _stored_model(_described(config_path, config), path, whole).to(device).eval()
    try:
        model = SimpleLLM.from_config(_described(config_path, config))
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
    return quantize(model, weights or "float32").to(device).eval()


def _described(path: Path, config: dict[str, Any]) -> SimpleLLMConfig:
    try:
        return SimpleLLMConfig.from_dict(config)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a model: {error}") from error


def _stored_model(config: SimpleLLMConfig, path: Path, whole: dict[str, Any]) -> SimpleLLM:
    """Load a model that `tinyllm quantize` has written, with the whole config.json; its tensors are those of the mapped
    file."""
    with path.open("rb"):
        pass
    try:
        state = load_file(path)
        model = model_of(SimpleLLM, config, state)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is truncated") from error
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the weights in {path} are not those of its {CONFIG_FILE}: {reason}") from error
    if (found := weights_of(model)) != whole["weights"]:
        raise ValueError(f"the weights in {path} are stored as {found!r}; its {CONFIG_FILE} says {whole['weights']!r}")
    size = group_size_of(model)
    if (said := whole.get("group_size", size)) != size:
        raise ValueError(f"the weights in {path} share a scale in groups of {size}; its {CONFIG_FILE} says {said}")
    _check_finite(model, path)
    return model


def load_run(
    directory: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    checkpoint: Which = "last",
    weights: str | None = None,
) -> Run:
    """Bring a training back: `model, tokenizer, config = load_run("runs/tiny-1")`.

    Args:
        directory: the run folder; or the folder of a GPT-2 with its tokenizer (tokenizer.json, or vocab.json and
            merges.txt) in Hugging Face's format, see `SimpleLLM.from_pretrained`. Such a model may have more ids than
            its tokenizer, to which no text belongs: vocabularies are padded to round numbers.
        device, checkpoint, weights: as for `load_model`; without checkpoints there is "last" alone.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated or foreign, or the three do not belong together.
    """
    if gpt2.is_pretrained(directory):
        return _load_pretrained(Path(directory), device, checkpoint, weights or "float32")
    config = read_config(directory, parts=["model"])
    tokenizer = load_tokenizer(existing_file(directory, TOKENIZER_FILE))
    model = load_model(directory, device, checkpoint=checkpoint, weights=weights)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{Path(directory, TOKENIZER_FILE)} has {tokenizer.vocab_size} tokens, but the "
            f"model in {directory} has vocab_size {model.config.vocab_size}: they are not of one run"
        )
    return Run(model, tokenizer, config)


def _load_pretrained(folder: Path, device: str | torch.device, checkpoint: Which, weights: str) -> Run:
    if checkpoint != "last":
        raise ValueError(f"checkpoint is {checkpoint!r}; {folder} is not a training's, and has no checkpoints")
    _, config = own.format_of(folder).read_config(folder)
    tokenizer = load_vocabulary(folder)
    model = SimpleLLM.from_pretrained(folder, weights=weights, device=device)
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
