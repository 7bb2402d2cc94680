// Attention's backward pass: P is recomputed from the saved log-sum-exp; key blocks outside, query blocks inside.
// dV += P^T dO, dS = P (dO V^T - rowsum(dO O)), dK += dS^T Q, dQ += dS K.
//
// The work is split into ranges of keys of one key/value head. dK and dV of a range are its own. All ranges add to one
// dQ: to a block of queries in the order of their keys, each when the one before has finished with the block. They
// begin with the last queries, which causal ranges all see, so that none has to wait long. The ranges and the order
// follow from the shape alone, so the bits do not depend on the threads.
//
// Keys and values that a query may not see cannot touch it, and are not touched by a finite query: where P is 0, dS is
// 0 whatever dP is, and keys that are not finite leave the matrix product dS K to weigh_rows.
#pragma once
#include <atomic>
#include <thread>

#include "attention_scores.h"

namespace tinyllm::TINYLLM_ISA {

template <class T>
struct BackwardBuffers {
  using S = compute_t<T>;
  // One block of keys.
  S *keys, *keys_t, *values_t, *grad_key, *grad_value;
  // One block of queries: scaled for the scores, which must be forward's to the bit, and as they are for dK, which
  // would be rounded more often otherwise.
  S *scaled_queries, *queries, *grad_out;
  // One block of queries against one of keys: P and dS.
  S *probs, *grad_scores, *factors;
  int64_t row, value_row, score_row;
  bool finite;  // keys and values are

