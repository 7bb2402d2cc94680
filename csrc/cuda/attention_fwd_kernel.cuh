// Attention, forward, for compute capability 8.0 and later (Dao 2023, "FlashAttention-2"): each block keeps 128 queries
// and goes through the keys, 64 at a time, with the softmax made on the way; scores never leave the registers.
//
// Why it is fast:
// - Each of the four warps has 32 queries, two rows of tensor-core tiles. Whatever it reads from shared memory, keys
// and
//   values, then serves two products; with 16 queries a warp, an A100's shared memory would take as long as its tensor
//   cores. 128 x 64 is the largest tile whose scores (64 registers) and outputs (128 at head_dim 128) stay in
//   registers. At head_dim 64 the queries do as well; at 128 they are read again from shared memory, where they cost a
//   fifth of the traffic.
// - Tiles of keys and values go alternately through one ring in shared memory, filled by cp.async two or three ahead:
//   one barrier each. 80 KB (48 at head_dim 64): two blocks on a multiprocessor of 8.0 or 9.0; one (two) where it has
//   100 KB.
// - The weights are, as the products leave them in registers, the first factor of the next product.
// - Only tiles that the diagonal or the end crosses test for it, and a warp skips those that none of its rows sees.
//
// Written over mma.sync and ldmatrix, as the other attention kernels, not over CuTe or CUTLASS: what they need of these
// are the short wrappers of platform.cuh, which also have a meaning on a CPU; nothing to install, and a fraction of the
// time to compile.
#pragma once
#include "attention_tile.cuh"

