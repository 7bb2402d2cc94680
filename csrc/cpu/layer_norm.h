// Layer normalisation and root mean square normalisation over raw memory, split over threads: for layer_norm.cpp, and
// for operators that contain a norm.
#pragma once
#include "dispatch.h"

namespace tinyllm::cpu {

void layer_norm_forward(int dtype, const LayerNormFwd& args, int64_t rows);

// The gradients of weight and bias, args.size elements of the compute type, are both wanted or both null.
void layer_norm_backward(int dtype, const LayerNormBwd& args, int64_t rows, void* grad_weight, void* grad_bias);

// The same without mean and bias, and without a residual.
void rms_norm_forward(int dtype, const LayerNormFwd& args, int64_t rows);
void rms_norm_backward(int dtype, const LayerNormBwd& args, int64_t rows, void* grad_weight);

// Outputs are streamed past the caches when an operation moves more bytes than could stay in them anyway.
inline bool larger_than_caches(int64_t bytes) { return bytes > last_level_cache() / 2; }

}  // namespace tinyllm::cpu
