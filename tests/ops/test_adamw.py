"""adamw_norm and adamw_step. tests/test_optim.py has their parity with PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.helpers.backends import cases
from tests.ops.parity import DTYPES, assert_accurate
from tinyllm import ops, reference

OPTIONS = {"lr": 0.1, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.2, "clip_coef": 0.5}


def lists(dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (), (0,), (20_000,)]
    made = [[torch.rand(shape, generator=generator).to(dtype) for shape in shapes] for _ in range(4)]
    return [*made, [torch.tensor(float(i)) for i in range(len(shapes))]]


@cases("dtype", cpp=DTYPES)
def test_it_is_the_reference(backend, dtype):
    ours, theirs = lists(dtype), lists(dtype)
    norm = ops.adamw_norm(ours[1])
    assert norm.dtype == torch.promote_types(dtype, torch.float32)
    squares = math.fsum(float(x) ** 2 for tensor in theirs[1] for x in tensor.double().flatten())
    exact = torch.tensor(math.sqrt(squares), dtype=torch.float64)
    assert_accurate("norm", norm, reference.adamw_norm(theirs[1]), exact)
    ops.adamw_step(*ours, **OPTIONS)
    reference.adamw_step(*theirs, **OPTIONS)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.any_build
def test_what_the_kernel_does_not_take():
    tensors = lists()
    tensors[1][0] = tensors[1][0].t().contiguous().t()
    expected = lists()
    reference.adamw_step(*expected, **OPTIONS)
    ops.adamw_step(*tensors, **OPTIONS)
    torch.testing.assert_close(tensors, expected)
    for other in (torch.ones(3, dtype=torch.float64), torch.ones(3).to_sparse(), torch.ones(4)[::2]):
        with ops.backend("cpp"), pytest.raises(RuntimeError, match=r"forced backend 'cpp' cannot serve"):
            ops.adamw_norm([torch.ones(3), other])


@cases("dtype", cpp=[torch.float32])
def test_raw_operators(backend, dtype):
    tensors = lists(dtype)
    torch.library.opcheck(torch.ops.tinyllm.adamw_norm.default, (tensors[1],))
    torch.library.opcheck(torch.ops.tinyllm.adamw_step.default, (*tensors, 0.1, 0.8, 0.99, 1e-6, 0.2, 0.5))


@cases("dtype", cpp=[torch.float32])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[1].pop(), "there are 3 grads; 4 are needed"),
        (lambda t: t[2].__setitem__(0, torch.ones(3, 5)), r"exp_avgs has shape \[3, 5\]; \[5, 3\] is needed"),
        (lambda t: t[3].__setitem__(1, torch.ones((), dtype=torch.float64)), "exp_avg_sqs has dtype Double"),
        (lambda t: t[0].__setitem__(0, torch.ones(3, 5).t()), "parameters are not contiguous"),
        (lambda t: t[4].__setitem__(0, torch.ones(1)), r"steps has shape \[1\]"),
        (lambda t: t[4].pop(), "there are 3 steps"),
    ],
)
def test_raw_operators_refuse_what_they_cannot_read(backend, dtype, change, message):
    tensors = lists(dtype)
    change(tensors)
    before = [step.clone() for step in tensors[4]]
    with pytest.raises(ValueError, match=message):
        torch.ops.tinyllm.adamw_step(*tensors, 0.1, 0.8, 0.99, 1e-6, 0.2, 0.5)
    torch.testing.assert_close(tensors[4], before)
