// Attention backward on Hopper, in two kernels (Dao 2023, "FlashAttention-2") with the block structure of forward. With
// the weights P = softmax, dP = grad_out value^T and dS = P (dP - delta):
//
//     grad_value = P^T grad_out        grad_key = scale dS^T query        grad_query = scale dS key
//
// One kernel keeps a block of keys and loops over the queries. Its scores are transposed (key query^T), so that P^T and
// dS^T are in the registers that the matmuls with grad_out and query take as their a operand, and never go to shared
// memory. The other kernel keeps a block of queries and loops over the keys likewise. That is seven matmuls for each
// pair of tiles instead of five; in return no two blocks add to the same sum, so there are no atomics, no float32 copy
// of grad_query, and results are bitwise reproducible.
#pragma once
#include "attention_sm90.cuh"

namespace tinyllm::cuda {

// The shared memory of a block: the two tiles that it keeps, and stages of the two tiles that it loops over, with the
// statistics of their rows.
template <int D, int kRows, int kStages>
struct BackwardShared {
  using Own = Tile<kBlockRows, D>;
  using Other = Tile<kRows, D>;
  static constexpr uint32_t kStageBytes = 2 * Other::kBytes;
  static constexpr size_t kTiles = 2 * Own::kBytes + kStages * kStageBytes;
  static constexpr size_t kStatistics = kStages * 2 * kRows * sizeof(float);
  static constexpr size_t kBytes = kTiles + kStatistics + (1 + 2 * kStages) * sizeof(Barrier);

  unsigned char* memory;

  TINYLLM_DEVICE Own own(int i) const { return {memory + i * Own::kBytes}; }
  TINYLLM_DEVICE Other other(int stage, int i) const {
    return {memory + 2 * Own::kBytes + stage * kStageBytes + i * Other::kBytes};
  }
  TINYLLM_DEVICE float* lse(int stage) const { return reinterpret_cast<float*>(memory + kTiles) + stage * 2 * kRows; }
  TINYLLM_DEVICE float* delta(int stage) const { return lse(stage) + kRows; }
  TINYLLM_DEVICE Barrier* own_full() const { return reinterpret_cast<Barrier*>(memory + kTiles + kStatistics); }
  TINYLLM_DEVICE Barrier* full(int stage) const { return own_full() + 1 + stage; }
  TINYLLM_DEVICE Barrier* empty(int stage) const { return full(kStages + stage); }

  // Called by one thread. `arrivals` is the number of arrivals that make a stage full.
  TINYLLM_DEVICE void init(uint32_t arrivals) const {
    barrier_init(own_full(), 1);
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(full(stage), arrivals);
      barrier_init(empty(stage), kConsumerWarps);
    }
    fence_barrier_init();
  }
};

// The lse from which the weights of a row are recomputed: infinity, and thus weights of 0, for a row beyond the end or
// one that saw no key.
TINYLLM_DEVICE float lse_for_backward(const float* lse, int64_t at, bool inside) {
  const float value = inside ? lse[at] : kInfinity;
  return value == -kInfinity ? kInfinity : value;
}

template <int D>
struct KeysTiles {
  static constexpr int kRows = 64, kStages = D == 64 ? 3 : 2;
  using Shared = BackwardShared<D, kRows, kStages>;
};

