"""Which backend serves an operator. One table; every "no" has a reason.

backend     serves          what it is
cpp         CPU tensors     csrc/cpu, compiled into tinyllm._C
cuda        CUDA tensors    csrc/cuda, CUDA C++ compiled into tinyllm._C_cuda; emulated (TINYLLM_EMULATED_CUDA, for
                            tests) CPU tensors instead, where it is forced
triton      CUDA tensors    kernels/, compiled by Triton at the first call; in its interpreter (TRITON_INTERPRET=1) also
                            CPU tensors, where it is forced
reference   any tensor      plain PyTorch: its own operators where they mean the same, else tinyllm.reference
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from tinyllm.ops._compiler import constant_for_compiler
from tinyllm.ops._transforms import active_transform
from tinyllm.ops.backends import cpp, cuda, triton

# Best first.
BACKENDS = ("cpp", "cuda", "triton", "reference")
_REFERENCE = "reference"

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NOT_DOUBLE = (torch.float32, torch.bfloat16, torch.float16)
_LEFT_TO_CUBLAS = "PyTorch's products (cuBLAS) serve it"
_IN_PARTS = "its parts are served one by one"
# Operator -> the dtypes that its compiled kernels take, where they are not all.
_CPP: dict[str, tuple[torch.dtype, ...]] = dict.fromkeys(
    ("transformer_block", "transformer"), (torch.float32, torch.float64)
)
# Operator -> the dtypes that its CUDA C++ kernels take, or why there are none.
_CUDA: dict[str, tuple[torch.dtype, ...] | str] = {
    "layer_norm": _NOT_DOUBLE,
    "add_layer_norm": _NOT_DOUBLE,
    "rms_norm": _NOT_DOUBLE,
    "embedding": _NOT_DOUBLE,
    "attention": (torch.bfloat16, torch.float16),
    "linear": _LEFT_TO_CUBLAS,
    "feed_forward": _LEFT_TO_CUBLAS,
    "transformer_block": _IN_PARTS,
    "transformer": _IN_PARTS,
    "cross_entropy": _NOT_DOUBLE,
    "linear_cross_entropy": "Triton's kernel serves it",
}
# The same of Triton's.
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
# Those of which a library that is there lacks the kernels, as a build of only some of its sources does.
_CUDA_LACKS = frozenset(name for name in OPERATORS if not (cuda.has(f"{name}_fwd") and cuda.has(f"{name}_bwd")))

_forced: str | None = None
_forced_operators: tuple[str, ...] = ()  # none: all
_last: str | None = None


@constant_for_compiler
def _only_scalar() -> bool:
    return _chosen_isa() == "scalar"


@functools.cache  # not the function above itself: the compiler would look through the cache
def _chosen_isa() -> str | None:
    return None if cpp.library is None else cpp.library.cpu_isa()


class CannotServeError(RuntimeError):
    """The forced backend cannot serve a call."""


# What backends say of shapes.
_SHAPES = {
    ("cpp", "attention"): "heads up to 1024 wide",
    **dict.fromkeys(
        (("cuda", "layer_norm"), ("cuda", "add_layer_norm"), ("cuda", "rms_norm")),
        "rows up to 16,384 wide (131,072 on 9.0 and later)",
    ),
    ("cuda", "embedding"): "no dropout",
    ("cuda", "attention"): "head_dim 64 or 128, no attn_mask, no dropout",
    ("triton", "attention"): "heads of any width, above 256 (float32: 64) in chunks",
    ("cpp", "transformer_block"): "heads up to 1024 wide",
    ("cpp", "transformer"): "heads up to 1024 wide",
}


def unavailable(
    backend_name: str, operator: str, device_type: str, dtype: torch.dtype | None = None, here: bool = True
) -> str | None:
    """Why a backend cannot serve an operator on tensors of a device type (and dtype) at all; None when it can.

    here: count what this installation lacks; of the CUDA library that counts always, since not every one has it.
    """
    if backend_name == _REFERENCE:
        return None
    if backend_name == "cpp":
        if device_type != "cpu":
            return f"it serves CPU tensors, not {device_type} ones"
        if here and cpp.why_not is not None:
            return cpp.why_not
        if here and _only_scalar() and forced_backend(operator) != "cpp":
            return "there are only the scalar kernels for this processor; PyTorch is faster"
        dtypes = _CPP.get(operator, _FLOATS)
    elif backend_name == "cuda":
        if device_type == "cpu" and cuda.emulated:
            if forced_backend(operator) != "cuda":
                return "it serves CUDA tensors; emulated, CPU tensors where it is forced"
        elif device_type != "cuda":
            return f"it serves CUDA tensors, not {device_type} ones"
        elif cuda.why_not is not None:
            return cuda.why_not
        found = _CUDA[operator]
        if isinstance(found, str):
            return found
        if operator in _CUDA_LACKS:
            return "this build of the CUDA library has no kernel for it"
        dtypes = found
    else:
        if device_type == "cpu" and triton.interpreted:
            if forced_backend(operator) != "triton":
                return "it serves CUDA tensors; in its interpreter, CPU tensors where it is forced"
        elif device_type != "cuda":
            return f"it serves CUDA tensors, not {device_type} ones"
        if here and triton.why_not is not None:
            return triton.why_not
        found = _TRITON[operator]
        if isinstance(found, str):
            return found
        dtypes = found
    return None if dtype is None or dtype in dtypes else f"no kernel for {dtype}"


def describe(operator: str, device_type: str) -> dict[str, Any]:
    """What serves an operator on a device type, of which this machine may have none: `backend`, the `dtypes` and
    `shapes` that it takes, and for the others the reason why `not`. `rest`: the same three of the backend that serves
    what CUDA C++ leaves to it; None where there is nothing, or only PyTorch."""
    here = device_type == "cpu" or cuda.why_not is None or triton.why_not is None
    reasons = {name: unavailable(name, operator, device_type, here=here) for name in BACKENDS}

    def row(name: str) -> dict[str, Any]:
        takes = [dtype for dtype in _FLOATS if unavailable(name, operator, device_type, dtype, here) is None]
        dtypes = [str(dtype).removeprefix("torch.") for dtype in takes]
        return {"backend": name, "dtypes": dtypes, "shapes": _SHAPES.get((name, operator))}

    chosen, *others = [row(name) for name in BACKENDS if reasons[name] is None]
    rest = others[0] if chosen["backend"] == "cuda" and others[0]["backend"] != _REFERENCE else None
    if rest is not None and chosen["shapes"] is None:
        rest["dtypes"] = [dtype for dtype in rest["dtypes"] if dtype not in chosen["dtypes"]]
    return {**chosen, "rest": rest, "not": {name: reason for name, reason in reasons.items() if reason}}


def no_kernel(reason: str) -> dict[str, str]:
    """Limits of a call whose arguments no backend but the reference serves."""
    return {"cpp": reason, "cuda": reason, "triton": reason}


def kernels(backend_name: str) -> Any:
    """The namespace of a backend's raw operators."""
    if backend_name == "triton":
        return torch.ops.tinyllm_triton
    return cuda.operators() if backend_name == "cuda" else torch.ops.tinyllm


def choose(operator: str, tensor: torch.Tensor, limits: Mapping[str, str] | None = None) -> str:
    """The backend for a call. `limits`: backend name -> why it cannot serve these arguments.

    Raises RuntimeError, with every backend's reason, when the forced backend cannot serve the call.
    """
    global _last
    name = _choose(operator, tensor, limits or {})
    if not torch.compiler.is_compiling():
        _last = name
        if cpp.why_not is not None:
            cpp.warn_if_absent()
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
    raise CannotServeError(f"the forced backend {forced!r} cannot serve this call of {operator}. {reasons}")


def _why_not(name: str, operator: str, tensor: torch.Tensor, limits: Mapping[str, str]) -> str | None:
    reason = unavailable(name, operator, tensor.device.type, tensor.dtype) or limits.get(name)
    if reason is None and name != _REFERENCE:
        reason = active_transform()
    if reason is None and name in ("cuda", "triton") and tensor.is_cuda:
        return cuda.too_old(tensor.get_device())
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

    A call that the backend cannot serve then raises RuntimeError and names each backend's reason. "cuda" (CUDA C++) and
    "triton" are for CUDA tensors; "triton" under TRITON_INTERPRET=1, which must be set before tinyllm is imported, for
    CPU tensors too, slowly.

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
