// Layer normalisation over the last dimension, with an optional residual added first.
//
// Memory is the limit: each row is read once into a buffer that stays in the first-level cache, where mean and variance
// are taken in two exact passes, and written once, while the next row is already on its way. Outputs larger than the
// caches are streamed past them, which saves reading each line before it is overwritten. Backward reads four rows once
// for the two sums that grad_input needs, and again, from the cache, to write grad_input and to add up the gradients of
// weight and bias.
#pragma once
#include <cmath>

#include "dispatch.h"
#include "simd.h"

namespace tinyllm::TINYLLM_ISA {

template <class S>
inline bool streamable(const void* data, int64_t size) {
  constexpr size_t bytes = sizeof(S) * Vec<S>::size;
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && size % Vec<S>::size == 0;
}

template <class T>
inline void write(Vec<compute_t<T>> x, T* p, int64_t n, bool stream) {
  if constexpr (std::is_same_v<T, compute_t<T>>) {
    if (stream) return x.stream(p);
  }
  store_n(x, p, n);
}

// Sums f(i, n) over a row in four independent chains.
template <class S, class F>
inline S sum_row(int64_t size, F&& f) {
  using V = Vec<S>;
  V s[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t i = 0;
  for (; i + 4 * V::size <= size; i += 4 * V::size)
    for (int j = 0; j < 4; ++j) s[j] = s[j] + f(i + j * V::size, V::size);
  for (; i < size; i += V::size) s[0] = s[0] + f(i, std::min<int64_t>(V::size, size - i));
  return ((s[0] + s[1]) + (s[2] + s[3])).sum();
}

// Zeroes the elements of x beyond n.
template <class V>
inline V keep(V x, int64_t n) {
  if (n == V::size) return x;
  decltype(x.sum()) buffer[V::size];
  x.store(buffer);
  return load_partial<V>(buffer, n);
}

template <class T>
void layer_norm_fwd(const cpu::LayerNormFwd& a, int64_t begin, int64_t end) {
  using S = compute_t<T>;
  using V = Vec<S>;
  // What is normalised is the sum as stored, so that backward sees the same numbers: 16-bit types round it first.
  constexpr bool exact = std::is_same_v<T, S>;
  const int64_t size = a.size;
  const S* weight = static_cast<const S*>(a.weight);
  const S* bias = static_cast<const S*>(a.bias);
  const bool stream = a.stream && streamable<S>(a.normed, size) && (a.sum == nullptr || streamable<S>(a.sum, size));
  const cpu::Scratch scratch(static_cast<size_t>(size + V::size) * sizeof(S));
  S* row = reinterpret_cast<S*>(scratch.data());
  for (int64_t r = begin; r < end; ++r) {
    const T* input = static_cast<const T*>(a.input) + r * size;
    T* sum = a.sum == nullptr ? nullptr : static_cast<T*>(a.sum) + r * size;
    S mean;
    if (a.residual != nullptr) {
      const T* residual = static_cast<const T*>(a.residual) + r * size;
      mean = sum_row<S>(size, [&](int64_t i, int64_t n) {
        V x = load_n<V>(input + i, n) + load_n<V>(residual + i, n);
        if constexpr (!exact) {
          store_n(x, sum + i, n);
          x = load_n<V>(sum + i, n);
        }
        x.store(row + i);
        return x;
      });
    } else {
      mean = sum_row<S>(size, [&](int64_t i, int64_t n) {
        const V x = load_n<V>(input + i, n);
        x.store(row + i);
        return x;
      });
    }
    mean = mean / static_cast<S>(size);
    const V vmean = V::set1(mean);
    const S variance = sum_row<S>(size, [&](int64_t i, int64_t n) {
      const V d = keep(V::load(row + i) - vmean, n);
      return d * d;
    });
    const S rstd = S(1) / std::sqrt(variance / static_cast<S>(size) + static_cast<S>(a.eps));
    const V vrstd = V::set1(rstd);
    T* normed = static_cast<T*>(a.normed) + r * size;
    // Both outputs are written here, and the next row is read meanwhile: memory is never idle one way or the other.
    const T* next = r + 1 < end ? input + size : input;
    const T* next_residual =
        a.residual == nullptr ? next : static_cast<const T*>(a.residual) + (next - static_cast<const T*>(a.input));
    for_each_vector<V>(size, [&](int64_t i, int64_t n) {
      __builtin_prefetch(next + i);
      __builtin_prefetch(next_residual + i);
      const V x = V::load(row + i);
      if constexpr (exact) {
        if (sum != nullptr) write<T>(x, sum + i, n, stream);
      }
      V y = (x - vmean) * vrstd;
      if (weight != nullptr) y = y * load_n<V>(weight + i, n);
      if (bias != nullptr) y = y + load_n<V>(bias + i, n);
      write<T>(y, normed + i, n, stream);
    });
    static_cast<S*>(a.mean)[r] = mean;
    static_cast<S*>(a.rstd)[r] = rstd;
  }
}

template <class T>
void layer_norm_bwd(const cpu::LayerNormBwd& a, int64_t begin, int64_t end, void* grads) {
  using S = compute_t<T>;
  using V = Vec<S>;
  constexpr int64_t kBlock = 4;  // rows whose share of the parameters' gradients is summed in registers
  const int64_t size = a.size;
  const S* weight = static_cast<const S*>(a.weight);
  S* grad_weight = static_cast<S*>(grads);
  S* grad_bias = grad_weight + (grads == nullptr ? 0 : size);
  const bool stream = a.stream && streamable<S>(a.grad_input, size);
  const auto weight_at = [&](int64_t i, int64_t n) {
    return weight == nullptr ? V::set1(S(1)) : load_n<V>(weight + i, n);
  };
  for (int64_t r0 = begin; r0 < end; r0 += kBlock) {
    const int64_t rows = std::min(kBlock, end - r0);
    const T* input = static_cast<const T*>(a.input) + r0 * size;
    const T* grad = static_cast<const T*>(a.grad_normed) + r0 * size;
    const T* grad_sum = a.grad_sum == nullptr ? nullptr : static_cast<const T*>(a.grad_sum) + r0 * size;
    T* grad_input = static_cast<T*>(a.grad_input) + r0 * size;
    V mean[kBlock], rstd[kBlock], mean_g[kBlock], mean_gx[kBlock];
    for (int64_t r = 0; r < rows; ++r) {
      mean[r] = V::set1(static_cast<const S*>(a.mean)[r0 + r]);
      rstd[r] = V::set1(static_cast<const S*>(a.rstd)[r0 + r]);
      V sum_g = V::zero(), sum_gx = V::zero();
      for_each_vector<V>(size, [&](int64_t i, int64_t n) {
        const V g = load_n<V>(grad + r * size + i, n) * weight_at(i, n);  // zeros beyond n keep the sums exact
        const V xhat = keep((load_n<V>(input + r * size + i, n) - mean[r]) * rstd[r], n);
        sum_g = sum_g + g;
        sum_gx = fma(g, xhat, sum_gx);
      });
      mean_g[r] = V::set1(sum_g.sum() / static_cast<S>(size));
      mean_gx[r] = V::set1(sum_gx.sum() / static_cast<S>(size));
    }
    for_each_vector<V>(size, [&](int64_t i, int64_t n) {
      const V w = weight_at(i, n);
      V sum_weight = V::zero(), sum_bias = V::zero();
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = r * size + i;
        if (r0 + kBlock + r < end) {  // the next block is on its way while this one is worked on in the cache
          __builtin_prefetch(grad + kBlock * size + at);
          __builtin_prefetch(input + kBlock * size + at);
        }
        const V dy = load_n<V>(grad + at, n);
        const V xhat = (load_n<V>(input + at, n) - mean[r]) * rstd[r];
        sum_weight = fma(dy, xhat, sum_weight);
        sum_bias = sum_bias + dy;
        V dx = (dy * w - mean_g[r] - xhat * mean_gx[r]) * rstd[r];
        if (grad_sum != nullptr) dx = dx + load_n<V>(grad_sum + at, n);
        write<T>(dx, grad_input + at, n, stream);
      }
      if (grads == nullptr) return;
      store_n(load_n<V>(grad_weight + i, n) + sum_weight, grad_weight + i, n);
      store_n(load_n<V>(grad_bias + i, n) + sum_bias, grad_bias + i, n);
    });
  }
}

}  // namespace tinyllm::TINYLLM_ISA
