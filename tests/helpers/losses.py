"""Inputs and comparisons that the tests of cross_entropy share."""

import torch
import torch.nn.functional as F

from tests.ops.parity import check_parity
from tinyllm import ops, reference


def make(backend, shape, dtype=None, ignored=()):
    """Return logits, targets of which the rows `ignored` are, and positive class weights."""
    dtype = dtype or backend.dtypes[0]
    classes = shape[min(1, len(shape) - 1)]
    generator = torch.Generator().manual_seed(sum(shape))
    target = torch.randint(classes, shape[:1] + shape[2:] if len(shape) > 1 else (), generator=generator)
    for row in ignored:
        target[row] = -100
    logits = 3 * backend.draw(*shape, dtype=torch.float64)
    return logits.to(dtype), target.to(backend.device), (0.2 + backend.draw(classes, seed=1).abs()).to(dtype)


def compare(backend, logits, target, **options):
    """Compare ours with PyTorch's and the reference, loss and gradient, with a random upstream gradient."""
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    check_parity(
        lambda x: ops.cross_entropy(x, target, **options),
        lambda x: F.cross_entropy(x, target, **options),
        lambda x: reference.cross_entropy(x, target, **double),
        (logits,),
    )
    assert ops.last_backend() == backend.name


def values(function, logits, *arguments, **options):
    """Return the loss and the gradient of its sum, NaN and all."""
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, *arguments, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaf)]


def assert_pytorchs(logits, target, *arguments, **options):
    """Assert that PyTorch returns the same loss and gradient, NaN and all."""
    ours, theirs = (values(f, logits, target, *arguments, **options) for f in (ops.cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs, equal_nan=True)
