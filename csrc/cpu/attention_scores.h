// Shared by the attention kernels: addressing of rows, the keys that a query may see, masks, and dropout.
//
// Scores are multiplied by log2(e), so that the softmax needs 2^x only: packed keys are scaled by scale * log2(e), and
// queries can be read where they are; only attention_decode_kernel.h, which reads keys in place, scales the queries.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>

#include "gemm.h"
#include "kernel_args.h"
#include "pack.h"
#include "random_kernel.h"
#include "scratch.h"
#include "vector_math.h"

namespace tinyllm::TINYLLM_ISA {

using cpu::Attention;
using cpu::first_query;
using cpu::keys_of;
using cpu::MaskKind;
using cpu::Strided;
using cpu::visible;

constexpr int64_t kQueryBlock = 64;
constexpr double kLog2e = 1.4426950408889634;

template <class T>
inline const T* row_of(const Strided& t, int64_t b, int64_t h, int64_t row) {
  return static_cast<const T*>(t.data) + b * t.batch + h * t.head + row * t.row;
}

// Prefetches rows of a head. A row has too few cache lines for the hardware prefetcher to recognise the stream.
template <class T, int Write = 0>
inline void prefetch_head_rows(const Strided& t, int64_t b, int64_t h, int64_t row, int64_t rows, int64_t columns,
                               int64_t end) {
  const int64_t bytes = columns * static_cast<int64_t>(sizeof(T));
  for (const int64_t last = std::min(row + rows, end); row < last; ++row) {
    const char* at = reinterpret_cast<const char*>(row_of<T>(t, b, h, row));
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, Write, 2);
  }
}

// Packs the keys [first, first + n), scaled, for scores = Q K^T.
template <class T>
inline void pack_keys(const Attention& a, int64_t b, int64_t kv_head, int64_t first, int64_t n, compute_t<T>* to) {
  using S = compute_t<T>;
  pack_b(row_of<T>(a.key, b, kv_head, first), a.key.row, a.key.column, n, a.head_dim, to,
         static_cast<S>(a.scale * kLog2e));
}

// Keys [begin, end) of a block, and whether the mask must be applied to their scores.
struct KeyRange {
  int64_t begin, end;
  bool masked;
};

// The index of the first visible key of n, or n. A byte of 0 hides its key; any other value shows it.
inline int64_t first_visible(const uint8_t* mask, int64_t n) {
  uint64_t word = 0;
  int64_t i = 0;
  while (i + 8 <= n && (std::memcpy(&word, mask + i, 8), word == 0)) i += 8;
  while (i < n && mask[i] == 0) ++i;
  return i;
}

// The index behind the last visible key of n, or 0.
inline int64_t last_visible(const uint8_t* mask, int64_t n) {
  uint64_t word = 0;
  while (n >= 8 && (std::memcpy(&word, mask + n - 8, 8), word == 0)) n -= 8;
  while (n > 0 && mask[n - 1] == 0) --n;
  return n;
}

// The range of keys of [first, first + count), relative to `first`, outside of which none of the queries
// [row, row + rows) sees a key. Keys that a bool mask hides from all these queries (padding, sliding windows, other
// documents) thus cost nothing. The range begins with a panel of packed keys.
template <class S>
inline KeyRange visible_key_range(const Attention& a, int64_t b, int64_t h, int64_t row, int64_t rows, int64_t first,
                                  int64_t count) {
  KeyRange keys{0, visible(a, b, row + rows - 1, first, count), a.mask_kind != MaskKind::none};
  if (a.mask_kind != MaskKind::boolean || a.mask.column != 1) return keys;
  const int64_t n = keys.end, distinct = a.mask.row == 0 ? 1 : rows;
  keys = {n, 0, false};
  for (int64_t r = row; r < row + distinct; ++r) {
    const uint8_t* mask = row_of<uint8_t>(a.mask, b, h, r) + first;
    keys.begin = first_visible(mask, keys.begin);
    keys.end = std::max(keys.end, last_visible(mask, n));
  }
  keys.begin = keys.begin / kNR<S> * kNR<S>;
  for (int64_t r = row; r < row + distinct && keys.begin < keys.end && !keys.masked; ++r) {
    const uint8_t* mask = row_of<uint8_t>(a.mask, b, h, r) + first + keys.begin;
    keys.masked = std::memchr(mask, 0, static_cast<size_t>(keys.end - keys.begin)) != nullptr;
  }
  return keys;
}

// Adds an element of an additive mask to a score. An element of -inf hides the key whatever its score is, and a finite
// one never does. The mask is clamped first, because the lowest finite number, a common mask value, overflows when it
// is multiplied by log2(e).
template <class S>
inline Vec<S> masked_score(Vec<S> mask, Vec<S> score) {
  using V = Vec<S>;
  constexpr S log2e = static_cast<S>(kLog2e), most = std::numeric_limits<S>::max() / log2e * S(0.999);
  const V bounded = max(V::set1(-most), min(V::set1(most), mask));
  return V::where_finite(mask, fma(bounded, V::set1(log2e), score), mask);
}

