// scaled_dot_product_attention on the CPU: check, allocate, split over threads. The arithmetic is in
// attention_kernel.h.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "attention.h"
#include "random.h"
#include "torch_side.h"

namespace tinyllm::cpu {
namespace {

constexpr int64_t kMaxHeadDim = 1024;
constexpr int64_t kBackwardItems = 32;

Strided strided(const Tensor& t) {
  const auto strides = t.strides();
  return {data_of(t), strides[0], strides[1], strides[2], strides[3]};
}

// (B, H, T, D) over memory in the order (B, T, H, D): joining the heads afterwards is free.
Tensor new_heads_inside(const Tensor& like, int64_t batch, int64_t heads, int64_t rows, int64_t columns) {
  const int64_t row = std::max<int64_t>(1, heads) * std::max<int64_t>(1, columns);
  const std::vector<int64_t> shape{batch, heads, rows, columns};
  const std::vector<int64_t> strides{std::max<int64_t>(1, rows) * row, std::max<int64_t>(1, columns), row, 1};
  return empty_strided(shape, strides, like.scalar_type());
}

Attention arguments(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                    const OptionalTensor& mask, bool is_causal, double scale, double dropout_p,
                    const OptionalTensor& rng) {
  if (query.dim() != 4 || key.dim() != 4 || value.dim() != 4)
    fail(op, ": query, key and value must have 4 dimensions, not ", query.dim(), ", ", key.dim(), " and ", value.dim());
  Attention a{};
  a.batch = query.size(0);
  a.heads = query.size(1);
  a.queries = query.size(2);
  a.head_dim = query.size(3);
  a.kv_heads = key.size(1);
  a.keys = key.size(2);
  a.value_dim = value.size(3);
  a.scale = scale;
  a.causal = is_causal;
  a.dropout = dropout_state(op, rng, dropout_p);
  check_shape(op, "key", key, {a.batch, a.kv_heads, a.keys, a.head_dim});
  check_shape(op, "value", value, {a.batch, a.kv_heads, a.keys, a.value_dim});
  if (a.heads > 0 && (a.kv_heads == 0 || a.heads % a.kv_heads != 0))
    fail(op, ": key has ", a.kv_heads, " heads; they must divide query's, ", a.heads);
  if (std::max(a.head_dim, a.value_dim) > kMaxHeadDim)
    fail(op, ": head_dim is ", std::max(a.head_dim, a.value_dim), "; the kernel takes at most ", kMaxHeadDim);
  for (const auto& [name, t] : {std::pair{"key", &key}, std::pair{"value", &value}}) {
    check_device(op, name, *t, query);
    check_dtype(op, name, *t, query.scalar_type());
  }
  a.query = strided(query);
  a.key = strided(key);
  a.value = strided(value);
  if (mask) {
    check_device(op, "attn_mask", *mask, query);
    check_shape(op, "attn_mask", *mask, {a.batch, a.heads, a.queries, a.keys});
    if (mask->scalar_type() != ScalarType::Bool) check_dtype(op, "attn_mask", *mask, query.scalar_type());
    a.mask_kind = mask->scalar_type() == ScalarType::Bool ? MaskKind::boolean : MaskKind::additive;
    a.mask = strided(*mask);
  }
  return a;
}

void no_key_lengths(const char* op, const OptionalTensor& key_lengths) {
  if (key_lengths) fail(op, ": on CPU tensors key_lengths must be None; say the same in attn_mask");
}

std::tuple<Tensor, Tensor> attention_fwd(Tensor query, Tensor key, Tensor value, OptionalTensor attn_mask,
                                         bool is_causal, double scale, double dropout_p, OptionalTensor rng,
                                         OptionalTensor key_lengths) {
  no_key_lengths("attention", key_lengths);
  Attention a = arguments("attention", query, key, value, attn_mask, is_causal, scale, dropout_p, rng);
  const Tensor out = new_heads_inside(query, a.batch, a.heads, a.queries, a.value_dim);
  const std::vector<int64_t> lse_shape{a.batch, a.heads, a.queries};
  const Tensor lse = empty(lse_shape, compute_dtype(query.scalar_type()));
  a.out = strided(out);
  a.lse = data_of(lse);
  attention_forward(dtype_index("attention", query), a);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(Tensor grad, Tensor query, Tensor key, Tensor value,
                                                 OptionalTensor attn_mask, Tensor out, Tensor lse, bool is_causal,
                                                 double scale, double dropout_p, OptionalTensor rng,
                                                 OptionalTensor key_lengths) {
  const char* op = "attention_bwd";
  no_key_lengths(op, key_lengths);
  Attention a = arguments(op, query, key, value, attn_mask, is_causal, scale, dropout_p, rng);
  for (const auto& [name, t] : {std::pair{"grad", &grad}, std::pair{"out", &out}}) {
    check_device(op, name, *t, query);
    check_dtype(op, name, *t, query.scalar_type());
    check_shape(op, name, *t, {a.batch, a.heads, a.queries, a.value_dim});
  }
  check_device(op, "lse", lse, query);
  check_dtype(op, "lse", lse, compute_dtype(query.scalar_type()));
  check_shape(op, "lse", lse, {a.batch, a.heads, a.queries});
  if (!lse.is_contiguous()) fail(op, ": lse must be contiguous");
  const Tensor grad_query = new_heads_inside(query, a.batch, a.heads, a.queries, a.head_dim);
  const Tensor grad_key = new_heads_inside(query, a.batch, a.kv_heads, a.keys, a.head_dim);
  const Tensor grad_value = new_heads_inside(query, a.batch, a.kv_heads, a.keys, a.value_dim);
  a.out = strided(out);
  a.lse = data_of(lse);
  a.grad_out = strided(grad);
  a.grad_query = strided(grad_query);
  a.grad_key = strided(grad_key);
  a.grad_value = strided(grad_value);
  attention_backward(dtype_index(op, query), a);
  return {grad_query, grad_key, grad_value};
}

// Memory for the ranges' shares, `columns` wide.
std::unique_ptr<char[]> new_shares(int dtype, int64_t columns, Attention& a) {
  constexpr int64_t line = 64;
  a.share_row = (columns + 15) / 16 * 16 + 16;
  const int64_t element = dtype == static_cast<int>(DType::f64) ? sizeof(double) : sizeof(float);
  const int64_t bytes = a.batch * a.heads * a.parts * a.queries * a.share_row * element;
  std::unique_ptr<char[]> shares(new char[bytes + line]);
  a.shares = shares.get() + line - reinterpret_cast<uintptr_t>(shares.get()) % line;
  return shares;
}

// Whether keys and values are used so few times that packing them would not pay, and a head is worth splitting.
bool decodes(const Attention& a) {
  return a.keys >= 64 && a.queries > 0 && !a.causal && a.key.column == 1 && a.value.column == 1 &&
         a.heads / std::max<int64_t>(a.kv_heads, 1) * a.queries <= 8;
}

void attention_decode(int dtype, Attention a) {
  a.part = 512;
  a.parts = (a.keys + a.part - 1) / a.part;
  const std::unique_ptr<char[]> shares = new_shares(dtype, a.value_dim, a);
  const Kernels& table = kernels();
  const int64_t heads = a.batch * a.kv_heads;
  parallel_items(heads * a.parts, [&](int64_t item) {
    const int64_t head = item / a.parts;
    table.attention_decode[dtype](a, head / a.kv_heads, head % a.kv_heads, item % a.parts);
  });
  // Waking the threads again would cost more than this takes.
  for (int64_t head = 0; head < heads; ++head)
    table.attention_decode_sum[dtype](a, head / a.kv_heads, head % a.kv_heads);
}

}  // namespace

void attention_forward(int dtype, const Attention& a) {
  if (decodes(a)) return attention_decode(dtype, a);
  const auto kernel = kernels().attention_fwd[dtype];
  // A head is one item while there are heads for every thread. Else its queries are split: each part packs the keys
  // again, so parts are not made smaller than 256 queries.
  const int64_t heads = a.batch * a.heads;
  const int64_t wanted = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  int64_t parts = heads >= wanted ? 1 : (wanted + heads - 1) / std::max<int64_t>(heads, 1);
  parts = std::clamp<int64_t>(parts, 1, std::max<int64_t>(1, a.queries / 256));
  // Whole groups of queries, so that no part begins inside one.
  const int64_t part = ((a.queries + parts - 1) / parts + 63) / 64 * 64;
  if (a.queries > 0) parts = (a.queries + part - 1) / part;
  parallel_items(a.queries == 0 ? 0 : heads * parts, [&](int64_t item) {
    // The last part of a causal head costs most: it goes first.
    const int64_t begin = (parts - 1 - item % parts) * part, head = item / parts;
    kernel(a, head / a.heads, head % a.heads, begin, std::min(a.queries, begin + part));
  });
}

void attention_backward(int dtype, const Attention& arguments) {
  Attention a = arguments;
  // One range of keys for each head while there are many heads; else enough for as many threads as most machines have.
  // Not by the threads at hand: the ranges decide in which order dQ is summed.
  const int64_t heads = a.batch * a.kv_heads, block = bwd_key_block(a);
  const int64_t wanted = (kBackwardItems + heads - 1) / std::max<int64_t>(heads, 1);
  const int64_t ranges = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, a.keys / block));
  a.part = std::max(block, (a.keys + ranges - 1) / ranges + block - 1) / block * block;
  a.parts = std::max<int64_t>(1, (a.keys + a.part - 1) / a.part);
  std::unique_ptr<char[]> shares;
  if (a.parts > 1) shares = new_shares(dtype, a.head_dim, a);
  const Kernels& table = kernels();
  parallel_items(heads * a.parts, [&](int64_t item) {
    // The first range of a causal head costs most: all heads' first ranges go first.
    const int64_t head = item % heads;
    table.attention_bwd[dtype](a, head / a.kv_heads, head % a.kv_heads, item / heads);
  });
  if (a.parts == 1) return;
  constexpr int64_t rows = 64;
  const int64_t blocks = (a.queries + rows - 1) / rows;
  parallel_items(a.batch * a.heads * blocks, [&](int64_t item) {
    const int64_t head = item / blocks, begin = item % blocks * rows;
    table.attention_bwd_sum[dtype](a, head / a.heads, head % a.heads, begin, std::min(a.queries, begin + rows));
  });
}

STABLE_TORCH_LIBRARY_IMPL(tinyllm, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}

}  // namespace tinyllm::cpu
