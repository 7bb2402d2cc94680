"""The CUDA C++ kernels of cross_entropy: how their blocks share the rows, what they save, and what they take."""

import pytest
import torch

from tests.helpers.backends import BACKENDS, ON_GPU, each_dtype, on
from tests.helpers.losses import compare, make, values
from tests.ops.parity import assert_same_in_a_graph
from tinyllm import ops

raw = BACKENDS["cuda"].raw
# So many rows that a kernel of its own counts the targets, and one fewer than that.
MANY, FEW = 1025, 1024


@on("cuda")
@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("weighted", [False, True])
def test_what_the_mean_divides_by(backend, rows, weighted):
    """Counted by each row, by a kernel before them, or by the last kernel where no gradient is wanted."""
    logits, target, weight = make(backend, (rows, 3), ignored=range(0, rows, 5))
    options = {"weight": weight if weighted else None}
    compare(backend, logits, target, **options)
    with_grad = ops.cross_entropy(logits.clone().requires_grad_(), target, **options)
    assert torch.equal(ops.cross_entropy(logits, target, **options), with_grad)


@each_dtype(cpp=[], triton=[], cuda=[torch.float32, torch.bfloat16])
def test_long_rows_cut_from_a_padded_head(backend, dtype):
    logits = backend.draw(5, 1008, dtype=dtype)[:, :1003]
    compare(backend, logits, torch.arange(5, device=backend.device), label_smoothing=0.1)


@each_dtype(cpp=[], triton=[])
@pytest.mark.parametrize("classes", [37, 1003])
def test_forward_and_backward_write_the_same_gradient(backend, classes, dtype):
    logits, target, weight = make(backend, (5, classes), dtype, (1,))
    for reduction in (1, 2):
        options = reduction, -100, 0.1
        loss, statistics, early = raw.cross_entropy_fwd(logits, target, weight, *options, True)
        again = raw.cross_entropy_bwd(torch.ones_like(loss), logits, target, weight, statistics, *options)
        assert torch.equal(early, again)


@on("cuda")
def test_the_statistics(backend):
    logits, target, _ = make(backend, (5, 40), ignored=(3,))
    _, statistics, grad = raw.cross_entropy_fwd(logits, target, None, 1, -100, 0.0, False)
    biggest = logits.max(1).values
    exact = torch.stack([biggest, (logits - biggest[:, None]).exp().sum(1)], 1)
    exact[3] = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(statistics, exact)
    assert grad.shape == (0,)


@on("cuda")
def test_a_row_does_not_depend_on_its_neighbours(backend):
    logits, target, _ = make(backend, (7, 37))
    loss, grad = values(ops.cross_entropy, logits, target, reduction="none")
    for row in range(7):
        # Where it begins decides the order of its sums.
        alone = torch.empty(8 * 37, device=backend.device)[row * 37 : row * 37 + 37].view(1, 37).copy_(logits[row])
        again = values(ops.cross_entropy, alone, target[row : row + 1], reduction="none")
        assert torch.equal(again[0][0], loss[row])
        torch.testing.assert_close(again[1][0], grad[row], rtol=0, atol=0)


@on("cuda")
def test_what_the_kernel_refuses(backend):
    logits, target, weight = make(backend, (3, 7))
    call = lambda x, t, w: raw.cross_entropy_fwd(x, t, w, 1, -100, 0.0, True)  # noqa: E731
    for arguments, words in [
        ((logits.double(), target, None), "no CUDA kernel for dtype Double; float32, bfloat16 and float16 have one"),
        ((logits[0], target, None), "(rows, classes) is needed"),
        ((logits, target.int(), None), "target has dtype Int; Long is needed"),
        ((logits, target[:2], None), r"target has shape \[2\]; \[3\] is needed"),
        ((logits, target, weight[:6]), r"weight has shape \[6\]; \[7\] is needed"),
        ((logits, target, weight.double()), "weight has dtype Double"),
    ]:
        with pytest.raises(Exception, match=words.replace("(", r"\(").replace(")", r"\)")):
            call(*arguments)


@pytest.mark.skipif(not ON_GPU, reason="there is no GPU to capture a graph of")
@on("cuda")
def test_cuda_graph(backend):
    logits, target, weight = make(backend, (MANY, 1003), torch.bfloat16)
    leaf = logits.requires_grad_()

    def step():
        return values(ops.cross_entropy, leaf, target, weight, label_smoothing=0.1)

    assert_same_in_a_graph(step)
