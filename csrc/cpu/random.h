// The state of dropout, for every operator that has dropout.
#pragma once
#include <optional>

#include "../checks.h"
#include "dispatch.h"

namespace tinyllm::cpu {

// Checks p and reads rng, an int64 tensor (seed, offset), which is not needed if p is 0.
Dropout dropout_state(const char* op, const std::optional<Tensor>& rng, double p);

}  // namespace tinyllm::cpu