namespace tinyllm::cuda {

template <int D>
struct ForwardTile {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kWarpRows = 32, kRows = kWarps * kWarpRows, kKeys = 64;
  static constexpr int kSlots = D == 64 ? 4 : 3;
  static constexpr bool kQueryInRegisters = D == 64;
  static constexpr size_t kShared = sizeof(uint16_t) * D * (kRows + kSlots * kKeys);
  static_assert(kShared <= kSharedEverywhere);
};

template <class T, int D>
__global__ void __launch_bounds__(ForwardTile<D>::kThreads, 2)
    attention_forward_kernel(Attention call,  // query (B, H, T, D), key, value (B, Hkv, S, D), out (B, H, T, D)
                             int heads_at_once) {
  using Tile = ForwardTile<D>;
  constexpr int kTiles = Tile::kWarpRows / 16, kKeys = Tile::kKeys, kSlots = Tile::kSlots;
  T* const query_tile = reinterpret_cast<T*>(shared_memory());
  T* const ring = query_tile + Tile::kRows * D;
  const int blocks = (call.queries + Tile::kRows - 1) / Tile::kRows;
  const Place place = place_of(blocks, call.heads, call.batch * call.heads, heads_at_once, call.causal);
  const int first = place.block * Tile::kRows, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int row = first + warp * Tile::kWarpRows;  // the warp's first
  T* const warp_tile = query_tile + warp * Tile::kWarpRows * D;
  const int length = visible_keys(call, place.batch);
  // How many keys the block's last query sees, the warp's last, and the warp's first.
  const int seen_by_block = call.causal ? min(length, first + Tile::kRows) : length;
  const int seen_by_warp = row >= call.queries ? 0 : call.causal ? min(length, row + Tile::kWarpRows) : length;
  const int seen_by_all = call.causal ? min(length, row + 1) : length;
  const int tiles = (seen_by_block + kKeys - 1) / kKeys;

  // Each thread's part of the next tile of keys and of values.
  const int kv_head = place.head / call.group, thread = threadIdx.x;
  const T* key = source_of<D>(head_of<T>(call.key, place.batch, kv_head), call.key.row, 0, thread);
  const T* value = source_of<D>(head_of<T>(call.value, place.batch, kv_head), call.value.row, 0, thread);
  auto fetch = [&](bool of_keys, int tile, int slot) {
    const T*& source = of_keys ? key : value;
    const int64_t stride = of_keys ? call.key.row : call.value.row;
    if (tile < tiles)
      copy_rows<D, kKeys, Tile::kThreads>(ring + slot * kKeys * D, source, stride, length - tile * kKeys, thread);
    source += kKeys * stride;
    commit_copies();  // also of nothing, so that waiting can count
  };
  // Waits for the next tile in the ring, of keys and values in turn, and has another one, kSlots - 1 places further on,
  // fetched to where the one before it was.
  int slot = -1;
  auto advance = [&](bool of_keys, int tile) {
    constexpr int kAhead = kSlots - 1;
    slot = slot + 1 == kSlots ? 0 : slot + 1;
    wait_copies<kSlots - 2>();
    sync_block();
    fetch(of_keys == (kAhead % 2 == 0), tile + (kAhead + !of_keys) / 2, slot == 0 ? kSlots - 1 : slot - 1);
    return ring + slot * kKeys * D;
  };
  if (tiles > 0)
    copy_rows<D, Tile::kRows, Tile::kThreads>(
        query_tile, source_of<D>(head_of<T>(call.query, place.batch, place.head), call.query.row, first, thread),
        call.query.row, call.queries - first, thread);
  for (int i = 0; i < kSlots - 1; ++i) fetch(i % 2 == 0, i / 2, i);

  const float scale = call.scale * kLog2E;
  uint32_t query[kTiles][D / 16][4];
  float sum[kTiles][D / 8][4] = {};
  RowStates rows[kTiles];
  for (int tile = 0; tile < tiles; ++tile) {
    uint32_t weights[kTiles][kKeys / 16][4];
    const bool takes_part = tile * kKeys < seen_by_warp;
    const T* const keys = advance(true, tile);
    if (Tile::kQueryInRegisters && tile == 0) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int k = 0; k < D / 16; ++k) load_first<D>(query[m][k], warp_tile, 16 * m, k);
    }
    if (takes_part) {
      float scores[kTiles][kKeys / 8][4] = {};
      if constexpr (Tile::kQueryInRegisters)
        multiply_rows<T, D, kKeys, kTiles>(scores, query, keys);
      else
        multiply_rows<T, D, kKeys, kTiles>(scores, warp_tile, keys);
      if ((tile + 1) * kKeys > seen_by_all) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) hide<kKeys>(scores[m], row + 16 * m, tile * kKeys, length, call.causal);
      }
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        float rescale[2];
        update<kKeys>(scores[m], rows[m], scale, rescale);
        as_factors<T, kKeys>(scores[m], weights[m]);
#pragma unroll
        for (int j = 0; j < D / 8; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[m][j][i] *= rescale[i / 2];
      }
    }
    const T* const values = advance(false, tile);
    if (takes_part && call.causal && (tile + 1) * kKeys > row + 1) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
        multiply_seen_weights<T, D, kKeys>(
            sum[m], weights[m], row + 16 * m - tile * kKeys,
            [&](uint32_t (&b)[4], int first_key, int n) { load_second<D>(b, values, first_key, n); });
    } else if (takes_part) {
      multiply_weights<T, D, kKeys, kTiles>(sum, weights, values);
    }
  }

  T* const out = head_of<T>(call.out, place.batch, place.head);
  float* const lse = call.lse + (static_cast<int64_t>(place.batch) * call.heads + place.head) * call.queries;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    float row_lse[2], factor[2];
    finish(rows[m], scale, row_lse, factor);
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[m][j][i] *= factor[i / 2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query_row = row + 16 * m + lane / 4 + 8 * r;
      if (lane % 4 == 0 && query_row < call.queries) lse[query_row] = row_lse[r];
    }
    // Of the queries' tile nobody reads these rows but this warp, and it has.
    store_rows<T, D>(out, call.out.row, row + 16 * m, call.queries, sum[m], warp_tile + 16 * m * D);
  }
}

}  // namespace tinyllm::cuda
