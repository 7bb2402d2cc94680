// Rotary position embedding (Su et al. 2021): queries and keys are rotated by angles that grow with their position.
// Each element is read and written once.
#pragma once
#include <algorithm>

#include "kernel_args.h"
#include "simd.h"

namespace tinyllm::TINYLLM_ISA {

// Processes tokens [begin, end) of all sequences.
template <class T>
TINYLLM_FLATTEN void rotary(const cpu::Rotary& a, int64_t begin, int64_t end) {
  using S = compute_t<T>;
  using V = Vec<S>;
  const int64_t half = a.rotated / 2;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / a.tokens, t = token % a.tokens, angle = b * a.angle_batch + t * a.angle_row;
    const S *cos = static_cast<const S*>(a.cos) + angle, *sin = static_cast<const S*>(a.sin) + angle;
    const T* x = static_cast<const T*>(a.input.data) + b * a.input.batch + t * a.input.row;
    T* out = static_cast<T*>(a.out.data) + b * a.out.batch + t * a.out.row;
    for (int64_t h = 0; h < a.heads; ++h, x += a.input.head, out += a.out.head) {
      for_each_vector<V>(half, [&](int64_t i, int64_t n) {
        const V first = load_n<V>(x + i, n), second = load_n<V>(x + half + i, n);
        V to_first = load_n<V>(sin + i, n), to_second = load_n<V>(sin + half + i, n);
        if (a.inverse) {
          const V before = to_first;
          to_first = V::zero() - to_second;
          to_second = V::zero() - before;
        }
        store_n(first * load_n<V>(cos + i, n) - second * to_first, out + i, n);
        store_n(fma(first, to_second, second * load_n<V>(cos + half + i, n)), out + half + i, n);
      });
      if (out != x) std::copy(x + a.rotated, x + a.head_dim, out + a.rotated);
    }
  }
}

}  // namespace tinyllm::TINYLLM_ISA
