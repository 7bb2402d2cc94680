// Matrix products of whole tensors, with what follows them done while a tile is still in the first-level cache: bias,
// activation or its derivative, the addition of a residual, conversion to the tensor's type.
//
// B is packed into panels first (pack_product), a block of columns at a time that all threads then share; a narrow
// row-major B is as good as a panel already. Each thread
// takes a slab of rows (product_part) and goes through blocks of kDepth x kTogether of B that stay in its second-level
// cache; what follows the product is done where a tile's last chunk has been added, and written once. A is read where
// it is, unless its strides would map its rows to a few cache sets or its type is a 16-bit one: then the slab is
// copied.
//
// A product of few rows would spend more on packing than on multiplying: there each output is a dot product of a row of
// A and a column of B read in place (product_dots).
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "activation.h"
#include "pack.h"

namespace tinyllm::TINYLLM_ISA {

using cpu::Product;

// Columns that are worked on together: kDepth rows of so many stay in a second-level cache, with as much of A beside.
template <class S>
constexpr int64_t kTogether = 256 * 4 / int64_t{sizeof(S)};

// Whether a panel stays in the first-level cache with a group of A's rows beside; then A goes by, and otherwise B.
template <class S>
constexpr bool kPanelStays = kDepth * kPanel<S> * sizeof(S) <= 16384;

// Whether tiles can broadcast from A as it lies in memory: not where what a tile reads falls into a few sets of the
// first-level cache, which addresses 4096 bytes apart share.
template <class T>
inline bool read_in_place(const Product& p) {
  if (!std::is_same_v<T, compute_t<T>>) return false;
  if (p.a.column == 1) return p.rows == 1 || p.a.row * int64_t{sizeof(T)} % 4096 != 0;
  return p.a.row == 1 && p.a.column * int64_t{sizeof(T)} <= 1024;
}

// Rows of A in groups of kRows, side by side in a group: element (m, k) at to[m / kRows * kRows * depth + k * kRows +
// m % kRows]. What lies beyond the last row is left as it is: no tile reads it.
template <class T>
inline void pack_groups(const T* from, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t depth,
                        compute_t<T>* to) {
  constexpr int64_t kTogether = 16;  // so that lines read for one group are still there for the next
  for (int64_t k0 = 0; k0 < depth; k0 += kTogether)
    for (int64_t first = 0; first < rows; first += kRows) {
      const int64_t count = std::min<int64_t>(kRows, rows - first);
      const bool whole = std::is_same_v<T, compute_t<T>> && row_stride == 1 && count == kRows;
      for (int64_t k = k0; k < std::min(k0 + kTogether, depth); ++k) {
        const T* group = from + first * row_stride + k * column_stride;
        compute_t<T>* out = to + first * depth + k * kRows;
        if (whole)
          std::memcpy(out, group, kRows * sizeof(T));
        else
          for (int64_t m = 0; m < count; ++m) out[m] = to_compute(group[m * row_stride]);
      }
    }
}

// The slab [begin, end) of A as tiles read it. Groups of kRows rows start kRows * step apart.
template <class S>
struct Slab {
  const S* data;
  int64_t row, step, group;

  OperandA<S> at(int64_t first, int64_t k) const { return {data + first / kRows * group + k * step, row, step}; }
};

template <class T>
inline int64_t slab_elements(const Product& p, int64_t rows) {
  if (read_in_place<T>(p)) return 0;
  const int64_t padded = (rows + kRows - 1) / kRows * kRows;
  return padded * (p.a.column == 1 ? leading_dimension<compute_t<T>>(p.depth) : p.depth);
}

template <class T>
inline Slab<compute_t<T>> load_slab(const Product& p, int64_t begin, int64_t end, compute_t<T>* buffer) {
  using S = compute_t<T>;
  const T* from = static_cast<const T*>(p.a.data) + begin * p.a.row;
  if constexpr (std::is_same_v<T, S>) {
    if (read_in_place<T>(p)) return {from, p.a.row, p.a.column, kRows * p.a.row};
  }
  if (p.a.column == 1) {
    const int64_t row = leading_dimension<S>(p.depth);
    pack_rows(from, p.a.row, 1, end - begin, p.depth, S(1), buffer, row);
    return {buffer, row, 1, kRows * row};
  }
  pack_groups(from, p.a.row, p.a.column, end - begin, p.depth, buffer);
  return {buffer, 1, kRows, kRows * p.depth};
}

// The lines of the next group's rows, asked for in equal shares while this group's panels are multiplied: where the
// rows are short, a tile that walks along kRows of them leaves each too soon for the processor to see where it goes.
// Into the second-level cache, since the panels fill the first.
template <class S>
class Lines {
 public:
  Lines(OperandA<S> a, int64_t rows, bool row_major, int64_t depth, int64_t shares)
      : data_(a.data), row_(a.row), depth_(depth), rows_(row_major ? rows : 0) {
    share_ = (depth * rows_ / kLine + shares - 1) / std::max<int64_t>(1, shares);
  }
  void prefetch() {
    for (int64_t left = share_; left > 0 && rows_ > 0; --left) {
      __builtin_prefetch(data_ + at_, 0, 2);
      at_ += kLine;
      if (at_ < depth_) continue;
      at_ = 0;
      data_ += row_;
      --rows_;
    }
  }

