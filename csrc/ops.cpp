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
  m.def(
      "plan",
      [](int64_t rows, int64_t columns, int64_t depth, int64_t threads, bool packs_transposed_a) {
        if (threads < 1)
          throw pybind11::value_error("threads is " + std::to_string(threads) + "; at least 1 is needed");
        const tinyllm::cpu::Plan p = tinyllm::cpu::plan(
            rows, columns, depth, threads, tinyllm::cpu::kernels().blocking[tinyllm::DType::f32], packs_transposed_a);
        return pybind11::make_tuple(p.block_rows, p.row_blocks, p.block_columns, p.column_blocks);
      },
      pybind11::arg("rows"), pybind11::arg("columns"), pybind11::arg("depth"), pybind11::arg("threads"),
      pybind11::arg("packs_transposed_a") = false,
      "The tasks of a float32 matmul with the instruction set in use, which may have to copy a transposed A: (rows of "
      "a block, blocks of rows, columns of a block, blocks of columns).");
  m.def("cpu_family", &tinyllm::cpu::cpu_family, "The vendor of the processor, and how it multiplies 16-bit numbers.");
}
