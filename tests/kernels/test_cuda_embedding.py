"""The CUDA C++ kernels of embedding: what its backward joins, and what the raw operators take."""

import pytest
import torch

from tests.helpers.backends import BACKENDS, ON_GPU, on
from tests.ops.parity import assert_same_in_a_graph
from tinyllm import ops

pytestmark = [on("cuda"), pytest.mark.usefixtures("backend")]
draw, raw, DEVICE = BACKENDS["cuda"].draw, BACKENDS["cuda"].raw, BACKENDS["cuda"].device


def test_runs_out_of_range_are_no_run():
    """At the beginning and at the end of what is sorted, over borders of blocks, and in tables of no rows at all."""
    ids = torch.tensor([-1] * 40 + [2] * 3 + [7] * 50 + [-9] * 30, device=DEVICE)
    grad = draw(len(ids), 8)
    for given in (ids, ids.int()):
        ours, _ = raw.embedding_bwd(grad, given, 4, None, True, False)
        exact = torch.zeros(4, 8, device=DEVICE)
        exact[2] = grad[40:43].sum(0)
        torch.testing.assert_close(ours, exact)
        assert raw.embedding_bwd(grad, given, 0, None, True, False)[0].shape == (0, 8)


@pytest.mark.parametrize("batch", [1, 7, 8, 9, 33, 70])
@pytest.mark.parametrize("size", [5, 8])
def test_positions_of_many_sequences(batch, size):
    grad, ids = draw(batch, 3, size), torch.zeros(batch, 3, dtype=torch.int64, device=DEVICE)
    _, ours = raw.embedding_bwd(grad, ids, 1, None, False, True)
    torch.testing.assert_close(ours, grad.sum(0), atol=2e-6, rtol=1e-5)
    assert torch.equal(ours, raw.embedding_bwd(grad, ids, 1, None, False, True)[1])


def test_what_the_kernel_refuses():
    ids, weight, positions = torch.arange(6, device=DEVICE).view(2, 3) % 4, draw(4, 5), draw(3, 5, seed=1)
    rng, grad = torch.tensor([1, 2], device=DEVICE), draw(2, 3, 5)
    forward, backward = raw.embedding_fwd, raw.embedding_bwd
    for call, words in [
        (lambda: forward(ids, weight.double(), None), "no CUDA kernel for dtype Double"),
        (lambda: forward(ids, weight, positions, 0.5, rng), "the CUDA kernel drops nothing"),
        (lambda: forward(ids, weight, positions, 0.0, rng), "the CUDA kernel drops nothing"),
        (lambda: backward(grad, ids, 4, None, True, True, 0.5, rng), "the CUDA kernel drops nothing"),
        (lambda: forward(ids.short(), weight, None), "int64 or int32 is needed"),
        (lambda: forward(ids, weight, positions[:2]), r"positions has shape \[2, 5\]; \[3, 5\] is needed"),
        (lambda: backward(grad[:1], ids, 4, None, True, True), r"grad has shape \[1, 3, 5\]"),
    ]:
        with pytest.raises(Exception, match=words):
            call()


@pytest.mark.skipif(not ON_GPU, reason="there is no GPU to capture a graph of")
@pytest.mark.parametrize("tokens", [100, 20_000])
def test_cuda_graph(tokens):
    ids = torch.arange(tokens, device=DEVICE).view(2, -1) * 7 % 50
    weight, positions = (draw(rows, 64, dtype=torch.bfloat16) for rows in (50, tokens // 2))
    leaves = weight.requires_grad_(), positions.requires_grad_()

    def step():
        y = ops.embedding(ids, weight, positions=positions)
        return y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))

    assert_same_in_a_graph(step)
