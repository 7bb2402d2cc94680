// Launches of the attention kernels for few queries, in a file of their own so that it compiles in parallel to the
// others.
#include "attention_decode_kernel.cuh"

namespace tinyllm::cuda {
namespace {

// The number of blocks that share the keys of a head: the smallest that keeps the multiprocessors, with two blocks
// each, busy for 9 tenths of the time, or else the best one. A warp gets at least two tiles. A block gets whole steps:
// among numbers with the same longest block the smallest is chosen, with which no block is without work. The choice
// depends on sizes alone, so that it is the same for all lengths.
template <int D>
int splits_of(int64_t heads, int keys, int multiprocessors) {
  const int64_t at_once = 2 * int64_t{multiprocessors};
  const int64_t most = std::clamp<int64_t>(keys / (2 * DecodeTile<D>::kStep), 1, at_once);
  const int64_t steps = std::max<int64_t>(1, (int64_t{keys} + DecodeTile<D>::kStep - 1) / DecodeTile<D>::kStep);
  double best = 0.0;
  int64_t chosen = 1;
  for (int64_t splits = 1; splits <= most && best < 0.9; ++splits) {
    const int64_t steps_of_one = (steps + splits - 1) / splits, rounds = (heads * splits + at_once - 1) / at_once;
    if ((steps + steps_of_one - 1) / steps_of_one != splits) continue;
    const double busy = static_cast<double>(heads * steps) / static_cast<double>(rounds * at_once * steps_of_one);
    if (busy > best) {
      best = busy;
      chosen = splits;
    }
  }
  return static_cast<int>(chosen);
}

template <class T, int D>
void launch_decode(const Device& device, const Attention& call) {
  using Tile = DecodeTile<D>;
  const int64_t kv_heads = call.heads / call.group, heads = call.batch * kv_heads, rows = call.group * call.queries;
  const int splits = splits_of<D>(heads, call.keys, device.multiprocessors());
  float *partial_out = nullptr, *partial_lse = nullptr;
  std::optional<Tensor> parts;
  if (splits > 1) {
    const int64_t count = heads * splits * rows;
    const std::vector<int64_t> sizes{count * (D + 1)};
    parts = device.empty(sizes, ScalarType::Float);
    partial_out = static_cast<float*>(data_of(*parts));
    partial_lse = partial_out + count * D;
  }
  const LaunchShape shape{
      dim3(static_cast<unsigned>(call.batch), static_cast<unsigned>(splits), static_cast<unsigned>(kv_heads)),
      dim3(Tile::kThreads), Tile::kShared};
  device.launch("attention_decode", attention_decode_kernel<T, D>, shape, call, splits, partial_out, partial_lse);
  if (splits == 1) return;
  const LaunchShape combine{dim3(static_cast<unsigned>(heads * rows)), dim3(kCombineWarps * kWarp),
                            sizeof(float) * kCombineWarps * D};
  device.launch("attention_decode_combine", attention_decode_combine_kernel<T, D>, combine, call, splits, partial_out,
                partial_lse);
}

}  // namespace

bool attention_decodes(const Attention& call) {
  constexpr int kMostHeads = 65535;  // the limit of the grid in its z dimension
  return !call.causal && int64_t{call.group} * call.queries <= kDecodeRows && call.heads / call.group <= kMostHeads;
}

void attention_decode(const Device& device, const Attention& call, ScalarType dtype) {
  if (dtype == ScalarType::BFloat16)
    call.head_dim == 64 ? launch_decode<bf16, 64>(device, call) : launch_decode<bf16, 128>(device, call);
  else
    call.head_dim == 64 ? launch_decode<f16, 64>(device, call) : launch_decode<f16, 128>(device, call);
}

}  // namespace tinyllm::cuda
