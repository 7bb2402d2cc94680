"""The whole model: the article's against the article's in plain PyTorch, and the scaled one against `peers.PlainLLM`.

A step is forward, cross-entropy and backward; the optimizer, the same for all, is left out. On a GPU steps are also
measured as CUDA graphs, and our models with whatever serves each operator best and with Triton alone.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllm import SimpleLLM, reference

from ..peers import PlainLLM, gpt2_names
from ..row import COMPILED, EAGER, FLOPS, FORWARD, OURS, STEP, TRITON, Case, Function, Outputs, Provider, Row, Target
from ..work import model_flops

# embedding_dim, hidden_dim, num_layers; B, T, V. The first is the article's own run.
ARTICLE = [((16, 32, 2), (1, 5, 6)), ((128, 512, 4), (12, 64, 65)), ((512, 2048, 4), (4, 256, 8192))]
SCALED = ((128, 512, 4), (12, 64, 4096))
GPT2 = ((768, 3072, 12), (8, 1024, 50257))
# All that models may call and Triton serves.
BY_TRITON = (
    "embedding",
    "layer_norm",
    "add_layer_norm",
    "rms_norm",
    "attention",
    "cross_entropy",
    "linear_cross_entropy",
)


def pair(
    sizes: tuple[int, int, int], vocab_size: int, seq_len: int, scaled: bool, num_heads: int
) -> tuple[SimpleLLM, nn.Module]:
    """Return our model, and the same one with the same weights in plain PyTorch. `num_heads` is the scaled one's."""
    torch.manual_seed(0)
    if not scaled:
        ours, theirs = SimpleLLM(vocab_size, *sizes), reference.SimpleLLM(vocab_size, *sizes)
        theirs.load_state_dict(ours.state_dict())
        return ours, theirs
    ours = SimpleLLM(
        vocab_size, *sizes, num_heads=num_heads, causal=True, norm_first=True, activation="gelu", max_seq_len=seq_len
    )
    return ours, PlainLLM(ours)


def model_provider(
    model: nn.Module, direction: str, ids: Tensor, targets: Tensor, compiled: bool = False, autocast: bool = False
) -> Provider:
    """Return the forward pass or the step of a model; with `autocast` in bfloat16 where PyTorch sees fit."""

    def plain_loss(ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())

    parameters = dict(model.named_parameters())
    function: Function = model if direction == FORWARD else getattr(model, "loss", plain_loss)
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
        """Return the loss, and the gradients in the order of the peer's names."""
        grads = dict(zip(parameters, outputs[1:], strict=True))
        if isinstance(model, SimpleLLM) and model.config.norm_first:
            grads = gpt2_names(grads)
        return outputs[0], *(grads[name] for name in sorted(grads))

    return Provider(forward) if direction == FORWARD else Provider(step, named)


def captured(provider: Provider) -> Provider:
    """Return the provider's call as a CUDA graph, captured at the first call."""
    graph: list[tuple[torch.cuda.CUDAGraph, Outputs]] = []

    def call() -> Outputs:
        if not graph:
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):  # what is made at a first call cannot be captured
                for _ in range(3):
                    provider.call()
            torch.cuda.synchronize()
            new = torch.cuda.CUDAGraph()
            with torch.cuda.graph(new):
                outputs = provider.call()
            graph.append((new, outputs))
        graph[0][0].replay()
        return graph[0][1]

    return Provider(call, provider.normal_form)


def _row(
    target: Target,
    operation: str,
    direction: str,
    sizes: tuple[int, int, int],
    data: tuple[int, int, int],
    scaled: bool,
    num_heads: int = 1,
    graph: bool = False,
    headline: bool = True,
) -> Row:
    batch, seq_len, vocab_size = data

    def build() -> Case:
        ours, theirs = (model.to(target.device) for model in pair(sizes, vocab_size, seq_len, scaled, num_heads))
        tokens = target.randint(vocab_size, batch, seq_len + 1)
        ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        make = partial(model_provider, direction=direction, ids=ids, targets=targets)

        def exact() -> Outputs:
            # A model as large as GPT-2 in float32, which is as good as exact beside bfloat16.
            model = pair(sizes, vocab_size, seq_len, scaled, num_heads)[1].to(target.device)
            provider = make(model if scaled and target.gpu else model.double())
            return provider.normal_form(provider.call())

        mixed = scaled and target.gpu
        providers = {
            **{name: make(ours, autocast=mixed) for name in ((OURS, TRITON) if target.gpu else (OURS,))},
            EAGER: make(theirs, autocast=mixed),
            COMPILED: make(theirs, autocast=mixed, compiled=True),
        }
        return Case({name: captured(side) for name, side in providers.items()} if graph else providers, exact)

    return target.row(
        section="model",
        operation=operation + (", CUDA graph" if graph else ""),
        direction=direction,
        shape=f"{'/'.join(map(str, sizes))} B{batch} T{seq_len} V{vocab_size}",
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
        dtype=torch.bfloat16 if scaled and target.gpu else torch.float32,
        headline=headline,
        smooth=direction == FORWARD or scaled,  # the article's model has ReLUs
        ours=(OURS, TRITON) if target.gpu else (OURS,),
        operators=BY_TRITON if target.gpu else (),
        on_wall=True,
    )


def rows(target: Target) -> list[Row]:
    if not target.gpu:
        models = [("article's model", *sizes, False, 1) for sizes in ARTICLE]
        models.append(("scaled model", *SCALED, True, 4))
        return [
            _row(target, name, direction, sizes, data, scaled, heads, headline=direction == STEP and sizes[0] == 128)
            for name, sizes, data, scaled, heads in models
            for direction in (FORWARD, STEP)
        ]

    def cut(sizes: tuple[int, ...], most: tuple[int, ...]) -> tuple[int, int, int]:
        a, b, c = map(target.cut, sizes, most)
        return a, b, c

    found = []
    for graph in (False, True):
        sizes, data = cut(GPT2[0], (32, 64, 1)), cut(GPT2[1], (2, 16, 65))
        heads = target.cut(12, 2)
        found.append(_row(target, "GPT-2's size", STEP, sizes, data, scaled=True, num_heads=heads, graph=graph))
        for i, (sizes, data) in enumerate(ARTICLE[1:]):
            sizes, data = cut(sizes, (32 << i, 64, 1)), cut(data, (2, 16, 65))
            found.append(_row(target, "article's model", STEP, sizes, data, scaled=False, graph=graph))
    return found
