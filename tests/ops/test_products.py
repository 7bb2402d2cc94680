"""A table says who multiplies on a CPU: the same for every run, whatever was called before."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.ops.operations import Operations
from tests.ops.parity import DTYPES
from tinyllm import ops
from tinyllm.ops import _products
from tinyllm.ops.backends import cpp
from tinyllm.ops.transformer import Settings, serves

CPP = {dtype: dict.fromkeys(_products.CLASSES, "cpp") for dtype in _products.DTYPES}


@pytest.fixture(autouse=True)
def undecided(monkeypatch, tmp_path):
    """No setting, and no file of this machine's user."""
    monkeypatch.delenv("TINYLLM_LINEAR", raising=False)
    monkeypatch.setattr(_products, "_setting", None)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    _products.forget()
    yield
    monkeypatch.undo()
    _products.forget()


@pytest.fixture
def on(monkeypatch):
    """Let the table believe that this is another machine."""

    def on(isa, family):
        class Library:
            cpu_isa = staticmethod(lambda: isa)
            cpu_family = staticmethod(lambda: family)

        monkeypatch.setattr(_products.cpp, "library", Library)
        _products.forget()

    return on


def served_by(rows, dtype):
    ops.linear(torch.ones(rows, 8, dtype=dtype), torch.ones(5, 8, dtype=dtype))
    return ops.last_backend()


@pytest.mark.parametrize(
    ("isa", "family", "dtype", "expected"),
    [
        ("avx512", "amd-bf16", torch.bfloat16, ["cpp", "reference", "reference"]),
        ("avx512", "amd-bf16", torch.float32, ["cpp", "cpp", "cpp"]),
        ("avx512", "amd-bf16", torch.float64, ["cpp", "reference", "cpp"]),
        ("avx512", "intel-bf16", torch.bfloat16, ["cpp", "cpp", "cpp"]),
        ("avx512", "intel-bf16", torch.float32, ["cpp", "reference", "cpp"]),
        ("avx512", "intel-amx", torch.bfloat16, ["cpp", "reference", "reference"]),
        ("avx2", "amd", torch.bfloat16, ["cpp", "cpp", "cpp"]),
        ("avx512", "other", torch.float16, ["cpp", "cpp", "cpp"]),
        ("neon", "arm", torch.bfloat16, ["cpp", "cpp", "cpp"]),
        ("neon", "arm-bf16", torch.bfloat16, ["cpp", "reference", "reference"]),
        ("neon", "apple", torch.float32, ["cpp", "reference", "reference"]),
    ],
)
def test_the_table_chooses_by_machine_dtype_and_rows(isa, family, dtype, expected, on):
    on(isa, family)
    assert [served_by(rows, dtype) for rows in (4, 32, 33)] == expected


def test_no_clock_decides(monkeypatch):
    """Twice the same call is served alike, and measures nothing."""
    monkeypatch.setattr(_products.time, "perf_counter", lambda: pytest.fail("a call measured time"))
    for dtype in DTYPES:
        assert served_by(16, dtype) == served_by(16, dtype)


@pytest.mark.parametrize("strict", [True, False])
def test_export_holds_our_operators_and_changes_nothing_for_later_calls(strict, on):
    on("avx512", "amd-bf16")

    class Network(torch.nn.Module):
        def forward(self, x, weight):
            return ops.linear(ops.feed_forward(x, weight, None, weight.mT, None), weight)

    x, weight = torch.randn(200, 10), torch.randn(12, 10)
    expected = Network()(x, weight)
    before = _products.current()
    program = torch.export.export(Network(), (x, weight), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"tinyllm.linear_fwd.default", "tinyllm.feed_forward_fwd.default"} <= targets
    assert not any("grad" in target for target in targets)
    assert torch.equal(program.module()(x, weight), expected)
    assert _products.current() == before
    assert torch.equal(Network()(x, weight), expected)
    assert ops.last_backend() == "cpp"


def test_a_call_looks_nothing_up_again(monkeypatch):
    """A small product takes about as long as reading the table would."""
    first = served_by(16, torch.float32)
    monkeypatch.setattr(_products, "current", lambda: pytest.fail("the table was read again"))
    assert served_by(17, torch.float32) == first


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_for_any_number_of_rows(dynamic, on):
    """The compiler may know the rows as a symbol: the choice must follow from its class alone."""
    on("avx512", "amd-bf16")
    weight = torch.randn(12, 10)
    compiled = torch.compile(lambda x: ops.linear(x, weight), fullgraph=True, dynamic=dynamic, backend="eager")
    for rows in (40, 41, 57, 3):
        x = torch.randn(rows, 10)
        assert torch.equal(compiled(x), ops.linear(x, weight))


