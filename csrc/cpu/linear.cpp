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

// The weight of a layer, (outputs, inputs), and its matmuls over rows. One that is the transposed view of a contiguous
// matrix, as a weight that is stored (inputs, outputs) comes here, is read as it lies, and so lies its gradient.
struct LayerWeight {
  Tensor tensor;
  int64_t outputs, inputs;
  bool by_inputs;

  LayerWeight(const char* op, const char* name, const Tensor& weight, const Tensor& like, int64_t columns)
      : tensor(weight), inputs(columns) {
    if (weight.dim() != 2) fail(op, ": ", name, " has shape ", shape_of(weight), "; it must have 2 dimensions");
    outputs = weight.size(0);
    by_inputs = !weight.is_contiguous() && weight.stride(0) == 1 && weight.stride(1) == outputs;
    check_device(op, name, weight, like);
    check_dtype(op, name, weight, like.scalar_type());
    check_shape(op, name, weight, {outputs, inputs});
    if (!by_inputs) tensor = as_contiguous(weight);
  }
  Matmul output(const void* x, int64_t rows, void* y) const {
    return linear_output(x, data_of(tensor), rows, inputs, outputs, y, by_inputs);
  }
  Matmul grad_input(const void* grad, int64_t rows, void* grad_x) const {
    return linear_grad_input(grad, data_of(tensor), rows, inputs, outputs, grad_x, by_inputs);
  }
  Matmul grad_weight(const void* grad, const void* x, int64_t rows, void* grad_w) const {
    return linear_grad_weight(grad, x, rows, inputs, outputs, grad_w, by_inputs);
  }
  Tensor new_like() const { return empty_strided(tensor.sizes(), tensor.strides(), tensor.scalar_type()); }
};

std::tuple<Tensor, Tensor> linear_fwd(Tensor input, Tensor weight, OptionalTensor bias, OptionalTensor residual,
                                      std::string activation, bool slope) {
  const char* op = "linear";
  const DType dtype = dtype_of(op, input);
  const Rows x(op, "input", input);
  const LayerWeight w(op, "weight", weight, input, x.columns);
  const OptionalTensor b = operand(op, "bias", bias, input, {w.outputs});
  std::optional<Rows> r;
  if (residual) r = with_rows(op, "residual", *residual, x, w.outputs);
  const Tensor out = x.new_with(w.outputs), slopes = slope ? x.new_with(w.outputs) : none_like(input);
  Matmul p = w.output(x.data(), x.count, data_of(out));
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

  ParameterGrads(DType dtype, const void* grad, const void* input, int64_t rows, const LayerWeight& w, bool weight_grad,
                 bool bias_grad)
      : weight(weight_grad ? w.new_like() : none_like(w.tensor)),
        bias(bias_grad ? empty({w.outputs}, w.tensor.scalar_type()) : none_like(w.tensor)) {
    if (weight_grad) run_matmuls(dtype, {w.grad_weight(grad, input, rows, data_of(weight))});
    if (bias_grad) sum_columns(dtype, grad, rows, w.outputs, data_of(bias));
  }
};

std::tuple<Tensor, Tensor, Tensor> linear_bwd(Tensor grad, Tensor input, Tensor weight, OptionalTensor gate,
                                              std::string activation, bool input_grad, bool weight_grad,
                                              bool bias_grad) {
  const char* op = "linear_bwd";
  const DType dtype = dtype_of(op, input);
  const Rows x(op, "input", input);
  const LayerWeight w(op, "weight", weight, input, x.columns);
  Rows dy = with_rows(op, "grad", grad, x, w.outputs);
  if (gate) {
    const Rows at = with_rows(op, "gate", *gate, x, w.outputs);
    const Tensor gated = dy.new_with(w.outputs);
    pass_gate(dtype, parse_activation(op, activation), at.data(), dy.data(), data_of(gated), x.count * w.outputs);
    dy.tensor = gated;
  }
  const Tensor grad_input = input_grad ? x.new_with(x.columns) : none_like(input);
  if (input_grad) run_matmuls(dtype, {w.grad_input(dy.data(), x.count, data_of(grad_input))});
  const ParameterGrads grads(dtype, dy.data(), x.data(), x.count, w, weight_grad, bias_grad);
  return {grad_input, grads.weight, grads.bias};
}

std::tuple<Tensor, Tensor, Tensor> feed_forward_fwd(Tensor input, Tensor weight1, OptionalTensor bias1, Tensor weight2,
                                                    OptionalTensor bias2, OptionalTensor residual,
                                                    std::string activation, bool slope) {
  const char* op = "feed_forward";
  const DType dtype = dtype_of(op, input);
  const Rows x(op, "input", input);
  const LayerWeight w1(op, "weight1", weight1, input, x.columns), w2(op, "weight2", weight2, input, w1.outputs);
  const int64_t width = w1.outputs, outputs = w2.outputs;
  const OptionalTensor b1 = operand(op, "bias1", bias1, input, {width});
  const OptionalTensor b2 = operand(op, "bias2", bias2, input, {outputs});
  std::optional<Rows> r;
  if (residual) r = with_rows(op, "residual", *residual, x, outputs);
  const Tensor hidden = x.new_with(width), out = x.new_with(outputs);
  const Tensor slopes = slope ? x.new_with(width) : none_like(input);
  Matmul first = w1.output(x.data(), x.count, data_of(hidden));
  first.bias = data_or_null(b1);
  first.activation = parse_activation(op, activation);
  first.slope = slope ? data_of(slopes) : nullptr;
  Matmul second = w2.output(data_of(hidden), x.count, data_of(out));
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
  const LayerWeight w1(op, "weight1", weight1, input, x.columns), w2(op, "weight2", weight2, input, w1.outputs);
  const int64_t width = w1.outputs, outputs = w2.outputs;
  const Rows dy = with_rows(op, "grad", grad, x, outputs);
  const Rows h = with_rows(op, "hidden", hidden, x, width), at = with_rows(op, "gate", gate, x, width);
  const Tensor grad_hidden = x.new_with(width), grad_input = input_grad ? x.new_with(x.columns) : none_like(input);
  Matmul through = w2.grad_input(dy.data(), x.count, data_of(grad_hidden));
  through.activation = parse_activation(op, activation);
  through.gate = through.activation == Activation::none ? nullptr : at.data();
  std::vector<Matmul> matmuls{through};
  if (input_grad) matmuls.push_back(w1.grad_input(data_of(grad_hidden), x.count, data_of(grad_input)));
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
