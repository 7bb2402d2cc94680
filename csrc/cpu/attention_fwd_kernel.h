// Flash attention on a CPU (Dao et al. 2022, "FlashAttention"; Dao 2023, "FlashAttention-2"). The (queries, keys)
// matrix of scores is never stored; a tile of scores stays in the first-level cache (the second, where heads are wide).
//
// The keys of a head are packed once into panels and the values copied once into padded rows, which also handles
// strides and 16-bit types; float values whose rows lie like that are not copied. For a range of queries, each block of
// queries, each block of keys and each group of queries (kMR, or all), the kernel then computes scores = Q K^T, the
// softmax, and out = out * correction + P V. A block of keys is as long as the caches allow (512 at head_dim 64), so
// that short sequences need a single pass and the running maximum of long ones (Milakov & Gimelshein 2018) changes
// rarely. Causal attention computes the columns of a group only up to its last query, rounded up to one vector, so that
// hardly any work is spent above the diagonal.
//
// A query whose keys are all masked has lse = -inf and output 0. Hidden values cannot influence a query: if any value
// is not finite, weigh_rows takes the place of the matmul, in which a weight of 0 would turn it into NaN.
#pragma once
#include "attention_scores.h"

namespace tinyllm::TINYLLM_ISA {

constexpr int64_t kGroups = (kQueryBlock + kMR - 1) / kMR;

// The length of an array with one element for each row of a group, in whole vectors.
template <class S>
constexpr int64_t kGroupLanes = (kMR + Vec<S>::size - 1) / Vec<S>::size * Vec<S>::size;

// Whether scores are computed for a whole block of queries at once: where heads are so wide that K and V of enough keys
// for long sums would not stay in the second-level cache. They come from farther away then, but once for a block, whose
// scores take their place. Where queries see different keys, groups save more work.
inline bool takes_whole_blocks(const Attention& a) {
  return a.head_dim + a.value_dim >= 256 && !a.causal && a.mask_kind == MaskKind::none;
}

// The number of keys in a block: K and V of a block take a quarter of a second-level cache of 1 MB, and the scores of a
// group half of the first-level cache. A multiple of kNR, so that a block begins with a panel.
inline int64_t fwd_key_block(const Attention& a) {
  static_assert(64 % kNR<float> == 0 && 64 % kNR<double> == 0);
  if (takes_whole_blocks(a)) return kKC;
  return std::clamp<int64_t>(65536 / std::max<int64_t>(1, a.head_dim + a.value_dim) / 64 * 64, 64, 512);
}

// Whether the micro-kernel can read queries where they are. Not rows that all fall into the same sets of the
// first-level cache, as those of 16 heads of 64 floats side by side do.
template <class T>
inline bool queries_in_place(const Attention& a) {
  return std::is_same_v<T, compute_t<T>> && a.query.column == 1 && a.query.row * int64_t{sizeof(T)} % 4096 != 0;
}

// Whether the micro-kernel can read values where they are: rows as pack_rows would lay them out.
template <class T>
inline bool values_in_place(const Attention& a, int64_t b, int64_t kv_head) {
  return std::is_same_v<T, compute_t<T>> && a.value.column == 1 && a.value.row == a.value_dim &&
         a.value_dim == leading_dimension<compute_t<T>>(a.value_dim) &&
         reinterpret_cast<uintptr_t>(row_of<T>(a.value, b, kv_head, 0)) % 64 == 0;
}

// The keys of a head in panels, and its values in rows: copies, or where they are.
template <class T>
struct PackedHead {
  using S = compute_t<T>;
  S *keys, *copied_values;
  const S* values;
  int64_t value_row;

  size_t layout(char* base, const Attention& a, int64_t b, int64_t kv_head, int64_t keys_used) {
    cpu::Arena arena(base);
    value_row = leading_dimension<S>(a.value_dim);
    keys = arena.take<S>((keys_used + kNR<S> - 1) / kNR<S> * kNR<S> * a.head_dim);
    const bool in_place = values_in_place<T>(a, b, kv_head);
    values = copied_values = arena.take<S>(in_place ? 0 : keys_used * value_row);
    if constexpr (std::is_same_v<T, S>) {
      if (in_place) values = row_of<T>(a.value, b, kv_head, 0);
    }
    return arena.used();
  }

  void pack(const Attention& a, int64_t b, int64_t kv_head, int64_t begin, int64_t end) {
    pack_keys<T>(a, b, kv_head, begin, end - begin, keys + begin * a.head_dim);
    if (values == copied_values)
      pack_rows(row_of<T>(a.value, b, kv_head, begin), a.value.row, a.value.column, end - begin, a.value_dim, S(1),
                copied_values + begin * value_row, value_row);
  }
};

template <class T>
int64_t attention_packed_head(const Attention& a) {
  PackedHead<T> head;
  size_t most = 0;
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t kv_head = 0; kv_head < a.kv_heads; ++kv_head)
      most = std::max(most, head.layout(nullptr, a, b, kv_head, a.packed_keys));
  return static_cast<int64_t>(most);
}

