// The micro-kernel that every matrix product of the CPU kernels goes through.
//
// C[M x N] (+)= A[M x K] B[K x N]. A tile of kRows x kVecs vectors of C stays in registers while k runs: each step
// loads kVecs vectors of B and broadcasts kRows elements of A, so that kRows * kVecs multiply-adds hide kRows + kVecs
// loads and enough independent sums are in flight to hide their latency. Each element of C is a sum over k in order, in
// chunks of kDepth that start from zero (which bounds the rounding error of long sums), whatever the tile it falls in:
// results do not depend on how rows are grouped.
#pragma once
#include <algorithm>

#include "simd.h"

namespace tinyllm::TINYLLM_ISA {

#if defined(TINYLLM_AVX512)
constexpr int kRows = 8, kVecs = 2;  // 16 of 32 registers hold C
#elif defined(TINYLLM_AVX2)
constexpr int kRows = 6, kVecs = 2;  // 12 of 16 registers hold C
#else
constexpr int kRows = 4, kVecs = 4;
#endif

constexpr int64_t kDepth = 256;

// Width of a panel of B, in elements.
template <class S>
constexpr int64_t kPanel = int64_t{kVecs} * Vec<S>::size;

template <class S>
inline int64_t round_up_to_vector(int64_t n) {
  return (n + Vec<S>::size - 1) / Vec<S>::size * Vec<S>::size;
}

// Row length for a row-major operand of n columns: whole vectors, and not a multiple of 512 bytes, which would map the
// rows of a panel to a few sets of the first-level cache.
template <class S>
inline int64_t leading_dimension(int64_t n) {
  const int64_t padded = round_up_to_vector<S>(n);
  return padded % (512 / int64_t{sizeof(S)}) == 0 && padded > 0 ? padded + Vec<S>::size : padded;
}

template <class S>
struct OperandA {  // element (m, k) at data[m * row + k * step]
  const S* data;
  int64_t row, step;
};

template <class S>
struct OperandB {  // element (k, n) at data[(n / kPanel) * panel + k * row + n % kPanel]
  const S* data;
  int64_t row, panel;
};

// B as a row-major matrix, and as panels of kPanel columns each stored whole.
template <class S>
inline OperandB<S> row_major(const S* data, int64_t leading) {
  return {data, leading, kPanel<S>};
}
template <class S>
inline OperandB<S> panels(const S* data, int64_t depth) {
  return {data, kPanel<S>, kPanel<S> * depth};
}

// A's three numbers come one by one: as a structure on the stack they would be stored in halves and read back whole,
// which waits until every store before has left for the cache.
template <class S, int M, int N>
__attribute__((noinline)) void gemm_tile(int64_t depth, const S* a, int64_t a_row, int64_t a_step, const S* b,
                                         int64_t b_row, S* c, int64_t c_row, bool accumulate) {
  using V = Vec<S>;
  V sum[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[m][n] = V::zero();
  for (int64_t k = 0; k < depth; ++k) {
    V vb[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) vb[n] = V::load(b + n * V::size);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const V va = V::set1(a[m * a_row]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[m][n] = fma(va, vb[n], sum[m][n]);
    }
    a += a_step;
    b += b_row;
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      S* at = c + m * c_row + n * V::size;
      (accumulate ? sum[m][n] + V::load(at) : sum[m][n]).store(at);
    }
}

// One block of at most kRows rows against one panel.
template <class S, int N, int M = kRows>
inline void gemm_rows(int64_t m, int64_t depth, OperandA<S> a, const S* b, int64_t b_row, S* c, int64_t c_row,
                      bool accumulate) {
  if constexpr (M > 1) {
    if (m < M) return gemm_rows<S, N, M - 1>(m, depth, a, b, b_row, c, c_row, accumulate);
  }
  gemm_tile<S, M, N>(depth, a.data, a.row, a.step, b, b_row, c, c_row, accumulate);
}

// n columns of a panel, n a multiple of the vector's size.
template <class S, int N = kVecs>
inline void gemm_panel(int64_t m, int64_t n, int64_t depth, OperandA<S> a, const S* b, int64_t b_row, S* c,
                       int64_t c_row, bool accumulate) {
  if constexpr (N > 1) {
    if (n < N * Vec<S>::size) return gemm_panel<S, N - 1>(m, n, depth, a, b, b_row, c, c_row, accumulate);
  }
  gemm_rows<S, N>(m, depth, a, b, b_row, c, c_row, accumulate);
}

// C (+)= A B with n rounded up to whole vectors: C's rows and B's must have room for that.
template <class S>
inline void gemm(int64_t m, int64_t n, int64_t depth, OperandA<S> a, OperandB<S> b, S* c, int64_t c_row,
                 bool accumulate) {
  n = round_up_to_vector<S>(n);
  int64_t k = 0;
  do {  // once for depth 0, which must still write C
    const int64_t chunk = std::min(kDepth, depth - k);
    for (int64_t col = 0; col < n; col += kPanel<S>) {
      const S* panel = b.data + col / kPanel<S> * b.panel + k * b.row;
      for (int64_t row = 0; row < m; row += kRows)
        gemm_panel<S>(std::min<int64_t>(kRows, m - row), std::min(kPanel<S>, n - col), chunk,
                      {a.data + row * a.row + k * a.step, a.row, a.step}, panel, b.row, c + row * c_row + col, c_row,
                      accumulate || k > 0);
    }
    k += chunk;
  } while (k < depth);
}

}  // namespace tinyllm::TINYLLM_ISA
