// Exponentials and logarithms of vectors, with the ranges and the accuracy that softmax needs.
#pragma once
#include <cmath>

#include "simd.h"

namespace tinyllm::TINYLLM_ISA {

#if !defined(TINYLLM_SCALAR)

// e^x for the x <= 0 of a softmax, to about one unit in the last place: x = n ln2 + r with |r| <= ln2 / 2 (Cephes'
// reduction), then e^r by a polynomial. Results below the normal numbers are 0; NaN stays NaN.
inline Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  x = max(V::set1(-88.0296919f), x);
  x = min(V::set1(88.3762626f), x);
  const V shift = V::set1(0x1.8p23f);
  const V shifted = fma(x, V::set1(1.44269504f), shift);
  const V n = shifted - shift;
  V r = fma(n, V::set1(-0.693359375f), x);
  r = fma(n, V::set1(2.12194440e-4f), r);
  V p = V::set1(1.9875691500e-4f);
  p = fma(p, r, V::set1(1.3981999507e-3f));
  p = fma(p, r, V::set1(8.3334519073e-3f));
  p = fma(p, r, V::set1(4.1665795894e-2f));
  p = fma(p, r, V::set1(1.6666665459e-1f));
  p = fma(p, r, V::set1(5.0000001201e-1f));
  p = fma(p * r, r, r + V::set1(1.0f));
  return p * V::pow2(shifted);
}

// 2^x for the x <= 0 of a softmax whose scores are scaled by log2(e), to 1.5 units in the last place: x = n + r with
// |r| <= 1/2, then 2^r by the polynomial of degree 5 with the least relative error that is exactly 1 at 0. Results
// below the normal numbers are 0; NaN stays NaN.
inline Vec<float> exp2(Vec<float> x) {
  using V = Vec<float>;
  x = max(V::set1(-127.0f), x);
  const V shift = V::set1(0x1.8p23f);
  const V shifted = x + shift;
  const V r = x - (shifted - shift);
  V p = V::set1(0x1.5bba14p-10f);
  p = fma(p, r, V::set1(0x1.3cea88p-7f));
  p = fma(p, r, V::set1(0x1.c6b752p-5f));
  p = fma(p, r, V::set1(0x1.ebf9bcp-3f));
  p = fma(p, r, V::set1(0x1.62e42ap-1f));
  p = fma(p, r, V::set1(1.0f));
  return p * V::pow2(shifted);
}

// e^r 2^n for |r| <= ln2 / 2; n is given as for pow2.
inline Vec<double> exp_reduced(Vec<double> r, Vec<double> shifted) {
  using V = Vec<double>;
  // The Taylor series up to r^13 / 13!; the first omitted term is below 4e-18.
  V p = V::set1(1.0 / 6227020800.0);
  for (const double c : {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
                         1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0})
    p = fma(p, r, V::set1(c));
  return p * V::pow2(shifted);
}

inline Vec<double> exp(Vec<double> x) {
  using V = Vec<double>;
  x = max(V::set1(-709.0895657128241), x);
  x = min(V::set1(709.0895657128241), x);
  const V shift = V::set1(0x1.8p52);
  const V shifted = fma(x, V::set1(1.4426950408889634), shift);
  const V n = shifted - shift;
  V r = fma(n, V::set1(-0.69314718036912382), x);
  r = fma(n, V::set1(-1.9082149292705877e-10), r);
  return exp_reduced(r, shifted);
}

inline Vec<double> exp2(Vec<double> x) {
  using V = Vec<double>;
  x = max(V::set1(-1023.0), x);
  const V shift = V::set1(0x1.8p52);
  const V shifted = x + shift;
  return exp_reduced((x - (shifted - shift)) * V::set1(0.6931471805599453), shifted);
}

#else

template <class S>
inline Vec<S> exp(Vec<S> x) {
  return {std::exp(x.v)};
}
template <class S>
inline Vec<S> exp2(Vec<S> x) {
  return {std::exp2(x.v)};
}

#endif

// log2 of a sum that is at least the smallest normal number; NaN stays NaN. Without branches, so that compilers
// vectorise it: x = 2^n m with m in [sqrt(1/2), sqrt(2)], then Cephes' polynomial for log(m).
inline float log2(float x) {
  const int32_t bits = bit_cast<int32_t>(x) - 0x3f3504f3;
  const float n = static_cast<float>(bits >> 23);
  const float f = bit_cast<float>((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float log = p * f * f * f - 0.5f * f * f + f;
  return n + 1.44269504f * log + (x - x);
}
inline double log2(double x) { return std::log2(x); }

}  // namespace tinyllm::TINYLLM_ISA
