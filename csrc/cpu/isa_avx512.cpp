// Every CPU kernel for AVX-512. The target is switched in the source, not by a compiler flag, and only after the
// standard headers: their inline functions, which the linker shares between files, must still run on any processor.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "dispatch.h"

#define TINYLLM_ISA avx512
#define TINYLLM_AVX512

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")
#endif

#include "isa_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace tinyllm::cpu {
const Kernels avx512_kernels = TINYLLM_ISA::table("avx512");
}
#endif
