// Reading a prompt: all its tokens at once, by the matmuls and the attention of training, with their keys and values
// left in the cache. What a token gives does not depend on how many are read with it, nor on the other sequences.
//
// The list of weights is that of transformer.cpp, with the matrices in any kind that weight_args.h knows; a matrix of
// bytes is followed by its scales.
#include "decoder.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "scratch.h"

namespace tinyllm::cpu {
namespace {

struct Given {
  Tensor data;
  OptionalTensor scales;
};

std::vector<int64_t> read_lengths(const char* op, const char* name, const Tensor& t, int64_t batch) {
  check_dtype(op, name, t, ScalarType::Long);
  check_shape(op, name, t, {batch});
  if (!t.is_cpu()) fail(op, ": ", name, " is not on the CPU");
  const Tensor whole = as_contiguous(t);
  const int64_t* data = static_cast<const int64_t*>(data_of(whole));
  return {data, data + batch};
}

}  // namespace

void check_ids(const char* op, const Decoder& d, const int64_t* ids, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= d.vocab_size)
      fail(op, ": an id is ", ids[i], "; the model's are 0 .. ", d.vocab_size - 1);
}

Decoder read_decoder(const char* op, const std::vector<Tensor>& weights, const Tensor& positions, const Tensor& cache,
                     const Tensor& lengths, int64_t num_layers, int64_t num_heads, bool norm_first,
                     const std::string& activation, double eps, int64_t batch, int64_t tokens) {
  Decoder d{};
  std::vector<Given> given;
  for (size_t i = 0; i < weights.size(); ++i) {
    given.push_back({weights[i], std::nullopt});
    if (weights[i].scalar_type() == ScalarType::Byte && i + 1 < weights.size()) given.back().scales = weights[++i];
  }
  const int64_t count = static_cast<int64_t>(given.size());
  if (count == 0 || given[0].data.dim() != 2) fail(op, ": the first weight must be the table (V, D)");
  if (num_layers < 0) fail(op, ": num_layers is ", num_layers, "; it must be at least 0");
  if (positions.dim() != 2) fail(op, ": positions has shape ", shape_of(positions), "; (length, D) is needed");
  const int64_t width = positions.size(1);
  if (width < 1) fail(op, ": positions has no columns");
  if (num_heads < 1 || width % num_heads != 0 || width / num_heads > 1024)
    fail(op, ": num_heads is ", num_heads, "; it must divide D, ", width, ", into at most 1024 columns");
  BlockSizes& s = d.sizes;
  s.batch = batch;
  s.width = width;
  s.heads = num_heads;
  s.projected = num_heads > 1;
  s.causal = true;
  s.norm_first = norm_first;
  s.activation = parse_activation(op, activation);
  if (s.activation == Activation::none) fail(op, ": activation is 'none'; relu, gelu, gelu_tanh or silu is needed");
  s.dtype = DType::f32;
  s.eps1 = s.eps2 = eps;
  s.bias = false;
  const int64_t without = num_layers * s.parameters() + (norm_first ? 2 : 1);
  const int64_t all = 1 + 2 * without;
  const bool has_output_bias = count == all;
  s.bias = has_output_bias || (count == all - 1 && without > 1);
  if (!s.bias && count != 1 + without)
    fail(op, ": there are ", count, " weights; ", 1 + without, " or ", all,
         " are needed, the output's bias being optional");
  d.vocab_size = given[0].data.size(0);
  d.blocks.assign(static_cast<size_t>(num_layers), s);
  for (int64_t l = 0; l < num_layers; ++l) {
    const Tensor& first = given[static_cast<size_t>(1 + l * s.parameters() + (s.projected ? 4 : 3))].data;
    d.blocks[static_cast<size_t>(l)].hidden = first.dim() > 0 ? first.size(0) : 0;
    if (d.blocks[static_cast<size_t>(l)].hidden < 1) fail(op, ": the first layer of block ", l, " has no outputs");
  }
  const Tensor& last = given[static_cast<size_t>(count - (has_output_bias ? 2 : 1))].data;
  d.classes = last.dim() > 0 ? last.size(0) : 0;
  if (d.classes < 1) fail(op, ": the output has no rows");

  size_t index = 0;
  const auto bind = [&](Operand& to, const Extents& extents) {
    const Given& from = given[index];
    const std::string name = "weight " + std::to_string(index);
    ++index;
    if (extents.shape().size() == 2) {
      to.matrix = read_weight(op, name.c_str(), from.data, from.scales, extents.shape()[0], extents.shape()[1]);
      return;
    }
    check_dtype(op, name.c_str(), from.data, ScalarType::Float);
    check_shape(op, name.c_str(), from.data, extents.shape());
    if (!from.data.is_cpu() || !from.data.is_contiguous()) fail(op, ": ", name, " must be contiguous and on the CPU");
    to.vector = static_cast<const float*>(data_of(from.data));
  };
  bind(d.table, {d.vocab_size, width});
  d.parameters.resize(d.blocks.size());
  for (size_t l = 0; l < d.blocks.size(); ++l) d.parameters[l].visit(d.blocks[l], bind);
  if (norm_first) {
    bind(d.norm, Extents(width));
    if (s.bias) bind(d.norm_bias, Extents(width));
  }
  bind(d.output, {d.classes, width});
  if (has_output_bias) bind(d.output_bias, Extents(d.classes));

  check_dtype(op, "positions", positions, ScalarType::Float);
  if (!positions.is_cpu() || !positions.is_contiguous()) fail(op, ": positions must be contiguous and on the CPU");
  d.positions = static_cast<const float*>(data_of(positions));
  d.most_positions = positions.size(0);

  const int64_t head_dim = d.head_dim();
  if (cache.scalar_type() != ScalarType::Float) check_dtype(op, "cache", cache, ScalarType::BFloat16);
  if (cache.dim() != 6 || cache.size(0) != num_layers || cache.size(1) != 2 || cache.size(2) != batch ||
      cache.size(3) != num_heads || cache.size(5) != head_dim)
    fail(op, ": cache has shape ", shape_of(cache), "; [", num_layers, ", 2, ", batch, ", ", num_heads, ", length, ",
         head_dim, "] is needed");
  if (!cache.is_cpu()) fail(op, ": cache is not on the CPU");
  if (cache.numel() > 0 && (cache.stride(5) != 1 || cache.stride(4) != head_dim))
    fail(op, ": the rows of cache must follow one another");
  const int64_t size = static_cast<int64_t>(cache.element_size());
  d.cache = static_cast<char*>(data_of(cache));
  d.cache_length = cache.size(4);
  d.cache_layer = cache.stride(0) * size;
  d.cache_value = cache.stride(1) * size;
  d.cache_strides = {nullptr, cache.stride(2), cache.stride(3), head_dim, 1};
  d.cache_bf16 = cache.scalar_type() == ScalarType::BFloat16;
  d.lengths = read_lengths(op, "lengths", lengths, batch);
  for (const int64_t length : d.lengths)
    if (length < 0 || length > std::min(d.cache_length, d.most_positions) - tokens)
      fail(op, ": a sequence has read ", length, " tokens and is to read ", tokens, " more; the cache has room for ",
           d.cache_length, ", and there are ", d.most_positions, " positions");
  return d;
}

