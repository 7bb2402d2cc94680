// Matmuls of whole tensors with a fused epilogue: bias, activation or its derivative, residual, and conversion to the
// tensor's dtype, applied while a tile is still in the first-level cache.
//
// The loops are those of BLIS (Van Zee & van de Geijn 2015). B is packed into panels first (matmul_pack_b), a block of
// columns at a time that all threads share, or with few rows a part at a time that one thread uses; a narrow row-major
// B serves without packing. Each thread then takes a block of C (matmul_block). Where a panel of B stays in the
// first-level cache, the block's rows of A pass it; elsewhere a KC x NC block of B, which stays in the second-level
// cache, passes a group of rows. The epilogue runs when the last chunk of the depth has been added to a tile, so that
// outputs are written once. A is read in place, unless it has 16-bit elements or its strides map what a tile reads to a
// few cache sets: then the block of A is packed as well.
//
// A matmul with few rows would spend more time on packing B than on multiplying. There, gemv computes each output as
// the dot product of a row of A and a column of B, both read in place; or of a row-major B gemv_by_rows adds up rows.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "activation.h"
#include "pack.h"
#include "prefetch.h"
#include "scratch.h"
#include "weight_storage.h"

namespace tinyllm::TINYLLM_ISA {

using cpu::Matmul;

template <class S>
constexpr int64_t kNC = kBlocking<S>.nc;

// A packed B of so many elements is prefetched: 4 MB of floats, measured on an AMD EPYC (Zen 3), where smaller ones
// lose as much by it as larger ones gain.
constexpr int64_t kFarElements = int64_t{1} << 20;

// The depth of a block of A that panels of B pass, if those stay in the first-level cache: a few hundred kilobytes.
constexpr int64_t kDepthBlock = 4 * kKC;

// Whether the micro-kernel can read A in place. Not if what a tile reads falls into a few sets of the first-level
// cache.
template <class T>
inline bool a_usable_unpacked(const Matmul& p) {
  if (!std::is_same_v<T, compute_t<T>>) return false;
  if (p.a.column == 1) return p.rows == 1 || p.a.row * int64_t{sizeof(T)} % cpu::kCollidingBytes != 0;
  return p.a.row == 1 && !kBlocking<compute_t<T>>.packs_transposed(p.a.column);
}

// A block of rows of A as the micro-kernel reads it, in place or packed. Groups of kMR rows begin `group` elements
// apart.
template <class S>
struct ABlock {
  const S* data;
  int64_t row, step, group;

