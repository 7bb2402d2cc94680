// cross_entropy on the CPU: checks, allocation, distribution over threads, and reduction. The arithmetic is in
// cross_entropy_kernel.h.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu_info.h"
#include "losses.h"

namespace tinyllm::cpu {
namespace {

using torch::stable::parallel_for;
using Shape = std::vector<int64_t>;

struct Call {
  Tensor input;
  Targets targets;
  CrossEntropy args;
  DType dtype;

  int64_t rows() const { return input.size(0); }
  // The number of rows for which waking a thread pays: about 32 KB.
  int64_t grain() const { return std::max<int64_t>(1, 8192 / std::max<int64_t>(1, args.classes)); }
};

Call prepare(const char* op, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
             Reduction reduction, int64_t ignore_index, double label_smoothing) {
  check_logits(op, input);
  Call call{as_contiguous(input),
            read_targets(op, input, target, weight, input.size(0), input.size(1), ignore_index),
            {},
            dtype_of(op, input)};
  call.args.input = data_of(call.input);
  call.args.target = call.targets.data();
  call.args.weight = call.targets.weight_data();
  call.args.weight_sum = call.targets.weight_sum;
  call.args.classes = input.size(1);
  call.args.ignore_index = ignore_index;
  call.args.label_smoothing = label_smoothing;
  call.args.scale = reduction == Reduction::mean ? 1.0 / call.targets.divisor : 1.0;
  return call;
}

void set_grad_input(Call& call, const Tensor& grad_input) {
  call.args.grad_input = data_of(grad_input);
  // A gradient that does not fit the caches is written past them.
  call.args.stream = grad_input.numel() * static_cast<int64_t>(grad_input.element_size()) > last_level_cache() / 2;
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_fwd(Tensor input, Tensor target, OptionalTensor weight,
                                                     int64_t reduction, int64_t ignore_index, double label_smoothing,
                                                     bool with_grad) {
  const char* op = "cross_entropy";
  const Reduction how = reduction_of(op, reduction);
  Call call = prepare(op, input, target, weight, how, ignore_index, label_smoothing);
  const ScalarType compute = compute_dtype(input.scalar_type());
  const Shape row_shape{call.rows()}, statistics_shape{call.rows(), 2}, none{0};
  const Tensor losses = empty(row_shape, compute), max_and_sum = empty(statistics_shape, compute);
  const Tensor grad_input = empty(with_grad ? input.sizes() : IntArray(none), input.scalar_type());
  call.args.loss = data_of(losses);
  call.args.max_and_sum = data_of(max_and_sum);
  if (with_grad) set_grad_input(call, grad_input);
  const auto kernel = kernels().cross_entropy_fwd[call.dtype];
  parallel_for(0, call.rows(), call.grain(), [&](int64_t begin, int64_t end) { kernel(call.args, begin, end); });
  return {reduce(losses, how, call.targets.divisor), max_and_sum, grad_input};
}

Tensor cross_entropy_bwd(Tensor grad, Tensor input, Tensor target, OptionalTensor weight, Tensor max_and_sum,
                         int64_t reduction, int64_t ignore_index, double label_smoothing) {
  const char* op = "cross_entropy_bwd";
  const Reduction how = reduction_of(op, reduction);
  Call call = prepare(op, input, target, weight, how, ignore_index, label_smoothing);
  const Tensor upstream = upstream_grad(op, grad, input, how, call.rows());
  check_max_and_sum(op, max_and_sum, input, call.rows());
  const Tensor grad_input = empty(input.sizes(), input.scalar_type());
  call.args.max_and_sum = data_of(max_and_sum);
  call.args.grad = data_of(upstream);
  call.args.grad_step = how == Reduction::none ? 1 : 0;
  set_grad_input(call, grad_input);
  const auto kernel = kernels().cross_entropy_bwd[call.dtype];
  parallel_for(0, call.rows(), call.grain(), [&](int64_t begin, int64_t end) { kernel(call.args, begin, end); });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tinyllm, CPU, m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&cross_entropy_fwd));
  m.impl("cross_entropy_bwd", TORCH_BOX(&cross_entropy_bwd));
}

}  // namespace tinyllm::cpu
