// Layer normalisation and root mean square normalisation over raw memory, distributed over threads, for layer_norm.cpp
// and for operators that contain a norm.
#pragma once
#include "cpu_info.h"
#include "dispatch.h"

namespace tinyllm::cpu {

void layer_norm_forward(DType dtype, const LayerNormFwd& args, int64_t rows);

// The gradients of weight and bias have args.size elements of the compute type; both are null if they are not wanted.
void layer_norm_backward(DType dtype, const LayerNormBwd& args, int64_t rows, void* grad_weight, void* grad_bias);

// The same without mean, bias and residual.
void rms_norm_forward(DType dtype, const LayerNormFwd& args, int64_t rows);
void rms_norm_backward(DType dtype, const LayerNormBwd& args, int64_t rows, void* grad_weight);

// Whether an operation moves so many bytes that its outputs could not stay in the caches anyway. They are then written
// by streaming stores.
inline bool larger_than_caches(int64_t bytes) { return bytes > last_level_cache() / 2; }

}  // namespace tinyllm::cpu
