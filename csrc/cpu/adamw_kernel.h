// AdamW (Loshchilov and Hutter 2019), and the sum of squares from which the norm for clipping is made.
//
// Memory bandwidth is the limit. A step reads parameter, gradient and both moments once and writes all but the gradient
// once: clipping, which in PyTorch reads and writes every gradient in a pass of its own, is a multiplication here.
#pragma once
#include "kernel_args.h"
#include "simd.h"

namespace tinyllm::TINYLLM_ISA {

template <class T>
double sum_of_squares(const void* data, int64_t begin, int64_t end) {
  using S = compute_t<T>;
  using V = Vec<S>;
  constexpr int64_t kChains = 8;  // independent sums, so that an addition need not wait for the one before
  const T* x = static_cast<const T*>(data) + begin;
  const int64_t size = end - begin;
  V sum[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * V::size <= size; i += kChains * V::size)
    for (int64_t j = 0; j < kChains; ++j) {
      const V v = V::load(x + i + j * V::size);
      sum[j] = fma(v, v, sum[j]);
    }
  for_each_vector<V>(size - i, [&](int64_t k, int64_t n) {
    const V v = load_n<V>(x + i + k, n);
    sum[0] = fma(v, v, sum[0]);
  });
  double total = 0;
  for (const V& s : sum) total += static_cast<double>(s.sum());
  return total;
}

template <class T>
void adamw_step(const cpu::AdamW& a, int64_t begin, int64_t end) {
  using S = compute_t<T>;
  using V = Vec<S>;
  T* const parameter = static_cast<T*>(a.parameter) + begin;
  const T* const grad = static_cast<const T*>(a.grad) + begin;
  T* const exp_avg = static_cast<T*>(a.exp_avg) + begin;
  T* const exp_avg_sq = static_cast<T*>(a.exp_avg_sq) + begin;
  const auto all = [](double x) { return V::set1(static_cast<S>(x)); };
  const V clip_coef = all(a.clip_coef), keep = all(a.keep), eps = all(a.eps), beta2 = all(a.beta2);
  const V rest1 = all(1 - a.beta1), rest2 = all(1 - a.beta2);
  const V step_size = all(-a.step_size), denominator_scale = all(a.denominator_scale);
  for_each_vector<V>(end - begin, [&](int64_t i, int64_t n) {
    const V g = clip_coef * load_n<V>(grad + i, n);
    V m = load_n<V>(exp_avg + i, n), v = load_n<V>(exp_avg_sq + i, n);
    m = fma(rest1, g - m, m);
    v = fma(beta2, v, rest2 * g * g);
    store_n(m, exp_avg + i, n);
    store_n(v, exp_avg_sq + i, n);
    const V update = m / fma(v.sqrt(), denominator_scale, eps);
    store_n(fma(step_size, update, keep * load_n<V>(parameter + i, n)), parameter + i, n);
  });
}

}  // namespace tinyllm::TINYLLM_ISA
