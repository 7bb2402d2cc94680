// quantize_weight and quantized_linear on the CPU, and linear layers over stored weights for generation.
#include "weights.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <string>
#include <tuple>

#include "matmul.h"
#include "scratch.h"

namespace tinyllm::cpu {

Weight read_weight(const char* op, const char* name, const Tensor& data, const OptionalTensor& scales, int64_t outputs,
                   int64_t inputs) {
  Weight w;
  w.outputs = outputs;
  w.inputs = inputs;
  if (inputs < 1) fail(op, ": ", name, " has ", inputs, " columns; at least 1 is needed");
  if (!data.is_cpu()) fail(op, ": ", name, " is not on the CPU");
  if (!data.is_contiguous()) fail(op, ": ", name, " is not contiguous");
  w.data = data_of(data);
  if (data.scalar_type() == ScalarType::Float || data.scalar_type() == ScalarType::BFloat16) {
    w.kind = data.scalar_type() == ScalarType::Float ? WeightKind::f32 : WeightKind::bf16;
    check_shape(op, name, data, {outputs, inputs});
    return w;
  }
  check_dtype(op, name, data, ScalarType::Byte);
  const int64_t padded = w.blocks() * kQuantBlock;
  if (data.dim() != 2 || data.size(0) != outputs || (data.size(1) != padded && data.size(1) != padded / 2))
    fail(op, ": ", name, " has shape ", shape_of(data), "; [", outputs, ", ", padded, "] (int8) or [", outputs, ", ",
         padded / 2, "] (int4) is needed");
  w.kind = data.size(1) == padded ? WeightKind::int8 : WeightKind::int4;
  if (!scales) fail(op, ": ", name, " has no scales");
  check_dtype(op, "scales", *scales, ScalarType::BFloat16);
  if (!scales->is_cpu() || !scales->is_contiguous()) fail(op, ": scales must be contiguous and on the CPU");
  if (scales->dim() != 2 || scales->size(0) != outputs || scales->size(1) < 1 || padded % scales->size(1) != 0 ||
      padded / scales->size(1) % kQuantBlock != 0)
    fail(op, ": scales have shape ", shape_of(*scales), "; ", outputs, " rows are needed, of one for each group of a ",
         "multiple of ", kQuantBlock, " of the ", padded, " columns");
  w.scales = static_cast<const bfloat16*>(data_of(*scales));
  w.group = padded / scales->size(1);
  return w;
}

Matmul weight_matmul(const Weight& weight, const float* x, int64_t rows, float* out) {
  Matmul p = linear_output(x, weight.data, rows, weight.inputs, weight.outputs, out);
  p.weight = &weight;
  return p;
}

namespace {

// The number of outputs that a thread takes at a time: a quarter of its share, whose streams are long, but no less than
// what takes longer to read than the thread to wake.
int64_t product_grain(const Weight& weight) {
  constexpr int64_t bytes = 65536, lines = 32;  // whole lines of outputs
  const int64_t least = bytes / std::max<int64_t>(1, weight.row_bytes()) / lines * lines;
  const int64_t quarter = divide_up(weight.outputs, 4 * torch::stable::get_num_threads() * lines) * lines;
  return std::max({lines, least, quarter});
}

}  // namespace

void weight_linear(const Weight& weight, const float* x, int64_t rows, const float* bias, Activation activation,
                   const float* residual, float* out) {
  if (rows <= kFewRows) return weight_dots(weight, x, rows, bias, activation, residual, out);
  Matmul p = weight_matmul(weight, x, rows, out);
  p.bias = bias;
  p.activation = activation;
  p.residual = residual;
  run_matmuls(DType::f32, {p});
}

void weight_dots(const Weight& weight, const float* x, int64_t rows, const float* bias, Activation activation,
                 const float* residual, float* out) {
  if (rows == 0 || weight.outputs == 0) return;
  const Kernels& table = kernels();
  Activations a{.rows = rows, .inputs = weight.inputs, .data = x, .row = weight.inputs};
  const unsigned kind = 1u << static_cast<int>(weight.kind);
  Arena sizes;
  a.layout(sizes, kind);
  const Scratch scratch(sizes.used());
  Arena arena(scratch.data());
  a.layout(arena, kind);
  table.prepare_activations(a, 0, rows);
  const WeightProduct p{.weight = weight,
                        .x = &a,
                        .bias = bias,
                        .activation = activation,
                        .residual = residual,
                        .out = out,
                        .out_row = weight.outputs};
  const int64_t grain = product_grain(weight);
  parallel_items(divide_up(weight.outputs, grain), [&](int64_t item) {
    table.weight_product[static_cast<int>(weight.kind)](p, item * grain, std::min(weight.outputs, (item + 1) * grain));
  });
}

namespace {

Tensor as_float_rows(const char* op, const char* name, const Tensor& t) {
  check_dtype(op, name, t, ScalarType::Float);
  if (!t.is_cpu()) fail(op, ": ", name, " is not on the CPU");
  return as_contiguous(t);
}

std::tuple<Tensor, Tensor> quantize_weight(Tensor weight, int64_t bits, int64_t group_size) {
  const char* op = "quantize_weight";
  if (weight.dim() != 2) fail(op, ": weight has shape ", shape_of(weight), "; it must have 2 dimensions");
  if (bits != 8 && bits != 4) fail(op, ": bits is ", bits, "; 8 or 4 is needed");
  if (group_size < kQuantBlock || group_size % kQuantBlock != 0)
    fail(op, ": group_size is ", group_size, "; a multiple of ", kQuantBlock, " is needed");
  const Tensor from = as_float_rows(op, "weight", weight);
  Weight w{.kind = bits == 8 ? WeightKind::int8 : WeightKind::int4,
           .outputs = weight.size(0),
           .inputs = weight.size(1),
           .group = group_size};
  if (w.blocks() * kQuantBlock % group_size != 0)
    fail(op, ": group_size is ", group_size, "; it must divide ", w.blocks() * kQuantBlock, ", the padded columns");
  const Tensor data = empty({w.outputs, w.row_bytes()}, ScalarType::Byte);
  const Tensor scales = empty({w.outputs, w.groups()}, ScalarType::BFloat16);
  w.data = data_of(data);
  w.scales = static_cast<const bfloat16*>(data_of(scales));
  const Quantize q{static_cast<const float*>(data_of(from)), w};
  torch::stable::parallel_for(0, w.outputs, 16,
                              [&](int64_t begin, int64_t end) { kernels().quantize_rows(q, begin, end); });
  return {data, scales};
}

Tensor dequantize_weight(Tensor data, OptionalTensor scales, int64_t inputs) {
  const char* op = "dequantize_weight";
  if (data.dim() != 2) fail(op, ": data has shape ", shape_of(data), "; it must have 2 dimensions");
  const Weight w = read_weight(op, "data", data, scales, data.size(0), inputs);
  const Tensor out = empty({w.outputs, inputs}, ScalarType::Float);
  float* to = static_cast<float*>(data_of(out));
  torch::stable::parallel_for(0, w.outputs, 64, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) kernels().dequantize_row(w, r, 0, inputs, to + r * inputs);
  });
  return out;
}

