// Layer normalisation over the last dimension, with an optional residual added first, and without mean and bias
// (kCentered is false) root mean square normalisation.
//
// Memory bandwidth is the limit. Each row is read once, stays in the first-level cache while mean and variance are
// computed in two exact passes, and is written once while the next rows are prefetched. Outputs larger than the caches
// are written by streaming stores, which saves reading each line before it is overwritten. Backward reads a block of
// rows once for the two sums that grad_input needs, and again, from the cache, to write grad_input and to accumulate
// the gradients of weight and bias.
#pragma once
#include <cmath>

#include "kernel_args.h"
#include "scratch.h"
#include "simd.h"

namespace tinyllm::TINYLLM_ISA {

template <class T>
inline bool streamable(const void* data, int64_t size) {
  constexpr int64_t lanes = Vec<compute_t<T>>::size;
  return reinterpret_cast<uintptr_t>(data) % (sizeof(T) * lanes) == 0 && size % lanes == 0;
}

template <class T>
inline void write(Vec<compute_t<T>> x, T* p, int64_t n, bool stream) {
  stream ? x.stream(p) : store_n(x, p, n);
}

// Zeroes the elements of x behind the first n.
template <class V>
inline V keep(V x, int64_t n) {
  if (n == V::size) return x;
  decltype(x.sum()) buffer[V::size];
  x.store(buffer);
  return load_partial<V>(buffer, n);
}

template <class V>
struct Pair {
  V first, second;
};

// Computes two sums over a row in four independent chains: f(i, n, pair) adds the elements [i, i + n) to a pair.
template <class V, class F>
inline Pair<V> sum_row(int64_t size, F&& f) {
  Pair<V> s[4] = {};
  int64_t i = 0;
  for (; i + 4 * V::size <= size; i += 4 * V::size)
    for (int j = 0; j < 4; ++j) f(i + j * V::size, int64_t{V::size}, s[j]);
  for (; i + V::size <= size; i += V::size) f(i, int64_t{V::size}, s[0]);
  if (i < size) f(i, size - i, s[0]);
  return {(s[0].first + s[1].first) + (s[2].first + s[3].first),
          (s[0].second + s[1].second) + (s[2].second + s[3].second)};
}

template <class T, bool kCentered, bool kAdd>
TINYLLM_FLATTEN void norm_fwd(const cpu::LayerNormFwd& a, int64_t begin, int64_t end) {
  using S = compute_t<T>;
  using V = Vec<S>;
  const int64_t size = a.size;
  const S* weight = static_cast<const S*>(a.weight);
  const S* bias = static_cast<const S*>(a.bias);
  const bool stream = a.stream && streamable<T>(a.normed, size) && (!kAdd || streamable<T>(a.sum, size));
  const cpu::Scratch scratch(kAdd ? static_cast<size_t>(size + V::size) * sizeof(S) : 0);
  S* const sums = reinterpret_cast<S*>(scratch.data());
  for (int64_t r = begin; r < end; ++r) {
    const T* input = static_cast<const T*>(a.input) + r * size;
    const T* residual = kAdd ? static_cast<const T*>(a.residual) + r * size : nullptr;
    const auto x_at = [&](int64_t i, int64_t n) {
      if constexpr (kAdd)
        return V::load(sums + i);
      else
        return load_n<V>(input + i, n);
    };
    V mean = V::zero();
    if constexpr (kCentered || kAdd) {
      const V total = sum_row<V>(size, [&](int64_t i, int64_t n, Pair<V>& s) {
                        if constexpr (kAdd) {
                          V x = load_n<V>(input + i, n) + load_n<V>(residual + i, n);
                          // The sum is normalised as it is stored, so that backward sees the same numbers.
                          if constexpr (!std::is_same_v<T, S>) x = rounded<T>(x);
                          x.store(sums + i);
                        }
                        s.first = s.first + x_at(i, n);
                      }).first;
      if constexpr (kCentered) {
        const S m = total.sum() / static_cast<S>(size);
        static_cast<S*>(a.mean)[r] = m;
        mean = V::set1(m);
      }
    }
    const V squares = sum_row<V>(size, [&](int64_t i, int64_t n, Pair<V>& s) {
                        const V d = kCentered ? keep(x_at(i, n) - mean, n) : x_at(i, n);
                        s.first = fma(d, d, s.first);
                      }).first;
    const S scale = S(1) / std::sqrt(squares.sum() / static_cast<S>(size) + static_cast<S>(a.eps));
    static_cast<S*>(a.rstd)[r] = scale;
    const V rstd = V::set1(scale);
    T* normed = static_cast<T*>(a.normed) + r * size;
    T* sum = kAdd ? static_cast<T*>(a.sum) + r * size : nullptr;
    // All outputs are written in this pass, while row r + 2 is prefetched, so that reads and writes of memory overlap.
    const int64_t next = r + 2 < end ? 2 * size : 0;
    for_each_vector<V>(size, [&](int64_t i, int64_t n) {
      __builtin_prefetch(input + next + i, 0, 2);
      if constexpr (kAdd) __builtin_prefetch(residual + next + i, 0, 2);
      const V x = x_at(i, n);
      if constexpr (kAdd) write<T>(x, sum + i, n, stream);
      V y = kCentered ? (x - mean) * rstd : x * rstd;
      if (weight != nullptr) y = y * load_n<V>(weight + i, n);
      if (bias != nullptr) y = y + load_n<V>(bias + i, n);
      write<T>(y, normed + i, n, stream);
    });
  }
  if (stream) end_of_stream();
}

// Processes R rows from r0 on; rows up to `end` follow. `grads` has the gradient of the weight and, if kCentered,
// behind it that of the bias.
template <class T, bool kCentered, int R>
TINYLLM_FLATTEN void norm_bwd_block(const cpu::LayerNormBwd& a, int64_t r0, int64_t end, compute_t<T>* grads,
                                    bool stream) {
  using S = compute_t<T>;
  using V = Vec<S>;
  const int64_t size = a.size;
  const S* weight = static_cast<const S*>(a.weight);
  const T* input = static_cast<const T*>(a.input) + r0 * size;
  const T* grad = static_cast<const T*>(a.grad_normed) + r0 * size;
  const T* grad_sum = a.grad_sum == nullptr ? nullptr : static_cast<const T*>(a.grad_sum) + r0 * size;
  T* grad_input = static_cast<T*>(a.grad_input) + r0 * size;
  const auto weight_at = [&](int64_t i, int64_t n) {
    return weight == nullptr ? V::set1(S(1)) : load_n<V>(weight + i, n);
  };
  V mean[R], rstd[R], mean_g[R], mean_gx[R];
  const auto xhat_at = [&](int r, int64_t i, int64_t n) {
    const V x = load_n<V>(input + r * size + i, n);
    return kCentered ? (x - mean[r]) * rstd[r] : x * rstd[r];
  };
  Pair<V> sums[R];
  for (int r = 0; r < R; ++r) {
    mean[r] = kCentered ? V::set1(static_cast<const S*>(a.mean)[r0 + r]) : V::zero();
    rstd[r] = V::set1(static_cast<const S*>(a.rstd)[r0 + r]);
    sums[r] = sum_row<V>(size, [&](int64_t i, int64_t n, Pair<V>& s) {
      const V g = load_n<V>(grad + r * size + i, n) * weight_at(i, n);  // zeros behind the first n keep the sums exact
      if constexpr (kCentered) s.first = s.first + g;
      s.second = fma(g, keep(xhat_at(r, i, n), n), s.second);
    });
  }
  for (int r = 0; r < R; ++r) {
    if constexpr (kCentered) mean_g[r] = V::set1(sums[r].first.sum() / static_cast<S>(size));
    mean_gx[r] = V::set1(sums[r].second.sum() / static_cast<S>(size));
  }
  const bool more = r0 + 3 * R <= end;  // prefetch the block after the next one
  for_each_vector<V>(size, [&](int64_t i, int64_t n) {
    const V w = weight_at(i, n);
    V sum_weight = V::zero(), sum_bias = V::zero();
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * size + i;
      if (more) {
        __builtin_prefetch(grad + 2 * R * size + at, 0, 2);
        __builtin_prefetch(input + 2 * R * size + at, 0, 2);
        if (grad_sum != nullptr) __builtin_prefetch(grad_sum + 2 * R * size + at, 0, 2);
      }
      const V dy = load_n<V>(grad + at, n), xhat = xhat_at(r, i, n);
      sum_weight = fma(dy, xhat, sum_weight);
      sum_bias = sum_bias + dy;
      V dx = dy * w;
      if constexpr (kCentered) dx = dx - mean_g[r];
      dx = (dx - xhat * mean_gx[r]) * rstd[r];
      if (grad_sum != nullptr) dx = dx + load_n<V>(grad_sum + at, n);
      write<T>(dx, grad_input + at, n, stream);
    }
    if (grads == nullptr) return;
    store_n(load_n<V>(grads + i, n) + sum_weight, grads + i, n);
    if constexpr (kCentered) store_n(load_n<V>(grads + size + i, n) + sum_bias, grads + size + i, n);
  });
}

