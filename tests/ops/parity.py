"""Comparisons by the parity rule, which `tinyllm.check.parity` states."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tinyllm.check.parity import error_and_allowed

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def assert_accurate(name: str, ours: Tensor, torchs: Tensor, exact: Tensor, steps: int = 2) -> None:
    assert ours.shape == exact.shape, name
    assert ours.dtype == torchs.dtype, name
    assert ours.device == torchs.device == exact.device, name
    if exact.is_meta:  # where there are no numbers
        return
    error, allowed = error_and_allowed(ours, torchs, exact, steps)
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def run(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    seed: int = 0,
    grads: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
    """Return outputs, gradients of every floating-point input, and the output gradients that were used."""
    leaves = [x.detach().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if grads is None:
        generator = torch.Generator().manual_seed(seed)
        grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    # The same numbers on every device, and each gradient where autograd wants it: beside its output.
    given = [g.to(device=o.device, dtype=o.dtype) for g, o in zip(grads, outputs, strict=True)]
    return outputs, list(torch.autograd.grad(outputs, wanted, given)), list(grads)


def outputs_and_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor | None, grads: Sequence[Tensor] | None = None
) -> list[Tensor | None]:
    """Return the outputs and the gradients of every floating input, by default of random output gradients."""
    outputs, gradients, _ = run(function, inputs, grads=grads)
    return [*(out.detach() for out in outputs), *gradients]


def second_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of the squares of a function's gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    first = torch.autograd.grad(function(*leaves).pow(2).sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)


def assert_equal(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    """Assert that two lists of tensors are the same to the bit."""
    torch.testing.assert_close(list(found), list(expected), rtol=0, atol=0, equal_nan=True)


def assert_same_bits(threads: Sequence[int], function: Callable[[], Sequence[Tensor | None]]) -> None:
    """Assert that a function returns the same bits for any of these numbers of threads."""
    before, results = torch.get_num_threads(), []
    try:
        for count in threads:
            torch.set_num_threads(count)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_equal(other, results[0])


def assert_same_in_a_graph(step: Callable[[], Sequence[Tensor]]) -> None:
    """Assert that a step gives the same bits from a CUDA graph."""
    eager = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert_equal(captured, eager)


def check_parity(
    ours: Callable[..., Tensor | tuple[Tensor, ...]],
    torchs: Callable[..., Tensor | tuple[Tensor, ...]],
    exact: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    steps: int = 2,
    output_steps: int = 2,
) -> None:
    """Compare outputs and gradients of `ours` with `exact` on float64 copies; the error of `torchs` is the measure.

    steps: of rounding that gradients may have besides; output_steps: and outputs.
    """
    before = [None if x is None else x.clone() for x in inputs]
    out, grad, used = run(ours, inputs)
    for x, y in zip(inputs, before, strict=True):
        assert x is None or x.is_meta or torch.equal(x, y), "an input was modified"
    out_torch, grad_torch, _ = run(torchs, inputs, grads=used)
    double = [x.double() if x is not None and x.is_floating_point() else x for x in inputs]
    out_exact, grad_exact, _ = run(exact, double, grads=used)
    for i, (a, b, c) in enumerate(zip(out, out_torch, out_exact, strict=True)):
        assert_accurate(f"output {i}", a, b, c, output_steps)
    for i, (a, b, c) in enumerate(zip(grad, grad_torch, grad_exact, strict=True)):
        assert_accurate(f"gradient {i}", a, b, c, steps)
