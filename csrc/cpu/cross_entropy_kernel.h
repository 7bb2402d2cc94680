// Cross-entropy over rows of logits.
//
// Memory bandwidth is the limit, so a row of logits is read from memory once. It then stays in the second-level cache
// for a pass that finds the maximum, a pass that sums exp(x - max) while the next row is prefetched, and, if a gradient
// is wanted, a pass that writes it. Loss and gradient together cost one read and one write of the logits. (To keep the
// exponentials for the third pass would take longer than to compute them again.) Gradients larger than the caches are
// written past them. Backward, for an upstream gradient that forward could not know, is the third pass alone.
//
// With p = softmax(x), the target t, the class weights w (ones by default), the label smoothing s and C classes
//
//   loss       = (1 - s) w_t (lse - x_t) + s / C sum_c w_c (lse - x_c)
//   dloss/dx_c = ((1 - s) w_t + s / C sum w) p_c - s / C w_c - (c == t) (1 - s) w_t
//
// Maximum and sum are kept apart: in max + log(sum), a single number, a loss that is small beside large logits would
// lose its digits.
#pragma once
#include <cmath>
#include <limits>

#include "kernel_args.h"
#include "vector_math.h"

namespace tinyllm::TINYLLM_ISA {

using cpu::CrossEntropy;

// Loads n elements, followed by `padding`.
template <class V, class T>
inline V load_padded(const T* p, int64_t n, compute_t<T> padding) {
  if (n == V::size) return V::load(p);
  compute_t<T> buffer[V::size];
  for (int64_t i = 0; i < V::size; ++i) buffer[i] = i < n ? to_compute(p[i]) : padding;
  return V::load(buffer);
}

// Calls f(j, i, n) for each vector of a row with j in [0, 4) in turn, for sums in four chains that hide each other's
// latency.
template <class V, class F>
inline void for_each_of_four(int64_t size, F&& f) {
  int64_t i = 0;
  for (; i + 4 * V::size <= size; i += 4 * V::size)
    for (int j = 0; j < 4; ++j) f(j, i + j * V::size, static_cast<int64_t>(V::size));
  for (; i < size; i += V::size) f(0, i, std::min<int64_t>(V::size, size - i));
}

template <class T>
inline compute_t<T> row_max(const T* x, int64_t size) {
  using S = compute_t<T>;
  using V = Vec<S>;
  constexpr S inf = std::numeric_limits<S>::infinity();
  V m[4] = {V::set1(-inf), V::set1(-inf), V::set1(-inf), V::set1(-inf)};
  for_each_of_four<V>(size, [&](int j, int64_t i, int64_t n) { m[j] = max(m[j], load_padded<V>(x + i, n, -inf)); });
  return max(max(m[0], m[1]), max(m[2], m[3])).max_element();
}

// e^x for x <= 0. The rounding error of x log2(e) grows with |x|, but e^x shrinks by more, relative to the largest
// term, 1.
template <class S>
inline Vec<S> softmax_exp(Vec<S> x) {
  return exp2(x * Vec<S>::set1(static_cast<S>(1.4426950408889634)));
}

// sum exp(x - max)
template <class T>
inline compute_t<T> sum_exps(const T* x, int64_t size, compute_t<T> max) {
  using S = compute_t<T>;
  using V = Vec<S>;
  const V vmax = V::set1(max);
  V s[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  for_each_of_four<V>(size, [&](int j, int64_t i, int64_t n) {
    __builtin_prefetch(x + size +
                       i / 2);  // the first half of the next row; the pass of the gradient prefetches the second
    s[j] = s[j] + softmax_exp(load_padded<V>(x + i, n, -std::numeric_limits<S>::infinity()) - vmax);
  });
  return ((s[0] + s[1]) + (s[2] + s[3])).sum();
}

// sum_c w_c (x_c - max)
template <class T>
inline compute_t<T> sum_distances(const T* x, int64_t size, compute_t<T> max, const compute_t<T>* weight) {
  using V = Vec<compute_t<T>>;
  const V vmax = V::set1(max);
  V s[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  for_each_of_four<V>(size, [&](int j, int64_t i, int64_t n) {
    const V d = load_padded<V>(x + i, n, max) - vmax;
    s[j] = weight == nullptr ? s[j] + d : fma(d, load_n<V>(weight + i, n), s[j]);
  });
  return ((s[0] + s[1]) + (s[2] + s[3])).sum();
}

// The coefficients of the loss and the gradient of a row, which depend on its target.
struct TargetTerms {
  double hard;      // (1 - s) w_t
  double uniform;   // s / C
  double total;     // hard + s / C sum w, the coefficient of p
  double upstream;  // the upstream gradient of the loss of the row
};

template <class S>
inline TargetTerms terms_of(const CrossEntropy& a, int64_t row) {
  const S* weight = static_cast<const S*>(a.weight);
  const double hard =
      (1.0 - a.label_smoothing) * (weight == nullptr ? 1.0 : static_cast<double>(weight[a.target[row]]));
  const double uniform = a.label_smoothing / static_cast<double>(a.classes);
  const double upstream =
      a.grad == nullptr ? 1.0 : static_cast<double>(static_cast<const S*>(a.grad)[row * a.grad_step]);
  return {hard, uniform, a.label_smoothing == 0.0 ? hard : hard + uniform * a.weight_sum, a.scale * upstream};
}

// Writes a row of vectors f(i, n); if `stream`, whole aligned vectors are written past the caches.
template <class T, class F>
inline void write_row(T* out, int64_t size, bool stream, F&& f) {
  using S = compute_t<T>;
  using V = Vec<S>;
  int64_t i = 0;
  if constexpr (std::is_same_v<T, S>) {
    if (stream) {
      constexpr uintptr_t kBytes = sizeof(S) * V::size;
      const int64_t head =
          static_cast<int64_t>((kBytes - reinterpret_cast<uintptr_t>(out) % kBytes) % kBytes / sizeof(S));
      if (head > 0 && head < size) {
        store_partial(f(int64_t{0}, head), out, head);
        i = head;
      }
      if (head < size)
        for (; i + V::size <= size; i += V::size) f(i, static_cast<int64_t>(V::size)).stream(out + i);
    }
  }
  for (; i + V::size <= size; i += V::size) f(i, static_cast<int64_t>(V::size)).store(out + i);
  if (i < size) store_partial(f(i, size - i), out + i, size - i);
}

// Writes grad_input of row r.
template <class T>
TINYLLM_FLATTEN inline void write_gradient(const CrossEntropy& a, int64_t r, compute_t<T> max, compute_t<T> sum) {
  using S = compute_t<T>;
  using V = Vec<S>;
  const int64_t target = a.target[r], size = a.classes;
  const T* x = static_cast<const T*>(a.input) + r * size;
  T* out = static_cast<T*>(a.grad_input) + r * size;
  if (target == a.ignore_index) return write_row(out, size, a.stream, [](int64_t, int64_t) { return V::zero(); });
  const S* weight = static_cast<const S*>(a.weight);
  const TargetTerms terms = terms_of<S>(a, r);
  const double factor = terms.upstream * terms.total / static_cast<double>(sum);
  const double shift = terms.upstream * terms.uniform;
  const V vmax = V::set1(max), vfactor = V::set1(static_cast<S>(factor)), vshift = V::set1(static_cast<S>(-shift));
  const auto softmax = [&](int64_t i, int64_t n) {
    __builtin_prefetch(x + size + (size + i) / 2);
    return softmax_exp(load_n<V>(x + i, n) - vmax) * vfactor;
  };
  double smooth = 0.0;
  if (a.label_smoothing == 0.0) {
    write_row(out, size, a.stream, softmax);
  } else if (weight == nullptr) {
    write_row(out, size, a.stream, [&](int64_t i, int64_t n) { return softmax(i, n) + vshift; });
    smooth = shift;
  } else {
    write_row(out, size, a.stream,
              [&](int64_t i, int64_t n) { return fma(load_n<V>(weight + i, n), vshift, softmax(i, n)); });
    smooth = shift * static_cast<double>(weight[target]);
  }
  const double e = std::exp(static_cast<double>(to_compute(x[target])) - static_cast<double>(max));
  from_compute(static_cast<S>(e * factor - smooth - terms.upstream * terms.hard), out[target]);
}

template <class T>
void cross_entropy_fwd(const CrossEntropy& a, int64_t begin, int64_t end) {
  using S = compute_t<T>;
  const int64_t size = a.classes;
  S* loss = static_cast<S*>(a.loss);
  S* statistics = static_cast<S*>(a.max_and_sum);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(a.input) + r * size;
    S max = 0, sum = 1;
    loss[r] = 0;
    if (a.target[r] != a.ignore_index) {
      max = row_max(x, size);
      sum = sum_exps(x, size, max);
      const TargetTerms terms = terms_of<S>(a, r);
      const double log_sum = std::log(static_cast<double>(sum));
      const double at_target = static_cast<double>(to_compute(x[a.target[r]])) - static_cast<double>(max);
      double row_loss = terms.hard * (log_sum - at_target);
      if (a.label_smoothing != 0.0) {
        const double distances = sum_distances(x, size, max, static_cast<const S*>(a.weight));
        row_loss += terms.uniform * (a.weight_sum * log_sum - distances);
      }
      loss[r] = static_cast<S>(row_loss);
    }
    statistics[2 * r] = max;
    statistics[2 * r + 1] = sum;
    if (a.grad_input != nullptr) write_gradient<T>(a, r, max, sum);
  }
  if (a.stream) end_of_stream();
}

template <class T>
void cross_entropy_bwd(const CrossEntropy& a, int64_t begin, int64_t end) {
  const compute_t<T>* statistics = static_cast<const compute_t<T>*>(a.max_and_sum);
  for (int64_t r = begin; r < end; ++r) write_gradient<T>(a, r, statistics[2 * r], statistics[2 * r + 1]);
  if (a.stream) end_of_stream();
}

}  // namespace tinyllm::TINYLLM_ISA
