"""The rows of operators on a GPU: which work, by whom. All in bfloat16."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from tinyllm import ops

from . import bench_attention, bench_embedding, bench_layer_norm, bench_losses, work
from .gpu_row import CUDA, OF_CEILING, OF_PEER, OF_TRITON, TRITON, Cut, Function, GpuRow, Source, by_backends
from .harness import BACKWARD, BYTES, COMPILED, EAGER, FLOPS, FORWARD, STEP, Case, passes

FLASH, CUDNN, EFFICIENT, FLEX = "SDPA FLASH", "SDPA CUDNN", "SDPA EFFICIENT", "FlexAttention"
PINNED = {
    FLASH: SDPBackend.FLASH_ATTENTION,
    CUDNN: SDPBackend.CUDNN_ATTENTION,
    EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
}
LIGER = "Liger"


def rows(source: Source, cut: Cut) -> list[GpuRow]:
    """Attention, norms, losses, embedding, and attention of one query."""
    return [
        *_attention_rows(source, cut),
        *_norm_rows(source, cut),
        *_loss_rows(source, cut),
        *_embedding_rows(source, cut),
        *_decode_rows(source, cut),
    ]


def _liger(name: str) -> Mapping[str, Function]:
    """A function of Liger's, where it is installed."""
    try:
        functional = importlib.import_module("liger_kernel.transformers.functional")
    except ImportError:
        return {}
    return {LIGER: getattr(functional, name)}


# ---- Attention


def pinned(backend: SDPBackend) -> Function:
    """PyTorch's attention by one of its kernels, or an error."""

    def attention(*arguments: Any, **options: Any) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*arguments, **options)

    return attention


def flex(shape: Sequence[int], causal: bool, device: str) -> Function:
    """FlexAttention, compiled; its mask is made once. (B, H, T, D) only say how long the mask is."""

    def make() -> Function:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        length = shape[2]
        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device) if causal else None
        return partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)

    made: list[Function] = []

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, enable_gqa: bool = False, **__: Any) -> Tensor:
        if not made:
            made.append(make())
        out: Tensor = made[0](query, key, value, enable_gqa=enable_gqa)
        return out

    return attention


