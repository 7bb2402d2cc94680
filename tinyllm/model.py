"""SimpleLLM: the article's language model on fused kernels, and the options that scale it up.

    ids (B, T) -> embedding + positions -> num_layers transformer blocks -> output -> logits (B, T, V)

B sequences of T tokens, D = embedding_dim, V = vocab_size.
"""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tinyllm import _fused, ops
from tinyllm.config.model import SimpleLLMConfig
from tinyllm.nn import (
    Embedding,
    LayerNorm,
    LearnedPositionalEncoding,
    PositionalEncoding,
    Quantized,
    TransformerBlock,
)

if TYPE_CHECKING:
    from tinyllm.tokenizer import Tokenizer

__all__ = ["SimpleLLM", "choose_device", "init_gpt2_weights"]

POSITIONS: dict[str, type[PositionalEncoding] | type[LearnedPositionalEncoding]] = {
    "sinusoidal": PositionalEncoding,
    "learned": LearnedPositionalEncoding,
}

_MANY_LOGITS = 1_000_000  # from so many on, the loss is computed without holding them
_INDEX_DTYPES = (torch.int32, torch.int64)  # those that torch's embedding takes as they are
_INTEGER_DTYPES = (
    *_INDEX_DTYPES,
    *(torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.uint64),
)


