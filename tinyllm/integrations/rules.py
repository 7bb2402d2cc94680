"""Which modules are replaced by which of our forwards, and the trial that each of them passes first.

A module is known by what it has, not by its class's name alone, since libraries have a class of their own for the same
thing in every model. Whether it computes what it looks like is tried out: the module and its replacement get the same
random inputs, and where their outputs differ the module is left alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tinyllm.integrations import blocks, layers, networks
from tinyllm.integrations.parts import NAME, head_dim_of
from tinyllm.integrations.parts import find as find_parts

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Found:
    """The replacement of a module.

    Attributes:
        name: the operator or operators, for the report.
        function: the forward, of the module and its inputs.
        options: its keyword arguments.
        columns: of the inputs of a trial; empty where the class says everything.
        angles: columns of the `position_embeddings` of a trial, for a block that is given some.
        names: the names of arguments that are None in a trial.
        note: what else is to be said, for the report.
    """

    name: str
    function: Forward
    options: dict[str, Any]
    columns: tuple[int, ...] = ()
    angles: int = 0
    names: tuple[str, ...] = ()
    note: str | None = None

    def forward(self, module: nn.Module) -> Forward:
        return partial(self.function, module, **self.options)


def find(module: nn.Module) -> Found | str | None:
    """Return what replaces a module, the reason why it is left although it looks like one that we replace, or None."""
    for rule in (_norm, _linear, _activation, _network, _block):
        found = rule(module)
        if found is None:
            continue
        if isinstance(found, Found):
            reason = _not_ours_to_replace(module)
            return found if reason is None else reason
        return found
    return None


def _not_ours_to_replace(module: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "its forward has been replaced already"
    for parameter in module.parameters():
        if type(parameter) not in (nn.Parameter, Tensor):
            return f"its parameters are of {type(parameter).__name__}, which multiplies in its own way"
        if parameter.is_meta:
            return "its parameters are on the meta device"
        if not parameter.dtype.is_floating_point:
            return f"its parameters are {parameter.dtype}"
    return None


def _own_tensors(module: nn.Module) -> set[str]:
    return {name for tensors in (module._parameters, module._buffers) for name, x in tensors.items() if x is not None}


def _norm(module: nn.Module) -> Found | None:
    if type(module) is nn.LayerNorm:
        return Found("layer_norm", layers.layer_norm, {})
    if type(module) is nn.RMSNorm:
        return Found("rms_norm", layers.rms_norm, {"eps": "eps"})
    named = "RMSNorm" in type(module).__name__ or hasattr(module, "variance_epsilon")
    if not named or module._modules or _own_tensors(module) != {"weight"}:
        return None
    weight = cast(Tensor, module.weight)
    eps = [name for name in ("variance_epsilon", "eps", "epsilon") if isinstance(getattr(module, name, None), float)]
    if weight.dim() != 1 or not eps:
        return None
    found = Found("rms_norm", layers.rms_norm, {"eps": eps[0]}, (weight.numel(),))
    around_one = Found("rms_norm", layers.rms_norm_around_one, {"eps": eps[0]}, (weight.numel(),))
    return found if trial(module, found) is None else around_one


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is an nn.Linear or a Conv1D of transformers itself, of no subclass."""
    transformers = sys.modules.get("transformers.pytorch_utils")
    return type(module) is nn.Linear or (transformers is not None and type(module) is transformers.Conv1D)


