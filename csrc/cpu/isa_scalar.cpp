// Every CPU kernel in plain C++, for processors that have none of the other sets.
#include <algorithm>
#include <cmath>
#include <limits>

#define TINYLLM_ISA scalar
#include "isa_table.h"

namespace tinyllm::cpu {
const Kernels scalar_kernels = TINYLLM_ISA::table("scalar");
}
