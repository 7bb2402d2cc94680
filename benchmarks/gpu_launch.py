"""The rows of what a launch costs on a GPU: calls with next to no work, by the clock on the wall, and beside it for how
long the GPU is busy. Python, dispatcher and driver are the rest."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch

from . import bench_layer_norm
from .gpu_operators import CUDNN, FLASH, build_decode
from .gpu_row import CUDA, OF_TRITON, TRITON, WALL, Cut, Function, GpuRow, Source, by_backends, part
from .harness import BYTES, COMPILED, EAGER, FORWARD, Case, Outputs, Provider

# What our calls consist of: the operator without the function before it, and what Triton does behind its own.
OPERATOR, LAUNCHER, LAUNCH = part(CUDA, "its operator"), part(TRITON, "its operator"), part(TRITON, "its launch")
PARTS = (OPERATOR, LAUNCHER, LAUNCH)


def rows(source: Source, cut: Cut) -> list[GpuRow]:
    """layer_norm from almost nothing up to the size that is to take half of Triton's time; one step of a decoder."""
    sizes = [(4096, 768), (1024, 768), (256, 768)]
    return [
        _layer_norm_row(source, 16, 128, PARTS),
        *(_layer_norm_row(source, cut(n, 32 >> i), cut(c, 33), ()) for i, (n, c) in enumerate(sizes)),
        _decode_row(source, cut),
    ]


def _layer_norm_row(source: Source, n: int, c: int, parts: tuple[str, ...]) -> GpuRow:
    def build() -> Case:
        x, weight, bias = source.randn(n, c), source.randn(c), source.randn(c)
        functions: dict[str, Function] = {
            **by_backends(bench_layer_norm.layer_norm),
            EAGER: bench_layer_norm.torch_layer_norm,
            COMPILED: torch.compile(bench_layer_norm.torch_layer_norm, dynamic=False),
        }
        providers = {name: Provider(partial(_call, function, x, weight, bias)) for name, function in functions.items()}
        if parts:
            providers |= _parts(x, weight, bias)

        def exact() -> Outputs:
            return (bench_layer_norm.torch_layer_norm(x.double(), weight.double(), bias.double()),)

        return Case(providers, exact)

    return _row(
        "layer_norm",
        f"{n}x{c}",
        build,
        providers=(CUDA, TRITON, EAGER, COMPILED, *parts),
        operators=("layer_norm",),
        goals={OF_TRITON: 0.5},
    )


def _call(function: Function, *arguments: Any) -> Outputs:
    # No argument requires a gradient, so that autograd need not be switched off, which would cost as much as a launch.
    return (function(*arguments),)


def _parts(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> dict[str, Provider]:
    n, c = x.shape
    kernels = importlib.import_module("tinyllm.kernels.layer_norm")
    made: list[Outputs] = []

    def launch() -> Outputs:
        if not made:
            made.append(kernels.layer_norm_fwd(x, [c], weight, bias, 1e-5))
        outputs = made[0]
        kernels.forward_kernel[(n,)](
            x, None, weight, bias, outputs[0], None, *outputs[1:], c, 0, n, c, 1e-5,
            CENTERED=True, ROWS=1, BLOCK=c, COMPUTE=kernels.triton_compute_dtype(x.dtype), num_warps=1,
        )  # fmt: skip
        return (outputs[0],)

    return {
        OPERATOR: Provider(
            lambda: torch.ops.tinyllm.layer_norm_fwd(x, [c], weight, bias, 1e-5), lambda outputs: outputs[:1]
        ),
        LAUNCHER: Provider(
            lambda: torch.ops.tinyllm_triton.layer_norm_fwd(x, [c], weight, bias, 1e-5), lambda outputs: outputs[:1]
        ),
        LAUNCH: Provider(launch),
    }


def _decode_row(source: Source, cut: Cut) -> GpuRow:
    batch, heads, key_heads, length, size = 1, cut(32, 4), cut(8, 2), cut(4096, 32), cut(128, 32)

    def build() -> Case:
        case = build_decode(source, batch, heads, key_heads, length, size, with_flex=False)
        return Case({name: case.providers[name] for name in (CUDA, TRITON, EAGER, FLASH, CUDNN)}, case.exact)

    return _row(
        "one query's attention",
        f"B{batch} H{heads}/{key_heads} T{length} D{size}",
        build,
        providers=(CUDA, TRITON, EAGER, FLASH, CUDNN),
        operators=("attention",),
    )


def _row(operation: str, shape: str, build: Any, **options: Any) -> GpuRow:
    return GpuRow(
        section="launch",
        operation=f"a call of {operation},",
        direction=FORWARD,
        shape=shape,
        work=0,
        unit=BYTES,
        build=build,
        dtype=torch.bfloat16,
        headline=True,
        clock=WALL,
        shows_gpu_time=True,
        **options,
    )
