// A transformer block over raw memory, forward and backward; transformer.cpp makes operators of it.
//
//   post-norm                                     pre-norm
//   middle = norm1(sum1 = x + attention(x))       middle = norm2(sum1 = x + attention(outer = norm1(x)))
//   out = norm2(outer = middle + ff(middle))      out = sum1 + ff(middle)
//
// with attention(y) = softmax(Q K^T / sqrt(head_dim)) V [W_o^T + b_o] and
// ff(y) = activation(y W_1^T + b_1) W_2^T + b_2. Dropout acts on the softmax and on what is added to a sum.
#pragma once
#include <array>
#include <cmath>
#include <utility>
#include <vector>

#include "attention.h"
#include "layer_norm.h"
#include "matmul.h"
#include "scratch.h"

namespace tinyllm::cpu {

struct BlockSizes {
  int64_t batch, tokens, rows, width, hidden, heads;
  bool projected;  // attention ends in a projection
  bool bias, causal, norm_first;
  Activation activation;
  DType dtype;
  double eps1, eps2;
  Dropout dropout;  // `offset` is that of the attention's; both branches have the next ones

  static constexpr uint64_t kDropouts = 3;
  bool drops() const { return dropout.p > 0; }
  // The number of parameters.
  int64_t parameters() const { return (projected ? 8 : 7) * (bias ? 2 : 1); }
};

// The shape of a parameter: (rows, columns), or (rows).
class Extents {
 public:
  explicit Extents(int64_t rows) : sizes_{rows, 0}, dim_(1) {}
  Extents(int64_t rows, int64_t columns) : sizes_{rows, columns}, dim_(2) {}
  IntArray shape() const { return {sizes_.data(), dim_}; }
  // The shape of the bias behind such a weight.
  Extents of_bias() const { return Extents(sizes_[0]); }

 private:
  std::array<int64_t, 2> sizes_;
  size_t dim_;
};

// The parameters of a linear layer or a norm, or their gradients.
template <class P>
struct Affine {
  P weight, bias;
};

template <class P>
struct BlockParameters {
  Affine<P> query, key, value, out_proj, linear1, linear2, norm1, norm2;

  // Calls f(parameter, extents) for each, in the order of the operator's list.
  template <class F>
  void visit(const BlockSizes& s, const F& f) {
    const Extents square(s.width, s.width), row(s.width);
    const std::pair<Affine<P>*, Extents> all[] = {{&query, square},
                                                  {&key, square},
                                                  {&value, square},
                                                  {&out_proj, square},
                                                  {&linear1, {s.hidden, s.width}},
                                                  {&linear2, {s.width, s.hidden}},
                                                  {&norm1, row},
                                                  {&norm2, row}};
    const auto given = [&](const Affine<P>* p) { return s.projected || p != &out_proj; };
    for (const auto& [p, extents] : all)
      if (given(p)) f(p->weight, extents);
    for (const auto& [p, extents] : all)
      if (s.bias && given(p)) f(p->bias, extents.of_bias());
  }
  const Affine<P>& middle_norm(const BlockSizes& s) const { return s.norm_first ? norm2 : norm1; }
  const Affine<P>& outer_norm(const BlockSizes& s) const { return s.norm_first ? norm1 : norm2; }
};

// Hands out consecutive arrays within an array of S, without padding, because the fake kernels compute the same size.
// Without an array it only counts elements.
template <class S>
class TypedArena {
 public:
  explicit TypedArena(void* base = nullptr) : base_(static_cast<S*>(base)) {}
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

// The activations that forward saves for backward, named as above.
template <class S>
struct BlockSaved {
  S *query, *key, *value, *attended, *lse, *sum1, *middle, *outer;
  S *hidden, *slope;  // the latter only where hidden does not give the activation's derivative
  S *middle_mean, *middle_rstd, *outer_mean, *outer_rstd;

