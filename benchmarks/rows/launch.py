"""Rows of what a launch costs on a GPU: calls with next to no work, in wall-clock time, beside the time that the GPU is
busy. Python, dispatcher and driver are the rest."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch

from ..row import BYTES, COMPILED, CUDA, FORWARD, TRITON, Case, Function, Outputs, Provider, Row, Target
from .attention import CUDNN, FLASH, Shape, build_decode
from .norms import layer_norm, torch_layer_norm

# What our calls consist of: the operator without the function before it, and what Triton does behind its own.
OPERATOR, LAUNCHER, LAUNCH = f"{CUDA}, its operator", f"{TRITON}, its operator", f"{TRITON}, its launch"


def _call(function: Function, *arguments: Any) -> Outputs:
    # No argument requires a gradient, so that autograd need not be switched off, which would cost as much as a launch.
    return (function(*arguments),)


def _build_layer_norm(target: Target, n: int, c: int, with_parts: bool) -> Case:
    x, weight, bias = target.randn(n, c), target.randn(c), target.randn(c)
    functions = target.sides(layer_norm, torch_layer_norm)
    functions[COMPILED] = torch.compile(torch_layer_norm, dynamic=False)
    providers = {name: Provider(partial(_call, function, x, weight, bias)) for name, function in functions.items()}
    return Case(
        {**providers, **(_parts(x, weight, bias) if with_parts else {})},
        lambda: (torch_layer_norm(x.double(), weight.double(), bias.double()),),
    )


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

    def operator(namespace: str) -> Provider:
        call = partial(getattr(torch.ops, namespace).layer_norm_fwd, x, [c], weight, bias, 1e-5)
        return Provider(call, lambda outputs: outputs[:1])

    return {OPERATOR: operator("tinyllm"), LAUNCHER: operator("tinyllm_triton"), LAUNCH: Provider(launch)}


def rows(target: Target) -> list[Row]:
    """Return the rows of layer_norm from almost nothing up to a few MB, and of one step of a decoder."""
    if not target.gpu:
        return []
    cut = target.cut
    found: list[tuple[str, str, str, partial[Case]]] = []
    for n, c, with_parts in [
        (16, 128, True),
        (cut(4096, 32), cut(768, 33), False),
        (cut(1024, 16), cut(768, 33), False),
        (cut(256, 8), cut(768, 33), False),
    ]:
        found.append(("layer_norm", "layer_norm", f"{n}x{c}", partial(_build_layer_norm, target, n, c, with_parts)))
    shape, key_heads = Shape(1, cut(32, 4), cut(4096, 32), cut(128, 32)), cut(8, 2)
    text = f"B1 H{shape.heads}/{key_heads} T{shape.seq_len} D{shape.head_dim}"
    found.append(
        ("attention", "one query's attention", text, partial(build_decode, target, shape, key_heads, (FLASH, CUDNN)))
    )
    return [
        target.row(
            operator,
            section="launch",
            operation=f"a call of {what},",
            direction=FORWARD,
            shape=shape_text,
            work=0,
            unit=BYTES,
            build=build,
            headline=True,
            on_wall=True,
            shows_gpu_time=True,
        )
        for operator, what, shape_text, build in found
    ]
