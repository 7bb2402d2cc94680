// Defines the operators and the Python module `_C`.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "cpu/cpu_info.h"
#include "cpu/dispatch.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(tinyllm, m) { tinyllm::define_operators(m); }

namespace {

pybind11::list as_list(const std::vector<std::string>& names) {
  pybind11::list list;
  for (const std::string& name : names) list.append(name);
  return list;
}

}  // namespace

// The module offers introspection only; tensors go through the dispatcher.
PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  m.doc() = "tinyllm's compiled operators (torch.ops.tinyllm.*) and what was built.";
  m.def(
      "built_isas", [] { return as_list(tinyllm::cpu::built_isas()); }, "Instruction sets in this build, best first.");
  m.def(
      "usable_isas", [] { return as_list(tinyllm::cpu::usable_isas()); },
      "The ones that this processor can run, best first.");
  m.def(
      "cpu_isa", [] { return std::string(tinyllm::cpu::kernels().name); },
      "The instruction set in use. TINYLLM_CPU_ISA overrides it; RuntimeError if that one cannot be used.");
  m.def("cpu_family", &tinyllm::cpu::cpu_family, "The vendor of the processor, and how it multiplies 16-bit numbers.");
}