  size_t carve(char* base, const Attention& a, int64_t block) {
    cpu::Arena arena(base);
    const int64_t padded_block = (block + kPanel<S> - 1) / kPanel<S> * kPanel<S>;
    row = leading_dimension<S>(a.head_dim);
    value_row = leading_dimension<S>(a.value_dim);
    score_row = leading_dimension<S>(padded_block);
    keys = arena.take<S>(block * row);
    keys_t = arena.take<S>(padded_block * a.head_dim);
    values_t = arena.take<S>(padded_block * a.value_dim);
    grad_key = arena.take<S>(block * row);
    grad_value = arena.take<S>(block * value_row);
    scaled_queries = arena.take<S>(kQueryBlock * row);
    queries = arena.take<S>(kQueryBlock * row);
    grad_out = arena.take<S>(kQueryBlock * value_row);
    probs = arena.take<S>(kQueryBlock * score_row);
    grad_scores = arena.take<S>(kQueryBlock * score_row);
    factors = arena.take<S>(factors_size(a, score_row));
    return arena.used();
  }
};

// delta = rowsum(dO * O) for the queries [first, end) of a head.
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

// A row of P and of dP becomes P and dS = P (dP - delta), zeros beyond the `seen` keys up to `end`. delta: where all of
// the row's keys are here, nothing; rowsum(dO O) = rowsum(P dP) / rowsum(P) is then taken in the second form, which has
// the rounding errors of this very P and dP, so that the rows of dS sum to almost exactly 0. kExact: also where
// something is not finite, which only visible keys may then be touched by. kRest: where lse_rest counts.
template <bool kExact, bool kRest, class S>
inline void backward_row(S* probs, S* grad_scores, int64_t seen, int64_t end, S lse, S lse_rest, const S* delta) {
  using V = Vec<S>;
  constexpr S inf = std::numeric_limits<S>::infinity();
  const int64_t whole = hide_rest(probs, seen);
  const V vlse = V::set1(lse == -inf ? inf : lse), vrest = V::set1(lse_rest);  // a query that sees nothing has P = 0
  const auto probability = [&](int64_t j) {
    const V score = V::load(probs + j);
    // A hidden score stays -inf where the log-sum-exp is NaN.
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

// Adds what queries [q0, q0 + rows) of head h and keys [k0, k0 + block_keys) give each other to dQ, dK and dV.
template <class T>
inline void backward_block(const Attention& a, const BackwardBuffers<T>& buf, int64_t b, int64_t h, int64_t q0,
                           int64_t rows, int64_t k0, int64_t block_keys, const compute_t<T>* delta) {
  using S = compute_t<T>;
  const KeyRange keys = keys_seen<S>(a, b, h, q0, rows, k0, block_keys);
  const int64_t first = k0 + keys.begin, count = keys.end - keys.begin;
  if (count <= 0) return;
  const int64_t padded = round_up_to_vector<S>(count);
  const int64_t statistics = (b * a.heads + h) * a.queries;
  const S* lse = static_cast<const S*>(a.lse) + statistics;
  const S* rest = a.lse_rest == nullptr ? nullptr : static_cast<const S*>(a.lse_rest) + statistics;
  pack_rows(row_of<T>(a.query, b, h, q0), a.query.row, a.query.column, rows, a.head_dim,
            static_cast<S>(a.scale * kLog2e), buf.scaled_queries, buf.row);
  pack_rows(row_of<T>(a.query, b, h, q0), a.query.row, a.query.column, rows, a.head_dim, S(1), buf.queries, buf.row);
  pack_rows(row_of<T>(a.grad_out, b, h, q0), a.grad_out.row, a.grad_out.column, rows, a.value_dim, S(1), buf.grad_out,
            buf.value_row);
  for (int64_t g = 0; g < rows; g += kRows) {
    const int64_t m = std::min<int64_t>(kRows, rows - g);
    const int64_t n = visible(a, q0 + g + m - 1, first, count);
    prefetch_rows<T>(a.query, b, h, q0 + g + kQueryBlock, m, a.head_dim, a.queries);
    prefetch_rows<T>(a.grad_out, b, h, q0 + g + kQueryBlock, m, a.value_dim, a.queries);
    if (n == 0) continue;
    S* probs = buf.probs + g * buf.score_row;
    S* grad_scores = buf.grad_scores + g * buf.score_row;
    gemm<S>(m, n, a.head_dim, {buf.scaled_queries + g * buf.row, buf.row, 1},
            panels<S>(buf.keys_t + keys.begin * a.head_dim, a.head_dim), probs, buf.score_row, false);
    gemm<S>(m, n, a.value_dim, {buf.grad_out + g * buf.value_row, buf.value_row, 1},
            panels<S>(buf.values_t + keys.begin * a.value_dim, a.value_dim), grad_scores, buf.score_row, false);
    for (int64_t r = 0; r < m; ++r) {
      const int64_t row = q0 + g + r, seen = visible(a, row, first, count);
      S* row_probs = probs + r * buf.score_row;
      S* row_grads = grad_scores + r * buf.score_row;
      if (keys.masked) apply_mask<T>(a, b, h, row, first, seen, row_probs);
      const int64_t whole = round_up_to_vector<S>(seen);
      const bool drops = a.dropout.p > 0;
      const S* factors = drops ? row_factors(a, b, h, row, first, whole, buf.factors) : nullptr;
      if (drops) multiply(row_grads, factors, whole);
      // The products below go by kRows keys and take a row from the first of these that it sees.
      const int64_t row_end = std::min(padded, round_up_to_vector<S>(seen + kRows));
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
  for (int64_t g = 0; g < count; g += kRows) {
    const int64_t m = std::min<int64_t>(kRows, count - g), key = keys.begin + g;
    // Causal: queries before the group's first key contribute nothing.
    const int64_t skip = a.causal ? std::clamp<int64_t>(first + g - q0, 0, rows) : 0;
    if (skip == rows) break;
    const int64_t at = skip * buf.score_row + g;
    gemm<S>(m, a.value_dim, rows - skip, {buf.probs + at, 1, buf.score_row},
            row_major<S>(buf.grad_out + skip * buf.value_row, buf.value_row), buf.grad_value + key * buf.value_row,
            buf.value_row, true);
    gemm<S>(m, a.head_dim, rows - skip, {buf.grad_scores + at, 1, buf.score_row},
            row_major<S>(buf.queries + skip * buf.row, buf.row), buf.grad_key + key * buf.row, buf.row, true);
  }
}

// The turns of a range at the blocks of queries of all its query heads, in one order for all ranges of a head.
class Turns {
 public:
  Turns(const Attention& a, int64_t b, int64_t kv_head, int64_t part)
      : own_(a.turns == nullptr ? nullptr : a.turns + (b * a.kv_heads + kv_head) * a.parts + part),
        before_(own_ == nullptr || part == 0 ? nullptr : own_ - 1) {}

  // Until the range before this one has finished its first `turn` + 1 blocks.
  void wait(int64_t turn) const {
    constexpr int kPatience = 1000;
    if (before_ == nullptr) return;
    for (int i = 0; before_->load(std::memory_order_acquire) <= turn; ++i)
      if (i >= kPatience) std::this_thread::yield();
  }
  void finish(int64_t turn) const {
    if (own_ != nullptr) own_->store(turn + 1, std::memory_order_release);
  }

 private:
  std::atomic<int64_t>* own_;
  const std::atomic<int64_t>* before_;
};

template <class T>
void attention_bwd(const Attention& a, int64_t b, int64_t kv_head, int64_t part) {
  using S = compute_t<T>;
  const int64_t begin = part * a.part, stop = std::min(a.keys, begin + a.part), keys = keys_of(a, b);
  const int64_t end = std::clamp(keys, begin, std::max(begin, stop)), group = a.heads / a.kv_heads;
  const int64_t block = std::clamp<int64_t>(end - begin, 1, cpu::bwd_key_block(a));
  const int64_t query_blocks = (a.queries + kQueryBlock - 1) / kQueryBlock;
  BackwardBuffers<T> buf;
  const cpu::Scratch scratch(buf.carve(nullptr, a, block));
  buf.carve(scratch.data(), a, block);
  const Turns turns(a, b, kv_head, part);
  const bool whole_rows = a.keys <= cpu::bwd_key_block(a);
  for (int64_t k0 = begin; k0 < end || k0 == 0; k0 += block) {  // once without keys: dQ is 0
    const int64_t block_keys = std::clamp<int64_t>(end - k0, 0, block);
    const T* key = row_of<T>(a.key, b, kv_head, k0);
    pack_rows(key, a.key.row, a.key.column, block_keys, a.head_dim, S(1), buf.keys, buf.row);
    pack_panels(key, a.key.row, a.key.column, block_keys, a.head_dim, buf.keys_t);
    pack_panels(row_of<T>(a.value, b, kv_head, k0), a.value.row, a.value.column, block_keys, a.value_dim, buf.values_t);
    const int64_t panels_of_keys = (block_keys + kPanel<S> - 1) / kPanel<S> * kPanel<S>;
    buf.finite = all_finite(buf.keys, block_keys * buf.row) && all_finite(buf.values_t, panels_of_keys * a.value_dim);
    std::fill(buf.grad_key, buf.grad_key + block_keys * buf.row, S(0));
    std::fill(buf.grad_value, buf.grad_value + block_keys * buf.value_row, S(0));
    for (int64_t i = query_blocks - 1; i >= (a.causal ? k0 / kQueryBlock : 0); --i)
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
        if (k0 + block >= (a.causal ? std::min(keys, q0 + rows) : keys))  // no later key is seen
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
