"""gated_activation on NVIDIA GPUs: activation(gate) * up in one pass over memory, and both gradients in another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activated, activation_slope
from .launch import cdiv, launch_options

BLOCK = 1024  # elements of a program


@triton.jit
def forward_kernel(gate, up, out, n, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (activated(g, ACTIVATION) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(grad, gate, up, grad_gate, grad_up, n, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    dy = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_gate + at, (dy * u * activation_slope(g, ACTIVATION)).to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + at, (dy * activated(g, ACTIVATION)).to(grad_up.dtype.element_ty), mask=inside)


def gated_activation_fwd(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    g, u = gate.contiguous(), up.contiguous()
    out = torch.empty_like(g)
    if out.numel() > 0:
        forward_kernel[(cdiv(out.numel(), BLOCK),)](
            g, u, out, out.numel(), ACTIVATION=activation, BLOCK=BLOCK, **launch_options(4)
        )
    return out


def gated_activation_bwd(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dy, g, u = grad.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up = torch.empty_like(g), torch.empty_like(g)
    if g.numel() > 0:
        backward_kernel[(cdiv(g.numel(), BLOCK),)](
            dy, g, u, grad_gate, grad_up, g.numel(), ACTIVATION=activation, BLOCK=BLOCK, **launch_options(4)
        )
    return grad_gate, grad_up
