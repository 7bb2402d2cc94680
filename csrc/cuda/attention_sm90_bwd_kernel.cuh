// Attention backward on Hopper, in two kernels (Dao 2023, "FlashAttention-2"; the blocks are those of forward). With
// weights P = softmax, dP = grad_out value^T and dS = P (dP - delta):
//
//     grad_value = P^T grad_out        grad_key = scale dS^T query        grad_query = scale dS key
//
// One kernel has a block of keys and goes through the queries; its scores are transposed (key query^T), so that P^T and
// dS^T are in registers what the products with grad_out and query take as their first factor, and never go to shared
// memory. The other has a block of queries and goes through the keys, likewise. That is seven products for each pair of
// tiles instead of five, and for it nothing is summed by several blocks: no atomics, no float32 copy of grad_query, and
// the same bits every time.
#pragma once
#include "attention_sm90.cuh"

namespace tinyllm::cuda {

// What a block keeps (two tiles), and stages of two tiles that it goes through, with statistics of their rows.
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

  // By one thread; arrivals: of a stage that is full.
  TINYLLM_DEVICE void init(uint32_t arrivals) const {
    barrier_init(own_full(), 1);
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(full(stage), arrivals);
      barrier_init(empty(stage), kConsumerWarps);
    }
    barriers_ready();
  }
};