def test_what_is_compiled_follows_a_training(on):
    """Choices are constants of a graph, and dynamo keeps graphs by their code."""
    on("avx512", "other")
    graphs = []

    def keep(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    def run():
        torch.compile(lambda x: ops.linear(x, x), fullgraph=True, backend=keep)(torch.ones(40, 40))

    run()
    torchs = {dtype: dict.fromkeys(_products.CLASSES, "torch") for dtype in _products.DTYPES}
    with _products.kept({"machine": _products.machine(), "choices": torchs}):
        run()
    run()
    ours = [any("tinyllm" in target for target in graph) for graph in graphs]
    assert ours == [True, False, True]


HOMELESS = """
import os, pathlib, sys
if sys.argv[1] == "unknown":
    def nowhere(): raise RuntimeError("Could not determine home directory.")
    pathlib.Path.home = nowhere
import torch, tinyllm
from tinyllm import ops
ops.linear(torch.ones(8, 8), torch.ones(8, 8))
print(tinyllm.info()["cpu"]["products"]["source"])
"""


@pytest.mark.parametrize("home", ["unknown", os.devnull])
def test_without_a_home_folder_the_table_serves(home):
    environment = {name: value for name, value in os.environ.items() if name != "XDG_CONFIG_HOME"} | {"HOME": home}
    command = [sys.executable, "-c", HOMELESS, home]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert "the table that is shipped" in result.stdout


def test_a_resumed_training_keeps_what_it_noted_and_notes_what_it_had_not():
    there = {"machine": _products.machine(), "choices": {**CPP, "float32": dict.fromkeys(_products.CLASSES, "torch")}}
    assert _products.noted(there) == there
    for before in (None, {**there, "machine": "avx9 other"}):
        assert _products.noted(before) == {"machine": _products.machine(), "choices": _products.current()}


def test_a_forced_backend_is_above_the_table(on):
    on("avx512", "amd-bf16")
    with ops.backend("cpp"):
        assert served_by(100, torch.bfloat16) == "cpp"


def test_blocks_and_models_obey_the_table(on):
    on("avx512", "intel-bf16")
    weights = [torch.randn(256, 256) for _ in range(4)] + [torch.randn(1024, 256), torch.randn(256, 1024)]
    parameters = [*weights, torch.ones(256), torch.ones(256)]
    with torch.no_grad():
        for tokens, served in ((64, True), (20, False)):  # many rows, and some
            settings = Settings(1, 4, False, False, "relu", 1e-5, 1e-5, 0.0)
            assert serves("transformer_block", torch.randn(1, tokens, 256), parameters, settings) is served


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("rows", "namespace"), [(33, "tinyllm_products"), (32, "tinyllm")])
def test_linear_cross_entropy_obeys_the_table(rows, namespace, grad, on):
    on("avx512", "amd-bf16")
    x, w = torch.ones(rows, 8, dtype=torch.bfloat16, requires_grad=grad), torch.ones(5, 8, dtype=torch.bfloat16)
    target = torch.zeros(rows, dtype=torch.long)
    with Operations() as operations:
        loss = ops.linear_cross_entropy(x, w, target, reduction="none")
        if grad:
            loss.sum().backward()
    called = [str(function) for function, _ in operations.calls if "linear_cross_entropy" in str(function)]
    names = [f"{namespace}.linear_cross_entropy_{way}.default" for way in ("fwd", "bwd")]
    assert called == names[: 1 + grad]
    assert ops.last_backend() == "cpp"


def test_tune_writes_a_file_that_replaces_the_tables_rows(monkeypatch):
    path = _products.tuned_file()
    assert not path.exists()
    served_by(16, torch.float32)
    assert not path.exists(), "written unasked"
    path.parent.mkdir(parents=True)
    path.write_text('{"another machine": {"choices": null}}')
    monkeypatch.setattr(_products, "ratio", lambda dtype, sizes: 1.5 if sizes[0] > 32 else 1.05)
    _products.tune()
    assert json.loads(path.read_text())["another machine"] == {"choices": None}
    assert [served_by(rows, torch.float32) for rows in (1, 32, 64)] == ["cpp", "cpp", "reference"]
    assert _products.source() == str(path)


def test_what_tune_measures():
    for dtype in (torch.float32, torch.bfloat16):
        assert 0 < _products.ratio(dtype, (4, 64, 64), seconds=0.0) < float("inf")


@pytest.mark.parametrize("text", ["{", '{"%s": {"choices": {"float32": {"few": "mkl"}}}}'])
def test_a_file_that_tune_did_not_write_is_named(text):
    path = _products.tuned_file()
    path.parent.mkdir(parents=True)
    path.write_text(text.replace("%s", _products.machine()))
    with pytest.raises(ValueError, match=r"products\.json"):
        served_by(16, torch.float32)


