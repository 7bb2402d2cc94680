// Every operator's schema, and the Python module `_C`. Each device's file registers its own implementation.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "cpu/dispatch.h"

STABLE_TORCH_LIBRARY(tinyllm, m) {
  m.def(
      "layer_norm_fwd(Tensor input, int[] normalized_shape, Tensor? weight, Tensor? bias, float eps)"
      " -> (Tensor normed, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_bwd(Tensor grad, Tensor input, int[] normalized_shape, Tensor? weight, Tensor mean, Tensor rstd,"
      " bool parameter_grads) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "add_layer_norm_fwd(Tensor input, Tensor residual, int[] normalized_shape, Tensor? weight, Tensor? bias, float "
      "eps)"
      " -> (Tensor normed, Tensor sum, Tensor mean, Tensor rstd)");
  m.def(
      "add_layer_norm_bwd(Tensor grad_normed, Tensor? grad_sum, Tensor sum, int[] normalized_shape, Tensor? weight,"
      " Tensor mean, Tensor rstd, bool parameter_grads) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "attention_fwd(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float scale)"
      " -> (Tensor out, Tensor lse)");
  m.def(
      "attention_bwd(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor out, Tensor lse,"
      " bool is_causal, float scale) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
}

namespace {

pybind11::list as_list(const std::vector<std::string>& names) {
  pybind11::list list;
  for (const std::string& name : names) list.append(name);
  return list;
}

}  // namespace

// Introspection only: tensors go through the dispatcher.
PYBIND11_MODULE(_C, m) {
  m.doc() = "tinyllm's compiled operators (torch.ops.tinyllm.*) and what was built.";
  m.def(
      "built_isas", [] { return as_list(tinyllm::cpu::built_isas()); }, "Instruction sets in this build, best first.");
  m.def("usable_isas", [] { return as_list(tinyllm::cpu::usable_isas()); }, "Those that this processor runs.");
  m.def(
      "cpu_isa", [] { return std::string(tinyllm::cpu::kernels().name); },
      "The one in use (TINYLLM_CPU_ISA overrides; RuntimeError when that cannot be).");
}
