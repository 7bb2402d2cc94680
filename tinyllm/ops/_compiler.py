"""What torch's compiler has to know of functions, said without importing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_for_compiler(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result`: the compiler calls the function, and keeps the result.

    That one imports the compiler, for which every `import tinyllm` would pay more than a second and 145 MB. A test
    compares the two.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
