// scaled_dot_product_attention on NVIDIA GPUs: checks, allocation, and the choice among the kernels for few queries
// (attention_decode.cu), those for Hopper (attention_sm90.cu) and those for all GPUs from compute capability 8.0 on
// (attention_forward.cu, attention_backward.cu).
#include "attention.cuh"

#include <limits>
#include <tuple>
#include <utility>

namespace tinyllm::cuda {
namespace {

// Owns the tensors that the call points to.
struct Inputs {
  Tensor query, key, value;
  OptionalTensor key_lengths;
};

// Whether columns are contiguous and all rows are aligned to 16 bytes, which copies to shared memory require.
bool rows_are_aligned(const Tensor& t) {
  constexpr int64_t bytes = 16, numbers = bytes / 2;
  const auto strides = t.strides();
  bool aligned = strides[3] == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % bytes == 0;
  for (int64_t i = 0; i < 3; ++i) aligned = aligned && (t.size(i) <= 1 || strides[i] % numbers == 0);
  return aligned;
}

Tensor with_aligned_rows(const Tensor& t) {
  if (rows_are_aligned(t)) return t;
  return t.is_contiguous() ? torch::stable::clone(t) : torch::stable::contiguous(t);
}

Heads heads_of(const Tensor& t) {
  const auto strides = t.strides();
  return {data_of(t), strides[0], strides[1], strides[2]};
}

// Allocates a (B, H, T, D) tensor whose memory is in the order (B, T, H, D), so that merging the heads is a view.
Tensor empty_heads(const Device& device, const Tensor& like) {
  const int64_t columns = like.size(3), row = std::max<int64_t>(1, like.size(1)) * columns;
  const std::vector<int64_t> sizes{like.size(0), like.size(1), like.size(2), columns};
  const std::vector<int64_t> strides{std::max<int64_t>(1, like.size(2)) * row, columns, row, 1};
  return device.empty_strided(sizes, strides, like.scalar_type());
}

void check_call(const char* op, const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask,
                double scale, double dropout_p, const OptionalTensor& key_lengths,
                const OptionalTensor& causal_offset) {
  if (query.dim() != 4 || key.dim() != 4 || value.dim() != 4)
    fail(op, ": query, key and value must have 4 dimensions, not ", query.dim(), ", ", key.dim(), " and ", value.dim());
  if (query.scalar_type() != ScalarType::BFloat16 && query.scalar_type() != ScalarType::Half)
    fail(op, ": query has dtype ", torch::headeronly::toString(query.scalar_type()),
         "; the CUDA C++ kernels take BFloat16 and Half");
  const int64_t batch = query.size(0), heads = query.size(1), head_dim = query.size(3), kv_heads = key.size(1);
  if (head_dim != 64 && head_dim != 128) fail(op, ": head_dim is ", head_dim, "; the CUDA C++ kernels take 64 and 128");
  check_shape(op, "key", key, {batch, kv_heads, key.size(2), head_dim});
  check_shape(op, "value", value, {batch, kv_heads, key.size(2), head_dim});
  if (heads > 0 && (kv_heads == 0 || heads % kv_heads != 0))
    fail(op, ": key has ", kv_heads, " heads; they must divide query's, ", heads);
  constexpr int64_t most = std::numeric_limits<int32_t>::max() - 1024;  // the rows of a block may begin at the last one
  for (const int64_t size : {batch, heads, query.size(2), key.size(2), batch * heads})
    if (size > most) fail(op, ": a dimension, or batch times heads, is ", size, "; at most ", most, " is allowed");
  for (const auto& [name, t] : {std::pair{"key", &key}, std::pair{"value", &value}}) {
    check_device(op, name, *t, query);
    check_dtype(op, name, *t, query.scalar_type());
  }
  if (mask) fail(op, ": attn_mask is given; the CUDA C++ kernels take None");
  if (dropout_p != 0.0) fail(op, ": dropout_p is ", dropout_p, "; the CUDA C++ kernels take 0");
  if (!(scale > 0.0)) fail(op, ": scale is ", scale, "; the CUDA C++ kernels take positive ones");
  if (causal_offset) fail(op, ": causal_offset is given; the CUDA C++ kernels take None");
  if (key_lengths) {
    check_device(op, "key_lengths", *key_lengths, query);
    check_shape(op, "key_lengths", *key_lengths, {batch});
    if (key_lengths->scalar_type() != ScalarType::Int && key_lengths->scalar_type() != ScalarType::Long)
      fail(op, ": key_lengths has dtype ", torch::headeronly::toString(key_lengths->scalar_type()),
           "; Int or Long is needed");
  }
}

Attention call_of(const Inputs& inputs, bool is_causal, double scale) {
  Attention call;
  call.query = heads_of(inputs.query);
  call.key = heads_of(inputs.key);
  call.value = heads_of(inputs.value);
  call.batch = static_cast<int>(inputs.query.size(0));
  call.heads = static_cast<int>(inputs.query.size(1));
  call.group = call.heads > 0 ? call.heads / static_cast<int>(inputs.key.size(1)) : 1;
  call.queries = static_cast<int>(inputs.query.size(2));
  call.keys = static_cast<int>(inputs.key.size(2));
  call.head_dim = static_cast<int>(inputs.query.size(3));
  call.scale = static_cast<float>(scale);
  call.causal = is_causal;
  call.key_lengths = data_or_null(inputs.key_lengths);
  call.long_lengths = inputs.key_lengths && inputs.key_lengths->scalar_type() == ScalarType::Long;
  return call;
}

Inputs inputs_of(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& key_lengths) {
  Inputs inputs{with_aligned_rows(query), with_aligned_rows(key), with_aligned_rows(value), key_lengths};
  if (key_lengths) inputs.key_lengths = as_contiguous(*key_lengths);
  return inputs;
}

std::tuple<Tensor, Tensor> attention_fwd(Tensor query, Tensor key, Tensor value, OptionalTensor attn_mask,
                                         bool is_causal, double scale, double dropout_p, OptionalTensor,
                                         OptionalTensor key_lengths, OptionalTensor causal_offset) {
  check_call("attention", query, key, value, attn_mask, scale, dropout_p, key_lengths, causal_offset);
  const Device device(query);
  const Tensor out = empty_heads(device, query);
  const std::vector<int64_t> lse_sizes{query.size(0), query.size(1), query.size(2)};
  const Tensor lse = device.empty(lse_sizes, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  const Inputs inputs = inputs_of(query, key, value, key_lengths);
  Attention call = call_of(inputs, is_causal, scale);
  call.out = heads_of(out);
  call.lse = static_cast<float*>(data_of(lse));
  if (attention_decodes(call))
    attention_decode(device, call, query.scalar_type());
  else if (call.keys == 0 || device.capability() != 90 || !attention_forward_sm90(device, call, query.scalar_type()))
    attention_forward(device, call, query.scalar_type());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(Tensor grad, Tensor query, Tensor key, Tensor value,
                                                 OptionalTensor attn_mask, Tensor out, Tensor lse, bool is_causal,
                                                 double scale, double dropout_p, OptionalTensor,
                                                 OptionalTensor key_lengths, OptionalTensor causal_offset) {
  const char* const op = "attention_bwd";
  check_call(op, query, key, value, attn_mask, scale, dropout_p, key_lengths, causal_offset);
  for (const auto& [name, t] : {std::pair{"grad", &grad}, std::pair{"out", &out}}) {
    check_device(op, name, *t, query);
    check_dtype(op, name, *t, query.scalar_type());
    check_shape(op, name, *t, {query.size(0), query.size(1), query.size(2), query.size(3)});
  }
  check_device(op, "lse", lse, query);
  check_dtype(op, "lse", lse, ScalarType::Float);
  check_shape(op, "lse", lse, {query.size(0), query.size(1), query.size(2)});
  const Device device(query);
  Tensor grad_query = empty_heads(device, query), grad_key = empty_heads(device, key),
         grad_value = empty_heads(device, value);
  if (lse.numel() == 0 || key.numel() == 0) {
    for (Tensor* const nothing : {&grad_query, &grad_key, &grad_value})
      if (nothing->numel() > 0) torch::stable::zero_(*nothing);
    return {grad_query, grad_key, grad_value};
  }
  const Inputs inputs = inputs_of(query, key, value, key_lengths);
  const Tensor aligned_grad = with_aligned_rows(grad), aligned_out = with_aligned_rows(out);
  const Tensor row_lse = as_contiguous(lse);
  const std::vector<int64_t> delta_sizes{query.size(0), query.size(1), query.size(2)};
  const Tensor delta = device.empty(delta_sizes, ScalarType::Float);
  Attention call = call_of(inputs, is_causal, scale);
  call.out = heads_of(aligned_out);
  call.grad_out = heads_of(aligned_grad);
  call.grad_query = heads_of(grad_query);
  call.grad_key = heads_of(grad_key);
  call.grad_value = heads_of(grad_value);
  call.lse = static_cast<float*>(data_of(row_lse));
  call.delta = static_cast<float*>(data_of(delta));
  attention_delta(device, call, query.scalar_type());
  if (device.capability() != 90 || !attention_backward_sm90(device, call, query.scalar_type()))
    attention_backward(device, call, query.scalar_type());
  return {grad_query, grad_key, grad_value};
}

}  // namespace

TINYLLM_CUDA_OPERATORS(m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}

}  // namespace tinyllm::cuda
