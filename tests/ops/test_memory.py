"""The memory that C++ kernels need besides what they return."""

import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.helpers.backends import on
from tinyllm import ops
from tinyllm.ops import _products

# The peak of a whole process, above what it had before the call.
MEASURE = """
import sys, torch, tinyllm.ops

def kilobytes(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))

heads, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
torch.set_num_threads(2)
length, shape = 12288, (1, heads, 12288, 64)
q, k, v, g = (torch.randn(shape).to(dtype) for _ in range(4))
mask = (torch.arange(length) // 64 % 64 == 0).expand(1, heads, length, length)  # leaves little to compute
out, lse = torch.ops.tinyllm.attention_fwd(q, k, v, mask, False, 0.125)
small = [x[:, :, :512].contiguous() for x in (g, q, k, v)]
torch.ops.tinyllm.attention_bwd(*small, None, small[0], lse[..., :512].contiguous(), False, 0.125)
open("/proc/self/clear_refs", "w").write("5")  # the peak is what there is now
before = kilobytes("VmRSS")
grads = torch.ops.tinyllm.attention_bwd(g, q, k, v, mask, out, lse, False, 0.125)
extra = (kilobytes("VmHWM") - before) * 1024
own = sum(x.nbytes for x in grads)
print((extra - own) / own)
"""


@pytest.mark.parametrize(("heads", "dtype"), [(2, "float32"), (8, "float32"), (8, "bfloat16")])
def test_attentions_backward_needs_a_fifth_of_the_gradients_at_most(heads, dtype):
    command = [sys.executable, "-c", MEASURE, str(heads), dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) <= 0.2


@on("cpp")
@pytest.mark.parametrize("products", ["cpp", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("needed", "rows"), [((True, True), 1024), ((True, False), 1024), ((False, False), 1024), ((True, True), 3000)]
)
def test_linear_cross_entropy_needs_a_tenth_of_the_logits(backend, products, needed, rows, dtype, monkeypatch):
    slow = products == "torch" and dtype == torch.bfloat16  # on many processors
    features, classes = 64 if slow else 256, 20_000
    monkeypatch.setattr(_products, "_setting", products)
    x = backend.draw(rows, features, dtype=dtype).requires_grad_(needed[0])
    w = (backend.draw(classes, features, dtype=dtype, seed=1) / 8).requires_grad_(needed[1])
    target = torch.arange(rows) * 7 % classes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = ops.linear_cross_entropy(x, w, target)
    assert loss.requires_grad == any(needed)
    # Forward has computed the gradients, which have float32 until backward hands them out.
    gradients = sum(t.numel() * 4 for t, need in zip((x, w), needed, strict=True) if need)
    held = peak = 0
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    assert gradients < peak
    share = 0.1 if any(needed) or products == "torch" else 0.03
    assert (peak - gradients) / (rows * classes * x.element_size()) < share
