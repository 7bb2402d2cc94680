// Facts about the processor on which choices of kernels and of memory accesses depend.
#pragma once
#include <cstdint>
#include <string>

namespace tinyllm::cpu {

// The vendor of the processor ("amd", "intel", "arm", "apple" or "other"), followed by "-amx" or "-bf16" if it
// multiplies 16-bit numbers by instructions of its own. Our kernels widen them to float32 first, so PyTorch's matmuls
// may be faster there.
std::string cpu_family();

// Bytes of the last-level cache that one process can count on: at most 32 MiB, which is also the answer where the
// system does not tell.
int64_t last_level_cache();

}  // namespace tinyllm::cpu
