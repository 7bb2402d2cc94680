// The argument checks of embedding that all devices share, which look at no values.
#pragma once
#include "tensors.h"

namespace tinyllm {

inline void check_ids(const char* op, const Tensor& input, const Tensor& like) {
  check_device(op, "input", input, like);
  const ScalarType dtype = input.scalar_type();
  if (dtype != ScalarType::Long && dtype != ScalarType::Int)
    fail(op, ": input has dtype ", torch::headeronly::toString(dtype), "; int64 or int32 is needed");
}

inline void check_table(const char* op, const Tensor& weight) {
  if (weight.dim() != 2) fail(op, ": weight has shape ", shape_of(weight), "; two dimensions are needed");
}

// Returns the length of the sequences that positions, (seq_len, D), are added to, or 1 without positions.
inline int64_t checked_seq_len(const char* op, const Tensor& input, const Tensor& weight,
                               const OptionalTensor& positions) {
  if (!positions.has_value()) return 1;
  if (input.dim() == 0) fail(op, ": input has no dimensions; with positions, its last one is the position");
  const int64_t seq_len = input.size(input.dim() - 1);
  check_device(op, "positions", *positions, weight);
  check_dtype(op, "positions", *positions, weight.scalar_type());
  check_shape(op, "positions", *positions, {seq_len, weight.size(1)});
  return seq_len;
}

inline void check_grad(const char* op, const Tensor& grad, const Tensor& input, bool positions_grad) {
  bool fits = grad.dim() == input.dim() + 1 && (!positions_grad || input.dim() > 0);
  for (int64_t i = 0; fits && i < input.dim(); ++i) fits = grad.size(i) == input.size(i);
  if (!fits) fail(op, ": grad has shape ", shape_of(grad), "; input's, ", shape_of(input), ", and one more is needed");
}

}  // namespace tinyllm
