// A whole transformer block as one operator forward and one backward: at the sizes of a small model the calls between
// its parts cost more than the parts.
//
//   post-norm                                  pre-norm
//   normed1 = norm1(sum1 = x + attention(x))   sum1 = x + attention(normed1 = norm1(x))
//   out = norm2(sum2 = normed1 + ff(normed1))  out = sum1 + ff(normed2 = norm2(sum1))
//
// with attention(y) = softmax(Q K^T / sqrt(head_dim)) V [W_o^T + b_o] and ff(y) = activation(y W_1^T + b_1) W_2^T +
// b_2. What backward needs lies in one tensor, `saved`; all parameters' gradients come as one tensor, too.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"
#include "layer_norm.h"
#include "products.h"

namespace tinyllm::cpu {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
using Shape = std::vector<int64_t>;

struct Sizes {
  int64_t batch, tokens, rows, width, hidden, heads;
  bool projected;  // attention ends in a projection
  bool bias, causal, norm_first;
  Activation activation;
  int dtype;
};

// The parameters, or their gradients, in the order of the operator's list.
template <class P>
struct Parameters {
  P query, key, value, out_proj, linear1, linear2, norm1, norm2;
  P query_bias, key_bias, value_bias, out_proj_bias, linear1_bias, linear2_bias, norm1_bias, norm2_bias;

  // f(parameter, shape) for each that there is.
  template <class F>
  void visit(const Sizes& s, F&& f) {
    const Shape square{s.width, s.width}, row{s.width};
    for (P* p : {&query, &key, &value}) f(*p, square);
    if (s.projected) f(out_proj, square);
    f(linear1, Shape{s.hidden, s.width});
    f(linear2, Shape{s.width, s.hidden});
    for (P* p : {&norm1, &norm2}) f(*p, row);
    if (!s.bias) return;
    for (P* p : {&query_bias, &key_bias, &value_bias}) f(*p, row);
    if (s.projected) f(out_proj_bias, row);
    f(linear1_bias, Shape{s.hidden});
    for (P* p : {&linear2_bias, &norm1_bias, &norm2_bias}) f(*p, row);
  }
};

// Hands out parts of a tensor of S; without one it only counts.
template <class S>
class Parts {
 public:
  explicit Parts(void* base = nullptr) : base_(static_cast<S*>(base)) {}
  S* take(int64_t count) {
    S* at = base_ == nullptr ? nullptr : base_ + used_;
    used_ += count;
    return at;
  }
  int64_t used() const { return used_; }

 private:
  S* base_;
  int64_t used_ = 0;
};

template <class S>
struct Saved {
  S *query, *key, *value, *attended, *lse;
  S *sum1, *normed1, *mean1, *rstd1;
  S *hidden, *pre_activation;    // the latter only where the derivative cannot be told from the former
  S *norm2_row, *mean2, *rstd2;  // post-norm: sum2, what norm2 takes; pre-norm: normed2, what it gives

