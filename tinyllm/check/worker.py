"""Checks one operator on one backend: `python -m tinyllm.check.worker OPERATOR BACKEND DEVICE CALLS`.

Prints a line of JSON before each call and one at the end, so that whoever started it knows which call it hung or
crashed in.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tinyllm import ops
from tinyllm.check.cases import CASES
from tinyllm.check.draw import Case, Draw, Function
from tinyllm.check.parity import error_and_allowed
from tinyllm.ops import dispatch

# A backend may take few of the shapes that are drawn: so many are, for each that it has to take.
_MOST_DRAWS = 40


class WrongResultError(Exception):
    """A result that the parity rule does not allow."""


def check_operator(
    operator: str, backend: str, device: str, calls: int, seed: int = 0, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Compare `calls` random calls in each dtype, forward and backward, with plain PyTorch.

    Args:
        seed: of the first call; the next ones count on.
        say: is told of each call before it is made.

    Returns:
        `calls`, how many were made, and `worst`, the largest error as a fraction of what the parity rule allows.

    Raises:
        WrongResultError: a result is off, or the backend took none of the calls that were drawn.
    """
    made, worst = 0, 0.0
    with ops.backend(backend):
        for dtype in dispatch.FLOATS:
            if dispatch.unavailable(backend, operator, device, dtype) is not None:
                continue
            wanted = made + calls
            for number in range(seed, seed + _MOST_DRAWS * calls):
                draw = Draw(number, dtype, device, backend)
                case = CASES[operator](draw)
                text = f"{str(dtype).removeprefix('torch.')}, seed {number}: {case.text}"
                say(text)
                try:
                    worst = max(worst, _compare(case, draw))
                except dispatch.CannotServeError:  # a shape that is left to others
                    continue
                except Exception as error:
                    raise WrongResultError(f"{text}: {_first_line(error)}") from error
                made += 1
                if made == wanted:
                    break
            if made == wanted - calls:
                raise WrongResultError(
                    f"{dtype}: took none of {_MOST_DRAWS * calls} calls, though it says that it serves them"
                )
    return {"calls": made, "worst": worst}


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [repr(error)]
    return lines[0] if isinstance(error, WrongResultError) else f"{type(error).__name__}: {lines[0]}"


def _compare(case: Case, draw: Draw) -> float:
    """Return the largest error of outputs and gradients as a fraction of what the parity rule allows.

    Raises:
        WrongResultError: it is above 1, or an input was modified.
    """
    before = [None if x is None else x.clone() for x in case.inputs]
    ours, grads = _results(case.ours, case, draw.dtype, draw)
    for x, y in zip(case.inputs, before, strict=True):
        if x is not None and not torch.allclose(x, y, rtol=0.0, atol=0.0, equal_nan=True):  # type: ignore[arg-type]
            raise WrongResultError("an input was modified")
    torchs, _ = _results(case.theirs, case, draw.dtype, draw, grads)
    exact, _ = _results(case.theirs, case, torch.float64, draw, grads)
    # Sums are in float32 at least, in any order, and their terms may cancel; none of that shows in 16 bits.
    steps = 2 if draw.dtype.itemsize == 2 else 32 * case.depth
    worst = 0.0
    for name in exact:
        error, allowed = error_and_allowed(ours[name], torchs[name], exact[name], steps)
        if not error <= allowed:
            raise WrongResultError(f"{name}: error {error:.2e}, allowed {allowed:.2e}")
        worst = max(worst, error / allowed if allowed > 0 else 0.0)
    return worst


def _results(
    function: Function, case: Case, dtype: torch.dtype, draw: Draw, grads: list[Tensor] | None = None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return outputs and gradients of a call in a dtype by their names, and the outputs' gradients that were used."""
    inputs = [None if x is None else (x.detach() if x.dtype == dtype else x.to(dtype)) for x in case.inputs]
    leaves = [x.requires_grad_() for x in inputs if x is not None]
    found = function(*inputs)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    if not case.differentiable:
        return results, []
    if not all(output.requires_grad for output in outputs):
        raise WrongResultError("an output has no gradient")
    if grads is None:
        grads = [draw.floats(*output.shape) for output in outputs]
    gradients = torch.autograd.grad(outputs, leaves, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)])
    # As one vector: some are zero by their nature, such as that of a key's bias, and what is computed for them is the
    # rounding of others.
    results["gradients"] = torch.cat([gradient.flatten() for gradient in gradients])
    return results, grads


def main() -> int:
    """Return the exit status: 1 where a result is wrong."""
    operator, backend, device, calls = sys.argv[1:]

    def say(**what: Any) -> None:
        print(json.dumps(what), flush=True)

    try:
        say(**check_operator(operator, backend, device, int(calls), say=lambda text: say(call=text)))
    except WrongResultError as error:
        say(wrong=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
