// The weights of tokens that are drawn: exponentials of their scores.
#pragma once
#include <algorithm>

#include "vector_math.h"

namespace tinyllm::TINYLLM_ISA {

// Replaces x by exp(x - most), for x <= most, and returns the sum, accumulated in double precision.
inline double exponentials(float* x, int64_t n, float most) {
  using V = Vec<float>;
  constexpr int64_t kBlock = 1024;
  double sum = 0;
  for (int64_t i0 = 0; i0 < n; i0 += kBlock) {
    const int64_t count = std::min(kBlock, n - i0);
    V part = V::zero();
    for_each_vector<V>(count, [&](int64_t i, int64_t inside) {
      const V e = V::first(exp(load_n<V>(x + i0 + i, inside) - V::set1(most)), inside, V::zero());
      store_n(e, x + i0 + i, inside);
      part = part + e;
    });
    sum += static_cast<double>(part.sum());
  }
  return sum;
}

}  // namespace tinyllm::TINYLLM_ISA
