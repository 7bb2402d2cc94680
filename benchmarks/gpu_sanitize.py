"""Every CUDA C++ operator on small shapes, forward and backward, for compute-sanitizer to watch:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m benchmarks.gpu_sanitize

Whether the results are right is the affair of `tinyllm check`, which draws the same calls. Without PyTorch's cache
every tensor is an allocation of its own, so that an access behind its end is seen. Inputs are drawn on the CPU: hardly
any kernels but ours run, and those of others cost a sanitizer's time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from tinyllm import ops
from tinyllm.check.cases import CASES
from tinyllm.check.draw import Case, Draw
from tinyllm.ops import dispatch
from tinyllm.ops.backends import cuda

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CALLS = 5  # of each operator in each dtype that are served
MOST_DRAWS = 60  # for them
LONG_ROWS = (4099, 20_000, 50_257)  # elements, over several blocks


def cases(operator: str, draw: Draw, number: int) -> Case:
    """Return the next call of an operator: rows too long for a block where it has such, then random ones."""
    if number < len(LONG_ROWS) and operator in ("layer_norm", "rms_norm", "add_layer_norm", "cross_entropy"):
        size = LONG_ROWS[number]
        function, x = getattr(ops, operator), draw.floats(2, size)
        if operator == "cross_entropy":
            target = draw.ints(size, 2)
            return Case(f"2x{size}", lambda x: function(x, target), function, [x])
        first = [x, draw.floats(2, size)] if operator == "add_layer_norm" else [x]
        inputs = [*first, *(draw.floats(size) for _ in range(1 if operator == "rms_norm" else 2))]
        count = len(first)
        return Case(f"2x{size}", lambda *xs: function(*xs[:count], (size,), *xs[count:]), function, inputs)
    return CASES[operator](draw)


def run(device: str, backend: str) -> list[str]:
    """Call everything that a backend serves; return what failed, and why."""
    failed = []
    # The kernels with the most to go wrong come first, in case that the time does not suffice for all.
    for operator in sorted(CASES, key=lambda name: name != "attention"):
        for dtype in DTYPES:
            if dispatch.unavailable(backend, operator, device, dtype) is not None:
                continue
            for text, error in _calls(operator, dtype, device, backend):
                failed += [f"{text}: {type(error).__name__}: {str(error).strip().splitlines()[0]}"] if error else []
    return failed


def _calls(operator: str, dtype: torch.dtype, device: str, backend: str) -> Iterator[tuple[str, Exception | None]]:
    """Make some calls; yield what each is, and what it raised. Shapes that are left to other backends do not count."""
    made = 0
    for number in range(MOST_DRAWS):
        draw = Draw(number, dtype, device, backend)
        case = cases(operator, draw, number)
        text = f"{operator}, {dtype}, {case.text}"
        print(text, flush=True)  # what the sanitizer says next is about this one
        leaves = [x.requires_grad_() for x in case.inputs if x is not None]
        try:
            with ops.backend(backend):
                with torch.no_grad():
                    case.ours(*case.inputs)
                found = case.ours(*case.inputs)
                outputs = [found] if isinstance(found, torch.Tensor) else list(found)
                if outputs[0].requires_grad:  # unlike an optimizer's step
                    torch.autograd.grad(outputs, leaves, [draw.floats(*x.shape).to(x.dtype) for x in outputs])
            if device == "cuda":
                torch.cuda.synchronize()
        except dispatch.CannotServeError:
            continue
        except Exception as error:
            yield text, error
        else:
            yield text, None
        made += 1
        if made == CALLS + len(LONG_ROWS):
            return


def main() -> int:
    """Return the exit status."""
    if cuda.why_not is not None and not cuda.emulated:
        print(f"CUDA C++ is not there: {cuda.why_not}")
        return 1
    failed = run("cpu" if cuda.emulated else "cuda", "cuda")
    print(f"{len(failed)} calls failed", *failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
