// layer_norm, rms_norm and both after a sum on the CPU: checks, allocation, and distribution over threads. The
// arithmetic is in layer_norm_kernel.h.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../norm_checks.h"
#include "layer_norm.h"
#include "scratch.h"
#include "torch_side.h"

namespace tinyllm::cpu {
namespace {

using torch::stable::parallel_for;
using torch::stable::to;
using Shape = std::vector<int64_t>;

// The number of rows for which waking a thread pays: about 32 KB.
int64_t grain(int64_t size) { return std::max<int64_t>(1, 8192 / std::max<int64_t>(1, size)); }

using Forward = void (*)(const LayerNormFwd&, int64_t begin, int64_t end);
using Backward = void (*)(const LayerNormBwd&, int64_t begin, int64_t end, void* grads);

void run_forward(Forward kernel, const LayerNormFwd& args, int64_t rows) {
  parallel_for(0, rows, grain(args.size), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// The rows are split into chunks by their number alone. Each chunk sums its part of the gradients of the parameters in
// row order, and the partial sums are added in chunk order, so the result does not depend on the number of threads.
template <class S>
void run_backward(Backward kernel, const LayerNormBwd& args, int64_t rows, std::initializer_list<void*> grads) {
  const int64_t chunk_rows = std::max<int64_t>(grain(args.size), (rows + 63) / 64);
  const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
  const int64_t partial_size = static_cast<int64_t>(grads.size()) * args.size;  // elements of a partial sum
  const Scratch scratch(static_cast<size_t>(chunks * partial_size) * sizeof(S));
  S* const partials = reinterpret_cast<S*>(scratch.data());
  parallel_items(chunks, [&](int64_t c) {
    S* const partial = partials + c * partial_size;
    std::fill(partial, partial + partial_size, S(0));
    kernel(args, c * chunk_rows, std::min(rows, (c + 1) * chunk_rows), partial);
  });
  const int64_t columns =
      std::max<int64_t>(512, 32768 / std::max<int64_t>(1, chunks));  // for which waking a thread pays
  int64_t first = 0;
  for (void* const grad : grads) {
    S* const out = static_cast<S*>(grad);
    parallel_for(0, args.size, columns, [&](int64_t begin, int64_t end) {
      std::fill(out + begin, out + end, S(0));
      for (int64_t c = 0; c < chunks; ++c)
        for (int64_t i = begin; i < end; ++i) out[i] += partials[c * partial_size + first + i];
    });
    first += args.size;
  }
}

void run_backward(Backward kernel, DType dtype, const LayerNormBwd& args, int64_t rows,
                  std::initializer_list<void*> grads) {
  if (*grads.begin() == nullptr)
    parallel_for(0, rows, grain(args.size), [&](int64_t begin, int64_t end) { kernel(args, begin, end, nullptr); });
  else if (dtype == DType::f64)
    run_backward<double>(kernel, args, rows, grads);
  else
    run_backward<float>(kernel, args, rows, grads);
}

// Checks a weight or bias and makes it contiguous in the compute dtype.
OptionalTensor parameter(const char* op, const char* name, const OptionalTensor& t, const Tensor& input, int64_t size) {
  if (!t.has_value()) return std::nullopt;
  check_parameter(op, name, *t, input, size);
  const ScalarType compute = compute_dtype(input.scalar_type());
  return as_contiguous(t->scalar_type() == compute ? *t : to(*t, compute));
}

Tensor same_shape(const char* op, const char* name, const Tensor& t, const Tensor& input) {
  check_same(op, name, t, input);
  return as_contiguous(t);
}

int64_t bytes_of(const Tensor& t) { return t.numel() * static_cast<int64_t>(t.element_size()); }

struct Normed {
  Tensor normed, sum, mean, rstd;
};

Normed forward(const char* op, const Tensor& input, const OptionalTensor& residual, const Shape& normalized_shape,
               const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  const NormRows rows = split_rows(op, input, normalized_shape);
  const DType dtype = dtype_of(op, input);
  const Tensor x = as_contiguous(input);
  const OptionalTensor r = residual ? OptionalTensor(same_shape(op, "residual", *residual, input)) : std::nullopt;
  const OptionalTensor w = parameter(op, "weight", weight, input, rows.size);
  const OptionalTensor b = parameter(op, "bias", bias, input, rows.size);
  const ScalarType compute = compute_dtype(input.scalar_type());
  const Tensor mean = empty(rows.leading, compute), rstd = empty(rows.leading, compute);
  const Tensor normed = empty(x.sizes(), x.scalar_type());
  const Tensor sum = r ? empty(x.sizes(), x.scalar_type()) : normed;
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
                          larger_than_caches(bytes_of(x) * (r ? 4 : 2))};
  layer_norm_forward(dtype, args, rows.count);
  return {normed, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(Tensor input, Shape normalized_shape, OptionalTensor weight,
                                                  OptionalTensor bias, double eps) {
  const Normed f = forward("layer_norm", input, std::nullopt, normalized_shape, weight, bias, eps);
  return {f.normed, f.mean, f.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(Tensor input, Tensor residual, Shape normalized_shape,
                                                              OptionalTensor weight, OptionalTensor bias, double eps) {
  const Normed f = forward("add_layer_norm", input, residual, normalized_shape, weight, bias, eps);
  return {f.normed, f.sum, f.mean, f.rstd};
}

Tensor parameter_grad(bool wanted, const Shape& shape, const Tensor& input) {
  return empty(wanted ? shape : Shape{0}, compute_dtype(input.scalar_type()));
}

void* data_if(bool wanted, const Tensor& t) { return wanted ? data_of(t) : nullptr; }

using Grads = std::tuple<Tensor, Tensor, Tensor>;

Grads backward(const char* op, const Tensor& grad_normed, const OptionalTensor& grad_sum, const Tensor& input,
               const Shape& normalized_shape, const OptionalTensor& weight, const Tensor& mean, const Tensor& rstd,
               bool parameter_grads) {
  const NormRows rows = split_rows(op, input, normalized_shape);
  const DType dtype = dtype_of(op, input);
  const Tensor x = as_contiguous(input), dy = same_shape(op, "grad_normed", grad_normed, input);
  const OptionalTensor ds = grad_sum ? OptionalTensor(same_shape(op, "grad_sum", *grad_sum, input)) : std::nullopt;
  const OptionalTensor w = parameter(op, "weight", weight, input, rows.size);
  check_statistic(op, "mean", mean, input, rows.count);
  check_statistic(op, "rstd", rstd, input, rows.count);
  const Tensor grad_input = empty(x.sizes(), x.scalar_type());
  const Tensor grad_weight = parameter_grad(parameter_grads, normalized_shape, x);
  const Tensor grad_bias = parameter_grad(parameter_grads, normalized_shape, x);
  const LayerNormBwd args{data_of(dy),         data_or_null(ds), data_of(x),
                          data_or_null(w),     data_of(mean),    data_of(rstd),
                          data_of(grad_input), rows.size,        larger_than_caches(bytes_of(x) * (ds ? 4 : 3))};
  layer_norm_backward(dtype, args, rows.count, data_if(parameter_grads, grad_weight),
                      data_if(parameter_grads, grad_bias));
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

Normed rms_forward(const char* op, const Tensor& input, const OptionalTensor& residual, const Shape& normalized_shape,
                   const OptionalTensor& weight, double eps) {
  const NormRows rows = split_rows(op, input, normalized_shape);
  const DType dtype = dtype_of(op, input);
  const Tensor x = as_contiguous(input);
  const OptionalTensor r = residual ? OptionalTensor(same_shape(op, "residual", *residual, input)) : std::nullopt;
  const OptionalTensor w = parameter(op, "weight", weight, input, rows.size);
  const Tensor normed = empty(x.sizes(), x.scalar_type());
  const Tensor sum = r ? empty(x.sizes(), x.scalar_type()) : normed;
  const Tensor rstd = empty(rows.leading, compute_dtype(x.scalar_type()));
  LayerNormFwd args{};
  args.input = data_of(x);
  args.residual = data_or_null(r);
  args.weight = data_or_null(w);
  args.normed = data_of(normed);
  args.sum = r ? data_of(sum) : nullptr;
  args.rstd = data_of(rstd);
  args.size = rows.size;
  args.eps = eps;
  args.stream = larger_than_caches(bytes_of(x) * (r ? 4 : 2));
  rms_norm_forward(dtype, args, rows.count);
  return {normed, sum, rstd, rstd};
}

std::tuple<Tensor, Tensor> rms_backward(const char* op, const Tensor& grad_normed, const OptionalTensor& grad_sum,
                                        const Tensor& input, const Shape& normalized_shape,
                                        const OptionalTensor& weight, const Tensor& rstd, bool parameter_grads) {
  const NormRows rows = split_rows(op, input, normalized_shape);
  const DType dtype = dtype_of(op, input);
  const Tensor x = as_contiguous(input), dy = same_shape(op, "grad", grad_normed, input);
  const OptionalTensor ds = grad_sum ? OptionalTensor(same_shape(op, "grad_sum", *grad_sum, input)) : std::nullopt;
  const OptionalTensor w = parameter(op, "weight", weight, input, rows.size);
  check_statistic(op, "rstd", rstd, input, rows.count);
  const Tensor grad_input = empty(x.sizes(), x.scalar_type());
  const Tensor grad_weight = parameter_grad(parameter_grads, normalized_shape, x);
  LayerNormBwd args{};
  args.grad_normed = data_of(dy);
  args.grad_sum = data_or_null(ds);
  args.input = data_of(x);
  args.weight = data_or_null(w);
  args.rstd = data_of(rstd);
  args.grad_input = data_of(grad_input);
  args.size = rows.size;
  args.stream = larger_than_caches(bytes_of(x) * (ds ? 4 : 3));
  rms_norm_backward(dtype, args, rows.count, data_if(parameter_grads, grad_weight));
  return {grad_input, grad_weight};
}

std::tuple<Tensor, Tensor> rms_norm_fwd(Tensor input, Shape normalized_shape, OptionalTensor weight, double eps) {
  const Normed f = rms_forward("rms_norm", input, std::nullopt, normalized_shape, weight, eps);
  return {f.normed, f.rstd};
}

std::tuple<Tensor, Tensor> rms_norm_bwd(Tensor grad, Tensor input, Shape normalized_shape, OptionalTensor weight,
                                        Tensor rstd, bool parameter_grads) {
  return rms_backward("rms_norm_bwd", grad, std::nullopt, input, normalized_shape, weight, rstd, parameter_grads);
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_fwd(Tensor input, Tensor residual, Shape normalized_shape,
                                                    OptionalTensor weight, double eps) {
  const Normed f = rms_forward("add_rms_norm", input, residual, normalized_shape, weight, eps);
  return {f.normed, f.sum, f.rstd};
}

std::tuple<Tensor, Tensor> add_rms_norm_bwd(Tensor grad_normed, OptionalTensor grad_sum, Tensor sum,
                                            Shape normalized_shape, OptionalTensor weight, Tensor rstd,
                                            bool parameter_grads) {
  return rms_backward("add_rms_norm_bwd", grad_normed, grad_sum, sum, normalized_shape, weight, rstd, parameter_grads);
}

}  // namespace

void layer_norm_forward(DType dtype, const LayerNormFwd& args, int64_t rows) {
  run_forward(kernels().layer_norm_fwd[dtype], args, rows);
}

void layer_norm_backward(DType dtype, const LayerNormBwd& args, int64_t rows, void* grad_weight, void* grad_bias) {
  run_backward(kernels().layer_norm_bwd[dtype], dtype, args, rows, {grad_weight, grad_bias});
}

void rms_norm_forward(DType dtype, const LayerNormFwd& args, int64_t rows) {
  run_forward(kernels().rms_norm_fwd[dtype], args, rows);
}

void rms_norm_backward(DType dtype, const LayerNormBwd& args, int64_t rows, void* grad_weight) {
  run_backward(kernels().rms_norm_bwd[dtype], dtype, args, rows, {grad_weight});
}

STABLE_TORCH_LIBRARY_IMPL(tinyllm, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd));
  m.impl("add_layer_norm_fwd", TORCH_BOX(&add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&add_layer_norm_bwd));
  m.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd));
  m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd));
  m.impl("add_rms_norm_fwd", TORCH_BOX(&add_rms_norm_fwd));
  m.impl("add_rms_norm_bwd", TORCH_BOX(&add_rms_norm_bwd));
}

}  // namespace tinyllm::cpu