// The packed head (b, kv_head), which all calls share.
template <class T>
inline PackedHead<T> packed_head(const Attention& a, int64_t b, int64_t kv_head) {
  PackedHead<T> head;
  head.layout(a.packed + (b * a.kv_heads + kv_head) * a.packed_head, a, b, kv_head, a.packed_keys);
  return head;
}

template <class T>
void attention_pack(const Attention& a, int64_t b, int64_t kv_head, int64_t begin, int64_t end) {
  static_assert(cpu::kPackedKeys % kNR<compute_t<T>> == 0);
  packed_head<T>(a, b, kv_head).pack(a, b, kv_head, begin, end);
}

template <class T>
struct ForwardBuffers {
  using S = compute_t<T>;
  PackedHead<T> head;
  S *packed_queries, *out, *scores, *max, *sum, *factors;
  OperandA<S> queries;  // a block of them, packed or where they are
  int64_t out_row, query_row, score_row;
  bool finite;  // whether all values are finite

  size_t layout(char* base, const Attention& a, int64_t keys_used, int64_t block) {
    cpu::Arena arena(base);
    out_row = round_up_to_vector<S>(a.value_dim);
    query_row = leading_dimension<S>(a.head_dim);
    score_row = leading_dimension<S>(std::min(block, keys_used));
    packed_queries = arena.take<S>(queries_in_place<T>(a) ? 0 : kQueryBlock * query_row);
    out = arena.take<S>(kQueryBlock * out_row);
    scores = arena.take<S>((takes_whole_blocks(a) ? kQueryBlock : kMR) * score_row);
    max = arena.take<S>(kQueryBlock + kGroupLanes<S>);
    sum = arena.take<S>(kQueryBlock);
    factors = arena.take<S>(factors_size(a, score_row));
    return arena.used();
  }
};

// The online softmax of M rows, of which row r sees the first seen[r] of n keys: replaces their scores by 2^(score -
// max), or 0 where a row does not see a key, and updates the running maxima and sums. The caller must multiply earlier
// results of row r by correction[r].
//
// All rows take the same number of steps, which keeps branches predictable, and M maxima are independent of each other.
template <int M, class S>
inline void softmax_rows(const int64_t* seen, int64_t n, S* scores, int64_t score_row, S* max_of, S* sum_of,
                         S* correction) {
  using V = Vec<S>;
  constexpr S inf = std::numeric_limits<S>::infinity();
  const int64_t padded = round_up_to_vector<S>(n), inside = seen[0] / V::size * V::size;  // the first row sees least
  V x[M];
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) x[r] = V::set1(max_of[r]);
  for (int64_t j = 0; j < inside; j += V::size)
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) x[r] = max(x[r], V::load(scores + r * score_row + j));
  for (int64_t j = inside; j < padded; j += V::size)
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      S* const at = scores + r * score_row + j;
      const V score = V::first(V::load(at), std::clamp<int64_t>(seen[r] - j, 0, V::size), V::set1(-inf));
      score.store(at);
      x[r] = max(x[r], score);
    }
  S shift[kGroupLanes<S>] = {};
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
    const S row_max = x[r].max_element();
    // A row that has seen no key yet: 2^(-inf - 0) is 0, while -inf - -inf would be NaN.
    shift[r] = row_max == -inf ? S(0) : row_max;
  }
  for (int i = 0; i < M; i += V::size) exp2(V::load(max_of + i) - V::load(shift + i)).store(correction + i);
  for (int r = 0; r < M; ++r) {
    V sum = V::zero();
    for (int64_t j = 0; j < padded; j += V::size) {
      S* const at = scores + r * score_row + j;
      const V p = exp2(V::load(at) - V::set1(shift[r]));
      p.store(at);
      sum = sum + p;
    }
    sum_of[r] = sum_of[r] * correction[r] + sum.sum();
    if (sum_of[r] != S(0)) max_of[r] = shift[r];
  }
}

