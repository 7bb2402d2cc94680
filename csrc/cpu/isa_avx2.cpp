// All CPU kernels compiled for AVX2. The target is switched in the source instead of by a compiler flag, and only after
// the standard headers: the linker shares their inline functions between files, so these must run on any processor.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "scratch.h"

#define TINYLLM_ISA avx2
#define TINYLLM_AVX2

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "isa_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace tinyllm::cpu {
const Kernels avx2_kernels = TINYLLM_ISA::table("avx2");
}
#endif
