// Shared by the losses on the CPU: targets, class weights, and the reduction of the losses of the rows.
#pragma once
#include <limits>
#include <optional>
#include <vector>

#include "../loss_checks.h"
#include "torch_side.h"

namespace tinyllm::cpu {

// Contiguous targets, class weights in the compute dtype, their sum, and the divisor of the mean: the sum of the
// weights of all targets that are not ignored.
struct Targets {
  Tensor target;
  OptionalTensor weight;
  double weight_sum;
  double divisor;

  const int64_t* data() const { return static_cast<const int64_t*>(data_of(target)); }
  const void* weight_data() const { return weight.has_value() ? data_of(*weight) : nullptr; }
};

// Throws std::out_of_range, IndexError in Python, for a target that is neither a class nor ignore_index. This happens
// before anything is computed, so that no kernel reads beyond a row.
inline Targets read_targets(const char* op, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                            int64_t rows, int64_t classes, int64_t ignore_index) {
  check_targets(op, input, target, weight, rows, classes);
  Targets targets{as_contiguous(target), std::nullopt, static_cast<double>(classes), 0.0};
  const ScalarType compute = compute_dtype(input.scalar_type());
  if (weight.has_value())
    targets.weight = as_contiguous(weight->scalar_type() == compute ? *weight : torch::stable::to(*weight, compute));
  const void* weights = targets.weight_data();
  const auto weight_of = [&](int64_t c) -> double {
    if (weights == nullptr) return 1.0;
    return compute == ScalarType::Double ? static_cast<const double*>(weights)[c]
                                         : static_cast<const float*>(weights)[c];
  };
  if (weights != nullptr) {
    targets.weight_sum = 0.0;
    for (int64_t c = 0; c < classes; ++c) targets.weight_sum += weight_of(c);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = targets.data()[r];
    if (t == ignore_index) continue;
    if (t < 0 || t >= classes)
      throw std::out_of_range("Target " + std::to_string(t) + " is out of bounds: there are " +
                              std::to_string(classes) + " classes");
    targets.divisor += weight_of(t);
  }
  return targets;
}

// The default ignore_index of PyTorch.
constexpr int64_t kIgnoreIndex = -100;

// Sums in the order of the rows, whatever the number of threads.
template <class S>
double sum_of_rows(const S* losses, int64_t rows) {
  double sum = 0.0;
  for (int64_t r = 0; r < rows; ++r) sum += static_cast<double>(losses[r]);
  return sum;
}

inline Tensor reduce(const Tensor& losses, Reduction how, double divisor) {
  if (how == Reduction::none) return losses;
  const std::vector<int64_t> scalar;
  const Tensor out = empty(scalar, losses.scalar_type());
  const auto add = [&](auto zero) {
    using S = decltype(zero);
    const double sum = sum_of_rows(static_cast<const S*>(data_of(losses)), losses.numel());
    *static_cast<S*>(data_of(out)) = static_cast<S>(how == Reduction::mean ? sum / divisor : sum);
  };
  losses.scalar_type() == ScalarType::Double ? add(0.0) : add(0.0f);
  return out;
}

}  // namespace tinyllm::cpu
