"""Random calls of every operator, each beside the same call in plain PyTorch.

Shapes are odd, tensors have odd strides and begin anywhere, and each lies in memory of its own that ends with its last
element; what lies between its elements is NaN. A call follows from its dtype and seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tinyllm import ops, reference
from tinyllm.check.draw import Case, Draw, Function, both
from tinyllm.check.model_cases import decode_block, decoder, transformer, transformer_block
from tinyllm.ops._random import draw_rng, dropout_factors
from tinyllm.ops.quantized_linear import KINDS
from tinyllm.reference.quantized import BITS

_ACTIVATIONS = tuple(reference.ACTIVATIONS)


def _norm(name: str, draw: Draw) -> Case:
    rows, size = draw.size(90), 1 + draw.size(draw.one_of(20, 300, 3000))
    shape = (rows, size) if draw.chance(0.7) else (draw.size(3), rows, size)
    weight = draw.perhaps(size)
    rms = name.endswith("rms_norm")
    bias = None if rms else draw.perhaps(size)
    eps = draw.one_of(1e-5, 1e-3) if size > 9 else 1.0  # a short row may vary so little that rounding is all there is
    text = f"{list(shape)}{', weight' * (weight is not None)}{', bias' * (bias is not None)}"

    def call(function: Function, x: Tensor, weight: Tensor | None, *rest: Any) -> Any:
        if name == "rms_norm":
            return function(x, (size,), weight, eps)
        if name == "add_rms_norm":
            return function(x, rest[0], (size,), weight, eps)
        if name == "layer_norm":
            return function(x, (size,), weight, *rest, eps)
        return function(x, rest[1], (size,), weight, rest[0], eps)

    inputs = [draw.floats(*shape), weight]
    if not rms:
        inputs.append(bias)
    if name.startswith("add"):
        inputs.append(draw.floats(*shape))
    return both(name, text, inputs, call)


def _rotary_embedding(draw: Draw) -> Case:
    batch, heads, kv_heads, tokens, head_dim = (draw.size(most) for most in (4, 6, 3, 50, 90))
    rotated = 2 * (draw.size(head_dim) // 2)
    inputs = [draw.floats(batch, heads, tokens, head_dim), draw.floats(batch, kv_heads, tokens, head_dim)]
    angles = draw.one_of(1, batch), tokens, rotated
    cos, sin = draw.floats(*angles), draw.floats(*angles)
    text = f"{[batch, heads, tokens, head_dim]}, {kv_heads} heads of keys, angles {list(angles)}"
    return both("rotary_embedding", text, inputs, lambda function, q, k: function(q, k, cos.to(q), sin.to(q)))


def _gated_activation(draw: Draw) -> Case:
    shape, activation = [draw.size(60), draw.size(400)], draw.one_of(*_ACTIVATIONS)
    inputs = [draw.floats(*shape), draw.floats(*shape)]
    return both("gated_activation", f"{shape}, {activation}", inputs, lambda f, gate, up: f(gate, up, activation))


def _embedding(draw: Draw) -> Case:
    rows, size, batch, tokens = draw.size(400), draw.size(300), draw.size(5), draw.size(60)
    dropout_p = draw.one_of(0.0, 0.0, 0.0, 0.3)
    ids = draw.ints(rows, batch, tokens, dtypes=(torch.int64, torch.int32))
    padding = draw.one_of(None, None, 0, rows - 1)
    inputs = [draw.floats(rows, size), draw.perhaps(tokens, size)]
    text = f"ids {[batch, tokens]}, weight {[rows, size]}{', positions' * (inputs[1] is not None)}, dropout {dropout_p}"

    def ours(weight: Tensor, positions: Tensor | None) -> Tensor:
        torch.manual_seed(draw.seed)
        return ops.embedding(ids, weight, padding, positions=positions, dropout_p=dropout_p)

    def theirs(weight: Tensor, positions: Tensor | None) -> Tensor:
        factors = None
        if dropout_p > 0:
            factors = _factors(draw, batch * tokens, size, dropout_p).view(batch, tokens, size)
        return reference.embedding(ids, weight, padding, positions=positions, factors=factors)

    return Case(text, ours, theirs, inputs)


def _factors(draw: Draw, rows: int, columns: int, dropout_p: float) -> Tensor:
    """Return the float64 factors by which our operator, called after the same seed, multiplies."""
    torch.manual_seed(draw.seed)
    kept = dropout_factors(draw.backend, draw_rng(torch.device(draw.device)), rows, columns, dropout_p) > 0
    return kept.double() / (1 - dropout_p)


def _attention(draw: Draw) -> Case:
    batch, kv_heads, group = draw.size(3), draw.size(3), draw.one_of(1, 1, 2, 3, 4)
    few = draw.chance(0.35)  # as in generating, where the keys are split into ranges
    queries, keys = (draw.size(4), draw.size(1300)) if few else (draw.size(150), draw.size(320))
    queries, keys = (0 if draw.chance(0.02) else queries), (0 if draw.chance(0.02) else keys)
    head_dim = draw.one_of(64, 128, draw.size(40), draw.size(300))
    value_dim = head_dim if draw.chance(0.8) else draw.size(140)
    while batch * kv_heads * group * queries * keys * (head_dim + value_dim) > 4e6:
        batch, kv_heads, group = 1, max(1, kv_heads - 1), max(1, group - 1)
        if (batch, kv_heads, group) == (1, 1, 1):
            queries = (queries + 1) // 2
    heads = kv_heads * group
    kind = draw.one_of("none", "none", "none", "bool", "bool", "additive")
    causal, dropout_p = draw.chance(0.4), draw.one_of(0.0, 0.0, 0.0, 0.2)
    lengths = draw.ints(keys + 1, batch, dtypes=(torch.int64, torch.int32)) if draw.chance(0.2) else None
    offset: int | Tensor = 0
    if causal and draw.chance(0.5):  # as where new tokens follow those of a cache
        each = draw.ints(keys + 1, batch, dtypes=(torch.int64, torch.int32))
        offset = draw.one_of(int(each[0]), max(0, keys - queries), each)
    mask = None
    if kind != "none":
        shape = [batch, heads, queries, keys]
        for i in range(3):
            if draw.chance(0.4):
                shape[i] = 1
        numbers = torch.randn(shape, generator=draw.numbers, dtype=torch.float64)
        if kind == "bool":
            mask = draw.laid_out(numbers > draw.one_of(-1.0, 0.0, 1.5))
        else:
            if draw.chance(0.3):  # as Hugging Face hides keys; some rows see none
                hidden = torch.rand(shape, generator=draw.numbers) < draw.one_of(0.1, 0.9)
                numbers.masked_fill_(hidden, torch.finfo(draw.dtype).min)
            mask = draw.laid_out(numbers.to(draw.dtype))
    inputs = [
        draw.floats(batch, heads, queries, head_dim),
        draw.floats(batch, kv_heads, keys, head_dim),
        draw.floats(batch, kv_heads, keys, value_dim),
    ]
    # Keys and values that no query may see hold anything at all.
    visible = torch.ones(batch, heads, queries, keys, dtype=torch.bool, device=draw.device)
    if causal:
        first = offset[:, None, None, None] if isinstance(offset, Tensor) else offset
        query_index, key_index = (torch.arange(n, device=draw.device) for n in (queries, keys))
        visible = visible & (key_index <= query_index[:, None] + first)
    if lengths is not None:
        visible &= (torch.arange(keys, device=draw.device) < lengths[:, None])[:, None, None]
    if mask is not None and kind == "bool":
        visible &= mask
    unseen = ~visible.any((1, 2))[:, None, :, None]
    garbage = draw.one_of(0.0, 1.0, math.nan, math.inf, -math.inf)
    for x in inputs[1:]:
        x.masked_fill_(unseen, garbage)
    text = (
        f"B {batch}, H {heads}, Hkv {kv_heads}, T {queries}, S {keys}, D {head_dim}, Dv {value_dim}, mask {kind}, "
        f"causal {causal}, causal_offset {offset}, dropout {dropout_p}, key_lengths {lengths is not None}, "
        f"unseen {garbage}"
    )
    given = mask
    if given is not None and kind == "bool":  # any byte but 0 is true
        mask = given.clone()
        given.view(torch.uint8).mul_(draw.one_of(1, 2, 255))

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        torch.manual_seed(draw.seed)
        return ops.scaled_dot_product_attention(
            query,
            key,
            value,
            given,
            dropout_p,
            causal,
            enable_gqa=group > 1,
            key_lengths=lengths,
            causal_offset=offset,
        )

    def theirs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = key.masked_fill(unseen, 0.0), value.masked_fill(unseen, 0.0)
        factors, seen = None, mask
        if dropout_p > 0:
            rows = batch * heads * queries
            factors = _factors(draw, rows, keys, dropout_p).view(batch, heads, queries, keys).to(value.dtype)
        if lengths is not None:
            visible = (torch.arange(keys, device=draw.device) < lengths[:, None])[:, None, None]
            if mask is None:
                seen = visible
            else:
                seen = mask & visible if kind == "bool" else mask.masked_fill(~visible, float("-inf"))
        return reference.scaled_dot_product_attention(
            query, key, value, seen, 0.0, causal, enable_gqa=group > 1, causal_offset=offset, weight_factors=factors
        )

    return Case(text, ours, theirs, inputs)


def _linear(draw: Draw) -> Case:
    rows = draw.one_of(draw.size(4), draw.size(90))
    inside, outside = draw.one_of(draw.size(300), draw.size(300), 2100), draw.size(200)
    activation = draw.one_of("none", *_ACTIVATIONS)
    inputs = [
        draw.floats(rows, inside),
        draw.floats(outside, inside, scale=inside**-0.5),
        draw.perhaps(outside),
        draw.perhaps(rows, outside),
    ]
    text = f"{rows} rows, {inside} -> {outside}, {activation}, {_given(inputs, 'input weight bias residual')}"

    def call(function: Function, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Any:
        return function(x, weight, bias, activation=activation, residual=residual)

    return both("linear", text, inputs, call)


def _feed_forward(draw: Draw) -> Case:
    rows, inside, hidden = draw.one_of(draw.size(4), draw.size(90)), draw.size(150), draw.size(200)
    outside = draw.one_of(inside, draw.size(150))
    activation = draw.one_of(*_ACTIVATIONS)
    inputs = [
        draw.floats(rows, inside),
        draw.floats(hidden, inside, scale=inside**-0.5),
        draw.perhaps(hidden),
        draw.floats(outside, hidden, scale=hidden**-0.5),
        draw.perhaps(outside),
        draw.perhaps(rows, outside),
    ]
    given = _given(inputs, "input weight1 bias1 weight2 bias2 residual")
    text = f"{rows} rows, {inside} -> {hidden} -> {outside}, {activation}, {given}"

    def call(function: Function, *tensors: Any) -> Any:
        return function(*tensors[:5], activation=activation, residual=tensors[5])

    return both("feed_forward", text, inputs, call)


def _given(inputs: Sequence[Tensor | None], names: str) -> str:
    return "with " + ", ".join(n for n, x in zip(names.split(), inputs, strict=True) if x is not None)


def _loss_options(draw: Draw, rows: int, classes: int) -> tuple[Tensor, dict[str, Any], str]:
    """Draw targets for two classes or more, of which the first is not ignored: the mean over none is NaN (the gradient
    of one class is nothing but rounding)."""
    target = draw.ints(classes, rows)
    ignored = draw.one_of(-100, -100, classes - 1)
    if draw.chance(0.4):
        target[draw.ints(rows, max(1, rows // 4))] = -100
        target[0], ignored = 0, -100
    options = {
        "reduction": draw.one_of("mean", "sum", "none"),
        "ignore_index": -100 if rows == 1 else ignored,
        "label_smoothing": draw.one_of(0.0, 0.0, 0.1),
    }
    if options["ignore_index"] >= 0:
        target[0] = 0
    return target, options, ", ".join(f"{name} {value}" for name, value in options.items())


def _class_weight(draw: Draw, classes: int) -> Tensor | None:
    weight = draw.perhaps(classes)
    return None if weight is None else weight.abs().add(0.1)


def _cross_entropy(draw: Draw) -> Case:
    rows, classes = draw.size(90), 1 + draw.size(draw.one_of(20, 300, 2000))
    target, options, text = _loss_options(draw, rows, classes)
    weight = _class_weight(draw, classes)

    def call(function: Function, x: Tensor) -> Any:
        return function(x, target, None if weight is None else weight.to(x.dtype), **options)

    text = f"{rows} rows, {classes} classes, {text}{', weight' * (weight is not None)}"
    return both("cross_entropy", text, [draw.floats(rows, classes, scale=3.0)], call)


def _linear_cross_entropy(draw: Draw) -> Case:
    rows, features, classes = draw.size(140), draw.size(90), 1 + draw.size(draw.one_of(20, 600))
    target, options, text = _loss_options(draw, rows, classes)
    weight = _class_weight(draw, classes)
    inputs = [
        draw.floats(rows, features),
        draw.floats(classes, features, scale=2 * features**-0.5),
        draw.perhaps(classes),
    ]

    def call(function: Function, x: Tensor, linear_weight: Tensor, bias: Tensor | None) -> Any:
        class_weight = None if weight is None else weight.to(x.dtype)
        return function(x, linear_weight, target, linear_bias=bias, weight=class_weight, **options)

    text = f"{rows} rows, {features} -> {classes}, {text}, {_given(inputs, 'input weight bias')}"
    return both("linear_cross_entropy", text, inputs, call)


def _levels(draw: Draw, lowest: int, *shape: int) -> Tensor:
    """Return whole numbers from `lowest` up, of which each 64 of a row have the lowest, so that their scale is 1."""
    levels = torch.randint(lowest, -lowest, shape, generator=draw.numbers)
    levels[..., ::64] = lowest
    return levels.float()


def _quantize_weight(draw: Draw) -> Case:
    outputs, columns, kind = draw.size(40), draw.size(draw.one_of(70, 700)), draw.one_of("int8", "int4")
    weight = _levels(draw, -128 if kind == "int8" else -8, outputs, columns)
    scale = torch.exp2(torch.randint(-9, 9, (outputs, 1), generator=draw.numbers).float())

    def ours(weight: Tensor) -> Tensor:
        return ops.quantize_weight(weight.detach(), kind).dequantize()

    text = f"{[outputs, columns]} {kind}"
    # Nothing has to be rounded.
    return Case(text, ours, lambda x: x.detach(), [draw.laid_out(weight * scale)], differentiable=False)


def _stored(draw: Draw, kind: str, rows: int, columns: int) -> ops.QuantizedWeight:
    """Return a random weight, quantised by PyTorch, since not every backend quantises."""
    weight = torch.randn(rows, columns, generator=draw.numbers)
    data, scales = (weight.bfloat16(), None) if kind == "bf16" else reference.quantize_weight(weight, BITS[kind], 64)
    return ops.QuantizedWeight(data.to(draw.device), None if scales is None else scales.to(draw.device), columns)


def _meant(weight: ops.QuantizedWeight) -> Tensor:
    return reference.dequantize_weight(weight.data, weight.scales, weight.in_features)


def _quantized_embedding(draw: Draw) -> Case:
    rows, columns, kind = draw.size(90), draw.size(draw.one_of(70, 700)), draw.one_of(*KINDS)
    ids = draw.ints(rows, draw.size(5), draw.size(20), dtypes=(torch.int64, torch.int32))
    weight = _stored(draw, kind, rows, columns)

    # It takes nothing floating: the input is for its dtype alone.
    return Case(
        f"ids {list(ids.shape)}, weight {[rows, columns]} {kind}",
        lambda like: ops.quantized_embedding(ids, weight, dtype=like.dtype),
        lambda like: _meant(weight)[ids.long()].to(like.dtype),
        [torch.zeros(0, dtype=draw.dtype, device=draw.device)],
        differentiable=False,
    )


def _quantized_linear(draw: Draw) -> Case:
    shape = (draw.size(20),) if draw.chance(0.7) else (draw.size(3), draw.size(20))
    outputs, columns = draw.size(90), draw.size(draw.one_of(70, 700))
    activation, kind = draw.one_of(*_ACTIVATIONS), draw.one_of(*KINDS)
    weight = _stored(draw, kind, outputs, columns)
    # The activations of few rows are rounded to such numbers on a CPU.
    x = draw.laid_out(_levels(draw, -127, *shape, columns))
    text = f"{[*shape, columns]} -> {outputs}, {kind}, {activation}"

    def ours(*inputs: Tensor | None) -> Tensor:
        x, bias, residual = (None if x is None else x.detach() for x in inputs)
        assert x is not None
        return ops.quantized_linear(x, weight, bias, activation=activation, residual=residual)

    def theirs(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        whole = _meant(weight).to(x.dtype)
        return reference.linear(x, whole, bias, activation=activation, residual=residual).detach()

    inputs = [x, draw.perhaps(outputs), draw.perhaps(*shape, outputs)]
    return Case(text, ours, theirs, inputs, differentiable=False)


def _adamw(draw: Draw) -> Case:
    shapes = [(draw.size(9), draw.size(draw.one_of(20, 300, 9000))) for _ in range(draw.size(5))]
    options = {
        "lr": draw.one_of(1e-3, 0.1),
        "betas": draw.one_of((0.9, 0.95), (0.8, 0.999)),
        "eps": draw.one_of(1e-8, 1e-3),
        "weight_decay": draw.one_of(0.0, 0.3),
    }
    step, max_norm = draw.random.randrange(9), draw.one_of(1.0, 1e9)
    inputs = [draw.floats(*shape) for shape in shapes for _ in range(4)]

    def call(module: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        # The kernel takes contiguous tensors, and changes them.
        tensors = [x.detach().clone(memory_format=torch.contiguous_format) for x in inputs]
        parameters, grads, exp_avgs, exp_avg_sqs = (tensors[i::4] for i in range(4))
        for exp_avg_sq in exp_avg_sqs:
            exp_avg_sq.abs_()
        steps = [torch.full((), float(step)) for _ in parameters]
        norm = module.adamw_norm(grads)
        clip_coef = min(1.0, max_norm / float(norm))
        module.adamw_step(parameters, grads, exp_avgs, exp_avg_sqs, steps, clip_coef=clip_coef, **options)
        return norm, *parameters, *exp_avgs, *exp_avg_sqs, *steps

    return Case(
        f"{shapes}, step {step}, {options}", partial(call, ops), partial(call, reference), inputs, differentiable=False
    )


CASES: dict[str, Callable[[Draw], Case]] = {
    "layer_norm": partial(_norm, "layer_norm"),
    "add_layer_norm": partial(_norm, "add_layer_norm"),
    "rms_norm": partial(_norm, "rms_norm"),
    "add_rms_norm": partial(_norm, "add_rms_norm"),
    "rotary_embedding": _rotary_embedding,
    "gated_activation": _gated_activation,
    "embedding": _embedding,
    "attention": _attention,
    "linear": _linear,
    "feed_forward": _feed_forward,
    "transformer_block": transformer_block,
    "transformer": transformer,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "adamw": _adamw,
    "decoder": decoder,
    "decode_block": decode_block,
    "quantize_weight": _quantize_weight,
    "quantized_linear": _quantized_linear,
    "quantized_embedding": _quantized_embedding,
}
