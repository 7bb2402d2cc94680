// The backward pass of attention (Dao 2023, "FlashAttention-2"): P is recomputed from the saved log-sum-exp, with an
// outer loop over blocks of keys and an inner loop over blocks of queries.
//
//   dV += P^T dO        dS = P (dO V^T - rowsum(dO O))        dK += dS^T Q        dQ += dS K
//
// The work is split into ranges of keys of one key/value head. Each range owns its rows of dK and dV, while all ranges
// add to the same dQ. They add to a block of queries in the order of their keys: a range waits until the one before it
// has finished the block. All ranges begin with the last queries, which every causal range sees, so that none waits
// long. The ranges and their order follow from the shape alone, so results do not depend on the number of threads.
//
// Hidden keys and values cannot influence the gradient of a query, and their own gradients are 0: where P is 0, dS is 0
// whatever dP is, and if any key is not finite, weigh_rows takes the place of the matmul dS K.
#pragma once
#include <atomic>
#include <thread>

#include "attention_scores.h"

namespace tinyllm::TINYLLM_ISA {

template <class T>
struct BackwardBuffers {
  using S = compute_t<T>;
  // A block of keys.
  S *keys, *keys_t, *values_t, *grad_key, *grad_value;
  S *queries, *grad_out;  // a block of queries
  // P and dS of a block of queries and a block of keys.
  S *probs, *grad_scores, *factors;
  int64_t row, value_row, score_row;
  bool finite;  // whether all keys and values are finite

