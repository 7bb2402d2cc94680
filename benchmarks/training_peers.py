"""What trains beside SimpleLLM: GPT-2 as one writes it in plain PyTorch, and Hugging Face's.

Both get SimpleLLM's weights, by the names that GPT-2's modules have had since its release.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllm.config.model import SimpleLLMConfig
from tinyllm.model import SimpleLLM

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
    """A SimpleLLM's parameters, or their gradients, under GPT-2's names.

    Args:
        tensors: name in SimpleLLM -> tensor. Tied weights come once, under the embedding's name.
        transposed: the blocks' matrices lie (inputs, outputs), as Hugging Face keeps them.
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


class Block(nn.Module):
    """Pre-norm attention, all heads' projections in one product, and feed-forward."""

    def __init__(self, config: SimpleLLMConfig) -> None:
        super().__init__()
        width = config.embedding_dim
        self.num_heads = config.num_heads
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)})
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, config.hidden_dim), "c_proj": nn.Linear(config.hidden_dim, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        heads = self.attn["c_attn"](self.ln_1(x)).view(batch, tokens, 3, self.num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, T, D / heads)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attn["c_proj"](attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class PlainGPT(nn.Module):
    """The model of a causal, pre-norm SimpleLLM with GELU, learned positions and tied embeddings, in plain PyTorch:
    fused where PyTorch itself has a fused function, nothing else."""

    def __init__(self, config: SimpleLLMConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.wpe = nn.Embedding(config.max_seq_len, config.embedding_dim)
        self.h = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.embedding_dim)
        self.lm_head = nn.Linear(config.embedding_dim, config.vocab_size)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The loss. ids, targets: int64 (B, T)."""
        x = self.wte(ids) + self.wpe.weight[: ids.size(1)]
        for block in self.h:
            x = block(x)
        return F.cross_entropy(self.lm_head(self.ln_f(x)).flatten(0, 1), targets.flatten())


def plain_gpt(ours: SimpleLLM) -> PlainGPT:
    """With our weights."""
    config = ours.config
    fits = config.causal and config.norm_first and config.bias and config.tie_embeddings and config.activation == "gelu"
    if not fits or config.position != "learned" or config.num_heads == 1:
        raise ValueError(f"plain GPT has no such options: {config}")
    peer = PlainGPT(config)
    load(peer, gpt2_names(dict(ours.named_parameters())))
    return peer


class HuggingFaceLoss(nn.Module):
    """The loss of a Hugging Face model, its logits' targets being given, not shifted once more."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def hugging_face(ours: SimpleLLM) -> HuggingFaceLoss:
    """`GPT2LMHeadModel` with our weights: PyTorch's attention, and its GELU in one call instead of the eight that
    `gelu_new` takes. Our output's bias, which it lacks, is still zero.

    Raises:
        ImportError: there is no transformers.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = ours.config
    model = GPT2LMHeadModel._from_config(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_seq_len,
            n_embd=config.embedding_dim,
            n_inner=config.hidden_dim,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            activation_function="gelu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        ),
        attn_implementation="sdpa",
    )
    named = gpt2_names(dict(ours.named_parameters()), transposed=True)
    bias = named.pop("lm_head.bias", None)
    if bias is not None and bias.count_nonzero() > 0:
        raise ValueError("GPT-2's output has no bias; the model to copy has one that is not zero")
    load(model, {f"transformer.{name}": tensor for name, tensor in named.items()})
    return HuggingFaceLoss(model.train())


@torch.no_grad()
def load(model: nn.Module, named: Mapping[str, Tensor]) -> None:
    """Copy into every parameter of `model`; each must have its tensor, and each tensor its parameter."""
    parameters = dict(model.named_parameters())
    if parameters.keys() != named.keys():
        raise ValueError(f"parameters and tensors differ: {sorted(parameters.keys() ^ named.keys())}")
    for name, parameter in parameters.items():
        if parameter.shape != named[name].shape:
            raise ValueError(f"{name} is {list(parameter.shape)}, the tensor {list(named[name].shape)}")
        parameter.copy_(named[name])
