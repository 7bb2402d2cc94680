// The cross-entropy of a linear projection, logits = input weight^T + bias, without ever storing all logits.
//
// Gradients are computed in forward, one block of rows at a time (as in Liger Kernel, Hsu et al. 2024), so that there
// are three matmuls and nothing is computed twice. The logits of a block are kept transposed, (classes, rows): then the
// weight of the projection is the A that is read in place, a vector holds the softmax of several rows, and the logits
// of a class can be stored in the row of the gradient of the weight that belongs to this class.
//
//   logits       logits^T = weight input^T; for each range of classes, the maxima of the rows and the sums of the
//                exponentials, which replace the logits
//   loss         combines the statistics of the ranges, and finds the factor that turns the exponentials of a range
//                into a gradient
//   gradient     writes the gradient of the logits in their place; its sums are the gradient of the bias
//   grad_input   gradient weight, for a range of rows and of columns
//   grad_weight  gradient^T input. A group of classes is copied before its rows are written, because both may share
//                memory
//
// Memory bandwidth is the second limit: the operands of the next tile are prefetched while this one is computed.
#pragma once
#include <numeric>

#include "cross_entropy_kernel.h"
#include "pack.h"
#include "prefetch.h"
#include "scratch.h"

namespace tinyllm::TINYLLM_ISA {

using cpu::kClassRange;
using cpu::LinearCrossEntropy;

// The number of classes whose weights or gradients are packed together and then multiplied by each panel.
constexpr int64_t kClassGroup = 64;

// C (+)= A B for at most kMR x kNR elements. Unlike in gemm, rows of C need no room behind the n columns.
template <class S>
inline void tile_product(int64_t m, int64_t n, int64_t depth, OperandA<S> a, const S* panel, S* c, int64_t c_row,
                         bool accumulate) {
  using V = Vec<S>;
  if (n % V::size == 0) return gemm<S>(m, n, depth, a, panels<S>(panel, depth), c, c_row, accumulate);
  alignas(64) S tile[kMR * kNR<S>];
  gemm<S>(m, n, depth, a, panels<S>(panel, depth), tile, kNR<S>, false);
  for (int64_t r = 0; r < m; ++r)
    for_each_vector<V>(n, [&](int64_t i, int64_t count) {
      const V x = V::load(tile + r * kNR<S> + i);
      store_n(accumulate ? x + load_n<V>(c + r * c_row + i, count) : x, c + r * c_row + i, count);
    });
}

// The statistics of a range of classes for each row: its largest logit, the sum of exp(logit - largest), and the sum of
// w (logit - largest). The loss step replaces `max` by the factor of the exponentials.
template <class S>
struct RangeStatistics {
  S *max, *sum, *distances;

  RangeStatistics(const LinearCrossEntropy& a, int64_t range)
      : max(static_cast<S*>(a.statistics) + range * 3 * a.padded), sum(max + a.padded), distances(sum + a.padded) {}
};

// For each row of the block: the logit of its target, and what is subtracted from the gradient of the target and, with
// label smoothing, from that of every class.
template <class S>
struct BlockTerms {
  S *target_logit, *target_offset, *class_offset;

