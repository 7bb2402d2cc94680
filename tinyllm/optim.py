"""Optimizers: torch.optim.AdamW with its step in one kernel on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tinyllm.ops.adamw import ADAMW, step_by_kernel
from tinyllm.ops.dispatch import kernels, serves


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, whose fused step on CPUs is one kernel, and with clipping inside the step.

    The constructor, the state and the state_dict are those of `torch.optim.AdamW`; each loads the other's. The values
    are those of its fused step to rounding, and do not depend on the number of threads. What the kernel does not serve,
    PyTorch does: parameters on GPUs, sharded or not contiguous, amsgrad, a GradScaler, torch.compile.

        optimizer = tinyllm.optim.AdamW(model.parameters(), lr=3e-4)
        loss.backward()
        norm = optimizer.clip_and_step(1.0)  # instead of clip_grad_norm_ and optimizer.step()
        optimizer.zero_grad()

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, **options: as in `torch.optim.AdamW`.
        fused: True by default, unless `foreach` or `differentiable` is on, which exclude it.
    """

    _max_norm: float | None = None  # of the step under way
    _norm: Tensor  # of the last gradient that was to be clipped

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        fused: bool | None = None,
        **options: Any,
    ) -> None:
        if fused is None:
            fused = not (options.get("foreach") or options.get("differentiable"))
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, fused=fused, **options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of this class, or of torch.optim.AdamW, returned; who computes the step stays."""
        own = [group["fused"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, fused in zip(self.param_groups, own, strict=True):
            if not group["foreach"] and not group["differentiable"]:
                group["fused"] = fused

    def clip_and_step(self, max_norm: float) -> Tensor:
        """Clip the gradient's norm to `max_norm`, as `torch.nn.utils.clip_grad_norm_` does, and take a step with it.

        There is no step if the norm is not finite. Whether the gradients are clipped in place is not promised.

        Returns:
            (): the norm of all gradients together before clipping.
        """
        self._max_norm = max_norm
        try:
            self.step()  # by which hooks and schedulers learn of it
        finally:
            self._max_norm = None
        return self._norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; see `torch.optim.AdamW.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self._groups()
        if groups is None:
            self._torchs_step()
            return loss
        clip_coef = 1.0
        if self._max_norm is not None:
            grads = [grad for _, lists in groups for grad in lists[1]]
            self._norm = kernels("cpp").adamw_norm(grads) if grads else torch.zeros(())
            norm = float(self._norm)
            if not norm < float("inf"):  # NaN or infinity
                return loss
            clip_coef = min(1.0, self._max_norm / (norm + 1e-6))
        for group, lists in groups:
            step_by_kernel(
                *lists,
                lr=float(group["lr"]),
                betas=(float(group["betas"][0]), float(group["betas"][1])),
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                clip_coef=-clip_coef if group["maximize"] else clip_coef,
            )
        return loss

    def _groups(self) -> list[tuple[dict[str, Any], list[list[Tensor]]]] | None:
        """Return each group with parameters, gradients, moments and steps; None where the kernel does not serve one."""
        scaled = any(getattr(self, name, None) is not None for name in ("grad_scale", "found_inf"))
        if scaled or torch.compiler.is_compiling():
            return None
        found = []
        for group in self.param_groups:
            if not group["fused"] or group["amsgrad"] or group["capturable"] or group["differentiable"]:
                return None
            lists: list[list[Tensor]] = [[], [], [], [], []]
            parameters, grads, exp_avgs, exp_avg_sqs, steps = lists
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                parameters.append(parameter)
                grads.append(grad)
                exp_avgs.append(state["exp_avg"])
                exp_avg_sqs.append(state["exp_avg_sq"])
                steps.append(state["step"])
                if state["step"].dtype != torch.float32:  # of a state that a default dtype of float64 made
                    return None
            if parameters:
                found.append((group, lists))
        tensors = [tensors for _, lists in found for tensors in lists[:4]]
        if tensors and not serves("cpp", ADAMW, tensors[0][0], *tensors):
            return None
        return found

    def _torchs_step(self) -> None:
        """Clip and take a step as PyTorch does."""
        if self._max_norm is not None:
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            norm = torch.nn.utils.clip_grad_norm_(parameters, self._max_norm)
            self._norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a DTensor
            if not torch.isfinite(self._norm):
                return
        step = torch.optim.AdamW.step
        # Optimizers wrap their class's step for hooks, which this object's own step has called.
        getattr(step, "__wrapped__", step)(self) if getattr(step, "hooked", False) else step(self)