  BlockSaved(const BlockSizes& s, TypedArena<S>& arena) {
    for (S** p : {&query, &key, &value, &attended, &sum1, &middle, &outer}) *p = arena.take(s.rows * s.width);
    hidden = arena.take(s.rows * s.hidden);
    slope = s.activation == Activation::relu ? nullptr : arena.take(s.rows * s.hidden);
    lse = arena.take(s.rows * s.heads);
    for (S** p : {&middle_mean, &middle_rstd, &outer_mean, &outer_rstd}) *p = arena.take(s.rows);
  }
};

// `data`, (B, T, D), as heads (B, H, T, head_dim).
inline Strided heads_of(const BlockSizes& s, void* data) {
  return {data, s.tokens * s.width, s.width / s.heads, s.width, 1};
}

template <class S>
Attention attention_of(const BlockSizes& s, const BlockSaved<S>& saved) {
  Attention a{};
  a.batch = s.batch;
  a.heads = a.kv_heads = s.heads;
  a.queries = a.keys = s.tokens;
  a.head_dim = a.value_dim = s.width / s.heads;
  a.scale = 1.0 / std::sqrt(static_cast<double>(a.head_dim));
  a.causal = s.causal;
  a.dropout = s.dropout;
  a.query = heads_of(s, saved.query);
  a.key = heads_of(s, saved.key);
  a.value = heads_of(s, saved.value);
  a.out = heads_of(s, saved.attended);
  a.lse = saved.lse;
  return a;
}

inline Matmul plus(Matmul p, const void* residual) {
  p.residual = residual;
  return p;
}

// y = x weight^T + bias, for `outputs` columns.
inline Matmul linear_layer(const Affine<const void*>& w, const void* x, int64_t rows, int64_t inputs, int64_t outputs,
                           void* y) {
  Matmul p = linear_output(x, w.weight, rows, inputs, outputs, y);
  p.bias = w.bias;
  return p;
}

// The gradients of a linear layer's parameters.
inline void linear_layer_backward(DType dtype, const void* grad, const void* x, int64_t rows, int64_t inputs,
                                  int64_t outputs, const Affine<void*>& g) {
  run_matmuls(dtype, {linear_grad_weight(grad, x, rows, inputs, outputs, g.weight)});
  if (g.bias != nullptr) sum_columns(dtype, grad, rows, outputs, g.bias);
}

// normed = norm(x + residual), and that sum; residual and sum are both given or both null.
template <class S>
void norm_forward(DType dtype, const Affine<const void*>& w, double eps, const S* x, const S* residual, int64_t rows,
                  int64_t width, S* normed, S* sum, S* mean, S* rstd) {
  layer_norm_forward(dtype,
                     {.input = x,
                      .residual = residual,
                      .weight = w.weight,
                      .bias = w.bias,
                      .normed = normed,
                      .sum = sum,
                      .mean = mean,
                      .rstd = rstd,
                      .size = width,
                      .eps = eps,
                      .stream = false},
                     rows);
}

// The gradient of a norm's input, to which grad_sum is added unless null, and those of its parameters.
template <class S>
void norm_backward(DType dtype, const S* grad, const S* grad_sum, const S* x, const void* weight, const S* mean,
                   const S* rstd, int64_t rows, int64_t width, S* grad_x, const Affine<void*>& g) {
  // The kernel computes the gradients of both parameters; without a bias the second one is discarded.
  std::vector<S> unused(g.bias == nullptr ? width : 0);
  layer_norm_backward(dtype,
                      {.grad_normed = grad,
                       .grad_sum = grad_sum,
                       .input = x,
                       .weight = weight,
                       .mean = mean,
                       .rstd = rstd,
                       .grad_input = grad_x,
                       .size = width,
                       .stream = false},
                      rows, g.weight, g.bias == nullptr ? unused.data() : g.bias);
}

enum class Branch : uint64_t { attention = 1, feed_forward = 2 };

// out = x with dropout + residual, or without a residual if it is null; out may be one of them.
template <class S>
void drop(const BlockSizes& s, Branch branch, const S* x, const S* residual, S* out) {
  DroppedSum args{x, residual, out, s.width, s.dropout};
  args.dropout.offset += static_cast<uint64_t>(branch);
  const auto kernel = kernels().dropped_sum[s.dtype];
  torch::stable::parallel_for(0, s.rows, std::max<int64_t>(1, 8192 / std::max<int64_t>(1, s.width)),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// out may be input.
template <class S>
void block_forward(const BlockSizes& s, const BlockParameters<const void*>& w, const S* input, S* out,
                   const BlockSaved<S>& saved) {
  const int64_t rows = s.rows, d = s.width, h = s.hidden;
  const double middle_eps = s.norm_first ? s.eps2 : s.eps1, outer_eps = s.norm_first ? s.eps1 : s.eps2;
  const auto outer_norm = [&](const S* x, S* y) {
    norm_forward<S>(s.dtype, w.outer_norm(s), outer_eps, x, nullptr, rows, d, y, nullptr, saved.outer_mean,
                    saved.outer_rstd);
  };
  if (s.norm_first) outer_norm(input, saved.outer);
  const S* x = s.norm_first ? saved.outer : input;
  run_matmuls(s.dtype,
              {linear_layer(w.query, x, rows, d, d, saved.query), linear_layer(w.key, x, rows, d, d, saved.key),
               linear_layer(w.value, x, rows, d, d, saved.value)});
  attention_forward(s.dtype, attention_of(s, saved));
  if (s.projected)
    run_matmuls(s.dtype,
                {plus(linear_layer(w.out_proj, saved.attended, rows, d, d, saved.sum1), s.drops() ? nullptr : input)});
  if (s.drops()) drop(s, Branch::attention, s.projected ? saved.sum1 : saved.attended, input, saved.sum1);
  // Without a projection, whose epilogue adds the residual, or dropout, the norm does.
  const bool summed = s.projected || s.drops();
  norm_forward<S>(s.dtype, w.middle_norm(s), middle_eps, summed ? saved.sum1 : saved.attended, summed ? nullptr : input,
                  rows, d, saved.middle, summed ? nullptr : saved.sum1, saved.middle_mean, saved.middle_rstd);
  Matmul first = linear_layer(w.linear1, saved.middle, rows, d, h, saved.hidden);
  first.activation = s.activation;
  first.slope = saved.slope;
  S* const last = s.norm_first ? out : saved.outer;
  const S* const residual = s.norm_first ? saved.sum1 : saved.middle;
  run_matmuls(s.dtype,
              {first, plus(linear_layer(w.linear2, saved.hidden, rows, h, d, last), s.drops() ? nullptr : residual)});
  if (s.drops()) drop(s, Branch::feed_forward, last, residual, last);
  if (!s.norm_first) outer_norm(saved.outer, out);
}

template <class S>
void block_backward(const BlockSizes& s, const BlockParameters<const void*>& w, const S* input, const S* grad,
                    const BlockSaved<S>& saved, S* grad_input, const BlockParameters<void*>& g) {
  const int64_t rows = s.rows, d = s.width, h = s.hidden;
  const Scratch scratch(static_cast<size_t>(rows * (7 * d + h)) * sizeof(S));
  TypedArena<S> arena(scratch.data());
  S* const grad_hidden = arena.take(rows * h);
  S *grad_outer, *grad_middle, *grad_sum1, *grad_attended, *grad_query, *grad_key, *grad_value;
  for (S** p : {&grad_outer, &grad_middle, &grad_sum1, &grad_attended, &grad_query, &grad_key, &grad_value})
    *p = arena.take(rows * d);
  const auto outer_norm = [&](const S* gradient, const S* grad_sum, const S* x, S* grad_x) {
    norm_backward(s.dtype, gradient, grad_sum, x, w.outer_norm(s).weight, saved.outer_mean, saved.outer_rstd, rows, d,
                  grad_x, g.outer_norm(s));
  };

  if (!s.norm_first) outer_norm(grad, nullptr, saved.outer, grad_outer);
  const S* const grad_last = s.norm_first ? grad : grad_outer;
  // feed_forward; the gradient of a branch with dropout takes the place of the query's, which comes later
  const S* grad_branch = grad_last;
  if (s.drops()) {
    drop<S>(s, Branch::feed_forward, grad_last, nullptr, grad_query);
    grad_branch = grad_query;
  }
  Matmul through = linear_grad_input(grad_branch, w.linear2.weight, rows, h, d, grad_hidden);
  through.activation = s.activation;
  through.gate = saved.slope == nullptr ? saved.hidden : saved.slope;
  run_matmuls(s.dtype, {through, plus(linear_grad_input(grad_hidden, w.linear1.weight, rows, d, h, grad_middle),
                                      s.norm_first ? nullptr : grad_last)});
  linear_layer_backward(s.dtype, grad_branch, saved.hidden, rows, h, d, g.linear2);
  linear_layer_backward(s.dtype, grad_hidden, saved.middle, rows, d, h, g.linear1);
  norm_backward(s.dtype, grad_middle, s.norm_first ? grad : nullptr, saved.sum1, w.middle_norm(s).weight,
                saved.middle_mean, saved.middle_rstd, rows, d, grad_sum1, g.middle_norm(s));
  // attention
  S* grad_attention = grad_sum1;
  if (s.drops()) {
    grad_attention = s.projected ? grad_query : grad_attended;
    drop<S>(s, Branch::attention, grad_sum1, nullptr, grad_attention);
  }
  if (s.projected) {
    run_matmuls(s.dtype, {linear_grad_input(grad_attention, w.out_proj.weight, rows, d, d, grad_attended)});
    linear_layer_backward(s.dtype, grad_attention, saved.attended, rows, d, d, g.out_proj);
  } else {
    grad_attended = grad_attention;
  }
  Attention a = attention_of(s, saved);
  a.grad_out = heads_of(s, grad_attended);
  a.grad_query = heads_of(s, grad_query);
  a.grad_key = heads_of(s, grad_key);
  a.grad_value = heads_of(s, grad_value);
  attention_backward(s.dtype, a);
  const S* x = s.norm_first ? saved.outer : input;
  run_matmuls(s.dtype, {linear_grad_weight(grad_query, x, rows, d, d, g.query.weight),
                        linear_grad_weight(grad_key, x, rows, d, d, g.key.weight),
                        linear_grad_weight(grad_value, x, rows, d, d, g.value.weight)});
  if (s.bias)
    for (const auto& [gradient, out] :
         {std::pair{grad_query, g.query.bias}, {grad_key, g.key.bias}, {grad_value, g.value.bias}})
      sum_columns(s.dtype, gradient, rows, d, out);
  S* const sums = s.norm_first ? grad_middle : grad_input;
  run_matmuls(s.dtype, {plus(linear_grad_input(grad_query, w.query.weight, rows, d, d, sums),
                             s.norm_first ? nullptr : grad_sum1),
                        plus(linear_grad_input(grad_key, w.key.weight, rows, d, d, sums), sums),
                        plus(linear_grad_input(grad_value, w.value.weight, rows, d, d, sums), sums)});
  if (s.norm_first) outer_norm(grad_middle, grad_sum1, input, grad_input);
}

}  // namespace tinyllm::cpu
