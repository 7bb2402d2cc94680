"""The sentences of docs/benchmarks.md around what is measured."""

from __future__ import annotations

from . import generation_tables

HOW_TO_READ = """\
- A result is verified before it is timed: its error against float64 may be at most twice that of eager PyTorch, plus
  two rounding steps. Where one rounding can move the result by much, a ReLU's gradient at 0 or elements that dropout
  draws (forward+backward of the article's model, attention with dropout), a third of the dtype's digits must be right.
- All providers get the same inputs, threads, dtype and allocator settings, and take turns, so that a machine that slows
  down for a while slows all of them.
- Times are medians ± half the interquartile range. The factor is how many times as long as tinyllm a peer takes: above
  1 tinyllm is faster, below 1 the peer is. The best peer's is in bold.
- Rates count useful work only: matrix products, of attention those of visible query-key pairs; or every tensor moved
  once. Ceilings are measured with plain PyTorch in the same run; tensors that fit in the caches move faster than a
  copy.
- Shapes: B sequences of T tokens, H heads of D columns, V tokens in the vocabulary; 8192x1024 is rows x columns, of a
  linear layer 1024x768->3072 rows x inputs -> outputs; a model 128/512/4 is 128 wide, 512 in its feed-forward layers,
  and 4 layers deep. Padded attention has a mask over sequences of different lengths. The article's model has one head
  and ReLU; the scaled one several heads, GELU and causal attention.
- "torch via float32" converts 16-bit inputs first; "torch, chunked" computes the logits in pieces.
"""
INTRO = f"""# Benchmarks

<!-- Written by `python -m benchmarks.report` from benchmarks/results/; edit neither this page nor its figures. -->

`tinyllm bench` compares every operator and the model with PyTorch and torch.compile on your machine, in a quarter of an
hour (`--quick`: a few minutes). It needs `pip install -e '.[test]'`. `make bench` does so for this page, and
`make train-bench` compares training itself, in ten minutes, and `make generation-bench` writing, in half an hour.
Results are stored by the family of the processor, or by the chip; `python -m benchmarks.report --adopt FILE` takes over
what another machine has measured with `--out`.

`tinyllm bench --report DIR` measures nothing: it writes DIR/index.html, one page that shows all stored results in
charts and tables, and needs no network. Outside the repository it reads them from benchmarks/results below the current
directory, where `tinyllm bench` stores them. It needs `pip install -e '.[bench]'`; `make report` writes
build/report/index.html.

{HOW_TO_READ}"""
LINEAR_NOTE = (
    "Linear layers are measured on our kernel; the package takes PyTorch's where a table of processors says so."
)
KIND_NOTES = {
    "cpu": LINEAR_NOTE,
    "training": """A step is everything: data, forward, backward, clipping, optimizer, bookkeeping. At GPT-2's size,
where data and bookkeeping are lost in seconds, all have the same short loop and one batch.""",
    "generation": generation_tables.NOTE,
    "guesses": generation_tables.GUESSES,
    "optimize": """Models as transformers makes them, with random weights and without dropout, and what
`tinyllm.optimize` makes of them: `make optimize-bench`, in a quarter of an hour. A step of training is forward, loss
and backward. Writing is a token of transformers' own loop of `generate`, beside its float32 weights in all rows;
compiled, it has a cache of a fixed length.""",
    "gpu": """Times of operators are as the GPU runs them, those of training steps and launches by the clock on the
wall. CUDA C++ and Triton are ours, each forced; tinyllm is what the package chooses by itself.""",
}