def _features(module: nn.Module) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a linear layer."""
    rows, columns = cast(Tensor, module.weight).shape
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)


def _linear(module: nn.Module) -> Found | None:
    return Found("linear", layers.linear, {}) if is_linear(module) else None


def _activation(module: nn.Module) -> Found | None:
    if type(module).__name__ not in ("NewGELUActivation", "FastGELUActivation"):
        return None
    return Found("gelu", layers.gelu_tanh, {}, (16,))


def _network(module: nn.Module) -> Found | str | None:
    """Find the modules of several layers that `networks` has a forward for, by what their children are."""
    children = {name: child for name, child in module._modules.items() if child is not None}
    dense = [name for name, child in children.items() if is_linear(child)]
    acts = [name for name, child in children.items() if layers.activation_of(child) is not None]
    drops = [name for name, child in children.items() if type(child) is nn.Dropout]
    norms = [name for name, child in children.items() if type(child) is nn.LayerNorm]
    counts = (len(dense), len(acts), len(drops), len(norms))
    if sum(counts) != len(children) or _own_tensors(module) or len(drops) > 1:
        return None
    inputs, was = tuple(_features(children[name])[0] for name in dense), networks.shape_of(module)
    dropout = drops[0] if drops else None
    act = {"act": acts[0], "activation": layers.activation_of(children[acts[0]])} if acts else {}
    if counts[:2] == (1, 0) and len(norms) == 1:
        options: dict[str, Any] = {"was": was, "layer": dense[0], "norm": norms[0], "dropout": dropout}
        columns = (inputs[0], _features(children[dense[0]])[1])
        return Found("linear and layer_norm", networks.dense_add_norm, options, columns)
    if norms or len(acts) != 1:
        return None
    if len(dense) == 1 and not drops and act["activation"] != "silu":
        return Found("linear", networks.dense_activation, {"was": was, "layer": dense[0], **act}, inputs)
    if len(dense) == 2 and act["activation"] != "silu" and _features(children[dense[0]])[1] == inputs[1]:
        last = type(module).__name__ in ("GPT2MLP",)
        options = {"was": was, "layers": tuple(dense), **act, "dropout": dropout, "dropout_is_last": last}
        return Found("feed_forward", networks.feed_forward, options, inputs[:1])
    if len(dense) == 3 and not drops:
        roles = [[name for name in dense if role in name] for role in ("gate", "up", "down")]
        if all(len(names) == 1 for names in roles):
            names = tuple(name for (name,) in roles)
            return Found(
                "gated_feed_forward", networks.gated_feed_forward, {"was": was, "layers": names, **act}, inputs[:1]
            )
    return None


def _block(module: nn.Module) -> Found | str | None:
    parts = find_parts(module)
    if parts is None:
        return None
    attention = cast(nn.Module, module._modules[parts.attention])
    projection = cast(nn.Module, attention._modules[parts.projections[0]])
    if head_dim_of(attention) is None or not isinstance(getattr(attention, "scaling", None), float):
        return None
    if getattr(attention.__dict__.get("config"), "_attn_implementation", None) != NAME:
        return None
    angles = cast(int, attention.__dict__.get("rotary_ndims", head_dim_of(attention))) if parts.rotary else 0
    if not is_linear(projection):
        return "its layers are not all plain linear ones"
    columns = _features(projection)[0]
    names = ("attention_mask",) if "attention_mask" in parts.names else ()
    note = "for single tokens; else sums within linear"
    return Found("decode_block", blocks.forward, {"parts": parts}, (columns,), angles, names, note)


# ---- Trials

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def signature(module: nn.Module, found: Found) -> tuple[Any, ...]:
    """Return what a module's trial depends on, besides the numbers in its parameters."""
    simple = (
        (type(child).__name__, name, value)
        for child in module.modules()
        for name, value in child.__dict__.items()
        if isinstance(value, (bool, int, float, str)) and name not in ("training", "layer_idx")
    )
    tensors = ((x.shape, x.dtype, x.device) for x in module.parameters())
    return type(module), found.function, repr(found.options), *simple, *tensors


def trial(module: nn.Module, found: Found) -> str | None:
    """Return how a module's outputs differ from its replacement's for random inputs; None where they agree.

    Three rows of 0.001, 1 and 10 times normally distributed numbers tell apart what is added to a variance, too. A
    block then gets one more row with what it has left in a cache, as in writing.
    """
    if not found.columns:
        return None
    tensors = [*module.parameters(), *module.buffers()]
    like = tensors[0] if tensors else torch.empty(0)
    modes = [(child, child.training) for child in module.modules()]
    try:
        module.eval()
        with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
            before = networks.Fallbacks.count
            got = _outputs(module, found, like, partial(found.function, module, **found.options))
            if networks.Fallbacks.count != before:
                return "its modules are not all ours"
            expected = _outputs(module, found, like, partial(type(module).forward, module))
    except Exception as error:  # whatever it is that another library's module refuses
        return f"it cannot be tried out: {type(error).__name__}: {error}"
    finally:
        for child, training in modes:
            child.training = training
    for mine, theirs in zip(got, expected, strict=True):
        if not isinstance(theirs, Tensor) or theirs.shape != mine.shape or theirs.dtype != mine.dtype:
            return "it returns something else than what it looks like"
        differences = (mine.double() - theirs.double()).abs().amax(-1)
        most = theirs.double().abs().amax(-1) * _TOLERANCE[theirs.dtype]
        if not bool((differences <= most).all()):
            return "it computes something else than what it looks like"
    return None


def _outputs(module: nn.Module, found: Found, like: Tensor, forward: Forward) -> list[Any]:
    """Return what a forward makes of the inputs of a trial."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([[[1e-3], [1.0], [10.0], [1.0]]])
    rows = [(torch.randn(1, 4, size, generator=generator) * scales).to(like) for size in found.columns]
    given: dict[str, Any] = dict.fromkeys(found.names)
    parts = found.options.get("parts")
    name = None if parts is None else next((name for name in blocks.CACHES if name in parts.names), None)
    if name is not None:
        from transformers import DynamicCache

        given[name] = DynamicCache()
    outputs = []
    for tokens in (slice(0, 3), slice(3, 4))[: 1 if name is None else 2]:
        if found.angles:
            angles = torch.randn(2, 1, 4, found.angles, generator=torch.Generator().manual_seed(1)).to(like)
            given["position_embeddings"] = tuple(angles[:, :, tokens])
        outputs.append(forward(*(x[:, tokens].clone() for x in rows), **given))
    return outputs