// The log-sum-exp by which a row's weights are recomputed: a row that there is not, or that saw no key, has none.
TINYLLM_DEVICE float shift_of(const float* lse, int64_t at, bool inside) {
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
  const int warp = warp_number(), consumer = warp / 4 - 1;  // -1: the producer

  const int blocks = (a.keys + kBlockRows - 1) / kBlockRows, kv_heads = a.heads / a.group;
  const Place place = place_of(blocks, kv_heads, a.batch * kv_heads, heads_at_once, false);
  const int first_key = place.block * kBlockRows, kv_head = place.head, batch = place.batch;
  const int visible = visible_keys(a, batch);
  // With causal, earlier queries see none of these keys.
  const int first_tile = a.causal ? first_key / kRows : 0;
  const int end_tile = first_key < visible ? (a.queries + kRows - 1) / kRows : 0;

  if (threadIdx.x == 0) shared.init(2);
  sync_block();

  if (consumer < 0) {
    fewer_registers<kProducerRegisters>();
    if (first_tile < end_tile && warp < 2) {
      if (threadIdx.x == 0) {
        for (const TensorMap* map : {&query_map, &key_map, &value_map, &grad_map}) prefetch_map(*map);
        barrier_arrive_expecting(shared.own_full(), 2 * Tiles::Shared::Own::kBytes);
        shared.own(0).load(key_map, shared.own_full(), first_key, kv_head, batch);
        shared.own(1).load(value_map, shared.own_full(), first_key, kv_head, batch);
      }
      Turn<kStages> turn;
      for (int head = kv_head * a.group; head < (kv_head + 1) * a.group; ++head)
        for (int tile = first_tile; tile < end_tile; ++tile, turn.next()) {
          const int first_query = tile * kRows;
          if (threadIdx.x == 0) {
            barrier_wait(shared.empty(turn.stage), turn.parity ^ 1);
            barrier_arrive_expecting(shared.full(turn.stage), Tiles::Shared::kStageBytes);
            shared.other(turn.stage, 0).load(query_map, shared.full(turn.stage), first_query, head, batch);
            shared.other(turn.stage, 1).load(grad_map, shared.full(turn.stage), first_query, head, batch);
          } else if (warp == 1) {  // the rows' statistics, which may begin anywhere: not for the copy engine
            barrier_wait(shared.empty(turn.stage), turn.parity ^ 1);
            const int64_t row = (static_cast<int64_t>(batch) * a.heads + head) * a.queries + first_query;
            for (int i = threadIdx.x % kWarp; i < kRows; i += kWarp) {
              const bool inside = first_query + i < a.queries;
              shared.lse(turn.stage)[i] = shift_of(a.lse, row + i, inside);
              shared.delta(turn.stage)[i] = inside ? a.delta[row + i] : 0.0f;
            }
            release(shared.full(turn.stage));
          }
        }
    }
  } else {
    more_registers<kConsumerRegisters>();
    const int group_row = consumer * kGroupRows, warp_key = first_key + group_row + warp % 4 * 16;
    const int lane_column = threadIdx.x % 4 * 2;
    const float scale = a.scale * kLog2E;
    float grad_key[D / 8][4], grad_value[D / 8][4];
    clear(grad_key);
    clear(grad_value);
    if (first_tile < end_tile) barrier_wait(shared.own_full(), 0);
    Turn<kStages> turn;
    for (int member = 0; member < a.group; ++member)
      for (int tile = first_tile; tile < end_tile; ++tile, turn.next()) {
        float weights[kRows / 8][4], slopes[kRows / 8][4];  // P^T, dP^T: keys by queries
        uint32_t weight_factors[kRows / 16][4], slope_factors[kRows / 16][4];
        barrier_wait(shared.full(turn.stage), turn.parity);
        products_begin();
        multiply_rows<T, D>(weights, shared.own(0), group_row, shared.other(turn.stage, 0));
        products_commit();
        multiply_rows<T, D>(slopes, shared.own(1), group_row, shared.other(turn.stage, 1));
        products_commit();
        products_wait<1>();
        settle(weights);
        const int first_query = tile * kRows;
        if (warp_key + 15 >= visible || (a.causal && warp_key + 15 > first_query))
          hide<kRows, true>(weights, warp_key, first_query, visible, a.causal);
        const float* const lse = shared.lse(turn.stage) + lane_column;
#pragma unroll
        for (int j = 0; j < kRows / 8; ++j) {
          const float2 shift = *reinterpret_cast<const float2*>(lse + 8 * j);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            weights[j][i] = fast_exp2(fmaf(weights[j][i], scale, -(i % 2 == 0 ? shift.x : shift.y)));
        }
        as_factors<T, kRows>(weights, weight_factors);
        products_begin();
        multiply_add<T, D>(grad_value, weight_factors, shared.other(turn.stage, 1));
        products_commit();
        products_wait<1>();
        settle(slopes);
        const float* const delta = shared.delta(turn.stage) + lane_column;
#pragma unroll
        for (int j = 0; j < kRows / 8; ++j) {
          const float2 sum = *reinterpret_cast<const float2*>(delta + 8 * j);
#pragma unroll
          for (int i = 0; i < 4; ++i) slopes[j][i] = weights[j][i] * (slopes[j][i] - (i % 2 == 0 ? sum.x : sum.y));
        }
        as_factors<T, kRows>(slopes, slope_factors);
        products_begin();
        multiply_add<T, D>(grad_key, slope_factors, shared.other(turn.stage, 0));
        products_commit();
        products_wait<0>();
        settle(grad_value);
        settle(grad_key);
        settle(weight_factors);
        settle(slope_factors);
        release(shared.empty(turn.stage));
      }

    // A key beyond the visible ones may have gathered anything, but has no part in anything.
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
    // Where this warpgroup's keys and values were, which it alone has read.
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
  // Twice as many keys at once would need more registers than there are for heads of 128.
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
  const int warp = warp_number(), consumer = warp / 4 - 1;  // -1: the producer

  const int blocks = (a.queries + kBlockRows - 1) / kBlockRows;
  const Place place = place_of(blocks, a.heads, a.batch * a.heads, heads_at_once, a.causal);
  const int first_query = place.block * kBlockRows, head = place.head, batch = place.batch;
  const int visible = visible_keys(a, batch);
  const int end = a.causal ? min(visible, first_query + kBlockRows) : visible;
  const int tiles = (end + kColumns - 1) / kColumns;

  if (threadIdx.x == 0) shared.init(1);
  sync_block();

  if (consumer < 0) {
    fewer_registers<kProducerRegisters>();
    if (threadIdx.x == 0 && tiles > 0) {
      for (const TensorMap* map : {&query_map, &key_map, &value_map, &grad_map}) prefetch_map(*map);
      const int kv_head = head / a.group;
      barrier_arrive_expecting(shared.own_full(), 2 * Tiles::Shared::Own::kBytes);
      shared.own(0).load(query_map, shared.own_full(), first_query, head, batch);
      shared.own(1).load(grad_map, shared.own_full(), first_query, head, batch);
      Turn<kStages> turn;
      for (int tile = tiles - 1; tile >= 0; --tile, turn.next()) {
        barrier_wait(shared.empty(turn.stage), turn.parity ^ 1);
        barrier_arrive_expecting(shared.full(turn.stage), Tiles::Shared::kStageBytes);
        shared.other(turn.stage, 0).load(key_map, shared.full(turn.stage), tile * kColumns, kv_head, batch);
        shared.other(turn.stage, 1).load(value_map, shared.full(turn.stage), tile * kColumns, kv_head, batch);
      }
    }
  } else {
    more_registers<kConsumerRegisters>();
    const int group_row = consumer * kGroupRows, warp_query = first_query + group_row + warp % 4 * 16;
    const int64_t statistic = (static_cast<int64_t>(batch) * a.heads + head) * a.queries;
    const float scale = a.scale * kLog2E;
    float shift[2], delta[2];
    for (int r = 0; r < 2; ++r) {
      const int row = warp_query + threadIdx.x % kWarp / 4 + 8 * r;
      shift[r] = shift_of(a.lse, statistic + row, row < a.queries);
      delta[r] = row < a.queries ? a.delta[statistic + row] : 0.0f;
    }
    float grad_query[D / 8][4];
    clear(grad_query);
    if (tiles > 0) barrier_wait(shared.own_full(), 0);
    Turn<kStages> turn;
    // From the last: nothing has been summed when a tile on the diagonal comes.
    for (int tile = tiles - 1; tile >= 0; --tile, turn.next()) {
      float weights[kColumns / 8][4], slopes[kColumns / 8][4];  // P, dP
      uint32_t slope_factors[kColumns / 16][4];
      barrier_wait(shared.full(turn.stage), turn.parity);
      if (visible < a.keys && (tile + 1) * kColumns > visible)
        clear_rows<D>(shared.other(turn.stage, 0), visible - tile * kColumns, kBothBarrier);
      products_begin();
      multiply_rows<T, D>(weights, shared.own(0), group_row, shared.other(turn.stage, 0));
      products_commit();
      multiply_rows<T, D>(slopes, shared.own(1), group_row, shared.other(turn.stage, 1));
      products_commit();
      products_wait<1>();
      settle(weights);
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[j][i] = fast_exp2(fmaf(weights[j][i], scale, -shift[i / 2]));
      products_wait_here<0>();
      settle(slopes);
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) slopes[j][i] = weights[j][i] * (slopes[j][i] - delta[i / 2]);
      // Not the weights: a value that is not seen may hold anything, and what comes of it here too.
      const int first_key = tile * kColumns;
      const bool diagonal = a.causal && first_key + kColumns - 1 > warp_query;
      if (first_key + kColumns > visible || diagonal)
        hide<kColumns>(slopes, warp_query, first_key, visible, a.causal, 0.0f);
      as_factors<T, kColumns>(slopes, slope_factors);
      products_begin();
      multiply_add<T, D>(grad_query, slope_factors, shared.other(turn.stage, 0));
      products_commit();
      products_wait<0>();
      settle(grad_query);
      settle(slope_factors);
      if (diagonal)
        mend_product<T, D, kColumns>(grad_query, slope_factors, warp_query - first_key, shared.other(turn.stage, 0));
      release(shared.empty(turn.stage));
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
