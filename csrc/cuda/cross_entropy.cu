// cross_entropy on NVIDIA GPUs: checks, allocation, and launches. The arithmetic, and why it takes so few launches, is
// in cross_entropy_kernel.cuh.
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../loss_checks.h"
#include "cross_entropy_kernel.cuh"
#include "dtypes.cuh"
#include "torch_side.cuh"

namespace tinyllm::cuda {
namespace {

using Shape = std::vector<int64_t>;

// A row of up to kShortRow bytes is processed by one warp, and a block has kShortRows of them.
constexpr int64_t kShortRow = 2048;
constexpr unsigned kShortRows = 4;

struct Call {
  Tensor input, target;
  OptionalTensor weight, totals;
  CrossEntropy args{};

  int64_t rows() const { return args.targets.rows; }
  double* totals_data() const { return static_cast<double*>(data_or_null(totals)); }
};

// Returns rows with contiguous columns; a copy only if the strides require one.
Tensor as_rows(const Tensor& x) { return x.size(1) < 2 || x.stride(1) == 1 ? x : torch::stable::contiguous(x); }

Call prepare(const char* op, const Tensor& input, const Tensor& target, const OptionalTensor& weight, Reduction how,
             int64_t ignore_index, double label_smoothing) {
  check_logits(op, input);
  const int64_t rows = input.size(0), columns = input.size(1);
  check_targets(op, input, target, weight, rows, columns);
  if (columns > std::numeric_limits<int>::max() - kSumThreads * 64)
    fail(op, ": input has ", columns, " classes; the kernel counts them in 32 bits");
  Call call{as_rows(input), as_contiguous(target), std::nullopt, std::nullopt};
  CrossEntropy& a = call.args;
  if (weight.has_value()) {
    call.weight = as_contiguous(*weight);
    a.targets.float_weight = weight->scalar_type() == ScalarType::Float;
    if (!a.targets.float_weight) check_dtype(op, "weight", *weight, input.scalar_type());
  }
  a.targets.target = static_cast<const int64_t*>(data_of(call.target));
  a.targets.weight = data_or_null(call.weight);
  a.targets.rows = rows;
  a.targets.columns = static_cast<int>(columns);
  a.targets.ignore_index = ignore_index;
  a.input = data_of(call.input);
  a.input_row = call.input.stride(0);
  a.certain = static_cast<float>(1.0 - label_smoothing);
  a.uniform = static_cast<float>(label_smoothing / static_cast<double>(columns));
  a.averaged = how == Reduction::mean;
  return call;
}

LaunchShape one_block(int64_t items) {
  const int64_t threads = std::min<int64_t>(kSumThreads, (items + kWarp - 1) / kWarp * kWarp);
  return {dim3(1), dim3(static_cast<unsigned>(std::max<int64_t>(kWarp, threads))), 2 * kWarp * sizeof(double)};
}

// Computes what every row needs before it ends: the divisor of the mean, unless the rows count it themselves, and the
// sum of the class weights.
template <class T>
void compute_totals(const char* op, const Device& device, Call& call, double label_smoothing, bool gradients) {
  const bool divisor = call.args.averaged && gradients && call.rows() > kCountedByRows;
  const bool sum_weights = call.weight.has_value() && label_smoothing > 0.0;
  if (!divisor && !sum_weights) return;
  const Shape shape{2};
  call.totals = device.empty(shape, ScalarType::Double);
  call.args.totals = call.totals_data();
  const Targets& targets = call.args.targets;
  device.launch(op, cross_entropy_totals_kernel<T>,
                one_block(std::max<int64_t>(targets.rows, sum_weights ? targets.columns : 0)), targets,
                call.totals_data(), call.args.averaged, sum_weights);
}

// Chooses the launch, and how much of a row shared memory keeps if the row is read twice.
template <bool kSmoothing>
LaunchShape shape_of_rows(const Device& device, Call& call, bool keep) {
  const int64_t size = static_cast<int64_t>(call.input.element_size());
  const int64_t vectors = call.args.targets.columns * size / 16;
  const bool few = call.rows() <= device.multiprocessors();
  const int64_t most = few ? kMaxRowThreads<kSmoothing> : kRowThreads<kSmoothing>;
  int64_t threads = kWarp;
  if (vectors * 16 > kShortRow)
    while (threads < most && threads * kVectorsAtOnce < vectors) threads = std::min(2 * threads, most);
  const unsigned rows = threads == kWarp ? kShortRows : 1;
  if (keep) {
    // The system reserves 1 KB of the memory of a multiprocessor for each block.
    const int64_t all = static_cast<int64_t>(shared_memory_limit(device.capability())) + 1024;
    const int64_t bytes = all / (few ? 1 : 2) - 1024 - kScratchBytes;
    const int64_t fits = bytes / 16 / rows, tile = threads * kVectorsAtOnce;
    call.args.kept = static_cast<int>(vectors <= fits ? vectors : fits / tile * tile);
  }
  const int64_t blocks = (call.rows() + rows - 1) / rows;
  return {dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads), rows),
          kScratchBytes + static_cast<size_t>(call.args.kept) * 16 * rows};
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_fwd(Tensor input, Tensor target, OptionalTensor weight,
                                                     int64_t reduction, int64_t ignore_index, double label_smoothing,
                                                     bool with_grad) {
  const char* const op = "cross_entropy";
  const Reduction how = reduction_of(op, reduction);
  const Device device(input);
  Call call = prepare(op, input, target, weight, how, ignore_index, label_smoothing);
  const Shape row_shape{call.rows()}, statistics_shape{call.rows(), 2}, none{0}, scalar;
  const Tensor losses = device.empty(row_shape, ScalarType::Float);
  const Tensor max_and_sum = device.empty(statistics_shape, ScalarType::Float);
  const Tensor loss = how == Reduction::none ? losses : device.empty(scalar, ScalarType::Float);
  const Tensor grad_input = device.empty(with_grad ? input.sizes() : IntArray(none), input.scalar_type());
  CrossEntropy& a = call.args;
  a.loss = static_cast<float*>(data_of(losses));
  a.max_and_sum = static_cast<float*>(data_of(max_and_sum));
  a.grad_input = with_grad ? data_of(grad_input) : nullptr;
  with_type(op, input.scalar_type(), [&](auto number) {
    using T = decltype(number);
    compute_totals<T>(op, device, call, label_smoothing, with_grad);
    // shape_of_rows completes `a`, which the lambda reads only afterwards.
    const auto run = [&](auto kernel, const LaunchShape& shape) { device.launch(op, kernel, shape, a); };
    if (label_smoothing > 0.0)
      run(cross_entropy_forward_kernel<T, true>, shape_of_rows<true>(device, call, with_grad));
    else
      run(cross_entropy_forward_kernel<T, false>, shape_of_rows<false>(device, call, with_grad));
    if (how == Reduction::none) return;
    device.launch(op, cross_entropy_reduce_kernel<T>, one_block(call.rows()), a.targets, a.loss, call.totals_data(),
                  static_cast<float*>(data_of(loss)), a.averaged);
  });
  return {loss, max_and_sum, grad_input};
}

Tensor cross_entropy_bwd(Tensor grad, Tensor input, Tensor target, OptionalTensor weight, Tensor max_and_sum,
                         int64_t reduction, int64_t ignore_index, double label_smoothing) {
  const char* const op = "cross_entropy_bwd";
  const Reduction how = reduction_of(op, reduction);
  const Device device(input);
  Call call = prepare(op, input, target, weight, how, ignore_index, label_smoothing);
  const Tensor upstream = upstream_grad(op, grad, input, how, call.rows());
  check_max_and_sum(op, max_and_sum, input, call.rows());
  const Tensor grad_input = device.empty(input.sizes(), input.scalar_type());
  CrossEntropy& a = call.args;
  a.grad = static_cast<const float*>(data_of(upstream));
  a.grad_step = how == Reduction::none ? 1 : 0;
  a.max_and_sum = static_cast<float*>(data_of(max_and_sum));
  a.grad_input = data_of(grad_input);
  with_type(op, input.scalar_type(), [&](auto number) {
    using T = decltype(number);
    compute_totals<T>(op, device, call, label_smoothing, true);
    // shape_of_rows completes `a`, which the lambda reads only afterwards.
    const auto run = [&](auto kernel, const LaunchShape& shape) { device.launch(op, kernel, shape, a); };
    if (label_smoothing > 0.0)
      run(cross_entropy_backward_kernel<T, true>, shape_of_rows<true>(device, call, false));
    else
      run(cross_entropy_backward_kernel<T, false>, shape_of_rows<false>(device, call, false));
  });
  return grad_input;
}

}  // namespace

TINYLLM_CUDA_OPERATORS(m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&cross_entropy_fwd));
  m.impl("cross_entropy_bwd", TORCH_BOX(&cross_entropy_bwd));
}

}  // namespace tinyllm::cuda