void embed(const Decoder& d, int64_t id, int64_t position, float* to) {
  const int64_t width = d.sizes.width;
  kernels().dequantize_row(d.table.matrix, id, 0, width, to);
  const float* at = d.positions + position * width;
  for (int64_t i = 0; i < width; ++i) to[i] += at[i];
}

namespace {

// The memory of a prompt's activations, of `rows` tokens.
struct Reading {
  float *x, *normed, *query, *key, *value, *attended, *hidden, *mean, *rstd, *lse, *keys, *values, *last;

  size_t layout(char* base, const Decoder& d, int64_t rows, int64_t seen) {
    Arena arena(base);
    const int64_t size = rows * d.sizes.width;
    int64_t most = 0;
    for (const BlockSizes& block : d.blocks) most = std::max(most, block.hidden);
    for (float** p : {&x, &normed, &query, &key, &value, &attended}) *p = arena.take<float>(size);
    hidden = arena.take<float>(rows * most);
    mean = arena.take<float>(rows);
    rstd = arena.take<float>(rows);
    lse = arena.take<float>(rows * d.sizes.heads);
    const int64_t copied = d.cache_bf16 ? d.sizes.batch * seen * d.sizes.width : 0;
    keys = arena.take<float>(copied);
    values = arena.take<float>(copied);
    last = arena.take<float>(d.sizes.batch * d.sizes.width);
    return arena.used();
  }
};

// Copies n elements into the cache, at an offset.
void store(const Decoder& d, const Strided& cache, int64_t offset, const float* from, int64_t n) {
  if (d.cache_bf16)
    for (int64_t i = 0; i < n; ++i) from_compute(from[i], static_cast<bfloat16*>(cache.data)[offset + i]);
  else
    std::copy_n(from, n, static_cast<float*>(cache.data) + offset);
}

// The heads (b, h) with the first `seen` rows of a cache of bfloat16 as floats.
Strided as_floats(const Decoder& d, const Strided& cache, int64_t seen, float* to) {
  const int64_t heads = d.sizes.heads, head_dim = d.head_dim(), head = seen * head_dim;
  torch::stable::parallel_for(0, d.sizes.batch * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const bfloat16* from =
          static_cast<const bfloat16*>(cache.data) + i / heads * cache.batch + i % heads * cache.head;
      for (int64_t j = 0; j < head; ++j) to[i * head + j] = to_compute(from[j]);
    }
  });
  return {to, heads * head, head, head_dim, 1};
}

