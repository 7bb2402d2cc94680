import json
import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import tinyllm
from tinyllm import ops
from tinyllm._info import format_info
from tinyllm.ops import dispatch
from tinyllm.ops.backends import cpp, cuda, triton
from tinyllm.ops.decoder import DECODE_BLOCK, DECODER


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


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "neon"])
def test_every_instruction_set(isa):
    if isa not in cpp.library.usable_isas():
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
    assert ops.last_backend() == ("cpp" if cpp.loaded else "reference")
    with (
        pytest.raises(ValueError, match="name is 'cuda2'; backends are cpp, cuda, triton, reference"),
        ops.backend("cuda2"),
    ):
        pass


@pytest.mark.any_build
def test_forcing_some_operators():
    x = torch.ones(2, 3)
    with ops.backend("reference", "layer_norm", "linear"):
        ops.layer_norm(x, 3)
        assert ops.last_backend() == "reference"
        ops.rms_norm(x, 3)
        assert ops.last_backend() == ("cpp" if cpp.loaded else "reference")
    ops.layer_norm(x, 3)
    assert ops.last_backend() == ("cpp" if cpp.loaded else "reference")
    says = "operators has 'norm'; operators are .*layer_norm,"
    with pytest.raises(ValueError, match=says), ops.backend("reference", "norm"):
        pass


@pytest.mark.any_build
def test_a_fused_operator_does_not_hide_forced_parts(monkeypatch):
    model, served = tinyllm.SimpleLLM(10, 16, 32, 2), []
    choose = dispatch._choose
    monkeypatch.setattr(dispatch, "_choose", lambda op, *a: served.append((op.name, choose(op, *a))) or served[-1][1])
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
from tinyllm._info import print_info
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
from tinyllm._info import print_info
print_info()
"""
    for interpret in ("0", "1"):
        result = python(code, TRITON_INTERPRET=interpret)
        assert result.returncode == 0, result.stderr
        says = "not in use here: triton is not installed" if cuda.why_not else "triton: triton is not installed"
        assert says in result.stdout


@pytest.mark.any_build
def test_a_gpu_that_is_too_old(monkeypatch):
    monkeypatch.setattr(cuda, "_capability", lambda index: (7, 5))
    assert cuda.too_old(0) == "it needs compute capability 8.0 or later; cuda:0 has 7.5"


@pytest.mark.any_build
@pytest.mark.parametrize("name", ["cpp", "cuda", "triton"])
def test_a_forced_backend_says_every_reason(name):
    x = torch.ones(2, 3, device="meta")
    with ops.backend(name), pytest.raises(RuntimeError) as error:
        ops.layer_norm(x, 3)
    assert str(error.value) == (
        f"the forced backend '{name}' cannot serve this call of layer_norm. cpp: it serves CPU tensors, not meta ones; "
        "cuda: it serves CUDA tensors, not meta ones; triton: it serves CUDA tensors, not meta ones; reference: can "
        "serve it"
    )


@pytest.mark.any_build
def test_info_names_a_backend_for_every_operator(monkeypatch):
    monkeypatch.setattr(cuda, "why_not", "the CUDA library was not built")
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
from tinyllm._info import print_info
print_info()
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert "compiled extension   not loaded: the C++ extension does not load" in result.stdout
    assert "reference" in result.stdout


@pytest.fixture
def cuda_build(monkeypatch):
    """Pretend that there are a GPU, the CUDA library and Triton."""
    monkeypatch.setattr(cuda, "why_not", None)
    monkeypatch.setattr(cuda, "emulated", False)
    monkeypatch.setattr(cuda, "_capability", lambda index: (8, 0))
    monkeypatch.setattr(cuda, "_norm_columns", lambda index: 16_384)
    monkeypatch.setattr(triton, "why_not", None)


class ChosenError(Exception):
    pass


def on_a_gpu(name, dtype=torch.float32, **options):
    """Return the backend that would serve a call on a GPU; the operator's function goes no further."""
    served, choose = [], dispatch._choose

    def chosen(*arguments):
        served.append(choose(*arguments))
        raise ChosenError

    def ones(*shape, dtype=dtype):
        return torch.ones(shape, dtype=dtype, device="cuda")

    calls = {
        "layer_norm": lambda: ops.layer_norm(ones(3, 64), 64, **options),
        "add_layer_norm": lambda: ops.add_layer_norm(ones(3, 64), ones(3, 64), 64),
        "rms_norm": lambda: ops.rms_norm(ones(3, 64), 64),
        "add_rms_norm": lambda: ops.add_rms_norm(ones(3, 64), ones(3, 64), 64),
        "rotary_embedding": lambda: ops.rotary_embedding(*[ones(2, 2, 3, 64)] * 2, *[ones(1, 3, 64)] * 2),
        "gated_activation": lambda: ops.gated_activation(ones(3, 64), ones(3, 64)),
        "embedding": lambda: ops.embedding(ones(2, 2, dtype=torch.long), ones(3, 64), **options),
        "attention": lambda: ops.scaled_dot_product_attention(*[ones(2, 2, 3, 64)] * 3, **options),
        "linear": lambda: ops.linear(ones(3, 64), ones(64, 64)),
        "feed_forward": lambda: ops.feed_forward(ones(3, 64), ones(64, 64), None, ones(64, 64), None),
        "transformer_block": lambda: ops.transformer_block(ones(2, 3, 64), [ones(64, 64)] * 5 + [ones(64)] * 2),
        "transformer": lambda: ops.transformer(ones(2, 3, dtype=torch.long), [ones(64, 64)] * 2, num_layers=0),
        "cross_entropy": lambda: ops.cross_entropy(ones(3, 64), ones(3, dtype=torch.long)),
        "linear_cross_entropy": lambda: ops.linear_cross_entropy(ones(3, 64), ones(9, 64), ones(3, dtype=torch.long)),
        "adamw": lambda: ops.adamw_norm([ones(3, 64)]),
        "decoder": lambda: dispatch.choose(DECODER, ones(3, 64)),
        "decode_block": lambda: dispatch.choose(DECODE_BLOCK, ones(3, 64)),
        "quantize_weight": lambda: ops.quantize_weight(ones(3, 64), "int8"),
        "quantized_linear": lambda: ops.quantized_linear(
            ones(3, 64), ops.QuantizedWeight(ones(3, 64, dtype=torch.bfloat16), None, 64)
        ),
        "quantized_embedding": lambda: ops.quantized_embedding(
            ones(3, dtype=torch.long), ops.QuantizedWeight(ones(3, 64, dtype=torch.bfloat16), None, 64), dtype=dtype
        ),
    }
    with FakeTensorMode(), mock.patch.object(dispatch, "_choose", chosen), pytest.raises(ChosenError):
        calls[name]()
    return served[0]