// Adds the contribution of the block of keys [k0, k0 + block_keys) to the rows [g, g + m) of a group in `out`.
// `started` tells whether earlier blocks have written there. Returns whether there is anything in `out` now.
template <class T>
inline bool forward_group(const Attention& a, const ForwardBuffers<T>& buf, int64_t b, int64_t h, int64_t q0, int64_t g,
                          int64_t m, int64_t k0, int64_t block_keys, bool started) {
  using S = compute_t<T>;
  using V = Vec<S>;
  const KeyRange keys = visible_key_range<S>(a, b, h, q0 + g, m, k0, block_keys);
  const int64_t n = keys.end - keys.begin, first = k0 + keys.begin;
  if (n <= 0) return started;
  gemm<S>(m, n, a.head_dim, {buf.queries.data + g * buf.queries.row, buf.queries.row, buf.queries.step},
          panels<S>(buf.head.keys + first * a.head_dim, a.head_dim), buf.scores, buf.score_row, false);
  int64_t seen[kQueryBlock];
  for (int64_t r = 0; r < m; ++r) {
    seen[r] = visible(a, b, q0 + g + r, first, n);
    if (keys.masked) apply_mask<T>(a, b, h, q0 + g + r, first, seen[r], buf.scores + r * buf.score_row);
  }
  S correction[kQueryBlock + kGroupLanes<S>];
  for (int64_t r = 0; r < m;) {
    const bool whole = m - r >= kMR;
    (whole ? softmax_rows<kMR, S> : softmax_rows<1, S>)(seen + r, n, buf.scores + r * buf.score_row, buf.score_row,
                                                        buf.max + g + r, buf.sum + g + r, correction + r);
    r += whole ? kMR : 1;
  }
  S* out = buf.out + g * buf.out_row;
  for (int64_t r = 0; r < m; ++r) {
    if (a.dropout.p > 0) {
      const int64_t whole = round_up_to_vector<S>(seen[r]);
      multiply(buf.scores + r * buf.score_row, row_factors(a, b, h, q0 + g + r, first, whole, buf.factors), whole);
    }
    if (started && correction[r] != S(1))
      for (int64_t i = r * buf.out_row; i < (r + 1) * buf.out_row; i += V::size)
        (V::load(out + i) * V::set1(correction[r])).store(out + i);
  }
  const S* values = buf.head.values + first * buf.head.value_row;
  // buf.finite speaks for all keys of this split of the queries, and the number of threads decides how they are split.
  // The group's own keys decide, so that its rows are summed in the same order in any split.
  if (buf.finite || all_finite(values, n * buf.head.value_row))
    gemm<S>(m, a.value_dim, n, {buf.scores, buf.score_row, 1}, row_major<S>(values, buf.head.value_row), out,
            buf.out_row, started);
  else
    weigh_rows(m, n, a.value_dim, buf.scores, buf.score_row, values, buf.head.value_row, out, buf.out_row, started);
  return true;
}

template <class T>
void attention_fwd(const Attention& a, int64_t b, int64_t h, int64_t begin, int64_t end) {
  using S = compute_t<T>;
  constexpr S inf = std::numeric_limits<S>::infinity();
  const int64_t kv_head = h / (a.heads / a.kv_heads);
  const int64_t keys_used = visible_key_range<S>(a, b, h, begin, end - begin, 0, keys_of(a, b)).end;
  const int64_t block = fwd_key_block(a);

  ForwardBuffers<T> buf;
  const bool shared = a.packed != nullptr;
  const size_t own = shared ? 0 : buf.head.layout(nullptr, a, b, kv_head, keys_used);
  const cpu::Scratch scratch(own + buf.layout(nullptr, a, keys_used, block));
  buf.layout(scratch.data() + own, a, keys_used, block);
  if (shared) {
    buf.head = packed_head<T>(a, b, kv_head);
  } else {
    buf.head.layout(scratch.data(), a, b, kv_head, keys_used);
    buf.head.pack(a, b, kv_head, 0, keys_used);
  }
  buf.finite = all_finite(buf.head.values, keys_used * buf.head.value_row);

  for (int64_t q0 = begin; q0 < end; q0 += kQueryBlock) {
    const int64_t rows = std::min(kQueryBlock, end - q0);
    const T* query = row_of<T>(a.query, b, h, q0);
    if constexpr (std::is_same_v<T, S>) buf.queries = {query, a.query.row, 1};
    if (!queries_in_place<T>(a)) {
      pack_rows(query, a.query.row, a.query.column, rows, a.head_dim, S(1), buf.packed_queries, buf.query_row);
      buf.queries = {buf.packed_queries, buf.query_row, 1};
    }
    std::fill(buf.max, buf.max + rows, -inf);
    std::fill(buf.sum, buf.sum + rows, S(0));
    bool started[kGroups] = {};
    const int64_t last_key = visible(a, b, q0 + rows - 1, 0, keys_used);
    const int64_t group = takes_whole_blocks(a) ? rows : kMR;
    for (int64_t k0 = 0; k0 < last_key; k0 += block)
      for (int64_t g = 0; g < rows; g += group) {
        const int64_t m = std::min(group, rows - g);
        prefetch_head_rows<T>(a.query, b, h, q0 + g + kQueryBlock, m, a.head_dim, end);
        prefetch_head_rows<T, 1>(a.out, b, h, q0 + g, m, a.value_dim, end);
        bool& begun = started[g / group];
        begun = forward_group<T>(a, buf, b, h, q0, g, m, k0, std::min(block, keys_used - k0), begun);
      }
    for (int64_t r = 0; r < rows; ++r) {
      const S sum = buf.sum[r];
      S* out = buf.out + r * buf.out_row;
      if (!started[r / group]) std::fill(out, out + buf.out_row, S(0));
      unpack_row(out, sum == S(0) ? S(0) : S(1) / sum, a.value_dim, const_cast<T*>(row_of<T>(a.out, b, h, q0 + r)),
                 a.out.column);
    }
    store_log_sums(a, b, h, q0, rows, buf.max, buf.sum);
  }
}

}  // namespace tinyllm::TINYLLM_ISA
