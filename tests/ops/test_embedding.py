import math

import pytest
import torch
import torch.nn.functional as F

from tests.ops.parity import DTYPES, check_parity
from tinyllm import ops, reference

# ids' shape, V, D
SHAPES = [
    ((), 3, 4), ((1,), 1, 1), ((7,), 5, 3), ((2, 3), 4, 16), ((3, 129), 65, 31), ((2, 2, 5), 7, 64),
    ((4, 50), 5000, 37), ((12, 64), 65, 128),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _on_the_kernel():
    with ops.backend("cpp"):
        yield


def make(shape, rows, size, dtype, id_dtype=torch.int64):
    generator = torch.Generator().manual_seed(hash((shape, rows, size)) % 2**31)
    ids = torch.randint(rows, shape, generator=generator).to(id_dtype)
    draw = lambda *s: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return ids, draw(rows, size), draw(shape[-1] if shape else 1, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "rows", "size"), SHAPES, ids=str)
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("with_positions", [True, False], ids=["positions", "plain"])
def test_parity(shape, rows, size, dtype, id_dtype, with_positions):
    if with_positions and not shape:
        pytest.skip("a single id has no position")
    ids, weight, positions = make(shape, rows, size, dtype, id_dtype)
    check_parity(
        lambda w, *p: ops.embedding(ids, w, positions=p[0] if p else None),
        lambda w, *p: F.embedding(ids, w) + (p[0] if p else 0),
        lambda w, *p: reference.embedding(ids, w, positions=p[0] if p else None),
        (weight, positions) if with_positions else (weight,),
    )
    assert ops.last_backend() == "cpp"


def test_the_values_are_exactly_pytorchs():
    ids, weight, positions = make((3, 20), 65, 33, torch.float32)
    assert torch.equal(ops.embedding(ids, weight), F.embedding(ids, weight))
    assert torch.equal(ops.embedding(ids, weight, positions=positions), F.embedding(ids, weight) + positions)


