// A whole transformer block as one operator forward and one backward: at the sizes of a small model the calls between
// its parts cost more than the parts. What backward needs lies in one tensor, `saved`.
#include "transformer_block.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "attention.h"
#include "layer_norm.h"

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

Product with_bias(Product p, const void* bias) {
  p.bias = bias;
  return p;
}
Product plus(Product p, const void* residual) {
  p.residual = residual;
  return p;
}

}  // namespace

template <class S>
void block_forward(const BlockSizes& s, const BlockParameters<const void*>& w, const S* input, double eps1, double eps2,
                   S* out, const BlockSaved<S>& saved) {
  const int64_t rows = s.rows, d = s.width, h = s.hidden;
  const auto norm = [&](const S* x, const S* residual, const void* weight, const void* bias, double eps, S* normed,
                        S* sum, S* mean, S* rstd) {
    layer_norm_forward(s.dtype, {x, residual, weight, bias, normed, sum, mean, rstd, d, eps, false}, rows);
  };
  const S* x = input;
  if (s.norm_first) {
    norm(input, nullptr, w.norm1, w.norm1_bias, eps1, saved.normed1, nullptr, saved.mean1, saved.rstd1);
    x = saved.normed1;
  }
  run_products(s.dtype, {with_bias(linear_output(x, w.query, rows, d, d, saved.query), w.query_bias),
                         with_bias(linear_output(x, w.key, rows, d, d, saved.key), w.key_bias),
                         with_bias(linear_output(x, w.value, rows, d, d, saved.value), w.value_bias)});
  attention_forward(s.dtype, attention_of(s, saved));
  if (s.projected)
    run_products(
        s.dtype,
        {plus(with_bias(linear_output(saved.attended, w.out_proj, rows, d, d, saved.sum1), w.out_proj_bias), input)});
  if (s.norm_first) {
    norm(s.projected ? saved.sum1 : saved.attended, s.projected ? nullptr : input, w.norm2, w.norm2_bias, eps2,
         saved.norm2_row, s.projected ? nullptr : saved.sum1, saved.mean2, saved.rstd2);
  } else {
    norm(s.projected ? saved.sum1 : saved.attended, s.projected ? nullptr : input, w.norm1, w.norm1_bias, eps1,
         saved.normed1, s.projected ? nullptr : saved.sum1, saved.mean1, saved.rstd1);
  }
  const S* middle = s.norm_first ? saved.norm2_row : saved.normed1;
  Product first = with_bias(linear_output(middle, w.linear1, rows, d, h, saved.hidden), w.linear1_bias);
  first.activation = s.activation;
  first.pre_activation = saved.pre_activation;
  S* last = s.norm_first ? out : saved.norm2_row;
  run_products(s.dtype,
               {first, plus(with_bias(linear_output(saved.hidden, w.linear2, rows, h, d, last), w.linear2_bias),
                            s.norm_first ? saved.sum1 : saved.normed1)});
  if (!s.norm_first) norm(last, nullptr, w.norm2, w.norm2_bias, eps2, out, nullptr, saved.mean2, saved.rstd2);
}

