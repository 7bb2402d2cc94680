// The dropout_factors operator, and the state of dropout from a tensor. The random bits are generated in
// random_kernel.h.
#include "random.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "torch_side.h"

namespace tinyllm::cpu {

Dropout dropout_state(const char* op, const std::optional<Tensor>& rng, double p) {
  if (!(p >= 0.0 && p <= 1.0)) fail(op, ": dropout_p is ", p, "; a probability in [0, 1] is needed");
  if (p == 0.0) return {};
  if (!rng) fail(op, ": dropout needs rng, an int64 tensor (seed, offset)");
  check_dtype(op, "rng", *rng, ScalarType::Long);
  check_shape(op, "rng", *rng, {2});
  const int64_t* state = static_cast<const int64_t*>(data_of(*rng));
  return {p, static_cast<uint64_t>(state[0]), static_cast<uint64_t>(state[rng->stride(0)])};
}

namespace {

Tensor dropout_factors(Tensor rng, int64_t rows, int64_t columns, double p) {
  const char* op = "dropout_factors";
  if (rows < 0 || columns < 0 || columns % 64 != 0)
    fail(op, ": rows and columns must not be negative, and columns a multiple of 64");
  const Dropout dropout = dropout_state(op, rng, p);
  const std::vector<int64_t> shape{rows, columns};
  const Tensor factors = empty(shape, ScalarType::Float);
  const auto kernel = kernels().dropout_factors;
  parallel_items(rows, [&](int64_t row) {
    kernel(dropout, row * columns, columns, static_cast<float*>(data_of(factors)) + row * columns);
  });
  return factors;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tinyllm, CPU, m) { m.impl("dropout_factors", TORCH_BOX(&dropout_factors)); }

}  // namespace tinyllm::cpu