  OperandA<S> at(int64_t first, int64_t k) const { return {data + first / kMR * group + k * step, row, step}; }
};

template <class T>
inline int64_t a_block_elements(const Matmul& p, int64_t rows) {
  if (a_usable_unpacked<T>(p)) return 0;
  const int64_t padded = (rows + kMR - 1) / kMR * kMR;
  return padded * (p.a.column == 1 ? leading_dimension<compute_t<T>>(p.depth) : p.depth);
}

template <class T>
inline ABlock<compute_t<T>> load_a_block(const Matmul& p, int64_t begin, int64_t end, compute_t<T>* buffer) {
  using S = compute_t<T>;
  const T* from = static_cast<const T*>(p.a.data) + begin * p.a.row;
  if constexpr (std::is_same_v<T, S>) {
    if (a_usable_unpacked<T>(p)) return {from, p.a.row, p.a.column, kMR * p.a.row};
  }
  if (p.a.column == 1) {
    const int64_t row = leading_dimension<S>(p.depth);
    pack_rows(from, p.a.row, 1, end - begin, p.depth, S(1), buffer, row);
    return {buffer, row, 1, kMR * row};
  }
  pack_a(from, p.a.row, p.a.column, end - begin, p.depth, buffer);
  return {buffer, 1, kMR, kMR * p.depth};
}

// Applies the epilogue to n columns of a row, from `column` on, and writes them to the output.
template <class T>
inline void epilogue(const Matmul& p, int64_t row, int64_t column, int64_t n, const compute_t<T>* sums) {
  using V = Vec<compute_t<T>>;
  const auto at = [&](const void* base) {
    return base == nullptr ? nullptr : static_cast<const T*>(base) + row * p.out_row + column;
  };
  const T* bias = p.bias == nullptr ? nullptr : static_cast<const T*>(p.bias) + column;
  const T *gate = at(p.gate), *residual = at(p.residual);
  T *slope = const_cast<T*>(at(p.slope)), *out = const_cast<T*>(at(p.out));
  const auto finish = [&](int64_t i, int64_t count) {
    V x = V::load(sums + i);
    if (bias != nullptr) x = x + load_n<V>(bias + i, count);
    if (gate != nullptr) {
      x = pass_gate(p.activation, load_n<V>(gate + i, count), x);
    } else if (slope != nullptr) {
      const auto both = activate_with_slope(p.activation, x);
      store_n(both.slope, slope + i, count);
      x = both.value;
    } else if (p.activation != Activation::none) {
      x = activate(p.activation, x);
    }
    if (residual != nullptr) x = x + load_n<V>(residual + i, count);
    store_n(x, out + i, count);
  };
  if (n == kNR<compute_t<T>>) {
#pragma GCC unroll 4
    for (int v = 0; v < kNV; ++v) finish(v * V::size, V::size);
  } else {
    for_each_vector<V>(n, finish);
  }
}

// Prefetches the lines that the epilogue of a tile reads and writes, while the tile is being computed.
template <class T>
inline void prefetch_epilogue(const Matmul& p, int64_t row, int64_t rows, int64_t column) {
  constexpr int64_t kLine = kCacheLine / int64_t{sizeof(T)};
  for (int64_t r = row; r < row + rows; ++r)
    for (int64_t c = column; c < column + kNR<compute_t<T>>; c += kLine) {
      const int64_t at = r * p.out_row + c;
      __builtin_prefetch(static_cast<const T*>(p.out) + at, 1);
      if (p.residual != nullptr) __builtin_prefetch(static_cast<const T*>(p.residual) + at);
      if (p.gate != nullptr) __builtin_prefetch(static_cast<const T*>(p.gate) + at);
    }
}

// Packs rows [row_begin, row_end) of columns [begin, end) of B into p.packed; begin is a multiple of kNR.
template <class T>
void matmul_pack_b(const Matmul& p, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end) {
  using S = compute_t<T>;
  if constexpr (std::is_same_v<T, float>) {
    if (p.weight != nullptr) return pack_weight(p, begin, end);
  }
  pack_b(static_cast<const T*>(p.b.data) + begin * p.b.column + row_begin * p.b.row, p.b.column, p.b.row, end - begin,
         row_end - row_begin, static_cast<S*>(p.packed) + begin * p.depth + row_begin * kNR<S>, kNR<S> * p.depth, S(1));
}

// Whether the micro-kernel itself can finish a tile of n columns: whole vectors of the compute type, and no activation
// but relu.
template <class T>
inline bool ends_in_registers(const Matmul& p, int64_t n) {
  const bool simple = p.gate != nullptr || p.activation == Activation::none || p.activation == Activation::relu;
  return std::is_same_v<T, compute_t<T>> && simple && p.slope == nullptr && n % Vec<compute_t<T>>::size == 0;
}

// Computes rows [begin, end) of columns [column_begin, column_end). B is packed, or else row-major and in the compute
// type.
template <class T>
void matmul_block(const Matmul& p, int64_t begin, int64_t end, int64_t column_begin, int64_t column_end) {
  using S = compute_t<T>;
  const int64_t rows = end - begin, padded = (rows + kMR - 1) / kMR * kMR;
  // Whether one chunk covers the depth, so that a tile is finished at once. Otherwise its sums wait in `sums`: those of
  // a panel together if the panels stay in the first-level cache, else those of a row.
  const bool single_chunk = p.depth <= kKC, single_block = p.depth <= kDepthBlock;
  constexpr int64_t kSumsRow = kPanelInL1<S> ? kNR<S> : kNC<S>;
  cpu::Arena sizes;
  const auto layout = [&](cpu::Arena& arena) {
    S* copy = arena.take<S>(a_block_elements<T>(p, rows));
    return std::pair(copy, arena.take<S>(single_chunk ? 0 : padded * (single_block ? kSumsRow : kNC<S>)));
  };
  layout(sizes);
  const cpu::Scratch scratch(sizes.used());
  cpu::Arena arena(scratch.data());
  const auto [copy, sums] = layout(arena);
  const ABlock<S> block = load_a_block<T>(p, begin, end, copy);
  alignas(64) S tile[kMR * kNR<S>];
  const auto sums_at = [&, sums = sums](int64_t offset) { return single_chunk ? nullptr : sums + offset; };
  // Multiplies a tile for the chunk of the depth that begins at k, and finishes it if this is the last one.
  const auto multiply = [&](int64_t first, int64_t column, int64_t k, S* tile_sums) {
    const int64_t m = std::min<int64_t>(kMR, rows - first), n = std::min(kNR<S>, column_end - column);
    const int64_t chunk = std::min(kKC, p.depth - k);
    const bool last = k + chunk == p.depth;
    const OperandB<S> b = p.packed == nullptr
                              ? row_major(static_cast<const S*>(p.b.data) + k * p.b.row + column, p.b.row)
                              : panels(static_cast<const S*>(p.packed) + column * p.depth + k * kNR<S>, chunk);
    if (last) prefetch_epilogue<T>(p, begin + first, m, column);
    if constexpr (std::is_same_v<T, S>) {
      if (last && ends_in_registers<T>(p, n)) {
        const int64_t at = (begin + first) * p.out_row + column;
        const auto from = [](const void* base, int64_t offset) {
          return base == nullptr ? nullptr : static_cast<const S*>(base) + offset;
        };
        const S* gate = from(p.gate, at);
        const bool relu = p.activation == Activation::relu;
        return gemm_panel<S>(m, n, chunk, block.at(first, k), b.data, b.row, static_cast<S*>(p.out) + at, p.out_row,
                             {k > 0 ? tile_sums : nullptr, kSumsRow, from(p.bias, column), relu ? nullptr : gate,
                              relu ? gate : nullptr, relu && gate == nullptr, from(p.residual, at)});
      }
    }
    S* c = single_chunk ? tile : tile_sums;
    const int64_t c_row = single_chunk ? kNR<S> : kSumsRow;
    gemm<S>(m, n, chunk, block.at(first, k), b, c, c_row, k > 0);
    if (!last) return;
    for (int64_t r = 0; r < m; ++r) epilogue<T>(p, begin + first + r, column, n, c + r * c_row);
  };
  // What the loops below multiply after the KC x NR part of packed B at (k, column), if B is so large that it comes
  // from far away: a panel is used up too soon for the hardware prefetcher to follow.
  const auto next_panel = [&](int64_t column, int64_t c1, int64_t k0, int64_t k, int64_t k1) {
    k = k + kKC < k1 ? k + kKC : k0;
    if (k == k0) column += kNR<S>;
    if (p.packed == nullptr || p.columns * p.depth < kFarElements || column >= c1)
      return RangePrefetcher(nullptr, 0, 1);
    return RangePrefetcher(static_cast<const S*>(p.packed) + column * p.depth + k * kNR<S>,
                           std::min(kKC, p.depth - k) * kNR<S> * int64_t{sizeof(S)}, padded / kMR);
  };
  for (int64_t c0 = column_begin; c0 < column_end; c0 += kNC<S>) {
    const int64_t c1 = std::min(c0 + kNC<S>, column_end);
    // These loops run once even for depth 0, where the epilogue must still write the output.
    if constexpr (kPanelInL1<S>) {
      int64_t k0 = 0;
      do {
        const int64_t k1 = std::min(k0 + kDepthBlock, p.depth);
        for (int64_t column = c0; column < c1; column += kNR<S>) {
          const int64_t panel = single_block ? 0 : (column - c0) * padded;
          int64_t k = k0;
          do {
            RangePrefetcher next = next_panel(column, c1, k0, k, k1);
            for (int64_t first = 0; first < rows; first += kMR) {
              next.prefetch_share();
              multiply(first, column, k, sums_at(panel + first * kSumsRow));
            }
            k += kKC;
          } while (k < k1);
        }
        k0 += kDepthBlock;
      } while (k0 < p.depth);
    } else {
      int64_t k = 0;
      do {
        for (int64_t first = 0; first < rows; first += kMR) {
          const int64_t next = std::clamp<int64_t>(rows - first - kMR, 0, kMR);
          RowPrefetcher<S> ahead(block.at(first + kMR, k), next, block.step == 1, std::min(kKC, p.depth - k),
                                 (c1 - c0 + kNR<S> - 1) / kNR<S>);
          for (int64_t column = c0; column < c1; column += kNR<S>) {
            if (single_chunk) ahead.prefetch_share();
            multiply(first, column, k, sums_at(first * kSumsRow + (column - c0)));
          }
        }
        k += kKC;
      } while (k < p.depth);
    }
  }
}

// Computes the dot products of M rows of A and N columns of B, in chunks of kKC as in gemm.h.
template <class T, int M, int N>
inline void gemv_tile(const Matmul& p, const T* a, const T* b, compute_t<T>* sums, int64_t sums_row) {
  using S = compute_t<T>;
  using V = Vec<S>;
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sums[m * sums_row + n] = S(0);
  for (int64_t k0 = 0; k0 < p.depth; k0 += kKC, a += kKC, b += kKC) {
    V sum[M][N];
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) sum[m][n] = V::zero();
    for_each_vector<V>(std::min(kKC, p.depth - k0), [&](int64_t k, int64_t count) {
      V vb[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) vb[n] = load_n<V>(b + n * p.b.column + k, count);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const V va = load_n<V>(a + m * p.a.row + k, count);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[m][n] = fma(va, vb[n], sum[m][n]);
      }
    });
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) sums[m * sums_row + n] += sum[m][n].sum();
  }
}

