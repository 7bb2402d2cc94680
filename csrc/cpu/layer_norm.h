// Layer normalisation over raw memory, split over threads: for layer_norm.cpp, and for operators that contain a norm.
#pragma once
#include "dispatch.h"

namespace tinyllm::cpu {

void layer_norm_forward(int dtype, const LayerNormFwd& args, int64_t rows);

// The gradients of weight and bias, args.size elements of the compute type, are both wanted or both null.
void layer_norm_backward(int dtype, const LayerNormBwd& args, int64_t rows, void* grad_weight, void* grad_bias);

}  // namespace tinyllm::cpu
