// The attention kernels for Hopper: which calls they support, and their launches.
#include <algorithm>
#include <limits>

#include "attention_sm90_bwd_kernel.cuh"
#include "attention_sm90_fwd_kernel.cuh"

// Only code for 9.0a has the instructions; code for 9.0 runs on the same chips without them.
#if defined(__CUDACC__) && !defined(TINYLLM_SM90A)

namespace tinyllm::cuda {

bool attention_forward_sm90(const Device&, const Attention&, ScalarType) { return false; }
bool attention_backward_sm90(const Device&, const Attention&, ScalarType) { return false; }

}  // namespace tinyllm::cuda

#else

namespace tinyllm::cuda {

bool make_tensor_map(const Heads& heads, bool is_bf16, int batch, int num_heads, int rows, int columns, int box_rows,
                     TensorMap& map) {
  const int64_t sizes[4] = {columns, rows, num_heads, batch};
  int64_t strides[3] = {heads.row, heads.head, heads.batch};
  for (int i = 0; i < 3; ++i) {
    if (sizes[i + 1] == 1) strides[i] = columns;  // never used, but it must be a valid stride
    // An expanded dimension has stride 0, which TMA does not support.
    constexpr int64_t kLimit = int64_t{1} << 39;
    if (strides[i] <= 0 || strides[i] % 8 != 0 || strides[i] >= kLimit) return false;
  }
  if (reinterpret_cast<uintptr_t>(heads.data) % 16 != 0) return false;
  map = make_tensor_map(heads.data, is_bf16, sizes, strides, box_rows);
  return true;
}

namespace {

unsigned blocks_for(int rows, int heads, int batch) {
  return static_cast<unsigned>((rows + kBlockRows - 1) / kBlockRows) * static_cast<unsigned>(heads) *
         static_cast<unsigned>(batch);
}

// The bytes of keys and values that a head of queries reads; a head of them serves all heads of its group.
int64_t bytes_of_keys(const Attention& a) { return int64_t{4} * a.keys * a.head_dim / a.group; }

template <class T, int D>
bool forward(const Device& device, const Attention& a, bool is_bf16) {
  using Shared = ForwardShared<D>;
  const int kv_heads = a.heads / a.group;
  TensorMap query, key, value;
  if (!make_tensor_map(a.query, is_bf16, a.batch, a.heads, a.queries, D, kBlockRows, query) ||
      !make_tensor_map(a.key, is_bf16, a.batch, kv_heads, a.keys, D, Shared::kColumns, key) ||
      !make_tensor_map(a.value, is_bf16, a.batch, kv_heads, a.keys, D, Shared::kColumns, value))
    return false;
  device.launch("attention", attention_forward_sm90_kernel<T, D>,
                {dim3(blocks_for(a.queries, a.heads, a.batch)), dim3(kHopperThreads), Shared::kBytes}, query, key,
                value, a, heads_that_fit(bytes_of_keys(a), int64_t{a.batch} * a.heads));
  return true;
}

// What a block keeps is copied in boxes of kBlockRows rows, and what it loops over in smaller ones.
template <class T, int D>
bool backward(const Device& device, const Attention& a, bool is_bf16) {
  using Keys = KeysTiles<D>;
  using Queries = QueriesTiles<D>;
  const int kv_heads = a.heads / a.group;
  const auto maps = [&](int query_rows, int key_rows, TensorMap(&found)[4]) {
    return make_tensor_map(a.query, is_bf16, a.batch, a.heads, a.queries, D, query_rows, found[0]) &&
           make_tensor_map(a.key, is_bf16, a.batch, kv_heads, a.keys, D, key_rows, found[1]) &&
           make_tensor_map(a.value, is_bf16, a.batch, kv_heads, a.keys, D, key_rows, found[2]) &&
           make_tensor_map(a.grad_out, is_bf16, a.batch, a.heads, a.queries, D, query_rows, found[3]);
  };
  TensorMap by_keys[4], by_queries[4];
  if (!maps(Keys::kRows, kBlockRows, by_keys) || !maps(kBlockRows, Queries::kColumns, by_queries)) return false;
  device.launch("attention_bwd", attention_keys_sm90_kernel<T, D>,
                {dim3(blocks_for(a.keys, kv_heads, a.batch)), dim3(kHopperThreads), Keys::Shared::kBytes}, by_keys[0],
                by_keys[1], by_keys[2], by_keys[3], a,
                heads_that_fit(int64_t{4} * a.queries * D * a.group, int64_t{a.batch} * kv_heads));
  device.launch("attention_bwd", attention_queries_sm90_kernel<T, D>,
                {dim3(blocks_for(a.queries, a.heads, a.batch)), dim3(kHopperThreads), Queries::Shared::kBytes},
                by_queries[0], by_queries[1], by_queries[2], by_queries[3], a,
                heads_that_fit(bytes_of_keys(a), int64_t{a.batch} * a.heads));
  return true;
}

// Whether an int can number all blocks.
bool countable(const Attention& a) {
  const int64_t rows = std::max(a.queries, a.keys);
  return (rows + kBlockRows - 1) / kBlockRows * a.heads * a.batch <= std::numeric_limits<int32_t>::max();
}

}  // namespace

bool attention_forward_sm90(const Device& device, const Attention& call, ScalarType dtype) {
  const bool is_bf16 = dtype == ScalarType::BFloat16;
  if (!countable(call)) return false;
  if (call.head_dim == 64)
    return is_bf16 ? forward<bf16, 64>(device, call, true) : forward<f16, 64>(device, call, false);
  if (call.head_dim == 128)
    return is_bf16 ? forward<bf16, 128>(device, call, true) : forward<f16, 128>(device, call, false);
  return false;
}

bool attention_backward_sm90(const Device& device, const Attention& call, ScalarType dtype) {
  const bool is_bf16 = dtype == ScalarType::BFloat16;
  if (!countable(call)) return false;
  if (call.head_dim == 64)
    return is_bf16 ? backward<bf16, 64>(device, call, true) : backward<f16, 64>(device, call, false);
  if (call.head_dim == 128)
    return is_bf16 ? backward<bf16, 128>(device, call, true) : backward<f16, 128>(device, call, false);
  return false;
}

}  // namespace tinyllm::cuda

#endif