void attend(const Decoder& d, const Reading& r, int64_t layer, int64_t tokens, const std::vector<int64_t>& counts,
            int64_t seen) {
  const int64_t batch = d.sizes.batch, heads = d.sizes.heads, head_dim = d.head_dim(), width = d.sizes.width;
  const Strided keys = d.cache_of(layer, 0), values = d.cache_of(layer, 1);
  torch::stable::parallel_for(0, batch * tokens, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / tokens, t = row % tokens;
      if (t >= counts[static_cast<size_t>(b)]) continue;  // padding
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t to = b * keys.batch + h * keys.head + (d.lengths[static_cast<size_t>(b)] + t) * keys.row;
        store(d, keys, to, r.key + row * width + h * head_dim, head_dim);
        store(d, values, to, r.value + row * width + h * head_dim, head_dim);
      }
    }
  });
  std::vector<int64_t> key_lengths(d.lengths);
  for (size_t b = 0; b < key_lengths.size(); ++b) key_lengths[b] += counts[b];
  Attention a{};
  a.batch = batch;
  a.heads = a.kv_heads = heads;
  a.queries = tokens;
  a.keys = seen;
  a.head_dim = a.value_dim = head_dim;
  a.scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
  a.causal = true;
  a.causal_offset = d.lengths.data();
  a.key_lengths = key_lengths.data();
  a.query = {r.query, tokens * width, head_dim, width, 1};
  a.key = d.cache_bf16 ? as_floats(d, keys, seen, r.keys) : keys;
  a.value = d.cache_bf16 ? as_floats(d, values, seen, r.values) : values;
  a.out = {r.attended, tokens * width, head_dim, width, 1};
  a.lse = r.lse;
  attention_in_blocks(DType::f32, a);
}

Matmul layer(const Affine<Operand>& w, const float* x, int64_t rows, float* out) {
  Matmul p = weight_matmul(w.weight.matrix, x, rows, out);
  p.bias = w.bias.vector;
  return p;
}