def test_a_training_keeps_its_choices_on_its_machine():
    note = {"machine": _products.machine(), "choices": {**CPP, "float32": dict.fromkeys(_products.CLASSES, "torch")}}
    with _products.kept(note):
        assert served_by(16, torch.float32) == "reference"
        assert _products.noted() == note
    with _products.kept({**note, "machine": "avx9 other"}):
        assert served_by(4, torch.float32) == "cpp"
    with _products.kept(None):  # a run of an older version
        assert served_by(4, torch.float32) == "cpp"
    with (
        pytest.raises(ValueError, match="the products that the training noted"),
        _products.kept({**note, "choices": 3}),
    ):
        pass


SCALAR = """
import torch, tinyllm
from tinyllm import ops
x = torch.randn(1, 2, 8, 16, requires_grad=True)
w = torch.ones(16)
calls = {
    "attention": lambda: ops.scaled_dot_product_attention(x, x, x, is_causal=True),
    "layer_norm": lambda: ops.layer_norm(x, (16,), w, w),
    "add_layer_norm": lambda: ops.add_layer_norm(x, x, (16,), w, w)[0],
    "cross_entropy": lambda: ops.cross_entropy(x[0, 0], torch.zeros(8, dtype=torch.int64)),
    "linear": lambda: ops.linear(x, torch.ones(4, 16)),
}
for name, call in calls.items():
    call().sum().backward()
    print(name, ops.last_backend())
    with ops.backend("cpp"):
        call()
    print(name, ops.last_backend())
print(tinyllm.info()["operators"]["attention"]["cpu"]["not"]["cpp"])
expected = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
torch.testing.assert_close(calls["attention"](), expected)
for scale in (-0.5, 0.0):  # of which PyTorch's kernel makes NaN
    assert ops.scaled_dot_product_attention(x, x, x, is_causal=True, scale=scale).isfinite().all()
"""


def test_where_only_the_scalar_kernels_run_pytorch_serves():
    """They are several times slower than PyTorch's; a forced backend still forces."""
    result = subprocess.run(
        [sys.executable, "-c", SCALAR],
        capture_output=True,
        text=True,
        env={**os.environ, "TINYLLM_CPU_ISA": "scalar"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    *served, reason = result.stdout.splitlines()
    assert [line.split()[1] for line in served] == ["reference", "cpp"] * 5
    assert "only the scalar kernels" in reason


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype, monkeypatch):
    """Attention, norms and losses never depend; linear does not among few rows, nor among more."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70, 96, generator=generator).to(dtype)
    weight, target = torch.randn(50, 96, generator=generator).to(dtype), torch.arange(70) % 50
    heads = torch.randn(6, 2, 33, 16, generator=generator).to(dtype)
    monkeypatch.setattr(_products, "_setting", "cpp")
    for rows in (1, 3, 5, 8, 33):
        one_norm = ops.layer_norm(x[:rows], (96,))
        assert torch.equal(one_norm, ops.layer_norm(x, (96,))[:rows])
        for loss, arguments in ((ops.cross_entropy, ()), (ops.linear_cross_entropy, (weight,))):
            whole = loss(x, *arguments, target, reduction="none")
            assert torch.equal(loss(x[:rows], *arguments, target[:rows], reduction="none"), whole[:rows])
    for stored, few in ((weight, 8 if dtype == torch.float32 else 4), (weight.t().contiguous().t(), 8)):
        for rows in (few + 1, 33):
            assert torch.equal(ops.linear(x[:rows], stored), ops.linear(x, stored)[:rows])
        for rows in range(1, few):
            assert torch.equal(ops.linear(x[:rows], stored), ops.linear(x[:few], stored)[:rows])
    attended = ops.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    for batch in (1, 4):
        part = heads[:batch]
        assert torch.equal(ops.scaled_dot_product_attention(part, part, part, is_causal=True), attended[:batch])


def test_the_machine_has_a_name():
    assert _products.machine() == f"{cpp.library.cpu_isa()} {cpp.library.cpu_family()}"
    assert cpp.library.cpu_family().split("-")[0] in ("amd", "intel", "arm", "apple", "other")


@pytest.mark.parametrize("who", _products.WHO)
def test_info_shows_what_the_environment_decides(monkeypatch, who):
    monkeypatch.setenv("TINYLLM_LINEAR", who)
    assert _products.source() == f"TINYLLM_LINEAR={who}"
    assert _products.noted()["choices"] == {dtype: dict.fromkeys(_products.CLASSES, who) for dtype in _products.DTYPES}


@pytest.mark.parametrize("command", ["info", "check"])
def test_a_wrong_setting_is_an_error_of_the_command(command, tmp_path):
    """Not of the kernels that `tinyllm check` calls."""
    environment = {**os.environ, "TINYLLM_LINEAR": "fast"}
    done = subprocess.run(
        [sys.executable, "-m", "tinyllm", command], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "TINYLLM_LINEAR is 'fast'; auto, cpp or torch is needed" in done.stderr
    assert "failed" not in done.stdout.lower()
