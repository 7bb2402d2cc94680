// The register-blocked micro-kernel of all matmuls on the CPU: C[M x N] (+)= A[M x K] B[K x N].
//
// The names are those of BLIS: a tile of MR x NR elements of C stays in registers while k runs through a chunk of KC.
// Each step loads NR / Vec::size vectors of B and broadcasts MR elements of A. Its multiply-adds outnumber its loads,
// and enough independent sums are in flight to hide their latency. Each element of C is a sum over k in order, in
// chunks of KC that start from zero (which bounds the rounding error of long sums), whatever tile it belongs to, so
// that results do not depend on how rows are grouped.
#pragma once
#include <algorithm>

#include "blocking.h"
#include "simd.h"

namespace tinyllm::TINYLLM_ISA {

#if defined(TINYLLM_AVX512)
constexpr int kMR = 8, kNV = 2;  // C takes 16 of 32 registers
#elif defined(TINYLLM_AVX2)
constexpr int kMR = 6, kNV = 2;  // C takes 12 of 16 registers
#elif defined(TINYLLM_NEON)
// C takes 20 of 32 registers, a step of B four and of A five. The large cores (Apple's M, Neoverse V1 and later) begin
// four multiply-adds a cycle, each of which takes four cycles: 16 sums would just hide that, with nothing left for a
// late operand. The 20 of a step keep their pipes busy for five cycles, and the two pipes of smaller cores (Neoverse
// N1) for ten; its seven loads and five other instructions fit beside them in cores that begin eight or four
// instructions a cycle. Tiles of 8 x 2 have nine loads for 16, and those of 6 x 4 leave too few registers for A.
constexpr int kMR = 5, kNV = 4;
#else
constexpr int kMR = 4, kNV = 4;
#endif

static_assert(kMR <= 8 && kNV <= 4, "the micro-kernel must unroll its loops, so that C stays in registers");

constexpr int64_t kKC = 256;

// NR, the number of columns of a tile and of a packed panel of B: kNV vectors.
template <class S>
constexpr int64_t kNR = int64_t{kNV} * Vec<S>::size;

// Whether a KC x NR panel of B stays in the first-level cache beside MR rows of A. If so, matmul_block streams A past a
// panel, otherwise B past a group of rows.
template <class S>
constexpr bool kPanelInL1 = kKC * kNR<S> * sizeof(S) <= 16384;

template <class S>
constexpr cpu::Blocking kBlocking = {
    .mr = kMR,
    .nr = kNR<S>,
    .nc = 1024 / int64_t{sizeof(S)},
    .a_block_elements = (int64_t{1} << 20) / int64_t{sizeof(S)},
    .packed_b_elements = (int64_t{8} << 20) / int64_t{sizeof(S)},
    .in_place_row = 1024 / int64_t{sizeof(S)},
    .colliding_step = kPanelInL1<S> ? 128 / int64_t{sizeof(S)} : 0,
};

template <class S>
inline int64_t round_up_to_vector(int64_t n) {
  return (n + Vec<S>::size - 1) / Vec<S>::size * Vec<S>::size;
}

// The row length of a row-major operand with n columns: whole vectors, but not a multiple of 512 bytes, with which the
// rows of a panel would fall into a few sets of the first-level cache.
template <class S>
inline int64_t leading_dimension(int64_t n) {
  const int64_t padded = round_up_to_vector<S>(n);
  return padded % (512 / int64_t{sizeof(S)}) == 0 && padded > 0 ? padded + Vec<S>::size : padded;
}

template <class S>
struct OperandA {  // element (m, k) is data[m * row + k * step]
  const S* data;
  int64_t row, step;
};

template <class S>
struct OperandB {  // element (k, n) is data[(n / kNR) * panel + k * row + n % kNR]
  const S* data;
  int64_t row, panel;
};

// B as a row-major matrix, and as panels packed by pack_b.
template <class S>
inline OperandB<S> row_major(const S* data, int64_t leading) {
  return {data, leading, kNR<S>};
}
template <class S>
inline OperandB<S> panels(const S* data, int64_t depth) {
  return {data, kNR<S>, kNR<S> * depth};
}

// What happens to the sums of a tile before they are written to C, in this order; each may be null. The rows of the
// last three matrices lie as those of C.
template <class S>
struct TileEnd {
  const S* sums;  // added: those of the chunks of k before this one; may be C itself
  int64_t sums_row;
  const S* bias = nullptr;      // one row, added
  const S* factors = nullptr;   // multiplied
  const S* positive = nullptr;  // where an element is not positive, the sum becomes 0
  bool relu = false;
  const S* residual = nullptr;  // added
};

// The micro-kernel for a tile of M x N vectors. The fields of A are separate parameters: a structure would be passed on
// the stack, where it is stored in halves and loaded whole, which defeats store-to-load forwarding.
template <class S, int M, int N>
__attribute__((noinline)) void micro_kernel(int64_t depth, const S* a, int64_t a_row, int64_t a_step, const S* b,
                                            int64_t b_row, S* c, int64_t c_row, const TileEnd<S>& end) {
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
  const auto each = [&](const auto& f) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[m][n] = f(sum[m][n], m, n * V::size);
  };
  if (end.sums != nullptr) each([&](V x, int m, int n) { return x + V::load(end.sums + m * end.sums_row + n); });
  if (end.bias != nullptr) each([&](V x, int, int n) { return x + V::load(end.bias + n); });
  if (end.factors != nullptr) each([&](V x, int m, int n) { return x * V::load(end.factors + m * c_row + n); });
  if (end.positive != nullptr)
    each([&](V x, int m, int n) { return x.where_positive(V::load(end.positive + m * c_row + n)); });
  if (end.relu) each([&](V x, int, int) { return max(V::zero(), x); });
  if (end.residual != nullptr) each([&](V x, int m, int n) { return x + V::load(end.residual + m * c_row + n); });
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[m][n].store(c + m * c_row + n * V::size);
}

