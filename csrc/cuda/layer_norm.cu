// layer_norm, add_layer_norm and rms_norm on NVIDIA GPUs: checks, allocation, and the choice of the launch. The
// arithmetic is in layer_norm_kernel.cuh and layer_norm_bwd_kernel.cuh.
#include <tuple>

#include "../norm_checks.h"
#include "dtypes.cuh"
#include "layer_norm_bwd_kernel.cuh"
#include "torch_side.cuh"

namespace tinyllm::cuda {
namespace {

using Shape = std::vector<int64_t>;

constexpr int64_t kBlockColumns = static_cast<int64_t>(kNormThreads) * kNormElements;
constexpr int64_t kClusterBlocks = 8;
constexpr int kClusterCapability = 90;    // code for this compute capability or a later one has clusters
constexpr int64_t kForwardThreads = 128;  // threads of a block if a row needs no more than a warp

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t whole_warps(int64_t threads) { return std::max<int64_t>(1, ceil_div(threads, kWarp)) * kWarp; }
int64_t power_of_two(int64_t at_least) {
  int64_t p = 1;
  while (p < at_least) p *= 2;
  return p;
}

// ---- Tensors

// Rows of contiguous elements, row_step elements apart; a copy only if the strides require one.
struct RowView {
  Tensor tensor;
  int64_t row_step;

