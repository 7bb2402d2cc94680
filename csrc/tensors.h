// Helpers for tensors, shared by the torch side of the operators on all devices.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "checks.h"

namespace tinyllm {

using OptionalTensor = std::optional<Tensor>;

inline void* data_of(const Tensor& t) { return const_cast<void*>(t.const_data_ptr()); }
inline void* data_or_null(const OptionalTensor& t) { return t.has_value() ? data_of(*t) : nullptr; }

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Allocates an uninitialised tensor. torch::stable::new_empty goes through the boxed dispatcher, which takes as long as
// a small layer norm.
inline Tensor empty_strided(IntArray sizes, IntArray strides, ScalarType dtype, int32_t device_type,
                            int32_t device_index) {
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, device_index, &made));
  return Tensor(made);
}

// The strides of a contiguous tensor, until the next call in this thread: memory of their own would take as long to
// allocate as a small tensor's.
inline IntArray contiguous_strides(IntArray sizes) {
  thread_local std::vector<int64_t> strides;
  strides.resize(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= std::max<int64_t>(1, sizes[i]);
  }
  return strides;
}

}  // namespace tinyllm
