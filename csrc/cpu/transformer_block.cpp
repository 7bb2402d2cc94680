// A whole transformer block as one operator for forward and one for backward: for a small model, calls of separate
// operators take longer than their work. Forward saves all that backward needs in one tensor, `saved`.
#include "transformer_block.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "attention.h"
#include "layer_norm.h"
#include "scratch.h"

namespace tinyllm::cpu {
namespace {

template <class S>
Attention attention_of(const BlockSizes& s, const BlockSaved<S>& saved) {
  const int64_t head_dim = s.width / s.heads;
  const auto heads = [&](void* data) { return Strided{data, s.tokens * s.width, head_dim, s.width, 1}; };
  Attention a{};
  a.batch = s.batch;
  a.heads = a.kv_heads = s.heads;
  a.queries = a.keys = s.tokens;
  a.head_dim = a.value_dim = head_dim;
  a.scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
  a.causal = s.causal;
  a.query = heads(saved.query);
  a.key = heads(saved.key);
  a.value = heads(saved.value);
  a.out = heads(saved.attended);
  a.lse = saved.lse;
  return a;
}

// A norm of the block: its parameters, and its saved statistics.
template <class S>
struct Norm {
  const void *weight, *bias;
  S *mean, *rstd;
};

template <class S>
Norm<S> norm1_of(const BlockParameters<const void*>& w, const BlockSaved<S>& saved) {
  return {w.norm1, w.norm1_bias, saved.mean1, saved.rstd1};
}
template <class S>
Norm<S> norm2_of(const BlockParameters<const void*>& w, const BlockSaved<S>& saved) {
  return {w.norm2, w.norm2_bias, saved.mean2, saved.rstd2};
}

}  // namespace

template <class S>
void block_forward(const BlockSizes& s, const BlockParameters<const void*>& w, const S* input, double eps1, double eps2,
                   S* out, const BlockSaved<S>& saved) {
  const int64_t rows = s.rows, d = s.width, h = s.hidden;
  const Norm<S> norm1 = norm1_of(w, saved), norm2 = norm2_of(w, saved);
  const auto run_norm = [&](const Norm<S>& norm, double eps, const S* x, const S* residual, S* normed, S* sum) {
    layer_norm_forward(s.dtype,
                       {.input = x,
                        .residual = residual,
                        .weight = norm.weight,
                        .bias = norm.bias,
                        .normed = normed,
                        .sum = sum,
                        .mean = norm.mean,
                        .rstd = norm.rstd,
                        .size = d,
                        .eps = eps,
                        .stream = false},
                       rows);
  };
  const auto linear = [&](const S* x, int64_t inputs, const void* weight, const void* bias, S* y, int64_t outputs,
                          const S* residual = nullptr) {
    Matmul m = linear_output(x, weight, rows, inputs, outputs, y);
    m.bias = bias;
    m.residual = residual;
    return m;
  };
  const S* x = input;
  if (s.norm_first) {
    run_norm(norm1, eps1, input, nullptr, saved.normed1, nullptr);
    x = saved.normed1;
  }
  run_matmuls(s.dtype,
              {linear(x, d, w.query, w.query_bias, saved.query, d), linear(x, d, w.key, w.key_bias, saved.key, d),
               linear(x, d, w.value, w.value_bias, saved.value, d)});
  attention_forward(s.dtype, attention_of(s, saved));
  if (s.projected) run_matmuls(s.dtype, {linear(saved.attended, d, w.out_proj, w.out_proj_bias, saved.sum1, d, input)});
  // Without a projection, whose epilogue adds the residual, the norm does.
  const S* const middle_input = s.projected ? saved.sum1 : saved.attended;
  const S* const residual = s.projected ? nullptr : input;
  S* const sum = s.projected ? nullptr : saved.sum1;
  S* const middle = s.norm_first ? saved.norm2_row : saved.normed1;
  if (s.norm_first)
    run_norm(norm2, eps2, middle_input, residual, middle, sum);
  else
    run_norm(norm1, eps1, middle_input, residual, middle, sum);
  Matmul first = linear(middle, d, w.linear1, w.linear1_bias, saved.hidden, h);
  first.activation = s.activation;
  first.pre_activation = saved.pre_activation;
  S* const last = s.norm_first ? out : saved.norm2_row;
  run_matmuls(s.dtype, {first, linear(saved.hidden, h, w.linear2, w.linear2_bias, last, d,
                                      s.norm_first ? saved.sum1 : saved.normed1)});
  if (!s.norm_first) run_norm(norm2, eps2, last, nullptr, out, nullptr);
}

template <class S>
void block_backward(const BlockSizes& s, const BlockParameters<const void*>& w, const S* input, const S* grad,
                    const BlockSaved<S>& saved, S* grad_input, const BlockParameters<void*>& g) {
  const int64_t rows = s.rows, d = s.width, h = s.hidden;
  const auto layout = [&](TypedArena<S>& arena, S** wide, std::initializer_list<S**> narrow) {
    *wide = arena.take(rows * h);
    for (S** p : narrow) *p = arena.take(rows * d);
  };
  S *grad_hidden, *grad_sum2, *grad_middle, *grad_sum1, *grad_attended, *grad_query, *grad_key, *grad_value;
  const auto all = {&grad_sum2, &grad_middle, &grad_sum1, &grad_attended, &grad_query, &grad_key, &grad_value};
  TypedArena<S> sizes;
  layout(sizes, &grad_hidden, all);
  const Scratch scratch(static_cast<size_t>(sizes.used()) * sizeof(S));
  TypedArena<S> arena(scratch.data());
  layout(arena, &grad_hidden, all);

  const Norm<S> norm1 = norm1_of(w, saved), norm2 = norm2_of(w, saved);
  const auto norm_backward = [&](const Norm<S>& norm, const S* grad_normed, const S* grad_sum, const S* x, S* grad_x,
                                 void* grad_weight, void* grad_bias) {
    // The kernel computes the gradients of both parameters; without a bias the second one is discarded.
    std::vector<S> unused(grad_bias == nullptr ? d : 0);
    layer_norm_backward(s.dtype,
                        {.grad_normed = grad_normed,
                         .grad_sum = grad_sum,
                         .input = x,
                         .weight = norm.weight,
                         .mean = norm.mean,
                         .rstd = norm.rstd,
                         .grad_input = grad_x,
                         .size = d,
                         .stream = false},
                        rows, grad_weight, grad_bias == nullptr ? unused.data() : grad_bias);
  };
  const auto bias_grad = [&](const S* gradient, int64_t columns, void* grad_bias) {
    if (grad_bias != nullptr) sum_columns(s.dtype, gradient, rows, columns, grad_bias);
  };
  const auto input_grad = [&](const S* gradient, int64_t outputs, const void* weight, S* grad_x, int64_t inputs,
                              const S* residual = nullptr) {
    Matmul m = linear_grad_input(gradient, weight, rows, inputs, outputs, grad_x);
    m.residual = residual;
    return m;
  };

  const S* grad_last = grad;
  if (!s.norm_first) {
    norm_backward(norm2, grad, nullptr, saved.norm2_row, grad_sum2, g.norm2, g.norm2_bias);
    grad_last = grad_sum2;
  }
  // feed_forward
  Matmul through = input_grad(grad_last, d, w.linear2, grad_hidden, h);
  through.activation = s.activation;
  through.gate = saved.gate();
  const S* middle = s.norm_first ? saved.norm2_row : saved.normed1;
  run_matmuls(s.dtype,
              {through, input_grad(grad_hidden, h, w.linear1, grad_middle, d, s.norm_first ? nullptr : grad_last)});
  run_matmuls(s.dtype, {linear_grad_weight(grad_last, saved.hidden, rows, h, d, g.linear2)});
  run_matmuls(s.dtype, {linear_grad_weight(grad_hidden, middle, rows, d, h, g.linear1)});
  bias_grad(grad_last, d, g.linear2_bias);
  bias_grad(grad_hidden, h, g.linear1_bias);
  if (s.norm_first)
    norm_backward(norm2, grad_middle, grad, saved.sum1, grad_sum1, g.norm2, g.norm2_bias);
  else
    norm_backward(norm1, grad_middle, nullptr, saved.sum1, grad_sum1, g.norm1, g.norm1_bias);
  // attention
  if (s.projected) {
    run_matmuls(s.dtype, {input_grad(grad_sum1, d, w.out_proj, grad_attended, d)});
    run_matmuls(s.dtype, {linear_grad_weight(grad_sum1, saved.attended, rows, d, d, g.out_proj)});
    bias_grad(grad_sum1, d, g.out_proj_bias);
  } else {
    grad_attended = grad_sum1;
  }
  Attention a = attention_of(s, saved);
  const auto heads = [&](S* data) {
    Strided like = a.query;
    like.data = data;
    return like;
  };
  a.grad_out = heads(grad_attended);
  a.grad_query = heads(grad_query);
  a.grad_key = heads(grad_key);
  a.grad_value = heads(grad_value);
  attention_backward(s.dtype, a);
  const S* x = s.norm_first ? saved.normed1 : input;
  run_matmuls(s.dtype, {linear_grad_weight(grad_query, x, rows, d, d, g.query),
                        linear_grad_weight(grad_key, x, rows, d, d, g.key),
                        linear_grad_weight(grad_value, x, rows, d, d, g.value)});
  bias_grad(grad_query, d, g.query_bias);
  bias_grad(grad_key, d, g.key_bias);
  bias_grad(grad_value, d, g.value_bias);
  S* sums = s.norm_first ? grad_middle : grad_input;
  run_matmuls(s.dtype,
              {input_grad(grad_query, d, w.query, sums, d, s.norm_first ? nullptr : grad_sum1),
               input_grad(grad_key, d, w.key, sums, d, sums), input_grad(grad_value, d, w.value, sums, d, sums)});
  if (s.norm_first) norm_backward(norm1, grad_middle, grad_sum1, input, grad_input, g.norm1, g.norm1_bias);
}

template void block_forward(const BlockSizes&, const BlockParameters<const void*>&, const float*, double, double,
                            float*, const BlockSaved<float>&);
template void block_forward(const BlockSizes&, const BlockParameters<const void*>&, const double*, double, double,
                            double*, const BlockSaved<double>&);
template void block_backward(const BlockSizes&, const BlockParameters<const void*>&, const float*, const float*,
                             const BlockSaved<float>&, float*, const BlockParameters<void*>&);
template void block_backward(const BlockSizes&, const BlockParameters<const void*>&, const double*, const double*,
                             const BlockSaved<double>&, double*, const BlockParameters<void*>&);

BlockSizes block_settings(const char* op, DType dtype, int64_t batch, int64_t tokens, int64_t width, int64_t num_heads,
                          bool causal, bool norm_first, const std::string& activation) {
  if (num_heads < 1 || width % num_heads != 0 || width / std::max<int64_t>(1, num_heads) > 1024)
    fail(op, ": num_heads is ", num_heads, "; it must divide D, ", width, ", into at most 1024 columns");
  if (activation != "relu" && activation != "gelu")
    fail(op, ": activation is '", activation, "'; relu or gelu is needed");
  BlockSizes s{};
  s.dtype = dtype;
  s.batch = batch;
  s.tokens = tokens;
  s.rows = batch * tokens;
  s.width = width;
  s.heads = num_heads;
  s.projected = num_heads > 1;
  s.causal = causal;
  s.norm_first = norm_first;
  s.activation = activation == "relu" ? Activation::relu : Activation::gelu;
  return s;
}

int64_t hidden_dim(const BlockSizes& s, const std::vector<Tensor>& parameters, size_t first) {
  const Tensor& linear1 = parameters[first + (s.projected ? 4 : 3)];
  return linear1.dim() > 0 ? linear1.size(0) : 0;
}

const void* parameter_data(const char* op, std::vector<Tensor>& parameters, size_t index, ScalarType dtype,
                           const Extents& extents) {
  Tensor& t = parameters[index];
  if (!t.is_cpu()) fail(op, ": parameter ", index, " is not on the CPU, where the others are");
  check_dtype(op, "a parameter", t, dtype);
  const bool vector = extents.columns < 0;
  if (t.dim() != (vector ? 1 : 2) || t.size(0) != extents.rows || (!vector && t.size(1) != extents.columns))
    fail(op, ": parameter ", index, " has shape ", shape_of(t), ", which does not fit the others");
  t = as_contiguous(t);
  return data_of(t);
}

namespace {

struct Block {
  BlockSizes sizes;
  BlockParameters<const void*> weights;
};

Block prepare(const char* op, const Tensor& input, std::vector<Tensor>& parameters, int64_t num_heads, bool causal,
              bool norm_first, const std::string& activation) {
  const DType dtype = dtype_of(op, input);
  if (dtype != DType::f32 && dtype != DType::f64)
    fail(op, ": input has dtype ", torch::headeronly::toString(input.scalar_type()), "; float or double is needed");
  if (input.dim() != 3) fail(op, ": input has shape ", shape_of(input), "; (B, T, D) is needed");
  Block block{
      block_settings(op, dtype, input.size(0), input.size(1), input.size(2), num_heads, causal, norm_first, activation),
      {}};
  BlockSizes& s = block.sizes;
  const int64_t given = static_cast<int64_t>(parameters.size()), without = s.parameters();
  s.bias = given == 2 * without;
  if (!s.bias && given != without)
    fail(op, ": there are ", given, " parameters; ", without, " or ", 2 * without, " are needed");
  s.hidden = hidden_dim(s, parameters, 0);
  size_t index = 0;
  block.weights.visit(s, [&](const void*& at, const Extents& extents) {
    at = parameter_data(op, parameters, index++, input.scalar_type(), extents);
  });
  return block;
}

std::tuple<Tensor, Tensor> transformer_block_fwd(Tensor input, std::vector<Tensor> parameters, int64_t num_heads,
                                                 bool causal, bool norm_first, std::string activation, double eps1,
                                                 double eps2, bool save) {
  const auto [s, w] = prepare("transformer_block", input, parameters, num_heads, causal, norm_first, activation);
  const Tensor x = as_contiguous(input), out = empty(x.sizes(), x.scalar_type());
  return with_compute_type(s.dtype, [&, &s = s, &w = w](auto zero) -> std::tuple<Tensor, Tensor> {
    using S = decltype(zero);
    TypedArena<S> sizes;
    BlockSaved<S>(s, sizes);
    const Tensor saved = empty({save ? sizes.used() : 0}, x.scalar_type());
    const Scratch scratch(save ? 0 : static_cast<size_t>(sizes.used()) * sizeof(S));
    TypedArena<S> arena(save ? data_of(saved) : scratch.data());
    block_forward<S>(s, w, static_cast<const S*>(data_of(x)), eps1, eps2, static_cast<S*>(data_of(out)),
                     BlockSaved<S>(s, arena));
    return {out, saved};
  });
}

std::tuple<Tensor, std::vector<Tensor>> transformer_block_bwd(Tensor grad, Tensor input, std::vector<Tensor> parameters,
                                                              Tensor saved, int64_t num_heads, bool causal,
                                                              bool norm_first, std::string activation) {
  const char* const op = "transformer_block_bwd";
  const auto [s, w] = prepare(op, input, parameters, num_heads, causal, norm_first, activation);
  for (const auto& [name, t] : {std::pair{"grad", &grad}, std::pair{"saved", &saved}}) {
    check_device(op, name, *t, input);
    check_dtype(op, name, *t, input.scalar_type());
  }
  check_shape(op, "grad", grad, {s.batch, s.tokens, s.width});
  if (!saved.is_contiguous()) fail(op, ": saved must be contiguous");
  const Tensor x = as_contiguous(input), dy = as_contiguous(grad), grad_input = empty(x.sizes(), x.scalar_type());
  std::vector<Tensor> grads;
  BlockParameters<void*> g{};
  g.visit(s, [&](void*& at, const Extents& extents) {
    grads.push_back(empty(extents.shape(), x.scalar_type()));
    at = data_of(grads.back());
  });
  with_compute_type(s.dtype, [&, &s = s, &w = w](auto zero) {
    using S = decltype(zero);
    TypedArena<S> sizes;
    BlockSaved<S>(s, sizes);
    check_shape(op, "saved", saved, {sizes.used()});
    TypedArena<S> arena(data_of(saved));
    block_backward<S>(s, w, static_cast<const S*>(data_of(x)), static_cast<const S*>(data_of(dy)),
                      BlockSaved<S>(s, arena), static_cast<S*>(data_of(grad_input)), g);
  });
  return {grad_input, grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tinyllm, CPU, m) {
  m.impl("transformer_block_fwd", TORCH_BOX(&transformer_block_fwd));
  m.impl("transformer_block_bwd", TORCH_BOX(&transformer_block_bwd));
}

}  // namespace tinyllm::cpu
