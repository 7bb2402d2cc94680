"""Inputs and comparisons that the tests of attention share."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.backends import ON_GPU
from tests.ops.parity import DTYPES, check_parity, outputs_and_gradients
from tinyllm import ops, reference

F64, F32, BF16, F16 = DTYPES
# Emulated, the kernels of each family of GPUs; on a GPU, its own.
CUDA = ("cuda",) if ON_GPU else ("cuda_80", "cuda_90")
CUDA_80 = CUDA[0]
# The widest dtype that each takes.
WIDEST = {"cpp": F64, "triton": F32, "cuda": BF16, "reference": F64}
attention = ops.scaled_dot_product_attention
full_and_causal = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])


def on_cuda(values):
    """Return the cases of the CUDA C++ kernels, once for each family."""
    return dict.fromkeys(CUDA, tuple(values))


def make(backend, b, h, t, s, d, dtype=None, kv_heads=None, value_dim=None):
    """Return query, key and value, by default in the widest dtype."""
    dtype, kv_heads = dtype or WIDEST[backend.name], h if kv_heads is None else kv_heads
    sizes = (b, h, t, d), (b, kv_heads, s, d), (b, kv_heads, s, value_dim or d)
    return tuple(backend.draw(*size, dtype=dtype, seed=seed) for seed, size in enumerate(sizes, 1))


def draw_mask(backend, kind, *shape, dtype=F32):
    """Return a mask that hides no row whole: None, of bools, or of numbers to be added."""
    numbers = backend.draw(*shape, seed=4)
    if kind == "bool":
        mask = numbers > -1
        mask[..., 0] = True
        return mask
    return None if kind == "none" else numbers.to(dtype)


def hide(mask, visible):
    """Return a mask that hides what is not visible, too."""
    if mask is None:
        return visible
    return mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, -math.inf)


def below_diagonal(queries, keys, causal_offset=0, device="cpu"):
    """Return which keys each query sees, with a causal mask."""
    if isinstance(causal_offset, torch.Tensor):
        causal_offset = causal_offset.clamp(0, keys)[:, None, None, None]
    return torch.arange(keys, device=device) <= torch.arange(queries, device=device)[:, None] + causal_offset


def exact(q, k, v, mask=None, key_lengths=None, **arguments):
    """Compute the reference, which has no key lengths."""
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    if key_lengths is not None:
        mask = hide(mask, torch.arange(k.size(-2), device=k.device) < key_lengths[:, None, None, None])
    return reference.scaled_dot_product_attention(q, k, v, mask, **arguments)


def allowed_steps(backend, dtype, largest_score=16):
    """Return the rounding steps that gradients and outputs may have besides, as check_parity takes them.

    largest_score: about, in base 2: half its last bit is the error of the weights that follow from it.
    """
    steps, lost = 2, 0
    if backend.name == "triton" and dtype == F32:
        # float32 multiplies as three products of tf32 on a GPU, which keep 22 bits and not 24: a score's error may be
        # two steps of the largest one, and is in every weight.
        lost = math.ceil(2 * largest_score * math.log(2)) if backend.device == "cuda" else 0
        # The saved log-sum-exp is a number of up to 16 in base 2: half its last bit, times ln 2, is 5 steps of the
        # weights that follow from it. PyTorch's own kernels for CPUs, the measure without a GPU, keep more.
        steps = math.ceil(6 * largest_score / 16)
    return {"steps": lost + steps, "output_steps": lost + 2}


def compare(
    backend, inputs, mask=None, is_causal=False, key_lengths=None, causal_offset=0, largest_score=16, **arguments
):
    """Compare ours with PyTorch's function and the reference, outputs and gradients."""
    (queries, keys), device = (inputs[0].size(-2), inputs[1].size(-2)), backend.device
    torchs_mask, seeing = mask, 1
    shifted = isinstance(causal_offset, torch.Tensor) or causal_offset > 0
    if key_lengths is not None:
        torchs_mask = hide(torchs_mask, torch.arange(keys, device=device) < key_lengths[:, None, None, None])
    if is_causal and (torchs_mask is not None or shifted):  # PyTorch's takes one or the other
        torchs_mask = hide(torchs_mask, below_diagonal(queries, keys, causal_offset, device))
    if key_lengths is not None:  # a row that sees nothing is 0 by contract, NaN or 0 in PyTorch
        seeing = torchs_mask.any(-1, keepdim=True)
        torchs_mask = torchs_mask | ~seeing

    def torchs(q, k, v):
        causal = is_causal and torchs_mask is None
        return F.scaled_dot_product_attention(q, k, v, torchs_mask, is_causal=causal, **arguments) * seeing

    own = {"is_causal": is_causal, "causal_offset": causal_offset, **arguments}
    check_parity(
        lambda q, k, v: attention(q, k, v, mask, key_lengths=key_lengths, **own),
        torchs,
        lambda q, k, v: exact(q, k, v, mask, key_lengths, **own),
        inputs,
        **allowed_steps(backend, inputs[0].dtype, largest_score),
    )
    assert ops.last_backend() == backend.name


def assert_close_to_reference(backend, inputs, mask=None, **arguments):
    """Compare outputs and gradients with the reference in float64, where PyTorch's answer is another."""
    found = outputs_and_gradients(lambda *x: attention(*x, mask, **arguments), *inputs)
    assert ops.last_backend() == backend.name
    doubles = [x.double() for x in inputs]
    expected = outputs_and_gradients(lambda *x: exact(*x, mask, **arguments), *doubles)
    tolerance = {F64: 1e-7, F32: 1e-5}.get(inputs[0].dtype, 3e-2)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=tolerance, rtol=tolerance)
    return found[0]
