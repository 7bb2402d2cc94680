"""Every CUDA C++ operator on small shapes, forward and backward, for compute-sanitizer to watch:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m benchmarks.gpu_sanitize

Whether the results are right is the tests' affair. Without PyTorch's cache every tensor is an allocation of its own, so
that an access behind its end is seen. Inputs are drawn on the CPU: hardly any kernels but ours run, and those of others
cost a sanitizer's time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tinyllm import ops
from tinyllm.ops.backends import cuda

Call = tuple[str, Callable[[], Any], list[Tensor]]  # its name, itself, what it is differentiated by
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rows and columns: one element, ends that no vector divides, a row over several blocks.
NORMS = ((1, 1), (5, 33), (67, 768), (3, 4099), (2, 20_000))
LOSSES = ((3, 1), (9, 101), (5, 4099), (2, 50_257))
EMBEDDINGS = ((2, 7, 50, 33), (3, 65, 101, 768))
# B, query heads, key heads, queries, keys, causal: less than a tile, tiles and an end, a query on its own.
ATTENTION = (
    (1, 1, 1, 1, 1, False),
    (2, 2, 2, 77, 77, True),
    (1, 4, 2, 130, 257, False),
    (1, 1, 1, 200, 70, True),
    (2, 8, 2, 1, 1000, False),
)


class Draw:
    """Random tensors that require gradients, on a device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator).to(dtype)
        return drawn.to(self.device).requires_grad_()

    def ints(self, most: int, *shape: int) -> Tensor:
        return torch.randint(most, shape, generator=self.generator).to(self.device)


def cases(draw: Draw) -> Iterator[Call]:
    # The kernels with the most to go wrong come first, in case that the time does not suffice for all.
    for dtype in DTYPES[:2]:
        for head_dim in (64, 128):
            for shape in ATTENTION:
                yield from _attention(draw, dtype, head_dim, *shape)
    for dtype in DTYPES:
        for rows, columns in NORMS:
            yield from _norms(draw, dtype, rows, columns)
        for rows, classes in LOSSES:
            yield from _losses(draw, dtype, rows, classes)
        for sizes in EMBEDDINGS:
            yield from _embeddings(draw, dtype, *sizes)


def _norms(draw: Draw, dtype: torch.dtype, n: int, c: int) -> Iterator[Call]:
    x, residual, weight = draw(n, c, dtype=dtype), draw(n, c, dtype=dtype), draw(c, dtype=dtype)
    bias = draw(c, dtype=torch.float32)  # parameters may be of either
    shape = f"{n}x{c} {dtype}"
    yield f"layer_norm {shape}", lambda: ops.layer_norm(x, (c,), weight, bias), [x, weight, bias]
    yield f"rms_norm {shape}", lambda: ops.rms_norm(x, (c,), weight), [x, weight]
    leaves = [x, residual, weight, bias]
    yield f"add_layer_norm {shape}", lambda: ops.add_layer_norm(x, residual, (c,), weight, bias), leaves


def _losses(draw: Draw, dtype: torch.dtype, n: int, c: int) -> Iterator[Call]:
    logits, target, ignored = draw(n, c, dtype=dtype), draw.ints(c, n), draw.ints(c, n)
    ignored[0] = -100
    yield f"cross_entropy {n}x{c} {dtype}", lambda: ops.cross_entropy(logits, target), [logits]
    options: dict[str, Any] = {"reduction": "none", "label_smoothing": 0.1}
    name = f"cross_entropy, smoothed, {n}x{c} {dtype}"
    yield name, lambda: ops.cross_entropy(logits, ignored, **options), [logits]


def _embeddings(draw: Draw, dtype: torch.dtype, batch: int, length: int, classes: int, size: int) -> Iterator[Call]:
    table, positions = draw(classes, size, dtype=dtype), draw(length, size, dtype=dtype)
    ids = draw.ints(classes, batch, length)
    shape = f"{batch}x{length} V{classes} D{size} {dtype}"
    yield f"embedding {shape}", lambda: ops.embedding(ids, table), [table]
    yield f"embedding + positions {shape}", lambda: ops.embedding(ids, table, positions=positions), [table, positions]


def _attention(
    draw: Draw,
    dtype: torch.dtype,
    size: int,
    batch: int,
    heads: int,
    key_heads: int,
    queries: int,
    keys: int,
    causal: bool,
) -> Iterator[Call]:
    query = draw(batch, heads, queries, size, dtype=dtype)
    key, value = (draw(batch, key_heads, keys, size, dtype=dtype) for _ in range(2))
    lengths = draw.ints(keys + 1, batch)

    def call(key_lengths: Tensor | None) -> Tensor:
        return ops.scaled_dot_product_attention(
            query, key, value, is_causal=causal, enable_gqa=True, key_lengths=key_lengths
        )

    shape = f"B{batch} H{heads}/{key_heads} T{queries}/{keys} D{size} {dtype}"
    kind = "causal" if causal else "full"
    yield f"attention, {kind}, {shape}", lambda: call(None), [query, key, value]
    yield f"attention, {kind}, lengths of keys, {shape}", lambda: call(lengths), [query, key, value]


def run(device: str, backend: str) -> list[str]:
    """Calls everything; what failed, and why."""
    failed = []
    for name, call, leaves in cases(Draw(device)):
        print(name, flush=True)  # what the sanitizer says next is about this one
        try:
            with ops.backend(backend):
                with torch.no_grad():
                    call()
                outputs = call()
                outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
                torch.autograd.grad(outputs, leaves, [torch.ones(x.shape, dtype=x.dtype).to(device) for x in outputs])
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception as failure:
            failed.append(f"{name}: {type(failure).__name__}: {str(failure).strip().splitlines()[0]}")
    return failed


def main() -> int:
    """Returns the exit status."""
    if cuda.why_not is not None and not cuda.emulated:
        print(f"CUDA C++ is not there: {cuda.why_not}")
        return 1
    failed = run("cpu" if cuda.emulated else "cuda", "cuda")
    print(f"{len(failed)} calls failed", *failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
