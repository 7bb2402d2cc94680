// Attention of few queries, as when one token is generated from a cache of keys and values ("Flash-Decoding", Dao,
// Haziza, Massa & Sizov 2023). The time is that of reading the keys and values, so the kernel reads them once and keeps
// many loads in flight:
// - All query heads that share a key head are rows of one product. It always has 16 rows, used or not, because the
//   tensor cores are not the limit. Without a causal mask, query i of a head is a row like any other.
// - Each warp streams its own keys by cp.async into three stages of 8 KB and waits for no other warp. A block has 64 KB
//   in flight while it computes, and two blocks fit a multiprocessor with enough memory. The share of an H200's
//   bandwidth per multiprocessor, 36 GB/s for a latency of about a microsecond, needs 40 KB in flight.
// - The keys of a sequence are split evenly over as many blocks as occupy all multiprocessors. The number of splits is
//   determined by sizes alone; the part of the keys that each takes follows, on the device, from the length of the
//   sequence, so that a short sequence in a long cache is split as finely.
//
// Partial results are combined by their log-sum-exp in a fixed order: those of the warps of a block in shared memory,
// those of several blocks by a second kernel.
#pragma once
#include "attention_tile.cuh"

namespace tinyllm::cuda {

constexpr int kDecodeRows = 16;

template <int D>
struct DecodeTile {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kKeys = 2048 / D, kStages = 3, kStage = 2 * kKeys * D;  // per warp
  static constexpr int kStep = kWarps * kKeys;  // the keys of a split are a multiple of this
  // In floats. The padding puts the eight rows that a warp writes into different banks.
  static constexpr int kSumRow = D + 8;
  static constexpr size_t kShared = sizeof(uint16_t) * kWarps * kStages * kStage;
  static_assert(kShared <= kSharedMemoryOfAllGpus);
  static_assert(sizeof(float) * kWarps * kDecodeRows * (kSumRow + 1) <= kShared);
};

// Returns the combined lse of N partial results, and the weight of each.
template <int N>
TINYLLM_DEVICE float combine_weights(const float (&lse)[N], float (&weights)[N]) {
  float largest = -kInfinity, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) largest = fmaxf(largest, lse[i]);
  const float shift = largest == -kInfinity ? 0.0f : largest;
#pragma unroll
  for (int i = 0; i < N; ++i) sum += weights[i] = fast_exp2(lse[i] - shift);
  const bool blind = sum == 0.0f;
  const float factor = blind ? 0.0f : 1.0f / sum;
#pragma unroll
  for (int i = 0; i < N; ++i) weights[i] *= factor;
  return blind ? -kInfinity : shift + log2f(sum);
}

// Writes four consecutive columns of a row of the group to `out`.
template <class T>
TINYLLM_DEVICE void store_out(const Attention& call, int batch, int kv_head, int row, int column,
                              const float (&sum)[4]) {
  T* const to = head_of<T>(call.out, batch, kv_head * call.group + row / call.queries) +
                row % call.queries * call.out.row + column;
  *reinterpret_cast<Vector<uint32_t, 2>*>(to) = {pack<T>(sum[0], sum[1]), pack<T>(sum[2], sum[3])};
}

// The index of a row of the group in lse.
TINYLLM_DEVICE int64_t lse_index(const Attention& call, int batch, int kv_head, int row) {
  const int64_t head = static_cast<int64_t>(batch) * call.heads + kv_head * call.group + row / call.queries;
  return head * call.queries + row % call.queries;
}

