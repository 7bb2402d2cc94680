"""Decide which modules one operator may stand for, and with which tensors.

An operator stands for modules only while calling them does what their classes say and no more: none of them is replaced
by a module of another class, hooked, patched or parametrized. Whatever is not so is called module by module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, repeat
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from tinyllm import ops
from tinyllm.ops import _products
from tinyllm.ops._context import autocast_dtype
from tinyllm.ops.transformer import Settings, misfit
from tinyllm.ops.transformer import run as run_transformer
from tinyllm.ops.transformer import serves as serves_transformer

if TYPE_CHECKING:
    from tinyllm.model import SimpleLLM
    from tinyllm.nn import Embedding, PositionalEncoding, TransformerBlock

# The classes that operators know, and the attributes that decide what their modules compute besides the tensors and the
# modules in them. `known` adds those of tinyllm.nn, which is built on this file.
_NAMES: dict[type[nn.Module], str] = {}
_ATTRIBUTES: dict[type[nn.Module], tuple[str, ...]] = {}
_Class = TypeVar("_Class", bound=type[nn.Module])


def known(*attributes: str, name: str = "") -> Callable[[_Class], _Class]:
    """Declare that operators stand for modules of the decorated class, as long as they look at these attributes."""

    def add(kind: _Class) -> _Class:
        _NAMES[kind], _ATTRIBUTES[kind] = name or kind.__name__, attributes
        return kind

    return add


known(name="nn.Linear")(nn.Linear)
known(name="nn.Sequential")(nn.Sequential)
known(name="nn.ReLU")(nn.ReLU)
known("approximate", name="nn.GELU")(nn.GELU)
known("p", "training", name="nn.Dropout")(nn.Dropout)
known("padding_idx", "max_norm", "scale_grad_by_freq", "sparse", name="nn.Embedding")(nn.Embedding)

# The class of each activation's module, and nn.GELU's choice of the formula.
_ACTIVATIONS = {"relu": ("nn.ReLU", None), "gelu": ("nn.GELU", "none"), "gelu_tanh": ("nn.GELU", "tanh")}
_PROJECTIONS = ("query", "key", "value", "out_proj")
_BLOCK = {
    "attention": "SelfAttention",
    "feed_forward": "nn.Sequential",
    "norm1": "LayerNorm",
    "norm2": "LayerNorm",
    "dropout": "nn.Dropout",
}
_MODEL = {
    "embedding": "Embedding",
    "dropout": "nn.Dropout",
    "transformer_blocks": "nn.Sequential",
    "output": "nn.Linear",
}
_LINEARS = ("nn.Linear", "QuantizedLinear")
_ENCODINGS = ("PositionalEncoding", "LearnedPositionalEncoding")

# Multiplications of a call, from which on what Python takes between the blocks is lost in their time. One operator for
# all of them then has only disadvantages: all activations are held until its backward ends, and no gradient is there
# before.
_SMALL_MODEL = 1_000_000_000


# ---- Modules that are what their classes say


def _kind(module: nn.Module | None) -> str | None:
    """Return the name of a module's class; None where operators do not know it, or a call does more than it says."""
    if (
        module is None
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    ):
        return None
    return _NAMES.get(type(module))


def _kinds(module: nn.Module) -> dict[str, str | None]:
    return {name: _kind(child) for name, child in module._modules.items()}


def _tensors(*modules: nn.Module) -> list[Tensor] | None:
    """Return the modules' weights, then their biases; None unless all have both, or all have a weight alone.

    A subclass of Tensor, such as a quantized or distributed weight, has its own way of being multiplied.
    """
    found = [module._parameters.get(name) for name in ("weight", "bias") for module in modules]
    if all(bias is None for bias in found[len(modules) :]):
        del found[len(modules) :]
    return cast("list[Tensor]", found) if all(type(x) in (nn.Parameter, Tensor) for x in found) else None


