import json
import os
import subprocess
import sys

import pytest
import torch

import tinyllm
from tinyllm import _extension, ops
from tinyllm.ops import _triton, dispatch


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


PARITY = """
import os, torch, tinyllm
from tinyllm import ops, reference
os.environ["TINYLLM_LINEAR"] = "cpp"
torch.manual_seed(0)
with ops.backend("cpp"):
    tolerances = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}
    for dtype, tolerance in tolerances.items():
        for size in (1, 5, 37, 130):
            q, k, v = (torch.randn(2, 3, size, size).to(dtype).requires_grad_() for _ in range(3))
            out = ops.scaled_dot_product_attention(q, k, v, is_causal=True)
            exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
            other = reference.scaled_dot_product_attention(*exact, is_causal=True)
            grads = torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(other.sum(), exact)
            pairs = [(out, other), *zip(*grads)]
            w, b = torch.randn(2, size).to(dtype)
            ours = ops.add_layer_norm(q, k, size, w, b)
            pairs += zip(ours, reference.add_layer_norm(*exact[:2], [size], w.double(), b.double()))
            pairs.append((ops.rms_norm(q, size, w, 1e-5), reference.rms_norm(exact[0], [size], w.double(), 1e-5)))
            ids = torch.arange(12).view(3, 4) % size
            out = ops.embedding(ids, q[0, 0], positions=q[0, 0, :1].expand(4, -1))
            other = reference.embedding(ids, exact[0][0, 0], positions=exact[0][0, 0, :1].expand(4, -1))
            grads = torch.autograd.grad(out.sum(), q), torch.autograd.grad(other.sum(), exact[0])
            pairs += [(out, other), *zip(*grads)]
            x = torch.randn(size + 3, size).to(dtype).requires_grad_()
            target, y = torch.arange(size + 3) % size, x.detach().double().requires_grad_()
            losses = ops.cross_entropy(x, target), reference.cross_entropy(y, target)
            pairs += [losses, (torch.autograd.grad(losses[0], x)[0], torch.autograd.grad(losses[1], y)[0])]
            x, w = (torch.randn(size + 3, size).to(dtype).requires_grad_() for _ in range(2))
            y, v = (t.detach().double().requires_grad_() for t in (x, w))
            losses = ops.linear_cross_entropy(x, w, target), reference.linear_cross_entropy(y, v, target)
            pairs += [losses, *zip(torch.autograd.grad(losses[0], (x, w)), torch.autograd.grad(losses[1], (y, v)))]
            network = [t / size**0.5 for t in torch.randn(3, 3 * size, size)]
            network = [t.to(dtype).requires_grad_() for t in (torch.randn(size, size), network[0], network[1].T)]
            exact = [t.detach().double().requires_grad_() for t in network]
            for activation in ("relu", "gelu", "gelu_tanh"):
                options = dict(activation=activation, residual=network[0])
                out = ops.feed_forward(network[0], network[1], None, network[2], None, **options)
                options["residual"] = exact[0]
                other = reference.feed_forward(exact[0], exact[1], None, exact[2], None, **options)
                pairs += [(out, other)]
                pairs += zip(torch.autograd.grad(out.sum(), network), torch.autograd.grad(other.sum(), exact))
            if dtype in (torch.float32, torch.float64):
                shapes = [(size, size)] * 5 + [(size,)] * 2
                block = [torch.randn(2, 3, size), *(torch.randn(s) / s[-1] ** 0.5 for s in shapes)]
                block = [t.to(dtype).requires_grad_() for t in block]
                exact = [t.detach().double().requires_grad_() for t in block]
                out = ops.transformer_block(block[0], block[1:], norm_first=True, activation="gelu")
                other = reference.transformer_block(exact[0], exact[1:], norm_first=True, activation="gelu")
                grads = torch.autograd.grad(out.sum(), block), torch.autograd.grad(other.sum(), exact)
                pairs += [(out, other), *zip(*grads)]
            for ours, theirs in pairs:
                error = (ours.double() - theirs).abs().max().item()
                assert error < tolerance * max(1, theirs.abs().max().item()), (dtype, size, error)
print(tinyllm.info()["cpu"]["chosen_isa"])
"""


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_instruction_set(isa):
    if isa not in _extension.library.usable_isas():
        pytest.skip(f"this processor does not run {isa}")
    result = python(PARITY, TINYLLM_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == isa


def test_an_unknown_instruction_set_is_refused():
    result = python("import torch, tinyllm; tinyllm.ops.layer_norm(torch.ones(2, 2), 2)", TINYLLM_CPU_ISA="avx1024")
    assert result.returncode != 0
    assert "TINYLLM_CPU_ISA is 'avx1024'; this build on this processor allows:" in result.stderr


@pytest.mark.any_build
def test_import_does_nothing_to_the_process():
    code = """
import os, sys, torch, threading
had = set(sys.modules)
def state():
    return torch.get_num_threads(), os.environ.copy(), threading.active_count(), len(os.listdir("/proc/self/task"))
before = state()
import tinyllm
assert before == state()
assert not torch.cuda.is_initialized()
assert not {"matplotlib", "tokenizers", "typer", "tqdm"} & (set(sys.modules) - had), "heavy imports"
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.any_build
def test_forcing_a_backend():
    x = torch.ones(2, 3)
    with ops.backend("reference"):
        ops.layer_norm(x, 3)
        assert ops.last_backend() == "reference"
    ops.layer_norm(x, 3)
    assert ops.last_backend() == ("cpp" if _extension.loaded else "reference")
    with pytest.raises(ValueError, match="name is 'cuda2'; backends are cpp, triton, reference"), ops.backend("cuda2"):
        pass


@pytest.mark.any_build
def test_forcing_some_operators():
    x = torch.ones(2, 3)
    with ops.backend("reference", "layer_norm", "linear"):
        ops.layer_norm(x, 3)
        assert ops.last_backend() == "reference"
        ops.rms_norm(x, 3)
        assert ops.last_backend() == ("cpp" if _extension.loaded else "reference")
    ops.layer_norm(x, 3)
    assert ops.last_backend() == ("cpp" if _extension.loaded else "reference")
    says = "operators has 'norm'; operators are layer_norm,"
    with pytest.raises(ValueError, match=says), ops.backend("reference", "norm"):
        pass


@pytest.mark.any_build
def test_a_fused_operator_does_not_hide_forced_parts(monkeypatch):
    model, served = tinyllm.SimpleLLM(10, 16, 32, 2), []
    choose = dispatch._choose
    monkeypatch.setattr(dispatch, "_choose", lambda *a: served.append((a[0], choose(*a))) or served[-1][1])
    with ops.backend("reference", "attention"):
        model(torch.zeros(1, 4, dtype=torch.long))
    assert ("attention", "reference") in served
    assert ("attention", "cpp") not in served


@pytest.mark.any_build
def test_triton_is_for_gpus():
    code = """
import torch, tinyllm
x = torch.ones(2, 3)
tinyllm.ops.layer_norm(x, 3)
assert tinyllm.ops.last_backend() != "triton"
with tinyllm.ops.backend("triton"):
    try:
        tinyllm.ops.layer_norm(x, 3)
    except RuntimeError as error:
        print(error)
"""
    result = python(code, TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stderr
    assert "the forced backend 'triton' cannot serve this call of layer_norm" in result.stdout
    assert "triton: it serves CUDA tensors, not cpu ones" in result.stdout


@pytest.mark.any_build
def test_the_interpreter_serves_only_where_it_is_forced():
    code = """
import torch, tinyllm
x = torch.ones(2, 3)
tinyllm.ops.layer_norm(x, 3)
assert tinyllm.ops.last_backend() != "triton"
with tinyllm.ops.backend("triton"):
    tinyllm.ops.layer_norm(x, 3)
    assert tinyllm.ops.last_backend() == "triton"
from tinyllm.info import print_info
print_info()
"""
    result = python(code, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    assert ", interpreted" in result.stdout


@pytest.mark.any_build
def test_without_triton_everything_runs_and_info_says_why():
    code = """
import sys
sys.modules["triton"] = None
import torch, tinyllm
model = tinyllm.SimpleLLM(10, 16, 32, 2)
model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
from tinyllm.info import print_info
print_info()
"""
    for interpret in ("0", "1"):
        result = python(code, TRITON_INTERPRET=interpret)
        assert result.returncode == 0, result.stderr
        assert "not in use here: triton is not installed" in result.stdout


def test_a_gpu_that_is_too_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    reason = _triton.too_old.__wrapped__(0)
    assert reason == "it needs compute capability 8.0 or later; cuda:0 has 7.5"


def test_a_forced_backend_says_every_reason():
    x = torch.ones(2, 3, device="meta")
    with ops.backend("cpp"), pytest.raises(RuntimeError) as error:
        ops.layer_norm(x, 3)
    assert "cpp: it serves CPU tensors, not meta ones" in str(error.value)
    assert "reference: can serve it" in str(error.value)


@pytest.mark.any_build
def test_info_names_a_backend_for_every_operator():
    facts = json.loads(json.dumps(tinyllm.info()))
    assert set(facts["operators"]) == set(dispatch.OPERATORS)
    for devices in facts["operators"].values():
        for row in devices.values():
            assert row["backend"] in dispatch.BACKENDS
            assert set(row["not"]) | {row["backend"]} <= set(dispatch.BACKENDS)
            assert row["dtypes"]
    attention = facts["operators"]["attention"]["cuda"]
    assert attention["backend"] == "triton"
    assert attention["dtypes"] == ["float32", "bfloat16", "float16"]
    assert "chunks" in attention["shapes"]
    assert "cuBLAS" in facts["operators"]["linear"]["cuda"]["not"]["triton"]
    assert facts["cpu"]["threads"] == torch.get_num_threads()


@pytest.mark.any_build
def test_without_the_extension_everything_runs_and_info_says_why():
    code = """
import sys
sys.modules["tinyllm._C"] = None  # what an import of a missing library meets
import torch, tinyllm
model = tinyllm.SimpleLLM(10, 16, 32, 2)
model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
assert tinyllm.ops.last_backend() == "reference"
from tinyllm.info import print_info
print_info()
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert "compiled extension   not loaded: the C++ extension does not load" in result.stdout
    assert "reference" in result.stdout
