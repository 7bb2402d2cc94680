// The CPU kernels of AVX-512 for processors without it, in place of csrc/cpu/isa_avx512.cpp.
#include "emulated.h"

#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#define TINYLLM_ISA avx512
#define TINYLLM_AVX512
#include "isa_table.h"

namespace tinyllm::cpu {
const Kernels avx512_kernels = TINYLLM_ISA::table("avx512");
}
