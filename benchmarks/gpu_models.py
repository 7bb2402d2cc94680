"""The rows of models on a GPU, and of what a launch costs: by the clock on the wall, as a program sees them."""

from __future__ import annotations

import importlib
from functools import partial

import torch

from . import bench_layer_norm, bench_model, work
from .gpu_row import WALL, Cut, Function, GpuRow, Source
from .harness import BYTES, COMPILED, EAGER, FLOPS, FORWARD, OURS, STEP, Case, Outputs, Provider

LAUNCHER, LAUNCH = f"{OURS}, its launcher", f"{OURS}, Triton's launch"


def rows(source: Source, cut: Cut) -> list[GpuRow]:
    """Training steps, and a call of layer_norm on next to nothing."""
    return [*_model_rows(source, cut), _launch_row(source)]


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


def _model_rows(source: Source, cut: Cut) -> list[GpuRow]:
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
        headline=True,
        smooth=scaled,
        clock=WALL,
    )


def _launch_row(source: Source) -> GpuRow:
    """What a call costs whose work is nothing: Python, dispatcher and driver."""
    n, c = 16, 128

    def build() -> Case:
        kernels = importlib.import_module("tinyllm.kernels.layer_norm")
        x, weight, bias = source.randn(n, c), source.randn(c), source.randn(c)
        outputs = kernels.layer_norm_fwd(x, [c], weight, bias, 1e-5)
        compiled = torch.compile(bench_layer_norm.torch_layer_norm, dynamic=False)

        def launch() -> Outputs:
            kernels.forward_kernel[(n,)](
                x, None, weight, bias, outputs[0], None, *outputs[1:], c, 0, n, c, 1e-5,
                CENTERED=True, ROWS=1, BLOCK=c, COMPUTE=kernels.triton_compute_dtype(x.dtype), num_warps=1,
            )  # fmt: skip
            return (outputs[0],)

        @torch.no_grad()
        def of(function: Function) -> Outputs:
            return (function(x, weight, bias),)

        def exact() -> Outputs:
            return (bench_layer_norm.torch_layer_norm(x.double(), weight.double(), bias.double()),)

        return Case(
            {
                OURS: Provider(partial(of, bench_layer_norm.layer_norm)),
                EAGER: Provider(partial(of, bench_layer_norm.torch_layer_norm)),
                COMPILED: Provider(partial(of, compiled)),
                LAUNCHER: Provider(
                    lambda: kernels.layer_norm_fwd(x, [c], weight, bias, 1e-5), lambda outputs: outputs[:1]
                ),
                LAUNCH: Provider(launch),
            },
            exact,
        )

    return GpuRow(
        section="launch",
        operation="layer_norm",
        direction=FORWARD,
        shape=f"{n}x{c}",
        work=0,
        unit=BYTES,
        build=build,
        dtype=torch.bfloat16,
        providers=(OURS, EAGER, COMPILED, LAUNCHER, LAUNCH),
        headline=True,
        operators=("layer_norm",),
        clock=WALL,
    )