@pytest.mark.parametrize("padding_idx", [0, 3, -1])
def test_padding_gets_no_gradient(padding_idx):
    ids, weight, positions = make((4, 30), 6, 8, torch.float64)
    leaves = weight.requires_grad_(), positions.requires_grad_()
    ours = ops.embedding(ids, leaves[0], padding_idx, positions=leaves[1])
    theirs = F.embedding(ids, leaves[0], padding_idx) + leaves[1]
    grad = torch.randn_like(theirs)
    for a, b in zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(theirs, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_any_strides_and_an_expanded_gradient():
    ids = torch.randint(9, (6, 10))[:, ::2].t()
    weight = torch.randn(16, 18, dtype=torch.float64)[::2].t()[:9].requires_grad_()
    positions = torch.randn(8, 1, dtype=torch.float64).expand(8, 6).t().requires_grad_()
    leaves = weight, positions
    ours, theirs = ops.embedding(ids, weight, positions=positions), F.embedding(ids, weight) + positions
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(theirs.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("shape", "rows", "size"), [((0,), 4, 3), ((2, 0), 4, 3), ((0, 2), 4, 3), ((2, 3), 4, 0), ((0,), 0, 3)]
)
def test_empty(shape, rows, size):
    ids = torch.zeros(shape, dtype=torch.int64)
    weight, positions = torch.randn(rows, size, requires_grad=True), torch.randn(shape[-1], size, requires_grad=True)
    y = ops.embedding(ids, weight, positions=positions)
    assert y.shape == (*shape, size)
    for grad, leaf in zip(torch.autograd.grad(y.sum(), (weight, positions)), (weight, positions), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_bits_do_not_depend_on_threads():
    ids, weight, positions = make((16, 700), 300, 72, torch.float32)
    grad = torch.randn(16, 700, 72)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.detach().requires_grad_() for t in (weight, positions)]
            y = ops.embedding(ids, leaves[0], positions=leaves[1])
            results.append([y, *torch.autograd.grad(y, leaves, grad)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_only_what_is_wanted_is_computed():
    ids, weight, positions = make((2, 3), 4, 5, torch.float32)
    (grad,) = torch.autograd.grad(ops.embedding(ids, weight, positions=positions.requires_grad_()).sum(), positions)
    assert torch.equal(grad, torch.full_like(positions, 2.0))
    (grad,) = torch.autograd.grad(
        ops.embedding(ids, weight.requires_grad_(), positions=positions.detach()).sum(), weight
    )
    assert torch.equal(grad.sum(), torch.tensor(30.0))


def test_gradcheck_and_double_backward():
    ids, weight, positions = make((2, 3), 4, 3, torch.float64)
    leaves = weight.requires_grad_(), positions.requires_grad_()
    f = lambda w, p: ops.embedding(ids, w, 1, positions=p).pow(2)  # noqa: E731
    assert torch.autograd.gradcheck(lambda w, p: ops.embedding(ids, w, positions=p), leaves)
    assert torch.autograd.gradgradcheck(lambda w, p: ops.embedding(ids, w, positions=p).pow(2), leaves)
    assert torch.autograd.grad(f(*leaves).sum(), leaves[0])[0][1].eq(0).all()


def test_opcheck():
    ids, weight, positions = make((2, 3), 4, 5, torch.float32)
    raw = torch.ops.tinyllm
    torch.library.opcheck(raw.embedding_fwd, (ids, weight, positions))
    torch.library.opcheck(raw.embedding_fwd, (ids.int(), weight.bfloat16(), None))
    grad = torch.randn(2, 3, 5)
    torch.library.opcheck(raw.embedding_bwd, (grad, ids, 4, 1, True, True))
    torch.library.opcheck(raw.embedding_bwd, (grad, ids, 4, None, False, True))


def test_compile_and_export():
    ids, weight, positions = make((2, 3), 4, 5, torch.float32)
    leaves = weight.requires_grad_(), positions.requires_grad_()

    def f(ids, w, p):
        return ops.embedding(ids, w, positions=p) * 2

    eager, compiled = f(ids, *leaves), torch.compile(f, fullgraph=True)(ids, *leaves)
    assert torch.equal(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(eager.sum(), leaves), strict=True):
        assert torch.equal(a, b)

    class Table(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(weight.detach())

        def forward(self, ids):
            return ops.embedding(ids, self.weight)

    with torch.no_grad():
        program = torch.export.export(Table(), (ids,))
    assert any("embedding_fwd" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(ids), F.embedding(ids, weight))


class TestDropout:
    """Which elements are dropped is read from a table of ones."""

    def factors(self, ids, size, p, seed):
        """The mask that a call after manual_seed(seed) uses: what the sum is multiplied by."""
        ones = torch.ones(int(ids.max()) + 1, size, dtype=torch.float64)
        torch.manual_seed(seed)
        return ops.embedding(ids, ones, dropout_p=p)

    @pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
    def test_the_fraction_kept_and_the_expectation(self, p):
        factors = self.factors(torch.zeros(8, 130, dtype=torch.int64), 257, p, seed=0)
        kept = factors != 0
        torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1 / (1 - p)))
        # 267,280 draws: five standard deviations.
        assert abs(kept.double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel())
        # Neither columns nor tokens repeat each other.
        assert abs(kept.double().mean((0, 1)) - (1 - p)).max() < 6 * math.sqrt(p * (1 - p) / 1040)
        assert abs(kept.double().mean(2) - (1 - p)).max() < 6 * math.sqrt(p * (1 - p) / 257)
        assert not torch.equal(kept[0], kept[1])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("shape", "rows", "size"), SHAPES, ids=str)
    @pytest.mark.parametrize("with_positions", [True, False], ids=["positions", "plain"])
    def test_parity_with_the_same_mask(self, shape, rows, size, dtype, with_positions):
        if with_positions and not shape:
            pytest.skip("a single id has no position")
        ids, weight, positions = make(shape, rows, size, dtype)
        factors = self.factors(ids, size, 0.3, seed=7)

        def ours(w, *p):
            torch.manual_seed(7)
            return ops.embedding(ids, w, positions=p[0] if p else None, dropout_p=0.3)

        def exact(w, *p):
            return reference.embedding(ids, w, positions=p[0] if p else None, factors=factors)

        check_parity(ours, exact, exact, (weight, positions) if with_positions else (weight,))
        assert ops.last_backend() == "cpp"

    def test_bits_do_not_depend_on_threads(self):
        ids, weight, positions = make((16, 700), 300, 72, torch.float32)
        grad = torch.randn(16, 700, 72)
        before, results = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                torch.manual_seed(3)
                leaves = [t.detach().requires_grad_() for t in (weight, positions)]
                y = ops.embedding(ids, leaves[0], positions=leaves[1], dropout_p=0.2)
                results.append([y, *torch.autograd.grad(y, leaves, grad)])
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    def test_the_seed_decides(self):
        ids, weight, positions = make((3, 20), 65, 33, torch.float32)
        outs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outs.append(ops.embedding(ids, weight, positions=positions, dropout_p=0.5))
        assert torch.equal(outs[0], outs[1])
        assert not torch.equal(outs[0], outs[2])
        assert not torch.equal(outs[2], ops.embedding(ids, weight, positions=positions, dropout_p=0.5))

    def test_everything_dropped(self):
        ids, weight, positions = make((3, 20), 65, 33, torch.float32)
        leaves = weight.requires_grad_(), positions.requires_grad_()
        out = ops.embedding(ids, leaves[0], positions=leaves[1], dropout_p=1.0)
        for x in (out, *torch.autograd.grad(out.sum(), leaves)):
            assert torch.equal(x, torch.zeros_like(x))

    def test_padding_gets_no_gradient(self):
        ids, weight, _ = make((4, 30), 6, 8, torch.float32)
        y = ops.embedding(ids, weight.requires_grad_(), 3, dropout_p=0.5)
        (grad,) = torch.autograd.grad(y.sum(), weight)
        assert grad.eq(0).all(1).tolist() == [row == 3 for row in range(6)]

    def test_gradients_of_gradients(self):
        ids, weight, positions = make((2, 3), 4, 3, torch.float64)
        leaves = weight.requires_grad_(), positions.requires_grad_()

        def f(w, p):
            torch.manual_seed(5)
            return ops.embedding(ids, w, positions=p, dropout_p=0.4)

        assert torch.autograd.gradcheck(f, leaves)
        assert torch.autograd.gradgradcheck(lambda w, p: f(w, p).pow(2), leaves)

    @pytest.mark.parametrize(("shape", "rows", "size"), [((0,), 4, 3), ((2, 3), 4, 0)])
    def test_empty(self, shape, rows, size):
        ids, weight = torch.zeros(shape, dtype=torch.int64), torch.randn(rows, size, requires_grad=True)
        y = ops.embedding(ids, weight, dropout_p=0.5)
        assert y.shape == (*shape, size)
        assert torch.equal(torch.autograd.grad(y.sum(), weight)[0], torch.zeros_like(weight))

    def test_the_compiler_and_opcheck(self):
        ids, weight, positions = make((2, 3), 4, 5, torch.float32)
        rng = torch.tensor([1, 2])
        raw = torch.ops.tinyllm
        torch.library.opcheck(raw.embedding_fwd, (ids, weight, positions, 0.5, rng))
        torch.library.opcheck(raw.embedding_bwd, (torch.randn(2, 3, 5), ids, 4, 1, True, True, 0.5, rng))
        with pytest.raises((ValueError, RuntimeError), match="dropout needs rng"):
            raw.embedding_fwd(ids, weight, positions, 0.5, None)
        with pytest.raises((ValueError, RuntimeError), match="dropout needs rng"):
            raw.embedding_bwd(torch.randn(2, 3, 5), ids, 4, None, True, True, 0.5, None)
        compiled = torch.compile(lambda w, p: ops.embedding(ids, w, positions=p, dropout_p=0.5), fullgraph=True)
        leaves = [torch.ones_like(x).requires_grad_() for x in (weight, positions)]
        torch.manual_seed(0)
        first = compiled(*leaves)
        assert set(first.unique().tolist()) == {0.0, 4.0}
        assert not torch.equal(first, compiled(*leaves))
        torch.manual_seed(0)
        assert torch.equal(first, compiled(*leaves))
        (grad,) = torch.autograd.grad(first.sum(), leaves[1])
        assert torch.equal(grad, first.detach().sum(0) / 2)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1])
