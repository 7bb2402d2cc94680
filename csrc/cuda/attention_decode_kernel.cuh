// Attention of few queries, as when one token is generated from a cache of keys and values ("Flash-Decoding", Dao,
// Haziza, Massa, Sizov 2023). The time is that of reading the keys and values, so everything serves to read them once
// and to have much on the way:
// - All the query heads that share a key head are rows of one product: 16 rows, whether in use or not, for tensor cores
//   have nothing else to do. Without causal, query i of a head is a row like any other.
// - Each warp streams its own keys by cp.async into three stages of 8 KB, waiting for nobody: 64 KB on the way in a
//   block while it computes, two blocks on a multiprocessor that has the memory. An H200's share of a multiprocessor,
//   36 GB/s for about a microsecond, is 40 KB.
// - A sequence's keys are split evenly over so many blocks as occupy all multiprocessors. How many is decided by sizes
//   alone, which part of the keys each takes by the sequence's own length, on the device: a short sequence in a long
//   cache is split as finely.
// Parts are joined by their log-sum-exp, in a fixed order: those of a block's warps in shared memory, those of blocks
// by a second kernel, where there are several.
#pragma once
#include "attention_tile.cuh"

namespace tinyllm::cuda {

constexpr int kDecodeRows = 16;

template <int D>
struct DecodeTile {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kKeys = 2048 / D, kStages = 3, kStage = 2 * kKeys * D;  // of each warp
  static constexpr int kStep = kWarps * kKeys;                                 // parts are multiples of these
  static constexpr int kSumRow = D + 8;  // floats, so that the eight rows that a warp writes lie in different banks
  static constexpr size_t kShared = sizeof(uint16_t) * kWarps * kStages * kStage;
  static_assert(kShared <= kSharedEverywhere);
  static_assert(sizeof(float) * kWarps * kDecodeRows * (kSumRow + 1) <= kShared);
};

// The lse of N parts together, and what the values of each are to be multiplied by.
template <int N>
TINYLLM_DEVICE float join_weights(const float (&lse)[N], float (&weights)[N]) {
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

// Four neighbouring numbers of row `row` (of the group's packed ones) of out.
template <class T>
TINYLLM_DEVICE void store_out(const Attention& call, int batch, int kv_head, int row, int column,
                              const float (&sum)[4]) {
  T* const to = head_of<T>(call.out, batch, kv_head * call.group + row / call.queries) +
                row % call.queries * call.out.row + column;
  *reinterpret_cast<Vector<uint32_t, 2>*>(to) = {pack<T>(sum[0], sum[1]), pack<T>(sum[2], sum[3])};
}

// A row's place in lse.
TINYLLM_DEVICE int64_t lse_place(const Attention& call, int batch, int kv_head, int row) {
  const int64_t head = static_cast<int64_t>(batch) * call.heads + kv_head * call.group + row / call.queries;
  return head * call.queries + row % call.queries;
}

template <class T, int D>
__global__ void __launch_bounds__(DecodeTile<D>::kThreads)
    attention_decode_kernel(Attention call,  // query, out (B, H, T, D), key, value (B, Hkv, S, D)
                            int splits,
                            float* part_out,    // (B, Hkv, splits, H / Hkv * T, D), if there are several splits
                            float* part_lse) {  // (B, Hkv, splits, H / Hkv * T)
  using Tile = DecodeTile<D>;
  constexpr int kKeys = Tile::kKeys, kStages = Tile::kStages, kWarps = Tile::kWarps;
  const int kv_heads = call.heads / call.group, rows = call.group * call.queries;
  const int split = blockIdx.y, kv_head = blockIdx.z, batch = blockIdx.x;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int length = visible_keys(call, batch);
  const int part = (length + splits - 1) / splits, step_part = (part + Tile::kStep - 1) / Tile::kStep * Tile::kStep;
  const int64_t begin = static_cast<int64_t>(split) * step_part,
                end = begin + step_part < length ? begin + step_part : length;

  // The warp's tiles are those number warp, warp + kWarps ... of the block's part.
  T* const stages = reinterpret_cast<T*>(shared_memory()) + warp * kStages * Tile::kStage;
  int64_t next = begin + warp * kKeys;
  const T* key = nullptr;
  const T* value = nullptr;
  if (next < end) {
    key = source_of<D>(head_of<T>(call.key, batch, kv_head) + next * call.key.row, call.key.row, 0, lane);
    value = source_of<D>(head_of<T>(call.value, batch, kv_head) + next * call.value.row, call.value.row, 0, lane);
  }
  auto fetch = [&](int stage) {
    if (next < end) {
      T* const to = stages + stage * Tile::kStage;
      const int left = static_cast<int>(end - next);
      copy_rows<D, kKeys, kWarp>(to, key, call.key.row, left, lane);
      copy_rows<D, kKeys, kWarp>(to + kKeys * D, value, call.value.row, left, lane);
      next += Tile::kStep;
      key += Tile::kStep * call.key.row;
      value += Tile::kStep * call.value.row;
    }
    commit_copies();
  };
  for (int stage = 0; stage < kStages - 1; ++stage) fetch(stage);

  // Straight from global memory: it is read once.
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
  RowStates states;
  int stage = 0;
  for (int64_t first = begin + warp * kKeys; first < end; first += Tile::kStep) {
    wait_copies<kStages - 2>();
    sync_warp();
    fetch(stage == 0 ? kStages - 1 : stage - 1);
    const T* const keys = stages + stage * Tile::kStage;
    stage = stage + 1 == kStages ? 0 : stage + 1;
    float scores[1][kKeys / 8][4] = {};
    multiply_rows<T, D, kKeys, 1>(scores, query, keys);
    if (first + kKeys > end) hide<kKeys>(scores[0], 0, 0, static_cast<int>(end - first), false);
    float rescale[2];
    update<kKeys>(scores[0], states, scale, rescale);
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[0][j][i] *= rescale[i / 2];
    uint32_t weights[1][kKeys / 16][4];
    as_factors<T, kKeys>(scores[0], weights[0]);
    multiply_weights<T, D, kKeys, 1>(sum, weights, keys + kKeys * D);
  }

  // The stages' memory is free when all warps are through.
  float* const sums = reinterpret_cast<float*>(shared_memory());
  float* const lses = sums + kWarps * kDecodeRows * Tile::kSumRow;
  float lse[2], factor[2];
  finish(states, scale, lse, factor);
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
    float warp_lse[kWarps], weights[kWarps], joined[4] = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) warp_lse[w] = lses[w * kDecodeRows + row];
    const float row_lse = join_weights(warp_lse, weights);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float4 x = *reinterpret_cast<const float4*>(sums + (w * kDecodeRows + row) * Tile::kSumRow + column);
      joined[0] = fmaf(weights[w], x.x, joined[0]);
      joined[1] = fmaf(weights[w], x.y, joined[1]);
      joined[2] = fmaf(weights[w], x.z, joined[2]);
      joined[3] = fmaf(weights[w], x.w, joined[3]);
    }
    if (splits == 1) {
      store_out<T>(call, batch, kv_head, row, column, joined);
      if (column == 0) call.lse[lse_place(call, batch, kv_head, row)] = row_lse;
    } else {
      const int64_t at = ((static_cast<int64_t>(batch) * kv_heads + kv_head) * splits + split) * rows + row;
      *reinterpret_cast<float4*>(part_out + at * D + column) = make_float4(joined[0], joined[1], joined[2], joined[3]);
      if (column == 0) part_lse[at] = row_lse;
    }
  }
}

