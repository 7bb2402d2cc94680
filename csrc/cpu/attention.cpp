// scaled_dot_product_attention on the CPU: checks, allocation, and distribution over threads. The arithmetic is in
// attention_{fwd,decode,bwd}_kernel.h.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "attention.h"
#include "random.h"
#include "scratch.h"
#include "torch_side.h"

namespace tinyllm::cpu {
namespace {

constexpr int64_t kMaxHeadDim = 1024;
// This many tasks of backward keep the threads of most machines busy.
constexpr int64_t kBackwardItems = 32;
// Up to this many bytes, the memory for the sums of dQ is not worth saving.
constexpr int64_t kSmallSums = int64_t{16} << 20;

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

// Converts a tensor (B) of int32 or int64 to numbers of keys, 0 ... a.keys.
std::vector<int64_t> key_counts(const char* op, const char* name, const Tensor& of_sequences, const Tensor& query,
                                const Attention& a) {
  check_device(op, name, of_sequences, query);
  check_shape(op, name, of_sequences, {a.batch});
  const Tensor t = as_contiguous(of_sequences);
  std::vector<int64_t> counts(static_cast<size_t>(a.batch));
  if (t.scalar_type() == ScalarType::Int)
    std::copy_n(static_cast<const int32_t*>(data_of(t)), a.batch, counts.begin());
  else if (t.scalar_type() == ScalarType::Long)
    std::copy_n(static_cast<const int64_t*>(data_of(t)), a.batch, counts.begin());
  else
    fail(op, ": ", name, " has dtype ", torch::headeronly::toString(t.scalar_type()), "; int32 or int64 is needed");
  for (int64_t& count : counts) count = std::clamp<int64_t>(count, 0, a.keys);
  return counts;
}

// The numbers of each sequence that `a` points to; they must outlive the kernels.
struct Sequences {
  std::vector<int64_t> key_lengths, causal_offset;

