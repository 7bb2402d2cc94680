"""Which backend serves an operator. One table; every "no" has a reason.

backend     serves          what it is
cpp         CPU tensors     csrc/cpu, compiled into tinyllm._C
triton      CUDA tensors    kernels/, compiled by Triton at the first call; in its interpreter (TRITON_INTERPRET=1) also
                            CPU tensors, where it is forced
reference   any tensor      tinyllm.reference, plain PyTorch
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from tinyllm import _extension
from tinyllm.ops import _triton

# Best first.
BACKENDS = ("cpp", "triton", "reference")
_REFERENCE = "reference"

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NOT_DOUBLE = (torch.float32, torch.bfloat16, torch.float16)
_LEFT_TO_CUBLAS = "PyTorch's products (cuBLAS) serve it"
_IN_PARTS = "its parts are served one by one"
# Operator -> the dtypes that its compiled kernels take, where they are not all.
_CPP: dict[str, tuple[torch.dtype, ...]] = dict.fromkeys(
    ("transformer_block", "transformer"), (torch.float32, torch.float64)
)
# Operator -> the dtypes that its Triton kernels take, or why there are none.
_TRITON: dict[str, tuple[torch.dtype, ...] | str] = {
    "layer_norm": _FLOATS,
    "add_layer_norm": _FLOATS,
    "rms_norm": _FLOATS,
    "embedding": _FLOATS,
    "attention": _NOT_DOUBLE,
    "linear": _LEFT_TO_CUBLAS,
    "feed_forward": _LEFT_TO_CUBLAS,
    "transformer_block": _IN_PARTS,
    "transformer": _IN_PARTS,
    "cross_entropy": _FLOATS,
    "linear_cross_entropy": _FLOATS,
}
OPERATORS = tuple(_TRITON)

_forced: str | None = None
_forced_operators: tuple[str, ...] = ()  # none: all
_last: str | None = None


# What backends say of shapes.
_SHAPES = {
    ("cpp", "attention"): "heads up to 1024 wide",
    ("triton", "attention"): "heads of any width, above 256 (float32: 64) in chunks",
    ("cpp", "transformer_block"): "heads up to 1024 wide",
    ("cpp", "transformer"): "heads up to 1024 wide",
}


def unavailable(
    backend_name: str, operator: str, device_type: str, dtype: torch.dtype | None = None, here: bool = True
) -> str | None:
    """Why a backend cannot serve an operator on tensors of a device type (and dtype) at all; None when it can.

    here: count what this installation lacks.
    """
    if backend_name == _REFERENCE:
        return None
    if backend_name == "cpp":
        if device_type != "cpu":
            return f"it serves CPU tensors, not {device_type} ones"
        if here and _extension.why_not is not None:
            return _extension.why_not
        dtypes = _CPP.get(operator, _FLOATS)
    else:
        if device_type == "cpu" and _triton.interpreted:
            if forced_backend(operator) != "triton":
                return "it serves CUDA tensors; in its interpreter, CPU tensors where it is forced"
        elif device_type != "cuda":
            return f"it serves CUDA tensors, not {device_type} ones"
        if here and _triton.why_not is not None:
            return _triton.why_not
        found = _TRITON[operator]
        if isinstance(found, str):
            return found
        dtypes = found
    return None if dtype is None or dtype in dtypes else f"no kernel for {dtype}"


def describe(operator: str, device_type: str) -> dict[str, Any]:
    """What serves an operator on a device type, of which this machine may have none: `backend`, the `dtypes` and
    `shapes` that it takes, and for the others the reason why `not`."""
    here = device_type == "cpu" or _triton.why_not is None
    reasons = {name: unavailable(name, operator, device_type, here=here) for name in BACKENDS}
    chosen = next(name for name in BACKENDS if reasons[name] is None)
    dtypes = [
        str(dtype).removeprefix("torch.")
        for dtype in _FLOATS
        if unavailable(chosen, operator, device_type, dtype, here) is None
    ]
    return {
        "backend": chosen,
        "dtypes": dtypes,
        "shapes": _SHAPES.get((chosen, operator)),
        "not": {name: reason for name, reason in reasons.items() if reason},
    }


def no_kernel(reason: str) -> dict[str, str]:
    """Limits of a call whose arguments no backend but the reference serves."""
    return {"cpp": reason, "triton": reason}


def kernels(backend_name: str) -> Any:
    """The namespace of a backend's raw operators."""
    return torch.ops.tinyllm_triton if backend_name == "triton" else torch.ops.tinyllm


def choose(operator: str, tensor: torch.Tensor, limits: Mapping[str, str] | None = None) -> str:
    """The backend for a call. `limits`: backend name -> why it cannot serve these arguments.

    Raises RuntimeError, with every backend's reason, when the forced backend cannot serve the call.
    """
    global _last
    name = _choose(operator, tensor, limits or {})
    if not torch.compiler.is_compiling():
        _last = name
    return name


def serves(backend_name: str, operator: str, tensor: torch.Tensor, limits: Mapping[str, str] | None = None) -> bool:
    """Whether a call would be served by this backend, a forced one included.

    For operators that stand for several others: they do not, while only some are forced, which they would hide.
    """
    if _forced_operators and operator not in _forced_operators:
        return False
    return (
        forced_backend(operator) in (None, backend_name)
        and _why_not(backend_name, operator, tensor, limits or {}) is None
    )


def _choose(operator: str, tensor: torch.Tensor, limits: Mapping[str, str]) -> str:
    forced = forced_backend(operator)
    for name in BACKENDS if forced is None else (forced,):
        if _why_not(name, operator, tensor, limits) is None:
            return name
    reasons = "; ".join(f"{name}: {_why_not(name, operator, tensor, limits) or 'can serve it'}" for name in BACKENDS)
    raise RuntimeError(f"the forced backend {forced!r} cannot serve this call of {operator}. {reasons}")


def _why_not(name: str, operator: str, tensor: torch.Tensor, limits: Mapping[str, str]) -> str | None:
    reason = unavailable(name, operator, tensor.device.type, tensor.dtype) or limits.get(name)
    if reason is None and name == "triton" and tensor.is_cuda:
        return _triton.too_old(tensor.get_device())
    return reason


def forced_backend(operator: str) -> str | None:
    """The backend that an enclosing `backend(...)` forces an operator to; None outside one."""
    return _forced if not _forced_operators or operator in _forced_operators else None


def last_backend() -> str | None:
    """The backend that served the latest operator call of this process outside torch.compile; None before the first."""
    return _last


@contextmanager
def backend(name: str, *operators: str) -> Iterator[None]:
    """Forces every operator, or the named ones, to one backend, for comparisons and tests; for the whole process, not
    one thread. Inside another one it stands alone.

    A call that the backend cannot serve then raises RuntimeError and names each backend's reason. "triton" is for CUDA
    tensors; under TRITON_INTERPRET=1, which must be set before tinyllm is imported, for CPU tensors too, slowly.

        with tinyllm.ops.backend("reference"):
            logits = model(tokens)
        with tinyllm.ops.backend("triton", "attention", "layer_norm"):  # and the others as always
            logits = model(tokens)
    """
    global _forced, _forced_operators
    if name not in BACKENDS:
        raise ValueError(f"name is {name!r}; backends are {', '.join(BACKENDS)}")
    for operator in operators:
        if operator not in OPERATORS:
            raise ValueError(f"operators has {operator!r}; operators are {', '.join(OPERATORS)}")
    before = _forced, _forced_operators
    _forced, _forced_operators = name, operators
    try:
        yield
    finally:
        _forced, _forced_operators = before
