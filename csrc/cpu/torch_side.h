// The torch side of the CPU operators: dtypes, new tensors, and work distributed over torch's threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "../tensors.h"
#include "dispatch.h"

namespace tinyllm::cpu {

inline DType dtype_of(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      fail(op, ": no kernel for dtype ", torch::headeronly::toString(t.scalar_type()));
  }
}

inline Activation parse_activation(const char* op, const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "silu") return Activation::silu;
  fail(op, ": activation is '", name, "'; none, relu, gelu, gelu_tanh or silu is needed");
}

// Calls f with a zero of the dtype's compute type.
template <class F>
auto with_compute_type(DType dtype, F&& f) {
  return dtype == DType::f64 ? f(double{}) : f(float{});
}

inline int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
inline int64_t compute_size(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

inline Tensor empty_strided(IntArray sizes, IntArray strides, ScalarType dtype) {
  return tinyllm::empty_strided(sizes, strides, dtype, aoti_torch_device_type_cpu(), 0);
}

inline Tensor empty(IntArray sizes, ScalarType dtype) { return empty_strided(sizes, contiguous_strides(sizes), dtype); }

inline Strided strided(const Tensor& t) {
  const auto strides = t.strides();
  return {data_of(t), strides[0], strides[1], strides[2], strides[3]};
}

// Allocates a (B, H, T, D) tensor whose memory is in the order (B, T, H, D), so that merging the heads is a view.
inline Tensor empty_heads(const Tensor& like, int64_t batch, int64_t heads, int64_t rows, int64_t columns) {
  const int64_t row = std::max<int64_t>(1, heads) * std::max<int64_t>(1, columns);
  const std::vector<int64_t> shape{batch, heads, rows, columns};
  const std::vector<int64_t> strides{std::max<int64_t>(1, rows) * row, std::max<int64_t>(1, columns), row, 1};
  return empty_strided(shape, strides, like.scalar_type());
}

// Calls f(i) for i in [0, items). Each item is taken by the next free thread, because items may differ in cost; results
// must not depend on which thread computes them.
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
