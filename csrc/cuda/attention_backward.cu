// Launches of the backward attention kernels, in a file of their own so that it compiles in parallel to the others.
#include "attention_bwd_kernel.cuh"

namespace tinyllm::cuda {
namespace {

unsigned blocks_of(int rows, int rows_of_block, int64_t heads) {
  return static_cast<unsigned>((rows + rows_of_block - 1) / rows_of_block * heads);
}

template <class T, int D>
void delta(const Device& device, const Attention& call) {
  constexpr int kRows = kDeltaThreads / (D / 8);
  const int64_t rows = static_cast<int64_t>(call.batch) * call.heads * call.queries;
  const LaunchShape shape{dim3(static_cast<unsigned>((rows + kRows - 1) / kRows)), dim3(kDeltaThreads)};
  device.launch("attention_delta", attention_delta_kernel<T, D>, shape, call);
}

template <class T, int D>
void backward(const Device& device, const Attention& call) {
  const int64_t heads = static_cast<int64_t>(call.batch) * call.heads, kv_heads = heads / call.group;
  using Keys = KeysTile<D>;
  const LaunchShape of_keys{dim3(blocks_of(call.keys, Keys::kKeys, kv_heads)), dim3(Keys::kThreads), Keys::kShared};
  device.launch("attention_backward_keys", attention_backward_keys_kernel<T, D>, of_keys, call,
                heads_that_fit(int64_t{4} * call.queries * D * call.group, kv_heads));
  using Queries = QueriesTile<D>;
  const LaunchShape of_queries{dim3(blocks_of(call.queries, Queries::kRows, heads)), dim3(Queries::kThreads),
                               Queries::kShared};
  device.launch("attention_backward_queries", attention_backward_queries_kernel<T, D>, of_queries, call,
                heads_that_fit(int64_t{4} * call.keys * D / call.group, heads));
}

}  // namespace

void attention_delta(const Device& device, const Attention& call, ScalarType dtype) {
  if (dtype == ScalarType::BFloat16)
    call.head_dim == 64 ? delta<bf16, 64>(device, call) : delta<bf16, 128>(device, call);
  else
    call.head_dim == 64 ? delta<f16, 64>(device, call) : delta<f16, 128>(device, call);
}

void attention_backward(const Device& device, const Attention& call, ScalarType dtype) {
  if (dtype == ScalarType::BFloat16)
    call.head_dim == 64 ? backward<bf16, 64>(device, call) : backward<bf16, 128>(device, call);
  else
    call.head_dim == 64 ? backward<f16, 64>(device, call) : backward<f16, 128>(device, call);
}

}  // namespace tinyllm::cuda
