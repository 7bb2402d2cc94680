"""optimize, report and restore: what they change in a model, and what they leave."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import tinyllm
from tinyllm import nn as our_nn
from tinyllm.integrations import networks
from tinyllm.integrations.layers import STORED

pytestmark = pytest.mark.any_build


class Scaled(nn.Module):
    """A norm of Llama's kind by its looks, which computes something else."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.eps = 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight * 2


class ScaledRMSNorm(Scaled):
    pass


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(16, 40)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(40, 16)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Crossed(Network):
    """A network by its looks, which computes something else."""

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x))) + x


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 16)
        self.norm = nn.LayerNorm(16)
        self.rms = nn.RMSNorm(16)
        self.scaled = ScaledRMSNorm()
        self.network, self.crossed = Network(), Crossed()
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.norm(self.table(ids))
        x = self.network(self.rms(x)) + self.crossed(self.scaled(x))
        return self.head(x)

    def get_output_embeddings(self):
        return self.head


@pytest.fixture
def model():
    torch.manual_seed(0)
    found = Model()
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.3)
    return found


@pytest.fixture
def ids():
    return torch.randint(30, (3, 20), generator=torch.Generator().manual_seed(1))


def snapshot(model):
    """Return what every module is made of."""
    return {
        name: (type(module), dict(module.__dict__), dict(module._parameters), dict(module._buffers))
        for name, module in model.named_modules()
    }


def test_restore_leaves_nothing_behind(model, ids):
    before, expected = snapshot(model), model(ids)
    text, flags = repr(model), [parameter.requires_grad for parameter in model.parameters()]
    for weights in (None, "int8"):
        assert tinyllm.optimize(model, weights) is model
        assert repr(model) == text
        assert tinyllm.restore(model) is model
        after = snapshot(model)
        assert {name: (kind, set(own)) for name, (kind, own, *_) in after.items()} == {
            name: (kind, set(own)) for name, (kind, own, *_) in before.items()
        }
        for name in before:
            for was, is_now in zip(before[name][2:], after[name][2:], strict=True):
                assert all(is_now[key] is was[key] for key in was), name
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert torch.equal(model(ids), expected)
    assert tinyllm.restore(model) is model  # of one that is as it was, nothing


def test_what_looks_alike_is_left(model, ids):
    expected = model(ids)
    tinyllm.optimize(model)
    torch.testing.assert_close(model(ids), expected)
    rows = {row.name: row for row in tinyllm.report(model).rows}
    assert {name: row.by for name, row in rows.items()} == {
        "table": None, "norm": "layer_norm", "rms": "rms_norm", "scaled": None, "network": "feed_forward",
        "network.fc1": "linear", "network.fc2": "linear", "crossed": None, "crossed.fc1": "linear",
        "crossed.fc2": "linear", "head": "linear",
    }  # fmt: skip
    for name in ("scaled", "crossed"):
        assert rows[name].why == "it computes something else than what it looks like"
    assert rows["table"].why == "PyTorch's own serves it"


def test_the_report_as_a_table(model):
    layers = nn.Sequential(*(Network() for _ in range(3)), nn.Linear(16, 4))
    text = str(tinyllm.report(tinyllm.optimize(layers, "int8")))
    lines = text.splitlines()
    assert lines[0] == "Sequential: 10 modules replaced, 0 left"
    assert [line.split(maxsplit=3) for line in lines[1:]] == [
        ["3", "Network", "*", "feed_forward"],
        ["3", "Linear", "*.fc1", "quantized_linear (int8)"],
        ["3", "Linear", "*.fc2", "quantized_linear (int8)"],
        ["1", "Linear", "*", "quantized_linear (int8)"],
    ]
    with pytest.raises(ValueError, match=r"model is as it was; tinyllm\.optimize\(model\)"):
        tinyllm.report(model)


def test_a_copy_with_fewer_bits_leaves_the_model_alone(model, ids):
    tinyllm.optimize(model)
    expected, before = model(ids), str(tinyllm.report(model))
    ours = tinyllm.optimize(model, "int8", inplace=False)
    assert str(tinyllm.report(model)) == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(ids), expected)
    assert ours.head.weight is ours.table.weight
    for mine, theirs in zip(ours.parameters(), model.parameters(), strict=True):
        assert mine.data_ptr() == theirs.data_ptr()
    with torch.no_grad():
        model.head.weight.mul_(2)  # which the copy has too
        assert (ours(ids) - model(ids)).abs().mean() < 0.05 * model(ids).abs().mean()


def test_a_copy_shares_the_parameters(model, ids):
    expected = model(ids)
    before = snapshot(model)
    ours = tinyllm.optimize(model, inplace=False)
    assert ours is not model
    for mine, theirs in zip(ours.parameters(), model.parameters(), strict=True):
        assert mine is theirs
    assert set(before["norm"][1]) == set(model.norm.__dict__)
    torch.testing.assert_close(ours(ids), expected)
    assert torch.equal(model(ids), expected)
    with pytest.raises(ValueError, match="model is as it was"):
        tinyllm.report(model)


