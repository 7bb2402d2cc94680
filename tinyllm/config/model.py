"""SimpleLLMConfig: everything that decides a SimpleLLM's shape and outputs, besides its weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinyllm._internal.checks import check_choice, check_heads, check_int, check_positive, check_probability

ACTIVATIONS = ("relu", "gelu", "gelu_tanh")
POSITIONS = ("sinusoidal", "learned")


@dataclass(frozen=True)
class SimpleLLMConfig:
    """Everything that decides a SimpleLLM's shape and outputs, besides its weights.

    The defaults are the article's model. Checked when made, and a round trip through JSON:
    `SimpleLLMConfig.from_json(config.to_json()) == config`.

    Args:
        vocab_size: V, how many token ids there are.
        embedding_dim: D, how many numbers stand for a token.
        hidden_dim: the width between the two layers of a block's feed_forward.
        num_layers: how many transformer blocks; 0 leaves embedding and output.
        num_heads: attention heads, each of D / num_heads columns. More than one adds an output
            projection, as in `nn.MultiheadAttention`.
        causal: a token sees itself and earlier ones only. For a model that is trained on whole
            sequences at once, each token predicting the next.
        max_seq_len: the longest sequence; also the rows of the position table.
        dropout: probability of dropping an element of the embedded input, of the attention weights
            and of each residual branch, in training.
        activation: of feed_forward: "relu", "gelu" (the exact one) or "gelu_tanh" (its approximation by tanh, which
            GPT-2 was trained with: "gelu_new" of Hugging Face).
        norm_first: normalise before attention and feed_forward instead of after each sum, with a
            final norm before the output. Deep models train more easily so.
        bias: whether linear layers and norms have one.
        tie_embeddings: output and embedding share one weight (Press and Wolf, 2017).
        position: "sinusoidal" (a fixed table) or "learned".
        norm_eps: added to the variance by every norm.
        output_bias: whether the output has a bias where the other linear layers have one. GPT-2's has none.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range, or embedding_dim not divisible by num_heads.
    """

    vocab_size: int
    embedding_dim: int
    hidden_dim: int
    num_layers: int
    num_heads: int = 1
    causal: bool = False
    max_seq_len: int = 5000
    dropout: float = 0.0
    activation: str = "relu"
    norm_first: bool = False
    bias: bool = True
    tie_embeddings: bool = False
    position: str = "sinusoidal"
    norm_eps: float = 1e-5
    output_bias: bool = True

    def __post_init__(self) -> None:
        def keep(name: str, value: object) -> None:  # as a plain int or float, which JSON can hold
            object.__setattr__(self, name, value)

        for name in ("vocab_size", "embedding_dim", "hidden_dim", "num_heads", "max_seq_len"):
            keep(name, check_int(name, getattr(self, name), 1))
        keep("num_layers", check_int("num_layers", self.num_layers, 0))
        keep("dropout", check_probability("dropout", self.dropout))
        keep("norm_eps", check_positive("norm_eps", self.norm_eps))
        for name in ("causal", "norm_first", "bias", "tie_embeddings", "output_bias"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}; it must be True or False")
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("position", self.position, POSITIONS)
        check_heads(self.embedding_dim, self.num_heads)

    def to_dict(self) -> dict[str, Any]:
        """Return every field by its name, as plain ints, floats, bools and strings."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SimpleLLMConfig:
        """Return the config with these fields; fields that have a default may be left out.

        Raises:
            TypeError: `values` is no mapping, or a value is of the wrong type.
            ValueError: a field is unknown, missing or out of range.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"a config is a mapping of field names to values; this is {values!r}")
        fields = dataclasses.fields(cls)
        names = [field.name for field in fields]
        if unknown := [name for name in values if name not in names]:
            raise ValueError(f"a config has no field {_listed(unknown)}; it has {_listed(names)}")
        required = [field.name for field in fields if field.default is dataclasses.MISSING]
        if missing := [name for name in required if name not in values]:
            raise ValueError(f"the config lacks {_listed(missing)}; it must have {_listed(required)}")
        return cls(**values)

    def to_json(self) -> str:
        """Return the fields as a JSON object, one on each line."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> SimpleLLMConfig:
        """Return the config of a `to_json` text. Raises ValueError if it is not a JSON object; else see `from_dict`."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"the config is not JSON, or is truncated: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"the config must be a JSON object; this is {values!r}")
        return cls.from_dict(values)


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names)
