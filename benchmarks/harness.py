"""What a benchmark row is, and how its providers are checked and timed against each other.

A row is one piece of work, such as the causal forward pass at one shape. Its providers (tinyllm, torch,
torch.compile) get the same tensors in the same process, so the same threads, dtype and allocator. `compare` proves
that each one's result is right, and then lets them take turns. pytest-benchmark would time one provider after the
other; it gets the recorded times through its `timer` option instead: `replay` lets that clock pass them once more, so
that its statistics and its JSON are made of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tinyllm import ops

from .machine import DISTURBED, OtherLoad
from .timing import take_turns

OURS, EAGER, COMPILED = "tinyllm", "torch", "torch.compile"
PROVIDERS = (OURS, EAGER, COMPILED)

FORWARD, BACKWARD, STEP = "forward", "backward", "forward+backward"
FLOPS, BYTES = "GFLOP/s", "GB/s"

Outputs = Sequence[Tensor]


@dataclass(frozen=True)
class Provider:
    """`call` is what is timed; `normal_form` brings its result into the form of the row's exact one (same tensors, same
    order), outside the timing."""

    call: Callable[[], Outputs]
    normal_form: Callable[[Outputs], Outputs] = field(default=lambda outputs: outputs)


@dataclass(frozen=True)
class Case:
    """A row's providers, made, and the exact result: what eager PyTorch computes in float64."""

    providers: Mapping[str, Provider]
    exact: Callable[[], Outputs]


@dataclass(frozen=True)
class Row:
    """One line of the comparison.

    Attributes:
        section: the table it belongs to, a key of `report.SECTIONS`.
        operation: what is computed, such as "causal attention".
        direction: FORWARD, BACKWARD or STEP (both).
        shape: as a reader should see it.
        work: useful FLOPs, or the fewest bytes that must move, of one call.
        unit: FLOPS or BYTES, which says what `work` counts.
        build: makes the Case; called once, when the row is due.
        dtype: of the tensors.
        providers: tinyllm first.
        headline: whether the short table shows it.
        smooth: whether a rounding moves the result by about as much. Not the gradient of a ReLU, which jumps where a
            rounding changes its input's sign.
        facts_of_shape: numbers of the shape that a picture needs.
    """

    section: str
    operation: str
    direction: str
    shape: str
    work: float
    unit: str
    build: Callable[[], Case]
    dtype: torch.dtype = torch.float32
    providers: tuple[str, ...] = PROVIDERS
    headline: bool = False
    smooth: bool = True
    facts_of_shape: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        dtype = "" if self.dtype == torch.float32 else f" {dtype_name(self.dtype)}"
        return f"{self.operation} {self.direction} {self.shape}{dtype}"

    def facts(self) -> dict[str, Any]:
        """What the results say about the row, as JSON types."""
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
            **self.facts_of_shape,
        }


@dataclass(frozen=True)
class Measured:
    """`seconds` per call, one number a round; `calls` in each round; the relative `error` of the result; how many cores
    other programs used meanwhile, if the system tells."""

    seconds: Sequence[float]
    calls: int
    error: float
    other_load: float | None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def each_provider(rows: Iterable[Row]) -> list[Any]:
    """Parameter sets for `parametrize(("row", "provider"), ...)`: the providers of a row follow each other."""
    return [
        pytest.param(row, provider, id=f"{row.name} | {provider}", marks=_marks(row))
        for row in rows
        for provider in row.providers
    ]


def _marks(row: Row) -> pytest.MarkDecorator:
    return pytest.mark.benchmark(group=row.name, timer=recorded_time)


# ---- Making the providers of an operator


def passes(
    functions: Mapping[str, Callable[..., Tensor | tuple[Tensor, ...]]],
    direction: str,
    inputs: Sequence[Tensor],
    constants: Sequence[Any] = (),
    compiled: bool = True,
    exact: Callable[..., Tensor | tuple[Tensor, ...]] | None = None,
) -> Case:
    """The case of an operator: `function(*inputs, *constants)` of each provider, in one direction.

    Forward runs without autograd. Backward runs `torch.autograd.grad` again and again over one recorded forward.
    Gradients are taken for all inputs, and those of the outputs are random.

    Args:
        functions: provider -> function; EAGER's is also what gives the exact result. COMPILED, unless it is
            there, is torch.compile of EAGER's.
        direction: FORWARD, BACKWARD or STEP.
        inputs: what is differentiated, floating.
        constants: further arguments; None, masks, shapes.
        compiled: whether torch.compile of EAGER's is among them.
        exact: gives the exact result instead of EAGER's.
    """
    functions = dict(functions)
    if compiled:
        functions.setdefault(COMPILED, torch.compile(functions[EAGER], dynamic=False))
    with torch.no_grad():
        outputs = as_tuple(functions[EAGER](*inputs, *constants))
    grads = [randn(output.shape, 7 + i, output.device).to(output.dtype) for i, output in enumerate(outputs)]

    def bind(function: Callable[..., Any], dtype: torch.dtype | None = None) -> Callable[[], Outputs]:
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_(direction != FORWARD) for x in inputs]
        upstream = [grad.to(dtype or grad.dtype) for grad in grads]
        if direction == FORWARD:
            return lambda: as_tuple(_without_grad(function, *leaves, *constants))
        if direction == STEP:
            return lambda: torch.autograd.grad(as_tuple(function(*leaves, *constants)), leaves, upstream)
        with reusable_backward():
            recorded = as_tuple(function(*leaves, *constants))
            call = lambda: torch.autograd.grad(recorded, leaves, upstream, retain_graph=True)  # noqa: E731
            call()  # a backward graph may be compiled at its first call
        return call

    def call_of(function: Callable[..., Any]) -> Callable[[], Outputs]:
        """What is bound at the first call: nothing runs of a provider that is left out, and what fails fails then."""
        bound: list[Callable[[], Outputs]] = []

        def call() -> Outputs:
            if not bound:
                bound.append(bind(function))
            return bound[0]()

        return call

    providers = {name: Provider(call_of(function)) for name, function in functions.items()}
    return Case(providers, lambda: bind(exact or functions[EAGER], torch.float64)())


