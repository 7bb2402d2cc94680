// A transformer block over raw memory, for transformer_block.cpp and for transformer.cpp, which runs several.
//
//   post-norm                                  pre-norm
//   normed1 = norm1(sum1 = x + attention(x))   sum1 = x + attention(normed1 = norm1(x))
//   out = norm2(sum2 = normed1 + ff(normed1))  out = sum1 + ff(normed2 = norm2(sum1))
//
// with attention(y) = softmax(Q K^T / sqrt(head_dim)) V [W_o^T + b_o] and ff(y) = activation(y W_1^T + b_1) W_2^T +
// b_2.
#pragma once
#include <string>
#include <vector>

#include "matmul.h"

namespace tinyllm::cpu {

struct BlockSizes {
  int64_t batch, tokens, rows, width, hidden, heads;
  bool projected;  // whether attention ends in a projection
  bool bias, causal, norm_first;
  Activation activation;
  DType dtype;

  // The number of parameters of a block.
  int64_t parameters() const { return (projected ? 8 : 7) * (bias ? 2 : 1); }
};

// The shape of a parameter: (rows, columns), or (rows) if columns is -1.
struct Extents {
  int64_t rows, columns = -1;
  int64_t numel() const { return columns < 0 ? rows : rows * columns; }
  std::vector<int64_t> shape() const {
    return columns < 0 ? std::vector<int64_t>{rows} : std::vector<int64_t>{rows, columns};
  }
};

// The parameters of a block or their gradients, in the order of the list that the operator takes.
template <class P>
struct BlockParameters {
  P query, key, value, out_proj, linear1, linear2, norm1, norm2;
  P query_bias, key_bias, value_bias, out_proj_bias, linear1_bias, linear2_bias, norm1_bias, norm2_bias;

  // Calls f(parameter, extents) for each parameter that the block has.
  template <class F>
  void visit(const BlockSizes& s, F&& f) {
    const Extents square{s.width, s.width}, row{s.width};
    for (P* p : {&query, &key, &value}) f(*p, square);
    if (s.projected) f(out_proj, square);
    f(linear1, Extents{s.hidden, s.width});
    f(linear2, Extents{s.width, s.hidden});
    for (P* p : {&norm1, &norm2}) f(*p, row);
    if (!s.bias) return;
    for (P* p : {&query_bias, &key_bias, &value_bias}) f(*p, row);
    if (s.projected) f(out_proj_bias, row);
    f(linear1_bias, Extents{s.hidden});
    for (P* p : {&linear2_bias, &norm1_bias, &norm2_bias}) f(*p, row);
  }
};

// Hands out consecutive arena of an array of S, without padding, because the fake kernels compute the same size.
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

// The activations that forward saves for backward.
template <class S>
struct BlockSaved {
  S *query, *key, *value, *attended, *lse;
  S *sum1, *normed1, *mean1, *rstd1;
  S *hidden, *pre_activation;    // null if the derivative follows from hidden
  S *norm2_row, *mean2, *rstd2;  // sum2, the input of norm2, with post-norm; normed2, its output, with pre-norm

  BlockSaved(const BlockSizes& s, TypedArena<S>& arena) {
    for (S** p : {&query, &key, &value, &attended, &sum1, &normed1, &norm2_row}) *p = arena.take(s.rows * s.width);
    hidden = arena.take(s.rows * s.hidden);
    pre_activation = s.activation == Activation::relu ? nullptr : arena.take(s.rows * s.hidden);
    lse = arena.take(s.rows * s.heads);
    for (S** p : {&mean1, &rstd1, &mean2, &rstd2}) *p = arena.take(s.rows);
  }
  const S* gate() const { return pre_activation == nullptr ? hidden : pre_activation; }
};

// Checks the sizes of an input (B, T, D) and the settings; the sizes that depend on parameters are not set yet.
BlockSizes block_settings(const char* op, DType dtype, int64_t batch, int64_t tokens, int64_t width, int64_t num_heads,
                          bool causal, bool norm_first, const std::string& activation);

// The first dimension of linear1; parameters[first] is the first parameter of the block.
int64_t hidden_dim(const BlockSizes& s, const std::vector<Tensor>& parameters, size_t first);

// Checks parameters[index] against the shape that it must have and returns its data. A parameter that is not contiguous
// is replaced in the list by a contiguous copy.
const void* parameter_data(const char* op, std::vector<Tensor>& parameters, size_t index, ScalarType dtype,
                           const Extents& extents);

// `out` may be `input`.
template <class S>
void block_forward(const BlockSizes& s, const BlockParameters<const void*>& w, const S* input, double eps1, double eps2,
                   S* out, const BlockSaved<S>& saved);

template <class S>
void block_backward(const BlockSizes& s, const BlockParameters<const void*>& w, const S* input, const S* grad,
                    const BlockSaved<S>& saved, S* grad_input, const BlockParameters<void*>& g);

}  // namespace tinyllm::cpu
