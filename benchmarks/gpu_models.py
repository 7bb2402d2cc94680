"""The rows of models on a GPU: by the clock on the wall, as a program sees them."""

from __future__ import annotations

from functools import partial

import torch

from . import bench_model, work
from .gpu_row import TRITON, WALL, Cut, GpuRow, Source
from .harness import COMPILED, EAGER, FLOPS, OURS, STEP, Case, Outputs, Provider

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


def rows(source: Source, cut: Cut) -> list[GpuRow]:
    """Training steps, by whatever serves each operator best and by Triton alone."""
    gpt2 = ((cut(768, 32), cut(3072, 64), cut(12, 1)), (cut(8, 2), cut(1024, 16), cut(50257, 65)))
    article = [
        ((cut(size, 32 << i), cut(hidden, 64), cut(layers, 1)), (cut(batch, 2), cut(length, 16), cut(classes, 65)))
        for i, ((size, hidden, layers), (batch, length, classes)) in enumerate(bench_model.ARTICLE[1:])
    ]
    return [
        row
        for graph in (False, True)
        for row in (
            _model_row(source, *gpt2, graph=graph, scaled=True, num_heads=cut(12, 2)),
            *(_model_row(source, *sizes, graph=graph, scaled=False) for sizes in article),
        )
    ]


def captured(provider: Provider) -> Provider:
    """The provider's call as a CUDA graph, captured at the first call."""
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


def _model_row(
    source: Source,
    sizes: tuple[int, int, int],
    data: tuple[int, int, int],
    graph: bool,
    scaled: bool,
    num_heads: int = 1,
) -> GpuRow:
    batch, length, classes = data

    def build() -> Case:
        ours, theirs = (
            model.to(source.device) for model in bench_model.pair(sizes, classes, length, scaled, num_heads)
        )
        tokens = source.randint(classes, batch, length + 1)
        ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        make = partial(bench_model.model_provider, direction=STEP, ids=ids, targets=targets)

        def exact() -> Outputs:
            # A model as large as GPT-2 in float32, which is as good as exact beside bfloat16.
            model = bench_model.pair(sizes, classes, length, scaled, num_heads)[1].to(source.device)
            provider = make(model if scaled else model.double())
            return provider.normal_form(provider.call())

        providers = {
            OURS: make(ours, autocast=scaled),
            TRITON: make(ours, autocast=scaled),
            EAGER: make(theirs, autocast=scaled),
            COMPILED: make(theirs, autocast=scaled, compiled=True),
        }
        if graph:
            providers = {name: captured(provider) for name, provider in providers.items()}
        return Case(providers, exact)

    return GpuRow(
        section="model",
        operation=("GPT-2's size" if scaled else "article's model") + (", CUDA graph" if graph else ""),
        direction=STEP,
        shape=f"{'/'.join(map(str, sizes))} B{batch} T{length} V{classes}",
        work=work.model_flops(
            STEP,
            batch=batch,
            seq_len=length,
            vocab_size=classes,
            embedding_dim=sizes[0],
            hidden_dim=sizes[1],
            num_layers=sizes[2],
            out_proj=scaled,
            causal=scaled,
        ),
        unit=FLOPS,
        build=build,
        dtype=torch.bfloat16 if scaled else torch.float32,
        providers=(OURS, TRITON, EAGER, COMPILED),
        headline=True,
        operators=BY_TRITON,
        smooth=scaled,
        clock=WALL,
    )
