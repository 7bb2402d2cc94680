"""Where the kernels come from: C++ for CPUs, CUDA C++ and Triton for GPUs."""