// Computes columns [begin, end) of a matmul with few rows; A and B are contiguous along the depth.
template <class T>
void gemv(const Matmul& p, int64_t begin, int64_t end) {
  using S = compute_t<T>;
  constexpr int64_t kColumns = 64;
  constexpr int kTileRows = 2, kTileColumns = 4;
  alignas(64) S sums[kTileRows * kColumns];
  for (int64_t c0 = begin; c0 < end; c0 += kColumns) {
    const int64_t columns = std::min(kColumns, end - c0);
    for (int64_t row = 0; row < p.rows; row += kTileRows) {
      const bool pair = p.rows - row >= kTileRows;
      const T* a = static_cast<const T*>(p.a.data) + row * p.a.row;
      int64_t c = 0;
      for (; c < columns; ++c) {
        const T* b = static_cast<const T*>(p.b.data) + (c0 + c) * p.b.column;
        if (columns - c >= kTileColumns) {
          pair ? gemv_tile<T, kTileRows, kTileColumns>(p, a, b, sums + c, kColumns)
               : gemv_tile<T, 1, kTileColumns>(p, a, b, sums + c, kColumns);
          c += kTileColumns - 1;
        } else {
          pair ? gemv_tile<T, kTileRows, 1>(p, a, b, sums + c, kColumns)
               : gemv_tile<T, 1, 1>(p, a, b, sums + c, kColumns);
        }
      }
      for (int64_t r = 0; r < (pair ? kTileRows : 1); ++r) epilogue<T>(p, row + r, c0, columns, sums + r * kColumns);
    }
  }
}