  size_t layout(char* base, const Attention& a, int64_t block) {
    cpu::Arena arena(base);
    const int64_t padded_block = (block + kNR<S> - 1) / kNR<S> * kNR<S>;
    row = leading_dimension<S>(a.head_dim);
    value_row = leading_dimension<S>(a.value_dim);
    score_row = leading_dimension<S>(padded_block);
    keys = arena.take<S>(block * row);
    keys_t = arena.take<S>(padded_block * a.head_dim);
    values_t = arena.take<S>(padded_block * a.value_dim);
    grad_key = arena.take<S>(block * row);
    grad_value = arena.take<S>(block * value_row);
    queries = arena.take<S>(kQueryBlock * row);
    grad_out = arena.take<S>(kQueryBlock * value_row);
    probs = arena.take<S>(kQueryBlock * score_row);
    grad_scores = arena.take<S>(kQueryBlock * score_row);
    factors = arena.take<S>(factors_size(a, score_row));
    return arena.used();
  }
};

// Computes delta = rowsum(dO * O) for the queries [first, end) of a head.
template <class T>
inline void row_dots(const Attention& a, int64_t b, int64_t h, int64_t first, int64_t end, compute_t<T>* delta) {
  using S = compute_t<T>;
  using V = Vec<S>;
  for (int64_t i = first; i < end; ++i) {
    const T* out = row_of<T>(a.out, b, h, i);
    const T* grad = row_of<T>(a.grad_out, b, h, i);
    S sum = 0;
    if (a.out.column == 1 && a.grad_out.column == 1) {
      V vsum = V::zero();
      for_each_vector<V>(
          a.value_dim, [&](int64_t d, int64_t n) { vsum = fma(load_n<V>(out + d, n), load_n<V>(grad + d, n), vsum); });
      sum = vsum.sum();
    } else {
      for (int64_t d = 0; d < a.value_dim; ++d)
        sum += to_compute(grad[d * a.grad_out.column]) * to_compute(out[d * a.out.column]);
    }
    delta[i] = sum;
  }
}

// Turns a row of scores and of dP into P and dS = P (dP - delta), followed by zeros from the `seen` keys up to `end`.
// delta is null if all keys of the row are in this block. It is then computed as rowsum(P dP) / rowsum(P), which equals
// rowsum(dO O) but has the rounding errors of the same P and dP, so that rows of dS sum to almost exactly 0. kExact
// also handles numbers that are not finite, which must not spread to hidden keys. kRest adds lse_rest.
template <bool kExact, bool kRest, class S>
inline void backward_row(S* probs, S* grad_scores, int64_t seen, int64_t end, S lse, S lse_rest, const S* delta) {
  using V = Vec<S>;
  constexpr S inf = std::numeric_limits<S>::infinity();
  const int64_t whole = hide_rest(probs, seen);
  const V vlse = V::set1(lse == -inf ? inf : lse), vrest = V::set1(lse_rest);  // P = 0 if the query sees no key
  const auto probability = [&](int64_t j) {
    const V score = V::load(probs + j);
    // A hidden score must stay -inf even if the log-sum-exp is NaN.
    const V difference = kRest ? score - vlse - vrest : score - vlse;
    const V p = exp2(kExact ? V::where_finite(score, difference, score) : difference);
    p.store(probs + j);
    return p;
  };
  const auto grad_score = [&](V p, int64_t j, V vdelta) {
    const V grad = p * (V::load(grad_scores + j) - vdelta);
    (kExact ? grad.where_positive(p) : grad).store(grad_scores + j);
  };
  if (delta != nullptr) {
    const V vdelta = V::set1(*delta);
    for (int64_t j = 0; j < whole; j += V::size) grad_score(probability(j), j, vdelta);
  } else {
    V vsum = V::zero(), vdot = V::zero();
    for (int64_t j = 0; j < whole; j += V::size) {
      const V p = probability(j), grad = V::load(grad_scores + j);
      vsum = vsum + p;
      vdot = fma(p, kExact ? grad.where_positive(p) : grad, vdot);
    }
    const S row_sum = vsum.sum();
    const V vdelta = V::set1(row_sum == S(0) ? S(0) : vdot.sum() / row_sum);
    for (int64_t j = 0; j < whole; j += V::size) grad_score(V::load(probs + j), j, vdelta);
  }
  for (int64_t j = whole; j < end; j += V::size) {
    V::zero().store(probs + j);
    V::zero().store(grad_scores + j);
  }
}

// Adds the contributions of queries [q0, q0 + rows) of head h and keys [k0, k0 + block_keys) to dQ, dK and dV.
template <class T>
inline void backward_block(const Attention& a, const BackwardBuffers<T>& buf, int64_t b, int64_t h, int64_t q0,
                           int64_t rows, int64_t k0, int64_t block_keys, const compute_t<T>* delta) {
  using S = compute_t<T>;
  const KeyRange keys = visible_key_range<S>(a, b, h, q0, rows, k0, block_keys);
  const int64_t first = k0 + keys.begin, count = keys.end - keys.begin;
  if (count <= 0) return;
  const int64_t padded = round_up_to_vector<S>(count);
  const int64_t statistics = (b * a.heads + h) * a.queries;
  const S* lse = static_cast<const S*>(a.lse) + statistics;
  const S* rest = a.lse_rest == nullptr ? nullptr : static_cast<const S*>(a.lse_rest) + statistics;
  pack_rows(row_of<T>(a.query, b, h, q0), a.query.row, a.query.column, rows, a.head_dim, S(1), buf.queries, buf.row);
  pack_rows(row_of<T>(a.grad_out, b, h, q0), a.grad_out.row, a.grad_out.column, rows, a.value_dim, S(1), buf.grad_out,
            buf.value_row);
  for (int64_t g = 0; g < rows; g += kMR) {
    const int64_t m = std::min<int64_t>(kMR, rows - g);
    const int64_t n = visible(a, b, q0 + g + m - 1, first, count);
    prefetch_head_rows<T>(a.query, b, h, q0 + g + kQueryBlock, m, a.head_dim, a.queries);
    prefetch_head_rows<T>(a.grad_out, b, h, q0 + g + kQueryBlock, m, a.value_dim, a.queries);
    if (n == 0) continue;
    S* probs = buf.probs + g * buf.score_row;
    S* grad_scores = buf.grad_scores + g * buf.score_row;
    gemm<S>(m, n, a.head_dim, {buf.queries + g * buf.row, buf.row, 1},
            panels<S>(buf.keys_t + keys.begin * a.head_dim, a.head_dim), probs, buf.score_row, false);
    gemm<S>(m, n, a.value_dim, {buf.grad_out + g * buf.value_row, buf.value_row, 1},
            panels<S>(buf.values_t + keys.begin * a.value_dim, a.value_dim), grad_scores, buf.score_row, false);
    for (int64_t r = 0; r < m; ++r) {
      const int64_t row = q0 + g + r, seen = visible(a, b, row, first, count);
      S* row_probs = probs + r * buf.score_row;
      S* row_grads = grad_scores + r * buf.score_row;
      if (keys.masked) apply_mask<T>(a, b, h, row, first, seen, row_probs);
      const int64_t whole = round_up_to_vector<S>(seen);
      const bool drops = a.dropout.p > 0;
      const S* factors = drops ? row_factors(a, b, h, row, first, whole, buf.factors) : nullptr;
      if (drops) multiply(row_grads, factors, whole);
      // The matmuls below take groups of kMR keys, and need a row to the end of the last group in which it sees a key.
      const int64_t row_end = std::min(padded, round_up_to_vector<S>(seen + kMR));
      const S* row_delta = delta == nullptr ? nullptr : delta + row;
      const bool exact = !buf.finite || std::isnan(lse[row]) || (row_delta != nullptr && !std::isfinite(*row_delta));
      const S row_rest = rest == nullptr ? S(0) : rest[row];
      const auto whole_row = exact             ? backward_row<true, true, S>
                             : rest != nullptr ? backward_row<false, true, S>
                                               : backward_row<false, false, S>;
      whole_row(row_probs, row_grads, seen, row_end, lse[row], row_rest, row_delta);
      if (drops) multiply(row_probs, factors, whole);
    }
    const S* packed = buf.keys + keys.begin * buf.row;
    S* grad_query = const_cast<S*>(row_of<S>(a.query_sums, b, h, q0 + g));
    if (buf.finite)
      gemm<S>(m, a.head_dim, n, {grad_scores, buf.score_row, 1}, row_major<S>(packed, buf.row), grad_query,
              a.query_sums.row, true);
    else
      weigh_rows(m, n, a.head_dim, grad_scores, buf.score_row, packed, buf.row, grad_query, a.query_sums.row, true);
  }
  for (int64_t g = 0; g < count; g += kMR) {
    const int64_t m = std::min<int64_t>(kMR, count - g), key = keys.begin + g;
    // Queries that do not see the first key of the group contribute nothing.
    const int64_t skip = std::clamp<int64_t>(first_query(a, b, first + g) - q0, 0, rows);
    if (skip == rows) break;
    const int64_t at = skip * buf.score_row + g;
    gemm<S>(m, a.value_dim, rows - skip, {buf.probs + at, 1, buf.score_row},
            row_major<S>(buf.grad_out + skip * buf.value_row, buf.value_row), buf.grad_value + key * buf.value_row,
            buf.value_row, true);
    gemm<S>(m, a.head_dim, rows - skip, {buf.grad_scores + at, 1, buf.score_row},
            row_major<S>(buf.queries + skip * buf.row, buf.row), buf.grad_key + key * buf.row, buf.row, true);
  }
}

// Orders the additions of the ranges of a head to dQ. A turn is a block of queries of one of its query heads; all
// ranges take the turns in the same order.
class Turns {
 public:
  Turns(const Attention& a, int64_t b, int64_t kv_head, int64_t range)
      : own_(a.turns == nullptr ? nullptr : a.turns + (b * a.kv_heads + kv_head) * a.ranges + range),
        before_(own_ == nullptr || range == 0 ? nullptr : own_ - 1) {}