Tensor quantized_linear(Tensor input, Tensor data, OptionalTensor scales, OptionalTensor bias, OptionalTensor residual,
                        std::string activation) {
  const char* op = "quantized_linear";
  if (input.dim() == 0) fail(op, ": input has no dimensions; (..., features) is needed");
  if (data.dim() != 2) fail(op, ": data has shape ", shape_of(data), "; it must have 2 dimensions");
  const Tensor x = as_float_rows(op, "input", input);
  const int64_t inputs = x.size(x.dim() - 1), outputs = data.size(0);
  const Weight w = read_weight(op, "data", data, scales, outputs, inputs);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = outputs;
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
  const auto operand = [&](const char* name, const OptionalTensor& t, IntArray wanted) -> OptionalTensor {
    if (!t) return std::nullopt;
    check_shape(op, name, *t, wanted);
    return as_float_rows(op, name, *t);
  };
  const std::vector<int64_t> bias_shape{outputs};
  const OptionalTensor b = operand("bias", bias, {bias_shape.data(), bias_shape.size()});
  const OptionalTensor r = operand("residual", residual, {shape.data(), shape.size()});
  const Tensor out = empty({shape.data(), shape.size()}, ScalarType::Float);
  weight_linear(w, static_cast<const float*>(data_of(x)), rows, static_cast<const float*>(data_or_null(b)),
                parse_activation(op, activation), static_cast<const float*>(data_or_null(r)),
                static_cast<float*>(data_of(out)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tinyllm, CPU, m) {
  m.impl("quantize_weight", TORCH_BOX(&quantize_weight));
  m.impl("dequantize_weight", TORCH_BOX(&dequantize_weight));
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
}

}  // namespace tinyllm::cpu
