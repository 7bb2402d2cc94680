// Dropout's state, for every operator that drops.
#pragma once
#include <optional>

#include "../checks.h"
#include "dispatch.h"

namespace tinyllm::cpu {

// rng: int64 (2,), the seed and the offset; not needed where p is 0.
Dropout dropout_state(const char* op, const std::optional<Tensor>& rng, double p);

}  // namespace tinyllm::cpu
