"""Which backend serves an operator. One table; every "no" has a reason.

backend     serves          what it is
cpp         CPU tensors     csrc/cpu, compiled into tinyllm._C
reference   any tensor      tinyllm.reference, plain PyTorch
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from tinyllm import _extension

# Best first.
BACKENDS = ("cpp", "reference")
OPERATORS = (
    "layer_norm",
    "add_layer_norm",
    "rms_norm",
    "embedding",
    "attention",
    "linear",
    "feed_forward",
    "transformer_block",
    "transformer",
    "cross_entropy",
    "linear_cross_entropy",
)
_KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_forced: str | None = None
_last: str | None = None


def unavailable(backend_name: str, device_type: str) -> str | None:
    """Why a backend cannot serve tensors of a device type at all; None when it can."""
    if backend_name == "reference":
        return None
    if device_type != "cpu":
        return f"it serves CPU tensors, not {device_type} ones"
    return _extension.why_not


def choose(operator: str, tensor: torch.Tensor, limits: Mapping[str, str] | None = None) -> str:
    """The backend for a call. `limits`: backend name -> why it cannot serve these arguments.

    Raises RuntimeError, with every backend's reason, when the forced backend cannot serve the call.
    """
    global _last
    name = _choose(operator, tensor, limits or {})
    if not torch.compiler.is_compiling():
        _last = name
    return name


def serves(backend_name: str, tensor: torch.Tensor, limits: Mapping[str, str] | None = None) -> bool:
    """Whether a call would be served by this backend, a forced one included."""
    return _forced in (None, backend_name) and _why_not(backend_name, tensor, limits or {}) is None


def _choose(operator: str, tensor: torch.Tensor, limits: Mapping[str, str]) -> str:
    if _forced is None:
        if _why_not("cpp", tensor, limits) is None:
            return "cpp"
        return "reference"
    if _why_not(_forced, tensor, limits) is None:
        return _forced
    reasons = "; ".join(f"{name}: {_why_not(name, tensor, limits) or 'can serve it'}" for name in BACKENDS)
    raise RuntimeError(f"the forced backend {_forced!r} cannot serve this call of {operator}. {reasons}")


def _why_not(name: str, tensor: torch.Tensor, limits: Mapping[str, str]) -> str | None:
    reason = unavailable(name, tensor.device.type) or limits.get(name)
    if reason is None and name != "reference" and tensor.dtype not in _KERNEL_DTYPES:
        return f"no kernel for {tensor.dtype}"
    return reason


def forced_backend() -> str | None:
    """The backend that an enclosing `backend(...)` forces; None outside one."""
    return _forced


def last_backend() -> str | None:
    """The backend that served the latest operator call of this process outside torch.compile; None before the first."""
    return _last


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces every operator to one backend, for comparisons and tests; for the whole process, not one thread.

    A call that the backend cannot serve then raises RuntimeError and names each backend's reason.

        with tinyllm.ops.backend("reference"):
            logits = model(tokens)
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"name is {name!r}; backends are {', '.join(BACKENDS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
