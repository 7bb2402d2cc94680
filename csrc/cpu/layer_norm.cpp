// layer_norm and add_layer_norm on the CPU: check, allocate, split over threads. The arithmetic is in
// layer_norm_kernel.h.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "layer_norm.h"
#include "torch_side.h"

namespace tinyllm::cpu {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::stable::contiguous;
using torch::stable::new_empty;
using torch::stable::parallel_for;
using torch::stable::to;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

// Rows for a thread to be worth waking: about 32 KB.
int64_t grain(int64_t size) { return std::max<int64_t>(1, 8192 / std::max<int64_t>(1, size)); }

// The rows are split into chunks by their number alone, each chunk sums its share of the parameters' gradients in row
// order, and the shares are added in chunk order: the same bits whatever the number of threads.
template <class S>
void add_chunks(const S* partial, int64_t chunks, int64_t size, S* out) {
  std::fill(out, out + size, S(0));
  parallel_for(0, size, 512, [&](int64_t begin, int64_t end) {
    for (int64_t c = 0; c < chunks; ++c)
      for (int64_t i = begin; i < end; ++i) out[i] += partial[c * 2 * size + i];
  });
}

struct Rows {
  int64_t count, size;
  Shape leading;  // the dimensions that are not normalised over
};

Rows split(const char* op, const Tensor& input, const Shape& normalized_shape) {
  const int64_t tail = static_cast<int64_t>(normalized_shape.size()), lead = input.dim() - tail;
  bool fits = tail > 0 && lead >= 0;
  for (int64_t i = 0; fits && i < tail; ++i) fits = input.size(lead + i) == normalized_shape[i];
  if (!fits) fail(op, ": the last dimensions of input, ", shape_of(input), ", must equal normalized_shape");
  Rows rows{1, 1, {}};
  for (int64_t i = 0; i < lead; ++i) {
    rows.leading.push_back(input.size(i));
    rows.count *= input.size(i);
  }
  for (const int64_t size : normalized_shape) rows.size *= size;
  return rows;
}

// Contiguous weight or bias in the compute dtype.
OptionalTensor parameter(const char* op, const char* name, const OptionalTensor& t, const Tensor& input, int64_t size) {
  if (!t.has_value()) return std::nullopt;
  check_device(op, name, *t, input);
  if (t->numel() != size) fail(op, ": ", name, " has shape ", shape_of(*t), "; it must have ", size, " elements");
  const ScalarType compute = compute_dtype(input.scalar_type());
  return contiguous(t->scalar_type() == compute ? *t : to(*t, compute));
}

const void* data_or_null(const OptionalTensor& t) { return t.has_value() ? data_of(*t) : nullptr; }

Tensor same_shape(const char* op, const char* name, const Tensor& t, const Tensor& input) {
  check_device(op, name, t, input);
  check_dtype(op, name, t, input.scalar_type());
  bool same = t.dim() == input.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == input.size(i);
  if (!same) fail(op, ": ", name, " has shape ", shape_of(t), "; ", shape_of(input), " is needed");
  return contiguous(t);
}

// Outputs are streamed past the caches when they could not stay there anyway.
bool larger_than_caches(const Tensor& output, int64_t outputs) {
  return output.numel() * static_cast<int64_t>(output.element_size()) * outputs > last_level_cache() / 2;
}

struct Forward {
  Tensor normed, sum, mean, rstd;
};

Forward forward(const char* op, const Tensor& input, const OptionalTensor& residual, const Shape& normalized_shape,
                const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  const Rows rows = split(op, input, normalized_shape);
  const int dtype = dtype_index(op, input);
  const Tensor x = contiguous(input);
  const OptionalTensor r = residual ? OptionalTensor(same_shape(op, "residual", *residual, input)) : std::nullopt;
  const OptionalTensor w = parameter(op, "weight", weight, input, rows.size);
  const OptionalTensor b = parameter(op, "bias", bias, input, rows.size);
  const ScalarType compute = compute_dtype(input.scalar_type());
  const Tensor mean = new_empty(x, rows.leading, compute), rstd = new_empty(x, rows.leading, compute);
  const Tensor normed = new_empty(x, x.sizes());
  const Tensor sum = r ? new_empty(x, x.sizes()) : normed;
  const LayerNormFwd args{data_of(x),
                          data_or_null(r),
                          data_or_null(w),
                          data_or_null(b),
                          data_of(normed),
                          r ? data_of(sum) : nullptr,
                          data_of(mean),
                          data_of(rstd),
                          rows.size,
                          eps,
                          larger_than_caches(normed, r ? 2 : 1)};
  layer_norm_forward(dtype, args, rows.count);
  return {normed, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(Tensor input, Shape normalized_shape, OptionalTensor weight,
                                                  OptionalTensor bias, double eps) {
  const Forward f = forward("layer_norm", input, std::nullopt, normalized_shape, weight, bias, eps);
  return {f.normed, f.mean, f.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(Tensor input, Tensor residual, Shape normalized_shape,
                                                              OptionalTensor weight, OptionalTensor bias, double eps) {
  const Forward f = forward("add_layer_norm", input, residual, normalized_shape, weight, bias, eps);
  return {f.normed, f.sum, f.mean, f.rstd};
}

using Grads = std::tuple<Tensor, Tensor, Tensor>;

Grads backward(const char* op, const Tensor& grad_normed, const OptionalTensor& grad_sum, const Tensor& input,
               const Shape& normalized_shape, const OptionalTensor& weight, const Tensor& mean, const Tensor& rstd,
               bool parameter_grads) {
  const Rows rows = split(op, input, normalized_shape);
  const int dtype = dtype_index(op, input);
  const ScalarType compute = compute_dtype(input.scalar_type());
  const Tensor x = contiguous(input), dy = same_shape(op, "grad_normed", grad_normed, input);
  const OptionalTensor ds = grad_sum ? OptionalTensor(same_shape(op, "grad_sum", *grad_sum, input)) : std::nullopt;
  const OptionalTensor w = parameter(op, "weight", weight, input, rows.size);
  for (const auto& [name, statistic] : {std::pair{"mean", &mean}, std::pair{"rstd", &rstd}}) {
    check_device(op, name, *statistic, input);
    check_dtype(op, name, *statistic, compute);
    if (statistic->numel() != rows.count || !statistic->is_contiguous())
      fail(op, ": ", name, " must be contiguous with one element for each row, ", rows.count);
  }
  const Tensor grad_input = new_empty(x, x.sizes());
  const LayerNormBwd args{data_of(dy),         data_or_null(ds), data_of(x),
                          data_or_null(w),     data_of(mean),    data_of(rstd),
                          data_of(grad_input), rows.size,        larger_than_caches(grad_input, 1)};
  const Shape none{0};
  const Tensor grad_weight = new_empty(x, parameter_grads ? normalized_shape : none, compute);
  const Tensor grad_bias = new_empty(x, parameter_grads ? normalized_shape : none, compute);
  layer_norm_backward(dtype, args, rows.count, parameter_grads ? data_of(grad_weight) : nullptr,
                      parameter_grads ? data_of(grad_bias) : nullptr);
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

}  // namespace

void layer_norm_forward(int dtype, const LayerNormFwd& args, int64_t rows) {
  const auto kernel = kernels().layer_norm_fwd[dtype];
  parallel_for(0, rows, grain(args.size), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void layer_norm_backward(int dtype, const LayerNormBwd& args, int64_t rows, void* grad_weight, void* grad_bias) {
  const auto kernel = kernels().layer_norm_bwd[dtype];
  if (grad_weight == nullptr) {
    parallel_for(0, rows, grain(args.size), [&](int64_t begin, int64_t end) { kernel(args, begin, end, nullptr); });
    return;
  }
  const int64_t chunk_rows = std::max<int64_t>(grain(args.size), (rows + 63) / 64);
  const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
  const auto run = [&](auto zero) {
    using S = decltype(zero);
    std::vector<S> partial(chunks * 2 * args.size, zero);
    parallel_items(chunks, [&](int64_t c) {
      kernel(args, c * chunk_rows, std::min(rows, (c + 1) * chunk_rows), partial.data() + c * 2 * args.size);
    });
    add_chunks(partial.data(), chunks, args.size, static_cast<S*>(grad_weight));
    add_chunks(partial.data() + args.size, chunks, args.size, static_cast<S*>(grad_bias));
  };
  dtype == static_cast<int>(DType::f64) ? run(0.0) : run(0.0f);
}

STABLE_TORCH_LIBRARY_IMPL(tinyllm, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd));
  m.impl("add_layer_norm_fwd", TORCH_BOX(&add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&add_layer_norm_bwd));
}

}  // namespace tinyllm::cpu
