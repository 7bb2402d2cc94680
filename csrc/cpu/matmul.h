// Matmuls of whole tensors, distributed over threads. The arithmetic is in matmul_kernel.h.
#pragma once
#include <vector>

#include "torch_side.h"

namespace tinyllm::cpu {

// Runs matmuls of one dtype. If all have the same number of rows, a later one may use the output of an earlier one as
// its A or its residual, which is then still in a cache: the matmuls of a block of rows run in their order. Otherwise
// they must be independent.
void run_matmuls(DType dtype, std::vector<Matmul> matmuls);

// Packs B of a matmul into `packed`; its A and out are not used.
void pack_b(DType dtype, const Matmul& p);

// Writes the sums over the rows of a (rows, columns) matrix to `out`.
void sum_columns(DType dtype, const void* data, int64_t rows, int64_t columns, void* out);

// Writes the gradient in front of an activation to `out`, for `count` elements; `gate` is what Matmul has.
void pass_gate(DType dtype, Activation activation, const void* gate, const void* grad, void* out, int64_t count);

// The three matmuls of a linear layer y = x w^T over `rows` contiguous rows; w is (outputs, inputs). If `by_inputs`, w
// and its gradient lie as contiguous (inputs, outputs) matrices.
inline Matmul linear_output(const void* x, const void* w, int64_t rows, int64_t inputs, int64_t outputs, void* y,
                            bool by_inputs = false) {
  const Matrix b = by_inputs ? Matrix{w, outputs, 1} : Matrix{w, 1, inputs};
  return {rows, outputs, inputs, {x, inputs, 1}, b, y, outputs};
}
inline Matmul linear_grad_input(const void* grad, const void* w, int64_t rows, int64_t inputs, int64_t outputs,
                                void* grad_x, bool by_inputs = false) {
  const Matrix b = by_inputs ? Matrix{w, 1, outputs} : Matrix{w, inputs, 1};
  return {rows, inputs, outputs, {grad, outputs, 1}, b, grad_x, inputs};
}
inline Matmul linear_grad_weight(const void* grad, const void* x, int64_t rows, int64_t inputs, int64_t outputs,
                                 void* grad_w, bool by_inputs = false) {
  if (by_inputs) return {inputs, outputs, rows, {x, 1, inputs}, {grad, outputs, 1}, grad_w, outputs};
  return {outputs, inputs, rows, {grad, 1, outputs}, {x, inputs, 1}, grad_w, inputs};
}

}  // namespace tinyllm::cpu
