"""Muon: momentum whose step is made orthogonal, for the matrices inside the network.

The momentum of a matrix is replaced by the nearest matrix whose singular values are all about 1, so that a step moves
it in all directions alike. A few steps of a polynomial iteration (Newton-Schulz) compute that by matrix products alone.

They are what Muon costs, and three things keep it low. All matrices of a shape are multiplied at once, since those of
a small model are too small to fill a processor one by one. Three steps do what Jordan's five do: each has the
polynomial that is best for the values the step before has left (as in Amsel et al. 2025, "The Polar Express"), and
the first one divides by a bound of the largest singular value, at most n^(1/8) times as large for n rows, which falls
out of its own products, where the Frobenius norm would leave most values far below 1. And of a matrix much wider than
high only its Gram matrix, which is small and square, goes through the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

# a, b and c of a X + b (X X^T) X + c (X X^T)^2 X. The first has the least error from 1 that an odd polynomial of degree
# 5 can have on [0.01, 1], and each other one on the range of values that the one before it leaves.
_STEPS = ((8.09337, -23.62043, 17.44615), (3.63659, -2.72193, 0.53655), (2.66130, -1.97715, 0.45262))
ERROR = 0.27  # how far from 1 they leave a singular value that is at least a hundredth of the bound
_BATCH = 1 << 22  # numbers in the matrices that are multiplied at once, which bounds the memory that they take


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for hidden matrices, together with another optimizer for all other parameters.

    The step of a matrix has the root mean square of one of AdamW's (Liu et al. 2025, "Muon is Scalable for LLM
    Training"), so the two take the same learning rate and weight decay. `torch.optim.Muon` with
    `adjust_lr_fn="match_rms_adamw"` does the same but for the iteration, which computes matrix by matrix in bfloat16.
    Here it is float32, and bfloat16 on a GPU only.

    Both are one optimizer to a caller: the other's groups come after Muon's own, which are the ones that have a
    "momentum", and its state lies in `state`.

    Args:
        matrices: those to train by Muon, float32 or bfloat16. Sharded ones are gathered for the iteration.
        rest: the optimizer of all other parameters, which has made no step yet.
        lr, weight_decay: as AdamW's.
        momentum: the decay rate of the gradient's average; the step looks ahead by one (Nesterov).
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        rest: torch.optim.Optimizer,
        *,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        own = {"params": list(matrices), "lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        if any(matrix.dim() != 2 for matrix in own["params"]):  # type: ignore[attr-defined]
            raise ValueError("Muon trains matrices only; give other parameters to the other optimizer")
        self._rest = rest
        super().__init__([own, *rest.param_groups], {})
        self._join()

    def _join(self) -> None:
        """Let the other optimizer have its groups and its state in common with this one."""
        self._rest.param_groups = self.param_groups[1:]
        self._rest.state = self.state

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_rest": self._rest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._join()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._join()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with the gradients; return what the closure does, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._join()  # a group may have been added
        group = self.param_groups[0]
        by_shape: dict[tuple[int, ...], list[Tensor]] = {}
        for matrix in group["params"]:
            if matrix.grad is not None:
                by_shape.setdefault(tuple(matrix.shape), []).append(matrix)
        for shape, matrices in by_shape.items():
            at_once = max(1, _BATCH // max(1, math.prod(shape)))
            for first in range(0, len(matrices), at_once):
                self._step(matrices[first : first + at_once], group)
        self._rest.step()
        return loss

    def _step(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """Take a step with matrices of one shape."""
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix, memory_format=torch.preserve_format)
        momenta = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
        updates = orthogonalize(torch.stack([_gathered(update) for update in ahead])).to(matrices[0].dtype)
        rms = 0.2 * math.sqrt(max(matrices[0].shape))
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        shares = [_share_of(update, matrix) for update, matrix in zip(updates, matrices, strict=True)]
        torch._foreach_add_(matrices, shares, alpha=-group["lr"] * rms)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return each matrix with its singular values brought near to 1, see `ERROR`. matrices: (N, rows, columns)."""
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    gram = torch.bmm(x, x.mT)
    trace = _diagonal(gram).sum(1)[:, None, None].clamp(min=1e-30)
    gram = gram / trace
    square = torch.bmm(gram, gram)
    # The norm of the square is the root of the sum of all singular values to the 8th power.
    norm = torch.linalg.vector_norm(square, dim=(1, 2), keepdim=True).clamp(min=1e-14)
    scale = (trace * norm.sqrt()).rsqrt()
    gram, square = gram / norm.sqrt(), square / norm
    # Of a wide matrix the small Gram matrix alone goes through the steps, unless 16 bits are too few for its values.
    wide = 2 * x.size(1) <= x.size(2) and x.dtype == torch.float32
    x, product = x if wide else x * scale, scale
    for i, (a, b, c) in enumerate(_STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) if i else b * gram + c * square
        _diagonal(factor).add_(a)
        if wide:
            product = torch.bmm(factor, product) if i else factor * scale
        else:
            x = torch.bmm(factor, x)
        if i + 1 < len(_STEPS):
            gram = torch.bmm(torch.bmm(factor, gram), factor) if wide else torch.bmm(x, x.mT)
    x = torch.bmm(product, x) if wide else x
    return x.mT if tall else x


def _diagonal(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2)


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _share_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return the part of a tensor, which all processes have, that this one holds of `like`."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.contiguous(), like.device_mesh, like.placements, src_data_rank=None)