def test_copies_and_pickles_stay_optimized_and_stand_alone(model, ids):
    for weights in (None, "int8"):
        tinyllm.optimize(model, weights)
        expected = model(ids).detach()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert str(tinyllm.report(other)) == str(tinyllm.report(model))
            torch.testing.assert_close(other(ids), expected)
            assert other.norm.__dict__["forward"].args[0] is other.norm
            with torch.no_grad():
                other.norm.weight.zero_()
            torch.testing.assert_close(model(ids), expected)
            tinyllm.restore(other)
            assert "forward" in model.norm.__dict__
            assert "forward" not in other.norm.__dict__


def test_the_state_stays(model):
    keys, values = list(model.state_dict()), [x.clone() for x in model.state_dict().values()]
    tinyllm.optimize(model, "int4")
    assert list(model.state_dict()) == keys
    assert all(map(torch.equal, model.state_dict().values(), values))
    assert model.head.weight is model.table.weight


def test_weights_in_fewer_bits(model, ids):
    with torch.no_grad():
        expected = model(ids)
        errors = {}
        for weights in ("bf16", "int8", "int4"):
            tinyllm.optimize(model, weights)  # which restores first
            errors[weights] = (model(ids) - expected).abs().mean() / expected.abs().mean()
            kinds = {row.name: row.why for row in tinyllm.report(model).rows if row.by == "quantized_linear"}
            assert kinds == dict.fromkeys(kinds, weights) | {"head": "int8" if weights == "int4" else weights}
    assert 0 < errors["bf16"] < 0.01
    assert 0 < errors["int8"] < 0.03
    assert errors["int8"] < errors["int4"] < 0.4
    torch.testing.assert_close(model(ids), expected)  # weights that get gradients are used themselves


@pytest.mark.parametrize("rows", [1, 20])
def test_a_weight_that_changes_is_stored_anew(rows):
    torch.manual_seed(0)
    layer = tinyllm.optimize(nn.Linear(64, 32), "int8")
    x = torch.randn(rows, 64)
    other = nn.Linear(64, 32)

    def close():
        with torch.no_grad():
            found, exact = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(found, exact, rtol=0, atol=0.05)
        assert not torch.equal(found, exact)

    close()
    layer.load_state_dict(other.state_dict())
    close()
    with torch.no_grad():
        layer.weight.mul_(-1.5)
    close()
    with torch.no_grad():
        layer.weight[5] = 0.0  # a single row
        assert layer(x)[:, 5].eq(layer.bias[5]).all()
    layer.weight.data = torch.randn(32, 64) / 8
    close()
    layer.weight.data.mul_(-2)  # as merging an adapter does
    close()
    layer.double().float()
    close()
    stored = layer.__dict__[STORED]
    assert stored.of(layer) is stored.of(layer)  # nothing is stored twice
    # One that is trained is used itself.
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_gradients_pass_weights_in_fewer_bits(model, ids):
    """As adapters need it, which are trained over frozen weights."""
    for layer in (model.network.fc1, model.network.fc2, model.head):
        layer.weight.requires_grad_(False)
    expected = model(ids)
    tinyllm.optimize(model, "int8")
    out = model(ids)
    assert 0 < (out - expected).abs().mean() < 0.05
    out.square().mean().backward()
    assert model.norm.weight.grad.abs().max() > 0
    assert model.network.fc1.weight.grad is None


class Adapter(nn.Module):
    """Add a product of low rank to a layer's output, as PEFT's LoRA does."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("weights", [None, "int8"])
def test_an_adapter_in_the_place_of_a_layer(model, ids, weights):
    tinyllm.optimize(model, weights)
    model.network.fc1 = Adapter(model.network.fc1)
    plain = copy.deepcopy(model)
    tinyllm.restore(plain)
    before = networks.Fallbacks.count
    torch.testing.assert_close(model(ids), plain(ids), rtol=0, atol=1e-4 if weights is None else 0.3)
    assert networks.Fallbacks.count > before
    model(ids).sum().backward()
    assert model.network.fc1.up.weight.grad is not None


def test_hooks_and_changed_parts_are_met(model, ids):
    tinyllm.optimize(model)
    seen = []
    handle = model.network.fc1.register_forward_hook(lambda module, args, out: seen.append("fc1"))
    model(ids)
    handle.remove()
    everywhere = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(type(module).__name__)
    )
    model(ids)
    everywhere.remove()
    assert seen[0] == "fc1"
    assert seen.count("Linear") == 5
    model.network.act = nn.Tanh()
    with torch.no_grad():
        x = torch.randn(2, 16)
        expected = model.network.fc2(torch.tanh(model.network.fc1(x)))
        torch.testing.assert_close(model.network(x), expected)


def test_a_part_of_an_optimized_model(model, ids):
    tinyllm.optimize(model)
    for function in (tinyllm.optimize, tinyllm.restore):
        with pytest.raises(ValueError, match="model is part of one that is optimized, with it; restore the whole"):
            function(model.network)
    tinyllm.restore(model)
    tinyllm.optimize(model.network)
    assert {row.name for row in tinyllm.report(model).rows} == {"network", "network.fc1", "network.fc2"}
    tinyllm.optimize(model)
    assert len(tinyllm.report(model).rows) == 11
    tinyllm.restore(model)
    with pytest.raises(ValueError, match="model is as it was"):
        tinyllm.report(model)


def test_what_is_added_or_exchanged_later_is_computed(ids):
    network = nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16))
    x = torch.randn(2, 16)
    tinyllm.optimize(network)
    assert tinyllm.report(network).rows[0].by == "feed_forward"
    network.append(nn.Softmax(-1))
    torch.testing.assert_close(network(x).sum(-1), torch.ones(2))

    class Tripled(Network):
        def forward(self, x):
            return 3 * super().forward(x)

    other = tinyllm.optimize(Network())
    expected = other(x)
    other.__class__ = Tripled
    torch.testing.assert_close(other(x), 3 * expected)


def test_restore_leaves_what_was_set_later(model):
    tinyllm.optimize(model)
    forward = model.norm.forward
    model.norm.forward = lambda x: forward(x) + 1
    wrapped = model.norm.forward
    tinyllm.restore(model)
    assert model.norm.forward is wrapped
    assert "forward" not in model.rms.__dict__


class Dropping(Network):
    """A network that drops by a number of its own, as some of transformers' do."""

    def __init__(self):
        super().__init__()
        self.residual_dropout = 0.5

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), self.residual_dropout, self.training)


