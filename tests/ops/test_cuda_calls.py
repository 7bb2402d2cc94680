"""Calls that CUDA C++ serves, with the kernels for CPUs in its place."""

from types import SimpleNamespace

import pytest
import torch

from tests.ops.test_dispatch import python
from tinyllm import ops
from tinyllm.ops import dispatch
from tinyllm.ops.backends import cuda


@pytest.fixture
def emulated(monkeypatch):
    """Pretend that the CUDA kernels are emulated, and return the raw calls that reach them."""
    calls = []

    def raw(name):
        return lambda *arguments: calls.append((name, arguments)) or getattr(torch.ops.tinyllm, name)(*arguments)

    monkeypatch.setattr(cuda, "emulated", True)
    monkeypatch.setattr(cuda, "_norm_columns", lambda index: 131_072)  # there may be no library to ask
    monkeypatch.setattr(cuda, "why_not", "it is emulated, for CPU tensors")
    names = [f"{operator}_{way}" for operator in dispatch.OPERATORS for way in ("fwd", "bwd")]
    monkeypatch.setattr(cuda, "operators", lambda: SimpleNamespace(**{name: raw(name) for name in names}))
    return calls


def test_emulated_kernels_serve_only_where_they_are_forced(emulated):
    x = torch.ones(2, 3)
    ops.layer_norm(x, 3)
    assert ops.last_backend() == "cpp"
    with ops.backend("cuda", "layer_norm"):
        ops.layer_norm(x, 3)
        assert ops.last_backend() == "cuda"
        ops.rms_norm(x, 3)
        assert ops.last_backend() == "cpp"
    assert [name for name, _ in emulated] == ["layer_norm_fwd"]
    assert dispatch.OPERATORS["layer_norm"].describe("cuda")["backend"] == "triton"


def refused(says, operator, *arguments, **options):
    with ops.backend("cuda"), pytest.raises(RuntimeError, match=f"cuda: {says}"):
        operator(*arguments, **options)


def test_what_cuda_cpp_does_not_take(emulated):
    wide = torch.ones(1, 131_073)
    for norm in (ops.layer_norm, ops.rms_norm):
        refused(
            "normalized_shape has 131073 elements; the kernel takes rows up to 16,384 wide",
            norm,
            wide,
            131_073,
        )
    refused("normalized_shape has 131073 elements", ops.add_layer_norm, wide, wide, 131_073)
    refused("no kernel for torch.float64", ops.layer_norm, torch.ones(2, 2).double(), 2)
    ids = torch.zeros(2, dtype=torch.long)
    refused("dropout_p is 0.1; the kernel takes no dropout", ops.embedding, ids, torch.ones(3, 2), dropout_p=0.1)

    attend = ops.scaled_dot_product_attention
    x, narrow, mask = torch.ones(1, 2, 3, 64).half(), torch.ones(1, 2, 3, 32).half(), torch.ones(3, 3).bool()
    refused("head_dim is 32, value's 32; the kernel takes head_dim 64 or 128", attend, narrow, narrow, narrow)
    refused("head_dim is 64, value's 32; the kernel takes head_dim 64 or 128", attend, x, x, narrow)
    refused("attn_mask is given; the kernel takes no attn_mask", attend, x, x, x, mask)
    refused("dropout_p is 0.1; the kernel takes no dropout", attend, x, x, x, dropout_p=0.1)
    refused("scale is -1.0; the kernel takes scale above 0", attend, x, x, x, scale=-1.0)
    refused(
        "causal_offset is given; the kernel takes no causal_offset", attend, x, x, x, is_causal=True, causal_offset=1
    )
    refused("no kernel for torch.float32", attend, x.float(), x.float(), x.float())
    assert emulated == []


def test_cuda_cpp_is_given_the_lengths_of_keys(emulated, monkeypatch):
    x, lengths, given = torch.ones(2, 2, 3, 64).half(), torch.tensor([1, 3]), []
    kernel = SimpleNamespace(attention_fwd=lambda *arguments: given.append(arguments) or (x, x))
    monkeypatch.setattr(cuda, "operators", lambda: kernel)
    with ops.backend("cuda"):
        ops.scaled_dot_product_attention(x, x, x, key_lengths=lengths)
    assert given[0][3] is None
    assert given[0][-1].equal(lengths)


def test_cross_entropy_on_cuda_cpp_never_waits_for_the_device(emulated, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("the host asks the device"))
    x, target = torch.randn(4, 7, requires_grad=True), torch.tensor([0, 6, -100, 3])
    with ops.backend("cuda"):
        (2.0 * ops.cross_entropy(x, target)).backward()
    (expected,) = torch.autograd.grad(2.0 * torch.nn.functional.cross_entropy(x, target), x)
    torch.testing.assert_close(x.grad, expected)
    assert [(name, arguments[-1]) for name, arguments in emulated] == [
        ("cross_entropy_fwd", False),
        ("cross_entropy_bwd", 0.0),
    ]


def test_tritons_kernel_corrects_early_gradients_of_other_kernels():
    code = """
import torch
from tinyllm import ops
from tinyllm.ops.backends import cuda
import sys
module = sys.modules["tinyllm.ops.cross_entropy"]
cuda.emulated, cuda.operators = True, lambda: torch.ops.tinyllm
module._corrects_on_the_gpu = lambda input: True
target, weight = torch.tensor([0, 6, -100, 3]), torch.rand(7)
for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
    for scale in (1.0, 3.0):
        x = torch.randn(4, 7).to(dtype).requires_grad_()
        with ops.backend("cuda"):
            loss = ops.cross_entropy(x, target, weight, label_smoothing=0.1)
            assert loss.grad_fn.grad_input is not None
            (scale * loss).backward()
        y = x.detach().double().requires_grad_()
        (scale * torch.nn.functional.cross_entropy(y, target, weight.double(), label_smoothing=0.1)).backward()
        assert (x.grad - y.grad).abs().max() < tolerance * scale, (dtype, scale, x.grad, y.grad)
"""
    result = python(code, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr


def test_cuda_cpp_under_the_compiler(emulated, monkeypatch):
    monkeypatch.setattr(cuda, "operators", lambda: torch.ops.tinyllm)
    monkeypatch.setattr(cuda, "_norm_columns", lambda index: 16_384)
    x, target = torch.randn(4, 8, requires_grad=True), torch.tensor([0, 6, -100, 3])

    def run(x):
        normed, total = ops.add_layer_norm(x, 2 * x, 8)
        return ops.cross_entropy(ops.rms_norm(normed, 8) + ops.layer_norm(total, 8), target)

    with ops.backend("cuda"):
        expected = torch.autograd.grad(run(x), x)
        found = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(found, expected)