@pytest.mark.any_build
@pytest.mark.parametrize("name", dispatch.OPERATORS)
def test_cuda_cpp_comes_before_triton(name, cuda_build, monkeypatch):
    declared = dispatch.OPERATORS[name].kernels
    takes = {backend: getattr(kernels, "dtypes", ()) for backend, kernels in declared.items()}

    def expected(*backends):
        return {
            dtype: next((backend for backend in backends if dtype in takes[backend]), "reference")
            for dtype in dispatch.FLOATS
        }

    def served():
        return {dtype: on_a_gpu(name, dtype) for dtype in dispatch.FLOATS}

    assert served() == expected("cuda", "triton")
    monkeypatch.setattr(triton, "why_not", "triton is not installed")
    assert served() == expected("cuda")
    monkeypatch.setattr(cuda, "_capability", lambda index: (7, 0))
    assert served() == expected()


@pytest.mark.any_build
def test_what_serves_on_a_gpu(cuda_build):
    for name in ("layer_norm", "add_layer_norm", "rms_norm", "cross_entropy", "embedding"):
        assert (on_a_gpu(name), on_a_gpu(name, torch.float64)) == ("cuda", "triton")
    assert (on_a_gpu("attention"), on_a_gpu("attention", torch.bfloat16)) == ("triton", "cuda")
    assert on_a_gpu("attention", torch.bfloat16, dropout_p=0.1) == "triton"
    assert on_a_gpu("attention", torch.bfloat16, is_causal=True, causal_offset=1) == "triton"
    assert on_a_gpu("attention", torch.bfloat16, is_causal=True, causal_offset=2) == "cuda"  # which hides nothing
    for name in ("linear_cross_entropy", "quantized_linear", "quantized_embedding", "add_rms_norm", "rotary_embedding"):
        assert on_a_gpu(name) == "triton"
    assert on_a_gpu("quantized_linear", torch.bfloat16) == "triton"
    for name in (
        "linear",
        "feed_forward",
        "transformer_block",
        "transformer",
        "quantize_weight",
        "decoder",
        "decode_block",
    ):
        assert on_a_gpu(name) == "reference"


@pytest.mark.any_build
def test_a_limit_that_info_states_is_the_one_that_calls_meet(cuda_build):
    limits = dispatch.OPERATORS["attention"].kernels["cuda"].limits
    assert dispatch.OPERATORS["attention"].describe("cuda")["shapes"] == ", ".join(limit.takes for limit in limits)
    with (
        ops.backend("cuda"),
        pytest.raises(dispatch.CannotServeError, match=r"is 0\.1; the kernel takes no dropout"),
    ):
        on_a_gpu("embedding", dropout_p=0.1)


