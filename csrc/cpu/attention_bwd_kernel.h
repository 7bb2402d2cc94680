// Attention's backward pass for one key/value head: P is recomputed from the saved log-sum-exp; key blocks outside,
// query blocks inside. dV += P^T dO, dS = P (dO V^T - rowsum(dO O)), dK += dS^T Q, dQ += dS K. One thread owns a head,
// so the order of every sum is fixed.
#pragma once
#include "attention_scores.h"

namespace tinyllm::TINYLLM_ISA {

// Keys in a block: fewer for wide heads, so that a block of K and V stays in the second-level cache. A multiple of
// every kPanel.
inline int64_t key_block(int64_t head_dim) { return head_dim <= 128 ? 128 : 64; }

template <class T>
struct BackwardBuffers {
  using S = compute_t<T>;
  // Whole heads, padded rows. Queries are scaled, which makes dK = dS^T Q come out scaled.
  S *queries, *grad_out, *grad_query, *grad_key, *grad_value, *delta;
  // One block of keys.
  S *keys, *keys_t, *values_t;
  // One block of queries against one of keys: P and dS.
  S *probs, *grad_scores;
  int64_t row, value_row;

  size_t carve(char* base, const Attention& a, int64_t block) {
    cpu::Arena arena(base);
    row = leading_dimension<S>(a.head_dim);
    value_row = leading_dimension<S>(a.value_dim);
    queries = arena.take<S>(a.queries * row);
    grad_query = arena.take<S>(a.queries * row);
    grad_out = arena.take<S>(a.queries * value_row);
    grad_key = arena.take<S>(a.keys * row);
    grad_value = arena.take<S>(a.keys * value_row);
    delta = arena.take<S>(a.queries);
    keys = arena.take<S>(block * row);
    keys_t = arena.take<S>(block * a.head_dim);
    values_t = arena.take<S>(block * a.value_dim);
    probs = arena.take<S>(kQueryBlock * block);
    grad_scores = arena.take<S>(kQueryBlock * block);
    return arena.used();
  }
};

// delta = rowsum(dO * O) for every query of a head.
template <class T>
inline void row_dots(const Attention& a, int64_t b, int64_t h, const BackwardBuffers<T>& buf) {
  using S = compute_t<T>;
  for (int64_t i = 0; i < a.queries; ++i) {
    const T* out = row_of<T>(a.out, b, h, i);
    const S* grad = buf.grad_out + i * buf.value_row;
    S sum = 0;
    for (int64_t d = 0; d < a.value_dim; ++d) sum += grad[d] * to_compute(out[d * a.out.column]);
    buf.delta[i] = sum;
  }
}

// P and dS of queries [q0, q0 + rows) against keys [k0, k0 + block_keys), and dQ += dS K.
template <class T>
inline void backward_scores(const Attention& a, int64_t b, int64_t h, int64_t q0, int64_t rows, int64_t k0,
                            int64_t block_keys, int64_t block, const BackwardBuffers<T>& buf) {
  using S = compute_t<T>;
  using V = Vec<S>;
  constexpr S inf = std::numeric_limits<S>::infinity();
  const S* lse = static_cast<const S*>(a.lse) + (b * a.heads + h) * a.queries;
  for (int64_t g = 0; g < rows; g += kRows) {
    const int64_t m = std::min<int64_t>(kRows, rows - g), first = q0 + g;
    const int64_t n = visible(a, first + m - 1, k0, block_keys);
    S* probs = buf.probs + g * block;
    S* grad_scores = buf.grad_scores + g * block;
    gemm<S>(m, n, a.head_dim, {buf.queries + first * buf.row, buf.row, 1}, panels<S>(buf.keys_t, a.head_dim), probs,
            block, false);
    gemm<S>(m, n, a.value_dim, {buf.grad_out + first * buf.value_row, buf.value_row, 1},
            panels<S>(buf.values_t, a.value_dim), grad_scores, block, false);
    for (int64_t r = 0; r < m; ++r, probs += block, grad_scores += block) {
      const int64_t row = first + r, seen = visible(a, row, k0, block_keys);
      if (a.mask_kind != MaskKind::none) apply_mask<T>(a, b, h, row, k0, seen, probs);
      const int64_t whole = round_up_to_vector<S>(seen);
      for (int64_t j = seen; j < whole; ++j) probs[j] = -inf;
      const V vlse = V::set1(lse[row] == -inf ? inf : lse[row]);
      V vsum = V::zero(), vdelta = V::zero();
      for (int64_t j = 0; j < whole; j += V::size) {
        const V p = exp2(V::load(probs + j) - vlse);
        p.store(probs + j);
        vsum = vsum + p;
        vdelta = fma(p, V::load(grad_scores + j), vdelta);
      }
      // rowsum(dO O) = rowsum(P dP) / rowsum(P). With the whole row at hand the second form is taken: it has the
      // rounding errors of this very P and dP, so that the rows of dS sum to almost exactly 0. (A row that sees nothing
      // has P = 0.)
      const S row_sum = vsum.sum();
      const S delta = a.keys > block ? buf.delta[row] : row_sum == S(0) ? S(0) : vdelta.sum() / row_sum;
      vdelta = V::set1(delta);
      for (int64_t j = 0; j < whole; j += V::size)
        (V::load(probs + j) * (V::load(grad_scores + j) - vdelta)).store(grad_scores + j);
      std::fill(probs + whole, probs + block, S(0));
      std::fill(grad_scores + whole, grad_scores + block, S(0));
    }
    gemm<S>(m, a.head_dim, n, {buf.grad_scores + g * block, block, 1}, row_major<S>(buf.keys, buf.row),
            buf.grad_query + first * buf.row, buf.row, true);
  }
}

template <class T>
void attention_bwd(const Attention& a, int64_t b, int64_t kv_head) {
  using S = compute_t<T>;
  const int64_t group = a.heads / a.kv_heads;
  const int64_t block = key_block(std::max(a.head_dim, a.value_dim));
  BackwardBuffers<T> buf;
  const cpu::Scratch scratch(buf.carve(nullptr, a, block));
  buf.carve(scratch.data(), a, block);
  std::fill(buf.grad_key, buf.grad_key + a.keys * buf.row, S(0));
  std::fill(buf.grad_value, buf.grad_value + a.keys * buf.value_row, S(0));

  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    pack_rows(row_of<T>(a.query, b, h, 0), a.query.row, a.query.column, a.queries, a.head_dim,
              static_cast<S>(a.scale * kLog2e), buf.queries, buf.row);
    pack_rows(row_of<T>(a.grad_out, b, h, 0), a.grad_out.row, a.grad_out.column, a.queries, a.value_dim, S(1),
              buf.grad_out, buf.value_row);
    std::fill(buf.grad_query, buf.grad_query + a.queries * buf.row, S(0));
    if (a.keys > block) row_dots<T>(a, b, h, buf);
    for (int64_t k0 = 0; k0 < a.keys; k0 += block) {
      const int64_t block_keys = std::min(block, a.keys - k0);
      const T* key = row_of<T>(a.key, b, kv_head, k0);
      pack_rows(key, a.key.row, a.key.column, block_keys, a.head_dim, S(1), buf.keys, buf.row);
      pack_panels(key, a.key.row, a.key.column, block_keys, a.head_dim, buf.keys_t);
      pack_panels(row_of<T>(a.value, b, kv_head, k0), a.value.row, a.value.column, block_keys, a.value_dim,
                  buf.values_t);
      // The first query that sees this block, rounded down to a block of queries.
      const int64_t first = a.causal ? k0 / kQueryBlock * kQueryBlock : 0;
      for (int64_t q0 = first; q0 < a.queries; q0 += kQueryBlock) {
        const int64_t rows = std::min(kQueryBlock, a.queries - q0);
        backward_scores<T>(a, b, h, q0, rows, k0, block_keys, block, buf);
        for (int64_t g = 0; g < block_keys; g += kRows) {
          const int64_t m = std::min<int64_t>(kRows, block_keys - g);
          // Causal: queries before the group's first key contribute nothing.
          const int64_t skip = a.causal ? std::clamp<int64_t>(k0 + g - q0, 0, rows) : 0;
          if (skip == rows) break;
          const int64_t row = q0 + skip, at = skip * block + g;
          gemm<S>(m, a.value_dim, rows - skip, {buf.probs + at, 1, block},
                  row_major<S>(buf.grad_out + row * buf.value_row, buf.value_row),
                  buf.grad_value + (k0 + g) * buf.value_row, buf.value_row, true);
          gemm<S>(m, a.head_dim, rows - skip, {buf.grad_scores + at, 1, block},
                  row_major<S>(buf.queries + row * buf.row, buf.row), buf.grad_key + (k0 + g) * buf.row, buf.row, true);
        }
      }
    }
    for (int64_t i = 0; i < a.queries; ++i)
      unpack_row(buf.grad_query + i * buf.row, static_cast<S>(a.scale), a.head_dim,
                 const_cast<T*>(row_of<T>(a.grad_query, b, h, i)), a.grad_query.column);
  }
  for (int64_t j = 0; j < a.keys; ++j) {
    unpack_row(buf.grad_key + j * buf.row, static_cast<S>(kLn2), a.head_dim,
               const_cast<T*>(row_of<T>(a.grad_key, b, kv_head, j)), a.grad_key.column);
    unpack_row(buf.grad_value + j * buf.value_row, S(1), a.value_dim,
               const_cast<T*>(row_of<T>(a.grad_value, b, kv_head, j)), a.grad_value.column);
  }
}

}  // namespace tinyllm::TINYLLM_ISA