def test_dropout_by_a_number_is_not_lost():
    network = tinyllm.optimize(Dropping())
    assert tinyllm.report(network).rows[0].by == "feed_forward"
    x = torch.randn(50, 16)
    assert 0.3 < network(x).eq(0).float().mean() < 0.7
    before = networks.Fallbacks.count
    assert network.eval()(x).ne(0).all()
    assert networks.Fallbacks.count == before


def test_what_others_have_replaced_is_left(model, ids):
    model.norm.forward = lambda x: x * 2
    expected = model(ids)
    nn.utils.parametrizations.weight_norm(model.network.fc1)
    tinyllm.optimize(model)
    rows = {row.name: row for row in tinyllm.report(model).rows}
    assert rows["norm"].why == "its forward has been replaced already"
    assert "network" not in rows
    assert rows["network.fc1"].by is None
    torch.testing.assert_close(model(ids), expected)
    tinyllm.restore(model)
    assert model.norm(torch.ones(16)).eq(2).all()


def test_the_optimizer_and_the_optimized_model_agree(model, ids):
    plain = copy.deepcopy(model)
    tinyllm.optimize(model)
    for trained in (plain, model):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        for _ in range(3):
            trained(ids).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model(ids), plain(ids))


def test_modules_of_plain_pytorch(ids):
    layer = nn.TransformerEncoderLayer(16, 2, 40, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.Embedding(30, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    for training in (True, False):
        model.train(training)
        expected = model(ids)
        torch.testing.assert_close(tinyllm.optimize(model)(ids), expected)
        tinyllm.restore(model)


def test_compiled_whole(model, ids):
    expected = model(ids)
    for weights in (None, "bf16"):
        torch._dynamo.reset()
        tinyllm.optimize(model, weights)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids), expected, rtol=0, atol=1e-5 if weights is None else 0.05)
    torch._dynamo.reset()


def test_our_own_model_is_optimized_already():
    model = tinyllm.SimpleLLM(30, 16, 32, 1, num_heads=2)
    x = torch.randint(30, (2, 7))
    expected = model(x)
    torch.testing.assert_close(tinyllm.optimize(model)(x), expected)
    assert not any(row.by for row in tinyllm.report(model).rows if row.kind in our_nn.__all__)


@pytest.mark.parametrize(("arguments", "error", "says"), [
    (("gpt2",), TypeError, r"model is a str; a torch\.nn\.Module is needed"),
    ((nn.Linear(2, 2), "int3"), ValueError, "weights is 'int3'; it must be \"bf16\", \"int8\" or \"int4\""),
    ((nn.Linear(2, 2), "float32"), ValueError, "weights is 'float32'"),
])  # fmt: skip
def test_bad_input(arguments, error, says):
    with pytest.raises(error, match=says):
        tinyllm.optimize(*arguments)
    for function in (tinyllm.report, tinyllm.restore):
        with pytest.raises(TypeError, match="model is a NoneType"):
            function(None)


def test_weights_that_cannot_be_stored_are_left():
    layer = nn.Linear(8, 4)
    nn.init.constant_(layer.weight, float("nan"))
    tinyllm.optimize(layer, "int8")
    (row,) = tinyllm.report(layer).rows
    assert row.by == "linear"
    assert "weight holds" in row.why
    with torch.device("meta"):
        meta = nn.Linear(8, 4)
    tinyllm.optimize(meta, "int8")
    assert tinyllm.report(meta).rows[0].why == "its parameters are on the meta device"