// Adds N rows of B, each times an element of A, to `columns` sums of M rows, which lie sums_row apart.
template <class T, int M, int N>
inline void add_rows(const T* const (&rows)[N], const compute_t<T> (&factors)[M][N], int64_t columns,
                     compute_t<T>* sums, int64_t sums_row) {
  using V = Vec<compute_t<T>>;
  for_each_vector<V>(columns, [&](int64_t c, int64_t count) {
    V b[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) b[n] = load_n<V>(rows[n] + c, count);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      V sum = V::zero();
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum = fma(V::set1(factors[m][n]), b[n], sum);
      compute_t<T>* const to = sums + m * sums_row + c;
      store_n(load_n<V>(to, count) + sum, to, count);
    }
  });
}

// Computes columns [begin, end) of M rows, or fewer where so many are left. Rows of B come from N streams that lie far
// apart (see weight_kernel.h), while the sums stay in the first-level cache.
template <class T, int M, int N>
TINYLLM_FLATTEN void gemv_rows(const Matmul& p, int64_t row, int64_t begin, int64_t end) {
  using S = compute_t<T>;
  constexpr int64_t kColumns = 1024;
  alignas(64) S sums[M * kColumns];
  const int64_t length = p.depth / N, count = std::min<int64_t>(M, p.rows - row);
  const T* a[M];
  for (int64_t m = 0; m < M; ++m) a[m] = static_cast<const T*>(p.a.data) + (row + std::min(m, count - 1)) * p.a.row;
  for (int64_t c0 = begin; c0 < end; c0 += kColumns) {
    const int64_t columns = std::min(kColumns, end - c0);
    const T* const b = static_cast<const T*>(p.b.data) + c0;
    std::fill_n(sums, M * kColumns, S(0));
    for (int64_t k = 0; k < length; ++k) {
      const T* rows[N];
      S factors[M][N];
      for (int64_t n = 0; n < N; ++n) {
        rows[n] = b + (n * length + k) * p.b.row;
        for (int64_t m = 0; m < M; ++m) factors[m][n] = to_compute(a[m][n * length + k]);
      }
      add_rows<T, M, N>(rows, factors, columns, sums, kColumns);
    }
    for (int64_t k = N * length; k < p.depth; ++k) {
      S factors[M][1];
      for (int64_t m = 0; m < M; ++m) factors[m][0] = to_compute(a[m][k]);
      add_rows<T, M, 1>({b + k * p.b.row}, factors, columns, sums, kColumns);
    }
    for (int64_t m = 0; m < count; ++m) epilogue<T>(p, row + m, c0, columns, sums + m * kColumns);
  }
}

