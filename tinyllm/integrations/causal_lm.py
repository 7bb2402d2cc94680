"""SimpleLLM as a causal language model of transformers: its config, its generate, its trainer, its files."""

from __future__ import annotations

import dataclasses
import math
import os
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from tinyllm import _fused
from tinyllm._internal.files import write_text
from tinyllm.config.model import SimpleLLMConfig
from tinyllm.integrations import losses
from tinyllm.integrations.attention import attention as attend
from tinyllm.integrations.cache import append
from tinyllm.model import SimpleLLM, last_of_branches
from tinyllm.nn import LearnedPositionalEncoding, PositionalEncoding, SelfAttention, TransformerBlock
from tinyllm.pretrained.own import MODEL_TYPE
from tinyllm.quantization import weights_of
from tinyllm.reference import sinusoidal_table

# This file lies beside a saved model, so that `trust_remote_code=True` finds the classes in a program that has not
# imported this module; tinyllm has to be installed there, too.
CODE_FILE = f"modeling_{MODEL_TYPE}.py"
CODE = "from tinyllm.integrations.transformers import TinyLLMConfig, TinyLLMForCausalLM  # noqa: F401\n"

_FIELDS = tuple(field.name for field in dataclasses.fields(SimpleLLMConfig))
# The sizes of the smallest GPT-2, as configs of transformers have those of some known model.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "embedding_dim": 768,
    "hidden_dim": 3072,
    "num_layers": 12,
    "num_heads": 12,
    "causal": True,
    "max_seq_len": 1024,
    "activation": "gelu_tanh",
    "norm_first": True,
    "tie_embeddings": True,
    "position": "learned",
    "output_bias": False,
}
# Newer versions of transformers call it "cache" wherever older ones call it "past_key_values".
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class TinyLLMConfig(PreTrainedConfig):
    """The config of a `TinyLLMForCausalLM`.

    Args:
        values: the fields of `tinyllm.SimpleLLMConfig`, or transformers' names of them (hidden_size, ...); what is
            missing is as in the smallest GPT-2. `initializer_range`: the standard deviation of new weights, 0.02.
            Others as `PreTrainedConfig` takes them.

    Raises:
        TypeError, ValueError: as `SimpleLLMConfig`; or causal is False.
    """

    model_type = MODEL_TYPE
    attribute_map = {  # noqa: RUF012
        "hidden_size": "embedding_dim",
        "intermediate_size": "hidden_dim",
        "max_position_embeddings": "max_seq_len",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "tie_word_embeddings": "tie_embeddings",
    }

    def __init__(self, **values: Any) -> None:
        values = {self.attribute_map.get(name, name): value for name, value in values.items()}
        given = {name: values.pop(name) for name in _FIELDS if name in values}
        described = SimpleLLMConfig(**_DEFAULTS | given)
        if not described.causal:
            raise ValueError("causal is False; a causal language model of transformers hides later tokens")
        self.initializer_range = values.pop("initializer_range", 0.02)
        self.use_cache = values.pop("use_cache", True)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self, name, values.pop(name, None))
        values["auto_map"] = {
            "AutoConfig": f"{Path(CODE_FILE).stem}.TinyLLMConfig",
            "AutoModelForCausalLM": f"{Path(CODE_FILE).stem}.TinyLLMForCausalLM",
        }
        super().__init__(**values)
        for name, value in described.to_dict().items():
            setattr(self, name, value)

    @classmethod
    def from_simple(cls, config: SimpleLLMConfig, **values: Any) -> TinyLLMConfig:
        """Return the config of a `SimpleLLM`, with further values."""
        return cls(**config.to_dict(), **values)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the config of a config.json; see `PreTrainedConfig.from_dict`. ValueError: a field is missing."""
        if missing := [name for name in _FIELDS if name not in config_dict]:
            raise ValueError(f"the config of a tinyllm model has no {', '.join(missing)}")
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return all values, also by the names that transformers has for them, as libraries around it look there."""
        return super().to_dict() | {theirs: getattr(self, theirs) for theirs in self.attribute_map}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the values that a config.json gets, each once."""
        values = super().to_diff_dict()
        return {name: value for name, value in values.items() if name not in self.attribute_map}

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: `CODE_FILE` leads to this class, and a copy of its source would be another version's one day."""

    def to_simple(self) -> SimpleLLMConfig:
        """Return the `SimpleLLMConfig` with these fields."""
        return SimpleLLMConfig(**{name: getattr(self, name) for name in _FIELDS})


