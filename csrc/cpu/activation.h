// The activations of feed-forward layers and their derivatives, one vector at a time.
#pragma once
#include <cmath>
#include <limits>

#include "kernel_args.h"
#include "vector_math.h"

namespace tinyllm::TINYLLM_ISA {

using cpu::Activation;

#if !defined(TINYLLM_SCALAR)

// erf(x) = x P(x^2) / Q(x^2), to about two units in the last place: the rational minimax approximation of Eigen's
// generic_fast_erf_float. For |x| >= 4 it is 1 in single precision.
inline Vec<float> erf(Vec<float> x) {
  using V = Vec<float>;
  x = max(V::set1(-4.0f), min(V::set1(4.0f), x));
  const V x2 = x * x;
  V p = V::set1(-2.72614225801306e-10f);
  for (const float c : {2.77068142495902e-08f, -2.10102402082508e-06f, -5.69250639462346e-05f, -7.34990630326855e-04f,
                        -2.95459980854025e-03f, -1.60960333262415e-02f})
    p = fma(p, x2, V::set1(c));
  V q = V::set1(-1.45660718464996e-05f);
  for (const float c : {-2.13374055278905e-04f, -1.68282697438203e-03f, -7.37332916720468e-03f, -1.42647390514189e-02f})
    q = fma(q, x2, V::set1(c));
  return x * p / q;
}

#endif

// Double precision is used to check results, so it need not be fast.
template <class S>
inline Vec<S> erf(Vec<S> x) {
  S values[Vec<S>::size];
  x.store(values);
  for (S& value : values) value = std::erf(value);
  return Vec<S>::load(values);
}

// Phi(x), the cumulative distribution function of the standard normal distribution: gelu(x) = x Phi(x) (Hendrycks &
// Gimpel 2016).
template <class S>
inline Vec<S> normal_cdf(Vec<S> x) {
  using V = Vec<S>;
  return fma(V::set1(S(0.5)), erf(x * V::set1(S(0.70710678118654752))), V::set1(S(0.5)));
}

// The sigmoid of -z, `open`, and what it lacks to 1, `closed`, computed without cancellation.
template <class S>
struct Sigmoid {
  Vec<S> open, closed;

  explicit Sigmoid(Vec<S> z) {
    using V = Vec<S>;
    // Where exp would overflow the sigmoid must be exactly 0: its smallest other value times the largest x would not be
    // negligible.
    const V most = V::set1(std::numeric_limits<S>::max() / 4);
    const V e = min(most, exp(z));
    open = (V::set1(S(1)) / (V::set1(S(1)) + e)).where_positive(most - e);
    closed = e * open;
  }
};

// The tanh approximation of gelu is x (1 + tanh(u)) / 2 = x sigmoid(2u) with u = sqrt(2 / pi) (x + 0.044715 x^3).
template <class S>
inline Sigmoid<S> tanh_gate(Vec<S> x) {
  using V = Vec<S>;
  const V cubic = fma(V::set1(S(-2 * 0.7978845608028654 * 0.044715)), x * x, V::set1(S(-2 * 0.7978845608028654)));
  return Sigmoid<S>(x * cubic);
}

template <class S>
struct Activated {
  Vec<S> value, slope;
};

// The activation at x, and its derivative there, which shares most of the work.
template <class S>
inline Activated<S> activate_with_slope(Activation activation, Vec<S> x) {
  using V = Vec<S>;
  const V one = V::set1(S(1));
  switch (activation) {
    case Activation::relu:
      return {max(V::zero(), x), one.where_positive(x)};  // max returns its second argument for NaN
    case Activation::gelu: {
      const V cdf = normal_cdf(x), density = V::set1(S(0.39894228040143268)) * exp(x * x * V::set1(S(-0.5)));
      return {x * cdf, fma(x, density, cdf)};
    }
    case Activation::gelu_tanh: {
      const Sigmoid<S> gate = tanh_gate(x);
      const V slope = fma(V::set1(S(6 * 0.7978845608028654 * 0.044715)), x * x, V::set1(S(2 * 0.7978845608028654)));
      return {x * gate.open, fma(x * gate.open * gate.closed, slope, gate.open)};
    }
    case Activation::silu: {
      const Sigmoid<S> gate(V::zero() - x);
      return {x * gate.open, fma(x * gate.open, gate.closed, gate.open)};
    }
    case Activation::none:
      break;
  }
  return {x, one};
}

template <class S>
inline Vec<S> activate(Activation activation, Vec<S> x) {
  return activate_with_slope(activation, x).value;
}

// The gradient behind an activation, `x`, in front of it. For relu only the sign of the gate matters, so that the
// activation's own result serves.
template <class S>
inline Vec<S> pass_gate(Activation activation, Vec<S> gate, Vec<S> x) {
  return activation == Activation::relu ? x.where_positive(gate) : x * gate;
}

template <class T>
void gate_all(Activation activation, const void* gate, const void* grad, void* out, int64_t begin, int64_t end) {
  using V = Vec<compute_t<T>>;
  const T *from = static_cast<const T*>(gate) + begin, *by = static_cast<const T*>(grad) + begin;
  T* to = static_cast<T*>(out) + begin;
  for_each_vector<V>(end - begin, [&](int64_t i, int64_t n) {
    store_n(pass_gate(activation, load_n<V>(from + i, n), load_n<V>(by + i, n)), to + i, n);
  });
}

}  // namespace tinyllm::TINYLLM_ISA
