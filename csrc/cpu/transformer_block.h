// A transformer block over raw memory: for transformer_block.cpp, and for transformer.cpp, which has several.
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

#include "products.h"

namespace tinyllm::cpu {

struct BlockSizes {
  int64_t batch, tokens, rows, width, hidden, heads;
  bool projected;  // attention ends in a projection
  bool bias, causal, norm_first;
  Activation activation;
  int dtype;

  // How many parameters there are.
  int64_t parameters() const { return (projected ? 8 : 7) * (bias ? 2 : 1); }
};

// The shape of a parameter: (rows, columns), or (rows) where columns is -1.
struct Extents {
  int64_t rows, columns = -1;
  int64_t numel() const { return columns < 0 ? rows : rows * columns; }
  std::vector<int64_t> shape() const {
    return columns < 0 ? std::vector<int64_t>{rows} : std::vector<int64_t>{rows, columns};
  }
};

// The parameters, or their gradients, in the order of the operator's list.
template <class P>
struct BlockParameters {
  P query, key, value, out_proj, linear1, linear2, norm1, norm2;
  P query_bias, key_bias, value_bias, out_proj_bias, linear1_bias, linear2_bias, norm1_bias, norm2_bias;

  // f(parameter, extents) for each that there is.
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

// Hands out parts of an array of S; without one it only counts.
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

// What backward needs of forward.
template <class S>
struct BlockSaved {
  S *query, *key, *value, *attended, *lse;
  S *sum1, *normed1, *mean1, *rstd1;
  S *hidden, *pre_activation;    // the latter only where the derivative cannot be told from the former
  S *norm2_row, *mean2, *rstd2;  // post-norm: sum2, what norm2 takes; pre-norm: normed2, what it gives

  BlockSaved(const BlockSizes& s, Parts<S>& parts) {
    for (S** p : {&query, &key, &value, &attended, &sum1, &normed1, &norm2_row}) *p = parts.take(s.rows * s.width);
    hidden = parts.take(s.rows * s.hidden);
    pre_activation = s.activation == Activation::relu ? nullptr : parts.take(s.rows * s.hidden);
    lse = parts.take(s.rows * s.heads);
    for (S** p : {&mean1, &rstd1, &mean2, &rstd2}) *p = parts.take(s.rows);
  }
  const S* gate() const { return pre_activation == nullptr ? hidden : pre_activation; }
};

// Without its parameters' sizes: those of input (B, T, D) and of the settings, checked.
BlockSizes block_settings(const char* op, int dtype, int64_t batch, int64_t tokens, int64_t width, int64_t num_heads,
                          bool causal, bool norm_first, const std::string& activation);

// hidden_dim is linear1's first dimension; parameters[first] is the block's first one.
int64_t hidden_dim(const BlockSizes& s, const std::vector<Tensor>& parameters, size_t first);

// Where parameters[index] is in memory, of the extents that it must have. If it is not contiguous, its place in the
// list is taken by a copy that is.
const void* parameter_data(const char* op, std::vector<Tensor>& parameters, size_t index, ScalarType dtype,
                           const Extents& extents);

// out may be input.
template <class S>
void block_forward(const BlockSizes& s, const BlockParameters<const void*>& w, const S* input, double eps1, double eps2,
                   S* out, const BlockSaved<S>& saved);

template <class S>
void block_backward(const BlockSizes& s, const BlockParameters<const void*>& w, const S* input, const S* grad,
                    const BlockSaved<S>& saved, S* grad_input, const BlockParameters<void*>& g);

template <class F>
auto with_compute_type(int dtype, F&& f) {
  return dtype == static_cast<int>(DType::f64) ? f(double{}) : f(float{});
}

}  // namespace tinyllm::cpu
