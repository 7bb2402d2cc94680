"""Tensors of more than 2^31 elements, whose offsets a 32-bit integer cannot hold.

Inputs are zeros that the system has not backed with memory yet: reading a page of them costs none. Rows at both ends
and around element 2^31 get numbers, and what an operator makes of them must be what it makes of those rows alone. An
offset that wrapped around would read zeros, or memory that is not there.
"""

import mmap
from pathlib import Path

import pytest
import torch

from tinyllm import ops
from tinyllm.ops import _products

BORDER = 2**31
COLUMNS = 1024
ROWS = BORDER // COLUMNS + 64
MARKED = torch.tensor([0, 1, BORDER // COLUMNS - 1, BORDER // COLUMNS, BORDER // COLUMNS + 1, ROWS - 2, ROWS - 1])
UNMARKED = torch.tensor([2, BORDER // COLUMNS - 2, BORDER // COLUMNS + 2, ROWS - 3])


@pytest.fixture(autouse=True)
def _on_the_kernel(monkeypatch):
    monkeypatch.setattr(_products, "_setting", "cpp")
    with ops.backend("cpp"):
        yield


def available_gib():
    """Memory that can be had without swapping; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20
    except (OSError, StopIteration):
        return 0.0
    try:  # a container's limit
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, (int(limit) - int(used)) / 2**30)


def needs(gib):
    available = available_gib()
    if available < gib:
        pytest.skip(f"needs {gib} GiB of free memory; {available:.1f} GiB are free")


def zeros(*shape, dtype=torch.bfloat16):
    count = torch.Size(shape).numel()
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def marked(dtype=torch.bfloat16, seed=0):
    """Return zeros (ROWS, COLUMNS) but for the marked rows."""
    x = zeros(ROWS, COLUMNS, dtype=dtype)
    x[MARKED] = torch.randn(len(MARKED), COLUMNS, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert x.numel() > BORDER
    return x


def test_layer_norm():
    needs(6)
    raw, shape, eps = torch.ops.tinyllm, [COLUMNS], 1e-5
    x, grad, weight, bias = marked(), marked(seed=1), torch.randn(COLUMNS), torch.randn(COLUMNS)
    normed, mean, rstd = raw.layer_norm_fwd(x, shape, weight, bias, eps)
    normed_few, mean_few, rstd_few = raw.layer_norm_fwd(x[MARKED], shape, weight, bias, eps)
    assert torch.equal(normed[MARKED], normed_few)
    del normed  # its memory is wanted for the gradient
    found = raw.layer_norm_bwd(grad, x, shape, weight, mean, rstd, True)
    expected = raw.layer_norm_bwd(grad[MARKED], x[MARKED], shape, weight, mean_few, rstd_few, True)
    assert torch.equal(found[0][MARKED], expected[0])
    for ours, few in zip(found[1:], expected[1:], strict=True):  # rows without a gradient add nothing
        torch.testing.assert_close(ours, few)


def test_rms_norm():
    needs(6)
    x, weight = marked(torch.float16), torch.randn(COLUMNS)
    y = ops.rms_norm(x, (COLUMNS,), weight)
    assert torch.equal(y[MARKED], ops.rms_norm(x[MARKED], (COLUMNS,), weight))


def test_embedding():
    """The table, its gradient and the result may each be so large."""
    needs(6)
    table = marked().requires_grad_()
    y = ops.embedding(MARKED, table)
    assert torch.equal(y, table[MARKED])
    (grad,) = torch.autograd.grad(y, table, y.detach())
    assert torch.equal(grad[MARKED], y)
    assert not grad[UNMARKED].any()
    del grad
    ids = (torch.arange(ROWS) * 7919) % 1000
    y = ops.embedding(ids, table.detach()[-1000:])
    assert torch.equal(y[MARKED], table[-1000:][ids[MARKED]])


def test_attention_on_strided_heads():
    """Heads, rows and masks may lie more than 2^31 elements apart, as in a slice of a large cache."""
    needs(2)
    shape, strides = (1, 2, 3, 64), (0, BORDER + 64, BORDER // 4, 1)
    size = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 1
    generator = torch.Generator().manual_seed(0)
    views, copies = [], []
    for _ in range(4):
        view = zeros(size, dtype=torch.float32).as_strided(shape, strides)
        view.copy_(torch.randn(shape, generator=generator))
        views.append(view)
        copies.append(view.clone(memory_format=torch.contiguous_format))
    mask = zeros(size, dtype=torch.bool).as_strided((1, 2, 3, 3), strides)
    mask.copy_(torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 0]], dtype=torch.bool))
    results = []
    for (q, k, v, grad), visible in ((views, mask), (copies, mask.clone())):
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = ops.scaled_dot_product_attention(*leaves, attn_mask=visible)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
        results[-1].append(ops.scaled_dot_product_attention(*leaves, is_causal=True))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_attention_reading_one_key_cache_far_apart():
    """One query, whose kernel is another."""
    needs(2)
    strides = (0, BORDER + 64, 64, 1)
    query = torch.randn(1, 2, 1, 64)
    views = [zeros(BORDER + 64 + 300 * 64, dtype=torch.float32).as_strided((1, 2, 300, 64), strides) for _ in range(2)]
    for view in views:
        view.copy_(torch.randn(1, 2, 300, 64))
    ours = ops.scaled_dot_product_attention(query, *views)
    assert torch.equal(ours, ops.scaled_dot_product_attention(query, *(view.contiguous() for view in views)))


def test_linear():
    needs(6)
    x, weight, bias = (torch.randn(*size).bfloat16() for size in ((ROWS, 4), (COLUMNS, 4), (COLUMNS,)))
    y = ops.linear(x, weight, bias)
    torch.testing.assert_close(y[MARKED], torch.nn.functional.linear(x[MARKED], weight, bias))


def test_cross_entropy():
    needs(6)
    logits, target = marked().requires_grad_(), torch.arange(ROWS) % COLUMNS
    losses = ops.cross_entropy(logits, target, reduction="none")
    few = logits.detach()[MARKED].requires_grad_()
    losses_few = ops.cross_entropy(few, target[MARKED], reduction="none")
    assert torch.equal(losses[MARKED], losses_few)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    (grad_few,) = torch.autograd.grad(losses_few.sum(), few)
    assert torch.equal(grad[MARKED], grad_few)
