// Launches of the forward attention kernel, in a file of their own so that it compiles in parallel to the others.
#include "attention_fwd_kernel.cuh"

namespace tinyllm::cuda {
namespace {

template <class T, int D>
void forward(const Device& device, const Attention& call) {
  using Tile = ForwardTile<D>;
  const int64_t heads = static_cast<int64_t>(call.batch) * call.heads;
  const int64_t blocks = (call.queries + Tile::kRows - 1) / Tile::kRows * heads;
  // A head of keys serves all heads of its group.
  const int64_t shared_bytes = int64_t{4} * call.keys * D / call.group;
  const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(Tile::kThreads), Tile::kShared};
  device.launch("attention_forward", attention_forward_kernel<T, D>, shape, call, heads_that_fit(shared_bytes, heads));
}

}  // namespace

void attention_forward(const Device& device, const Attention& call, ScalarType dtype) {
  if (dtype == ScalarType::BFloat16)
    call.head_dim == 64 ? forward<bf16, 64>(device, call) : forward<bf16, 128>(device, call);
  else
    call.head_dim == 64 ? forward<f16, 64>(device, call) : forward<f16, 128>(device, call);
}

}  // namespace tinyllm::cuda
