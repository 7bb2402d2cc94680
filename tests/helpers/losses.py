"""Inputs and comparisons that the losses' tests share, whatever backend they force."""

import torch
import torch.nn.functional as F

from tests.ops.parity import check_parity
from tinyllm import ops, reference


def make(draw, shape, dtype, ignored=()):
    """Logits, targets of which the rows `ignored` are, and positive class weights."""
    classes = shape[min(1, len(shape) - 1)]
    generator = torch.Generator().manual_seed(sum(shape))
    target = torch.randint(classes, shape[:1] + shape[2:] if len(shape) > 1 else (), generator=generator)
    for row in ignored:
        target[row] = -100
    logits = 3 * draw(*shape)
    return logits.to(dtype), target.to(logits.device), (0.2 + draw(classes, seed=1).abs()).to(dtype)


def compare(backend, logits, target, **options):
    """Ours against PyTorch's and the reference, loss and gradient, with a random upstream gradient."""
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    check_parity(
        lambda x: ops.cross_entropy(x, target, **options),
        lambda x: F.cross_entropy(x, target, **options),
        lambda x: reference.cross_entropy(x, target, **double),
        (logits,),
    )
    assert ops.last_backend() == backend


def values(function, logits, *arguments, **options):
    """Loss and the gradient of its sum, NaN and all."""
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, *arguments, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaf)]
