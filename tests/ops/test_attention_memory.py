"""Attention's backward needs little memory besides the gradients, and its bits depend on no thread."""

import subprocess
import sys

import pytest
import torch

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
def test_backward_needs_a_fifth_of_the_gradients_at_most(heads, dtype):
    command = [sys.executable, "-c", MEASURE, str(heads), dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) <= 0.2


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 64), (4, 2, 20), (40, 40, 16)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_the_same_for_any_number_of_threads(dtype, is_causal, heads, kv_heads, head_dim):
    generator = torch.Generator().manual_seed(0)
    q, g = (torch.randn(1, heads, 700, head_dim, generator=generator).to(dtype) for _ in range(2))
    k, v = (torch.randn(1, kv_heads, 700, head_dim, generator=generator).to(dtype) for _ in range(2))
    out, lse = torch.ops.tinyllm.attention_fwd(q, k, v, None, is_causal, 0.2)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(torch.ops.tinyllm.attention_bwd(g, q, k, v, None, out, lse, is_causal, 0.2))
    finally:
        torch.set_num_threads(before)
    for grads in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads, found[0], strict=True))
