// What Hopper's attention kernels share: blocks of a producer and two consumer warpgroups, and tiles in shared memory.
//
// One thread of the first warpgroup, which gives its registers away, keeps the copy engine busy (TMA) through a ring of
// stages; the other two warpgroups, 64 rows of the block each, multiply (wgmma) and do the softmax in registers. While
// one of them works on its scores, the tensor cores have the other's products (Shah et al. 2024, "FlashAttention-3").
// A tile of D columns lies in D / 64 panels of 128-byte rows, swizzled, which TMA writes and wgmma reads as they are:
// along its rows as a K-major factor, and across them as an N-major one, so nothing is transposed in memory.
//
// Written against the instructions, not CuTe: the wrappers of platform_sm90.cuh are all that these three kernels need,
// a build takes seconds, the same source runs on the CPU for tests, and there is one dependency less.
#pragma once
#include "attention.cuh"
#include "attention_tile.cuh"
#include "platform_sm90.cuh"

namespace tinyllm::cuda {

constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kGroupRows = 64;      // that it multiplies at once
constexpr int kConsumers = 2;       // warpgroups
constexpr int kBlockRows = kConsumers * kGroupRows;
constexpr int kHopperThreads = (kConsumers + 1) * kGroupThreads;
constexpr int kConsumerWarps = kConsumers * kGroupThreads / kWarp;
// 128 * 24 + 256 * 240 of a multiprocessor's 65,536 registers.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

// Named barriers: each consumer's turn to issue, each consumer's own, and one of both.
constexpr int kTurnBarrier = 1, kOwnBarrier = kTurnBarrier + kConsumers, kBothBarrier = kOwnBarrier + kConsumers;

// Rows of a tile of kColumns columns, panel after panel.
template <int kRows, int kColumns>
struct Tile {
  static constexpr int kPanels = kColumns / kBoxColumns;
  static constexpr uint32_t kPanelBytes = kRows * kBoxColumns * 2, kBytes = kPanels * kPanelBytes;

  unsigned char* at;

  // The factor whose rows go along the product's M or N: columns 16 k ... of the rows from first_row on.
  TINYLLM_DEVICE uint64_t along_rows(int first_row, int k) const {
    return factor<false>(at + k / 4 * kPanelBytes + first_row * (kBoxColumns * 2) + k % 4 * 32);
  }
  // The factor whose rows go along K: rows 16 k ..., all columns along N.
  TINYLLM_DEVICE uint64_t along_columns(int k) const {
    return factor<true>(at + k * 16 * (kBoxColumns * 2), kPanelBytes);
  }
  // One thread has the tile's bytes brought, for the barrier that has been told to expect them.
  TINYLLM_DEVICE void load(const TensorMap& map, Barrier* barrier, int first_row, int head, int batch) const {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      copy_box(at + panel * kPanelBytes, map, barrier, panel * kBoxColumns, first_row, head, batch);
  }
};

// The warp's and the warpgroup's number. By way of a shuffle, so that the compiler knows that a warp's lanes agree: in
// branches that could part them it would make the products wait for each other.
TINYLLM_DEVICE int warp_number() { return shuffle(static_cast<int>(threadIdx.x) / kWarp, 0); }

// Which stage of a ring is next, and the parity of its phase: 0 in the first round.
template <int kStages>
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  TINYLLM_DEVICE void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// A consumer warp has read what it wanted; its lanes agree first.
TINYLLM_DEVICE void release(Barrier* empty) {
  sync_warp();
  if (threadIdx.x % kWarp == 0) barrier_arrive(empty);
}

// d (64 x kRows of b) = rows of a from first_row on times b's rows, over D columns.
template <class T, int D, int kRowsA, int kRowsB>
TINYLLM_DEVICE void multiply_rows(float (&d)[kRowsB / 8][4], const Tile<kRowsA, D>& a, int first_row,
                                  const Tile<kRowsB, D>& b) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) multiply_async<T, false>(d, a.along_rows(first_row, k), b.along_rows(0, k), k > 0);
}

// d (64 x D) += a (64 x kRows, in registers) times b.
template <class T, int D, int kRows>
TINYLLM_DEVICE void multiply_add(float (&d)[D / 8][4], const uint32_t (&a)[kRows / 16][4], const Tile<kRows, D>& b) {
#pragma unroll
  for (int k = 0; k < kRows / 16; ++k) multiply_async<T, true>(d, a[k], b.along_columns(k), true);
}

