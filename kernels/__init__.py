"""Triton kernels, one file an operator, installed as `tinyllm.kernels`. They import torch and triton, nothing else."""
