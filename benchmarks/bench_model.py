"""The whole model: the article's against the article's in plain PyTorch, the scaled one against PyTorch's own layers.

A step is forward, cross-entropy and backward; the optimizer, the same for all, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllm import SimpleLLM, reference

from .harness import (
    COMPILED,
    EAGER,
    FLOPS,
    FORWARD,
    OURS,
    STEP,
    Case,
    Outputs,
    Provider,
    Row,
    each_provider,
)
from .work import model_flops

# embedding_dim, hidden_dim, num_layers; B, T, V. The first is the article's own run.
ARTICLE = [((16, 32, 2), (1, 5, 6)), ((128, 512, 4), (12, 64, 65)), ((512, 2048, 4), (4, 256, 8192))]
SCALED = ((128, 512, 4), (12, 64, 4096))
SCALED_HEADS = 4


class TorchSimpleLLM(nn.Module):
    """`tinyllm.SimpleLLM` with norm_first, causal, gelu and several heads, built of PyTorch's transformer layers."""

    mask: Tensor
    pe: Tensor

    def __init__(self, ours: SimpleLLM, seq_len: int) -> None:
        super().__init__()
        config = ours.config
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.register_buffer("pe", reference.sinusoidal_table(seq_len, config.embedding_dim))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.embedding_dim,
                config.num_heads,
                config.hidden_dim,
                dropout=0.0,
                activation=config.activation,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.embedding_dim)
        self.output = nn.Linear(config.embedding_dim, config.vocab_size)
        # With is_causal the mask is a formality: the layers then call the causal kernel without it.
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(seq_len))
        self.load_state_dict(torch_names(dict(ours.named_parameters())), strict=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.pe
        for layer in self.layers:
            x = layer(x, src_mask=self.mask, is_causal=True)
        logits: Tensor = self.output(self.norm(x))
        return logits


def torch_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SimpleLLM's parameters, or their gradients, under the names that TorchSimpleLLM gives them."""
    renamed = {
        "embedding.embedding": "embedding",
        "transformer_blocks": "layers",
        "attention.out_proj": "self_attn.out_proj",
        "feed_forward.0": "linear1",
        "feed_forward.2": "linear2",
        "final_norm": "norm",
    }
    found = {}
    for name, tensor in tensors.items():
        if ".attention.key." in name or ".attention.value." in name:
            continue  # stacked below query
        if ".attention.query." in name:
            parts = [tensors[name.replace("query", part)] for part in ("query", "key", "value")]
            name, tensor = name.replace("attention.query.", "self_attn.in_proj_"), torch.cat(parts)
            tensor = tensor.detach()
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        found[name] = tensor
    return found


def pair(
    sizes: tuple[int, int, int], vocab_size: int, seq_len: int, scaled: bool, num_heads: int = SCALED_HEADS
) -> tuple[SimpleLLM, nn.Module]:
    """Our model, and the same one with the same weights in plain PyTorch. `num_heads` is the scaled one's."""
    torch.manual_seed(0)
    if not scaled:
        ours, theirs = SimpleLLM(vocab_size, *sizes), reference.SimpleLLM(vocab_size, *sizes)
        theirs.load_state_dict(ours.state_dict())
        return ours, theirs
    ours = SimpleLLM(
        vocab_size, *sizes, num_heads=num_heads, causal=True, norm_first=True, activation="gelu", max_seq_len=seq_len
    )
    peer = TorchSimpleLLM(ours, seq_len)
    assert sum(parameter.numel() for parameter in peer.parameters()) == ours.num_parameters()
    return ours, peer


def model_provider(
    model: nn.Module, direction: str, ids: Tensor, targets: Tensor, compiled: bool = False, autocast: bool = False
) -> Provider:
    """Its forward or its step; with `autocast` in bfloat16 where PyTorch sees fit."""

    def loss_of(ids: Tensor, targets: Tensor) -> Tensor:
        if isinstance(model, SimpleLLM):
            return model.loss(ids, targets)
        return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())

    parameters = dict(model.named_parameters())
    function: Callable[..., Tensor] = model if direction == FORWARD else loss_of
    if compiled:
        function = torch.compile(function, dynamic=False)

    mixed = torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast)

    def forward() -> Outputs:
        with torch.no_grad(), mixed:
            return (function(ids),)

    def step() -> Outputs:
        with mixed:
            loss = function(ids, targets)
        return loss, *torch.autograd.grad(loss, list(parameters.values()))

    def named(outputs: Outputs) -> Outputs:
        """The loss, and the gradients in the order of the peer's names."""
        grads = dict(zip(parameters, outputs[1:], strict=True))
        if isinstance(model, SimpleLLM) and model.config.norm_first:
            grads = torch_names(grads)
        return outputs[0], *(grads[name] for name in sorted(grads))

    return Provider(forward) if direction == FORWARD else Provider(step, named)


def _row(sizes: tuple[int, int, int], data: tuple[int, int, int], direction: str, scaled: bool) -> Row:
    batch, seq_len, vocab_size = data
    shape = f"{'/'.join(map(str, sizes))} B{batch} T{seq_len} V{vocab_size}"

    def build() -> Case:
        ours, theirs = pair(sizes, vocab_size, seq_len, scaled)
        tokens = torch.randint(vocab_size, (batch, seq_len + 1), generator=torch.Generator().manual_seed(1))
        ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

        def exact() -> Outputs:
            provider = model_provider(pair(sizes, vocab_size, seq_len, scaled)[1].double(), direction, ids, targets)
            return provider.normal_form(provider.call())

        providers = {
            OURS: model_provider(ours, direction, ids, targets),
            EAGER: model_provider(theirs, direction, ids, targets),
            COMPILED: model_provider(theirs, direction, ids, targets, compiled=True),
        }
        return Case(providers, exact)

    return Row(
        section="model",
        operation="scaled model" if scaled else "article's model",
        direction=direction,
        shape=shape,
        work=model_flops(
            direction,
            batch=batch,
            seq_len=seq_len,
            vocab_size=vocab_size,
            embedding_dim=sizes[0],
            hidden_dim=sizes[1],
            num_layers=sizes[2],
            out_proj=scaled,
            causal=scaled,
        ),
        unit=FLOPS,
        build=build,
        headline=direction == STEP and sizes[0] == 128,
        smooth=direction == FORWARD or scaled,  # the article's model has ReLUs
    )


def _rows() -> list[Row]:
    models = [(*model, False) for model in ARTICLE] + [(*SCALED, True)]
    return [_row(*model[:2], direction, model[2]) for model in models for direction in (FORWARD, STEP)]


@pytest.mark.parametrize(("row", "provider"), each_provider(_rows()))
def test_model(row: Row, provider: str, report: Callable[[Row, str], None]) -> None:
    report(row, provider)
