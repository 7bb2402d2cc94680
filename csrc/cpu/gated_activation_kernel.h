// activation(gate) * up, the middle of a gated feed-forward network (Shazeer 2020), and its gradients, in one pass over
// memory each.
#pragma once
#include "activation.h"

namespace tinyllm::TINYLLM_ISA {

template <class T>
TINYLLM_FLATTEN void gated_activation_fwd(const cpu::GatedActivation& a, int64_t begin, int64_t end) {
  using V = Vec<compute_t<T>>;
  const T *gate = static_cast<const T*>(a.gate) + begin, *up = static_cast<const T*>(a.up) + begin;
  T* out = static_cast<T*>(a.out) + begin;
  for_each_vector<V>(end - begin, [&](int64_t i, int64_t n) {
    store_n(activate(a.activation, load_n<V>(gate + i, n)) * load_n<V>(up + i, n), out + i, n);
  });
}

template <class T>
TINYLLM_FLATTEN void gated_activation_bwd(const cpu::GatedActivation& a, int64_t begin, int64_t end) {
  using V = Vec<compute_t<T>>;
  const T *gate = static_cast<const T*>(a.gate) + begin, *up = static_cast<const T*>(a.up) + begin;
  const T* grad = static_cast<const T*>(a.grad) + begin;
  T *grad_gate = static_cast<T*>(a.grad_gate) + begin, *grad_up = static_cast<T*>(a.grad_up) + begin;
  for_each_vector<V>(end - begin, [&](int64_t i, int64_t n) {
    const auto open = activate_with_slope(a.activation, load_n<V>(gate + i, n));
    const V g = load_n<V>(grad + i, n);
    store_n(g * load_n<V>(up + i, n) * open.slope, grad_gate + i, n);
    store_n(g * open.value, grad_up + i, n);
  });
}

}  // namespace tinyllm::TINYLLM_ISA