Tensor decoder_read(Tensor ids, Tensor counts, std::vector<Tensor> weights, Tensor positions, Tensor cache,
                    Tensor lengths, int64_t num_layers, int64_t num_heads, bool norm_first, std::string activation,
                    double eps) {
  const char* op = "decoder_read";
  check_dtype(op, "ids", ids, ScalarType::Long);
  if (ids.dim() != 2 || !ids.is_cpu()) fail(op, ": ids has shape ", shape_of(ids), "; (B, T) on the CPU is needed");
  const int64_t batch = ids.size(0), tokens = ids.size(1), rows = batch * tokens;
  const std::vector<int64_t> taken = read_lengths(op, "counts", counts, batch);
  for (const int64_t count : taken)
    if (count < 1 || count > tokens) fail(op, ": a count is ", count, "; 1 .. ", tokens, " is allowed");
  const Decoder d = read_decoder(op, weights, positions, cache, lengths, num_layers, num_heads, norm_first, activation,
                                 eps, batch, 0);
  int64_t seen = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = d.lengths[static_cast<size_t>(b)] + taken[static_cast<size_t>(b)];
    if (length > std::min(d.cache_length, d.most_positions))
      fail(op, ": sequence ", b, " would have ", length, " tokens; the cache has room for ", d.cache_length,
           ", and there are ", d.most_positions, " positions");
    seen = std::max(seen, length);
  }
  const Tensor all_ids = as_contiguous(ids);
  const int64_t* id = static_cast<const int64_t*>(data_of(all_ids));
  const int64_t width = d.sizes.width;
  Reading r{};
  const Scratch scratch(r.layout(nullptr, d, rows, seen));
  r.layout(scratch.data(), d, rows, seen);
  for (int64_t b = 0; b < batch; ++b) check_ids(op, d, id + b * tokens, taken[static_cast<size_t>(b)]);
  torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / tokens, t = row % tokens;
      if (t < taken[static_cast<size_t>(b)])
        embed(d, id[row], d.lengths[static_cast<size_t>(b)] + t, r.x + row * width);
      else
        std::fill_n(r.x + row * width, width, 0.0f);  // padding, which no token sees
    }
  });
  const auto normalize = [&](const Affine<Operand>& w, const float* from, int64_t count, float* to) {
    norm_forward<float>(DType::f32, {w.weight.vector, w.bias.vector}, eps, from, nullptr, count, width, to, nullptr,
                        r.mean, r.rstd);
  };
  for (int64_t l = 0; l < num_layers; ++l) {
    const BlockParameters<Operand>& w = d.parameters[static_cast<size_t>(l)];
    if (norm_first) normalize(w.norm1, r.x, rows, r.normed);
    const float* from = norm_first ? r.normed : r.x;
    run_matmuls(DType::f32, {layer(w.query, from, rows, r.query), layer(w.key, from, rows, r.key),
                             layer(w.value, from, rows, r.value)});
    attend(d, r, l, tokens, taken, seen);
    if (d.sizes.projected) {
      Matmul out = layer(w.out_proj, r.attended, rows, r.x);
      out.residual = r.x;
      run_matmuls(DType::f32, {out});
    } else {
      for (int64_t i = 0; i < rows * width; ++i) r.x[i] += r.attended[i];
    }
    normalize(norm_first ? w.norm2 : w.norm1, r.x, rows, r.normed);
    Matmul first = layer(w.linear1, r.normed, rows, r.hidden);
    first.activation = d.sizes.activation;
    // After the sum, a post-norm block adds to what it has normalised, a pre-norm block to the sum itself.
    Matmul second = layer(w.linear2, r.hidden, rows, norm_first ? r.x : r.normed);
    second.residual = second.out;
    run_matmuls(DType::f32, {first, second});
    if (!norm_first) normalize(w.norm2, r.normed, rows, r.x);
  }
  for (int64_t b = 0; b < batch; ++b)
    std::copy_n(r.x + (b * tokens + taken[static_cast<size_t>(b)] - 1) * width, width, r.last + b * width);
  if (norm_first) normalize({d.norm, d.norm_bias}, r.last, batch, r.last);
  const Tensor logits = empty({batch, d.classes}, ScalarType::Float);
  weight_dots(d.output.matrix, r.last, batch, d.output_bias.vector, Activation::none, nullptr,
              static_cast<float*>(data_of(logits)));
  return logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tinyllm, CPU, m) { m.impl("decoder_read", TORCH_BOX(&decoder_read)); }

}  // namespace tinyllm::cpu
