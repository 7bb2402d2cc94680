"""Whether the kernels compute what PyTorch does, on the machine at hand: `tinyllm check`."""