def _without_grad(function: Callable[..., Any], *arguments: Any) -> Any:
    with torch.no_grad():
        return function(*arguments)


@contextmanager
def reusable_backward() -> Iterator[None]:
    """Let a compiled backward run more than once: by default it may overwrite what the forward saved."""
    import torch._functorch.config as config

    with config.patch(donated_buffer=False):
        yield


def as_tuple(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def randn(shape: Sequence[int], seed: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device)


# ---- Checking


def relative_error(got: Outputs, exact: Outputs) -> float:
    """||got - exact|| / ||exact||, all tensors of a result being one long vector; NaN counts as infinite.

    Not tensor by tensor: some gradients are zero by their nature, and what is computed for them is rounding alone.
    (All of a query's scores move with the keys' bias, and softmax does not see what they have in common.)
    """
    assert len(got) == len(exact), f"{len(got)} tensors, not {len(exact)}"
    difference = norm = 0.0
    for x, y in zip(got, exact, strict=True):
        assert x.shape == y.shape, f"shape {list(x.shape)}, not {list(y.shape)}"
        difference = math.hypot(difference, torch.linalg.vector_norm(x.double() - y).item())
        norm = math.hypot(norm, torch.linalg.vector_norm(y.double()).item())
    return math.inf if math.isnan(difference) else difference / norm


def allowed_error(row: Row, provider: str, eager_error: float) -> float:
    """What a provider's error may be: twice that of eager PyTorch, plus two rounding steps; the tests' rule, on norms.

    Eager PyTorch, the measure of the others, must have half of the dtype's digits right itself; and a third of them is
    enough in rows that are not smooth.
    """
    eps = torch.finfo(row.dtype).eps
    if not row.smooth:
        return float(eps ** (1 / 3))
    return math.sqrt(eps) if provider == EAGER else 2 * eager_error + 2 * eps


def check(row: Row, case: Case) -> tuple[dict[str, float], dict[str, Exception]]:
    """Of each provider either its error against the exact result, or why its result cannot be trusted."""
    exact = [x.detach().double() for x in case.exact()]
    errors: dict[str, float] = {}
    failures: dict[str, Exception] = {}
    for name, provider in case.providers.items():
        try:
            outputs = provider.normal_form(provider.call())
            errors[name] = relative_error([x.detach() for x in outputs], exact)
        except Exception as failure:
            failures[name] = failure
    eager_error = errors.get(EAGER, math.inf)
    if not eager_error <= allowed_error(row, EAGER, eager_error):
        eager_error = 0.0  # no measure for the others
    for name in list(errors):
        limit = allowed_error(row, name, eager_error)
        if not errors[name] <= limit:
            text = f"{row.name}: {name} has error {errors.pop(name):.2e}, allowed {limit:.2e}"
            failures[name] = AssertionError(text)
    return errors, failures


def verify(row: Row, case: Case) -> dict[str, float]:
    """Each provider's error against the exact result; AssertionError if one is too large."""
    errors, failures = check(row, case)
    for failure in failures.values():
        raise failure
    return errors


# ---- Timing


def compare(row: Row, seconds: float, attempts: int = 1) -> dict[str, Measured]:
    """Build a row, verify it, and time its providers in turns, about `seconds` for each.

    While other programs keep the machine busy, threads that wait for each other wait for those programs, and times
    are theirs. So the whole row is timed again, up to `attempts` times, until it is undisturbed; the least disturbed
    attempt counts, whatever its times are.
    """
    torch.compiler.reset()  # no guards of earlier rows in front of this one's code
    with ops.backend("cpp"):  # an error rather than a silent comparison of PyTorch with itself
        case = row.build()
        errors = verify(row, case)
    least: float | None = math.inf
    for _ in range(attempts):
        others = OtherLoad()
        turns = take_turns({name: provider.call for name, provider in case.providers.items()}, seconds)
        load = others.cores()
        if load is None or least is None or load < least:
            least, (calls, times) = load, turns
        if least is None or least < DISTURBED:
            break
    return {name: Measured(times[name], calls, errors[name], least) for name in case.providers}


_recorded_time = 0.0


def recorded_time() -> float:
    """The clock that pytest-benchmark reads: only `replay` moves it."""
    return _recorded_time


def replay(benchmark: Any, measured: Measured) -> None:
    """Hand recorded times to a pytest-benchmark fixture: each of its rounds takes as long as the recorded one."""
    seconds = iter(measured.seconds)

    def one_round() -> None:
        global _recorded_time
        _recorded_time += next(seconds)

    benchmark.pedantic(one_round, rounds=len(measured.seconds), iterations=1)