  explicit Saved(const Sizes& s, Parts<S>& parts) {
    for (S** p : {&query, &key, &value, &attended, &sum1, &normed1, &norm2_row}) *p = parts.take(s.rows * s.width);
    hidden = parts.take(s.rows * s.hidden);
    pre_activation = s.activation == Activation::relu ? nullptr : parts.take(s.rows * s.hidden);
    lse = parts.take(s.rows * s.heads);
    for (S** p : {&mean1, &rstd1, &mean2, &rstd2}) *p = parts.take(s.rows);
  }
  const S* gate() const { return pre_activation == nullptr ? hidden : pre_activation; }
};

template <class S>
Attention attention_of(const Sizes& s, const Saved<S>& saved) {
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

template <class S>
void forward(const Sizes& s, const Parameters<const void*>& w, const S* input, double eps1, double eps2, S* out,
             const Saved<S>& saved) {
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
void backward(const Sizes& s, const Parameters<const void*>& w, const S* input, const S* grad, const Saved<S>& saved,
              S* grad_input, const Parameters<void*>& g) {
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

Sizes sizes_of(const char* op, const Tensor& input, const std::vector<Tensor>& parameters, int64_t num_heads,
               bool causal, bool norm_first, const std::string& activation) {
  Sizes s{};
  s.dtype = dtype_index(op, input);
  if (s.dtype > static_cast<int>(DType::f64))
    fail(op, ": input has dtype ", torch::headeronly::toString(input.scalar_type()), "; float or double is needed");
  if (input.dim() != 3) fail(op, ": input has shape ", shape_of(input), "; (B, T, D) is needed");
  s.batch = input.size(0);
  s.tokens = input.size(1);
  s.rows = s.batch * s.tokens;
  s.width = input.size(2);
  s.heads = num_heads;
  if (num_heads < 1 || s.width % num_heads != 0 || s.width / std::max<int64_t>(1, num_heads) > 1024)
    fail(op, ": num_heads is ", num_heads, "; it must divide D, ", s.width, ", into at most 1024 columns");
  s.projected = num_heads > 1;
  s.causal = causal;
  s.norm_first = norm_first;
  if (activation != "relu" && activation != "gelu")
    fail(op, ": activation is '", activation, "'; relu or gelu is needed");
  s.activation = activation == "relu" ? Activation::relu : Activation::gelu;
  const size_t without = s.projected ? 8 : 7, biases = without;
  s.bias = parameters.size() == without + biases;
  if (!s.bias && parameters.size() != without)
    fail(op, ": there are ", parameters.size(), " parameters; ", without, " or ", without + biases, " are needed");
  const Tensor& linear1 = parameters[s.projected ? 4 : 3];
  s.hidden = linear1.dim() > 0 ? linear1.size(0) : 0;
  return s;
}

// Contiguous parameters, kept alive by `held`, and where their data is.
Parameters<const void*> data_of_all(const char* op, const Tensor& input, std::vector<Tensor>& held, const Sizes& s) {
  Parameters<const void*> data{};
  size_t i = 0;
  data.visit(s, [&](const void*& at, const Shape& shape) {
    Tensor& t = held[i++];
    check_device(op, "a parameter", t, input);
    check_dtype(op, "a parameter", t, input.scalar_type());
    bool same = t.dim() == std::ssize(shape);
    for (size_t k = 0; same && k < shape.size(); ++k) same = t.size(k) == shape[k];
    if (!same) fail(op, ": parameter ", i - 1, " has shape ", shape_of(t), ", which does not fit the others");
    if (!t.is_contiguous()) t = contiguous(t);
    at = data_of(t);
  });
  return data;
}

template <class F>
auto with_compute_type(int dtype, F&& f) {
  return dtype == static_cast<int>(DType::f64) ? f(double{}) : f(float{});
}

std::tuple<Tensor, Tensor> transformer_block_fwd(Tensor input, std::vector<Tensor> parameters, int64_t num_heads,
                                                 bool causal, bool norm_first, std::string activation, double eps1,
                                                 double eps2, bool save) {
  const char* op = "transformer_block";
  const Sizes s = sizes_of(op, input, parameters, num_heads, causal, norm_first, activation);
  const Parameters<const void*> w = data_of_all(op, input, parameters, s);
  const Tensor x = contiguous(input), out = new_empty(x, x.sizes());
  return with_compute_type(s.dtype, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using S = decltype(zero);
    Parts<S> counted;
    Saved<S>(s, counted);
    const Tensor saved = new_empty(x, Shape{save ? counted.used() : 0});
    const Scratch scratch(save ? 0 : static_cast<size_t>(counted.used()) * sizeof(S));
    Parts<S> parts(save ? data_of(saved) : scratch.data());
    forward<S>(s, w, static_cast<const S*>(data_of(x)), eps1, eps2, static_cast<S*>(data_of(out)), Saved<S>(s, parts));
    return {out, saved};
  });
}

std::tuple<Tensor, Tensor> transformer_block_bwd(Tensor grad, Tensor input, std::vector<Tensor> parameters,
                                                 Tensor saved, int64_t num_heads, bool causal, bool norm_first,
                                                 std::string activation) {
  const char* op = "transformer_block_bwd";
  const Sizes s = sizes_of(op, input, parameters, num_heads, causal, norm_first, activation);
  const Parameters<const void*> w = data_of_all(op, input, parameters, s);
  for (const auto& [name, t] : {std::pair{"grad", &grad}, std::pair{"saved", &saved}}) {
    check_device(op, name, *t, input);
    check_dtype(op, name, *t, input.scalar_type());
  }
  check_shape(op, "grad", grad, {s.batch, s.tokens, s.width});
  const Tensor x = contiguous(input), dy = contiguous(grad), grad_input = new_empty(x, x.sizes());
  return with_compute_type(s.dtype, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using S = decltype(zero);
    Parts<S> counted;
    Saved<S>(s, counted);
    check_shape(op, "saved", saved, {counted.used()});
    if (!saved.is_contiguous()) fail(op, ": saved must be contiguous");
    int64_t total = 0;
    Parameters<void*> g{};
    const auto numel = [](const Shape& shape) { return shape.size() == 1 ? shape[0] : shape[0] * shape[1]; };
    g.visit(s, [&](void*&, const Shape& shape) { total += numel(shape); });
    const Tensor grads = new_empty(x, Shape{total});
    Parts<S> of_grads(data_of(grads)), of_saved(data_of(saved));
    g.visit(s, [&](void*& at, const Shape& shape) { at = of_grads.take(numel(shape)); });
    backward<S>(s, w, static_cast<const S*>(data_of(x)), static_cast<const S*>(data_of(dy)), Saved<S>(s, of_saved),
                static_cast<S*>(data_of(grad_input)), g);
    return {grad_input, grads};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tinyllm, CPU, m) {
  m.impl("transformer_block_fwd", TORCH_BOX(&transformer_block_fwd));
  m.impl("transformer_block_bwd", TORCH_BOX(&transformer_block_bwd));
}

}  // namespace tinyllm::cpu
