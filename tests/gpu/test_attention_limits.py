"""Attention on what 32 bits, or a dimension of a grid, do not hold."""

import pytest
import torch

from tests.gpu.device import DEVICE, draw
from tinyllm import ops
from tinyllm.kernels import attention


def results(q, k, v, grad):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = ops.scaled_dot_product_attention(*leaves)
    assert ops.last_backend() == "triton"
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("queries", [1, 20])
def test_columns_more_than_2_to_the_31_elements_apart(queries):
    """As those of a large tensor whose first dimension is the heads' size; the memory in between is not touched."""
    size, step = 16, 2**31 // 15 + 1
    memory = torch.empty(15 * step + 200, dtype=torch.float16, device=DEVICE)
    rows = {"q": queries, "k": 45, "v": 45, "grad": queries}
    near = [draw(1, 1, n, size, dtype=torch.float16, seed=i) for i, n in enumerate(rows.values())]
    far = [memory.as_strided(x.shape, (0, 0, 1, step), 50 * i).copy_(x) for i, x in enumerate(near)]
    for a, b in zip(results(*far), results(*near), strict=True):
        assert torch.equal(a, b)


class Launches:
    """Stands for a kernel: keeps the grids of its launches and runs nothing."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *arguments, **options: None


@pytest.mark.parametrize("queries", [1, 20])
def test_more_heads_than_a_grid_has_room_for_in_its_later_dimensions(queries, monkeypatch):
    """A GPU refuses more than 65,535 programs along the second and third; the first takes 2^31 - 1."""
    launches = Launches()
    for name in ("forward_kernel", "decode_kernel", "join_kernel", "delta_kernel", "keys_kernel", "queries_kernel"):
        monkeypatch.setattr(attention, name, launches)
    q, k = draw(70_000, 2, queries, 1, dtype=torch.float16), draw(70_000, 1, 3, 1, dtype=torch.float16)
    out, lse = attention.attention_fwd(q, k, k, None, False, 1.0)
    attention.attention_bwd(q, q, k, k, None, out, lse, False, 1.0)
    assert len(launches.grids) == (5 if queries == 1 else 4)
    for grid in launches.grids:
        assert grid[0] < 2**31
        assert all(programs < 2**16 for programs in grid[1:])