// Multiplies m <= kMR rows by N vectors of a panel.
template <class S, int N, int M = kMR>
inline void gemm_rows(int64_t m, int64_t depth, OperandA<S> a, const S* b, int64_t b_row, S* c, int64_t c_row,
                      const TileEnd<S>& end) {
  if constexpr (M > 1) {
    if (m < M) return gemm_rows<S, N, M - 1>(m, depth, a, b, b_row, c, c_row, end);
  }
  micro_kernel<S, M, N>(depth, a.data, a.row, a.step, b, b_row, c, c_row, end);
}

// Multiplies m <= kMR rows by n columns of a panel; n is a multiple of the vector size.
template <class S, int N = kNV>
inline void gemm_panel(int64_t m, int64_t n, int64_t depth, OperandA<S> a, const S* b, int64_t b_row, S* c,
                       int64_t c_row, const TileEnd<S>& end) {
  if constexpr (N > 1) {
    if (n < N * Vec<S>::size) return gemm_panel<S, N - 1>(m, n, depth, a, b, b_row, c, c_row, end);
  }
  gemm_rows<S, N>(m, depth, a, b, b_row, c, c_row, end);
}

// C (+)= A B. n is rounded up to whole vectors, for which the rows of B and C must have room.
template <class S>
inline void gemm(int64_t m, int64_t n, int64_t depth, OperandA<S> a, OperandB<S> b, S* c, int64_t c_row,
                 bool accumulate) {
  n = round_up_to_vector<S>(n);
  int64_t k = 0;
  do {  // runs once even for depth 0, which must still write C
    const int64_t chunk = std::min(kKC, depth - k);
    for (int64_t col = 0; col < n; col += kNR<S>) {
      const S* panel = b.data + col / kNR<S> * b.panel + k * b.row;
      for (int64_t row = 0; row < m; row += kMR) {
        S* const tile = c + row * c_row + col;
        gemm_panel<S>(std::min<int64_t>(kMR, m - row), std::min(kNR<S>, n - col), chunk,
                      {a.data + row * a.row + k * a.step, a.row, a.step}, panel, b.row, tile, c_row,
                      {accumulate || k > 0 ? tile : nullptr, c_row});
      }
    }
    k += chunk;
  } while (k < depth);
}

}  // namespace tinyllm::TINYLLM_ISA
