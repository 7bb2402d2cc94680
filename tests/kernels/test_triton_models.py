"""Whole models on the Triton kernels, and every operator in a CUDA graph."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.backends import BACKENDS, on
from tinyllm import SimpleLLM, ops
from tinyllm.generation import GraphedCache
from tinyllm.ops import dispatch
from tinyllm.quantization import quantize

pytestmark = [on("triton"), pytest.mark.usefixtures("backend")]
draw, DEVICE = BACKENDS["triton"].draw, BACKENDS["triton"].device
ON_GPU = DEVICE == "cuda"
KERNELS = [name for name, operator in dispatch.OPERATORS.items() if not isinstance(operator.kernels["triton"], str)]
SIZES = {
    "article": {"vocab_size": 11, "embedding_dim": 16, "hidden_dim": 32, "num_layers": 2},
    "gpt": {
        "vocab_size": 40, "embedding_dim": 32, "hidden_dim": 64, "num_layers": 2, "num_heads": 2, "causal": True,
        "norm_first": True, "activation": "gelu", "max_seq_len": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_a_model_gives_what_it_gives_on_plain_pytorch(size, monkeypatch):
    torch.manual_seed(0)
    model = SimpleLLM(**SIZES[size]).to(DEVICE)
    tokens = torch.randint(SIZES[size]["vocab_size"], (2, 21), device=DEVICE)
    served = set()
    choose = dispatch._choose

    def spy(operator, *rest):
        served.add((operator.name, backend := choose(operator, *rest)))
        return backend

    monkeypatch.setattr(dispatch, "_choose", spy)

    def run():
        logits = model(tokens[:, :-1])
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        model.zero_grad()
        (loss + logits.square().mean()).backward()
        return [logits, loss, *(p.grad.clone() for p in model.parameters())]

    with ops.backend("triton", *KERNELS):
        ours = run()
    assert {("attention", "triton"), ("embedding", "triton")} <= served
    assert {name for operator, name in served if operator in KERNELS} == {"triton"}
    with ops.backend("reference"):
        theirs = run()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_a_decoder_reads_and_writes_as_on_plain_pytorch(weights):
    torch.manual_seed(0)
    with ops.backend("reference"):
        model = quantize(SimpleLLM(**SIZES["gpt"] | {"num_layers": 1}).to(DEVICE).eval(), weights)
    prompts, found = [torch.arange(2), torch.arange(1)], []
    for backend in (("triton", *KERNELS), ("reference",)):
        made = GraphedCache(model, 2, 12)
        with ops.backend(*backend):
            found.append([made.read(prompts), *(made.step(torch.tensor([i, 7 * i])) for i in range(2))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-4)


def _calls():
    """Operator -> a function of floating tensors, and such tensors."""
    x, w = draw(40, 64), draw(64, seed=1)
    q, k = draw(2, 4, 70, 32, seed=2), draw(2, 2, 70, 32, seed=3)
    ids = torch.arange(40, device=DEVICE).view(2, 20) % 30
    lengths = torch.tensor([70, 33], device=DEVICE)
    return {
        "layer_norm": (lambda x, w: ops.layer_norm(x, 64, w), (x, w)),
        "add_layer_norm": (lambda x, w: ops.add_layer_norm(x, x * 2, 64, w)[0], (x, w)),
        "rms_norm": (lambda x, w: ops.rms_norm(x, 64, w), (x, w)),
        "embedding": (lambda w: ops.embedding(ids, w), (draw(30, 64),)),
        "attention": (
            lambda q, k: ops.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True), (q, k)
        ),
        "attention, lengths": (
            lambda q, k: ops.scaled_dot_product_attention(q, k, k, enable_gqa=True, key_lengths=lengths), (q, k)
        ),
        "attention, one query": (
            lambda q, k: ops.scaled_dot_product_attention(q, k, k, enable_gqa=True), (q[:, :, :1], k)
        ),
        "cross_entropy": (lambda x: ops.cross_entropy(x, ids.flatten()), (x,)),
        "linear_cross_entropy": (lambda x, w: ops.linear_cross_entropy(x, w, ids.flatten()), (x, draw(30, 64))),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # NumPy's: lanes without a logit begin with the lowest
@pytest.mark.parametrize("operator", _calls())
def test_the_host_asks_for_no_number(operator, monkeypatch):
    # On a GPU it would wait for it, and no graph could be captured.
    function, inputs = _calls()[operator]
    leaves = [x.detach().clone().requires_grad_() for x in inputs]

    def ask(*_):
        raise AssertionError("the host asks for a tensor's value")

    out = function(*leaves).float().square().sum()
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, ask)
    function(*leaves)
    torch.autograd.grad(out, leaves)


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("operator", _calls())
def test_forward_and_backward_in_a_cuda_graph(operator):
    function, inputs = _calls()[operator]
    leaves = [x.detach().clone().requires_grad_() for x in inputs]

    def step():
        out = function(*leaves)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiled and tuned before, as PyTorch asks for
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(leaf.flip(0) * 0.5)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
def test_dropout_differs_between_replays():
    q = draw(2, 2, 64, 32).requires_grad_()
    graph = torch.cuda.CUDAGraph()
    ops.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    with torch.cuda.graph(graph):
        out = ops.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)


@pytest.mark.skipif(not ON_GPU, reason="what is chosen without being asked depends on the device")
def test_a_gpu_is_served_by_the_kernels():
    dispatch._forced = None  # the fixture's choice, which it takes back itself
    x = draw(4, 64)
    torch.testing.assert_close(F.layer_norm(x, (64,)), ops.layer_norm(x, 64))
    assert ops.last_backend() == "triton"
    ops.linear(x, draw(3, 64))
    assert ops.last_backend() == "reference"
