// gated_activation on the CPU: checks, allocation, and distribution over threads. The arithmetic is in
// gated_activation_kernel.h.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "../norm_checks.h"
#include "torch_side.h"

namespace tinyllm::cpu {
namespace {

constexpr int64_t kGrain = 16384;  // elements for which waking a thread pays

Tensor gated_activation_fwd(Tensor gate, Tensor up, std::string activation) {
  const char* op = "gated_activation";
  check_same(op, "up", up, gate);
  const auto kernel = kernels().gated_activation_fwd[dtype_of(op, gate)];
  const Tensor g = as_contiguous(gate), u = as_contiguous(up), out = empty(g.sizes(), g.scalar_type());
  const GatedActivation a{
      .activation = parse_activation(op, activation), .gate = data_of(g), .up = data_of(u), .out = data_of(out)};
  torch::stable::parallel_for(0, g.numel(), kGrain, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> gated_activation_bwd(Tensor grad, Tensor gate, Tensor up, std::string activation) {
  const char* op = "gated_activation_bwd";
  check_same(op, "grad", grad, gate);
  check_same(op, "up", up, gate);
  const auto kernel = kernels().gated_activation_bwd[dtype_of(op, gate)];
  const Tensor dy = as_contiguous(grad), g = as_contiguous(gate), u = as_contiguous(up);
  const Tensor grad_gate = empty(g.sizes(), g.scalar_type()), grad_up = empty(g.sizes(), g.scalar_type());
  const GatedActivation a{.activation = parse_activation(op, activation),
                          .gate = data_of(g),
                          .up = data_of(u),
                          .grad = data_of(dy),
                          .grad_gate = data_of(grad_gate),
                          .grad_up = data_of(grad_up)};
  torch::stable::parallel_for(0, g.numel(), kGrain, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return {grad_gate, grad_up};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tinyllm, CPU, m) {
  m.impl("gated_activation_fwd", TORCH_BOX(&gated_activation_fwd));
  m.impl("gated_activation_bwd", TORCH_BOX(&gated_activation_bwd));
}

}  // namespace tinyllm::cpu
