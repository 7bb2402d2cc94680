"""Peers of whole models: SimpleLLM as one writes it in plain PyTorch, and Hugging Face's GPT-2, with their optimizer.

Both get SimpleLLM's weights, by the names that GPT-2's modules have had since its release.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllm import reference
from tinyllm.config.model import SimpleLLMConfig
from tinyllm.config.training import TrainConfig
from tinyllm.model import SimpleLLM
from tinyllm.optim import AdamW
from tinyllm.training.optim import adamw

_NAMES = {
    r"^embedding\.embedding\.": "wte.",
    r"^positional_encoding\.": "wpe.",
    r"^transformer_blocks\.": "h.",
    r"\.norm([12])\.": r".ln_\1.",
    r"\.attention\.out_proj\.": ".attn.c_proj.",
    r"\.feed_forward\.0\.": ".mlp.c_fc.",
    r"\.feed_forward\.2\.": ".mlp.c_proj.",
    r"^final_norm\.": "ln_f.",
    r"^output\.": "lm_head.",
}


def gpt2_names(tensors: Mapping[str, Tensor], *, transposed: bool = False) -> dict[str, Tensor]:
    """Return a SimpleLLM's parameters, or their gradients, under GPT-2's names.

    Args:
        tensors: name in SimpleLLM -> tensor. Tied weights come once, under the embedding's name.
        transposed: whether the blocks' matrices lie (inputs, outputs), as Hugging Face keeps them.
    """
    found = {}
    for name, tensor in tensors.items():
        if ".attention.key." in name or ".attention.value." in name:
            continue  # stacked below query
        if ".attention.query." in name:
            tensor = torch.cat([tensors[name.replace("query", part)] for part in ("query", "key", "value")])
            name = name.replace(".attention.query.", ".attn.c_attn.")
        for ours, theirs in _NAMES.items():
            name = re.sub(ours, theirs, name)
        matrix = transposed and name.startswith("h.") and tensor.dim() == 2
        found[name] = tensor.t() if matrix else tensor
    return found


class PlainBlock(nn.Module):
    """Attention, the projections of all heads in one product, and feed-forward."""

    def __init__(self, config: SimpleLLMConfig) -> None:
        super().__init__()
        width, bias = config.embedding_dim, config.bias
        self.config = config
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(width, 3 * width, bias)})
        if config.num_heads > 1:
            self.attn["c_proj"] = nn.Linear(width, width, bias)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, config.hidden_dim, bias), "c_proj": nn.Linear(config.hidden_dim, width, bias)}
        )
        self.ln_1, self.ln_2 = (nn.LayerNorm(width, config.norm_eps, bias=bias) for _ in range(2))

    def forward(self, x: Tensor, cache: Tensor | None = None, past: int = 0) -> Tensor:
        if self.config.norm_first:
            x = x + self._attend(self.ln_1(x), cache, past)
            return x + self._network(self.ln_2(x))
        x = self.ln_1(x + self._attend(x, cache, past))
        normed: Tensor = self.ln_2(x + self._network(x))
        return normed

    def _attend(self, x: Tensor, cache: Tensor | None, past: int) -> Tensor:
        batch, tokens, width = x.shape
        heads = self.attn["c_attn"](x).view(batch, tokens, 3, self.config.num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, T, D / heads)
        dropout = self.config.dropout if self.training else 0.0
        is_causal = self.config.causal
        if cache is not None:  # (2, B, heads, length, D / heads)
            cache[0, :, :, past : past + tokens], cache[1, :, :, past : past + tokens] = key, value
            key, value = cache[:, :, :, : past + tokens]
            is_causal = past == 0  # a single token after others sees them all
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=is_causal)
        out = attended.transpose(1, 2).reshape(batch, tokens, width)
        return F.dropout(self.attn["c_proj"](out) if "c_proj" in self.attn else out, dropout, self.training)

    def _network(self, x: Tensor) -> Tensor:
        activation = reference.ACTIVATIONS[self.config.activation]
        out: Tensor = self.mlp["c_proj"](activation(self.mlp["c_fc"](x)))
        return F.dropout(out, self.config.dropout, self.training)


class PlainLLM(nn.Module):
    """SimpleLLM in plain PyTorch with all its options: fused where PyTorch itself has a fused function, nothing else.

    Args:
        ours: the model whose options and weights it takes.
    """

    def __init__(self, ours: SimpleLLM) -> None:
        super().__init__()
        self.config = config = ours.config
        width = config.embedding_dim
        self.wte = nn.Embedding(config.vocab_size, width)
        self.wpe = nn.Embedding(config.max_seq_len, width)
        self.h = nn.ModuleList(PlainBlock(config) for _ in range(config.num_layers))
        norm = nn.LayerNorm(width, config.norm_eps, bias=config.bias) if config.norm_first else nn.Identity()
        self.ln_f = norm
        self.lm_head = nn.Linear(width, config.vocab_size, config.bias and config.output_bias)
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight
        if config.position == "sinusoidal":  # a fixed table
            del self.wpe.weight
            self.wpe.register_buffer("weight", reference.sinusoidal_table(config.max_seq_len, width))
        copy_weights(self, gpt2_names(dict(ours.named_parameters())))

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits (B, T, V) of int64 ids (B, T)."""
        logits: Tensor = self.lm_head(self.features(ids))
        return logits

    def features(self, ids: Tensor, cache: Tensor | None = None, past: int = 0) -> Tensor:
        x = self.wte(ids) + self.wpe.weight[past : past + ids.size(1)]
        x = F.dropout(x, self.config.dropout, self.training)
        for index, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[index], past)
        features: Tensor = self.ln_f(x)
        return features

    @torch.inference_mode()
    def generate(self, ids: Tensor, max_new_tokens: int, temperature: float = 1.0, seed: int = 0) -> Tensor:
        """Continue ids (B, T) to (B, T + max_new_tokens), at most max_seq_len, as one writes it: with a cache that is
        made once, and the last position's logits only. A model that is not causal has none to keep."""
        config = self.config
        length = ids.size(1) + max_new_tokens
        if length > config.max_seq_len:
            raise ValueError(f"prompt and text have {length} tokens; max_seq_len is {config.max_seq_len}")
        head_dim = config.embedding_dim // config.num_heads
        shape = (config.num_layers, 2, ids.size(0), config.num_heads, length, head_dim)
        cache = self.wte.weight.new_empty(shape) if config.causal else None
        generator, past = torch.Generator().manual_seed(seed), 0
        for _ in range(max_new_tokens):
            logits = self.lm_head(self.features(ids[:, past:], cache, past)[:, -1])
            past = ids.size(1) if config.causal else 0
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, token], 1)
        return ids

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self(ids).flatten(0, 1), targets.flatten())