template <class T, bool kCentered>
void norm_bwd(const cpu::LayerNormBwd& a, int64_t begin, int64_t end, void* grads) {
  using S = compute_t<T>;
  S* const sums = static_cast<S*>(grads);
  const bool stream = a.stream && streamable<T>(a.grad_input, a.size);
  // A block has four short rows or two longer ones, whose inputs fit the first-level cache together.
  int64_t r = begin;
  if (a.size * static_cast<int64_t>(sizeof(T)) <= 2048)
    for (; r + 4 <= end; r += 4) norm_bwd_block<T, kCentered, 4>(a, r, end, sums, stream);
  for (; r + 2 <= end; r += 2) norm_bwd_block<T, kCentered, 2>(a, r, end, sums, stream);
  for (; r < end; ++r) norm_bwd_block<T, kCentered, 1>(a, r, end, sums, stream);
  if (stream) end_of_stream();
}

template <class T>
void layer_norm_fwd(const cpu::LayerNormFwd& a, int64_t begin, int64_t end) {
  a.residual == nullptr ? norm_fwd<T, true, false>(a, begin, end) : norm_fwd<T, true, true>(a, begin, end);
}

template <class T>
void layer_norm_bwd(const cpu::LayerNormBwd& a, int64_t begin, int64_t end, void* grads) {
  norm_bwd<T, true>(a, begin, end, grads);
}

template <class T>
void rms_norm_fwd(const cpu::LayerNormFwd& a, int64_t begin, int64_t end) {
  a.residual == nullptr ? norm_fwd<T, false, false>(a, begin, end) : norm_fwd<T, false, true>(a, begin, end);
}

template <class T>
void rms_norm_bwd(const cpu::LayerNormBwd& a, int64_t begin, int64_t end, void* grads) {
  norm_bwd<T, false>(a, begin, end, grads);
}

}  // namespace tinyllm::TINYLLM_ISA