 private:
  static constexpr int64_t kLine = 64 / int64_t{sizeof(S)};
  const S* data_;
  int64_t row_, depth_, rows_, share_, at_ = 0;
};

// What follows the product: n columns, from `column` on, of a row.
template <class T>
inline void finish_row(const Product& p, int64_t row, int64_t column, int64_t n, const compute_t<T>* sums) {
  using V = Vec<compute_t<T>>;
  const auto at = [&](const void* base) {
    return base == nullptr ? nullptr : static_cast<const T*>(base) + row * p.out_row + column;
  };
  const T* bias = p.bias == nullptr ? nullptr : static_cast<const T*>(p.bias) + column;
  const T *gate = at(p.gate), *residual = at(p.residual);
  T *pre = const_cast<T*>(at(p.pre_activation)), *out = const_cast<T*>(at(p.out));
  const auto finish = [&](int64_t i, int64_t count) {
    V x = V::load(sums + i);
    if (bias != nullptr) x = x + load_n<V>(bias + i, count);
    if (pre != nullptr) store_n(x, pre + i, count);
    if (gate != nullptr)
      x = activation_grad(p.activation, load_n<V>(gate + i, count), x);
    else if (p.activation != Activation::none)
      x = activate(p.activation, x);
    if (residual != nullptr) x = x + load_n<V>(residual + i, count);
    store_n(x, out + i, count);
  };
  if (n == kPanel<compute_t<T>>) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) finish(v * V::size, V::size);
  } else {
    for_each_vector<V>(n, finish);
  }
}

// Asks for the lines that finish_row will touch, while the product is still being computed.
template <class T>
inline void prefetch_rows(const Product& p, int64_t row, int64_t rows, int64_t column) {
  constexpr int64_t kLine = 64 / int64_t{sizeof(T)};
  for (int64_t r = row; r < row + rows; ++r)
    for (int64_t c = column; c < column + kPanel<compute_t<T>>; c += kLine) {
      const int64_t at = r * p.out_row + c;
      __builtin_prefetch(static_cast<const T*>(p.out) + at, 1);
      if (p.residual != nullptr) __builtin_prefetch(static_cast<const T*>(p.residual) + at);
      if (p.gate != nullptr) __builtin_prefetch(static_cast<const T*>(p.gate) + at);
    }
}

// Columns [begin, end) of B into p.packed; begin is a multiple of kPanel.
template <class T>
void pack_product(const Product& p, int64_t begin, int64_t end) {
  using S = compute_t<T>;
  pack_panels(static_cast<const T*>(p.b.data) + begin * p.b.column, p.b.column, p.b.row, end - begin, p.depth,
              static_cast<S*>(p.packed) + begin * p.depth);
}

