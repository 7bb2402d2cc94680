"""A token of a GPT-2 on a GPU, behind a prompt: our decoder, whose step is a CUDA graph, against plain PyTorch with a
cache of its own, also in a CUDA graph. The time is that on the wall: the host's part is most of it."""

from __future__ import annotations

import torch

from tinyllm import SimpleLLM
from tinyllm.generation import GraphedCache
from tinyllm.nn import Quantized
from tinyllm.quantization import quantize

from ..peers import PlainLLM
from ..row import BYTES, EAGER, FORWARD, OURS, TRITON, Case, Outputs, Provider, Row, Target
from .model import GPT2, captured, pair

GRAPH = f"{EAGER}, CUDA graph"
_OPERATORS = ("layer_norm", "add_layer_norm", "attention")
_OF_QUANTIZED = ("quantized_linear", "quantized_embedding")


def ours_provider(model: SimpleLLM, prompt: torch.Tensor, token: torch.Tensor) -> Provider:
    """Return a step behind the prompt, which is read before the first one."""
    made: list[GraphedCache] = []

    def call() -> Outputs:
        if not made:
            decoder = GraphedCache(model, 1, model.config.max_seq_len)
            decoder.read([prompt])
            made.append(decoder)
        logits = made[0].step(token)
        made[0].forget_last()
        return (logits,)

    return Provider(call)


def plain_provider(model: PlainLLM, prompt: torch.Tensor, token: torch.Tensor) -> Provider:
    """Return the same in plain PyTorch."""
    config, length = model.config, len(prompt)
    shape = config.num_layers, 2, 1, config.num_heads, length + 1, config.embedding_dim // config.num_heads
    cache: list[torch.Tensor] = []

    @torch.inference_mode()
    def call() -> Outputs:
        if not cache:
            cache.append(model.wte.weight.new_empty(shape))
            model.features(prompt[None], cache[0])
        return (model.lm_head(model.features(token[None], cache[0], length)[:, -1]).float(),)

    return Provider(call)


def _row(target: Target, weights: str) -> Row:
    (width, hidden, layers), vocab_size = GPT2[0], target.cut(GPT2[1][2], 65)
    sizes = target.cut(width, 32), target.cut(hidden, 64), target.cut(layers, 1)
    heads, length = target.cut(12, 2), target.cut(256, 8)

    def build() -> Case:
        ours, like = (pair(sizes, vocab_size, 4 * length, True, heads)[0].to(target.device) for _ in range(2))
        if weights != "bf16":
            # Peers and the exact result have the numbers that are meant.
            like = _dequantized(quantize(ours, weights), like)
        ours = ours.to(torch.bfloat16).eval()
        plain, exact = (PlainLLM(like).to(target.device, dtype).eval() for dtype in (torch.bfloat16, torch.float32))
        prompt, token = target.randint(vocab_size, length), target.randint(vocab_size, 1)
        providers = {name: ours_provider(ours, prompt, token) for name in (OURS, TRITON)}
        providers[EAGER] = plain_provider(plain, prompt, token)
        if torch.device(target.device).type == "cuda":
            providers[GRAPH] = captured(plain_provider(plain, prompt, token))
        return Case(providers, lambda: plain_provider(exact, prompt, token).call())

    parameters = layers * (4 * width * width + 2 * width * hidden) + width * GPT2[1][2]
    return target.row(
        section="model",
        operation="a token of GPT-2's size" + (f", {weights} weights" if weights != "bf16" else ""),
        direction=FORWARD,
        shape=f"{'/'.join(map(str, sizes))} B1 past {length} V{vocab_size}",
        # Every weight, and every key and value.
        work=parameters * (2 if weights == "bf16" else 1 + 2 / 64) + 2 * layers * width * length * 2,
        unit=BYTES,
        build=build,
        ours=(OURS, TRITON),
        operators=_OPERATORS + (_OF_QUANTIZED if weights != "bf16" else ()),
        on_wall=True,
    )


def _dequantized(model: SimpleLLM, like: SimpleLLM) -> SimpleLLM:
    """Return `like` with the weights that the model's are meant to be."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, Quantized):
                like.get_parameter(f"{name}.weight").copy_(module.weight.dequantize())
    return like


def rows(target: Target) -> list[Row]:
    return [_row(target, weights) for weights in ("bf16", "int8")] if target.gpu else []
