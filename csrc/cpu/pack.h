// Copies between tensors of any strides and element type and the layouts that gemm.h multiplies.
#pragma once
#include <algorithm>

#include "gemm.h"

namespace tinyllm::TINYLLM_ISA {

// rows x columns into padded row-major order, times `factor`, zeros in the padding.
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

// One vector's width of a panel: n <= Vec::size columns, zeros in the rest.
template <class T>
inline void pack_strip(const T* from, int64_t column_stride, int64_t row_stride, int64_t n, int64_t depth,
                       compute_t<T>* to) {
  using S = compute_t<T>;
  using V = Vec<S>;
  constexpr int64_t width = kPanel<S>;
  if (n == 0 || column_stride == 1) {
    for (int64_t k = 0; k < depth; ++k)
      (n == 0 ? V::zero() : load_n<V>(from + k * row_stride, n)).store(to + k * width);
  } else if (row_stride == 1) {
    // Squares of Vec::size rows are read along their rows and turned in registers.
    for_each_vector<V>(depth, [&](int64_t k, int64_t rows) {
      V square[V::size];
      for (int64_t i = 0; i < V::size; ++i)
        square[i] = i < n ? load_n<V>(from + i * column_stride + k, rows) : V::zero();
      transpose(square);
      for (int64_t i = 0; i < rows; ++i) square[i].store(to + (k + i) * width);
    });
  } else {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t i = 0; i < V::size; ++i)
        to[k * width + i] = i < n ? to_compute(from[i * column_stride + k * row_stride]) : S(0);
  }
}

// The matrix B that gemm.h multiplies with, from a tensor of any strides and element type: element (k, n) at
// from[n * column_stride + k * row_stride] for n < columns, k < depth, in panels of kPanel columns, each stored whole,
// zeros beyond the last column.
template <class T>
inline void pack_panels(const T* from, int64_t column_stride, int64_t row_stride, int64_t columns, int64_t depth,
                        compute_t<T>* to) {
  using S = compute_t<T>;
  using V = Vec<S>;
  constexpr int64_t width = kPanel<S>;
  for (int64_t first = 0; first < columns; first += width, to += width * depth)
    for (int64_t c = 0; c < width; c += V::size) {
      const int64_t n = std::clamp<int64_t>(columns - first - c, 0, V::size);
      pack_strip(from + (first + c) * column_stride, column_stride, row_stride, n, depth, to + c);
    }
}

// Padded row-major order back into a tensor.
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