class TinyLLMForCausalLM(PreTrainedModel, GenerationMixin):
    """A `SimpleLLM` for `AutoModelForCausalLM`: `generate`, `Trainer`, adapters, `save_pretrained`.

    Attributes:
        model: the `SimpleLLM`.
    """

    config_class = TinyLLMConfig
    config: TinyLLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _tied_weights_keys = {"model.output.weight": "model.embedding.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: TinyLLMConfig) -> None:
        super().__init__(config)
        self.model = SimpleLLM.from_config(config.to_simple())
        self._match_positions()
        self.loss_function = losses.causal_lm
        self.post_init()

    @classmethod
    def from_simple(cls, model: SimpleLLM, **values: Any) -> TinyLLMForCausalLM:
        """Return a model of transformers that has this SimpleLLM as its `model`, weights shared.

        Args:
            model: causal.
            values: further ones for the config, such as eos_token_id.

        Raises:
            ValueError: causal is False.
        """
        config = TinyLLMConfig.from_simple(model.config, dtype=next(model.parameters()).dtype, **values)
        with torch.device("meta"):
            made = cls(config)
        made.model = model
        return made.train(model.training)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model; see `PreTrainedModel.from_pretrained`."""
        found = super().from_pretrained(*args, **kwargs)
        (found[0] if isinstance(found, tuple) else found)._match_positions()
        return found

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing; see `TinyLLMConfig.register_for_auto_class`."""

    def _match_positions(self) -> None:
        """Give the table of sinusoidal positions, a buffer, the dtype of the weights."""
        self.model.positional_encoding.to(next(self.parameters()).dtype)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Compute logits, and the loss of labels, as the causal language models of transformers do.

        Args:
            input_ids: (B, T); or inputs_embeds (B, T, D) instead, without positions.
            attention_mask: (B, S), 0 at padding on either side, S counting the cache's tokens; or (B or 1, 1, T, S),
                bool or added to the scores.
            position_ids: (B or 1, T); default: those that follow the cache's. With neither a cache nor a mask, another
                sequence begins where they begin anew.
            cache, past_key_values: a cache of transformers; the newer name, and the older one.
            labels: (B, T), -100 where there is none; the loss is that of each next token.
            logits_to_keep: compute logits of the last so many tokens only; 0: of all.
            kwargs: for the loss: num_items_in_batch, shift_labels.

        Returns:
            loss, logits (B, T, V), the cache, hidden_states: the blocks' inputs and what comes before the output layer.

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds are given, output_attentions is asked for
                (attention weights are never stored), or, on a CPU, a position is not in 0 .. max_seq_len - 1.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids and inputs_embeds are both given, or neither is; exactly one is needed")
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions is True; the kernels never store attention weights")
        cache = cache if cache is not None else past_key_values
        recompute = self.model.gradient_checkpointing and self.training and torch.is_grad_enabled()
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and cache is None and not recompute:
            cache = DynamicCache()
        hidden: list[Tensor] | None = [] if output_hidden_states or self.config.output_hidden_states else None
        whole = cache is None and position_ids is None and inputs_embeds is None and hidden is None
        if whole and attention_mask is None:
            features = self.model.features(cast(Tensor, input_ids))
        else:
            features = self._features(input_ids, inputs_embeds, attention_mask, position_ids, cache, hidden, recompute)
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = _fused.call_linear(self.model.output, features[:, rows])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.size(-1), **kwargs)
        states = None if hidden is None else (*hidden, features)
        out = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=states, **{_CACHE: cache})
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return out if as_dict else out.to_tuple()

    def _features(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
        hidden: list[Tensor] | None,
        recompute: bool,
    ) -> Tensor:
        """Return what comes before the output layer, (B, T, D); the blocks' inputs are appended to `hidden`."""
        model = self.model
        embeds = cast(Tensor, model.embedding(input_ids) if inputs_embeds is None else inputs_embeds)
        past = 0 if cache is None else cache.get_seq_length()
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{_CACHE: cache},
        )
        if position_ids is None:
            position_ids = torch.arange(embeds.size(1), device=embeds.device).unsqueeze(0) + past
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(embeds.dtype)
        x: Any = model.dropout(embeds + self._positions(position_ids).to(embeds.dtype))
        for index, block in enumerate(cast("list[TransformerBlock]", [*model.transformer_blocks])):
            if hidden is not None:
                hidden.append(x[0] + x[1] if isinstance(x, tuple) else x)
            if cache is not None:
                x = block(x, None, partial(_attend, block.attention, mask, cache, index))
            else:
                x = checkpoint(block, x, mask, use_reentrant=False) if recompute else block(x, mask)
        if model.final_norm is None:
            return cast(Tensor, x)
        return cast(Tensor, model.final_norm(*x)[0] if isinstance(x, tuple) else model.final_norm(x))

    def _positions(self, position_ids: Tensor) -> Tensor:
        """Return what is added at positions (B or 1, T): (B or 1, T, D)."""
        table = self.model.positional_encoding.rows(self.config.max_seq_len)
        if position_ids.device.type == "cpu" and not torch.compiler.is_compiling() and position_ids.numel() > 0:
            for found in (int(position_ids.max()), int(position_ids.min())):
                if not 0 <= found < len(table):
                    raise ValueError(f"position_ids has {found}; max_seq_len is {len(table)}")
        return table[position_ids]

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding.embedding = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.output

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.output = cast(nn.Linear, new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Change how many tokens the model knows; see `PreTrainedModel.resize_token_embeddings`."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.model.config = self.config.to_simple()
        return embedding

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write config.json, model.safetensors and the file that `trust_remote_code=True` looks for; see
        `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: the model's weights are stored in fewer bits, which transformers would not find again.
        """
        if (stored := weights_of(self.model)) != "float32":
            raise ValueError(f"the model's weights are stored as {stored!r}; save the original, in float32")
        write_text(Path(save_directory, CODE_FILE), CODE)  # first, as the folder may be uploaded at once
        super().save_pretrained(save_directory, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw new weights as GPT-2's are; `init_gpt2_weights` says how."""
        std = self.config.initializer_range
        if isinstance(module, LearnedPositionalEncoding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, PositionalEncoding):
            init.copy_(module.pe, sinusoidal_table(module.max_seq_len, module.embedding_dim).unsqueeze(1))
        else:
            super()._init_weights(module)
        if any(module is last for last in last_of_branches(self.model)):
            init.normal_(cast(nn.Linear, module).weight, std=std / math.sqrt(2 * self.config.num_layers))


def _attend(
    attention: SelfAttention, mask: Tensor | None, cache: Any, index: int, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Return the attention of queries over a layer of a cache, which keys and values come into; (B, H, T, head_dim)."""
    key, value = append(cache, index, key, value)
    out, _ = attend(attention, query, key, value, mask, attention.dropout if attention.training else 0.0)
    return out.transpose(1, 2)
