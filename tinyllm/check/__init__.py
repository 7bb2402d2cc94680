"""Comparison of every kernel with PyTorch on the machine at hand: `tinyllm check`."""
