// Attention forward on Hopper: a block has 128 queries of a head and loops over the keys, kColumns at a time, from the
// last ones that its queries see to the first (Shah et al. 2024, "FlashAttention-3").
//
// Two overlaps keep the tensor cores busy. A warpgroup issues query key^T for the next tile before it computes the
// softmax of the last one; and the two warpgroups take turns at issuing, so that the softmax of one overlaps with the
// matmuls of the other. Shared memory holds the queries once and two stages each of keys and of values, with a barrier
// for each, so that matmuls with keys can start before the values have arrived.
#pragma once
#include "attention_sm90.cuh"

namespace tinyllm::cuda {

template <int D>
struct ForwardShared {
  static constexpr int kColumns = 128, kStages = 2;
  using Queries = Tile<kBlockRows, D>;
  using Keys = Tile<kColumns, D>;
  static constexpr size_t kTiles = Queries::kBytes + 2 * kStages * Keys::kBytes;
  static constexpr size_t kBytes = kTiles + (1 + 4 * kStages) * sizeof(Barrier);

  unsigned char* memory;

  TINYLLM_DEVICE Queries queries() const { return {memory}; }
  TINYLLM_DEVICE Keys keys(int stage) const { return {memory + Queries::kBytes + stage * Keys::kBytes}; }
  TINYLLM_DEVICE Keys values(int stage) const { return keys(kStages + stage); }
  TINYLLM_DEVICE Barrier* barriers() const { return reinterpret_cast<Barrier*>(memory + kTiles); }
  TINYLLM_DEVICE Barrier* queries_full() const { return barriers(); }
  TINYLLM_DEVICE Barrier* keys_full(int stage) const { return barriers() + 1 + stage; }
  TINYLLM_DEVICE Barrier* keys_empty(int stage) const { return keys_full(kStages + stage); }
  TINYLLM_DEVICE Barrier* values_full(int stage) const { return keys_full(2 * kStages + stage); }
  TINYLLM_DEVICE Barrier* values_empty(int stage) const { return keys_full(3 * kStages + stage); }
};

template <class T, int D>
__global__ void __launch_bounds__(kHopperThreads, 1)
    attention_forward_sm90_kernel(const __grid_constant__ TensorMap query_map,  // (B, H, queries, D)
                                  const __grid_constant__ TensorMap key_map,    // (B, H / group, keys, D)
                                  const __grid_constant__ TensorMap value_map,  // likewise
                                  const __grid_constant__ Attention a, int heads_at_once) {
  using Shared = ForwardShared<D>;
  constexpr int kColumns = Shared::kColumns, kStages = Shared::kStages;
  const Shared shared{shared_memory()};
  const int warp = warp_number(), consumer = warp / 4 - 1;  // -1 is the producer

  const int blocks = (a.queries + kBlockRows - 1) / kBlockRows;
  const BlockTask task = block_task(blocks, a.heads, a.batch * a.heads, heads_at_once, a.causal);
  const int first_query = task.block * kBlockRows, head = task.head, batch = task.batch;
  const int visible = visible_keys(a, batch);
  const int end = a.causal ? min(visible, first_query + kBlockRows) : visible;
  const int tiles = (end + kColumns - 1) / kColumns;

  if (threadIdx.x == 0) {
    barrier_init(shared.queries_full(), 1);
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(shared.keys_full(stage), 1);
      barrier_init(shared.values_full(stage), 1);
      barrier_init(shared.keys_empty(stage), kConsumerWarps);
      barrier_init(shared.values_empty(stage), kConsumerWarps);
    }
    fence_barrier_init();
  }
  sync_block();

