"""A row of a benchmark: one piece of work, and the providers that do it on the same tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

OURS, EAGER, COMPILED = "tinyllm", "torch", "torch.compile"
# On a GPU each family of our kernels is forced in turn; OURS is what the package chooses by itself.
CUDA, TRITON = "CUDA C++", "Triton"
BACKENDS = {CUDA: "cuda", TRITON: "triton"}
OURS_ALL = (OURS, CUDA, TRITON)

FORWARD, BACKWARD, STEP = "forward", "backward", "forward+backward"
UPDATE = "update"  # of an optimizer
FLOPS, BYTES = "GFLOP/s", "GB/s"

Outputs = Sequence[Tensor]
Function = Callable[..., Any]


@dataclass(frozen=True)
class Provider:
    """One side of a comparison.

    Attributes:
        call: what is timed.
        normal_form: brings the result of `call` into the form of the exact one (the same tensors in the same order),
            outside the timing.
    """

    call: Callable[[], Outputs]
    normal_form: Callable[[Outputs], Outputs] = field(default=lambda outputs: outputs)


@dataclass(frozen=True)
class Case:
    """The providers of a row with their inputs, and the exact result: what eager PyTorch computes in float64."""

    providers: Mapping[str, Provider]
    exact: Callable[[], Outputs]

    def without(self, names: Mapping[str, Any]) -> Case:
        """Return the case without some of its providers."""
        return Case({name: side for name, side in self.providers.items() if name not in names}, self.exact)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the comparison.

    Attributes:
        section: the table it belongs to, a key of `report.SECTIONS`.
        operation: what is computed, such as "causal attention".
        direction: FORWARD, BACKWARD or STEP (both), or UPDATE.
        shape: as a reader should see it.
        work: useful FLOPs, or the fewest bytes that must move, of one call.
        unit: FLOPS or BYTES, which says what `work` counts.
        build: makes the Case; called once, when the row is due.
        dtype: of the tensors.
        headline: whether the README shows it.
        smooth: whether a rounding moves the result by about as much. The gradient of a ReLU is not smooth: it jumps
            where a rounding changes the sign of its input.
        facts_of_shape: numbers of the shape that a picture needs.
        ours: which of the providers are ours.
        operators: the operators that each of `BACKENDS` must serve itself.
        on_wall: whether to read the clock on the wall on a GPU too, and not the GPU's own.
        shows_memory: whether the memory that a call takes is of interest.
        shows_gpu_time: whether the time on the GPU is of interest beside that on the wall.
    """

    section: str
    operation: str
    direction: str
    shape: str
    work: float
    unit: str
    build: Callable[[], Case]
    dtype: torch.dtype = torch.float32
    headline: bool = False
    smooth: bool = True
    facts_of_shape: Mapping[str, Any] = field(default_factory=dict)
    ours: tuple[str, ...] = (OURS,)
    operators: tuple[str, ...] = ()
    on_wall: bool = False
    shows_memory: bool = False
    shows_gpu_time: bool = False

    @property
    def name(self) -> str:
        dtype = "" if self.dtype == torch.float32 else f" {dtype_name(self.dtype)}"
        return f"{self.operation} {self.direction} {self.shape}{dtype}"

    def facts(self) -> dict[str, Any]:
        """Return what the results say about the row, as JSON types."""
        return {
            "benchmark": self.name,
            "section": self.section,
            "operation": self.operation,
            "direction": self.direction,
            "shape": self.shape,
            "dtype": dtype_name(self.dtype),
            "unit": self.unit,
            "work": self.work,
            "headline": self.headline,
            "threads": torch.get_num_threads(),
            **({"operators": list(self.operators)} if self.operators else {}),
            **({"shows_memory": True} if self.shows_memory else {}),
            **self.facts_of_shape,
        }