@pytest.mark.parametrize("grad", [True, False])
def test_an_id_out_of_range_is_named(backend, bad, grad):
    ids = torch.tensor([[0, 3], [bad, 1]], dtype=torch.int32)
    with (
        ops.backend(backend),
        pytest.raises(IndexError, match=rf"the token id {bad}; ids must be in 0 \.\. 3"),
    ):
        ops.embedding(ids, torch.ones(4, 2, requires_grad=grad))


@pytest.mark.parametrize(("arguments", "reason"), [
    ({"max_norm": 1.0}, "max_norm changes the weight"),
    ({"sparse": True}, "gradient is dense"),
    ({"scale_grad_by_freq": True}, "not scaled"),
    ({"positions": torch.ones(2, 2, dtype=torch.float64)}, "positions is torch.float64"),
])  # fmt: skip
def test_what_the_kernel_has_not_goes_to_pytorch(arguments, reason):
    ids, weight = torch.tensor([0, 3]), torch.full((4, 2), 3.0)
    with pytest.raises(RuntimeError, match=reason):
        ops.embedding(ids, weight, **arguments)
    with ops.backend("reference"):
        torch.manual_seed(0)
        theirs = reference.embedding(ids, weight.clone(), **arguments)
        torch.manual_seed(0)
        torch.testing.assert_close(ops.embedding(ids, weight, **arguments), theirs)


