"""Choose the backend that serves a call of an operator. Every "no" has a reason.

backend     serves          what it is
cpp         CPU tensors     csrc/cpu, compiled into tinyllm._C
cuda        CUDA tensors    csrc/cuda, CUDA C++ compiled into tinyllm._C_cuda; emulated (TINYLLM_EMULATED_CUDA, for
                            tests) CPU tensors instead, where it is forced
triton      CUDA tensors    kernels/, compiled by Triton at the first call; in its interpreter (TRITON_INTERPRET=1) also
                            CPU tensors, where it is forced
reference   any tensor      plain PyTorch: its own operators where they mean the same, else tinyllm.reference

What a backend serves of an operator is declared once, as an `Operator` beside the operator's function. `choose`,
`tinyllm info` and `tinyllm check` read it there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinyllm.ops._context import active_transform, device_type
from tinyllm.ops.backends import MODULES, cpp, cuda, triton

REFERENCE = "reference"
BACKENDS = (*MODULES, REFERENCE)  # best first

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NOT_DOUBLE = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)

_forced: str | None = None
_forced_operators: tuple[str, ...] = ()  # none: all
_last: str | None = None


class CannotServeError(RuntimeError):
    """The forced backend cannot serve a call."""


@dataclass(frozen=True)
class Limit:
    """A limit of kernels.

    Attributes:
        takes: what they do take, in the words of `tinyllm info` and of errors: "no dropout".
        beyond: is called with what `choose` is given, and returns what goes beyond the limit, such as "dropout_p is
            0.1"; None where nothing does.
    """

    takes: str
    beyond: Callable[..., str | None]


@dataclass(frozen=True)
class Kernels:
    """The calls of an operator that a backend's kernels serve.

    Attributes:
        dtypes: the dtypes that they take.
        limits: what they do not take.
        note: what is to be said of shapes that they do take.
        source: the file of kernels/ that has Triton's launchers, where it has another name than the operator.
    """

    dtypes: tuple[torch.dtype, ...]
    limits: tuple[Limit, ...] = ()
    note: str | None = None
    source: str | None = None

    def shapes(self) -> str | None:
        """Return in English what they take besides dtypes; None where that is everything."""
        return ", ".join(filter(None, (*(limit.takes for limit in self.limits), self.note))) or None


class Operator:
    """The declaration of an operator: for each backend its `Kernels`, or the reason why it has none.

    Args:
        raw: the raw operators of the kernels; default: <name>_fwd and <name>_bwd.
        refuses: is called with what `choose` is given, and returns why no kernel of any backend serves a call; None
            where one may.
    """

    def __init__(
        self,
        name: str,
        *,
        cpp: Kernels | str,
        cuda: Kernels | str,
        triton: Kernels | str,
        refuses: Callable[..., str | None] | None = None,
        raw: tuple[str, ...] | None = None,
    ) -> None:
        self.name = name
        raw = (f"{name}_fwd", f"{name}_bwd") if raw is None else raw
        self.refuses = refuses
        self.kernels = {"cpp": cpp, "cuda": cuda, "triton": triton}
        for backend, kernels in self.kernels.items():
            if isinstance(kernels, Kernels):
                self.kernels[backend] = MODULES[backend].provide(raw, kernels.source or name) or kernels
        OPERATORS[name] = self

    def unavailable(
        self, backend: str, device_type: str, dtype: torch.dtype | None = None, here: bool = True
    ) -> str | None:
        """Return why a backend cannot serve tensors of a device type (and dtype) at all; None when it can.

        Args:
            here: count what this installation lacks; of the CUDA library that counts always, since not every one has
                it.
        """
        if backend == REFERENCE:
            return None
        forced = _forced == backend and forced_backend(self.name) == backend
        reason = MODULES[backend].unavailable(device_type, forced, here)
        if reason is not None:
            return reason
        kernels = self.kernels[backend]
        if isinstance(kernels, str):
            return kernels
        return None if dtype is None or dtype in kernels.dtypes else f"no kernel for {dtype}"

    def cannot_serve(self, backend: str, tensor: Tensor, arguments: tuple[Any, ...]) -> str | None:
        """Return why a backend cannot serve a call, None when it can; the arguments are those of `choose`."""
        if backend == REFERENCE:
            return None
        # As in `unavailable`, without the call: for a small tensor the choice costs a tenth of the operator.
        forced = _forced == backend and forced_backend(self.name) == backend
        device = device_type(tensor)
        reason = MODULES[backend].unavailable(device, forced, True)
        if reason is not None:
            return reason
        kernels = self.kernels[backend]
        if isinstance(kernels, str) or tensor.dtype not in kernels.dtypes:
            return self.unavailable(backend, device, tensor.dtype)
        if self.refuses is not None:
            reason = self.refuses(tensor, *arguments)
            if reason is not None:
                return reason
        for limit in kernels.limits:
            beyond = limit.beyond(tensor, *arguments)
            if beyond is not None:
                return f"{beyond}; the kernel takes {limit.takes}"
        reason = active_transform()
        return cuda.too_old(tensor.get_device()) if reason is None and tensor.is_cuda else reason

    def describe(self, device_type: str) -> dict[str, Any]:
        """Return what serves the operator on a device type, of which this machine may have none: `backend`, the
        `dtypes` and `shapes` that it takes, and for the others the reason why `not`. `rest`: the same three of the
        backend that serves what CUDA C++ leaves to it; None where there is nothing, or only PyTorch."""
        here = device_type == "cpu" or cuda.why_not is None or triton.why_not is None
        reasons = {backend: self.unavailable(backend, device_type, here=here) for backend in BACKENDS}

        def row(backend: str) -> dict[str, Any]:
            takes = [dtype for dtype in FLOATS if self.unavailable(backend, device_type, dtype, here) is None]
            kernels = self.kernels.get(backend)
            return {
                "backend": backend,
                "dtypes": [str(dtype).removeprefix("torch.") for dtype in takes],
                "shapes": kernels.shapes() if isinstance(kernels, Kernels) else None,
            }

        chosen, *others = [row(backend) for backend in BACKENDS if reasons[backend] is None]
        rest = others[0] if chosen["backend"] == "cuda" and others[0]["backend"] != REFERENCE else None
        if rest is not None and chosen["shapes"] is None:
            rest["dtypes"] = [dtype for dtype in rest["dtypes"] if dtype not in chosen["dtypes"]]
        return {**chosen, "rest": rest, "not": {backend: reason for backend, reason in reasons.items() if reason}}


OPERATORS: dict[str, Operator] = {}  # all that are declared, by their names
raw_operators: list[str] = []  # all that the code knows, whether any backend here has them or not


def unavailable(backend: str, operator: str, device_type: str, dtype: torch.dtype | None = None) -> str | None:
    """Return why a backend cannot serve an operator, given by its name, on tensors of a device type (and dtype)."""
    return OPERATORS[operator].unavailable(backend, device_type, dtype)


def choose(operator: Operator, tensor: Tensor, *arguments: Any) -> str:
    """Return the backend for a call.

    Args:
        tensor: has the call's device and dtype.
        arguments: what else the operator's limits look at.

    Raises:
        RuntimeError: the forced backend cannot serve the call; the message has every backend's reason.
    """
    global _last
    backend = _choose(operator, tensor, arguments)
    if not torch.compiler.is_compiling():
        _last = backend
        if cpp.why_not is not None:
            cpp.warn_if_absent()
    return backend


def _choose(operator: Operator, tensor: Tensor, arguments: tuple[Any, ...]) -> str:
    forced = forced_backend(operator.name)
    for backend in BACKENDS if forced is None else (forced,):
        if operator.cannot_serve(backend, tensor, arguments) is None:
            return backend
    reasons = "; ".join(
        f"{backend}: {operator.cannot_serve(backend, tensor, arguments) or 'can serve it'}" for backend in BACKENDS
    )
    raise CannotServeError(f"the forced backend {forced!r} cannot serve this call of {operator.name}. {reasons}")


def serves(backend: str, operator: Operator, tensor: Tensor, *arguments: Any) -> bool:
    """Return whether a call would be served by this backend, a forced one included.

    For operators that stand for several others: they do not, while only some are forced, which they would hide.
    """
    if _forced_operators and operator.name not in _forced_operators:
        return False
    return (
        forced_backend(operator.name) in (None, backend) and operator.cannot_serve(backend, tensor, arguments) is None
    )


def left_to_pytorch(operator: Operator, input: Tensor, *others: Tensor | None) -> bool:
    """Return whether PyTorch's own operator may serve where no kernel does, which wants tensors of one dtype.

    A forced reference stays the reference, and so does a call under a transform, which it can follow further.
    """
    return (
        forced_backend(operator.name) is None
        and active_transform() is None
        and all(x is None or x.dtype == input.dtype for x in others)
    )


def kernels(backend: str) -> Any:
    """Return the namespace of a backend's raw operators."""
    return MODULES[backend].operators()


def register_fake(name: str, *namespaces: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Tell the compiler the shapes of a raw operator, in the namespace of each backend that has it and in these."""
    found = {backend.operators().name for backend in MODULES.values() if backend.has(name)}
    raw_operators.append(name)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for namespace in sorted(found.union(namespaces)):
            torch.library.register_fake(f"{namespace}::{name}")(function)
        return function

    return register


def forced_backend(operator: str) -> str | None:
    """Return the backend that an enclosing `backend(...)` forces an operator to; None outside one."""
    return _forced if not _forced_operators or operator in _forced_operators else None


def forced() -> tuple[str | None, tuple[str, ...]]:
    """Return the backend that an enclosing `backend(...)` forces, None outside one, and for which operators; none: for
    all."""
    return _forced, _forced_operators


def last_backend() -> str | None:
    """Return the backend that served the latest operator call of this process outside torch.compile; None before the
    first."""
    return _last


@contextmanager
def backend(name: str, *operators: str) -> Iterator[None]:
    """Force every operator, or the named ones, to one backend, for comparisons and tests; for the whole process, not
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