template <class T, int D>
__global__ void __launch_bounds__(kHopperThreads, 1)
    attention_keys_sm90_kernel(const __grid_constant__ TensorMap query_map,  // (B, H, queries, D)
                               const __grid_constant__ TensorMap key_map,    // (B, H / group, keys, D)
                               const __grid_constant__ TensorMap value_map,  // likewise
                               const __grid_constant__ TensorMap grad_map,   // (B, H, queries, D), of grad_out
                               const __grid_constant__ Attention a, int heads_at_once) {
  using Tiles = KeysTiles<D>;
  constexpr int kRows = Tiles::kRows, kStages = Tiles::kStages;
  const typename Tiles::Shared shared{shared_memory()};
  const int warp = warp_number(), consumer = warp / 4 - 1;  // -1 is the producer

  const int blocks = (a.keys + kBlockRows - 1) / kBlockRows, kv_heads = a.heads / a.group;
  const BlockTask task = block_task(blocks, kv_heads, a.batch * kv_heads, heads_at_once, false);
  const int first_key = task.block * kBlockRows, kv_head = task.head, batch = task.batch;
  const int visible = visible_keys(a, batch);
  // With a causal mask, earlier queries see none of these keys.
  const int first_tile = a.causal ? first_key / kRows : 0;
  const int end_tile = first_key < visible ? (a.queries + kRows - 1) / kRows : 0;

  if (threadIdx.x == 0) shared.init(2);
  sync_block();

  if (consumer < 0) {
    decrease_registers<kProducerRegisters>();
    if (first_tile < end_tile && warp < 2) {
      if (threadIdx.x == 0) {
        for (const TensorMap* map : {&query_map, &key_map, &value_map, &grad_map}) prefetch_tensor_map(*map);
        barrier_arrive_expect_bytes(shared.own_full(), 2 * Tiles::Shared::Own::kBytes);
        shared.own(0).load(key_map, shared.own_full(), first_key, kv_head, batch);
        shared.own(1).load(value_map, shared.own_full(), first_key, kv_head, batch);
      }
      PipelineState<kStages> turn;
      for (int head = kv_head * a.group; head < (kv_head + 1) * a.group; ++head)
        for (int tile = first_tile; tile < end_tile; ++tile, turn.next()) {
          const int first_query = tile * kRows;
          if (threadIdx.x == 0) {
            barrier_wait(shared.empty(turn.stage), turn.parity ^ 1);
            barrier_arrive_expect_bytes(shared.full(turn.stage), Tiles::Shared::kStageBytes);
            shared.other(turn.stage, 0).load(query_map, shared.full(turn.stage), first_query, head, batch);
            shared.other(turn.stage, 1).load(grad_map, shared.full(turn.stage), first_query, head, batch);
          } else if (warp ==
                     1) {  // the statistics of the rows, which TMA cannot copy because they may begin at any address
            barrier_wait(shared.empty(turn.stage), turn.parity ^ 1);
            const int64_t row = (static_cast<int64_t>(batch) * a.heads + head) * a.queries + first_query;
            for (int i = threadIdx.x % kWarp; i < kRows; i += kWarp) {
              const bool inside = first_query + i < a.queries;
              shared.lse(turn.stage)[i] = lse_for_backward(a.lse, row + i, inside);
              shared.delta(turn.stage)[i] = inside ? a.delta[row + i] : 0.0f;
            }
            release_stage(shared.full(turn.stage));
          }
        }
    }
  } else {
    increase_registers<kConsumerRegisters>();
    const int group_row = consumer * kGroupRows, warp_key = first_key + group_row + warp % 4 * 16;
    const int lane_column = threadIdx.x % 4 * 2;
    const float scale = a.scale * kLog2E;
    float grad_key[D / 8][4], grad_value[D / 8][4];
    zero(grad_key);
    zero(grad_value);
    if (first_tile < end_tile) barrier_wait(shared.own_full(), 0);
    PipelineState<kStages> turn;
    for (int member = 0; member < a.group; ++member)
      for (int tile = first_tile; tile < end_tile; ++tile, turn.next()) {
        float weights[kRows / 8][4], grad_scores[kRows / 8][4];  // P^T and dP^T: (keys, queries)
        uint32_t weight_fragments[kRows / 16][4], grad_score_fragments[kRows / 16][4];
        barrier_wait(shared.full(turn.stage), turn.parity);
        wgmma_fence();
        multiply_abt<T, D>(weights, shared.own(0), group_row, shared.other(turn.stage, 0));
        wgmma_commit();
        multiply_abt<T, D>(grad_scores, shared.own(1), group_row, shared.other(turn.stage, 1));
        wgmma_commit();
        wgmma_wait<1>();
        fence_operands(weights);
        const int first_query = tile * kRows;
        if (warp_key + 15 >= visible || (a.causal && warp_key + 15 > first_query))
          mask_scores<kRows, true>(weights, warp_key, first_query, visible, a.causal);
        const float* const lse = shared.lse(turn.stage) + lane_column;
#pragma unroll
        for (int j = 0; j < kRows / 8; ++j) {
          const float2 shift = *reinterpret_cast<const float2*>(lse + 8 * j);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            weights[j][i] = fast_exp2(fmaf(weights[j][i], scale, -(i % 2 == 0 ? shift.x : shift.y)));
        }
        as_a_fragments<T, kRows>(weights, weight_fragments);
        wgmma_fence();
        multiply_add<T, D>(grad_value, weight_fragments, shared.other(turn.stage, 1));
        wgmma_commit();
        wgmma_wait<1>();
        fence_operands(grad_scores);
        const float* const delta = shared.delta(turn.stage) + lane_column;
#pragma unroll
        for (int j = 0; j < kRows / 8; ++j) {
          const float2 sum = *reinterpret_cast<const float2*>(delta + 8 * j);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            grad_scores[j][i] = weights[j][i] * (grad_scores[j][i] - (i % 2 == 0 ? sum.x : sum.y));
        }
        as_a_fragments<T, kRows>(grad_scores, grad_score_fragments);
        wgmma_fence();
        multiply_add<T, D>(grad_key, grad_score_fragments, shared.other(turn.stage, 0));
        wgmma_commit();
        wgmma_wait<0>();
        fence_operands(grad_value);
        fence_operands(grad_key);
        fence_operands(weight_fragments);
        fence_operands(grad_score_fragments);
        release_stage(shared.empty(turn.stage));
      }

    // The sums of a key beyond the visible ones are meaningless; its gradient is 0.
    if (warp_key + 15 >= visible) {
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool seen = warp_key + static_cast<int>(threadIdx.x) % kWarp / 4 + i / 2 * 8 < visible;
          grad_key[j][i] = seen ? grad_key[j][i] : 0.0f;
          grad_value[j][i] = seen ? grad_value[j][i] : 0.0f;
        }
    }
    // The rows pass through the memory of the keys and values of this warpgroup, which no other one reads.
    const int first_row = first_key + group_row;
    const float by[2] = {a.scale, a.scale}, one[2] = {1.0f, 1.0f};
    const auto at = [&](const Heads& heads) {
      return static_cast<T*>(heads.data) + batch * heads.batch + kv_head * heads.head + first_row * heads.row;
    };
    store_rows<T, D>(grad_key, by, shared.own(0), group_row, kOwnBarrier + consumer, at(a.grad_key), a.grad_key.row,
                     a.keys - first_row);
    store_rows<T, D>(grad_value, one, shared.own(1), group_row, kOwnBarrier + consumer, at(a.grad_value),
                     a.grad_value.row, a.keys - first_row);
  }
}