def is_plain_linear(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Return whether calling the module is a matmul with its weight, and the weight a tensor of plain numbers."""
    plain = _kind(module) == "nn.Linear" and not _has_any_global_hook()
    return plain and _tensors(cast(nn.Linear, module)) is not None


def calls_features_and_output(model: SimpleLLM) -> bool:
    """Return whether calling the model is calling its `features` and then its `output`, which may do as they like."""
    return _kind(model) == "SimpleLLM" and "features" not in model.__dict__ and not _has_any_global_hook()


def is_as_its_classes_say(model: SimpleLLM) -> bool:
    """Return whether each module of the model is called as its class says, and each weight a tensor of plain numbers.

    Then the blocks may also be computed otherwise: of a new token alone, with what attention has seen before.
    """
    modules = [*model.modules()]
    if not calls_features_and_output(model) or any(_kind(module) is None for module in modules):
        return False
    kinds = _kinds(model)
    if _kind(model.positional_encoding) not in _ENCODINGS or kinds["output"] not in _LINEARS:
        return False
    if not (kinds | {"output": _MODEL["output"]}).items() >= _MODEL.items():
        return False
    parts = _BLOCK.items() - {("feed_forward", "nn.Sequential")}  # which may be any module known here
    if not all(
        _kind(block) == "TransformerBlock" and _kinds(block).items() >= parts for block in model.transformer_blocks
    ):
        return False
    return all(
        type(x) in (nn.Parameter, Tensor) for module in modules for x in module._parameters.values() if x is not None
    )


def _dropout_p(module: nn.Dropout) -> float:
    return module.p if module.training else 0.0


def _network_is_plain(network: nn.Module, activation: str, linears: Sequence[str] = ("nn.Linear",)) -> bool:
    kind, approximate = _ACTIVATIONS[activation]
    kinds = _kinds(network)
    if [*kinds] != ["0", "1", "2"] or not {kinds["0"], kinds["2"]} <= {*linears}:
        return False
    return kinds["1"] == kind and getattr(network._modules["1"], "approximate", None) == approximate


def _block_tensors(block: TransformerBlock) -> list[Tensor] | None:
    """Return the parameters as `ops.transformer_block` lists them; None where the modules must be called."""
    # Modules are looked up in the dictionaries they are in: nn.Module's search takes as long as a small product.
    own = cast("dict[str, Any]", block._modules)
    if _has_any_global_hook() or _kinds(block) != _BLOCK:
        return None
    attention, network = own["attention"], own["feed_forward"]
    projections = _PROJECTIONS if attention.num_heads > 1 else _PROJECTIONS[:3]
    if _kinds(attention) != dict.fromkeys(projections, "nn.Linear") or not _network_is_plain(network, block.activation):
        return None
    if _dropout_p(own["dropout"]) != (attention.dropout if attention.training else 0.0):
        return None
    layers = [attention._modules[name] for name in projections]
    return _tensors(*layers, network._modules["0"], network._modules["2"], own["norm1"], own["norm2"])


def _block_settings(block: TransformerBlock) -> Settings:
    attention = block.attention
    eps = block.norm1.eps, block.norm2.eps
    dropout_p = _dropout_p(block.dropout)
    return Settings(1, attention.num_heads, attention.causal, block.norm_first, block.activation, *eps, dropout_p)


def _table(embedding: nn.Module, encoding: nn.Module) -> nn.Embedding | None:
    """Return the table of ids, where calling the two modules is looking up its rows and adding positions."""
    if _has_any_global_hook() or _kind(embedding) != "Embedding" or _kind(encoding) not in _ENCODINGS:
        return None
    table = cast("Embedding", embedding).embedding
    return table if _kind(table) == "nn.Embedding" else None


def _is_waste(other: Tensor | None, parameters: Sequence[Tensor]) -> bool:
    """Return whether backward would compute gradients of parameters that do not want any."""
    if not torch.is_grad_enabled():
        return False
    wanted = [parameter.requires_grad for parameter in parameters]
    return not all(wanted) and (any(wanted) or (other is not None and other.requires_grad))


def _beside_autocast(like: Tensor, rows: int) -> AbstractContextManager[Any] | None:
    """Return a context in which an operator of float32 may stand for modules of like's dtype, for so many rows; None
    where autocast's own 16-bit products are faster, or wanted for other reasons.

    Where a CPU multiplies 16-bit numbers no faster, autocast would only add conversions and take modules one by one.
    """
    low = autocast_dtype(like)
    if low is None:
        return nullcontext()
    if not like.is_cpu or like.dtype != torch.float32 or _products.by_torch(low, _products.rows_class(rows)):
        return None
    return torch.autocast("cpu", enabled=False)


# ---- Calls of modules, as operators where that is possible and faster


def _is_worth_it(x: Tensor, module: nn.Module) -> bool:
    return type(module) is nn.Linear and _products.worth_a_call(x.numel() * module.out_features)


def call_linear(module: nn.Module, x: Tensor) -> Tensor:
    """Return module(x)."""
    if _is_worth_it(x, module) and is_plain_linear(module):
        return ops.linear(x, module.weight, module.bias)
    return cast(Tensor, module(x))


def call_network(network: nn.Module, x: Tensor, activation: str) -> Tensor:
    """Return network(x), of a linear layer, an activation of that name and another linear layer."""
    if type(network) is nn.Sequential and len(network) == 3 and _is_worth_it(x, network[0]):
        first, last = network[0], network[2]
        plain = _kind(network) is not None and _network_is_plain(network, activation)
        if plain and is_plain_linear(first) and is_plain_linear(last):
            return ops.feed_forward(x, first.weight, first.bias, last.weight, last.bias, activation=activation)
    return cast(Tensor, network(x))


def call_embedding(embedding: nn.Module, encoding: nn.Module, dropout: nn.Module, ids: Tensor) -> Tensor:
    """Return dropout(encoding(embedding(ids))): (B, T) to (B, T, D)."""
    table = _table(embedding, encoding)
    if table is None:
        return cast(Tensor, dropout(encoding(embedding(ids))))
    positions = cast("PositionalEncoding", encoding).rows(ids.size(1))
    options = (table.padding_idx, table.max_norm, table.norm_type, table.scale_grad_by_freq, table.sparse)
    plain = _kind(dropout) == "nn.Dropout"
    dropout_p = _dropout_p(cast(nn.Dropout, dropout)) if plain else 0.0
    vectors = ops.embedding(ids, table.weight, *options, positions=positions, dropout_p=dropout_p)
    return vectors if plain else cast(Tensor, dropout(vectors))


def call_block(block: TransformerBlock, x: Tensor) -> Tensor | None:
    """Return what a block makes of x, by one operator; None where its modules must be called, or are faster."""
    parameters = _block_tensors(block)
    if parameters is None or _is_waste(x, parameters):
        return None
    settings = _block_settings(block)
    if misfit("transformer_block", x, parameters, None, settings) is not None:
        return None
    context = _beside_autocast(x, x.size(0) * x.size(1))
    if context is None:
        return None
    with context:
        if not serves_transformer("transformer_block", x, parameters, settings):
            return None
        return run_transformer(x, parameters, None, None, settings)


# ---- Whole models


class WholeModel:
    """The operands and settings of `ops.transformer` for one model, which is not itself kept alive.

    Looking at every module at every call would take longer than a small model does. `of` looks once and notes what it
    saw; `holds` compares that with what is there now, in a few microseconds.

    Attributes:
        work: multiplications for each token, those of attention's scores left out.
    """

    def __init__(self, model: SimpleLLM, parameters: list[Tensor], settings: Settings) -> None:
        self.work = sum(parameter.numel() for parameter in parameters[1:])
        self._settings = settings
        self._operands = parameters
        self._encoding = model.positional_encoding
        modules = [module for child in model.children() for module in child.modules()]
        self._modules = modules
        self._states = [module.__dict__ for module in modules]
        self._inner = [module._modules for module in modules if module._modules]
        self._parameters = [module._parameters for module in modules]
        names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        self._hooks = [getattr(module, name) for module in modules for name in names]
        named = [(module.__dict__, _ATTRIBUTES.get(type(module))) for module in modules]
        self._settled = [(itemgetter(*names), state) for state, names in named if names]
        self._seen = self._look(model)

    def _look(self, model: SimpleLLM) -> tuple[object, ...]:
        """Return all that decides whether the operator may still stand for the model; modules are compared by `is`."""
        return (
            [*model._modules.values()],
            [*map(type, self._modules)],
            [*map(list, map(dict.values, self._inner))],
            [*map(id, chain.from_iterable(map(dict.values, self._parameters)))],
            [get(state) for get, state in self._settled],
            any(self._hooks) or _has_any_global_hook() or any(map(dict.__contains__, self._states, repeat("forward"))),
        )

    def holds(self, model: SimpleLLM) -> bool:
        """Return whether the model's structure is unchanged."""
        return self._look(model) == self._seen

    @classmethod
    def of(cls, model: SimpleLLM) -> WholeModel | None:
        """Return the model as one operator; None where some module must be called by itself."""
        kinds, norm = _kinds(model), model.final_norm
        table = _table(model.embedding, model.positional_encoding)
        if not kinds.items() >= _MODEL.items() or table is None:
            return None
        if table.padding_idx is not None or table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
            return None
        blocks = cast("list[TransformerBlock]", [*model.transformer_blocks])
        if {_kind(block) for block in blocks} != {"TransformerBlock"}:
            return None  # or no layers: there is nothing to gain
        if norm is not None and kinds["final_norm"] != "LayerNorm":
            return None
        ends = [_tensors(module) for module in (*((norm,) if norm is not None else ()), model.output)]
        parts = [[table.weight], *map(_block_tensors, blocks), *ends]
        if any(part is None for part in parts):
            return None
        parameters = [tensor for part in parts for tensor in cast("list[Tensor]", part)]
        others = [table.weight, *model.positional_encoding.parameters()]
        settings = {_block_settings(block) for block in blocks}
        eps = {eps for block in blocks for eps in (block.norm1.eps, block.norm2.eps)}
        eps |= set() if norm is None else {norm.eps}
        if {block.dropout_p for block in settings} != {_dropout_p(model.dropout)}:
            return None
        if len(settings) != 1 or len(eps) != 1 or any(type(x) not in (nn.Parameter, Tensor) for x in others):
            return None
        shared = settings.pop()._replace(num_layers=len(blocks))
        ids = torch.empty((1, 0), dtype=torch.int64, device=table.weight.device)
        if shared.norm_first != (norm is not None) or misfit("transformer", ids, parameters, None, shared) is not None:
            return None
        return cls(model, parameters, shared)

    def run(self, ids: Tensor, target: Tensor | None) -> Tensor | None:
        """Return logits, or the loss; None where no kernel serves the call, or would do work that nobody wants."""
        operands = self._operands
        if ids.numel() * self.work > _SMALL_MODEL or _is_waste(None, operands):
            return None
        positions = self._encoding.rows(ids.size(1))
        # Positions are a buffer, or a parameter outside the list: nothing says that they were converted with the rest.
        if ids.device != operands[0].device or positions.device != operands[0].device:
            return None
        if positions.dtype != operands[0].dtype:
            return None
        context = _beside_autocast(operands[0], ids.numel())
        if context is None:
            return None
        with context:
            if not serves_transformer("transformer", ids, operands, self._settings):
                return None
            out = run_transformer(ids, operands, positions, target, self._settings)
        low = autocast_dtype(out) if target is None else None
        return out if low is None else out.to(low)


def call_model(model: SimpleLLM, ids: Tensor, target: Tensor | None = None) -> Tensor | None:
    """Return a model's logits, or their loss, by one operator; None where the parts must be called, or are faster."""
    # What a transform puts in the parameters' place must not be kept as if it were the model's.
    if torch.compiler.is_compiling() or ops.active_transform() is not None or ids.numel() == 0:
        return None
    whole = model._whole
    if whole is None or not whole.holds(model):
        model._whole = whole = WholeModel.of(model)
    return None if whole is None else whole.run(ids, target)


# ---- Generation


class DecoderOperands(NamedTuple):
    """A model as the raw operators decoder_read, decoder_step and decoder_write take it."""

    weights: list[Tensor]
    positions: Tensor
    settings: tuple[int, int, bool, str, float]  # num_layers, num_heads, norm_first, activation, eps


def decoder_operands(model: SimpleLLM) -> DecoderOperands | str:
    """Return the operands, or why the operators do not serve a model. Vectors that are not float32 are copied."""
    if not is_as_its_classes_say(model):
        return "a module or a weight is not what its class says"
    blocks = cast("list[TransformerBlock]", [*model.transformer_blocks])
    config, norm = model.config, model.final_norm
    if not all(block.attention.causal for block in blocks):
        return "the model is not causal"
    if not all(_network_is_plain(block.feed_forward, block.activation, _LINEARS) for block in blocks):
        return "a feed_forward is not two linear layers with an activation"
    table = model.embedding.embedding
    if _kind(table) == "nn.Embedding" and table.max_norm is not None:
        return "the embedding has max_norm"
    eps = {eps for block in blocks for eps in (block.norm1.eps, block.norm2.eps)} | ({norm.eps} if norm else set())
    shapes = {(b.norm_first, b.activation, b.attention.num_heads) for b in blocks}
    if len(eps) > 1 or shapes - {(config.norm_first, config.activation, config.num_heads)}:
        return "the blocks differ"
    layers: list[list[nn.Module]] = [_decoder_layers(block) for block in blocks]
    ends = [*([norm] if norm is not None else []), model.output]
    biased = {_has_bias(layer) for block in layers for layer in block} | {_has_bias(layer) for layer in ends[:-1]}
    if len(biased) > 1 or (biased == {False} and _has_bias(model.output)):
        return "some of the linear layers and norms have a bias, others do not"
    weights = _stored(table)
    for block in layers:
        weights += [tensor for layer in block for tensor in _stored(layer)]
        weights += [_vector(cast(Tensor, layer.bias)) for layer in block if _has_bias(layer)]
    for layer in ends:
        weights += _stored(layer) + ([_vector(cast(Tensor, layer.bias))] if _has_bias(layer) else [])
    if len(table_rows := {config.vocab_size, *(_rows(module) for module in (table, model.output))}) > 1:
        return f"embedding, output and config have different vocabularies: {sorted(table_rows)}"
    matrices = [x for x in weights if x.dim() == 2 and x.dtype not in (torch.float32, torch.bfloat16, torch.uint8)]
    if matrices:
        return f"there is a weight of {matrices[0].dtype}"
    positions = _vector(model.positional_encoding.rows(config.max_seq_len))
    if not all(x.is_cpu for x in (*weights, positions)):
        return "it serves models on the CPU"
    settings = (len(blocks), config.num_heads, config.norm_first, config.activation, eps.pop() if eps else 1e-5)
    return DecoderOperands(weights, positions, settings)


def _decoder_layers(block: TransformerBlock) -> list[nn.Module]:
    attention, network = block.attention, block.feed_forward
    projections = [getattr(attention, name) for name in _PROJECTIONS if getattr(attention, name) is not None]
    return [*projections, network[0], network[2], block.norm1, block.norm2]


def _rows(module: nn.Module) -> int:
    return _stored(module)[0].size(0)


def _has_bias(module: nn.Module) -> bool:
    return module._parameters.get("bias") is not None


def _stored(module: nn.Module) -> list[Tensor]:
    """Return a module's weight as it is stored: a tensor, with its scales behind it if it is quantised."""
    data = module._buffers.get("data")
    if data is not None:
        scales = module._buffers.get("scales")
        return [data.contiguous()] if scales is None else [data.contiguous(), scales.contiguous()]
    weight = cast(Tensor, module._parameters["weight"]).detach()
    return [weight.contiguous() if weight.dim() == 2 else _vector(weight)]


def _vector(x: Tensor) -> Tensor:
    return x.detach().float().contiguous()
