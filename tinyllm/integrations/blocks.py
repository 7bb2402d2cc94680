"""The forward that stands in for a whole pre-norm block of transformers: attention and a feed-forward network, each
between a norm and a sum.

    x = x + attention(norm1(x))            or, parallel:  x = x + attention(norm1(x)) + network(norm2(x))
    x = x + network(norm2(x))

What it saves is what the block's modules cost in Python, which for a single token is most of the time, and the passes
over memory of the sums, which happen in the linear layers before them. Calls that are not as usual go to the block's
own forward, with the replacements of its modules: those that are compiled or checkpointed, with dropout, with hooks or
adapters on the modules, with a cache of another kind than the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from tinyllm import ops
from tinyllm.integrations import decoding, layers, networks
from tinyllm.integrations.cache import append, is_usual
from tinyllm.integrations.parts import NAME, Block, head_dim_of
from tinyllm.ops._context import active_transform, autocast_dtype

CACHES = ("cache", "past_key_values", "layer_past")  # the argument's names
_WITHOUT_EFFECT = frozenset({"use_cache", "position_ids", "cache_position"})  # where there is a cache, or none


class _Call(NamedTuple):
    hidden: Tensor
    mask: Tensor | None
    cache: Any
    angles: tuple[Tensor, Tensor] | None


def forward(block: nn.Module, *args: Any, parts: Block, **kwargs: Any) -> Any:
    call = _usual_call(block, parts, args, kwargs)
    if call is None:
        return networks.own(block, *args, **kwargs)
    if call.hidden.size(1) == 1 and call.cache is not None:
        decoded = decoding.decode(block, parts, call.hidden, call.mask, call.cache, call.angles)
        if decoded is not None:
            return decoded
    modules = block._modules
    hidden, attention = call.hidden, cast(nn.Module, modules[parts.attention])
    branch = _norm(cast(nn.Module, modules[parts.norm1]), hidden)
    attended = _attend(attention, branch, call, parts)
    out = cast(nn.Module, attention._modules[parts.out])
    after = layers.apply_linear(out, attended, residual=hidden)
    start = hidden if parts.parallel is not None and getattr(block, parts.parallel) else after
    return _network(block, _norm(cast(nn.Module, modules[parts.norm2]), start), after, parts)


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    return cast(Tensor, module.__dict__["forward"](x))


def _attend(module: nn.Module, x: Tensor, call: _Call, parts: Block) -> Tensor:
    """Return what the heads give, (B, T, H * head_dim)."""
    batch, tokens, _ = x.shape
    children = module._modules
    head_dim = cast(int, head_dim_of(module))
    if len(parts.projections) == 1:
        joined = layers.apply_linear(cast(nn.Module, children[parts.projections[0]]), x)
        if parts.interleaved:
            heads = joined.view(batch, tokens, -1, 3, head_dim).unbind(3)
        else:
            heads = joined.view(batch, tokens, 3, -1, head_dim).unbind(2)
    else:
        heads = tuple(
            layers.apply_linear(cast(nn.Module, children[name]), x).view(batch, tokens, -1, head_dim)
            for name in parts.projections
        )
    query, key, value = heads
    if parts.norms:
        query, key = (
            _norm(cast(nn.Module, children[name]), y) for name, y in zip(parts.norms, (query, key), strict=True)
        )
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if call.angles is not None:
        query, key = ops.rotary_embedding(query, key, *call.angles)
    if call.cache is not None:
        key, value = append(call.cache, cast(int, module.__dict__["layer_idx"]), key, value)
    keys = key.size(2)
    causal = call.mask is None and tokens > 1 and bool(getattr(module, "is_causal", True))
    if causal and keys > tokens:
        key, value = key[:, :, :tokens], value[:, :, :tokens]
    out = ops.scaled_dot_product_attention(
        query,
        key,
        value,
        call.mask,
        is_causal=causal,
        scale=cast(float, module.scaling),
        enable_gqa=query.size(1) != key.size(1),
    )
    return out.transpose(1, 2).reshape(batch, tokens, -1)


def _network(block: nn.Module, x: Tensor, residual: Tensor, parts: Block) -> Tensor:
    """Return residual + network(x)."""
    inside = block._modules if parts.network is None else cast(nn.Module, block._modules[parts.network])._modules
    found = [cast(nn.Module, inside[name]) for name in parts.layers]
    if len(found) == 2:
        hidden = layers.apply_linear(found[0], x, activation=parts.activation)
    else:
        hidden = networks.gated(found[0], found[1], x, parts.activation)
    return layers.apply_linear(found[-1], hidden, residual=residual)


# ---- Which calls are as usual


def _usual_call(block: nn.Module, parts: Block, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Call | None:
    if torch.compiler.is_compiling() or active_transform() is not None or _has_any_global_hook():
        return None
    if block.training and torch.is_grad_enabled() and getattr(block, "gradient_checkpointing", False):
        return None
    given = dict(zip(parts.names, args, strict=False))
    given.update(kwargs)
    hidden, mask = given.pop("hidden_states"), given.pop("attention_mask", None)
    angles = given.pop("position_embeddings", None)
    cache = None
    for name in CACHES:
        found = given.pop(name, None)
        cache = found if cache is None else cache
    for name, value in given.items():
        if value is not None and value is not False and name not in _WITHOUT_EFFECT:
            return None
    if parts.rotary != (angles is not None) or hidden.dim() != 3:
        return None
    # Autocast would round the sums, which otherwise it leaves in float32. In float16 some blocks cut their output off.
    if hidden.dtype is torch.float16 or autocast_dtype(hidden) is not None:
        return None
    if mask is not None and (mask.dim() != 4 or mask.dtype not in (torch.bool, hidden.dtype)):
        return None
    if cache is not None and not is_usual(cache):
        return None
    return _Call(hidden, mask, cache, angles) if _modules_are_plain(block, parts) else None


def _modules_are_plain(block: nn.Module, parts: Block) -> bool:
    """Return whether calling the block's modules one by one is calling our forwards, and nothing else."""
    attention = block._modules.get(parts.attention)
    network = block if parts.network is None else block._modules.get(parts.network)
    if attention is None or network is None:
        return False
    modules = (block, attention, network)
    if tuple(map(networks.shape_of, modules)) != parts.was or any(map(networks.drops, modules)):
        return False
    if "forward" in attention.__dict__ or networks.hooked(attention):
        return False
    if network is not block and networks.hooked(network):
        return False
    if network is not block and "forward" in network.__dict__ and not networks.is_ours(network, _NETWORKS):
        return False
    if getattr(attention.__dict__.get("config"), "_attn_implementation", None) != NAME:
        return False
    for module, names, functions in (
        (block, (parts.norm1, parts.norm2), _NORMS),
        (attention, parts.norms, _NORMS),
        (attention, (*parts.projections, parts.out), _LINEAR),
        (network, parts.layers, _LINEAR),
    ):
        for name in names:
            if not networks.is_ours(module._modules[name], functions):
                return False
    for module in modules:
        for child in module._modules.values():
            if type(child) is nn.Dropout and (networks.hooked(child) or networks.drops(child)):
                return False
    between = cast(nn.Module, network._modules[parts.act])
    return layers.activation_of(between) == parts.activation and not networks.hooked(between)


_NORMS = (layers.layer_norm, layers.rms_norm, layers.rms_norm_around_one)
_LINEAR = (layers.linear,)
_NETWORKS = (networks.feed_forward, networks.gated_feed_forward)
