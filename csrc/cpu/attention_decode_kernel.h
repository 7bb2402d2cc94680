// The forward pass of attention for few queries, such as the single one of a token being generated (Dao et al. 2023,
// "Flash-Decoding"). Each key and value is read once and used hardly more often, so packing them would not pay: the
// time is that of reading memory. To keep all threads busy, the keys are split into ranges. Each range writes its
// unnormalised output, its maximum and its sum, and a second step combines the ranges in order. The split depends on
// the number of keys alone, so the result does not depend on the number of threads.
//
// The rows of a task are all queries of all heads that share a key/value head.
#pragma once
#include "attention_scores.h"

namespace tinyllm::TINYLLM_ISA {

// The distance at which keys and values are prefetched.
constexpr int64_t kPrefetchBytes = 32768;

template <class T>
struct DecodeBuffers {
  using S = compute_t<T>;
  S *queries, *scores, *factors;
  int64_t query_row, score_row;

  size_t layout(char* base, const Attention& a, int64_t rows) {
    cpu::Arena arena(base);
    query_row = round_up_to_vector<S>(a.head_dim);
    score_row = round_up_to_vector<S>(a.range_keys);
    queries = arena.take<S>(rows * query_row);
    scores = arena.take<S>(rows * score_row);
    factors = arena.take<S>(factors_size(a, score_row));
    return arena.used();
  }
};

// The partial result of a range for one row: the unnormalised output, then the maximum and the sum.
template <class S>
inline S* decode_partial(const Attention& a, int64_t b, int64_t kv_head, int64_t range, int64_t row) {
  const int64_t rows = a.heads / a.kv_heads * a.queries;
  return static_cast<S*>(a.partials) + (((b * a.kv_heads + kv_head) * a.ranges + range) * rows + row) * a.partial_row;
}

// Computes the scores of n <= Vec::size keys for every row. Each key accumulates one vector of sums, all of which
// are then reduced at once. The depth is processed in chunks of kKC as in gemm.h.
template <class T>
inline void decode_scores(const Attention& a, const DecodeBuffers<T>& buf, const T* key, int64_t n, int64_t rows,
                          compute_t<T>* scores) {
  using S = compute_t<T>;
  using V = Vec<S>;
  for (int64_t r = 0; r < rows; ++r, scores += buf.score_row) {
    int64_t begin = 0;
    do {  // The body runs once even for head_dim 0.
      const int64_t depth = std::min(kKC, a.head_dim - begin);
      const S* query = buf.queries + r * buf.query_row + begin;
      V sums[V::size];
      for (int i = 0; i < V::size; ++i) sums[i] = V::zero();
      if (n == V::size) {
        for_each_vector<V>(depth, [&](int64_t d, int64_t inside) {
          const V q = V::load(query + d);
#pragma GCC unroll 16
          for (int i = 0; i < V::size; ++i)
            sums[i] = fma(load_n<V>(key + i * a.key.row + begin + d, inside), q, sums[i]);
        });
      } else {
        for_each_vector<V>(depth, [&](int64_t d, int64_t inside) {
          const V q = V::load(query + d);
          for (int64_t i = 0; i < n; ++i) sums[i] = fma(load_n<V>(key + i * a.key.row + begin + d, inside), q, sums[i]);
        });
      }
      const V sum = sum_each(sums);
      (begin == 0 ? sum : sum + V::load(scores)).store(scores);
      begin += depth;
    } while (begin < a.head_dim);
  }
}

// out += P V for n keys and N vectors of columns; with N = 1, for the first `columns` columns.
template <class T, int N>
inline void decode_values(const T* value, int64_t value_row, const compute_t<T>* probs, int64_t n, int64_t columns,
                          compute_t<T>* out) {
  using V = Vec<compute_t<T>>;
  V sums[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) sums[i] = V::zero();
  for (int64_t j = 0; j < n; ++j, value += value_row) {
    const V p = V::set1(probs[j]);
    if constexpr (N == 1) {
      sums[0] = fma(p, load_n<V>(value, columns), sums[0]);
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) sums[i] = fma(p, V::load(value + i * V::size), sums[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) (V::load(out + i * V::size) + sums[i]).store(out + i * V::size);
}

// Replaces the scores of the first `seen` of n keys by 2^(score - max), and those behind them, up to a whole vector, by
// zeros.
template <class S>
inline void decode_softmax(S* scores, int64_t seen, int64_t n, S& row_max, S& row_sum) {
  using V = Vec<S>;
  constexpr S inf = std::numeric_limits<S>::infinity();
  const int64_t whole = hide_rest(scores, seen);
  V vmax = V::set1(-inf), vsum = V::zero();
  for (int64_t j = 0; j < whole; j += V::size) vmax = max(vmax, V::load(scores + j));
  row_max = vmax.max_element();
  const V shift = V::set1(row_max == -inf ? S(0) : row_max);
  for (int64_t j = 0; j < whole; j += V::size) {
    const V p = exp2(V::load(scores + j) - shift);
    p.store(scores + j);
    vsum = vsum + p;
  }
  row_sum = vsum.sum();
  std::fill(scores + whole, scores + round_up_to_vector<S>(n), S(0));
}

// Q is the type of queries and outputs, T that of keys and values.
template <class T, class Q = T>
void attention_decode(const Attention& a, int64_t b, int64_t kv_head, int64_t range) {
  using S = compute_t<T>;
  using V = Vec<S>;
  const int64_t group = a.heads / a.kv_heads, rows = group * a.queries;
  const int64_t begin = range * a.range_keys, of_range = std::clamp<int64_t>(keys_of(a, b) - begin, 0, a.range_keys);
  const int64_t n = visible(a, b, a.queries - 1, begin, of_range);  // those that the last query sees
  DecodeBuffers<T> buf;
  const cpu::Scratch scratch(buf.layout(nullptr, a, rows));
  buf.layout(scratch.data(), a, rows);
  for (int64_t h = 0; h < group; ++h)
    pack_rows(row_of<Q>(a.query, b, kv_head * group + h, 0), a.query.row, a.query.column, a.queries, a.head_dim,
              static_cast<S>(a.scale * kLog2e), buf.queries + h * a.queries * buf.query_row, buf.query_row);
  const int64_t ahead = std::max<int64_t>(V::size, kPrefetchBytes / std::max<int64_t>(1, a.head_dim * sizeof(T)));
  const int64_t values_ahead = std::max<int64_t>(1, kPrefetchBytes / std::max<int64_t>(1, a.value_dim * sizeof(T)));
  for_each_vector<V>(n, [&](int64_t j, int64_t inside) {
    prefetch_head_rows<T>(a.key, b, kv_head, begin + j + ahead, V::size, a.head_dim, a.keys);
    decode_scores<T>(a, buf, row_of<T>(a.key, b, kv_head, begin + j), inside, rows, buf.scores + j);
  });
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t h = kv_head * group + r / a.queries, row = r % a.queries, padded = round_up_to_vector<S>(n);
    const int64_t seen = visible(a, b, row, begin, n);
    S* scores = buf.scores + r * buf.score_row;
    S* partial = decode_partial<S>(a, b, kv_head, range, r);
    S* statistics = partial + a.partial_row - 2;
    if (a.mask_kind != MaskKind::none) apply_mask<T>(a, b, h, row, begin, seen, scores);
    decode_softmax(scores, seen, n, statistics[0], statistics[1]);
    if (a.dropout.p > 0) multiply(scores, row_factors(a, b, h, row, begin, padded, buf.factors), padded);
    std::fill(partial, statistics, S(0));
  }
  // A step has few keys, so that all rows find their values in the first-level cache.
  constexpr int64_t keys = 32;
  for (int64_t j = 0; j < n; j += keys) {
    const T* value = row_of<T>(a.value, b, kv_head, begin + j);
    prefetch_head_rows<T>(a.value, b, kv_head, begin + j + values_ahead, keys, a.value_dim, a.keys);
    for (int64_t r = 0; r < rows; ++r) {
      const S* probs = buf.scores + r * buf.score_row + j;
      S* out = decode_partial<S>(a, b, kv_head, range, r);
      int64_t d = 0;
      for (; d + 8 * V::size <= a.value_dim; d += 8 * V::size)
        decode_values<T, 8>(value + d, a.value.row, probs, std::min(keys, n - j), 0, out + d);
      for (; d + 4 * V::size <= a.value_dim; d += 4 * V::size)
        decode_values<T, 4>(value + d, a.value.row, probs, std::min(keys, n - j), 0, out + d);
      for (; d < a.value_dim; d += V::size)
        decode_values<T, 1>(value + d, a.value.row, probs, std::min(keys, n - j),
                            std::min<int64_t>(V::size, a.value_dim - d), out + d);
    }
  }
  // An output that is not finite may come from hidden values: 0 times infinity is NaN.
  for (int64_t r = 0; r < rows; ++r) {
    S* out = decode_partial<S>(a, b, kv_head, range, r);
    if (!all_finite(out, a.value_dim))
      weigh_rows(1, n, a.value_dim, buf.scores + r * buf.score_row, 0, row_of<T>(a.value, b, kv_head, begin),
                 a.value.row, out, 0, false);
  }
}

// Combines the partial results of the ranges, in the order of the keys, for all rows of a key/value head.
template <class T>
void attention_decode_combine(const Attention& a, int64_t b, int64_t kv_head) {
  using S = compute_t<T>;
  using V = Vec<S>;
  constexpr S inf = std::numeric_limits<S>::infinity();
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t r = 0; r < group * a.queries; ++r) {
    const int64_t h = kv_head * group + r / a.queries, row = r % a.queries, statistics = a.partial_row - 2;
    S* out = decode_partial<S>(a, b, kv_head, 0, r);
    S row_max = out[statistics], row_sum = out[statistics + 1];
    for (int64_t p = 1; p < a.ranges; ++p) {
      const S* partial = decode_partial<S>(a, b, kv_head, p, r);
      const S new_max = partial[statistics] > row_max ? partial[statistics] : row_max;
      const S shift = new_max == -inf ? S(0) : new_max;
      const S before = std::exp2(row_max - shift), added = std::exp2(partial[statistics] - shift);
      for (int64_t d = 0; d < a.value_dim; d += V::size)
        fma(V::load(partial + d), V::set1(added), V::load(out + d) * V::set1(before)).store(out + d);
      row_sum = row_sum * before + partial[statistics + 1] * added;
      row_max = new_max;
    }
    unpack_row(out, row_sum == S(0) ? S(0) : S(1) / row_sum, a.value_dim, const_cast<T*>(row_of<T>(a.out, b, h, row)),
               a.out.column);
    store_log_sums(a, b, h, row, 1, &row_max, &row_sum);
  }
}

}  // namespace tinyllm::TINYLLM_ISA