@_fused.known()
class SimpleLLM(nn.Module):
    """Token ids (B, T) to logits (B, T, V). A drop-in for the article's class, on fused kernels.

    With the four positional arguments alone it has the article's state_dict and, under the same
    `torch.manual_seed`, its initial weights and outputs. The keyword-only options are those of
    `SimpleLLMConfig`, which says what each means.

    Tied weights start as an `nn.Linear`'s do, not as an `nn.Embedding`'s N(0, 1), for which the
    first logits would have a standard deviation of sqrt(D). See also `init_gpt2_weights`.

    Example:
        >>> model = SimpleLLM(vocab_size=6, embedding_dim=16, hidden_dim=32, num_layers=2)
        >>> model(torch.tensor([[0, 1, 2]])).shape
        torch.Size([1, 3, 6])

    Attributes:
        config: the `SimpleLLMConfig`.
        embedding, positional_encoding, transformer_blocks, output: as in the article.
        dropout: on the embedded input.
        final_norm: `LayerNorm` with norm_first, otherwise None.
        gradient_checkpointing: in training, keep only the blocks' inputs for backward, and compute the rest again: less
            memory, a third more computation.
    """

    final_norm: LayerNorm | None

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        hidden_dim: int,
        num_layers: int,
        *,
        num_heads: int = 1,
        causal: bool = False,
        max_seq_len: int = 5000,
        dropout: float = 0.0,
        activation: str = "relu",
        norm_first: bool = False,
        bias: bool = True,
        tie_embeddings: bool = False,
        position: str = "sinusoidal",
        norm_eps: float = 1e-5,
        output_bias: bool = True,
    ) -> None:
        super().__init__()
        # In the config's order, which is this constructor's: a test compares the two.
        # fmt: off
        config = SimpleLLMConfig(
            vocab_size, embedding_dim, hidden_dim, num_layers, num_heads, causal, max_seq_len, dropout, activation,
            norm_first, bias, tie_embeddings, position, norm_eps, output_bias,
        )
        # fmt: on
        self.config = config
        self.gradient_checkpointing = False
        self._whole: _fused.WholeModel | None = None  # see _as_one_operator
        # The order in which parameters are made decides which random numbers each one gets.
        self.embedding = Embedding(config.vocab_size, config.embedding_dim)
        self.positional_encoding = POSITIONS[config.position](config.embedding_dim, config.max_seq_len)
        self.dropout = nn.Dropout(config.dropout)
        self.transformer_blocks = nn.Sequential(
            *(
                TransformerBlock(
                    config.embedding_dim,
                    config.hidden_dim,
                    num_heads=config.num_heads,
                    causal=config.causal,
                    dropout=config.dropout,
                    activation=config.activation,
                    norm_first=config.norm_first,
                    bias=config.bias,
                    norm_eps=config.norm_eps,
                    defer_add=config.norm_first,
                )
                for _ in range(config.num_layers)
            )
        )
        norm = LayerNorm(config.embedding_dim, config.norm_eps, bias=config.bias) if config.norm_first else None
        self.final_norm = norm
        self.output = nn.Linear(config.embedding_dim, config.vocab_size, bias=config.bias and config.output_bias)
        if config.tie_embeddings:
            self.embedding.embedding.weight = self.output.weight

    @classmethod
    def from_config(cls, config: SimpleLLMConfig) -> SimpleLLM:
        """Return a model with new random weights."""
        return cls(**config.to_dict())

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *, weights: str = "float32", device: str | torch.device = "cpu"
    ) -> SimpleLLM:
        """Load a GPT-2 that Hugging Face's `transformers`, or `save_pretrained`, has saved, or a SimpleLLM that
        `tinyllm export` has; in eval mode.

        Args:
            path: the folder: its config.json of model_type "gpt2" or "tinyllm" and its weights, model.safetensors, its
                shards with their index, or, where these are missing, pytorch_model.bin likewise, of which only tensors
                are read (`torch.load(weights_only=True)`). Or the name of a model on the Hub, if there is no such
                folder and the package huggingface_hub is installed.
            weights: how they are stored: "float32", "bf16", "int8" or "int4", see `tinyllm.quantization.quantize`.
            device: where the model is to lie.

        Raises:
            FileNotFoundError: a file is missing, or neither a folder nor the Hub's model is to be had.
            ValueError: a file is damaged, the config asks for what SimpleLLM does not compute, or weights are missing,
                too many, of another shape, or not finite; the message names all such options or tensors.
        """
        from tinyllm._internal.huge_pages import HugePages
        from tinyllm.pretrained import hub, own
        from tinyllm.quantization import check_weights, model_of, stored

        check_weights(weights)
        folder = hub.folder_of(path)
        there = own.format_of(folder)
        config, _ = there.read_config(folder)
        pages = HugePages()
        state = there.read_weights(folder, config, lambda name, tensor: stored(name, tensor, weights, pages))
        try:
            return model_of(cls, config, state).to(device).eval()
        except RuntimeError as error:  # load_state_dict, which names the tensors
            reason = " ".join(str(error).split())
            raise ValueError(f"the weights in {folder} are not those of its config.json: {reason}") from error

    def save_pretrained(self, directory: str | os.PathLike[str], *, tokenizer: Tokenizer | None = None) -> None:
        """Write a GPT-2 that `GPT2LMHeadModel.from_pretrained` of `transformers` loads, and so does `from_pretrained`.

        Writes config.json and model.safetensors, tied weights once; files of another GPT-2 there are replaced, each
        when its successor is whole, and anything else is not.

        Args:
            directory: the folder; made if it is missing.
            tokenizer: a BPE tokenizer of at most vocab_size ids, to be written beside the model as tokenizer.json, for
                `load_run` and `AutoTokenizer`.

        Raises:
            FileExistsError: files of these names are there, and no GPT-2's.
            NotADirectoryError: there is a file of the directory's name.
            ValueError: GPT-2's format cannot hold the model, or the tokenizer; the message names every reason.
        """
        from tinyllm.pretrained import gpt2

        gpt2.save(directory, self.config, self.state_dict(), tokenizer)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits for the token after each one.

        Args:
            x: token ids (B, T) of any integer dtype, in 0 .. V - 1; T at most max_seq_len. B and T
                may be 0.

        Returns:
            (B, T, V), of the weights' dtype, or autocast's.

        Raises:
            TypeError: x is not a tensor of integers.
            ValueError: x is not 2-D, or its sequences are longer than max_seq_len.
            IndexError: an id is out of range (on eager CPU; a GPU stops with a device-side assert).
        """
        ids = _checked_ids(x)
        logits = self._as_one_operator(ids)
        return _fused.call_linear(self.output, self.features(ids)) if logits is None else logits

    def loss(
        self, x: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, documents: Tensor | None = None
    ) -> Tensor:
        """Mean cross-entropy of the logits and what came next, in nats; for a large vocabulary the logits never exist
        whole (see `ops.linear_cross_entropy`).

        Args:
            x: token ids (B, T), as `forward` takes them.
            targets: the token after each one, int64 (B, T); -100 where there is none.
            label_smoothing: the part of a target's probability that is spread over all tokens, from 0 to 1.
            documents: (B, T), of any dtype: tokens see those of their own document only, which has the same number.

        Returns:
            A scalar, float32 at least: two digits of bfloat16 would not show a training's progress.

        Raises:
            As `forward`; ValueError: targets or documents are not of x's shape.
        """
        if targets.shape != x.shape:
            raise ValueError(f"targets has shape {tuple(targets.shape)}; it must have x's, {tuple(x.shape)}")
        if documents is not None and documents.shape != x.shape:
            raise ValueError(f"documents has shape {tuple(documents.shape)}; it must have x's, {tuple(x.shape)}")
        ids, output = _checked_ids(x), self.output
        # A small vocabulary's logits cost less than the bookkeeping of their blocks; a changed output must be called.
        many = _fused.is_plain_linear(output) and ids.numel() * output.out_features >= _MANY_LOGITS
        whole = not many and label_smoothing == 0 and documents is None
        loss = self._as_one_operator(ids, targets) if whole else None
        if loss is not None:
            return loss
        features = (self.features(ids) if documents is None else self.features(ids, documents)).flatten(0, 1)
        target = targets.flatten()
        low = features.dtype in (torch.bfloat16, torch.float16)
        if not many:
            logits = _fused.call_linear(output, features)
            return F.cross_entropy(logits.float() if low else logits, target, label_smoothing=label_smoothing)
        # Under autocast to the dtype that all is in already, nothing changes but the loss's own dtype.
        with torch.autocast(x.device.type, features.dtype) if low else nullcontext():
            return ops.linear_cross_entropy(
                features, output.weight, target, linear_bias=output.bias, label_smoothing=label_smoothing
            )

    def features(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        """Compute the features of ids (B, T) for `output`: (B, T, D). documents: see `loss`. Raises as `forward`."""
        x = _fused.call_embedding(self.embedding, self.positional_encoding, self.dropout, _checked_ids(x))
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if documents is None and not recompute:
            x = self.transformer_blocks(x)
        else:
            mask = None if documents is None else _document_mask(documents, self.config.causal)
            for block in self.transformer_blocks:
                x = checkpoint(block, x, mask, use_reentrant=False) if recompute else block(x, mask)
        if self.final_norm is None:
            return x
        if isinstance(x, tuple):  # the last block's output, not summed yet: see TransformerBlock
            return self.final_norm(*x)[0]
        return self.final_norm(x)  # a tensor only if there are no blocks

    def _as_one_operator(self, ids: Tensor, targets: Tensor | None = None) -> Tensor | None:
        """Return logits, or their loss; None where the parts are better called one by one."""
        if self.gradient_checkpointing or getattr(self.features, "__func__", None) is not SimpleLLM.features:
            return None
        return _fused.call_model(self, ids, targets)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_whole": None}  # it is found again; copies and files need not carry it

    def num_parameters(self) -> int:
        """Return the number of weights; tied ones count once, and quantised ones whatever their bits."""
        quantized = {module.data.data_ptr(): module for module in self.modules() if isinstance(module, Quantized)}
        stored = sum(math.prod(module.weight.shape) for module in quantized.values())
        return stored + sum(parameter.numel() for parameter in self.parameters())


def init_gpt2_weights(model: SimpleLLM, *, generator: torch.Generator | None = None) -> SimpleLLM:
    """Draw new weights the way GPT-2 does (Radford et al., 2019), in place.

    Linear, embedding and learned position weights from N(0, 0.02^2); biases 0; norms one and zero.
    The last linear layer of each residual branch gets a standard deviation smaller by
    sqrt(2 num_layers), so that the sum of all branches starts no larger in a deep model than in a
    shallow one.

    Args:
        model: any SimpleLLM, also one whose weights are sharded over processes (DTensors): each process then draws all
            of them, a tensor at a time, and keeps its part. With one head attention has no output projection, and
            `value` is the last linear layer of that branch.
        generator: draw from this one instead of torch's global one; with it, a sharded model gets the weights that a
            whole one on the generator's device would.

    Returns:
        model.
    """

    def normal(weight: Tensor, std: float) -> None:
        mesh: Any = getattr(weight, "device_mesh", None)  # DTensor's; its class takes half a second to import
        if mesh is None:
            nn.init.normal_(weight, mean=0.0, std=std, generator=generator)
            return
        from torch.distributed.tensor import distribute_tensor

        whole = torch.empty(weight.shape, device="cpu" if generator is None else generator.device)
        nn.init.normal_(whole, mean=0.0, std=std, generator=generator)
        with torch.no_grad():  # every process has drawn the same: there is nothing to send
            whole = whole.to(weight.device)
            weight.copy_(distribute_tensor(whole, mesh, cast(Any, weight).placements, src_data_rank=None))

    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()  # one and zero
        elif isinstance(module, (nn.Linear, nn.Embedding, LearnedPositionalEncoding)):
            normal(module.weight, 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
    for last in last_of_branches(model):
        normal(last.weight, 0.02 / math.sqrt(2 * model.config.num_layers))
    return model


def last_of_branches(model: SimpleLLM) -> list[nn.Linear]:
    """Return the last linear layer of each residual branch."""
    found: list[Any] = []
    for block in cast("list[TransformerBlock]", [*model.transformer_blocks]):
        attention = block.attention
        found += [attention.value if attention.out_proj is None else attention.out_proj, block.feed_forward[-1]]
    return found


def choose_device(name: str) -> torch.device:
    """Return the device of that name; `"auto"` is a GPU if there is one. Raises ValueError if it is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; allowed are 'cpu', 'cuda', 'cuda:N' and 'auto'") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; allowed are 'cpu', 'cuda', 'cuda:N' and 'auto'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices here")
    return device


def _document_mask(documents: Tensor, causal: bool) -> Tensor:
    """Return whether a query (row) may see a key: (B, T) to (B, 1, T, T)."""
    mask = documents.unsqueeze(-1) == documents.unsqueeze(-2)
    return (mask.tril() if causal else mask).unsqueeze(1)


def _checked_ids(x: Tensor) -> Tensor:
    """Return ids (B, T) in a dtype that torch's embedding takes, which checks their range itself."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; it must be a tensor of token ids, shape (B, T)")
    if x.dtype not in _INTEGER_DTYPES:
        raise TypeError(f"x has dtype {x.dtype}; token ids are integers, such as torch.int64")
    if x.dim() != 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; it must be (B, T): add the batch with x.unsqueeze(0)"
            if x.dim() == 1
            else f"x has shape {tuple(x.shape)}; it must be (B, T)"
        )
    return x if x.dtype in _INDEX_DTYPES else x.to(torch.int64)