  if (consumer < 0) {
    decrease_registers<kProducerRegisters>();
    if (threadIdx.x == 0 && tiles > 0) {
      for (const TensorMap* map : {&query_map, &key_map, &value_map}) prefetch_tensor_map(*map);
      const int kv_head = head / a.group;
      barrier_arrive_expect_bytes(shared.queries_full(), Shared::Queries::kBytes);
      shared.queries().load(query_map, shared.queries_full(), first_query, head, batch);
      PipelineState<kStages> turn;
      for (int tile = tiles - 1; tile >= 0; --tile, turn.next()) {
        barrier_wait(shared.keys_empty(turn.stage), turn.parity ^ 1);
        barrier_arrive_expect_bytes(shared.keys_full(turn.stage), Shared::Keys::kBytes);
        shared.keys(turn.stage).load(key_map, shared.keys_full(turn.stage), tile * kColumns, kv_head, batch);
        barrier_wait(shared.values_empty(turn.stage), turn.parity ^ 1);
        barrier_arrive_expect_bytes(shared.values_full(turn.stage), Shared::Keys::kBytes);
        shared.values(turn.stage).load(value_map, shared.values_full(turn.stage), tile * kColumns, kv_head, batch);
      }
    }
  } else {
    increase_registers<kConsumerRegisters>();
    const int group_row = consumer * kGroupRows, warp_query = first_query + group_row + warp % 4 * 16;
    const float scale = a.scale * kLog2E;
    float out[D / 8][4];
    zero(out);
    SoftmaxState rows;
    if (tiles > 0) {
      float scores[kColumns / 8][4], rescale[2];
      uint32_t weights[kColumns / 16][4];
      PipelineState<kStages> turn, values_turn;  // values are one tile behind keys
      const auto mask_tile = [&](int tile) {
        const int first_key = tile * kColumns;
        if (first_key + kColumns > visible || (a.causal && first_key + kColumns - 1 > warp_query))
          mask_scores<kColumns>(scores, warp_query, first_key, visible, a.causal);
      };
      // Only the first tile is on the diagonal, and nothing has been summed before it.
      const auto redo_tile = [&](int tile, int stage) {
        if (a.causal && (tile + 1) * kColumns - 1 > warp_query)
          redo_if_not_finite<T, D, kColumns>(out, weights, warp_query - tile * kColumns, shared.values(stage));
      };
      if (consumer == 1 && tiles > 1) named_barrier_arrive(kTurnBarrier, kConsumers * kGroupThreads);

      barrier_wait(shared.queries_full(), 0);
      barrier_wait(shared.keys_full(0), 0);
      wgmma_fence();
      multiply_abt<T, D>(scores, shared.queries(), group_row, shared.keys(0));
      wgmma_commit();
      wgmma_wait<0>();
      fence_operands(scores);
      release_stage(shared.keys_empty(0));
      turn.next();
      mask_tile(tiles - 1);
      update_softmax<kColumns>(scores, rows, scale, rescale);
      as_a_fragments<T, kColumns>(scores, weights);
      if (visible < a.keys && tiles * kColumns > visible) {
        barrier_wait(shared.values_full(0), 0);
        zero_rows<D>(shared.values(0), visible - (tiles - 1) * kColumns, kBothBarrier);
      }

      for (int tile = tiles - 2; tile >= 0; --tile, turn.next(), values_turn.next()) {
        barrier_wait(shared.keys_full(turn.stage), turn.parity);
        named_barrier_sync(kTurnBarrier + consumer, kConsumers * kGroupThreads);
        wgmma_fence();
        multiply_abt<T, D>(scores, shared.queries(), group_row, shared.keys(turn.stage));
        wgmma_commit();
        barrier_wait(shared.values_full(values_turn.stage), values_turn.parity);
        wgmma_fence();
        multiply_add<T, D>(out, weights, shared.values(values_turn.stage));
        wgmma_commit();
        // Every arrival needs a matching wait, so the last one is omitted.
        if (consumer == 0 || tile > 0) named_barrier_arrive(kTurnBarrier + 1 - consumer, kConsumers * kGroupThreads);
        wgmma_wait<1>();
        fence_operands(scores);
        release_stage(shared.keys_empty(turn.stage));
        mask_tile(tile);
        update_softmax<kColumns>(scores, rows, scale, rescale);
        wgmma_wait_here<0>();
        fence_operands(out);
        fence_operands(weights);
        redo_tile(tile + 1, values_turn.stage);
        release_stage(shared.values_empty(values_turn.stage));
#pragma unroll
        for (int j = 0; j < D / 8; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) out[j][i] *= rescale[i / 2];
        as_a_fragments<T, kColumns>(scores, weights);
      }
      barrier_wait(shared.values_full(values_turn.stage), values_turn.parity);
      wgmma_fence();
      multiply_add<T, D>(out, weights, shared.values(values_turn.stage));
      wgmma_commit();
      wgmma_wait<0>();
      fence_operands(out);
      fence_operands(weights);
      redo_tile(0, values_turn.stage);
    }

    float lse[2], factor[2];
    finish_softmax(rows, scale, lse, factor);
    const int lane = threadIdx.x % kWarp;
    const int64_t statistic = (static_cast<int64_t>(batch) * a.heads + head) * a.queries;
    if (lane % 4 == 0)
      for (int r = 0; r < 2; ++r)
        if (warp_query + lane / 4 + 8 * r < a.queries) a.lse[statistic + warp_query + lane / 4 + 8 * r] = lse[r];
    // The rows pass through the memory of the queries of this warpgroup, which no other one reads.
    const int first_row = first_query + group_row;
    store_rows<T, D>(out, factor, shared.queries(), group_row, kOwnBarrier + consumer,
                     static_cast<T*>(a.out.data) + batch * a.out.batch + head * a.out.head + first_row * a.out.row,
                     a.out.row, a.queries - first_row);
  }
}

}  // namespace tinyllm::cuda