template <class T, int D>
__global__ void __launch_bounds__(DecodeTile<D>::kThreads)
    attention_decode_kernel(Attention call,  // query, out (B, H, T, D), key, value (B, Hkv, S, D)
                            int splits,
                            float* partial_out,    // (B, Hkv, splits, H / Hkv * T, D), if there are several splits
                            float* partial_lse) {  // (B, Hkv, splits, H / Hkv * T)
  using Tile = DecodeTile<D>;
  constexpr int kKeys = Tile::kKeys, kStages = Tile::kStages, kWarps = Tile::kWarps;
  const int kv_heads = call.heads / call.group, rows = call.group * call.queries;
  const int split = blockIdx.y, kv_head = blockIdx.z, batch = blockIdx.x;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int length = visible_keys(call, batch);
  const int part = (length + splits - 1) / splits, split_keys = (part + Tile::kStep - 1) / Tile::kStep * Tile::kStep;
  const int64_t begin = static_cast<int64_t>(split) * split_keys,
                end = begin + split_keys < length ? begin + split_keys : length;

  // The tiles of a warp are number warp, warp + kWarps, ... of those of the block.
  T* const stages = reinterpret_cast<T*>(shared_memory()) + warp * kStages * Tile::kStage;
  int64_t next = begin + warp * kKeys;
  const T* key = nullptr;
  const T* value = nullptr;
  if (next < end) {
    key = copy_source<D>(head_of<T>(call.key, batch, kv_head) + next * call.key.row, call.key.row, 0, lane);
    value = copy_source<D>(head_of<T>(call.value, batch, kv_head) + next * call.value.row, call.value.row, 0, lane);
  }
  auto fetch = [&](int stage) {
    if (next < end) {
      T* const to = stages + stage * Tile::kStage;
      const int left = static_cast<int>(end - next);
      cp_async_rows<D, kKeys, kWarp>(to, key, call.key.row, left, lane);
      cp_async_rows<D, kKeys, kWarp>(to + kKeys * D, value, call.value.row, left, lane);
      next += Tile::kStep;
      key += Tile::kStep * call.key.row;
      value += Tile::kStep * call.value.row;
    }
    cp_async_commit();
  };
  for (int stage = 0; stage < kStages - 1; ++stage) fetch(stage);

  // Read directly from global memory, because it is read only once.
  uint32_t query[1][D / 16][4];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + 8 * r;
    const T* const from = row < rows ? head_of<T>(call.query, batch, kv_head * call.group + row / call.queries) +
                                           row % call.queries * call.query.row + lane % 4 * 2
                                     : nullptr;
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
      query[0][i / 2][r + i % 2 * 2] = row < rows ? *reinterpret_cast<const uint32_t*>(from + 8 * i) : 0;
  }

  const float scale = call.scale * kLog2E;
  float sum[1][D / 8][4] = {};
  SoftmaxState states;
  int stage = 0;
  for (int64_t first = begin + warp * kKeys; first < end; first += Tile::kStep) {
    cp_async_wait<kStages - 2>();
    sync_warp();
    fetch(stage == 0 ? kStages - 1 : stage - 1);
    const T* const keys = stages + stage * Tile::kStage;
    stage = stage + 1 == kStages ? 0 : stage + 1;
    float scores[1][kKeys / 8][4] = {};
    multiply_abt<T, D, kKeys, 1>(scores, query, keys);
    if (first + kKeys > end) mask_scores<kKeys>(scores[0], 0, 0, static_cast<int>(end - first), false);
    float rescale[2];
    update_softmax<kKeys>(scores[0], states, scale, rescale);
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[0][j][i] *= rescale[i / 2];
    uint32_t weights[1][kKeys / 16][4];
    as_a_fragments<T, kKeys>(scores[0], weights[0]);
    multiply_ab<T, D, kKeys, 1>(sum, weights, keys + kKeys * D);
  }

  // The memory of the stages can be reused when all warps have finished.
  float* const sums = reinterpret_cast<float*>(shared_memory());
  float* const lses = sums + kWarps * kDecodeRows * Tile::kSumRow;
  float lse[2], factor[2];
  finish_softmax(states, scale, lse, factor);
  sync_block();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + 8 * r, at = warp * kDecodeRows + row;
    if (row < rows) {
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
        *reinterpret_cast<float2*>(sums + at * Tile::kSumRow + 8 * j + lane % 4 * 2) =
            make_float2(sum[0][j][2 * r] * factor[r], sum[0][j][2 * r + 1] * factor[r]);
      if (lane % 4 == 0) lses[at] = lse[r];
    }
  }
  sync_block();
  for (int i = threadIdx.x; i < rows * (D / 4); i += Tile::kThreads) {
    const int row = i / (D / 4), column = i % (D / 4) * 4;
    float warp_lse[kWarps], weights[kWarps], combined[4] = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) warp_lse[w] = lses[w * kDecodeRows + row];
    const float row_lse = combine_weights(warp_lse, weights);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float4 x = *reinterpret_cast<const float4*>(sums + (w * kDecodeRows + row) * Tile::kSumRow + column);
      combined[0] = fmaf(weights[w], x.x, combined[0]);
      combined[1] = fmaf(weights[w], x.y, combined[1]);
      combined[2] = fmaf(weights[w], x.z, combined[2]);
      combined[3] = fmaf(weights[w], x.w, combined[3]);
    }
    if (splits == 1) {
      store_out<T>(call, batch, kv_head, row, column, combined);
      if (column == 0) call.lse[lse_index(call, batch, kv_head, row)] = row_lse;
    } else {
      const int64_t at = ((static_cast<int64_t>(batch) * kv_heads + kv_head) * splits + split) * rows + row;
      *reinterpret_cast<float4*>(partial_out + at * D + column) =
          make_float4(combined[0], combined[1], combined[2], combined[3]);
      if (column == 0) partial_lse[at] = row_lse;
    }
  }
}

