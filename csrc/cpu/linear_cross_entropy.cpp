// linear_cross_entropy on the CPU: checks, allocation, blocks of rows distributed over threads, and reduction. The
// arithmetic is in linear_cross_entropy_kernel.h.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "losses.h"
#include "matmul.h"

namespace tinyllm::cpu {
namespace {

using Shape = std::vector<int64_t>;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Wanted {
  bool input, weight, bias;
  bool any() const { return input || weight || bias; }
};

struct Outputs {
  Tensor loss, grad_input, grad_weight, grad_bias;
};

// The number of rows whose logits are held at once, in the compute dtype: a sixteenth of the memory that all logits
// would take in the dtype of the input, or with the packed input and the statistics less than a tenth. Without
// gradients, only the logits of a range of classes are ever stored.
int64_t block_rows(int64_t rows, bool gradients, bool widened) {
  return gradients ? std::max<int64_t>(32, rows / (widened ? 32 : 16)) : 512;
}

// Calls f(range) for all ranges of classes. A thread gets consecutive ranges, because each prefetches the memory of the
// next.
template <class F>
void parallel_ranges(int64_t classes, const F& f) {
  torch::stable::parallel_for(0, (classes + kClassRange - 1) / kClassRange, 1, [&](int64_t begin, int64_t end) {
    for (int64_t range = begin; range < end; ++range) f(range);
  });
}

// A task of grad_input packs its columns of the whole weight, and uses them for its rows only. So the rows are split
// only where few columns are left for each thread.
Plan grad_input_plan(int64_t rows, int64_t columns, int64_t threads, const Blocking& b) {
  constexpr int64_t kFewColumns = 64, kFewRows = 64;
  const auto parts_of = [](int64_t size, int64_t parts, int64_t multiple) {
    const int64_t part = round_up(std::max<int64_t>(1, (size + parts - 1) / parts), multiple);
    return std::pair(part, (size + part - 1) / part);
  };
  const int64_t column_parts = std::clamp<int64_t>(columns / kFewColumns, 1, threads);
  const int64_t row_parts = std::clamp<int64_t>((threads + column_parts - 1) / column_parts, 1, rows / kFewRows + 1);
  const auto [block_columns, column_blocks] = parts_of(columns, column_parts, b.nr);
  const auto [block_rows, row_blocks] = parts_of(rows, row_parts, b.mr);
  return {block_rows, row_blocks, block_columns, column_blocks};
}

// Runs all steps for one block of rows.
void run_block(const Kernels& kernels, DType dtype, const LinearCrossEntropy& args) {
  // The rows of the block are the B of the logits, transposed, and of grad_weight.
  const void* rows = static_cast<const char*>(args.input) + args.first * args.features * element_size(dtype);
  Matmul block{};
  block.packed = args.packed;
  block.columns = args.count;
  block.depth = args.features;
  block.b = {rows, 1, args.features};
  pack_b(dtype, block);
  parallel_ranges(args.row.classes, [&](int64_t r) { kernels.linear_cross_entropy_logits[dtype](args, r); });
  const int64_t vector = kernels.vector[dtype], vectors = (args.count + vector - 1) / vector;
  torch::stable::parallel_for(0, vectors, 4, [&](int64_t begin, int64_t end) {
    kernels.linear_cross_entropy_loss[dtype](args, begin * vector, std::min(args.count, end * vector));
  });
  if (args.logits == nullptr) return;
  parallel_ranges(args.row.classes, [&](int64_t r) { kernels.linear_cross_entropy_gradient[dtype](args, r); });
  if (args.grad_input != nullptr) {
    const Plan tasks =
        grad_input_plan(args.count, args.features, torch::stable::get_num_threads(), kernels.blocking[dtype]);
    parallel_items(tasks.tasks(), [&](int64_t t) {
      const int64_t row = t / tasks.column_blocks * tasks.block_rows;
      const int64_t column = t % tasks.column_blocks * tasks.block_columns;
      kernels.linear_cross_entropy_grad_input[dtype](args, row, std::min(args.count, row + tasks.block_rows), column,
                                                     std::min(args.features, column + tasks.block_columns));
    });
  }
  if (args.grad_weight != nullptr) {
    block.columns = args.features;
    block.depth = args.count;
    block.b = {rows, args.features, 1};
    pack_b(dtype, block);
    parallel_ranges(args.row.classes, [&](int64_t r) { kernels.linear_cross_entropy_grad_weight[dtype](args, r); });
  }
}

Outputs run(const char* op, const OptionalTensor& grad, const Tensor& input, const Tensor& linear_weight,
            const Tensor& target, const OptionalTensor& linear_bias, const OptionalTensor& weight, int64_t reduction,
            int64_t ignore_index, double label_smoothing, Wanted wanted) {
  if (input.dim() != 2) fail(op, ": input has shape ", shape_of(input), "; (rows, features) is needed");
  if (linear_weight.dim() != 2)
    fail(op, ": linear_weight has shape ", shape_of(linear_weight), "; (classes, features) is needed");
  const int64_t rows = input.size(0), features = input.size(1), classes = linear_weight.size(0);
  check_device(op, "linear_weight", linear_weight, input);
  check_dtype(op, "linear_weight", linear_weight, input.scalar_type());
  check_shape(op, "linear_weight", linear_weight, {classes, features});
  const DType dtype = dtype_of(op, input);
  const ScalarType compute = compute_dtype(input.scalar_type());
  const Reduction how = reduction_of(op, reduction);
  const Targets targets = read_targets(op, input, target, weight, rows, classes, ignore_index);
  OptionalTensor bias;
  if (linear_bias.has_value()) {
    check_device(op, "linear_bias", *linear_bias, input);
    check_shape(op, "linear_bias", *linear_bias, {classes});
    bias =
        as_contiguous(linear_bias->scalar_type() == compute ? *linear_bias : torch::stable::to(*linear_bias, compute));
  }
  OptionalTensor upstream;
  if (grad.has_value()) upstream = upstream_grad(op, *grad, input, how, rows);
  const Tensor x = as_contiguous(input), w = as_contiguous(linear_weight);

  const auto allocate = [&](bool really, const Shape& shape) { return empty(really ? shape : Shape{0}, compute); };
  const Outputs out{allocate(true, {rows}), allocate(wanted.input, {rows, features}),
                    allocate(wanted.weight, {classes, features}), allocate(wanted.bias, {classes})};
  LinearCrossEntropy args{};
  args.row.target = targets.data();
  args.row.weight = targets.weight_data();
  args.row.weight_sum = targets.weight_sum;
  args.row.classes = classes;
  args.row.ignore_index = ignore_index;
  args.row.label_smoothing = label_smoothing;
  args.row.loss = data_of(out.loss);
  args.row.grad = upstream.has_value() ? data_of(*upstream) : nullptr;
  args.row.grad_step = how == Reduction::none ? 1 : 0;
  args.row.scale = how == Reduction::mean ? 1.0 / targets.divisor : 1.0;
  args.input = data_of(x);
  args.linear_weight = data_of(w);
  args.bias = bias.has_value() ? data_of(*bias) : nullptr;
  args.features = features;
  args.grad_input = wanted.input ? data_of(out.grad_input) : nullptr;
  args.grad_weight = wanted.weight ? data_of(out.grad_weight) : nullptr;
  args.grad_bias = wanted.bias ? data_of(out.grad_bias) : nullptr;

  if (rows == 0)
    for (const Tensor* grad : {&out.grad_input, &out.grad_weight, &out.grad_bias})
      std::memset(data_of(*grad), 0, static_cast<size_t>(grad->numel() * grad->element_size()));

  // The logits of the first block need no memory of their own: they are stored where the gradient of the weight will
  // be, the logits of a class in the row of that class.
  const int64_t vector = kernels().vector[dtype], nr = kernels().blocking[dtype].nr;
  const int64_t in_place = wanted.weight ? std::min(rows, features) / vector * vector : 0;
  const int64_t limit = block_rows(rows, wanted.any(), compute != input.scalar_type());
  const int64_t blocks = (rows - in_place + limit - 1) / limit;
  const int64_t block = blocks == 0 ? 0 : round_up((rows - in_place + blocks - 1) / blocks, vector);
  const int64_t most = std::max(in_place, block);
  const int64_t ranges = (classes + kClassRange - 1) / kClassRange;
  const Tensor packed = allocate(true, {std::max(round_up(most, nr) * features, most * round_up(features, nr))});
  const Tensor statistics = allocate(true, {ranges, 3, most}), terms = allocate(true, {3, most});
  const Tensor logits = allocate(wanted.any(), {classes, block});
  args.packed = data_of(packed);
  args.statistics = data_of(statistics);
  args.terms = data_of(terms);
  args.padded = most;
  if (in_place > 0) {
    args.count = in_place;
    args.logits = args.grad_weight;
    args.logits_row = features;
    run_block(kernels(), dtype, args);
    args.accumulate = true;
  }
  args.logits = wanted.any() ? data_of(logits) : nullptr;
  args.logits_row = block;
  for (args.first = in_place; args.first < rows; args.first += block) {
    args.count = std::min(block, rows - args.first);
    run_block(kernels(), dtype, args);
    args.accumulate = true;
  }
  return {reduce(out.loss, how, targets.divisor), out.grad_input, out.grad_weight, out.grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_fwd(Tensor input, Tensor linear_weight, Tensor target,
                                                                    OptionalTensor linear_bias, OptionalTensor weight,
                                                                    int64_t reduction, int64_t ignore_index,
                                                                    double label_smoothing, bool need_input,
                                                                    bool need_weight, bool need_bias) {
  const Outputs out = run("linear_cross_entropy", std::nullopt, input, linear_weight, target, linear_bias, weight,
                          reduction, ignore_index, label_smoothing, {need_input, need_weight, need_bias});
  return {out.loss, out.grad_input, out.grad_weight, out.grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_bwd(Tensor grad, Tensor input, Tensor linear_weight,
                                                            Tensor target, OptionalTensor linear_bias,
                                                            OptionalTensor weight, int64_t reduction,
                                                            int64_t ignore_index, double label_smoothing,
                                                            bool need_input, bool need_weight, bool need_bias) {
  const Outputs out = run("linear_cross_entropy_bwd", grad, input, linear_weight, target, linear_bias, weight,
                          reduction, ignore_index, label_smoothing, {need_input, need_weight, need_bias});
  return {out.grad_input, out.grad_weight, out.grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tinyllm, CPU, m) {
  m.impl("linear_cross_entropy_fwd", TORCH_BOX(&linear_cross_entropy_fwd));
  m.impl("linear_cross_entropy_bwd", TORCH_BOX(&linear_cross_entropy_bwd));
}

}  // namespace tinyllm::cpu