// Joins the splits of one row: each warp every kWarps-th of them, then the warps.
constexpr int kJoinWarps = 4;

template <class T, int D>
__global__ void __launch_bounds__(kJoinWarps* kWarp)
    attention_decode_join_kernel(Attention call,  // out (B, H, T, D), lse (B, H, T)
                                 int splits,
                                 const float* part_out,    // (B, Hkv, splits, H / Hkv * T, D)
                                 const float* part_lse) {  // (B, Hkv, splits, H / Hkv * T)
  constexpr int kColumns = D / kWarp;                      // of each lane
  using Columns = Vector<float, kColumns>;
  const int kv_heads = call.heads / call.group, rows = call.group * call.queries;
  const int row = blockIdx.x % rows, all = blockIdx.x / rows, kv_head = all % kv_heads, batch = all / kv_heads;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first = static_cast<int64_t>(all) * splits * rows + row;

  float largest = -kInfinity, total = 0.0f;
  for (int s = lane; s < splits; s += kWarp) largest = fmaxf(largest, part_lse[first + static_cast<int64_t>(s) * rows]);
  largest = warp_max(largest);
  const float shift = largest == -kInfinity ? 0.0f : largest;
  for (int s = lane; s < splits; s += kWarp)
    total += fast_exp2(part_lse[first + static_cast<int64_t>(s) * rows] - shift);
  total = warp_sum(total);
  const bool blind = total == 0.0f;
  const float factor = blind ? 0.0f : 1.0f / total;

  float sum[kColumns] = {};
#pragma unroll 4
  for (int s = warp; s < splits; s += kJoinWarps) {
    const int64_t at = first + static_cast<int64_t>(s) * rows;
    const float weight = fast_exp2(part_lse[at] - shift);
    const Columns x = *reinterpret_cast<const Columns*>(part_out + at * D + lane * kColumns);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sum[i] = fmaf(weight, x.at[i], sum[i]);
  }
  float* const sums = reinterpret_cast<float*>(shared_memory());  // (kJoinWarps, D)
#pragma unroll
  for (int i = 0; i < kColumns; ++i) sums[warp * D + lane * kColumns + i] = sum[i];
  sync_block();
  const int column = threadIdx.x * 4;
  if (column >= D) return;
  float joined[4] = {};
#pragma unroll
  for (int w = 0; w < kJoinWarps; ++w)
#pragma unroll
    for (int i = 0; i < 4; ++i) joined[i] += sums[w * D + column + i];
#pragma unroll
  for (int i = 0; i < 4; ++i) joined[i] *= factor;
  store_out<T>(call, batch, kv_head, row, column, joined);
  if (column == 0) call.lse[lse_place(call, batch, kv_head, row)] = blind ? -kInfinity : shift + log2f(total);
}

}  // namespace tinyllm::cuda
