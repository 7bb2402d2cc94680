// Attention, backward, for compute capability 8.0 and later (Dao 2023, "FlashAttention-2"). With P = exp2(S - lse)
// recomputed from the scores S, and delta = rowsum(grad_out * out):
//
//   dV = P^T dO        dS = P (dO V^T - delta)        dQ = scale dS K        dK = scale dS^T Q
//
// Two kernels each recompute S and dO V^T. In one, a block keeps 128 keys and loops over the queries of all heads of
// their group; in the other, it keeps 128 queries and loops over the keys. Every sum is thus made by one warp in a
// fixed order: results are bitwise reproducible, without atomics and without a pass that adds partial sums. The price
// is 7 matmuls instead of 5, part of which the memory traffic of atomics would take back.
//
// Why it is fast:
// - The kernel for keys computes S^T and V dO^T, the one for queries S and dO V^T. These results are, rounded to 16
//   bits, the a operand of the next matmuls in the registers in which they are. Warps exchange nothing.
// - Tiles are copied by cp.async into two to four buffers with one barrier each, the next tile while one is computed
//   on. Together with what a block keeps they fit the 99 KB of 8.6, 8.9 and 12.0; at head_dim 64, twice.
// - Queries beyond the end and those that saw no key get an lse of infinity, so that their weights are 0 without a
//   test. In the kernel for keys, keys beyond the end are rows of the results, which are not stored or stored as 0;
//   only the diagonal is masked. The kernel for queries masks tiles that the diagonal or the end crosses.
#pragma once
#include "attention_tile.cuh"

namespace tinyllm::cuda {

// ---- delta

constexpr int kDeltaThreads = 128;

// Sums grad_out * out over columns; D / 8 lanes process a row, 16 bytes each.
template <class T, int D>
__global__ void __launch_bounds__(kDeltaThreads)
    attention_delta_kernel(Attention call) {  // out, grad_out (B, H, T, D), delta (B, H, T)
  constexpr int kLanes = D / 8;
  const int64_t rows = static_cast<int64_t>(call.batch) * call.heads * call.queries;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kDeltaThreads / kLanes) + threadIdx.x / kLanes;
  const int column = threadIdx.x % kLanes * 8;
  float sum = 0.0f;
  if (row < rows) {
    const int64_t all = row / call.queries, query = row % call.queries;
    const int batch = static_cast<int>(all / call.heads), head = static_cast<int>(all % call.heads);
    using Eight = Vector<T, 8>;
    const Eight out =
        *reinterpret_cast<const Eight*>(head_of<T>(call.out, batch, head) + query * call.out.row + column);
    const Eight grad =
        *reinterpret_cast<const Eight*>(head_of<T>(call.grad_out, batch, head) + query * call.grad_out.row + column);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(to_float(out.at[i]), to_float(grad.at[i]), sum);
  }
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
  if (row < rows && threadIdx.x % kLanes == 0) call.delta[row] = sum;
}

// The lse with which exp2(score - lse) is the weight, and 0 for a row that saw no key.
TINYLLM_DEVICE float lse_for_backward(float lse) { return lse == -kInfinity ? kInfinity : lse; }

// ---- Keys and values

template <int D>
struct KeysTile {
  static constexpr int kWarps = 8, kThreads = kWarps * kWarp, kKeys = 16 * kWarps, kQueries = 32;
  static constexpr int kPart = D == 64 ? 16 : 32;  // queries that are processed at a time
  static constexpr int kBlocks = D == 64 ? 2 : 1;  // on a multiprocessor
  static constexpr int kKept = 2 * kKeys * D, kStage = 2 * kQueries * D;
  static constexpr size_t kShared = sizeof(uint16_t) * (kKept + 2 * kStage) + sizeof(float) * 2 * 2 * kQueries;
  static_assert(kShared <= kSharedMemoryOfAllGpus);
};