// Rows of keys or values that take no part may hold anything, and 0 times NaN is NaN: both consumers call this for a
// tile that has come, with the first such row. barrier: a named one of theirs.
template <int D, int kRows>
TINYLLM_DEVICE void clear_rows(const Tile<kRows, D>& tile, int first_row, int barrier) {
  constexpr int kPieces = kBoxColumns / 8;  // of 16 bytes in a row of a panel
  const int pieces = (kRows - first_row) * kPieces;
  for (int i = threadIdx.x - kGroupThreads; i < pieces; i += kConsumers * kGroupThreads)
#pragma unroll
    for (int panel = 0; panel < Tile<kRows, D>::kPanels; ++panel)
      *reinterpret_cast<uint4*>(tile.at + panel * Tile<kRows, D>::kPanelBytes + (first_row * kPieces + i) * 16) =
          make_uint4(0, 0, 0, 0);
  stores_for_products();
  named_sync(barrier, kConsumers * kGroupThreads);
}

template <int N>
TINYLLM_DEVICE void clear(float (&d)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) d[j][i] = 0.0f;
}

// A warpgroup's 64 rows of a result, times a factor for each of the lane's two rows, go to memory by way of shared
// memory: a warp writes whole lines. rows: the panels' place of these 64 rows, which nobody else uses; barrier: a named
// one of the warpgroup's own; limit: rows that there are, from the first on.
template <class T, int D, int kRows>
TINYLLM_DEVICE void store_rows(const float (&d)[D / 8][4], const float (&by)[2], const Tile<kRows, D>& tile,
                               int first_row, int barrier, T* out, int64_t out_row, int limit) {
  const int thread = threadIdx.x % kGroupThreads, lane = thread % kWarp;
  unsigned char* const rows = tile.at + first_row * (kBoxColumns * 2);
#pragma unroll
  for (int j = 0; j < D / 8; ++j)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = thread / kWarp * 16 + lane / 4 + 8 * r;
      const int at = j / 8 * static_cast<int>(Tile<kRows, D>::kPanelBytes) + row * 128 + ((j % 8) ^ (row % 8)) * 16;
      *reinterpret_cast<uint32_t*>(rows + at + lane % 4 * 4) = pack<T>(d[j][2 * r] * by[r], d[j][2 * r + 1] * by[r]);
    }
  named_sync(barrier, kGroupThreads);
  constexpr int kPieces = D / 8;  // of 16 bytes in a row
#pragma unroll 4
  for (int i = thread; i < kGroupRows * kPieces; i += kGroupThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    const int at =
        piece / 8 * static_cast<int>(Tile<kRows, D>::kPanelBytes) + row * 128 + ((piece % 8) ^ (row % 8)) * 16;
    if (row < limit)
      *reinterpret_cast<uint4*>(out + row * out_row + piece * 8) = *reinterpret_cast<const uint4*>(rows + at);
  }
}

// Makes a causal tile's product right, where its keys or values hold NaN or infinity, which poison the queries that do
// not see them too: sum (0 before it) = weights times the rows again, as multiply_seen_weights does. With such a number
// no row of the product is finite, so one of the lane's two tells. After the product, before the tile is released.
template <class T, int D, int N>
TINYLLM_DEVICE void mend_product(float (&sum)[D / 8][4], const uint32_t (&weights)[N / 16][4], int ahead,
                                 const Tile<N, D>& rows) {
  float zeros[2] = {0.0f, 0.0f};
#pragma unroll
  for (int j = 0; j < D / 8; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) zeros[i] = fmaf(sum[j][i], 0.0f, zeros[i]);
  if (!any_lane(zeros[0] + zeros[1] != 0.0f)) return;
  clear(sum);
  // A panel is a tile of kBoxColumns columns as attention_tile.cuh has them.
  multiply_seen_weights<T, D, N>(sum, weights, ahead, [&](uint32_t (&b)[4], int row, int n) {
    constexpr int kSteps = kBoxColumns / 16;
    const unsigned char* const panel = rows.at + n / kSteps * static_cast<int>(Tile<N, D>::kPanelBytes);
    load_second<kBoxColumns>(b, reinterpret_cast<const T*>(panel), row, n % kSteps);
  });
}

// ---- On the host

// Whether the copy engine can read it, and how; rows of a box.
bool describe(const Heads& heads, bool is_bf16, int batch, int num_heads, int rows, int columns, int box_rows,
              TensorMap& map);

}  // namespace tinyllm::cuda
