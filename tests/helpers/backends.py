"""The backends on which the operators are tested, and decorators that choose among them and their cases.

A test that asks for `backend` runs once on each: the C++ kernels on the CPU, Triton's and the CUDA C++ kernels on the
GPU. Without a GPU these run on the CPU, Triton's in its interpreter and CUDA C++ on emulated threads (tests/emulation).
Both are slow, so that a test's sizes are chosen by backend.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.parity import DTYPES
from tinyllm import ops
from tinyllm.ops.backends import cpp, cuda, triton

if triton.interpreted:
    from tests.helpers.interpreter import patch_language_once

    patch_language_once()

ON_GPU = torch.cuda.is_available() and not cuda.emulated


@dataclass(frozen=True)
class Backend:
    """A backend: its device here, what most of its kernels take, its raw operators, and why it is not tested."""

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    raw: Any
    why_not: str | None

    @property
    def threads(self) -> tuple[int, ...]:
        """Return numbers of threads for which results must be the same; on a GPU, which has none, two calls."""
        return (1, 2, 3, 5) if self.name == "cpp" else (1, 1)

    @contextmanager
    def forced(self) -> Iterator[None]:
        """Have this backend serve every call, or skip the test where it does not run.

        Those that TINYLLM_TEST_BACKENDS lists have to run.
        """
        if self.why_not is not None:
            wanted = self.name in os.environ.get("TINYLLM_TEST_BACKENDS", "").split(",")
            (pytest.fail if wanted else pytest.skip)(f"the kernels of {self.name} do not run here: {self.why_not}")
        with ops.backend(self.name):
            yield

    def draw(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """Return the same normally distributed numbers on every device."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(self.device)

    def tensor(self, numbers: Any, dtype: torch.dtype | None = None) -> Tensor:
        return torch.tensor(numbers, dtype=dtype, device=self.device)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a whole function; in an emulation without the compiler's own code, which is not what is tested."""
        torch._dynamo.reset()  # the cases of a test are not to count as recompilations of one function
        inductor = self.name == "cpp" or self.device == "cuda"
        return torch.compile(function, fullgraph=True, backend="inductor" if inductor else "aot_eager")


def _backends() -> Iterable[Backend]:
    yield Backend("cpp", "cpu", DTYPES, torch.ops.tinyllm, cpp.why_not)
    on_gpu = torch.cuda.is_available() and not triton.interpreted
    yield Backend("triton", "cuda" if on_gpu else "cpu", DTYPES, torch.ops.tinyllm_triton, triton.why_not)
    why_not = None if cuda.emulated else cuda.why_not or (None if ON_GPU else "there is no GPU")
    yield Backend("cuda", "cuda" if ON_GPU else "cpu", DTYPES[1:], cuda.operators(), why_not)
    yield Backend("reference", "cpu", DTYPES, None, None)  # where a test asks for it


KERNELS = ("cpp", "triton", "cuda")
BACKENDS = {backend.name: backend for backend in _backends()}


def _mark(name: str) -> pytest.MarkDecorator:
    """Return the mark of a backend; behind an underscore its name may tell one of several ways to run it."""
    return pytest.mark.any_build if name == "reference" else getattr(pytest.mark, name.partition("_")[0])


def params(*names: str) -> list[Any]:
    """Return the parameters of a fixture that takes backends by name."""
    return [pytest.param(name, marks=_mark(name)) for name in names]


def cases(names: str, **values: Iterable[Any]) -> pytest.MarkDecorator:
    """Run a test on the backends that are named, on each with its own values of the arguments `names`."""
    arguments = names.split()

    def param(name: str, value: Any) -> Any:
        value = value if len(arguments) > 1 else (value,)
        return pytest.param(name, *value, marks=_mark(name), id="-".join(map(str, (name, *value))))

    every = [param(name, value) for name, several in values.items() for value in several]
    return pytest.mark.parametrize(("backend", *arguments), every, indirect=["backend"])


def on(*names: str) -> pytest.MarkDecorator:
    """Run a test on these backends alone."""
    return pytest.mark.parametrize("backend", params(*names), indirect=True)


def with_dtypes(values: dict[str, Iterable[Any]], **fewer: Iterable[torch.dtype]) -> dict[str, list[Any]]:
    """Return each backend's cases, tuples, once for each of its dtypes, or for `fewer` of them."""
    return {
        name: [(*case, dtype) for case in several for dtype in fewer.get(name, BACKENDS[name].dtypes)]
        for name, several in values.items()
    }


def each_dtype(**fewer: Iterable[torch.dtype]) -> pytest.MarkDecorator:
    """Run a test on each backend with each of its dtypes, or with `fewer` of them."""
    return cases("dtype", **{name: fewer.get(name, BACKENDS[name].dtypes) for name in KERNELS})
