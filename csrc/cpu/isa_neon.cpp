// All CPU kernels compiled for NEON, which every AArch64 processor has: the compiler's target need not be switched.
#if defined(__aarch64__)
#include <arm_neon.h>

#define TINYLLM_ISA neon
#define TINYLLM_NEON

#include "isa_table.h"

namespace tinyllm::cpu {
const Kernels neon_kernels = TINYLLM_ISA::table("neon");
}
#endif
