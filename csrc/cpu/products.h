// Matrix products split over threads; the arithmetic is in linear_kernel.h.
#pragma once
#include <vector>

#include "torch_side.h"

namespace tinyllm::cpu {

// Runs products of one element type. Where all have the same number of rows, a later one may have as its A or as its
// residual what an earlier one wrote, which is then still in a cache: a row's products run in their order. Otherwise
// they must not depend on each other.
void run_products(int dtype, std::vector<Product> products);

// The sums over the rows of a (rows, columns) matrix, into `out`.
void sum_columns(int dtype, const void* data, int64_t rows, int64_t columns, void* out);

// out = activation(x), or grad * activation'(x) with a gradient; `count` elements.
void activate(int dtype, Activation activation, const void* x, const void* grad, void* out, int64_t count);

// The three products of a linear layer y = x w^T over `rows` contiguous rows, w (outputs, inputs).
inline Product linear_output(const void* x, const void* w, int64_t rows, int64_t inputs, int64_t outputs, void* y) {
  return {rows, outputs, inputs, {x, inputs, 1}, {w, 1, inputs}, y, outputs};
}
inline Product linear_grad_input(const void* grad, const void* w, int64_t rows, int64_t inputs, int64_t outputs,
                                 void* grad_x) {
  return {rows, inputs, outputs, {grad, outputs, 1}, {w, inputs, 1}, grad_x, inputs};
}
inline Product linear_grad_weight(const void* grad, const void* x, int64_t rows, int64_t inputs, int64_t outputs,
                                  void* grad_w) {
  return {outputs, inputs, rows, {grad, 1, outputs}, {x, inputs, 1}, grad_w, inputs};
}

}  // namespace tinyllm::cpu
