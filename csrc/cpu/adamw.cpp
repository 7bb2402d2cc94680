// AdamW on the CPU: checks, and the tensors' elements distributed over threads as if they were one array, whether there
// are a few large tensors or many small ones. The arithmetic is in adamw_kernel.h.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "torch_side.h"

namespace tinyllm::cpu {
namespace {

using Tensors = std::vector<Tensor>;

// The number of elements that a thread takes at a time. The norm is summed by these chunks, in their order, so that it
// does not depend on the number of threads.
constexpr int64_t kChunk = 16384;

// Consecutive tensors as one array of elements, in chunks.
class Elements {
 public:
  explicit Elements(const Tensors& tensors) : starts_(1, 0) {
    starts_.reserve(tensors.size() + 1);
    for (const Tensor& t : tensors) starts_.push_back(starts_.back() + t.numel());
  }

  int64_t chunks() const { return (starts_.back() + kChunk - 1) / kChunk; }

  // Calls f(tensor, begin, end) for each piece of a tensor that is in a chunk.
  template <class F>
  void for_each_piece(int64_t chunk, const F& f) const {
    const int64_t first = chunk * kChunk, last = std::min(first + kChunk, starts_.back());
    auto tensor = static_cast<size_t>(std::upper_bound(starts_.begin(), starts_.end(), first) - starts_.begin() - 1);
    for (; tensor + 1 < starts_.size() && starts_[tensor] < last; ++tensor) {
      const int64_t begin = std::max(first, starts_[tensor]), end = std::min(last, starts_[tensor + 1]);
      if (begin < end) f(tensor, begin - starts_[tensor], end - starts_[tensor]);
    }
  }

 private:
  std::vector<int64_t> starts_;  // of each tensor, and the end of the last
};

void check_like(const char* op, const char* name, const Tensors& tensors, const Tensors& like) {
  if (tensors.size() != like.size())
    fail(op, ": there are ", tensors.size(), " ", name, "; ", like.size(), " are needed");
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_device(op, name, tensors[i], like[0]);
    check_dtype(op, name, tensors[i], like[0].scalar_type());
    check_shape(op, name, tensors[i], like[i].sizes());
    if (!tensors[i].is_contiguous()) fail(op, ": ", name, " are not contiguous");
  }
}

Tensor adamw_norm(Tensors tensors) {
  const char* const op = "adamw_norm";
  if (tensors.empty()) fail(op, ": there are no tensors");
  const DType dtype = dtype_of(op, tensors[0]);
  check_like(op, "tensors", tensors, tensors);
  const Elements elements(tensors);
  std::vector<double> sums(static_cast<size_t>(elements.chunks()));
  const auto kernel = kernels().sum_of_squares[dtype];
  parallel_items(elements.chunks(), [&](int64_t chunk) {
    double sum = 0;
    elements.for_each_piece(
        chunk, [&](size_t i, int64_t begin, int64_t end) { sum += kernel(data_of(tensors[i]), begin, end); });
    sums[static_cast<size_t>(chunk)] = sum;
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  const std::vector<int64_t> scalar;
  const Tensor norm = empty(scalar, compute_dtype(tensors[0].scalar_type()));
  with_compute_type(dtype, [&](auto zero) {
    *static_cast<decltype(zero)*>(data_of(norm)) = static_cast<decltype(zero)>(std::sqrt(total));
  });
  return norm;
}

void adamw_step(Tensors parameters, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors steps, double lr,
                double beta1, double beta2, double eps, double weight_decay, double clip_coef) {
  const char* const op = "adamw_step";
  if (parameters.empty()) return;
  const DType dtype = dtype_of(op, parameters[0]);
  check_like(op, "parameters", parameters, parameters);
  check_like(op, "grads", grads, parameters);
  check_like(op, "exp_avgs", exp_avgs, parameters);
  check_like(op, "exp_avg_sqs", exp_avg_sqs, parameters);
  if (steps.size() != parameters.size()) fail(op, ": there are ", steps.size(), " steps; a parameter needs one each");
  std::vector<AdamW> args;
  args.reserve(parameters.size());
  for (size_t i = 0; i < parameters.size(); ++i) {
    check_device(op, "steps", steps[i], parameters[0]);
    check_dtype(op, "steps", steps[i], ScalarType::Float);
    check_shape(op, "steps", steps[i], {});
  }
  for (size_t i = 0; i < parameters.size(); ++i) {
    float& step = *static_cast<float*>(data_of(steps[i]));
    step += 1;
    args.push_back({data_of(parameters[i]), data_of(grads[i]), data_of(exp_avgs[i]), data_of(exp_avg_sqs[i]), clip_coef,
                    beta1, beta2, eps, 1 - lr * weight_decay, lr / (1 - std::pow(beta1, static_cast<double>(step))),
                    1 / std::sqrt(1 - std::pow(beta2, static_cast<double>(step)))});
  }
  const Elements elements(parameters);
  const auto kernel = kernels().adamw_step[dtype];
  parallel_items(elements.chunks(), [&](int64_t chunk) {
    elements.for_each_piece(chunk, [&](size_t i, int64_t begin, int64_t end) { kernel(args[i], begin, end); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tinyllm, CPU, m) {
  m.impl("adamw_norm", TORCH_BOX(&adamw_norm));
  m.impl("adamw_step", TORCH_BOX(&adamw_step));
}

}  // namespace tinyllm::cpu