@pytest.mark.parametrize(("change", "error", "says"), [
    ({"input": torch.ones(2, 3)}, TypeError, "input has dtype torch.float32"),
    ({"weight": torch.ones(4, 2, dtype=torch.int64)}, TypeError, "weight has dtype torch.int64"),
    ({"weight": torch.ones(4)}, ValueError, r"weight has shape \[4\]"),
    ({"weight": torch.ones(4, 2, device="meta")}, ValueError, "input is on cpu"),
    ({"padding_idx": 4}, ValueError, r"padding_idx is 4; it must be in -4 \.\. 3"),
    ({"positions": torch.ones(2, 2)}, ValueError, r"positions has shape \[2, 2\]"),
    ({"positions": torch.ones(3, 2, dtype=torch.int64)}, TypeError, "positions has dtype torch.int64"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5"),
])  # fmt: skip
def test_bad_input(change, error, says):
    arguments = {"input": torch.zeros(2, 3, dtype=torch.int64), "weight": torch.ones(4, 2)} | change
    with pytest.raises(error, match=says):
        ops.embedding(**arguments)


def test_a_raw_call_with_bad_arguments_is_refused():
    ids, weight = torch.tensor([[0, 5]]), torch.ones(4, 2)
    with pytest.raises((ValueError, RuntimeError), match=r"input has the id 5; ids must be in 0 \.\. 3"):
        torch.ops.tinyllm.embedding_fwd(ids, weight, None)
    with pytest.raises((ValueError, RuntimeError), match="positions has shape"):
        torch.ops.tinyllm.embedding_fwd(ids.clamp(max=3), weight, torch.ones(3, 2))
    with pytest.raises((ValueError, RuntimeError), match="grad has shape"):
        torch.ops.tinyllm.embedding_bwd(torch.ones(2, 2, 2), ids.clamp(max=3), 4, None, True, True)
