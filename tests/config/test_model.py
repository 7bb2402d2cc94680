"""SimpleLLMConfig: its defaults, its round trips, and what it refuses."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy
import pytest

from tinyllm.config.model import SimpleLLMConfig
from tinyllm.model import SimpleLLM

EVERYTHING: dict[str, Any] = {
    "num_heads": 2,
    "causal": True,
    "max_seq_len": 16,
    "dropout": 0.25,
    "activation": "gelu",
    "norm_first": True,
    "bias": False,
    "tie_embeddings": True,
    "position": "learned",
    "norm_eps": 1e-6,
    "output_bias": False,
}


def test_config_defaults_are_the_articles() -> None:
    config = SimpleLLM(6, 16, 32, 2).config
    assert config == SimpleLLMConfig(6, 16, 32, 2, 1, False, 5000, 0.0, "relu", False, True, False, "sinusoidal", 1e-5)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}, EVERYTHING])
def test_config_round_trip(options: dict[str, Any]) -> None:
    config = SimpleLLMConfig(11, 8, 12, 2, **options)
    assert SimpleLLMConfig.from_json(config.to_json()) == config
    assert SimpleLLMConfig.from_dict(config.to_dict()) == config
    assert json.loads(config.to_json()) == config.to_dict()
    assert SimpleLLM.from_config(config).config == config
    assert hash(config) == hash(SimpleLLMConfig.from_dict(config.to_dict()))


def test_config_holds_plain_numbers() -> None:
    config = SimpleLLMConfig(numpy.int64(6), 16, 32, numpy.int32(2), dropout=0)
    assert [type(v) for v in (config.vocab_size, config.num_layers, config.dropout)] == [
        int,
        int,
        float,
    ]
    assert json.loads(config.to_json())["vocab_size"] == 6


def test_config_is_frozen() -> None:
    with pytest.raises(AttributeError):
        SimpleLLMConfig(6, 16, 32, 2).vocab_size = 7  # type: ignore[misc]


def test_the_config_of_an_older_run_loads() -> None:
    values = SimpleLLMConfig(11, 8, 12, 2).to_dict()
    del values["norm_eps"], values["output_bias"]
    assert SimpleLLMConfig.from_dict(values) == SimpleLLMConfig(11, 8, 12, 2)


def test_from_dict_fills_in_defaults_only() -> None:
    required = {"vocab_size": 6, "embedding_dim": 16, "hidden_dim": 32, "num_layers": 2}
    assert SimpleLLMConfig.from_dict(required) == SimpleLLMConfig(6, 16, 32, 2)
    with pytest.raises(ValueError, match="no field 'n_head', 'x'; it has 'vocab_size', 'embedding"):
        SimpleLLMConfig.from_dict({**required, "n_head": 2, "x": 1})
    del required["hidden_dim"]
    with pytest.raises(ValueError, match="lacks 'hidden_dim'; it must have 'vocab_size'"):
        SimpleLLMConfig.from_dict(required)
    with pytest.raises(TypeError, match="a config is a mapping"):
        SimpleLLMConfig.from_dict([1])  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", '{"vocab_size": 6', "[1]", "null"])
def test_from_json_refuses_what_is_no_config(text: str) -> None:
    with pytest.raises(ValueError, match="the config"):
        SimpleLLMConfig.from_json(text)


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        *((name, 0, ValueError, f"{name} is 0; it must be at least 1") for name in (
            "vocab_size", "embedding_dim", "hidden_dim", "num_heads", "max_seq_len",
        )),
        ("num_layers", -1, ValueError, "num_layers is -1; it must be at least 0"),
        ("vocab_size", "6", TypeError, "vocab_size is '6'; it must be an integer"),
        ("num_layers", 2.0, TypeError, "num_layers is 2.0; it must be an integer"),
        ("num_heads", True, TypeError, "num_heads is True; it must be an integer"),
        ("num_heads", 3, ValueError, "embedding_dim is 16 and num_heads 3; .*divisible"),
        ("dropout", 1.0, ValueError, "dropout is 1.0; it must be from 0"),
        ("dropout", -0.1, ValueError, "dropout is -0.1"),
        ("dropout", math.nan, ValueError, "dropout is nan"),
        ("dropout", None, TypeError, "dropout is None; it must be a number"),
        *(("norm_eps", value, ValueError, f"norm_eps is {value}; it must be positive and finite") for value in (
            0, -1e-5, math.inf, math.nan,
        )),
        ("norm_eps", "1e-5", TypeError, "norm_eps is '1e-5'; it must be a positive number"),
        ("norm_eps", True, TypeError, "norm_eps is True"),
        ("activation", "tanh", ValueError, """activation is 'tanh'; it must be "relu", "gelu" or "gelu_tanh\""""),
        ("position", None, ValueError, """position is None; it must be "sinusoidal" or "learned\""""),
        *((name, 1, TypeError, f"{name} is 1; it must be True or False") for name in (
            "causal", "norm_first", "bias", "tie_embeddings", "output_bias",
        )),
    ],
)  # fmt: skip
def test_bad_fields(field: str, value: Any, error: type[Exception], message: str) -> None:
    sizes = {"vocab_size": 6, "embedding_dim": 16, "hidden_dim": 32, "num_layers": 2}
    for make in (SimpleLLMConfig, SimpleLLM):
        with pytest.raises(error, match=message):
            make(**{**sizes, field: value})