  explicit BlockTerms(const LinearCrossEntropy& a)
      : target_logit(static_cast<S*>(a.terms)),
        target_offset(target_logit + a.padded),
        class_offset(target_offset + a.padded) {}
};

inline int64_t range_end(const LinearCrossEntropy& a, int64_t range) {
  return std::min(a.row.classes, (range + 1) * kClassRange);
}

// Calls f(j, target) for the rows j of the block whose target is in [begin, end).
template <class F>
inline void for_each_target(const LinearCrossEntropy& a, int64_t begin, int64_t end, F&& f) {
  for (int64_t j = 0; j < a.count; ++j) {
    const int64_t target = a.row.target[a.first + j];
    if (target >= begin && target < end && target != a.row.ignore_index) f(j, target);
  }
}

// Computes the statistics of N vectors of rows from row j on, and replaces their logits by exponentials.
template <class S, int N>
inline void range_softmax(const LinearCrossEntropy& a, int64_t begin, int64_t end, S* logits, int64_t row, int64_t j,
                          const RangeStatistics<S>& out) {
  using V = Vec<S>;
  const S* bias = static_cast<const S*>(a.bias);
  const S* weight = static_cast<const S*>(a.row.weight);
  const auto logit = [&](int64_t c, int v) {
    const V x = V::load(logits + (c - begin) * row + j + v * V::size);
    return bias == nullptr ? x : x + V::set1(bias[c]);
  };
  V max_[N], sum[N], distances[N];
  // The lowest finite number takes the place of -inf: a range whose logits are all -inf must give exponentials of 0,
  // not NaN.
  for (int v = 0; v < N; ++v) max_[v] = V::set1(std::numeric_limits<S>::lowest());
  for (int64_t c = begin; c < end; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) max_[v] = max(logit(c, v), max_[v]);
  for (int v = 0; v < N; ++v) sum[v] = distances[v] = V::zero();
  for (int64_t c = begin; c < end; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      const V x = logit(c, v) - max_[v], e = softmax_exp(x);
      e.store(logits + (c - begin) * row + j + v * V::size);
      sum[v] = sum[v] + e;
      if (a.row.label_smoothing != 0.0)
        distances[v] = weight == nullptr ? distances[v] + x : fma(x, V::set1(weight[c]), distances[v]);
    }
  for (int v = 0; v < N; ++v) {
    max_[v].store(out.max + j + v * V::size);
    sum[v].store(out.sum + j + v * V::size);
    distances[v].store(out.distances + j + v * V::size);
  }
}

template <class T>
void linear_cross_entropy_logits(const LinearCrossEntropy& a, int64_t range) {
  using S = compute_t<T>;
  using V = Vec<S>;
  const int64_t begin = range * kClassRange, end = range_end(a, range), depth = a.features;
  const int64_t leading = leading_dimension<S>(depth);
  // The weight is read in place unless it has 16-bit elements or its rows would fall into a few sets of the cache.
  const bool copied = !std::is_same_v<T, S> || depth * int64_t{sizeof(T)} % 4096 == 0;
  cpu::Arena sizes;
  const auto layout = [&](cpu::Arena& arena) {
    S* group = arena.take<S>(copied ? kClassGroup * leading : 0);
    return std::pair(group, a.logits == nullptr ? arena.take<S>(kClassRange * a.padded) : nullptr);
  };
  layout(sizes);
  const cpu::Scratch scratch(sizes.used());
  cpu::Arena arena(scratch.data());
  const auto [group, own_logits] = layout(arena);
  const int64_t row = a.logits == nullptr ? a.padded : a.logits_row;
  S* logits = a.logits == nullptr ? own_logits : static_cast<S*>(a.logits) + begin * row;
  const T* weight = static_cast<const T*>(a.linear_weight);
  for (int64_t c0 = begin; c0 < end; c0 += kClassGroup) {
    const int64_t classes = std::min(kClassGroup, end - c0);
    const OperandA<S> a_weight = [&, group = group]() -> OperandA<S> {
      if constexpr (std::is_same_v<T, S>) {
        if (!copied) return {weight + c0 * depth, depth, 1};
      }
      pack_rows(weight + c0 * depth, depth, int64_t{1}, classes, depth, S(1), group, leading);
      return {group, leading, 1};
    }();
    const int64_t tiles = (classes + kMR - 1) / kMR * ((a.count + kNR<S> - 1) / kNR<S>);
    RangePrefetcher next(weight + (c0 + classes) * depth, classes * depth * int64_t{sizeof(T)}, tiles);
    for (int64_t j = 0; j < a.count; j += kNR<S>)
      for (int64_t c = 0; c < classes; c += kMR) {
        next.prefetch_share();
        gemm<S>(std::min<int64_t>(kMR, classes - c), std::min(kNR<S>, a.count - j), depth,
                {a_weight.data + c * a_weight.row, a_weight.row, 1},
                panels<S>(static_cast<const S*>(a.packed) + j * depth, depth), logits + (c0 - begin + c) * row + j, row,
                false);
      }
  }
  const S* bias = static_cast<const S*>(a.bias);
  const BlockTerms<S> terms(a);
  for_each_target(a, begin, end, [&](int64_t j, int64_t target) {
    terms.target_logit[j] = logits[(target - begin) * row + j] + (bias == nullptr ? S(0) : bias[target]);
  });
  const RangeStatistics<S> statistics(a, range);
  int64_t j = 0;
  for (; j + 4 * V::size <= a.count; j += 4 * V::size) range_softmax<S, 4>(a, begin, end, logits, row, j, statistics);
  for (; j < a.count; j += V::size) range_softmax<S, 1>(a, begin, end, logits, row, j, statistics);
}

// Processes rows [begin, end) of the block; begin is a multiple of the vector size.
template <class T>
void linear_cross_entropy_loss(const LinearCrossEntropy& a, int64_t begin, int64_t end) {
  using S = compute_t<T>;
  using V = Vec<S>;
  const int64_t ranges = (a.row.classes + kClassRange - 1) / kClassRange;
  const S* weight = static_cast<const S*>(a.row.weight);
  const BlockTerms<S> terms(a);
  S* loss = static_cast<S*>(a.row.loss) + a.first;
  const bool smooth = a.row.label_smoothing != 0.0;
  const cpu::Scratch scratch(smooth ? static_cast<size_t>(ranges) * sizeof(S) : 0);
  S* const range_weights = reinterpret_cast<S*>(scratch.data());
  for (int64_t r = 0; smooth && r < ranges; ++r) {
    const int64_t first = r * kClassRange, last = range_end(a, r);
    range_weights[r] =
        weight == nullptr ? static_cast<S>(last - first) : std::accumulate(weight + first, weight + last, S(0));
  }
  for (int64_t j0 = begin; j0 < end; j0 += V::size) {
    V vmax = V::set1(std::numeric_limits<S>::lowest()), vsum = V::zero(), vdistances = V::zero();
    for (int64_t r = 0; r < ranges; ++r) vmax = max(V::load(RangeStatistics<S>(a, r).max + j0), vmax);
    for (int64_t r = 0; r < ranges; ++r) {
      const RangeStatistics<S> statistics(a, r);
      const V below = V::load(statistics.max + j0) - vmax, factor = softmax_exp(below);
      vsum = fma(factor, V::load(statistics.sum + j0), vsum);
      factor.store(statistics.max + j0);
      if (!smooth) continue;
      vdistances = vdistances + fma(below, V::set1(range_weights[r]), V::load(statistics.distances + j0));
    }
    S max[V::size], sum[V::size], distances[V::size], factor[V::size] = {};
    vmax.store(max);
    vsum.store(sum);
    vdistances.store(distances);
    for (int64_t j = j0; j < j0 + V::size; ++j) {
      terms.target_offset[j] = terms.class_offset[j] = 0;
      if (j >= a.count) continue;
      loss[j] = 0;
      if (a.row.target[a.first + j] == a.row.ignore_index) continue;
      const TargetTerms t = terms_of<S>(a.row, a.first + j);
      const double log_sum = std::log(static_cast<double>(sum[j - j0]));
      const double at_target = static_cast<double>(terms.target_logit[j]) - static_cast<double>(max[j - j0]);
      double row_loss = t.hard * (log_sum - at_target);
      if (smooth) row_loss += t.uniform * (a.row.weight_sum * log_sum - static_cast<double>(distances[j - j0]));
      loss[j] = static_cast<S>(row_loss);
      factor[j - j0] = static_cast<S>(t.upstream * t.total / static_cast<double>(sum[j - j0]));
      terms.target_offset[j] = static_cast<S>(t.upstream * t.hard);
      terms.class_offset[j] = static_cast<S>(t.upstream * t.uniform);
    }
    for (int64_t r = 0; r < ranges; ++r) {
      S* at = RangeStatistics<S>(a, r).max + j0;
      (V::load(at) * V::load(factor)).store(at);
    }
  }
}

template <class T>
void linear_cross_entropy_gradient(const LinearCrossEntropy& a, int64_t range) {
  using S = compute_t<T>;
  using V = Vec<S>;
  const int64_t begin = range * kClassRange, end = range_end(a, range);
  const S* weight = static_cast<const S*>(a.row.weight);
  const S* factor = RangeStatistics<S>(a, range).max;
  const BlockTerms<S> terms(a);
  S* logits = static_cast<S*>(a.logits);
  for (int64_t c = begin; c < end; ++c) {
    const V w = V::set1(weight == nullptr ? S(-1) : -weight[c]);
    for (int64_t j = 0; j < a.count; j += V::size) {
      S* at = logits + c * a.logits_row + j;
      const V g = V::load(at) * V::load(factor + j);
      (a.row.label_smoothing == 0.0 ? g : fma(w, V::load(terms.class_offset + j), g)).store(at);
    }
  }
  for_each_target(a, begin, end,
                  [&](int64_t j, int64_t target) { logits[target * a.logits_row + j] -= terms.target_offset[j]; });
  if (a.grad_bias == nullptr) return;
  S* grad_bias = static_cast<S*>(a.grad_bias);
  for (int64_t c = begin; c < end; ++c) {
    V sum = V::zero();
    for_each_vector<V>(a.count, [&](int64_t j, int64_t n) { sum = sum + load_n<V>(logits + c * a.logits_row + j, n); });
    grad_bias[c] = a.accumulate ? grad_bias[c] + sum.sum() : sum.sum();
  }
}

// Computes rows [row_begin, row_end) of the block and columns [begin, end) of grad_input; begin is a multiple of kNR.
template <class T>
void linear_cross_entropy_grad_input(const LinearCrossEntropy& a, int64_t row_begin, int64_t row_end, int64_t begin,
                                     int64_t end) {
  using S = compute_t<T>;
  using V = Vec<S>;
  const int64_t columns = end - begin, padded = (columns + kNR<S> - 1) / kNR<S> * kNR<S>;
  const cpu::Scratch scratch(static_cast<size_t>(kKC * (padded + kMR)) * sizeof(S));
  S* weights = reinterpret_cast<S*>(scratch.data());
  S* group = weights + kKC * padded;
  const T* weight = static_cast<const T*>(a.linear_weight) + begin;
  S* out = static_cast<S*>(a.grad_input) + a.first * a.features + begin;
  const int64_t last_groups = row_end - 8 * kMR;
  for (int64_t k0 = 0; k0 < a.row.classes; k0 += kKC) {
    const int64_t depth = std::min(kKC, a.row.classes - k0);
    for (int64_t k = 0; k < depth; ++k) {
      const T* from = weight + (k0 + k) * a.features;
      for_each_vector<V>(columns, [&](int64_t i, int64_t n) {
        load_n<V>(from + i, n).store(weights + i / kNR<S> * kNR<S> * depth + k * kNR<S> + i % kNR<S>);
      });
    }
    // The next rows of the weight are prefetched with the last groups only; earlier, they would be evicted again.
    int64_t next = k0 + depth;
    const int64_t next_end = std::min(a.row.classes, next + kKC), share = kKC / 8 / (padded / kNR<S>)+1;
    for (int64_t j = row_begin; j < row_end; j += kMR) {
      const int64_t m = std::min<int64_t>(kMR, row_end - j);
      const S* gradient = static_cast<const S*>(a.logits) + k0 * a.logits_row + j;
      for (int64_t k = 0; k < depth; ++k, gradient += a.logits_row) {
        __builtin_prefetch(gradient + 2 * kMR);
        if (m == kMR)
          std::memcpy(group + k * kMR, gradient, sizeof(S) * kMR);
        else
          for (int64_t i = 0; i < m; ++i) group[k * kMR + i] = gradient[i];
      }
      for (int64_t c = 0; c < columns; c += kNR<S>) {
        if (j >= last_groups)
          for (int64_t k = 0; k < share && next < next_end; ++k, ++next)
            for (int64_t i = 0; i < columns; i += 64 / int64_t{sizeof(T)})
              __builtin_prefetch(weight + next * a.features + i);
        tile_product<S>(m, std::min(kNR<S>, columns - c), depth, {group, 1, kMR}, weights + c * depth,
                        out + j * a.features + c, a.features, k0 > 0);
      }
    }
  }
}

template <class T>
void linear_cross_entropy_grad_weight(const LinearCrossEntropy& a, int64_t range) {
  using S = compute_t<T>;
  const int64_t begin = range * kClassRange, end = range_end(a, range), columns = a.features;
  const int64_t leading = leading_dimension<S>(a.count);
  const cpu::Scratch scratch(static_cast<size_t>(kClassGroup * leading) * sizeof(S));
  S* group = reinterpret_cast<S*>(scratch.data());
  S* out = static_cast<S*>(a.grad_weight);
  for (int64_t c0 = begin; c0 < end; c0 += kClassGroup) {
    const int64_t classes = std::min(kClassGroup, end - c0);
    pack_rows(static_cast<const S*>(a.logits) + c0 * a.logits_row, a.logits_row, int64_t{1}, classes, a.count, S(1),
              group, leading);
    const int64_t tiles = (classes + kMR - 1) / kMR * ((columns + kNR<S> - 1) / kNR<S>);
    RangePrefetcher next(out + (c0 + classes) * columns, classes * columns * int64_t{sizeof(S)}, tiles);
    for (int64_t column = 0; column < columns; column += kNR<S>)
      for (int64_t c = 0; c < classes; c += kMR) {
        next.prefetch_share();
        tile_product<S>(std::min<int64_t>(kMR, classes - c), std::min(kNR<S>, columns - column), a.count,
                        {group + c * leading, leading, 1}, static_cast<const S*>(a.packed) + column * a.count,
                        out + (c0 + c) * columns + column, columns, a.accumulate);
      }
  }
}

}  // namespace tinyllm::TINYLLM_ISA