  void* data() const { return data_of(tensor); }
};

RowView as_rows(const Tensor& t, const NormRows& rows) {
  const int64_t lead = static_cast<int64_t>(rows.leading.size());
  bool fits = true;
  int64_t next = 1;  // the stride with which a dimension continues those behind it
  for (int64_t i = t.dim(); i-- > lead;) {
    fits = fits && (t.size(i) == 1 || t.stride(i) == next);
    next *= t.size(i);
  }
  int64_t row_step = rows.size;
  bool any = false;
  for (int64_t i = lead; i-- > 0;) {
    if (t.size(i) == 1) continue;
    if (!any) row_step = next = t.stride(i);
    any = true;
    fits = fits && t.stride(i) == next;
    next *= t.size(i);
  }
  if (fits) return {t, row_step};
  return {torch::stable::contiguous(t), rows.size};
}

RowView checked_rows(const char* op, const char* name, const Tensor& t, const Tensor& input, const NormRows& rows) {
  check_same(op, name, t, input);
  return as_rows(t, rows);
}

// Checks a weight or bias; `kept` owns it while it is in use.
NormParameter parameter(const char* op, const char* name, const OptionalTensor& t, const Tensor& input,
                        const NormRows& rows, OptionalTensor& kept) {
  if (!t.has_value()) return {nullptr, false};
  check_parameter(op, name, *t, input, rows.size);
  const ScalarType dtype = t->scalar_type();
  if (dtype != input.scalar_type() && dtype != ScalarType::Float)
    fail(op, ": ", name, " has dtype ", torch::headeronly::toString(dtype), "; input's, ",
         torch::headeronly::toString(input.scalar_type()), ", or float32 is needed");
  kept = as_contiguous(*t);
  return {data_of(*kept), dtype == ScalarType::Float};
}

// ---- The choice of a launch

// The instantiation of a kernel, and how a row is divided.
struct Plan {
  bool vectors;     // whether elements are accessed in vectors of 16 bytes
  bool few;         // whether a thread has few vectors
  int64_t threads;  // threads of a row in a block
  int64_t blocks;   // blocks of a row, which form a cluster
  int64_t held;     // the most vectors in a thread
};

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether all rows consist of whole aligned vectors of 16 bytes.
bool vectors_fit(const Tensor& input, const NormRows& rows, std::initializer_list<const RowView*> views,
                 std::initializer_list<const void*> others) {
  const int64_t width = 16 / static_cast<int64_t>(input.element_size());
  bool fit = rows.size % width == 0;
  for (const RowView* const view : views)
    fit = fit && (view == nullptr || (aligned(view->data()) && (rows.count < 2 || view->row_step % width == 0)));
  for (const void* const p : others) fit = fit && aligned(p);
  return fit;
}

// Returns the most columns that a row may have on the current device: those of one block if its code has no clusters.
int64_t most_columns() {
  const bool clusters = compiled_for(&norm_forward_kernel<float, 1, kManyVectors<1>, true>) >= kClusterCapability;
  return clusters ? kBlockColumns * kClusterBlocks : kBlockColumns;
}

// Plans a launch. `spread` gives a row more threads than it needs, because there are few rows.
Plan plan(const char* op, const Tensor& input, const NormRows& rows, bool vectors, bool spread) {
  const int64_t most = kBlockColumns * kClusterBlocks;
  if (rows.size > most) fail(op, ": normalized_shape has ", rows.size, " elements; the kernel takes at most ", most);
  const int64_t width = vectors ? 16 / static_cast<int64_t>(input.element_size()) : 1;
  const int64_t few = vectors ? kFewVectors<2> : kFewVectors<1>, many = kNormElements / width;
  const int64_t count = rows.size / width;
  Plan p{vectors, false, 0, 1, 0};
  while (rows.size > p.blocks * kBlockColumns) p.blocks *= 2;
  if (p.blocks > 1 && most_columns() < most)
    fail(op, ": normalized_shape has ", rows.size, " elements; the kernel takes at most ", kBlockColumns,
         " where its code is not compiled for compute capability 9.0 or later");
  const int64_t share = ceil_div(count, p.blocks);
  if (p.blocks == 1 && count <= few * kWarp) {
    p.few = true;
    p.threads = power_of_two(ceil_div(count, few));
  } else if (p.blocks == 1 && spread && count <= few * kNormThreads) {
    p.few = true;
    p.threads = whole_warps(ceil_div(count, few));
  } else {
    p.threads = whole_warps(ceil_div(share, many));
  }
  p.held = ceil_div(share, p.threads);
  return p;
}

template <class T, int W>
auto forward_kernel(const Plan& p) {
  return p.blocks > 1 ? &norm_forward_kernel<T, W, kManyVectors<W>, true>
         : p.few      ? &norm_forward_kernel<T, W, kFewVectors<W>, false>
                      : &norm_forward_kernel<T, W, kManyVectors<W>, false>;
}
template <class T, int W>
auto backward_kernel(const Plan& p) {
  return p.blocks > 1 ? &norm_backward_kernel<T, W, kManyVectors<W>, true>
         : p.few      ? &norm_backward_kernel<T, W, kFewVectors<W>, false>
                      : &norm_backward_kernel<T, W, kManyVectors<W>, false>;
}

unsigned as_unsigned(int64_t n) { return static_cast<unsigned>(n); }

void launch_forward(const char* op, const Device& device, const Tensor& input, const Plan& p, const NormForward& args) {
  int64_t rows = 1;
  if (p.threads <= kWarp) {
    const int64_t processors = device.multiprocessors();
    rows = kForwardThreads / p.threads;
    while (rows * p.threads > kWarp && ceil_div(args.rows, rows) < processors) rows /= 2;
  }
  const int64_t blocks = ceil_div(args.rows, rows) * p.blocks;
  const LaunchShape shape{dim3(as_unsigned(blocks)), dim3(as_unsigned(p.threads), as_unsigned(rows)), kNormSumBytes,
                          as_unsigned(p.blocks)};
  with_type(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    device.launch(op, p.vectors ? forward_kernel<T, kVector<T>>(p) : forward_kernel<T, 1>(p), shape, args);
  });
}

// ---- Forward

struct Normed {
  Tensor normed, sum, mean, rstd;
};

Normed forward(const char* op, const Tensor& input, const OptionalTensor& residual, const Shape& normalized_shape,
               const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool centered) {
  const NormRows rows = split_rows(op, input, normalized_shape);
  const Device device(input);
  const RowView x = as_rows(input, rows);
  const std::optional<RowView> r =
      residual ? std::optional(checked_rows(op, "residual", *residual, input, rows)) : std::nullopt;
  OptionalTensor kept[2];
  const NormParameter w = parameter(op, "weight", weight, input, rows, kept[0]);
  const NormParameter b = parameter(op, "bias", bias, input, rows, kept[1]);
  const Tensor normed = device.empty(input.sizes(), input.scalar_type());
  const Tensor sum = r ? device.empty(input.sizes(), input.scalar_type()) : normed;
  Tensor rstd = device.empty(rows.leading, ScalarType::Float);
  Tensor mean = centered ? device.empty(rows.leading, ScalarType::Float) : rstd;
  if (rows.count == 0 || rows.size == 0) {
    if (rows.count > 0) torch::stable::zero_(rstd), torch::stable::zero_(mean);
    return {normed, sum, mean, rstd};
  }
  const NormForward args{x.data(),
                         r ? r->data() : nullptr,
                         w,
                         b,
                         data_of(normed),
                         r ? data_of(sum) : nullptr,
                         centered ? static_cast<float*>(data_of(mean)) : nullptr,
                         static_cast<float*>(data_of(rstd)),
                         x.row_step,
                         r ? r->row_step : 0,
                         rows.count,
                         static_cast<int>(std::min(rows.size, kBlockColumns * kClusterBlocks)),
                         static_cast<float>(eps)};
  const bool vectors = vectors_fit(input, rows, {&x, r ? &*r : nullptr}, {w.data, b.data, args.normed, args.sum});
  const Plan p = plan(op, input, rows, vectors, rows.count <= device.multiprocessors());
  launch_forward(op, device, input, p, args);
  return {normed, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(Tensor input, Shape normalized_shape, OptionalTensor weight,
                                                  OptionalTensor bias, double eps) {
  const Normed f = forward("layer_norm", input, std::nullopt, normalized_shape, weight, bias, eps, true);
  return {f.normed, f.mean, f.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(Tensor input, Tensor residual, Shape normalized_shape,
                                                              OptionalTensor weight, OptionalTensor bias, double eps) {
  const Normed f = forward("add_layer_norm", input, residual, normalized_shape, weight, bias, eps, true);
  return {f.normed, f.sum, f.mean, f.rstd};
}

std::tuple<Tensor, Tensor> rms_norm_fwd(Tensor input, Shape normalized_shape, OptionalTensor weight, double eps) {
  const Normed f = forward("rms_norm", input, std::nullopt, normalized_shape, weight, std::nullopt, eps, false);
  return {f.normed, f.rstd};
}

// ---- Backward

// The distribution of rows over blocks, and the shared memory of a block.
struct BackwardShape {
  int64_t rows;   // rows of a block at a time
  int64_t parts;  // blocks or clusters, each of which writes partial sums
  int stages;
  size_t shared;
};

// Returns nothing if shared memory has no room for a row.
std::optional<BackwardShape> backward_shape(const Device& device, const Plan& p, const NormRows& rows, int arrays) {
  const size_t limit = shared_memory_limit(device.capability());
  const int64_t of_a_warp = std::max<int64_t>(1, kWarp / p.threads);  // rows of a warp at a time
  const int64_t turns = ceil_div(rows.count, of_a_warp);
  const int64_t a_processor = backward_blocks(p.few);
  BackwardShape s{};
  s.parts = std::clamp<int64_t>(device.multiprocessors() * a_processor / p.blocks, 1, turns);
  s.rows = std::min(std::max<int64_t>(1, backward_threads(p.few) / p.threads), ceil_div(turns, s.parts) * of_a_warp);
  for (;; s.rows = s.rows / 2) {
    const size_t row_floats = static_cast<size_t>(s.rows > 1 ? s.rows * rows.size : 0) * sizeof(float);
    const size_t stage = p.vectors ? static_cast<size_t>(arrays * p.held * p.threads * s.rows) * 16 : 0;
    const size_t room = (limit - 1024) / static_cast<size_t>(a_processor) - kNormSumBytes;
    s.stages = 2 * stage <= room ? 2 : 1;
    s.shared = kNormSumBytes + std::max(row_floats, stage * static_cast<size_t>(s.stages));
    if (s.shared <= room + kNormSumBytes) return s;
    if (s.rows / 2 * p.threads < kWarp || s.rows / 2 % of_a_warp != 0) return std::nullopt;
  }
}

using Grads = std::tuple<Tensor, Tensor, Tensor>;

Grads backward(const char* op, const Tensor& grad_normed, const OptionalTensor& grad_sum, const Tensor& input,
               const Shape& normalized_shape, const OptionalTensor& weight, const OptionalTensor& mean,
               const Tensor& rstd, bool parameter_grads) {
  const NormRows rows = split_rows(op, input, normalized_shape);
  const Device device(input);
  const RowView x = as_rows(input, rows), dy = checked_rows(op, "grad", grad_normed, input, rows);
  const std::optional<RowView> ds =
      grad_sum ? std::optional(checked_rows(op, "grad_sum", *grad_sum, input, rows)) : std::nullopt;
  OptionalTensor kept;
  const NormParameter w = parameter(op, "weight", weight, input, rows, kept);
  if (mean) check_statistic(op, "mean", *mean, input, rows.count);
  check_statistic(op, "rstd", rstd, input, rows.count);
  const Tensor grad_input = device.empty(input.sizes(), input.scalar_type());
  const Shape shape = parameter_grads ? normalized_shape : Shape{0};
  Tensor grad_weight = device.empty(shape, ScalarType::Float);
  Tensor grad_bias = mean ? device.empty(shape, ScalarType::Float) : grad_weight;
  if (rows.count == 0 || rows.size == 0) {
    torch::stable::zero_(grad_weight), torch::stable::zero_(grad_bias);
    return {grad_input, grad_weight, grad_bias};
  }
  NormBackward args{dy.data(),
                    ds ? ds->data() : nullptr,
                    x.data(),
                    w,
                    static_cast<const float*>(data_or_null(mean)),
                    static_cast<const float*>(data_of(rstd)),
                    data_of(grad_input),
                    nullptr,
                    nullptr,
                    dy.row_step,
                    ds ? ds->row_step : 0,
                    x.row_step,
                    rows.count,
                    static_cast<int>(std::min(rows.size, kBlockColumns * kClusterBlocks)),
                    0,
                    0};
  const bool vectors = vectors_fit(input, rows, {&x, &dy, ds ? &*ds : nullptr}, {w.data, args.grad_input});
  Plan p = plan(op, input, rows, vectors, false);
  std::optional<BackwardShape> s = backward_shape(device, p, rows, ds ? 3 : 2);
  if (!s) {
    p = plan(op, input, rows, false, false);
    s = backward_shape(device, p, rows, 0);
  }
  args.vectors = static_cast<int>(p.held);
  args.stages = s->stages;
  OptionalTensor parts;
  if (parameter_grads) {
    parts = device.empty(Shape{mean ? 2 : 1, s->parts, rows.size}, ScalarType::Float);
    args.weight_parts = static_cast<float*>(data_of(*parts));
    if (mean) args.bias_parts = args.weight_parts + s->parts * rows.size;
  }
  const LaunchShape launch{dim3(as_unsigned(s->parts * p.blocks)), dim3(as_unsigned(p.threads), as_unsigned(s->rows)),
                           s->shared, as_unsigned(p.blocks)};
  with_type(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    device.launch(op, p.vectors ? backward_kernel<T, kVector<T>>(p) : backward_kernel<T, 1>(p), launch, args);
  });
  if (parameter_grads) {
    const LaunchShape sum{dim3(as_unsigned(ceil_div(rows.size, kPartColumns)), mean ? 2 : 1),
                          dim3(kPartColumns, kPartRows), kPartColumns * kPartRows * sizeof(float)};
    device.launch(op, &norm_sum_parts_kernel, sum, args.weight_parts, args.bias_parts, data_of(grad_weight),
                  data_of(grad_bias), s->parts, rows.size);
  }
  return {grad_input, grad_weight, grad_bias};
}

Grads layer_norm_bwd(Tensor grad, Tensor input, Shape normalized_shape, OptionalTensor weight, Tensor mean, Tensor rstd,
                     bool parameter_grads) {
  return backward("layer_norm_bwd", grad, std::nullopt, input, normalized_shape, weight, mean, rstd, parameter_grads);
}

Grads add_layer_norm_bwd(Tensor grad_normed, OptionalTensor grad_sum, Tensor sum, Shape normalized_shape,
                         OptionalTensor weight, Tensor mean, Tensor rstd, bool parameter_grads) {
  return backward("add_layer_norm_bwd", grad_normed, grad_sum, sum, normalized_shape, weight, mean, rstd,
                  parameter_grads);
}

std::tuple<Tensor, Tensor> rms_norm_bwd(Tensor grad, Tensor input, Shape normalized_shape, OptionalTensor weight,
                                        Tensor rstd, bool parameter_grads) {
  const Grads g = backward("rms_norm_bwd", grad, std::nullopt, input, normalized_shape, weight, std::nullopt, rstd,
                           parameter_grads);
  return {std::get<0>(g), std::get<1>(g)};
}

}  // namespace

// tinyllm/ops/_cuda.py calls this without the dispatcher, because tensors are fake at trace time. If the device cannot
// be queried, the lower limit is returned.
extern "C" __attribute__((visibility("default"))) int64_t tinyllm_norm_columns([[maybe_unused]] int32_t device) {
  try {
#if defined(__CUDACC__)
    const torch::stable::accelerator::DeviceGuard guard(device);
#endif
    return most_columns();
  } catch (const std::exception&) {
    return kBlockColumns;
  }
}

TINYLLM_CUDA_OPERATORS(m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd));
  m.impl("add_layer_norm_fwd", TORCH_BOX(&add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&add_layer_norm_bwd));
  m.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd));
  m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd));
}

}  // namespace tinyllm::cuda