// Combines the splits of one row: each warp takes every kCombineWarps-th split, then the warps are combined.
constexpr int kCombineWarps = 4;

template <class T, int D>
__global__ void __launch_bounds__(kCombineWarps* kWarp)
    attention_decode_combine_kernel(Attention call,  // out (B, H, T, D), lse (B, H, T)
                                    int splits,
                                    const float* partial_out,    // (B, Hkv, splits, H / Hkv * T, D)
                                    const float* partial_lse) {  // (B, Hkv, splits, H / Hkv * T)
  constexpr int kColumns = D / kWarp;                            // per lane
  using Columns = Vector<float, kColumns>;
  const int kv_heads = call.heads / call.group, rows = call.group * call.queries;
  const int row = blockIdx.x % rows, all = blockIdx.x / rows, kv_head = all % kv_heads, batch = all / kv_heads;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first = static_cast<int64_t>(all) * splits * rows + row;

  float largest = -kInfinity, total = 0.0f;
  for (int s = lane; s < splits; s += kWarp)
    largest = fmaxf(largest, partial_lse[first + static_cast<int64_t>(s) * rows]);
  largest = warp_max(largest);
  const float shift = largest == -kInfinity ? 0.0f : largest;
  for (int s = lane; s < splits; s += kWarp)
    total += fast_exp2(partial_lse[first + static_cast<int64_t>(s) * rows] - shift);
  total = warp_sum(total);
  const bool blind = total == 0.0f;
  const float factor = blind ? 0.0f : 1.0f / total;

  float sum[kColumns] = {};
#pragma unroll 4
  for (int s = warp; s < splits; s += kCombineWarps) {
    const int64_t at = first + static_cast<int64_t>(s) * rows;
    const float weight = fast_exp2(partial_lse[at] - shift);
    const Columns x = *reinterpret_cast<const Columns*>(partial_out + at * D + lane * kColumns);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sum[i] = fmaf(weight, x.at[i], sum[i]);
  }
  float* const sums = reinterpret_cast<float*>(shared_memory());  // (kCombineWarps, D)
#pragma unroll
  for (int i = 0; i < kColumns; ++i) sums[warp * D + lane * kColumns + i] = sum[i];
  sync_block();
  const int column = threadIdx.x * 4;
  if (column >= D) return;
  float combined[4] = {};
#pragma unroll
  for (int w = 0; w < kCombineWarps; ++w)
#pragma unroll
    for (int i = 0; i < 4; ++i) combined[i] += sums[w * D + column + i];
#pragma unroll
  for (int i = 0; i < 4; ++i) combined[i] *= factor;
  store_out<T>(call, batch, kv_head, row, column, combined);
  if (column == 0) call.lse[lse_index(call, batch, kv_head, row)] = blind ? -kInfinity : shift + log2f(total);
}

}  // namespace tinyllm::cuda