def attention_by_parts(query: Tensor, key: Tensor, value: Tensor, mask: None, is_causal: bool) -> Tensor:
    """The formula; a few heads at a time, whose scores are computed again for the gradients: there is no memory for
    those of all heads."""
    batch, heads, length, _ = query.shape
    part = max(1, (1 << 27) // length**2)
    flat = [x.flatten(0, 1) for x in (query, key, value)]

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return bench_attention.torch_attention(q[None], k[None], v[None], None, is_causal)[0]

    outs = [
        checkpoint(formula, *(x[i : i + part] for x in flat), use_reentrant=False)
        for i in range(0, batch * heads, part)
    ]
    return torch.cat(outs).unflatten(0, (batch, heads))


def _attention_row(
    source: Source,
    causal: bool,
    direction: str,
    shape: bench_attention.Shape,
    headline: bool,
    with_flex: bool,
    goals: Mapping[str, float],
) -> GpuRow:
    batch, heads, length, size = shape

    def build() -> Case:
        functions = {**by_backends(bench_attention.attention), EAGER: bench_attention.torch_attention}
        functions |= {name: pinned(backend) for name, backend in PINNED.items()}
        if with_flex:
            functions[FLEX] = flex(shape, causal, source.device)
        functions = {name: _with_is_causal(function) for name, function in functions.items()}
        inputs = [source.randn(*shape) for _ in range(3)]
        return passes(functions, direction, inputs, (None, causal), compiled=False, exact=attention_by_parts)

    pairs = batch * heads * work.visible_pairs(length, length, causal)
    return GpuRow(
        section="attention",
        operation=f"{'causal' if causal else 'full'} attention",
        direction=direction,
        shape=str(shape),
        work=work.attention_flops(direction, pairs, size),
        unit=FLOPS,
        build=build,
        dtype=torch.bfloat16,
        providers=(CUDA, TRITON, EAGER, *PINNED, *([FLEX] if with_flex else [])),
        headline=headline,
        facts_of_shape={"seq_len": length, "head_dim": size, "causal": causal},
        operators=("attention",),
        goals=goals,
    )


def _with_is_causal(function: Function) -> Function:
    return lambda query, key, value, mask, causal: function(query, key, value, mask, is_causal=causal)


def _attention_rows(source: Source, cut: Cut) -> list[GpuRow]:
    tokens, width = cut(16384, 128), cut(1024, 64)
    found = []
    for causal, direction, size, lengths in [
        (True, FORWARD, 128, (4096, 2048, 16384, 1024)),
        (True, FORWARD, 64, (4096, 1024, 512, 2048, 16384)),
        (False, FORWARD, 128, (4096,)),
        (True, BACKWARD, 128, (4096, 2048)),
        (True, BACKWARD, 64, (4096, 1024)),
        (False, BACKWARD, 128, (4096,)),
        (False, BACKWARD, 64, (4096,)),
    ]:
        goals: dict[str, float] = {}
        if direction == BACKWARD:
            goals = {OF_PEER: 0.8}
        elif causal and size == 128:
            goals = {OF_PEER: 0.85}
        for length in dict.fromkeys(cut(length, 64) for length in lengths):
            size = cut(size, 32)
            shape = bench_attention.Shape(tokens // length, width // size, length, size)
            first = length == lengths[0]  # torch.compile takes long: FlexAttention is at one length of each kind
            headline = (first and (causal or direction == FORWARD)) or (length >= 2048 and OF_PEER in goals and causal)
            reached = {} if length < 2048 and direction == FORWARD else goals
            found.append(_attention_row(source, causal, direction, shape, headline, first, reached))
    return found


def grouped_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The formula for one query (B, H, 1, D) and fewer heads of keys; keys and values are read where they lie."""
    batch, key_heads, _, size = key.shape
    grouped = query.view(batch, key_heads, -1, size)
    weights = torch.softmax(grouped @ key.mT * size**-0.5, -1)
    return (weights @ value).view(query.shape)


def _decode_rows(source: Source, cut: Cut) -> list[GpuRow]:
    heads, key_heads, size = cut(32, 4), cut(8, 2), cut(128, 32)  # as in Llama 3 8B

    def row(batch: int, length: int, headline: bool, with_flex: bool = False) -> GpuRow:
        return GpuRow(
            section="decode",
            operation="one query's attention",
            direction=FORWARD,
            shape=f"B{batch} H{heads}/{key_heads} T{length} D{size}",
            work=2 * 2 * batch * key_heads * length * size,
            unit=BYTES,
            build=partial(build_decode, source, batch, heads, key_heads, length, size, with_flex),
            dtype=torch.bfloat16,
            providers=(CUDA, TRITON, EAGER, *PINNED, *([FLEX] if with_flex else [])),
            headline=headline,
            operators=("attention",),
            goals={OF_CEILING: 0.8} if batch == 1 else {},
        )

    return [
        *(row(1, cut(length, 32 + i), headline=True) for i, length in enumerate((4096, 8192, 16384))),
        row(1, cut(32768, 64), headline=True, with_flex=True),
        row(16, cut(4096, 32), headline=True, with_flex=True),
        row(cut(64, 8), cut(4096, 32), headline=False),
        row(16, cut(32768, 64), headline=False),
    ]


def build_decode(
    source: Source, batch: int, heads: int, key_heads: int, length: int, size: int, with_flex: bool
) -> Case:
    """One query of each sequence against its cache of keys and values, which fewer heads have."""
    functions: dict[str, Function] = {
        **by_backends(ops.scaled_dot_product_attention),
        EAGER: F.scaled_dot_product_attention,
        **{name: pinned(backend) for name, backend in PINNED.items()},
    }
    if with_flex:
        functions[FLEX] = flex((batch, heads, length, size), False, source.device)
    functions = {name: partial(function, enable_gqa=True) for name, function in functions.items()}
    inputs = [source.randn(batch, heads, 1, size)]
    inputs += [source.randn(batch, key_heads, length, size) for _ in range(2)]
    return passes(functions, FORWARD, inputs, compiled=False, exact=grouped_attention)


# ---- Norms


def _norm_rows(source: Source, cut: Cut) -> list[GpuRow]:
    rows_of = cut(16384, 64)
    norms: dict[str, tuple[Function, Function, Mapping[str, Function], tuple[int, int], Function]] = {
        # ours, PyTorch's, Liger's, how many (rows, C) and (C) go in, bytes
        "layer_norm": (
            bench_layer_norm.layer_norm,
            bench_layer_norm.torch_layer_norm,
            {name: partial(_liger_norm, function) for name, function in _liger("liger_layer_norm").items()},
            (1, 2),
            work.layer_norm_bytes,
        ),
        "add_layer_norm": (
            bench_layer_norm.add_layer_norm,
            bench_layer_norm.torch_add_layer_norm,
            {},
            (2, 2),
            work.add_layer_norm_bytes,
        ),
        "rms_norm": (
            bench_layer_norm.rms_norm,
            bench_layer_norm.torch_rms_norm,
            {name: partial(_liger_norm, function) for name, function in _liger("liger_rms_norm").items()},
            (1, 1),
            work.rms_norm_bytes,
        ),
    }

    def row(
        name: str, direction: str, n: int, c: int, headline: bool = False, goals: Mapping[str, float] | None = None
    ) -> GpuRow:
        ours, torchs, ligers, (large, small), work_of = norms[name]

        def build() -> Case:
            inputs = [source.randn(n, c) for _ in range(large)] + [source.randn(c) for _ in range(small)]
            return passes({**by_backends(ours), EAGER: torchs, **ligers}, direction, inputs)

        return GpuRow(
            section="layer_norm",
            operation=name,
            direction=direction,
            shape=f"{n}x{c}",
            work=work_of(direction, n, c, itemsize=2),
            unit=BYTES,
            build=build,
            dtype=torch.bfloat16,
            providers=(CUDA, TRITON, EAGER, COMPILED, *ligers),
            headline=headline,
            operators=(name,),
            goals=goals or {},
        )

    widths = [cut(c, 32 + i) for i, c in enumerate((4096, 768, 8192, 1024))]
    found = [
        row(
            name,
            direction,
            rows_of,
            c,
            headline=c == widths[0] and name != "rms_norm",
            goals={OF_TRITON: 1.0} if c == widths[0] else {},
        )
        for c in widths
        for name in norms
        for direction in (FORWARD, BACKWARD)
    ]
    # Few and short rows; and rows that no block's registers hold.
    for n, c in [(cut(4096, 32), cut(768, 33)), (cut(2048, 4), cut(65536, 300))]:
        found += [row("layer_norm", direction, n, c) for direction in (FORWARD, BACKWARD)]
    return found


def _liger_norm(function: Function, input: Tensor, *parameters: Tensor) -> Tensor:
    eps = 1e-5 if len(parameters) == 2 else torch.finfo(input.dtype).eps  # each as PyTorch's default
    out: Tensor = function(input, *parameters, eps)
    return out


# ---- Losses and embedding


def _loss_rows(source: Source, cut: Cut) -> list[GpuRow]:
    found = []
    for n, c in [(8192, 50257), (4096, 128256)]:
        n, c = cut(n, 32), cut(c, 101)
        losses = {**by_backends(ops.cross_entropy), EAGER: F.cross_entropy}
        build = partial(_build_loss, source, losses, shapes=[(n, c)], classes=c)
        size = work.cross_entropy_bytes(STEP, n, c, 2)
        found.append(_loss_row("cross_entropy", f"{n}x{c}", size, BYTES, build, {OF_TRITON: 1.0}))
    functions: dict[str, Function] = {
        **by_backends(ops.linear_cross_entropy),
        EAGER: bench_losses.torch_linear_cross_entropy,
    }
    if hasattr(F, "linear_cross_entropy"):
        functions[bench_losses.CHUNKED] = bench_losses.torch_chunked
    for name, function in _liger("liger_fused_linear_cross_entropy").items():
        functions[name] = partial(_liger_loss, function)
    for n, d, c in [(8192, 768, 50257), (8192, 4096, 128256)]:
        n, d, c = cut(n, 32), cut(d, 16), cut(c, 101)
        flops = work.linear_cross_entropy_flops(STEP, n, d, c)
        build = partial(_build_loss, source, functions, shapes=[(n, d), (c, d)], classes=c)
        found.append(_loss_row("linear_cross_entropy", f"{n}x{d}x{c}", flops, FLOPS, build, {}))
    return found


def _build_loss(source: Source, functions: dict[str, Function], shapes: list[tuple[int, int]], classes: int) -> Case:
    return bench_losses.build(functions, STEP, shapes, classes, torch.bfloat16, source.device, source.seed())


def _loss_row(
    operation: str, shape: str, size: float, unit: str, build: Callable[[], Case], goals: Mapping[str, float]
) -> GpuRow:
    return GpuRow(
        section="losses",
        operation=operation,
        direction=STEP,
        shape=shape,
        work=size,
        unit=unit,
        build=build,
        dtype=torch.bfloat16,
        headline=True,
        operators=(operation,),
        shows_memory=True,
        goals=goals,
    )


def _liger_loss(function: Function, input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    loss = function(input, weight, target)
    return loss[0] if isinstance(loss, tuple) else loss


def _embedding_rows(source: Source, cut: Cut) -> list[GpuRow]:
    batch, length, classes, size = cut(16, 2), cut(1024, 16), cut(50257, 50), cut(768, 32)

    def row(direction: str) -> GpuRow:
        def build() -> Case:
            functions = {**by_backends(bench_embedding.embedding), EAGER: bench_embedding.torch_embedding}
            inputs = [source.randn(classes, size), source.randn(length, size)]
            return passes(functions, direction, inputs, [source.randint(classes, batch, length)])

        return GpuRow(
            section="embedding",
            operation="embedding + positions",
            direction=direction,
            shape=f"{batch}x{length} V{classes} D{size}",
            work=work.embedding_bytes(direction, batch * length, length, classes, size, itemsize=2),
            unit=BYTES,
            build=build,
            dtype=torch.bfloat16,
            headline=direction == BACKWARD,
            operators=("embedding",),
        )

    return [row(BACKWARD), row(FORWARD)]