// Applies the mask to the scores of query `row` and the keys [first, first + n).
template <class T>
inline void apply_mask(const Attention& a, int64_t b, int64_t h, int64_t row, int64_t first, int64_t n,
                       compute_t<T>* scores) {
  using S = compute_t<T>;
  using V = Vec<S>;
  constexpr S inf = std::numeric_limits<S>::infinity();
  const int64_t step = a.mask.column, whole = step == 1 ? n / V::size * V::size : 0;
  if (a.mask_kind == MaskKind::boolean) {
    const uint8_t* mask = row_of<uint8_t>(a.mask, b, h, row) + first * step;
    for (int64_t j = 0; j < whole; j += V::size)
      V::where(mask + j, V::load(scores + j), V::set1(-inf)).store(scores + j);
    for (int64_t j = whole; j < n; ++j) scores[j] = mask[j * step] != 0 ? scores[j] : -inf;
  } else {
    const T* mask = row_of<T>(a.mask, b, h, row) + first * step;
    for (int64_t j = 0; j < whole; j += V::size) masked_score(V::load(mask + j), V::load(scores + j)).store(scores + j);
    for (int64_t j = whole; j < n; ++j) {
      S one[V::size] = {scores[j]};
      masked_score(V::set1(to_compute(mask[j * step])), V::load(one)).store(one);
      scores[j] = one[0];
    }
  }
}

// Sets the scores of a row behind the first n to -inf, up to a whole vector, and returns the end of that vector.
template <class S>
inline int64_t hide_rest(S* scores, int64_t n) {
  using V = Vec<S>;
  const int64_t inside = n % V::size;
  if (inside != 0) {
    S* last = scores + n - inside;
    V::first(V::load(last), inside, V::set1(-std::numeric_limits<S>::infinity())).store(last);
  }
  return round_up_to_vector<S>(n);
}

// Whether all n elements are finite.
template <class T>
inline bool all_finite(const T* x, int64_t n) {
  using V = Vec<compute_t<T>>;
  constexpr int64_t kStep = 4 * V::size;  // four independent sums hide the latency of the additions
  // 0 x is 0 for a finite x and NaN otherwise, and a sum stays NaN.
  V sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j] = fma(V::load(x + i + j * V::size), V::zero(), sum[j]);
  for_each_vector<V>(n - i,
                     [&](int64_t k, int64_t count) { sum[0] = fma(load_n<V>(x + i + k, count), V::zero(), sum[0]); });
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])).sum() == 0;
}

// out (+)= W X, with W (m, n) and X (n, columns), for an X that holds infinities or NaN. Unlike gemm, this skips rows
// of X whose weight is 0 because they are hidden; 0 times infinity would be NaN. It is not inlined, so that the usual
// path compiles as if it did not exist. Rows of `out` have room for whole vectors.
template <class T>
__attribute__((noinline, cold)) void weigh_rows(int64_t m, int64_t n, int64_t columns, const compute_t<T>* weights,
                                                int64_t weights_row, const T* x, int64_t x_row, compute_t<T>* out,
                                                int64_t out_row, bool accumulate) {
  using S = compute_t<T>;
  using V = Vec<S>;
  for (int64_t r = 0; r < m; ++r, weights += weights_row, out += out_row) {
    if (!accumulate) std::fill(out, out + round_up_to_vector<S>(columns), S(0));
    for (int64_t j = 0; j < n; ++j)
      if (weights[j] != S(0))
        for_each_vector<V>(columns, [&](int64_t d, int64_t count) {
          fma(V::set1(weights[j]), load_n<V>(x + j * x_row + d, count), V::load(out + d)).store(out + d);
        });
  }
}

// Saves lse = max + log2(sum) of n rows for backward, and its rounding error if that is wanted.
template <class S>
inline void store_log_sums(const Attention& a, int64_t b, int64_t h, int64_t row, int64_t n, const S* max,
                           const S* sum) {
  const int64_t index = (b * a.heads + h) * a.queries + row;
  S* const lse = static_cast<S*>(a.lse) + index;
  for (int64_t r = 0; r < n; ++r) lse[r] = max[r] + log2(sum[r]);  // without a branch, so that compilers vectorise it
  for (int64_t r = 0; r < n; ++r)
    if (sum[r] == S(0)) lse[r] = -std::numeric_limits<S>::infinity();
  if (a.lse_rest == nullptr) return;
  S* const rest = static_cast<S*>(a.lse_rest) + index;
  for (int64_t r = 0; r < n; ++r) rest[r] = sum[r] == S(0) ? S(0) : max[r] - lse[r] + log2(sum[r]);
}

// The size of a buffer for the dropout factors of n scores of a row.
inline int64_t factors_size(const Attention& a, int64_t n) { return a.dropout.p > 0 ? n + 2 * kRandomBlock : 0; }

// The dropout factors of query `row` for the keys [first, first + n).
template <class S>
inline const S* row_factors(const Attention& a, int64_t b, int64_t h, int64_t row, int64_t first, int64_t n,
                            S* factors) {
  const int64_t index = ((b * a.heads + h) * a.queries + row) * random_row(a.keys) + first;
  return dropout_factors(a.dropout, static_cast<uint64_t>(index), n, factors);
}

// x[i] *= factors[i] for i in [0, n), rounded up to whole vectors.
template <class S>
inline void multiply(S* x, const S* factors, int64_t n) {
  using V = Vec<S>;
  for (int64_t j = 0; j < n; j += V::size) (V::load(x + j) * V::load(factors + j)).store(x + j);
}

}  // namespace tinyllm::TINYLLM_ISA
