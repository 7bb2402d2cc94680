// Attention of few queries: launches. A file of its own, so that it compiles beside the others.
#include "attention_decode_kernel.cuh"

namespace tinyllm::cuda {
namespace {

// How many blocks share a head's keys: the fewest that keep the multiprocessors, of two blocks each, busy for 9 tenths
// of the time, or the best number where none does; none with less to do than two tiles a warp. A block has whole steps:
// of numbers that give the longest one the same, the smallest, with which no block is left without any. By sizes alone:
// the same number for whatever lengths.
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
void decode(const Device& device, const Attention& call) {
  using Tile = DecodeTile<D>;
  const int64_t kv_heads = call.heads / call.group, heads = call.batch * kv_heads, rows = call.group * call.queries;
  const int splits = splits_of<D>(heads, call.keys, device.multiprocessors());
  float *part_out = nullptr, *part_lse = nullptr;
  std::optional<Tensor> parts;
  if (splits > 1) {
    const int64_t count = heads * splits * rows;
    const std::vector<int64_t> sizes{count * (D + 1)};
    parts = device.empty(sizes, ScalarType::Float);
    part_out = static_cast<float*>(data_of(*parts));
    part_lse = part_out + count * D;
  }
  const LaunchShape shape{
      dim3(static_cast<unsigned>(call.batch), static_cast<unsigned>(splits), static_cast<unsigned>(kv_heads)),
      dim3(Tile::kThreads), Tile::kShared};
  device.launch("attention_decode", attention_decode_kernel<T, D>, shape, call, splits, part_out, part_lse);
  if (splits == 1) return;
  const LaunchShape join{dim3(static_cast<unsigned>(heads * rows)), dim3(kJoinWarps * kWarp),
                         sizeof(float) * kJoinWarps * D};
  device.launch("attention_decode_join", attention_decode_join_kernel<T, D>, join, call, splits, part_out, part_lse);
}

}  // namespace

bool attention_decodes(const Attention& call) {
  constexpr int kMostHeads = 65535;  // that a grid has room for
  return !call.causal && int64_t{call.group} * call.queries <= kDecodeRows && call.heads / call.group <= kMostHeads;
}

void attention_decode(const Device& device, const Attention& call, ScalarType dtype) {
  if (dtype == ScalarType::BFloat16)
    call.head_dim == 64 ? decode<bf16, 64>(device, call) : decode<bf16, 128>(device, call);
  else
    call.head_dim == 64 ? decode<f16, 64>(device, call) : decode<f16, 128>(device, call);
}

}  // namespace tinyllm::cuda
