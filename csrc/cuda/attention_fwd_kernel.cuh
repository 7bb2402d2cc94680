// Attention, forward, for compute capability 8.0 and later (Dao 2023, "FlashAttention-2"). Each block keeps 128 queries
// and loops over the keys, 64 at a time, with an online softmax; scores never leave the registers.
//
// Why it is fast:
// - Each of the four warps has 32 queries, two rows of tensor-core tiles. Each fragment of keys and values that it
//   reads from shared memory then serves two products; with 16 queries per warp, the shared memory of an A100 would
//   take as long as its tensor cores. 128 x 64 is the largest tile whose scores (64 registers) and outputs (128 at
//   head_dim 128) stay in registers. At head_dim 64 the queries do as well; at 128 they are read again from shared
//   memory, which is a fifth of the traffic.
// - Tiles of keys and values alternate in one ring in shared memory, filled by cp.async two or three tiles ahead, with
//   one barrier each. A block takes 80 KB (48 KB at head_dim 64), so that two fit a multiprocessor of 8.0 or 9.0, and
//   one (two) a multiprocessor with 100 KB.
// - The weights are used as the operand of the next product in the registers in which the softmax leaves them.
// - Only tiles that the diagonal or the end of the keys crosses are masked, and a warp skips tiles of which it sees no
//   key.
//
// The attention kernels are written with mma.sync and ldmatrix, not with CuTe or CUTLASS: the short wrappers in
// platform.cuh are all that they need. These also have an implementation for the CPU, require no installation, and
// compile in a fraction of the time.
#pragma once
#include "attention_tile.cuh"

namespace tinyllm::cuda {

template <int D>
struct ForwardTile {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kWarpRows = 32, kRows = kWarps * kWarpRows, kKeys = 64;
  static constexpr int kSlots = D == 64 ? 4 : 3;
  static constexpr bool kQueryInRegisters = D == 64;
  static constexpr size_t kShared = sizeof(uint16_t) * D * (kRows + kSlots * kKeys);
  static_assert(kShared <= kSharedMemoryOfAllGpus);
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
  const BlockTask task = block_task(blocks, call.heads, call.batch * call.heads, heads_at_once, call.causal);
  const int first = task.block * Tile::kRows, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int row = first + warp * Tile::kWarpRows;  // the first row of the warp
  T* const warp_tile = query_tile + warp * Tile::kWarpRows * D;
  const int length = visible_keys(call, task.batch);
  // The number of keys that the last query of the block sees, the last query of the warp, and the first query of the
  // warp.
  const int keys_of_block = call.causal ? min(length, first + Tile::kRows) : length;
  const int keys_of_warp = row >= call.queries ? 0 : call.causal ? min(length, row + Tile::kWarpRows) : length;
  const int keys_of_all_rows = call.causal ? min(length, row + 1) : length;
  const int tiles = (keys_of_block + kKeys - 1) / kKeys;

  // The part of the next tile of keys and of values that this thread copies.
  const int kv_head = task.head / call.group, thread = threadIdx.x;
  const T* key = copy_source<D>(head_of<T>(call.key, task.batch, kv_head), call.key.row, 0, thread);
  const T* value = copy_source<D>(head_of<T>(call.value, task.batch, kv_head), call.value.row, 0, thread);
  auto fetch = [&](bool of_keys, int tile, int slot) {
    const T*& source = of_keys ? key : value;
    const int64_t stride = of_keys ? call.key.row : call.value.row;
    if (tile < tiles)
      cp_async_rows<D, kKeys, Tile::kThreads>(ring + slot * kKeys * D, source, stride, length - tile * kKeys, thread);
    source += kKeys * stride;
    cp_async_commit();  // commits an empty group as well, so that cp_async_wait can count groups
  };
  // Waits for the next tile in the ring, which holds keys and values in turn, and starts the copy of the one that is
  // kSlots - 1 places ahead into the slot of the previous one.
  int slot = -1;
  auto advance = [&](bool of_keys, int tile) {
    constexpr int kAhead = kSlots - 1;
    slot = slot + 1 == kSlots ? 0 : slot + 1;
    cp_async_wait<kSlots - 2>();
    sync_block();
    fetch(of_keys == (kAhead % 2 == 0), tile + (kAhead + !of_keys) / 2, slot == 0 ? kSlots - 1 : slot - 1);
    return ring + slot * kKeys * D;
  };
  if (tiles > 0)
    cp_async_rows<D, Tile::kRows, Tile::kThreads>(
        query_tile, copy_source<D>(head_of<T>(call.query, task.batch, task.head), call.query.row, first, thread),
        call.query.row, call.queries - first, thread);
  for (int i = 0; i < kSlots - 1; ++i) fetch(i % 2 == 0, i / 2, i);

  const float scale = call.scale * kLog2E;
  uint32_t query[kTiles][D / 16][4];
  float sum[kTiles][D / 8][4] = {};
  SoftmaxState rows[kTiles];
  for (int tile = 0; tile < tiles; ++tile) {
    uint32_t weights[kTiles][kKeys / 16][4];
    const bool has_keys = tile * kKeys < keys_of_warp;
    const T* const keys = advance(true, tile);
    if (Tile::kQueryInRegisters && tile == 0) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int k = 0; k < D / 16; ++k) load_a<D>(query[m][k], warp_tile, 16 * m, k);
    }
    if (has_keys) {
      float scores[kTiles][kKeys / 8][4] = {};
      if constexpr (Tile::kQueryInRegisters)
        multiply_abt<T, D, kKeys, kTiles>(scores, query, keys);
      else
        multiply_abt<T, D, kKeys, kTiles>(scores, warp_tile, keys);
      if ((tile + 1) * kKeys > keys_of_all_rows) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) mask_scores<kKeys>(scores[m], row + 16 * m, tile * kKeys, length, call.causal);
      }
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        float rescale[2];
        update_softmax<kKeys>(scores[m], rows[m], scale, rescale);
        as_a_fragments<T, kKeys>(scores[m], weights[m]);
#pragma unroll
        for (int j = 0; j < D / 8; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[m][j][i] *= rescale[i / 2];
      }
    }
    const T* const values = advance(false, tile);
    if (has_keys && call.causal && (tile + 1) * kKeys > row + 1) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
        multiply_ab_causal<T, D, kKeys>(
            sum[m], weights[m], row + 16 * m - tile * kKeys,
            [&](uint32_t (&b)[4], int first_key, int n) { load_b<D>(b, values, first_key, n); });
    } else if (has_keys) {
      multiply_ab<T, D, kKeys, kTiles>(sum, weights, values);
    }
  }

  T* const out = head_of<T>(call.out, task.batch, task.head);
  float* const lse = call.lse + (static_cast<int64_t>(task.batch) * call.heads + task.head) * call.queries;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    float row_lse[2], factor[2];
    finish_softmax(rows[m], scale, row_lse, factor);
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[m][j][i] *= factor[i / 2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query_row = row + 16 * m + lane / 4 + 8 * r;
      if (lane % 4 == 0 && query_row < call.queries) lse[query_row] = row_lse[r];
    }
    // Only this warp reads these rows of the tile of queries, and it no longer needs them.
    store_rows<T, D>(out, call.out.row, row + 16 * m, call.queries, sum[m], warp_tile + 16 * m * D);
  }
}

}  // namespace tinyllm::cuda