// Computes columns [begin, end) of a matmul with few rows whose B is row-major, as sums of its rows. Each sum has the
// order of the depth that N streams give it, whatever the number of rows.
template <class T>
void gemv_by_rows(const Matmul& p, int64_t begin, int64_t end) {
  if (p.rows == 1) return gemv_rows<T, 1, 4>(p, 0, begin, end);
  if (p.rows == 2) return gemv_rows<T, 2, 4>(p, 0, begin, end);
  if (p.rows <= 4) return gemv_rows<T, 4, 4>(p, 0, begin, end);
  for (int64_t row = 0; row < p.rows; row += 8) gemv_rows<T, 8, 4>(p, row, begin, end);
}

// Sums columns [begin, end) over the rows of a row-major matrix, in blocks of rows, in row order. A block has about as
// many rows as there are blocks, which keeps both levels of sums short and thus their rounding errors small.
template <class T>
void column_sums(const cpu::ColumnSums& p, int64_t begin, int64_t end) {
  using S = compute_t<T>;
  using V = Vec<S>;
  const T* data = static_cast<const T*>(p.data);
  constexpr int64_t kStrip = 4 * V::size;
  const int64_t block = std::max<int64_t>(32, static_cast<int64_t>(std::sqrt(static_cast<double>(p.rows))));
  for (int64_t c0 = begin; c0 < end; c0 += kStrip) {
    const int64_t columns = std::min(kStrip, end - c0);
    S totals[kStrip] = {};
    for (int64_t r0 = 0; r0 < p.rows; r0 += block) {
      const int64_t r1 = std::min(p.rows, r0 + block);
      if (columns == kStrip) {
        V sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
        for (int64_t r = r0; r < r1; ++r)
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) sum[j] = sum[j] + V::load(data + r * p.row + c0 + j * V::size);
        for (int j = 0; j < 4; ++j) (V::load(totals + j * V::size) + sum[j]).store(totals + j * V::size);
      } else {
        for (int64_t c = 0; c < columns; ++c) {
          S sum = 0;
          for (int64_t r = r0; r < r1; ++r) sum += to_compute(data[r * p.row + c0 + c]);
          totals[c] += sum;
        }
      }
    }
    for (int64_t c = 0; c < columns; ++c) from_compute(totals[c], static_cast<T*>(p.out)[c0 + c]);
  }
}

}  // namespace tinyllm::TINYLLM_ISA
