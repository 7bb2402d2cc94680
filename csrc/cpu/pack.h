// Packing: copies between tensors of any strides and element type and the layouts that gemm.h multiplies.
#pragma once
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "gemm.h"

namespace tinyllm::TINYLLM_ISA {

// Copies a (rows, columns) matrix, times `factor`, to row-major order with rows `leading` apart, and zeros the padding.
template <class T>
inline void pack_rows(const T* from, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns,
                      compute_t<T> factor, compute_t<T>* to, int64_t leading) {
  using S = compute_t<T>;
  using V = Vec<S>;
  const V vfactor = V::set1(factor);
  for (int64_t r = 0; r < rows; ++r, from += row_stride, to += leading) {
    if (column_stride == 1)
      for_each_vector<V>(columns, [&](int64_t i, int64_t n) { (load_n<V>(from + i, n) * vfactor).store(to + i); });
    else
      for (int64_t i = 0; i < columns; ++i) to[i] = to_compute(from[i * column_stride]) * factor;
    std::fill(to + columns, to + leading, S(0));
  }
}

// Packs as many columns as a vector has elements, one vector of the width of a panel: column(i, k, n) is column i from
// row k on, of which n elements are wanted. Squares are transposed in registers.
template <class V, class S, class F>
inline void pack_squares(int64_t depth, S* to, F&& column) {
  for_each_vector<V>(depth, [&](int64_t k, int64_t rows) {
    V square[V::size];
    for (int64_t i = 0; i < V::size; ++i) square[i] = column(i, k, rows);
    transpose(square);
    for (int64_t i = 0; i < rows; ++i) square[i].store(to + (k + i) * kNR<S>);
  });
}

// Packs n <= Vec::size columns, one vector of the width of a panel, times `factor`, and zeros the rest of the vector.
template <class T>
inline void pack_strip(const T* from, int64_t column_stride, int64_t row_stride, int64_t n, int64_t depth,
                       compute_t<T> factor, compute_t<T>* to) {
  using S = compute_t<T>;
  using V = Vec<S>;
  constexpr int64_t width = kNR<S>;
  if (n == 0) {
    for (int64_t k = 0; k < depth; ++k) V::zero().store(to + k * width);
  } else if (row_stride == 1) {
    pack_squares<V>(depth, to, [&](int64_t i, int64_t k, int64_t rows) {
      return i < n ? load_n<V>(from + i * column_stride + k, rows) * V::set1(factor) : V::zero();
    });
  } else {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t i = 0; i < V::size; ++i)
        to[k * width + i] = i < n ? to_compute(from[i * column_stride + k * row_stride]) * factor : S(0);
  }
}

// Packs B into panels of kNR columns, each stored consecutively row by row, so that the micro-kernel reads whole
// vectors of a single stream. Element (k, n) is from[n * column_stride + k * row_stride] * factor; columns beyond the
// last one are zeros. Panels begin `panel` elements apart.
template <class T>
inline void pack_b(const T* from, int64_t column_stride, int64_t row_stride, int64_t columns, int64_t depth,
                   compute_t<T>* to, int64_t panel, compute_t<T> factor) {
  using S = compute_t<T>;
  using V = Vec<S>;
  constexpr int64_t width = kNR<S>;
  if (column_stride == 1) {
    // A few rows at a time: each is read from its begin to its end, and each panel receives a few whole lines.
    constexpr int64_t kRows = 8;
    for (int64_t k0 = 0; k0 < depth; k0 += kRows)
      for (int64_t first = 0; first < columns; first += width)
        for (int64_t k = k0; k < std::min(k0 + kRows, depth); ++k) {
          const T* row = from + k * row_stride + first;
          S* out = to + first / width * panel + k * width;
#pragma GCC unroll 4
          for (int64_t c = 0; c < width; c += V::size) {
            const int64_t n = std::clamp<int64_t>(columns - first - c, 0, V::size);
            (n == 0 ? V::zero() : load_n<V>(row + c, n) * V::set1(factor)).store(out + c);
          }
        }
    return;
  }
  for (int64_t first = 0; first < columns; first += width, to += panel)
    for (int64_t c = 0; c < width; c += V::size) {
      const int64_t n = std::clamp<int64_t>(columns - first - c, 0, V::size);
      pack_strip(from + (first + c) * column_stride, column_stride, row_stride, n, depth, factor, to + c);
    }
}

// Packs all of B, times `factor`.
template <class T>
inline void pack_b(const T* from, int64_t column_stride, int64_t row_stride, int64_t columns, int64_t depth,
                   compute_t<T>* to, compute_t<T> factor = 1) {
  pack_b(from, column_stride, row_stride, columns, depth, to, kNR<compute_t<T>> * depth, factor);
}

// Packs rows of A in groups of kMR, interleaved, so that the micro-kernel reads them consecutively: element (m, k) goes
// to to[m / kMR * kMR * depth + k * kMR + m % kMR]. Places beyond the last row are left as they are, because no tile
// reads them.
template <class T>
inline void pack_a(const T* from, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t depth,
                   compute_t<T>* to) {
  constexpr int64_t kStep = 16;  // a cache line that one group reads is still cached for the next one
  for (int64_t k0 = 0; k0 < depth; k0 += kStep)
    for (int64_t first = 0; first < rows; first += kMR) {
      const int64_t count = std::min<int64_t>(kMR, rows - first);
      const bool whole = std::is_same_v<T, compute_t<T>> && row_stride == 1 && count == kMR;
      for (int64_t k = k0; k < std::min(k0 + kStep, depth); ++k) {
        const T* group = from + first * row_stride + k * column_stride;
        compute_t<T>* out = to + first * depth + k * kMR;
        if (whole)
          std::memcpy(out, group, kMR * sizeof(T));
        else
          for (int64_t m = 0; m < count; ++m) out[m] = to_compute(group[m * row_stride]);
      }
    }
}

// Copies a padded row back into a tensor, times `factor`.
template <class T>
inline void unpack_row(const compute_t<T>* from, compute_t<T> factor, int64_t columns, T* to, int64_t column_stride) {
  using V = Vec<compute_t<T>>;
  const V vfactor = V::set1(factor);
  if (column_stride == 1)
    for_each_vector<V>(columns, [&](int64_t i, int64_t n) { store_n(V::load(from + i) * vfactor, to + i, n); });
  else
    for (int64_t i = 0; i < columns; ++i) from_compute(from[i] * factor, to[i * column_stride]);
}

}  // namespace tinyllm::TINYLLM_ISA
