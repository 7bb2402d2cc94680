"""SimpleLLM's own folders in the layout of Hugging Face's `transformers`, for models that are no GPT-2.

config.json has the fields of `SimpleLLMConfig`, and the weights have our names, below "model.". The classes that read
and write them there are in `tinyllm.integrations.causal_lm`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from tinyllm._internal.finite import not_finite
from tinyllm.config.model import SimpleLLMConfig
from tinyllm.pretrained import gpt2
from tinyllm.pretrained.tensors import stored_tensors

MODEL_TYPE = "tinyllm"
_PREFIX = "model."
_FIELDS = tuple(field.name for field in dataclasses.fields(SimpleLLMConfig))


def format_of(folder: Path) -> ModuleType:
    """Return the module that reads a folder, by the model_type in its config.json: this one, or `gpt2`."""
    try:
        kind = gpt2.read_json(folder / gpt2.CONFIG_FILE).get("model_type")
    except (OSError, ValueError):
        kind = None  # gpt2 says what is wrong with it
    return sys.modules[__name__] if kind == MODEL_TYPE else gpt2


def read_config(folder: Path) -> tuple[SimpleLLMConfig, dict[str, Any]]:
    """Read the config.json of a folder of this kind: ours, and the content of the file.

    Raises:
        ValueError: a field is missing or out of range.
    """
    path = folder / gpt2.CONFIG_FILE
    values = gpt2.read_json(path)
    if missing := [name for name in _FIELDS if name not in values]:
        raise ValueError(f"{path} does not describe a model: it has no {', '.join(missing)}")
    try:
        return SimpleLLMConfig(**{name: values[name] for name in _FIELDS}), values
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a model: {error}") from error


def read_weights(
    folder: Path, config: SimpleLLMConfig, store: Callable[[str, Tensor], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Read the weights as the state_dict of a SimpleLLM; see `gpt2.read_weights`."""
    state: dict[str, Tensor] = {}
    problems = []
    for name, there in stored_tensors(folder).items():
        tensor = there.read()
        if tensor.dtype not in gpt2.FLOATS:
            problems.append(f"{name} has dtype {tensor.dtype}; a floating one of 16 to 64 bits is needed")
        elif (wrong := not_finite(tensor.float())) is not None:
            problems.append(f"{name} holds {wrong}")
        elif not problems:
            state |= store(name.removeprefix(_PREFIX), tensor)
    if problems:
        raise ValueError(f"the weights in {folder} are not those of its {gpt2.CONFIG_FILE}: {'; '.join(problems)}")
    return state