  Sequences(const char* op, const OptionalTensor& lengths, const OptionalTensor& offset, const Tensor& query,
            Attention& a) {
    if (lengths) {
      key_lengths = key_counts(op, "key_lengths", *lengths, query, a);
      a.key_lengths = key_lengths.data();
    }
    if (offset) {
      if (!a.causal) fail(op, ": causal_offset is given; it needs is_causal");
      causal_offset = key_counts(op, "causal_offset", *offset, query, a);
      a.causal_offset = causal_offset.data();
    }
  }
};

// Sets lse and, behind it in the same tensor if there is an additive mask, lse_rest.
void set_lse(Attention& a, const Tensor& lse) {
  a.lse = data_of(lse);
  const int64_t bytes = a.batch * a.heads * a.queries * static_cast<int64_t>(lse.element_size());
  a.lse_rest = a.mask_kind == MaskKind::additive ? static_cast<char*>(a.lse) + bytes : nullptr;
}

std::tuple<Tensor, Tensor> attention_fwd(Tensor query, Tensor key, Tensor value, OptionalTensor attn_mask,
                                         bool is_causal, double scale, double dropout_p, OptionalTensor rng,
                                         OptionalTensor key_lengths, OptionalTensor causal_offset) {
  Attention a = arguments("attention", query, key, value, attn_mask, is_causal, scale, dropout_p, rng);
  const Sequences sequences("attention", key_lengths, causal_offset, query, a);
  const Tensor out = empty_heads(query, a.batch, a.heads, a.queries, a.value_dim);
  std::vector<int64_t> lse_shape{a.batch, a.heads, a.queries};
  if (a.mask_kind == MaskKind::additive) lse_shape.insert(lse_shape.begin(), 2);
  const Tensor lse = empty(lse_shape, compute_dtype(query.scalar_type()));
  a.out = strided(out);
  set_lse(a, lse);
  attention_forward(dtype_of("attention", query), a);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(Tensor grad, Tensor query, Tensor key, Tensor value,
                                                 OptionalTensor attn_mask, Tensor out, Tensor lse, bool is_causal,
                                                 double scale, double dropout_p, OptionalTensor rng,
                                                 OptionalTensor key_lengths, OptionalTensor causal_offset) {
  const char* op = "attention_bwd";
  Attention a = arguments(op, query, key, value, attn_mask, is_causal, scale, dropout_p, rng);
  const Sequences sequences(op, key_lengths, causal_offset, query, a);
  for (const auto& [name, t] : {std::pair{"grad", &grad}, std::pair{"out", &out}}) {
    check_device(op, name, *t, query);
    check_dtype(op, name, *t, query.scalar_type());
    check_shape(op, name, *t, {a.batch, a.heads, a.queries, a.value_dim});
  }
  check_device(op, "lse", lse, query);
  check_dtype(op, "lse", lse, compute_dtype(query.scalar_type()));
  if (a.mask_kind == MaskKind::additive)
    check_shape(op, "lse", lse, {2, a.batch, a.heads, a.queries});
  else
    check_shape(op, "lse", lse, {a.batch, a.heads, a.queries});
  if (!lse.is_contiguous()) fail(op, ": lse must be contiguous");
  const Tensor grad_query = empty_heads(query, a.batch, a.heads, a.queries, a.head_dim);
  const Tensor grad_key = empty_heads(query, a.batch, a.kv_heads, a.keys, a.head_dim);
  const Tensor grad_value = empty_heads(query, a.batch, a.kv_heads, a.keys, a.value_dim);
  a.out = strided(out);
  set_lse(a, lse);
  a.grad_out = strided(grad);
  a.grad_query = strided(grad_query);
  a.grad_key = strided(grad_key);
  a.grad_value = strided(grad_value);
  attention_backward(dtype_of(op, query), a);
  return {grad_query, grad_key, grad_value};
}

// Allocates the partial results of the ranges: for each row its output, then its maximum and sum.
std::unique_ptr<char[]> new_partials(DType dtype, Attention& a) {
  constexpr int64_t line = 64;
  const int64_t vector = kernels().vector[dtype];
  a.partial_row = (a.value_dim + vector - 1) / vector * vector + std::max<int64_t>(vector, 2);
  const int64_t bytes = a.batch * a.heads * a.ranges * a.queries * a.partial_row * compute_size(dtype);
  std::unique_ptr<char[]> memory(new char[bytes + line]);
  a.partials = memory.get() + line - reinterpret_cast<uintptr_t>(memory.get()) % line;
  return memory;
}

// Whether keys and values are used so few times that packing them would not pay. A function of shapes alone: causal
// queries without an offset see as few keys as there are queries.
bool is_decoding(const Attention& a) {
  return a.keys >= 64 && a.queries > 0 && !(a.causal && a.causal_offset == nullptr) && a.key.column == 1 &&
         a.value.column == 1 && a.heads / std::max<int64_t>(a.kv_heads, 1) * a.queries <= 8;
}

void attention_decode(DType dtype, Attention a) {
  a.range_keys = 512;
  a.ranges = (a.keys + a.range_keys - 1) / a.range_keys;
  const std::unique_ptr<char[]> partials = new_partials(dtype, a);
  const Kernels& table = kernels();
  const int64_t heads = a.batch * a.kv_heads;
  parallel_items(heads * a.ranges, [&](int64_t item) {
    const int64_t head = item / a.ranges;
    table.attention_decode[dtype](a, head / a.kv_heads, head % a.kv_heads, item % a.ranges);
  });
  // This takes less time than waking the threads again.
  for (int64_t head = 0; head < heads; ++head)
    table.attention_decode_combine[dtype](a, head / a.kv_heads, head % a.kv_heads);
}

}  // namespace

void attention_forward(DType dtype, const Attention& a) {
  is_decoding(a) ? attention_decode(dtype, a) : attention_in_blocks(dtype, a);
}

void attention_in_blocks(DType dtype, Attention a) {
  const Kernels& table = kernels();
  const auto kernel = table.attention_fwd[dtype];
  // A head is one item if there are enough heads for all threads; otherwise its queries are split. The splits share the
  // head's packed keys and values, unless that would take more memory than a copy for each thread, or a mask may hide
  // most keys from a split. Each split packs those that it sees then, so it has more queries.
  const int64_t threads = torch::stable::get_num_threads(), wanted = 4 * threads;
  const int64_t heads = a.batch * a.heads, kv_heads = a.batch * a.kv_heads;
  const bool shares = kv_heads <= threads && a.mask_kind != MaskKind::boolean;
  int64_t splits = heads >= wanted ? 1 : (wanted + heads - 1) / std::max<int64_t>(heads, 1);
  splits = std::clamp<int64_t>(splits, 1, std::max<int64_t>(1, a.queries / (shares ? 128 : 256)));
  // A split consists of whole blocks of queries.
  const int64_t split_queries = ((a.queries + splits - 1) / splits + 63) / 64 * 64;
  if (a.queries > 0) splits = (a.queries + split_queries - 1) / split_queries;
  const auto seen = [&](int64_t b) { return visible(a, b, a.queries - 1, 0, keys_of(a, b)); };  // by the last query
  if (shares && splits > 1) {
    for (int64_t b = 0; b < a.batch; ++b) a.packed_keys = std::max(a.packed_keys, seen(b));
    a.packed_head = table.attention_packed_head[dtype](a);
  }
  const Scratch packed(static_cast<size_t>(kv_heads * a.packed_head));
  if (a.packed_head > 0) {
    a.packed = packed.data();
    const int64_t chunks = (a.packed_keys + kPackedKeys - 1) / kPackedKeys;
    parallel_items(kv_heads * chunks, [&](int64_t item) {
      const int64_t head = item / chunks, b = head / a.kv_heads, begin = item % chunks * kPackedKeys;
      const int64_t end = std::min(seen(b), begin + kPackedKeys);
      if (begin < end) table.attention_pack[dtype](a, b, head % a.kv_heads, begin, end);
    });
  }
  parallel_items(a.queries == 0 ? 0 : heads * splits, [&](int64_t item) {
    // The last split of a causal head takes longest, so it goes first.
    const int64_t begin = (splits - 1 - item % splits) * split_queries, head = item / splits;
    kernel(a, head / a.heads, head % a.heads, begin, std::min(a.queries, begin + split_queries));
  });
}

// dQ is accumulated in the compute type: in grad_query itself if that has this type and rows of whole vectors,
// otherwise in extra memory. For 16-bit elements that would be twice the size of grad_query, so the number of heads
// processed at once is limited: the extra memory of long sequences stays within a fifth of the size of all gradients,
// unless a single head takes more.
void attention_backward(DType dtype, const Attention& arguments) {
  Attention a = arguments;
  const Kernels& table = kernels();
  const int64_t heads = a.batch * a.kv_heads, group = a.heads / std::max<int64_t>(1, a.kv_heads);
  const int64_t block = bwd_key_block(a), vector = table.vector[dtype];
  const int64_t element = compute_size(dtype);
  const bool in_place = element_size(dtype) == element && a.grad_query.column == 1 && a.head_dim % vector == 0;
  a.query_sums = a.grad_query;
  int64_t heads_at_once = std::max<int64_t>(1, heads);
  const int64_t row = (a.head_dim + vector - 1) / vector * vector, head_bytes = group * a.queries * row * element;
  if (!in_place && heads * head_bytes > kSmallSums) {
    const int64_t gradients = (a.heads * a.queries * a.head_dim + a.kv_heads * a.keys * (a.head_dim + a.value_dim)) *
                              a.batch * element_size(dtype);
    heads_at_once = std::clamp<int64_t>(gradients / 5 / head_bytes, 1, heads_at_once);
  }
  // With many heads, all keys of a head form one range; otherwise a range is one block. The number of threads must not
  // matter here, because the ranges determine the order in which dQ is summed.
  a.range_keys = heads_at_once >= kBackwardItems ? std::max(a.keys, block) : block;
  a.ranges = std::max<int64_t>(1, (a.keys + a.range_keys - 1) / a.range_keys);
  const Scratch sums(in_place ? 0 : static_cast<size_t>(heads_at_once * head_bytes));
  const Scratch delta(static_cast<size_t>(a.batch * a.heads * a.queries * element));
  a.delta = delta.data();
  std::vector<std::atomic<int64_t>> turns(static_cast<size_t>(a.ranges > 1 ? heads * a.ranges : 0));
  if (a.ranges > 1) a.turns = turns.data();
  for (int64_t first = 0; first < heads; first += heads_at_once) {
    const int64_t count = std::min(heads_at_once, heads - first);
    if (!in_place) {
      const int64_t head = a.queries * row;  // elements of a query head; the memory begins with the head `first`
      a.query_sums = {sums.data() - first * group * head * element, a.heads * head, head, row, 1};
    }
    parallel_items(count * a.ranges, [&](int64_t item) {
      // The first range of a causal head takes longest, so the first ranges of all heads go first.
      const int64_t head = first + item % count, range = item / count;
      try {
        table.attention_bwd[dtype](a, head / a.kv_heads, head % a.kv_heads, range);
      } catch (...) {
        if (a.turns != nullptr) a.turns[head * a.ranges + range] = kNoTurn;
        throw;
      }
    });
  }
}

STABLE_TORCH_LIBRARY_IMPL(tinyllm, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}

}  // namespace tinyllm::cpu