template <class T, int D>
__global__ void __launch_bounds__(KeysTile<D>::kThreads, KeysTile<D>::kBlocks)
    attention_backward_keys_kernel(Attention call,  // query, grad_out (B, H, T, D), lse, delta (B, H, T),
                                                    // key, value, grad_key, grad_value (B, Hkv, S, D)
                                   int heads_at_once) {
  using Tile = KeysTile<D>;
  constexpr int kKeys = Tile::kKeys, kQueries = Tile::kQueries, kPart = Tile::kPart;
  T* const key_tile = reinterpret_cast<T*>(shared_memory());
  T* const value_tile = key_tile + kKeys * D;
  T* const stages = value_tile + kKeys * D;
  float* const statistics = reinterpret_cast<float*>(stages + 2 * Tile::kStage);  // lse and delta of each stage
  const int kv_heads = call.heads / call.group;
  const BlockTask task =
      block_task((call.keys + kKeys - 1) / kKeys, kv_heads, call.batch * kv_heads, heads_at_once, false);
  const int first = task.block * kKeys, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, thread = threadIdx.x;
  const int row = first + 16 * warp;  // the first key of the warp
  const int length = visible_keys(call, task.batch);
  // Queries before the first key do not see it.
  const int first_query = call.causal ? first : 0;
  const int last_head = first < length && first_query < call.queries ? (task.head + 1) * call.group : 0;

  // The next tile to be copied, among the tiles of queries of all heads of the group.
  int head = task.head * call.group, next = first_query;
  float statistic = 0.0f;  // of the tile being copied: the first threads have an lse, the next ones a delta
  // Starts the copy of the next tile and returns its first query, or -1 if there is no further tile.
  auto fetch = [&](int stage) {
    int query = -1;
    if (head < last_head) {
      query = next;
      T* const to = stages + stage * Tile::kStage;
      const int left = call.queries - query;
      cp_async_rows<D, kQueries, Tile::kThreads>(
          to, copy_source<D>(head_of<T>(call.query, task.batch, head), call.query.row, query, thread), call.query.row,
          left, thread);
      cp_async_rows<D, kQueries, Tile::kThreads>(
          to + kQueries * D,
          copy_source<D>(head_of<T>(call.grad_out, task.batch, head), call.grad_out.row, query, thread),
          call.grad_out.row, left, thread);
      if (thread < 2 * kQueries) {
        const int64_t rows = (static_cast<int64_t>(task.batch) * call.heads + head) * call.queries + query;
        const int i = thread % kQueries;
        const float* const from = thread < kQueries ? call.lse : call.delta;
        statistic = i < left ? from[rows + i] : thread < kQueries ? kInfinity : 0.0f;
      }
      next += kQueries;
      if (next >= call.queries) {
        next = first_query;
        ++head;
      }
    }
    cp_async_commit();
    return query;
  };
  if (last_head > 0) {
    const auto keep = [&](T* tile, const Heads& from) {
      cp_async_rows<D, kKeys, Tile::kThreads>(
          tile, copy_source<D>(head_of<T>(from, task.batch, task.head), from.row, first, thread), from.row,
          length - first, thread);
    };
    keep(key_tile, call.key);
    keep(value_tile, call.value);
  }

  const float scale = call.scale * kLog2E;
  T* const warp_keys = key_tile + 16 * warp * D;
  T* const warp_values = value_tile + 16 * warp * D;
  float grad_key[1][D / 8][4] = {}, grad_value[1][D / 8][4] = {};
  int stage = 0;
  for (int fetched = fetch(0); fetched >= 0; stage ^= 1) {
    const int query = fetched;
    const T* const queries = stages + stage * Tile::kStage;
    const T* const grads = queries + kQueries * D;
    float* const lse = statistics + stage * 2 * kQueries;
    const float* const delta = lse + kQueries;
    if (thread < 2 * kQueries) lse[thread] = thread < kQueries ? lse_for_backward(statistic) : statistic;
    cp_async_wait<0>();
    sync_block();
    fetched = fetch(stage ^ 1);
    if (row >= length) continue;
#pragma unroll 1
    for (int part = 0; part < kQueries; part += kPart) {
      // Skip queries that do not see any key of this warp.
      if (call.causal && query + part + kPart <= row) continue;
      const T* const part_queries = queries + part * D;
      const T* const part_grads = grads + part * D;
      float weights[1][kPart / 8][4] = {}, grad_scores[1][kPart / 8][4] = {};
      multiply_abt<T, D, kPart, 1>(weights, warp_keys, part_queries);
      multiply_abt<T, D, kPart, 1>(grad_scores, warp_values, part_grads);
      if (call.causal && query + part < row + 15) {
        // Rows are keys here, and columns queries.
#pragma unroll
        for (int j = 0; j < kPart / 8; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (row + lane / 4 + i / 2 * 8 > query + part + 8 * j + lane % 4 * 2 + i % 2) weights[0][j][i] = -kInfinity;
      }
#pragma unroll
      for (int j = 0; j < kPart / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = part + 8 * j + lane % 4 * 2 + i;
          const float column_lse = lse[column], column_delta = delta[column];
#pragma unroll
          for (int r = i; r < 4; r += 2) {
            weights[0][j][r] = fast_exp2(fmaf(weights[0][j][r], scale, -column_lse));
            grad_scores[0][j][r] = weights[0][j][r] * (grad_scores[0][j][r] - column_delta);
          }
        }
      uint32_t fragment[1][kPart / 16][4];
      as_a_fragments<T, kPart>(weights[0], fragment[0]);
      multiply_ab<T, D, kPart, 1>(grad_value, fragment, part_grads);
      as_a_fragments<T, kPart>(grad_scores[0], fragment[0]);
      multiply_ab<T, D, kPart, 1>(grad_key, fragment, part_queries);
    }
  }

  // The sums of a key beyond the visible ones are meaningless; its gradient is 0.
#pragma unroll
  for (int j = 0; j < D / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool visible = row + lane / 4 + i / 2 * 8 < length;
      grad_key[0][j][i] = visible ? grad_key[0][j][i] * call.scale : 0.0f;
      grad_value[0][j][i] = visible ? grad_value[0][j][i] : 0.0f;
    }
  // Only this warp reads these rows of the tiles of keys and values, and it no longer needs them.
  store_rows<T, D>(head_of<T>(call.grad_key, task.batch, task.head), call.grad_key.row, row, call.keys, grad_key[0],
                   warp_keys);
  store_rows<T, D>(head_of<T>(call.grad_value, task.batch, task.head), call.grad_value.row, row, call.keys,
                   grad_value[0], warp_values);
}

// ---- Queries

template <int D>
struct QueriesTile {
  static constexpr int kWarps = 8, kThreads = kWarps * kWarp, kRows = 16 * kWarps;
  static constexpr int kKeys = D == 64 ? 32 : 64, kStages = D == 64 ? 4 : 2;
  static constexpr int kBlocks = D == 64 ? 2 : 1;  // on a multiprocessor
  static constexpr int kStage = 2 * kKeys * D;
  static constexpr size_t kShared = sizeof(uint16_t) * kStages * kStage;
  static_assert(kShared <= kSharedMemoryOfAllGpus);
  static_assert(kStages * kStage == 2 * kRows * D, "the block's queries and gradients come through the same memory");
};

template <class T, int D>
__global__ void __launch_bounds__(QueriesTile<D>::kThreads, QueriesTile<D>::kBlocks)
    attention_backward_queries_kernel(Attention call,  // query, grad_out, grad_query (B, H, T, D),
                                                       // lse, delta (B, H, T), key, value (B, Hkv, S, D)
                                      int heads_at_once) {
  using Tile = QueriesTile<D>;
  constexpr int kKeys = Tile::kKeys, kStages = Tile::kStages;
  T* const stages = reinterpret_cast<T*>(shared_memory());
  const int blocks = (call.queries + Tile::kRows - 1) / Tile::kRows;
  const BlockTask task = block_task(blocks, call.heads, call.batch * call.heads, heads_at_once, call.causal);
  const int first = task.block * Tile::kRows, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int thread = threadIdx.x, row = first + 16 * warp;  // the first query of the warp
  const int length = visible_keys(call, task.batch);
  const int keys_of_block = call.causal ? min(length, first + Tile::kRows) : length;
  const int keys_of_warp = row >= call.queries ? 0 : call.causal ? min(length, row + 16) : length;
  const int keys_of_all_rows = call.causal ? min(length, row + 1) : length;
  const int tiles = (keys_of_block + kKeys - 1) / kKeys;

  uint32_t query[1][D / 16][4], grad[1][D / 16][4];
  float row_lse[2], row_delta[2];
  if (tiles > 0) {
    const auto keep = [&](T* tile, const Heads& from) {
      cp_async_rows<D, Tile::kRows, Tile::kThreads>(
          tile, copy_source<D>(head_of<T>(from, task.batch, task.head), from.row, first, thread), from.row,
          call.queries - first, thread);
    };
    keep(stages, call.query);
    keep(stages + Tile::kRows * D, call.grad_out);
    cp_async_commit();
    const int64_t rows = (static_cast<int64_t>(task.batch) * call.heads + task.head) * call.queries;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query_row = row + lane / 4 + 8 * r;
      const bool inside = query_row < call.queries;
      row_lse[r] = inside ? lse_for_backward(call.lse[rows + query_row]) : kInfinity;
      row_delta[r] = inside ? call.delta[rows + query_row] : 0.0f;
    }
    cp_async_wait<0>();
    sync_block();
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      load_a<D>(query[0][k], stages + 16 * warp * D, 0, k);
      load_a<D>(grad[0][k], stages + (Tile::kRows + 16 * warp) * D, 0, k);
    }
    sync_block();
  }

  const int kv_head = task.head / call.group;
  const T* key = copy_source<D>(head_of<T>(call.key, task.batch, kv_head), call.key.row, 0, thread);
  const T* value = copy_source<D>(head_of<T>(call.value, task.batch, kv_head), call.value.row, 0, thread);
  auto fetch = [&](int tile) {
    if (tile < tiles) {
      T* const to = stages + tile % kStages * Tile::kStage;
      cp_async_rows<D, kKeys, Tile::kThreads>(to, key, call.key.row, length - tile * kKeys, thread);
      cp_async_rows<D, kKeys, Tile::kThreads>(to + kKeys * D, value, call.value.row, length - tile * kKeys, thread);
    }
    key += kKeys * call.key.row;
    value += kKeys * call.value.row;
    cp_async_commit();
  };
  for (int tile = 0; tile < kStages - 1; ++tile) fetch(tile);

  const float scale = call.scale * kLog2E;
  float sum[1][D / 8][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<kStages - 2>();
    sync_block();
    fetch(tile + kStages - 1);
    const T* const keys = stages + tile % kStages * Tile::kStage;
    if (tile * kKeys >= keys_of_warp) continue;
    float scores[1][kKeys / 8][4] = {}, grad_scores[1][kKeys / 8][4] = {};
    multiply_abt<T, D, kKeys, 1>(scores, query, keys);
    multiply_abt<T, D, kKeys, 1>(grad_scores, grad, keys + kKeys * D);
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight = fast_exp2(fmaf(scores[0][j][i], scale, -row_lse[i / 2]));
        grad_scores[0][j][i] = weight * (grad_scores[0][j][i] - row_delta[i / 2]);
      }
    // The gradients of the scores are masked, not the weights: a hidden value may hold anything, and so may dP for it.
    if ((tile + 1) * kKeys > keys_of_all_rows)
      mask_scores<kKeys>(grad_scores[0], row, tile * kKeys, length, call.causal, 0.0f);
    uint32_t fragment[1][kKeys / 16][4];
    as_a_fragments<T, kKeys>(grad_scores[0], fragment[0]);
    // All tiles take one path: a second one for tiles off the diagonal would need too many registers.
    multiply_ab_causal<T, D, kKeys>(sum[0], fragment[0], call.causal ? row - tile * kKeys : kKeys,
                                    [&](uint32_t (&b)[4], int first_key, int n) { load_b<D>(b, keys, first_key, n); });
  }
#pragma unroll
  for (int j = 0; j < D / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[0][j][i] *= call.scale;
  sync_block();  // other warps may still read the last tile
  // Recomputed, because at head_dim 64 there is no register to keep it in.
  const BlockTask to = block_task((recomputed(call.queries) + Tile::kRows - 1) / Tile::kRows, call.heads,
                                  call.batch * call.heads, heads_at_once, call.causal);
  store_rows<T, D>(head_of<T>(call.grad_query, to.batch, to.head), call.grad_query.row, row, call.queries, sum[0],
                   stages + 16 * (recomputed(threadIdx.x) / kWarp) * D);
}

}  // namespace tinyllm::cuda
