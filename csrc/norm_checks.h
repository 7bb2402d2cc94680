// The argument checks of layer_norm, add_layer_norm and rms_norm that all devices share.
#pragma once
#include <vector>

#include "tensors.h"

namespace tinyllm {

struct NormRows {
  int64_t count, size;
  std::vector<int64_t> leading;  // the dimensions that are not normalised over
};

inline NormRows split_rows(const char* op, const Tensor& input, const std::vector<int64_t>& normalized_shape) {
  const int64_t tail = static_cast<int64_t>(normalized_shape.size()), lead = input.dim() - tail;
  bool fits = tail > 0 && lead >= 0;
  for (int64_t i = 0; fits && i < tail; ++i) fits = input.size(lead + i) == normalized_shape[i];
  if (!fits) fail(op, ": the last dimensions of input, ", shape_of(input), ", must equal normalized_shape");
  NormRows rows{1, 1, {}};
  for (int64_t i = 0; i < lead; ++i) {
    rows.leading.push_back(input.size(i));
    rows.count *= input.size(i);
  }
  for (const int64_t size : normalized_shape) rows.size *= size;
  return rows;
}

// Checks a weight or bias.
inline void check_parameter(const char* op, const char* name, const Tensor& t, const Tensor& input, int64_t size) {
  check_device(op, name, t, input);
  if (t.numel() != size) fail(op, ": ", name, " has shape ", shape_of(t), "; it must have ", size, " elements");
}

// Checks a residual or a gradient.
inline void check_same(const char* op, const char* name, const Tensor& t, const Tensor& input) {
  check_device(op, name, t, input);
  check_dtype(op, name, t, input.scalar_type());
  bool same = t.dim() == input.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == input.size(i);
  if (!same) fail(op, ": ", name, " has shape ", shape_of(t), "; ", shape_of(input), " is needed");
}

// Checks a statistic of the rows that forward saved.
inline void check_statistic(const char* op, const char* name, const Tensor& t, const Tensor& input, int64_t rows) {
  check_device(op, name, t, input);
  check_dtype(op, name, t, compute_dtype(input.scalar_type()));
  if (t.numel() != rows || !t.is_contiguous())
    fail(op, ": ", name, " must be contiguous with one element for each row, ", rows);
}

}  // namespace tinyllm
