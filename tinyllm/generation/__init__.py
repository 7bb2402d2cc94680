"""Writing with a model: one token after the other, each drawn from what the model expects next.

| file          | what it has                                                                  |
|---------------|------------------------------------------------------------------------------|
| `sampling.py` | from logits to a token                                                       |
| `decoder.py`  | from tokens to logits: a model and what it has read                          |
| `engine.py`, `cuda_graph.py` | the same with drawing, on a CPU and on a GPU                   |
| `lookup.py`   | guesses at what comes next, from the text itself                             |
| `tokens.py`   | `generate` and `iter_tokens`: from ids to ids                                |
| `text.py`     | `stream_text` and `generate_text`: from text to text                         |
"""

from __future__ import annotations

from tinyllm.generation.choice import make_decoder
from tinyllm.generation.cuda_graph import GraphedCache
from tinyllm.generation.decoder import Cached, Decoder, Recompute
from tinyllm.generation.engine import Engine
from tinyllm.generation.sampling import Sampling, draw
from tinyllm.generation.text import TextStream, encode_prompt, generate_text, stream_text
from tinyllm.generation.tokens import TokenStream, generate, iter_tokens

__all__ = [
    "Cached",
    "Decoder",
    "Engine",
    "GraphedCache",
    "Recompute",
    "Sampling",
    "TextStream",
    "TokenStream",
    "draw",
    "encode_prompt",
    "generate",
    "generate_text",
    "iter_tokens",
    "make_decoder",
    "stream_text",
]