// Rows [begin, end) of columns [column_begin, column_end). B is packed, or in the compute type, its columns contiguous.
template <class T>
void product_part(const Product& p, int64_t begin, int64_t end, int64_t column_begin, int64_t column_end) {
  using S = compute_t<T>;
  const int64_t rows = end - begin;
  const bool whole = p.depth <= kDepth;  // a tile is finished at once; else its sums wait in `sums`
  cpu::Arena counted;
  const auto carve = [&](cpu::Arena& arena) {
    S* copy = arena.take<S>(slab_elements<T>(p, rows));
    return std::pair(copy, arena.take<S>(whole ? 0 : rows * kTogether<S>));
  };
  carve(counted);
  const cpu::Scratch scratch(counted.used());
  cpu::Arena arena(scratch.data());
  const auto [copy, sums] = carve(arena);
  const Slab<S> slab = load_slab<T>(p, begin, end, copy);
  alignas(64) S tile[kRows * kPanel<S>];
  for (int64_t c0 = column_begin; c0 < column_end; c0 += kTogether<S>) {
    const int64_t c1 = std::min(c0 + kTogether<S>, column_end);
    int64_t k = 0;
    do {  // once for depth 0, which must still write out
      const int64_t chunk = std::min(kDepth, p.depth - k);
      const bool last = k + chunk == p.depth;
      const auto multiply = [&, sums = sums](int64_t first, int64_t m, int64_t column) {
        const int64_t n = std::min(kPanel<S>, c1 - column);
        const OperandB<S> b = p.packed == nullptr
                                  ? row_major(static_cast<const S*>(p.b.data) + k * p.b.row + column, p.b.row)
                                  : panels(static_cast<const S*>(p.packed) + column * p.depth + k * kPanel<S>, chunk);
        S* c = whole ? tile : sums + first * kTogether<S> + (column - c0);
        const int64_t c_row = whole ? kPanel<S> : kTogether<S>;
        gemm<S>(m, n, chunk, slab.at(first, k), b, c, c_row, k > 0);
        if (!last) return;
        for (int64_t r = 0; r < m; ++r) finish_row<T>(p, begin + first + r, column, n, c + r * c_row);
      };
      if constexpr (kPanelStays<S>) {
        for (int64_t column = c0; column < c1; column += kPanel<S>)
          for (int64_t first = 0; first < rows; first += kRows) {
            const int64_t m = std::min<int64_t>(kRows, rows - first);
            if (whole) prefetch_rows<T>(p, begin + first, m, column);
            multiply(first, m, column);
          }
      } else {
        for (int64_t first = 0; first < rows; first += kRows) {
          const int64_t m = std::min<int64_t>(kRows, rows - first), next = std::min<int64_t>(kRows, rows - first - m);
          Lines<S> ahead(slab.at(first + kRows, k), next, slab.step == 1, chunk, (c1 - c0 + kPanel<S> - 1) / kPanel<S>);
          for (int64_t column = c0; column < c1; column += kPanel<S>) {
            if (whole) {
              prefetch_rows<T>(p, begin + first, m, column);
              ahead.prefetch();
            }
            multiply(first, m, column);
          }
        }
      }
      k += chunk;
    } while (k < p.depth);
  }
}

// Dot products of M rows of A and N columns of B, both contiguous along the depth, in chunks of kDepth as in gemm.h.
template <class T, int M, int N>
inline void dots(const Product& p, const T* a, const T* b, compute_t<T>* sums, int64_t sums_row) {
  using S = compute_t<T>;
  using V = Vec<S>;
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sums[m * sums_row + n] = S(0);
  for (int64_t k0 = 0; k0 < p.depth; k0 += kDepth, a += kDepth, b += kDepth) {
    V sum[M][N];
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) sum[m][n] = V::zero();
    for_each_vector<V>(std::min(kDepth, p.depth - k0), [&](int64_t k, int64_t count) {
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

// Columns [begin, end) of a product of few rows whose A and B are contiguous along the depth.
template <class T>
void product_dots(const Product& p, int64_t begin, int64_t end) {
  using S = compute_t<T>;
  constexpr int64_t kColumns = 64;
  constexpr int kTogetherRows = 2, kTogetherColumns = 4;
  alignas(64) S sums[kTogetherRows * kColumns];
  for (int64_t c0 = begin; c0 < end; c0 += kColumns) {
    const int64_t columns = std::min(kColumns, end - c0);
    for (int64_t row = 0; row < p.rows; row += kTogetherRows) {
      const bool pair = p.rows - row >= kTogetherRows;
      const T* a = static_cast<const T*>(p.a.data) + row * p.a.row;
      int64_t c = 0;
      for (; c < columns; ++c) {
        const T* b = static_cast<const T*>(p.b.data) + (c0 + c) * p.b.column;
        if (columns - c >= kTogetherColumns) {
          pair ? dots<T, kTogetherRows, kTogetherColumns>(p, a, b, sums + c, kColumns)
               : dots<T, 1, kTogetherColumns>(p, a, b, sums + c, kColumns);
          c += kTogetherColumns - 1;
        } else {
          pair ? dots<T, kTogetherRows, 1>(p, a, b, sums + c, kColumns) : dots<T, 1, 1>(p, a, b, sums + c, kColumns);
        }
      }
      for (int64_t r = 0; r < (pair ? kTogetherRows : 1); ++r)
        finish_row<T>(p, row + r, c0, columns, sums + r * kColumns);
    }
  }
}

// out[begin, end) = the sums of these columns of a row-major matrix, each in blocks of rows, in row order. Blocks are
// as long as there are blocks, which keeps both the sums and the sum of the sums short: roundings grow with their
// length.
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
