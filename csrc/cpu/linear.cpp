// linear and feed_forward on the CPU: checks, allocation, and their matmuls with fused epilogues.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "matmul.h"

namespace tinyllm::cpu {
namespace {

using Shape = std::vector<int64_t>;

// Checks an operand against the first argument, and makes it contiguous.
Tensor operand(const char* op, const char* name, const Tensor& t, const Tensor& like,
               std::initializer_list<int64_t> shape) {
  check_device(op, name, t, like);
  check_dtype(op, name, t, like.scalar_type());
  check_shape(op, name, t, shape);
  return as_contiguous(t);
}
OptionalTensor operand(const char* op, const char* name, const OptionalTensor& t, const Tensor& like,
                       std::initializer_list<int64_t> shape) {
  return t ? OptionalTensor(operand(op, name, *t, like, shape)) : std::nullopt;
}

// A tensor (..., columns) as a contiguous matrix of rows.
struct Rows {
  Tensor tensor;
  int64_t count, columns;

  Rows(const char* op, const char* name, const Tensor& t) : tensor(as_contiguous(t)) {
    if (t.dim() == 0) fail(op, ": ", name, " has no dimensions; (..., features) is needed");
    columns = t.size(t.dim() - 1);
    count = 1;
    for (int64_t i = 0; i + 1 < t.dim(); ++i) count *= t.size(i);
  }
  Tensor new_with(int64_t last) const {
    Shape shape;
    for (int64_t i = 0; i + 1 < tensor.dim(); ++i) shape.push_back(tensor.size(i));
    shape.push_back(last);
    return empty(shape, tensor.scalar_type());
  }
  void* data() const { return data_of(tensor); }
};

// Checks another tensor with the same rows but its own number of columns.
Rows with_rows(const char* op, const char* name, const Tensor& t, const Rows& like, int64_t columns) {
  check_device(op, name, t, like.tensor);
  check_dtype(op, name, t, like.tensor.scalar_type());
  Rows rows(op, name, t);
  if (rows.count != like.count || rows.columns != columns)
    fail(op, ": ", name, " has shape ", shape_of(t), "; it must have ", like.count, " rows of ", columns);
  return rows;
}

Tensor none_like(const Tensor& t) { return empty({0}, t.scalar_type()); }

int64_t outputs_of(const char* op, const char* name, const Tensor& weight) {
  if (weight.dim() != 2) fail(op, ": ", name, " has shape ", shape_of(weight), "; it must have 2 dimensions");
  return weight.size(0);
}

std::tuple<Tensor, Tensor> linear_fwd(Tensor input, Tensor weight, OptionalTensor bias, OptionalTensor residual,
                                      std::string activation, bool slope) {
  const char* op = "linear";
  const DType dtype = dtype_of(op, input);
  const Rows x(op, "input", input);
  const int64_t outputs = outputs_of(op, "weight", weight);
  const Tensor w = operand(op, "weight", weight, input, {outputs, x.columns});
  const OptionalTensor b = operand(op, "bias", bias, input, {outputs});
  std::optional<Rows> r;
  if (residual) r = with_rows(op, "residual", *residual, x, outputs);
  const Tensor out = x.new_with(outputs), slopes = slope ? x.new_with(outputs) : none_like(input);
  Matmul p = linear_output(x.data(), data_of(w), x.count, x.columns, outputs, data_of(out));
  p.bias = data_or_null(b);
  p.activation = parse_activation(op, activation);
  p.residual = r ? r->data() : nullptr;
  p.slope = slope ? data_of(slopes) : nullptr;
  run_matmuls(dtype, {p});
  return {out, slopes};
}

// Computes the gradients of the weight and the bias of a layer; one that is not wanted is empty.
struct ParameterGrads {
  Tensor weight, bias;