template <int D>
struct QueriesTiles {
  // With head_dim 128, a tile of 128 keys would need too many registers.
  static constexpr int kColumns = D == 64 ? 128 : 64, kStages = 3;
  using Shared = BackwardShared<D, kColumns, kStages>;
};

template <class T, int D>
__global__ void __launch_bounds__(kHopperThreads, 1)
    attention_queries_sm90_kernel(const __grid_constant__ TensorMap query_map,  // (B, H, queries, D)
                                  const __grid_constant__ TensorMap key_map,    // (B, H / group, keys, D)
                                  const __grid_constant__ TensorMap value_map,  // likewise
                                  const __grid_constant__ TensorMap grad_map,   // (B, H, queries, D), of grad_out
                                  const __grid_constant__ Attention a, int heads_at_once) {
  using Tiles = QueriesTiles<D>;
  constexpr int kColumns = Tiles::kColumns, kStages = Tiles::kStages;
  const typename Tiles::Shared shared{shared_memory()};
  const int warp = warp_number(), consumer = warp / 4 - 1;  // -1 is the producer

  const int blocks = (a.queries + kBlockRows - 1) / kBlockRows;
  const BlockTask task = block_task(blocks, a.heads, a.batch * a.heads, heads_at_once, a.causal);
  const int first_query = task.block * kBlockRows, head = task.head, batch = task.batch;
  const int visible = visible_keys(a, batch);
  const int end = a.causal ? min(visible, first_query + kBlockRows) : visible;
  const int tiles = (end + kColumns - 1) / kColumns;

  if (threadIdx.x == 0) shared.init(1);
  sync_block();

  if (consumer < 0) {
    decrease_registers<kProducerRegisters>();
    if (threadIdx.x == 0 && tiles > 0) {
      for (const TensorMap* map : {&query_map, &key_map, &value_map, &grad_map}) prefetch_tensor_map(*map);
      const int kv_head = head / a.group;
      barrier_arrive_expect_bytes(shared.own_full(), 2 * Tiles::Shared::Own::kBytes);
      shared.own(0).load(query_map, shared.own_full(), first_query, head, batch);
      shared.own(1).load(grad_map, shared.own_full(), first_query, head, batch);
      PipelineState<kStages> turn;
      for (int tile = tiles - 1; tile >= 0; --tile, turn.next()) {
        barrier_wait(shared.empty(turn.stage), turn.parity ^ 1);
        barrier_arrive_expect_bytes(shared.full(turn.stage), Tiles::Shared::kStageBytes);
        shared.other(turn.stage, 0).load(key_map, shared.full(turn.stage), tile * kColumns, kv_head, batch);
        shared.other(turn.stage, 1).load(value_map, shared.full(turn.stage), tile * kColumns, kv_head, batch);
      }
    }
  } else {
    increase_registers<kConsumerRegisters>();
    const int group_row = consumer * kGroupRows, warp_query = first_query + group_row + warp % 4 * 16;
    const int64_t statistic = (static_cast<int64_t>(batch) * a.heads + head) * a.queries;
    const float scale = a.scale * kLog2E;
    float shift[2], delta[2];
    for (int r = 0; r < 2; ++r) {
      const int row = warp_query + threadIdx.x % kWarp / 4 + 8 * r;
      shift[r] = lse_for_backward(a.lse, statistic + row, row < a.queries);
      delta[r] = row < a.queries ? a.delta[statistic + row] : 0.0f;
    }
    float grad_query[D / 8][4];
    zero(grad_query);
    if (tiles > 0) barrier_wait(shared.own_full(), 0);
    PipelineState<kStages> turn;
    // The loop begins with the last tile, so that nothing has been summed when a tile on the diagonal is processed.
    for (int tile = tiles - 1; tile >= 0; --tile, turn.next()) {
      float weights[kColumns / 8][4], grad_scores[kColumns / 8][4];  // P and dP
      uint32_t grad_score_fragments[kColumns / 16][4];
      barrier_wait(shared.full(turn.stage), turn.parity);
      if (visible < a.keys && (tile + 1) * kColumns > visible)
        zero_rows<D>(shared.other(turn.stage, 0), visible - tile * kColumns, kBothBarrier);
      wgmma_fence();
      multiply_abt<T, D>(weights, shared.own(0), group_row, shared.other(turn.stage, 0));
      wgmma_commit();
      multiply_abt<T, D>(grad_scores, shared.own(1), group_row, shared.other(turn.stage, 1));
      wgmma_commit();
      wgmma_wait<1>();
      fence_operands(weights);
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[j][i] = fast_exp2(fmaf(weights[j][i], scale, -shift[i / 2]));
      wgmma_wait_here<0>();
      fence_operands(grad_scores);
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) grad_scores[j][i] = weights[j][i] * (grad_scores[j][i] - delta[i / 2]);
      // The gradients of the scores are masked, not the weights: a hidden value may hold anything, and so may dP for
      // it.
      const int first_key = tile * kColumns;
      const bool diagonal = a.causal && first_key + kColumns - 1 > warp_query;
      if (first_key + kColumns > visible || diagonal)
        mask_scores<kColumns>(grad_scores, warp_query, first_key, visible, a.causal, 0.0f);
      as_a_fragments<T, kColumns>(grad_scores, grad_score_fragments);
      wgmma_fence();
      multiply_add<T, D>(grad_query, grad_score_fragments, shared.other(turn.stage, 0));
      wgmma_commit();
      wgmma_wait<0>();
      fence_operands(grad_query);
      fence_operands(grad_score_fragments);
      if (diagonal)
        redo_if_not_finite<T, D, kColumns>(grad_query, grad_score_fragments, warp_query - first_key,
                                           shared.other(turn.stage, 0));
      release_stage(shared.empty(turn.stage));
    }

    const int first_row = first_query + group_row;
    const float by[2] = {a.scale, a.scale};
    const Heads& to = a.grad_query;
    store_rows<T, D>(grad_query, by, shared.own(0), group_row, 1 + consumer,
                     static_cast<T*>(to.data) + batch * to.batch + head * to.head + first_row * to.row, to.row,
                     a.queries - first_row);
  }
}

}  // namespace tinyllm::cuda