  // Waits until the previous range has finished its first `turn` + 1 turns.
  void wait(int64_t turn) const {
    constexpr int kSpins = 1000;
    if (before_ == nullptr) return;
    for (int i = 0; before_->load(std::memory_order_acquire) <= turn; ++i)
      if (i >= kSpins) std::this_thread::yield();
  }
  void finish(int64_t turn) const {
    if (own_ != nullptr) own_->store(turn + 1, std::memory_order_release);
  }

 private:
  std::atomic<int64_t>* own_;
  const std::atomic<int64_t>* before_;
};

template <class T>
void attention_bwd(const Attention& a, int64_t b, int64_t kv_head, int64_t range) {
  using S = compute_t<T>;
  const int64_t begin = range * a.range_keys, stop = std::min(a.keys, begin + a.range_keys), keys = keys_of(a, b);
  const int64_t end = std::clamp(keys, begin, std::max(begin, stop)), group = a.heads / a.kv_heads;
  const int64_t block = std::clamp<int64_t>(end - begin, 1, cpu::bwd_key_block(a));
  const int64_t query_blocks = (a.queries + kQueryBlock - 1) / kQueryBlock;
  static_assert(128 % kNR<S> == 0 && 128 % kQueryBlock == 0, "bwd_key_block must be a multiple of both");
  BackwardBuffers<T> buf;
  const cpu::Scratch scratch(buf.layout(nullptr, a, block));
  buf.layout(scratch.data(), a, block);
  const Turns turns(a, b, kv_head, range);
  const bool whole_rows = a.keys <= cpu::bwd_key_block(a);
  for (int64_t k0 = begin; k0 < end || k0 == 0; k0 += block) {  // runs once even without keys, to set dQ to 0
    const int64_t block_keys = std::clamp<int64_t>(end - k0, 0, block);
    const T* key = row_of<T>(a.key, b, kv_head, k0);
    pack_rows(key, a.key.row, a.key.column, block_keys, a.head_dim, S(1), buf.keys, buf.row);
    pack_keys<T>(a, b, kv_head, k0, block_keys, buf.keys_t);  // which repeats the scores of forward exactly
    pack_b(row_of<T>(a.value, b, kv_head, k0), a.value.row, a.value.column, block_keys, a.value_dim, buf.values_t);
    const int64_t panels_of_keys = (block_keys + kNR<S> - 1) / kNR<S> * kNR<S>;
    buf.finite = all_finite(buf.keys, block_keys * buf.row) && all_finite(buf.values_t, panels_of_keys * a.value_dim);
    std::fill(buf.grad_key, buf.grad_key + block_keys * buf.row, S(0));
    std::fill(buf.grad_value, buf.grad_value + block_keys * buf.value_row, S(0));
    const int64_t seeing = first_query(a, b, k0);
    const int64_t first_block = seeing < a.queries ? seeing / kQueryBlock : query_blocks;
    for (int64_t i = query_blocks - 1; i >= first_block; --i)
      for (int64_t g = 0; g < group; ++g) {
        const int64_t h = kv_head * group + g, q0 = i * kQueryBlock, rows = std::min(kQueryBlock, a.queries - q0);
        const int64_t turn = (query_blocks - 1 - i) * group + g;
        S* delta = static_cast<S*>(a.delta) + (b * a.heads + h) * a.queries;
        turns.wait(turn);
        if (k0 == 0) {
          for (int64_t r = q0; r < q0 + rows; ++r) {
            S* sums = const_cast<S*>(row_of<S>(a.query_sums, b, h, r));
            std::fill(sums, sums + round_up_to_vector<S>(a.head_dim), S(0));
          }
          if (!whole_rows) row_dots<T>(a, b, h, q0, q0 + rows, delta);
        }
        backward_block<T>(a, buf, b, h, q0, rows, k0, block_keys, whole_rows ? nullptr : delta);
        // The queries see no later key, so their dQ is complete.
        if (k0 + block >= visible(a, b, q0 + rows - 1, 0, keys))
          for (int64_t r = q0; r < q0 + rows; ++r)
            unpack_row(row_of<S>(a.query_sums, b, h, r), static_cast<S>(a.scale), a.head_dim,
                       const_cast<T*>(row_of<T>(a.grad_query, b, h, r)), a.grad_query.column);
        turns.finish(turn);
      }
    for (int64_t j = 0; j < block_keys; ++j) {
      unpack_row(buf.grad_key + j * buf.row, static_cast<S>(a.scale), a.head_dim,
                 const_cast<T*>(row_of<T>(a.grad_key, b, kv_head, k0 + j)), a.grad_key.column);
      unpack_row(buf.grad_value + j * buf.value_row, S(1), a.value_dim,
                 const_cast<T*>(row_of<T>(a.grad_value, b, kv_head, k0 + j)), a.grad_value.column);
    }
  }
  std::fill(buf.grad_key, buf.grad_key + buf.row, S(0));
  std::fill(buf.grad_value, buf.grad_value + buf.value_row, S(0));
  for (int64_t j = end; j < stop; ++j) {
    unpack_row(buf.grad_key, S(1), a.head_dim, const_cast<T*>(row_of<T>(a.grad_key, b, kv_head, j)), a.grad_key.column);
    unpack_row(buf.grad_value, S(1), a.value_dim, const_cast<T*>(row_of<T>(a.grad_value, b, kv_head, j)),
               a.grad_value.column);
  }
}

}  // namespace tinyllm::TINYLLM_ISA