  ParameterGrads(DType dtype, const void* grad, const void* input, int64_t rows, const Tensor& w, bool weight_grad,
                 bool bias_grad)
      : weight(weight_grad ? empty(w.sizes(), w.scalar_type()) : none_like(w)),
        bias(bias_grad ? empty({w.size(0)}, w.scalar_type()) : none_like(w)) {
    if (weight_grad) run_matmuls(dtype, {linear_grad_weight(grad, input, rows, w.size(1), w.size(0), data_of(weight))});
    if (bias_grad) sum_columns(dtype, grad, rows, w.size(0), data_of(bias));
  }
};

std::tuple<Tensor, Tensor, Tensor> linear_bwd(Tensor grad, Tensor input, Tensor weight, OptionalTensor gate,
                                              std::string activation, bool input_grad, bool weight_grad,
                                              bool bias_grad) {
  const char* op = "linear_bwd";
  const DType dtype = dtype_of(op, input);
  const Rows x(op, "input", input);
  const int64_t outputs = outputs_of(op, "weight", weight);
  const Tensor w = operand(op, "weight", weight, input, {outputs, x.columns});
  Rows dy = with_rows(op, "grad", grad, x, outputs);
  if (gate) {
    const Rows at = with_rows(op, "gate", *gate, x, outputs);
    const Tensor gated = dy.new_with(outputs);
    pass_gate(dtype, parse_activation(op, activation), at.data(), dy.data(), data_of(gated), x.count * outputs);
    dy.tensor = gated;
  }
  const Tensor grad_input = input_grad ? x.new_with(x.columns) : none_like(input);
  if (input_grad)
    run_matmuls(dtype, {linear_grad_input(dy.data(), data_of(w), x.count, x.columns, outputs, data_of(grad_input))});
  const ParameterGrads grads(dtype, dy.data(), x.data(), x.count, w, weight_grad, bias_grad);
  return {grad_input, grads.weight, grads.bias};
}

std::tuple<Tensor, Tensor, Tensor> feed_forward_fwd(Tensor input, Tensor weight1, OptionalTensor bias1, Tensor weight2,
                                                    OptionalTensor bias2, OptionalTensor residual,
                                                    std::string activation, bool slope) {
  const char* op = "feed_forward";
  const DType dtype = dtype_of(op, input);
  const Rows x(op, "input", input);
  const int64_t width = outputs_of(op, "weight1", weight1), outputs = outputs_of(op, "weight2", weight2);
  const Tensor w1 = operand(op, "weight1", weight1, input, {width, x.columns});
  const Tensor w2 = operand(op, "weight2", weight2, input, {outputs, width});
  const OptionalTensor b1 = operand(op, "bias1", bias1, input, {width});
  const OptionalTensor b2 = operand(op, "bias2", bias2, input, {outputs});
  std::optional<Rows> r;
  if (residual) r = with_rows(op, "residual", *residual, x, outputs);
  const Tensor hidden = x.new_with(width), out = x.new_with(outputs);
  const Tensor slopes = slope ? x.new_with(width) : none_like(input);
  Matmul first = linear_output(x.data(), data_of(w1), x.count, x.columns, width, data_of(hidden));
  first.bias = data_or_null(b1);
  first.activation = parse_activation(op, activation);
  first.slope = slope ? data_of(slopes) : nullptr;
  Matmul second = linear_output(data_of(hidden), data_of(w2), x.count, width, outputs, data_of(out));
  second.bias = data_or_null(b2);
  second.residual = r ? r->data() : nullptr;
  run_matmuls(dtype, {first, second});
  return {out, hidden, slopes};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> feed_forward_bwd(Tensor grad, Tensor input, Tensor weight1,
                                                                    Tensor weight2, Tensor hidden, Tensor gate,
                                                                    std::string activation, bool input_grad,
                                                                    bool weight_grads, bool bias1_grad,
                                                                    bool bias2_grad) {
  const char* op = "feed_forward_bwd";
  const DType dtype = dtype_of(op, input);
  const Rows x(op, "input", input);
  const int64_t width = outputs_of(op, "weight1", weight1), outputs = outputs_of(op, "weight2", weight2);
  const Tensor w1 = operand(op, "weight1", weight1, input, {width, x.columns});
  const Tensor w2 = operand(op, "weight2", weight2, input, {outputs, width});
  const Rows dy = with_rows(op, "grad", grad, x, outputs);
  const Rows h = with_rows(op, "hidden", hidden, x, width), at = with_rows(op, "gate", gate, x, width);
  const Tensor grad_hidden = x.new_with(width), grad_input = input_grad ? x.new_with(x.columns) : none_like(input);
  Matmul through = linear_grad_input(dy.data(), data_of(w2), x.count, width, outputs, data_of(grad_hidden));
  through.activation = parse_activation(op, activation);
  through.gate = through.activation == Activation::none ? nullptr : at.data();
  std::vector<Matmul> matmuls{through};
  if (input_grad)
    matmuls.push_back(
        linear_grad_input(data_of(grad_hidden), data_of(w1), x.count, x.columns, width, data_of(grad_input)));
  run_matmuls(dtype, matmuls);
  const ParameterGrads second(dtype, dy.data(), h.data(), x.count, w2, weight_grads, bias2_grad);
  const ParameterGrads first(dtype, data_of(grad_hidden), x.data(), x.count, w1, weight_grads, bias1_grad);
  return {grad_input, first.weight, first.bias, second.weight, second.bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tinyllm, CPU, m) {
  m.impl("linear_fwd", TORCH_BOX(&linear_fwd));
  m.impl("linear_bwd", TORCH_BOX(&linear_bwd));
  m.impl("feed_forward_fwd", TORCH_BOX(&feed_forward_fwd));
  m.impl("feed_forward_bwd", TORCH_BOX(&feed_forward_bwd));
}

}  // namespace tinyllm::cpu