template <class S>
void block_backward(const BlockSizes& s, const BlockParameters<const void*>& w, const S* input, const S* grad,
                    const BlockSaved<S>& saved, S* grad_input, const BlockParameters<void*>& g) {
  const int64_t rows = s.rows, d = s.width, h = s.hidden;
  const auto carve = [&](Parts<S>& parts, S** wide, std::initializer_list<S**> narrow) {
    *wide = parts.take(rows * h);
    for (S** p : narrow) *p = parts.take(rows * d);
  };
  S *grad_hidden, *grad_sum2, *grad_middle, *grad_sum1, *grad_attended, *grad_query, *grad_key, *grad_value;
  const auto all = {&grad_sum2, &grad_middle, &grad_sum1, &grad_attended, &grad_query, &grad_key, &grad_value};
  Parts<S> counted;
  carve(counted, &grad_hidden, all);
  const Scratch scratch(static_cast<size_t>(counted.used()) * sizeof(S));
  Parts<S> parts(scratch.data());
  carve(parts, &grad_hidden, all);

  const auto norm = [&](const S* gradient, const S* grad_sum, const S* x, const void* weight, const S* mean,
                        const S* rstd, S* out, void* grad_weight, void* grad_bias) {
    // The kernel gives both parameters' gradients; without a bias the second one goes nowhere.
    std::vector<S> unused(grad_bias == nullptr ? d : 0);
    layer_norm_backward(s.dtype, {gradient, grad_sum, x, weight, mean, rstd, out, d, false}, rows, grad_weight,
                        grad_bias == nullptr ? unused.data() : grad_bias);
  };
  const auto bias = [&](const S* gradient, int64_t columns, void* grad_bias) {
    if (grad_bias != nullptr) sum_columns(s.dtype, gradient, rows, columns, grad_bias);
  };

  const S* grad_last = grad;
  if (!s.norm_first) {
    norm(grad, nullptr, saved.norm2_row, w.norm2, saved.mean2, saved.rstd2, grad_sum2, g.norm2, g.norm2_bias);
    grad_last = grad_sum2;
  }
  // feed_forward
  Product through = linear_grad_input(grad_last, w.linear2, rows, h, d, grad_hidden);
  through.activation = s.activation;
  through.gate = saved.gate();
  const S* middle = s.norm_first ? saved.norm2_row : saved.normed1;
  run_products(s.dtype, {through, plus(linear_grad_input(grad_hidden, w.linear1, rows, d, h, grad_middle),
                                       s.norm_first ? nullptr : grad_last)});
  run_products(s.dtype, {linear_grad_weight(grad_last, saved.hidden, rows, h, d, g.linear2)});
  run_products(s.dtype, {linear_grad_weight(grad_hidden, middle, rows, d, h, g.linear1)});
  bias(grad_last, d, g.linear2_bias);
  bias(grad_hidden, h, g.linear1_bias);
  if (s.norm_first)
    norm(grad_middle, grad, saved.sum1, w.norm2, saved.mean2, saved.rstd2, grad_sum1, g.norm2, g.norm2_bias);
  else
    norm(grad_middle, nullptr, saved.sum1, w.norm1, saved.mean1, saved.rstd1, grad_sum1, g.norm1, g.norm1_bias);
  // attention
  if (s.projected) {
    run_products(s.dtype, {linear_grad_input(grad_sum1, w.out_proj, rows, d, d, grad_attended)});
    run_products(s.dtype, {linear_grad_weight(grad_sum1, saved.attended, rows, d, d, g.out_proj)});
    bias(grad_sum1, d, g.out_proj_bias);
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
  run_products(s.dtype, {linear_grad_weight(grad_query, x, rows, d, d, g.query),
                         linear_grad_weight(grad_key, x, rows, d, d, g.key),
                         linear_grad_weight(grad_value, x, rows, d, d, g.value)});
  bias(grad_query, d, g.query_bias);
  bias(grad_key, d, g.key_bias);
  bias(grad_value, d, g.value_bias);
  S* sums = s.norm_first ? grad_middle : grad_input;
  run_products(s.dtype,
               {plus(linear_grad_input(grad_query, w.query, rows, d, d, sums), s.norm_first ? nullptr : grad_sum1),
                plus(linear_grad_input(grad_key, w.key, rows, d, d, sums), sums),
                plus(linear_grad_input(grad_value, w.value, rows, d, d, sums), sums)});
  if (s.norm_first)
    norm(grad_middle, grad_sum1, input, w.norm1, saved.mean1, saved.rstd1, grad_input, g.norm1, g.norm1_bias);
}

template void block_forward(const BlockSizes&, const BlockParameters<const void*>&, const float*, double, double,
                            float*, const BlockSaved<float>&);
template void block_forward(const BlockSizes&, const BlockParameters<const void*>&, const double*, double, double,
                            double*, const BlockSaved<double>&);
template void block_backward(const BlockSizes&, const BlockParameters<const void*>&, const float*, const float*,
                             const BlockSaved<float>&, float*, const BlockParameters<void*>&);
template void block_backward(const BlockSizes&, const BlockParameters<const void*>&, const double*, const double*,
                             const BlockSaved<double>&, double*, const BlockParameters<void*>&);

BlockSizes block_settings(const char* op, int dtype, int64_t batch, int64_t tokens, int64_t width, int64_t num_heads,
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
  const int dtype = dtype_index(op, input);
  if (dtype > static_cast<int>(DType::f64))
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
    Parts<S> counted;
    BlockSaved<S>(s, counted);
    const Tensor saved = empty({save ? counted.used() : 0}, x.scalar_type());
    const Scratch scratch(save ? 0 : static_cast<size_t>(counted.used()) * sizeof(S));
    Parts<S> parts(save ? data_of(saved) : scratch.data());
    block_forward<S>(s, w, static_cast<const S*>(data_of(x)), eps1, eps2, static_cast<S*>(data_of(out)),
                     BlockSaved<S>(s, parts));
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
    Parts<S> counted;
    BlockSaved<S>(s, counted);
    check_shape(op, "saved", saved, {counted.used()});
    Parts<S> parts(data_of(saved));
    block_backward<S>(s, w, static_cast<const S*>(data_of(x)), static_cast<const S*>(data_of(dy)),
                      BlockSaved<S>(s, parts), static_cast<S*>(data_of(grad_input)), g);
  });
  return {grad_input, grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tinyllm, CPU, m) {
  m.impl("transformer_block_fwd", TORCH_BOX(&transformer_block_fwd));
  m.impl("transformer_block_bwd", TORCH_BOX(&transformer_block_bwd));
}

}  // namespace tinyllm::cpu
