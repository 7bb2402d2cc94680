// Shared by the losses on all devices: the reduction over the rows and argument checks, which look at no values.
#pragma once
#include "tensors.h"

namespace tinyllm {

enum class Reduction : int64_t { none = 0, mean = 1, sum = 2 };

inline Reduction reduction_of(const char* op, int64_t reduction) {
  if (reduction < 0 || reduction > 2)
    fail(op, ": reduction is ", reduction, "; 0 (none), 1 (mean) or 2 (sum) is needed");
  return static_cast<Reduction>(reduction);
}

inline void check_logits(const char* op, const Tensor& input) {
  if (input.dim() != 2) fail(op, ": input has shape ", shape_of(input), "; (rows, classes) is needed");
}

inline void check_targets(const char* op, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                          int64_t rows, int64_t classes) {
  check_device(op, "target", target, input);
  check_dtype(op, "target", target, ScalarType::Long);
  check_shape(op, "target", target, {rows});
  if (!weight.has_value()) return;
  check_device(op, "weight", *weight, input);
  check_shape(op, "weight", *weight, {classes});
}

inline void check_max_and_sum(const char* op, const Tensor& max_and_sum, const Tensor& input, int64_t rows) {
  check_device(op, "max_and_sum", max_and_sum, input);
  check_dtype(op, "max_and_sum", max_and_sum, compute_dtype(input.scalar_type()));
  check_shape(op, "max_and_sum", max_and_sum, {rows, 2});
  if (!max_and_sum.is_contiguous()) fail(op, ": max_and_sum must be contiguous");
}

// Checks the upstream gradient of the loss: contiguous (rows) without a reduction, otherwise one number, in the compute
// dtype.
inline Tensor upstream_grad(const char* op, const Tensor& grad, const Tensor& input, Reduction how, int64_t rows) {
  check_device(op, "grad", grad, input);
  check_dtype(op, "grad", grad, compute_dtype(input.scalar_type()));
  if (how == Reduction::none)
    check_shape(op, "grad", grad, {rows});
  else
    check_shape(op, "grad", grad, {});
  return as_contiguous(grad);
}

}  // namespace tinyllm
