"""Attention's Triton kernels: every tile that can be chosen, how tensors are read, and what 32 bits, or a dimension of
a grid, do not hold."""

import pytest
import torch

from tests.helpers.attention import attention, compare, make
from tests.helpers.backends import BACKENDS, on
from tests.ops.parity import assert_equal, outputs_and_gradients

pytest.importorskip("triton")
from triton.tools.tensor_descriptor import TensorDescriptor

import tinyllm.kernels.attention as launchers
from tinyllm.kernels.attention import configs
from tinyllm.kernels.launch import capability

pytestmark = [on("triton"), pytest.mark.usefixtures("backend")]
draw, DEVICE = BACKENDS["triton"].draw, BACKENDS["triton"].device


EVERY_TILE = [
    pytest.param(
        kernel, element_size, width, chips, busy, tile,
        id=f"{kernel}-{width}-{chips}-{'busy' if busy else 'plain'}-{tile[:]}",
    )
    for (kernel, element_size, width, chips), lists in configs.TILES.items()
    for busy, tiles in enumerate(lists)
    for tile in dict.fromkeys(tiles)
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "element_size", "width", "chips", "busy", "tile"), EVERY_TILE)
def test_every_tile(backend, kernel, element_size, width, chips, busy, tile, monkeypatch):
    # Also those that only tuning chooses. Rows of tensors that descriptors can stand for are multiples of 16 bytes.
    descriptors, chip = chips != configs.POINTERS, capability(torch.empty(0, device=DEVICE))
    if descriptors and chip < (9, 0):
        pytest.skip("tensor descriptors are for 9.0 and later")
    size = (width or 264) - (0 if descriptors else 3)
    widths = configs.widths(kernel, size, size, element_size)
    if not configs.fits(kernel, widths, element_size, tile, bool(busy), chip):
        pytest.skip("this chip has less shared memory")
    chosen, sources, used = configs.tiles, launchers._Call.sources, []
    monkeypatch.setattr(configs, "tiles", lambda name, *rest: [tile] if name == kernel else chosen(name, *rest))
    monkeypatch.setattr(launchers._Call, "sources", lambda *a: used.append(sources(*a)) or used[-1])
    dtype = torch.float32 if element_size == 4 else torch.bfloat16
    queries, keys = tile.rows + 5, tile.columns + 7
    mask = draw(queries, keys, seed=4) > -1 if busy else None
    if busy:
        mask[:, 0] = True
    compare(backend, make(backend, 1, 1, max(queries, 17), keys, size, dtype), mask, is_causal=True)
    assert all(isinstance(source, TensorDescriptor) == descriptors for source in used[0])


def test_descriptors_and_pointers_both_serve(backend, monkeypatch):
    used = []
    sources = launchers._Call.sources
    monkeypatch.setattr(launchers._Call, "sources", lambda *a: used.append(sources(*a)) or used[-1])
    inputs = make(backend, 1, 2, 40, 50, 32, torch.bfloat16)
    out = attention(*inputs)
    assert all(isinstance(source, TensorDescriptor) for source in used[-1])
    # Rows one element further apart: no multiple of 16 bytes.
    apart = [torch.cat([x, x[..., :1]], -1)[..., :-1] for x in inputs]
    torch.testing.assert_close(attention(*apart), out)
    assert all(isinstance(source, torch.Tensor) for source in used[-1])


@pytest.mark.parametrize("queries", [1, 20])
def test_columns_more_than_2_to_the_31_elements_apart(queries):
    """A large tensor whose first dimension is head_dim has such strides; the memory in between is not touched."""
    size, step = 16, 2**31 // 15 + 1
    memory = torch.empty(15 * step + 200, dtype=torch.float16, device=DEVICE)
    rows = {"q": queries, "k": 45, "v": 45, "grad": queries}
    near = [draw(1, 1, n, size, dtype=torch.float16, seed=i) for i, n in enumerate(rows.values())]
    far = [memory.as_strided(x.shape, (0, 0, 1, step), 50 * i).copy_(x) for i, x in enumerate(near)]
    assert_equal(*(outputs_and_gradients(attention, *x[:3], grads=x[3:]) for x in (far, near)))


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
        monkeypatch.setattr(launchers, name, launches)
    q, k = draw(70_000, 2, queries, 1, dtype=torch.float16), draw(70_000, 1, 3, 1, dtype=torch.float16)
    out, lse = launchers.attention_fwd(q, k, k, None, False, 1.0)
    launchers.attention_bwd(q, q, k, k, None, out, lse, False, 1.0)
    assert len(launches.grids) == (5 if queries == 1 else 4)
    for grid in launches.grids:
        assert grid[0] < 2**31
        assert all(programs < 2**16 for programs in grid[1:])
