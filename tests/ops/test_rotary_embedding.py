import pytest
import torch

from tests.helpers.backends import cases, on, with_dtypes
from tests.ops.parity import DTYPES, assert_same_bits, check_parity, outputs_and_gradients
from tinyllm import ops, reference

# B, H, Hkv, T, D, columns that are rotated.
SHAPES = {
    "cpp": [
        (1, 1, 1, 1, 2, 2), (2, 3, 1, 5, 16, 16), (1, 4, 2, 33, 20, 12), (3, 2, 2, 7, 130, 130), (2, 1, 1, 4, 6, 0),
        (0, 2, 1, 3, 8, 8), (1, 2, 1, 0, 8, 8), (1, 1, 1, 3, 7, 6),
    ],
    "triton": [(1, 1, 1, 1, 2, 2), (2, 3, 1, 5, 16, 16), (1, 4, 2, 3, 20, 12), (2, 1, 1, 4, 6, 0), (0, 2, 1, 3, 8, 8)],
}  # fmt: skip


def angles_of(backend, rows, tokens, columns, dtype):
    angles = backend.draw(rows, tokens, columns, dtype=torch.float64, seed=9)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def call(function, cos, sin):
    return lambda query, key: function(query, key, cos, sin)


@cases("batch heads kv_heads tokens head_dim rotated dtype", **with_dtypes(SHAPES, triton=DTYPES[1:]))
@pytest.mark.parametrize("alike", [True, False], ids=["one row of angles", "a row for each sequence"])
def test_parity(backend, batch, heads, kv_heads, tokens, head_dim, rotated, dtype, alike):
    query = backend.draw(batch, heads, tokens, head_dim, dtype=dtype)
    key = backend.draw(batch, kv_heads, tokens, head_dim, dtype=dtype, seed=1)
    cos, sin = angles_of(backend, 1 if alike else batch, tokens, rotated, dtype)
    plain = call(reference.rotary_embedding, cos, sin)
    check_parity(call(ops.rotary_embedding, cos, sin), plain, plain, (query, key))
    assert ops.last_backend() == backend.name


def test_it_is_what_transformers_computes():
    x, cos, sin = torch.randn(2, 3, 5, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    half = torch.cat([-x[..., 4:], x[..., :4]], -1)
    for module in (ops, reference):
        torch.testing.assert_close(module.rotary_embedding(x, x, cos, sin)[0], x * cos + half * sin)


@on("cpp", "triton")
def test_any_strides_and_one_gradient_alone(backend):
    dtype = torch.float64 if backend.name == "cpp" else torch.float32
    joined = backend.draw(2, 5, 3, 4, 12, dtype=dtype)  # (B, T, 3, H, D), as one projection gives it
    query, key, _ = joined.permute(2, 0, 3, 1, 4)
    cos, sin = angles_of(backend, 1, 5, 12, dtype)
    ours, plain = call(ops.rotary_embedding, cos, sin), call(reference.rotary_embedding, cos, sin)
    found = outputs_and_gradients(ours, query, key)
    torch.testing.assert_close(found, outputs_and_gradients(plain, query, key))
    leaf = query.clone().requires_grad_()
    for which in (0, 1):
        grads = [torch.autograd.grad(f(leaf, 2 * leaf)[which].square().sum(), leaf)[0] for f in (ours, plain)]
        torch.testing.assert_close(*grads)
    wide = backend.draw(2, 4, 5, 24, dtype=dtype)[..., ::2]
    torch.testing.assert_close(ours(wide, wide), plain(wide, wide))


@on("cpp")
def test_bits_do_not_depend_on_threads(backend):
    query = backend.draw(3, 5, 67, 64)
    cos, sin = angles_of(backend, 1, 67, 64, torch.float32)
    rotate = call(ops.rotary_embedding, cos, sin)
    assert_same_bits(backend.threads, lambda: outputs_and_gradients(rotate, query, query[:, :2]))


def test_second_derivatives_angles_with_gradients_and_the_compiler():
    query, key = torch.randn(2, 2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = torch.randn(2, 1, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda q, k: ops.rotary_embedding(q, k, cos.detach(), sin.detach()), (query, key)
    )
    assert torch.autograd.gradcheck(ops.rotary_embedding, (query, key, cos, sin))  # by the reference
    assert ops.last_backend() == "reference"
    compiled = torch.compile(ops.rotary_embedding, fullgraph=True, backend="aot_eager")
    arguments = query.detach(), key.detach(), cos.detach(), sin.detach()
    torch.testing.assert_close(compiled(*arguments), ops.rotary_embedding(*arguments))


@on("cpp", "triton")
def test_opcheck(backend):
    query, key = backend.draw(2, 3, 4, 10), backend.draw(2, 1, 4, 10)
    cos, sin = angles_of(backend, 1, 4, 8, torch.float32)
    torch.library.opcheck(backend.raw.rotary_embedding_fwd, (query, key, cos, sin))
    torch.library.opcheck(backend.raw.rotary_embedding_bwd, (query, key, cos, sin))


@pytest.mark.parametrize(("change", "error", "says"), [
    ({"query": torch.ones(2, 3, 8)}, ValueError, r"query has shape \[2, 3, 8\]; \(B, H, T, D\)"),
    ({"query": torch.ones(2, 2, 3, 8, dtype=torch.int64)}, TypeError, "query has dtype torch.int64"),
    ({"key": torch.ones(2, 2, 4, 8)}, ValueError, r"key has shape \[2, 2, 4, 8\]"),
    ({"key": torch.ones(2, 2, 3, 8, dtype=torch.float64)}, TypeError, "key has dtype torch.float64"),
    ({"cos": torch.ones(3, 8)}, ValueError, r"cos has shape \[3, 8\]; \(2 or 1, 3, an even number up to 8\)"),
    ({"cos": torch.ones(1, 3, 7)}, ValueError, "cos has shape"),
    ({"cos": torch.ones(1, 3, 10)}, ValueError, "cos has shape"),
    ({"sin": torch.ones(2, 3, 8)}, ValueError, "sin has shape"),
    ({"sin": torch.ones(1, 3, 8, device="meta")}, ValueError, "sin is on meta"),
])  # fmt: skip
def test_bad_input(change, error, says):
    arguments = {
        "query": torch.ones(2, 2, 3, 8),
        "key": torch.ones(2, 1, 3, 8),
        "cos": torch.ones(1, 3, 8),
        "sin": torch.ones(1, 3, 8),
    }
    with pytest.raises(error, match=says):
        ops.rotary_embedding(**arguments | change)


@on("cpp")
def test_a_raw_call_with_bad_shapes_is_refused(backend):
    x, cos = torch.ones(2, 2, 3, 8), torch.ones(1, 3, 8)
    raw = backend.raw.rotary_embedding_fwd
    for arguments in ((x, x[:1], cos, cos), (x, x, cos[:, :2], cos), (x, x, cos, cos[..., :6]), (x[0], x, cos, cos)):
        with pytest.raises((ValueError, RuntimeError), match="rotary_embedding: "):
            raw(*arguments)
