// All CPU kernels in plain C++, for processors without the other instruction sets.
#include <algorithm>
#include <cmath>
#include <limits>

#define TINYLLM_ISA scalar
#define TINYLLM_SCALAR
#include "isa_table.h"

namespace tinyllm::cpu {
const Kernels scalar_kernels = TINYLLM_ISA::table("scalar");
}
