// Attention forward on Hopper: a block has 128 queries of a head and goes through the keys, kColumns at a time, from
// the last that its queries see to the first (Shah et al. 2024, "FlashAttention-3").
//
// Two overlaps keep the tensor cores busy: a warpgroup issues the next tile's query key^T before it turns the last
// one's scores into weights, and the two warpgroups take turns at issuing, so that one's softmax falls into the other's
// products. Shared memory: the queries once, two stages of keys and of values, each with a barrier of its own, so that
// products with keys start before the values have come.
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
  const int warp = warp_number(), consumer = warp / 4 - 1;  // -1: the producer

  const int blocks = (a.queries + kBlockRows - 1) / kBlockRows;
  const Place place = place_of(blocks, a.heads, a.batch * a.heads, heads_at_once, a.causal);
  const int first_query = place.block * kBlockRows, head = place.head, batch = place.batch;
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
    barriers_ready();
  }
  sync_block();

  if (consumer < 0) {
    fewer_registers<kProducerRegisters>();
    if (threadIdx.x == 0 && tiles > 0) {
      for (const TensorMap* map : {&query_map, &key_map, &value_map}) prefetch_map(*map);
      const int kv_head = head / a.group;
      barrier_arrive_expecting(shared.queries_full(), Shared::Queries::kBytes);
      shared.queries().load(query_map, shared.queries_full(), first_query, head, batch);
      Turn<kStages> turn;
      for (int tile = tiles - 1; tile >= 0; --tile, turn.next()) {
        barrier_wait(shared.keys_empty(turn.stage), turn.parity ^ 1);
        barrier_arrive_expecting(shared.keys_full(turn.stage), Shared::Keys::kBytes);
        shared.keys(turn.stage).load(key_map, shared.keys_full(turn.stage), tile * kColumns, kv_head, batch);
        barrier_wait(shared.values_empty(turn.stage), turn.parity ^ 1);
        barrier_arrive_expecting(shared.values_full(turn.stage), Shared::Keys::kBytes);
        shared.values(turn.stage).load(value_map, shared.values_full(turn.stage), tile * kColumns, kv_head, batch);
      }
    }
  } else {
    more_registers<kConsumerRegisters>();
    const int group_row = consumer * kGroupRows, warp_query = first_query + group_row + warp % 4 * 16;
    const float scale = a.scale * kLog2E;
    float out[D / 8][4];
    clear(out);
    RowStates rows;
    if (tiles > 0) {
      float scores[kColumns / 8][4], rescale[2];
      uint32_t weights[kColumns / 16][4];
      Turn<kStages> turn, values_turn;  // values lag a tile behind
      const auto hide_tile = [&](int tile) {
        const int first_key = tile * kColumns;
        if (first_key + kColumns > visible || (a.causal && first_key + kColumns - 1 > warp_query))
          hide<kColumns>(scores, warp_query, first_key, visible, a.causal);
      };
      // The first tile is the only one on the diagonal, and nothing has been summed before it.
      const auto mend_tile = [&](int tile, int stage) {
        if (a.causal && (tile + 1) * kColumns - 1 > warp_query)
          mend_product<T, D, kColumns>(out, weights, warp_query - tile * kColumns, shared.values(stage));
      };
      if (consumer == 1 && tiles > 1) named_arrive(kTurnBarrier, kConsumers * kGroupThreads);

      barrier_wait(shared.queries_full(), 0);
      barrier_wait(shared.keys_full(0), 0);
      products_begin();
      multiply_rows<T, D>(scores, shared.queries(), group_row, shared.keys(0));
      products_commit();
      products_wait<0>();
      settle(scores);
      release(shared.keys_empty(0));
      turn.next();
      hide_tile(tiles - 1);
      update<kColumns>(scores, rows, scale, rescale);
      as_factors<T, kColumns>(scores, weights);
      if (visible < a.keys && tiles * kColumns > visible) {
        barrier_wait(shared.values_full(0), 0);
        clear_rows<D>(shared.values(0), visible - (tiles - 1) * kColumns, kBothBarrier);
      }

      for (int tile = tiles - 2; tile >= 0; --tile, turn.next(), values_turn.next()) {
        barrier_wait(shared.keys_full(turn.stage), turn.parity);
        named_sync(kTurnBarrier + consumer, kConsumers * kGroupThreads);
        products_begin();
        multiply_rows<T, D>(scores, shared.queries(), group_row, shared.keys(turn.stage));
        products_commit();
        barrier_wait(shared.values_full(values_turn.stage), values_turn.parity);
        products_begin();
        multiply_add<T, D>(out, weights, shared.values(values_turn.stage));
        products_commit();
        // The last turn that is offered must be one that is taken.
        if (consumer == 0 || tile > 0) named_arrive(kTurnBarrier + 1 - consumer, kConsumers * kGroupThreads);
        products_wait<1>();
        settle(scores);
        release(shared.keys_empty(turn.stage));
        hide_tile(tile);
        update<kColumns>(scores, rows, scale, rescale);
        products_wait_here<0>();
        settle(out);
        settle(weights);
        mend_tile(tile + 1, values_turn.stage);
        release(shared.values_empty(values_turn.stage));
#pragma unroll
        for (int j = 0; j < D / 8; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) out[j][i] *= rescale[i / 2];
        as_factors<T, kColumns>(scores, weights);
      }
      barrier_wait(shared.values_full(values_turn.stage), values_turn.parity);
      products_begin();
      multiply_add<T, D>(out, weights, shared.values(values_turn.stage));
      products_commit();
      products_wait<0>();
      settle(out);
      settle(weights);
      mend_tile(0, values_turn.stage);
    }

    float lse[2], factor[2];
    finish(rows, scale, lse, factor);
    const int lane = threadIdx.x % kWarp;
    const int64_t statistic = (static_cast<int64_t>(batch) * a.heads + head) * a.queries;
    if (lane % 4 == 0)
      for (int r = 0; r < 2; ++r)
        if (warp_query + lane / 4 + 8 * r < a.queries) a.lse[statistic + warp_query + lane / 4 + 8 * r] = lse[r];
    // Where this warpgroup's queries were, which it alone has read.
    const int first_row = first_query + group_row;
    store_rows<T, D>(out, factor, shared.queries(), group_row, kOwnBarrier + consumer,
                     static_cast<T*>(a.out.data) + batch * a.out.batch + head * a.out.head + first_row * a.out.row,
                     a.out.row, a.queries - first_row);
  }
}

}  // namespace tinyllm::cuda
