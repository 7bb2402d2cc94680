// Linear layers whose weights may be stored in fewer bits than their activations.
#pragma once
#include <optional>

#include "torch_side.h"

namespace tinyllm::cpu {

// With so few rows, dot products with the weight as it lies take less time than unpacking it for a matmul.
constexpr int64_t kFewRows = 8;

// A weight from its tensors, checked: (outputs, inputs) of float or bfloat16; or bytes with their scales.
Weight read_weight(const char* op, const char* name, const Tensor& data, const OptionalTensor& scales, int64_t outputs,
                   int64_t inputs);

// A matmul with a weight. As the weight is always packed, a row of the result does not depend on how many there are.
Matmul weight_matmul(const Weight& weight, const float* x, int64_t rows, float* out);

// Computes out = activation(x weight^T + bias) + residual for contiguous rows as dot products. A row of the result does
// not depend on the others.
void weight_dots(const Weight& weight, const float* x, int64_t rows, const float* bias, Activation activation,
                 const float* residual, float* out);

// The same, by a matmul where there are more than kFewRows.
void weight_linear(const Weight& weight, const float* x, int64_t rows, const float* bias, Activation activation,
                   const float* residual, float* out);

}  // namespace tinyllm::cpu
