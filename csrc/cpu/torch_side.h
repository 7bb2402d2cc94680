// What the torch side of every CPU operator needs: dtypes, data pointers, and work handed out to torch's threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <vector>

#include "../tensors.h"
#include "dispatch.h"

namespace tinyllm::cpu {

inline int dtype_index(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return static_cast<int>(DType::f32);
    case ScalarType::Double:
      return static_cast<int>(DType::f64);
    case ScalarType::BFloat16:
      return static_cast<int>(DType::bf16);
    case ScalarType::Half:
      return static_cast<int>(DType::f16);
    default:
      fail(op, ": no kernel for dtype ", torch::headeronly::toString(t.scalar_type()));
  }
}

inline int64_t element_size(int dtype) {
  constexpr int64_t sizes[kNumDTypes] = {4, 8, 2, 2};
  return sizes[dtype];
}

inline Tensor empty_strided(IntArray sizes, IntArray strides, ScalarType dtype) {
  return tinyllm::empty_strided(sizes, strides, dtype, aoti_torch_device_type_cpu(), 0);
}

// The same, contiguous.
inline Tensor empty(IntArray sizes, ScalarType dtype) { return empty_strided(sizes, contiguous_strides(sizes), dtype); }

// f(i) for i in [0, items), each taken by the next free thread: items may differ in cost, and no result depends on who
// computed it.
template <class F>
inline void parallel_items(int64_t items, const F& f) {
  const int64_t threads = std::min<int64_t>(items, torch::stable::get_num_threads());
  if (threads <= 1) {
    for (int64_t i = 0; i < items; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t i = next++; i < items; i = next++) f(i);
  });
}

}  // namespace tinyllm::cpu