@pytest.mark.any_build
def test_a_library_without_some_kernels(cuda_build, monkeypatch):
    monkeypatch.setattr(cuda, "has", lambda name: not name.startswith("rms_norm"))
    says = "this build of the CUDA library has no kernel for it"
    assert cuda.provide(("rms_norm_fwd", "rms_norm_bwd"), "layer_norm") == says
    assert cuda.provide(("layer_norm_fwd", "layer_norm_bwd"), "layer_norm") is None
    monkeypatch.setitem(dispatch.OPERATORS["rms_norm"].kernels, "cuda", says)
    assert on_a_gpu("rms_norm") == "triton"
    with ops.backend("cuda"), pytest.raises(dispatch.CannotServeError, match=f"cuda: {says}; triton: can serve it"):
        on_a_gpu("rms_norm")


@pytest.mark.any_build
def test_the_width_of_rows_is_what_the_library_says_of_the_gpu(cuda_build, monkeypatch):
    for columns in (16_384, 131_072):
        monkeypatch.setattr(cuda, "_norm_columns", {0: columns}.__getitem__)
        assert cuda.most_columns(SimpleNamespace(get_device=lambda: 0)) == columns


@pytest.mark.any_build
def test_info_on_a_cuda_build(cuda_build):
    row = dispatch.OPERATORS["attention"].describe("cuda")
    assert (row["backend"], row["dtypes"]) == ("cuda", ["bfloat16", "float16"])
    assert row["shapes"] == "head_dim 64 or 128, no attn_mask, no dropout, scale above 0, no causal_offset"
    assert row["rest"]["backend"] == "triton"
    assert row["rest"]["dtypes"] == ["float32", "bfloat16", "float16"]
    row = dispatch.OPERATORS["cross_entropy"].describe("cuda")
    assert (row["backend"], row["rest"]["dtypes"]) == ("cuda", ["float64"])
    assert dispatch.OPERATORS["linear_cross_entropy"].describe("cuda")["not"]["cuda"] == "Triton's kernel serves it"
    assert dispatch.OPERATORS["layer_norm"].describe("cpu")["rest"] is None

    lines = format_info().splitlines()
    assert "CUDA C++             loaded (" in "\n".join(lines)
    lines = lines[next(i for i, line in enumerate(lines) if line.startswith("CUDA tensors")) :]
    at = next(i for i, line in enumerate(lines) if line.startswith("layer_norm "))
    assert [" ".join(line.split()) for line in lines[at : at + 2]] == [
        "layer_norm cuda float32, bfloat16, float16; rows up to 16,384 wide (131,072 on 9.0 and later)",
        "triton the rest: float32, float64, bfloat16, float16",
    ]
    assert any(line.endswith("cuda, triton: PyTorch's products (cuBLAS) serve it") for line in lines)
    assert any(line.startswith("cuda is CUDA C++") for line in lines)
    assert max(map(len, lines[1:])) <= 130


@pytest.mark.any_build
def test_info_on_a_cuda_build_without_triton(cuda_build, monkeypatch):
    monkeypatch.setattr(triton, "why_not", "triton is not installed")
    row = dispatch.OPERATORS["attention"].describe("cuda")
    assert (row["backend"], row["rest"], row["not"]["triton"]) == ("cuda", None, "triton is not installed")
    assert "CUDA tensors, which are not in use here: triton" not in format_info()


@pytest.mark.any_build
def test_info_says_why_there_is_no_cuda_library(monkeypatch):
    monkeypatch.setattr(cuda, "why_not", "the CUDA library was not built: there is no nvcc")
    monkeypatch.setattr(cuda, "emulated", False)
    text = format_info()
    assert "CUDA C++             not loaded: the CUDA library was not built: there is no nvcc" in text
    assert text.count("there is no nvcc") == 1
    assert tinyllm.info()["gpu"]["cuda_library"]["why_not"].endswith("there is no nvcc")


@pytest.mark.any_build
def test_an_emulated_library_that_does_not_load():
    code = """
import torch, tinyllm
print(tinyllm.info()["gpu"]["cuda_library"])
tinyllm.ops.layer_norm(torch.ones(2, 2), 2)
"""
    result = python(code, TINYLLM_EMULATED_CUDA="/nowhere.so")
    assert result.returncode == 0, result.stderr
    assert "TINYLLM_EMULATED_CUDA does not load: /nowhere.so" in result.stdout
