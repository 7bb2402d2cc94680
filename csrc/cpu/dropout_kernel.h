// out = input * factors + residual, with the factors of counter-based dropout (random_kernel.h).
#pragma once
#include "kernel_args.h"
#include "random_kernel.h"
#include "simd.h"

namespace tinyllm::TINYLLM_ISA {

// Computes the factors of the n <= kRandomBlock columns of a row from `first` on, a multiple of kRandomBlock.
template <class S>
inline void block_factors(const cpu::Dropout& dropout, int64_t row, int64_t size, int64_t first, int64_t n,
                          S* factors) {
  dropout_factors(dropout, static_cast<uint64_t>(row * random_row(size) + first), n, factors);
}

template <class T>
void dropped_sum(const cpu::DroppedSum& a, int64_t begin, int64_t end) {
  using S = compute_t<T>;
  using V = Vec<S>;
  alignas(64) S factors[kRandomBlock];
  for (int64_t row = begin; row < end; ++row)
    for (int64_t first = 0; first < a.size; first += kRandomBlock) {
      const int64_t width = std::min(kRandomBlock, a.size - first), at = row * a.size + first;
      const T *input = static_cast<const T*>(a.input) + at,
              *residual = a.residual == nullptr ? nullptr : static_cast<const T*>(a.residual) + at;
      T* out = static_cast<T*>(a.out) + at;
      block_factors(a.dropout, row, a.size, first, width, factors);
      for_each_vector<V>(width, [&](int64_t i, int64_t n) {
        V x = load_n<V>(input + i, n) * V::load(factors + i);
        if (residual != nullptr) x = x + load_n<V>(residual + i, n);
        store_n(x, out + i, n);
      });
    }
}

}  // namespace tinyllm::TINYLLM_ISA