class Target:
    """Device on which rows are measured, and the source of their tensors.

    Args:
        gpu: whether to make the rows of a GPU, whose work is larger and in bfloat16, or those of a CPU.
        device: where the tensors lie; the default follows `gpu`.
        seed: of the random numbers, which are new in every draw.
        small: cut all sizes, to try the rows of a GPU on a processor.
    """

    def __init__(self, gpu: bool, device: str | None = None, seed: int = 0, small: bool = False) -> None:
        self.gpu = gpu
        self.device = device or ("cuda" if gpu else "cpu")
        self.dtype = torch.bfloat16 if gpu else torch.float32
        self.ours = (CUDA, TRITON) if gpu else (OURS,)
        self._seeds = itertools.count(seed)
        self._small = small

    def cut(self, size: int, most: int) -> int:
        """Return a size, or `most` at most where sizes are to be small."""
        return min(size, most) if self._small else size

    def sides(self, ours: Function, torchs: Function) -> dict[str, Function]:
        """Return a function of ours under each of our names here, and eager PyTorch's."""
        return {**dict.fromkeys(self.ours, ours), EAGER: torchs}

    def row(self, operator: str = "", **options: Any) -> Row:
        """Return a Row with this target's dtype, and an operator that our kernels here must serve."""
        defaults = {"dtype": self.dtype, "ours": self.ours, "operators": (operator,) if operator and self.gpu else ()}
        return Row(**{**defaults, **options})

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return randn(shape, next(self._seeds), self.device).to(dtype or self.dtype)

    def randint(self, most: int, *shape: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(next(self._seeds))
        return torch.randint(most, shape, generator=generator, device=self.device)


def randn(shape: Sequence[int], seed: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def passes(
    functions: Mapping[str, Function],
    direction: str,
    inputs: Sequence[Tensor],
    constants: Sequence[Any] = (),
    *,
    compiled: bool = True,
    exact: Function | None = None,
    upstream: Sequence[Tensor] | None = None,
) -> Case:
    """Return the case of an operator: `function(*inputs, *constants)` of each provider, in one direction.

    Forward runs without autograd. Backward runs `torch.autograd.grad` again and again over one recorded forward.
    Gradients are taken for all inputs.

    Args:
        functions: provider -> function; that of EAGER also gives the exact result.
        compiled: whether COMPILED takes part, as torch.compile of EAGER's function.
        exact: computes the exact result instead of EAGER's function.
        upstream: the gradients of the outputs; random ones by default.
    """
    functions = dict(functions)
    if compiled:
        functions[COMPILED] = torch.compile(functions[EAGER], dynamic=False)
    if upstream is None and direction != FORWARD:
        with torch.no_grad():
            outputs = as_tuple(functions[EAGER](*inputs, *constants))
        upstream = [randn(output.shape, 7 + i, output.device).to(output.dtype) for i, output in enumerate(outputs)]

    def bind(function: Function, dtype: torch.dtype | None = None) -> Callable[[], Outputs]:
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_(direction != FORWARD) for x in inputs]
        if direction == FORWARD:
            return lambda: as_tuple(_without_grad(function, *leaves, *constants))
        grads = [grad.to(dtype or grad.dtype) for grad in upstream or ()]
        if direction == STEP:
            return lambda: torch.autograd.grad(as_tuple(function(*leaves, *constants)), leaves, grads)
        with _reusable_backward():
            recorded = as_tuple(function(*leaves, *constants))
            torch.autograd.grad(recorded, leaves, grads, retain_graph=True)  # compiles a compiled one's backward
        return lambda: torch.autograd.grad(recorded, leaves, grads, retain_graph=True)

    def call_of(function: Function) -> Callable[[], Outputs]:
        """Bind at the first call: nothing runs of a provider that is left out, and what fails fails then."""
        bound: list[Callable[[], Outputs]] = []

        def call() -> Outputs:
            if not bound:
                bound.append(bind(function))
            return bound[0]()

        return call

    providers = {name: Provider(call_of(function)) for name, function in functions.items()}
    return Case(providers, lambda: bind(exact or functions[EAGER], torch.float64)())


def _without_grad(function: Function, *arguments: Any) -> Any:
    with torch.no_grad():
        return function(*arguments)


@contextmanager
def _reusable_backward() -> Iterator[None]:
    """Let a compiled backward run more than once: by default it may overwrite what the forward saved."""
    import torch._functorch.config as config

    with config.patch(donated_buffer=False):
        yield


def as_tuple(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