class HuggingFace(nn.Module):
    """`GPT2LMHeadModel` with the weights of a SimpleLLM: PyTorch's attention, and its GELU in one call, also the tanh
    one, for which `gelu_new` takes eight. The bias of our output, which it lacks, must still be zero.

    Raises:
        ImportError: there is no transformers.
        ValueError: the output has a bias that is not zero.
    """

    def __init__(self, ours: SimpleLLM) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        config = ours.config
        self.model: Any = GPT2LMHeadModel._from_config(
            GPT2Config(
                vocab_size=config.vocab_size,
                n_positions=config.max_seq_len,
                n_embd=config.embedding_dim,
                n_inner=config.hidden_dim,
                n_layer=config.num_layers,
                n_head=config.num_heads,
                activation_function="gelu_pytorch_tanh" if config.activation == "gelu_tanh" else config.activation,
                layer_norm_epsilon=config.norm_eps,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
            ),
            attn_implementation="sdpa",
        ).train()
        named = gpt2_names(dict(ours.named_parameters()), transposed=True)
        bias = named.pop("lm_head.bias", None)
        if bias is not None and bias.count_nonzero() > 0:
            raise ValueError("GPT-2's output has no bias; the model to copy has one that is not zero")
        copy_weights(self.model, {f"transformer.{name}": tensor for name, tensor in named.items()})

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of targets that are not shifted once more, as GPT-2's own loss would."""
        logits = self.model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def copy_weights(model: nn.Module, named: Mapping[str, Tensor]) -> None:
    """Copy into every parameter of `model`; each must have its tensor, and each tensor its parameter."""
    parameters = dict(model.named_parameters())
    if parameters.keys() != named.keys():
        raise ValueError(f"parameters and tensors differ: {sorted(parameters.keys() ^ named.keys())}")
    for name, parameter in parameters.items():
        if parameter.shape != named[name].shape:
            raise ValueError(f"{name} is {list(parameter.shape)}, the tensor {list(named[name].shape)}")
        parameter.copy_(named[name])


def torchs_adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return PyTorch's own fused AdamW, with the groups of `tinyllm train`."""
    return torch.optim.AdamW(adamw(model, config).param_groups, fused=True)


def clip_and_step(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], max_norm: float) -> None:
    """Clip the gradient's norm and take a step: in one for our optimizer, as one writes it for PyTorch's."""
    if isinstance(optimizer, AdamW):
        optimizer.clip_and_step(max_norm)
    else:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
