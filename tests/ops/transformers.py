"""Small models for `ops.transformer` and `ops.transformer_block`, which differ in their arguments."""

import torch

KINDS = ("block", "logits", "loss")
# B, T, V, classes, D, hidden_dim, num_heads, num_layers; a block alone takes the five that it knows.
SMALL = (2, 5, 7, 7, 6, 8, 2, 2)


def make(kind, shape, dtype=torch.float64, bias=True, norm_first=False):
    """Return ids, targets and what is differentiated: positions, or a block's input, and parameters; sums of the order
    of 1. bias: "blocks" leaves out the output's."""
    batch, tokens, words, classes, width, hidden, heads, layers = shape
    generator = torch.Generator().manual_seed(sum(shape[:2] + shape[4:7] if kind == "block" else shape))

    def draw(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    def ints(below):
        return torch.randint(max(1, below), (batch, tokens), generator=generator)

    def block():
        shapes = [(width, width)] * (4 if heads > 1 else 3) + [(hidden, width), (width, hidden)]
        weights = [draw(*s) / max(1, s[1]) ** 0.5 for s in shapes] + [1 + draw(width) / 4 for _ in range(2)]
        return weights + [draw(w.size(0)) for w in weights if bias]

    if kind == "block":
        found = [draw(batch, tokens, width), *block()]
    else:
        found = [draw(tokens, width), draw(words, width), *(p for _ in range(layers) for p in block())]
        found += ([1 + draw(width) / 4] + [draw(width)] * bool(bias)) * norm_first
        found += [draw(classes, width) / width**0.5] + [draw(classes)] * (bias is True)
    return ints(words), ints(classes), [x.to(dtype) for x in found]


def bind(kind, module, shape, ids, target, **options):
    """Return the operator as a function of what `make` gives last."""
    options["num_heads"] = shape[6]
    if kind == "block":
        return lambda x, *parameters: module.transformer_block(x, parameters, eps2=1e-3, **options)
    options |= {"eps": 1e-3, "num_layers": shape[7], "target": target if kind == "loss" else None}
    return lambda positions, *parameters: module.transformer(ids, parameters, positions=positions, **options)
