// Shared by the attention kernels for Hopper: blocks of one producer and two consumer warpgroups, and tiles in shared
// memory.
//
// One thread of the first warpgroup, which releases its registers, keeps TMA busy through a ring of stages. The other
// two warpgroups, with 64 rows of the block each, run the matmuls (wgmma) and the softmax in registers. While one of
// them processes its scores, the tensor cores execute the matmuls of the other (Shah et al. 2024, "FlashAttention-3").
// A tile of D columns is stored as D / 64 panels of 128-byte rows, swizzled, which TMA writes and wgmma reads directly:
// K-major along the rows, MN-major across them, so that nothing is transposed in memory.
//
// The kernels are written with the instructions themselves, not with CuTe: the wrappers in platform_sm90.cuh are all
// that these three kernels need, they compile in seconds, the same source runs on the CPU in tests, and there is one
// dependency less.
#pragma once
#include "attention.cuh"
#include "attention_tile.cuh"
#include "platform_sm90.cuh"

namespace tinyllm::cuda {

constexpr int kGroupThreads = 128;  // threads of a warpgroup
constexpr int kGroupRows = 64;      // rows of a wgmma
constexpr int kConsumers = 2;       // consumer warpgroups
constexpr int kBlockRows = kConsumers * kGroupRows;
constexpr int kHopperThreads = (kConsumers + 1) * kGroupThreads;
constexpr int kConsumerWarps = kConsumers * kGroupThreads / kWarp;
// 128 * 24 + 256 * 240 of the 65,536 registers of a multiprocessor.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

// Named barriers: one per consumer for its turn to issue matmuls, one for each consumer alone, and one for both.
constexpr int kTurnBarrier = 1, kOwnBarrier = kTurnBarrier + kConsumers, kBothBarrier = kOwnBarrier + kConsumers;

// kRows rows of kColumns columns in shared memory, panel by panel.
template <int kRows, int kColumns>
struct Tile {
  static constexpr int kPanels = kColumns / kBoxColumns;
  static constexpr uint32_t kPanelBytes = kRows * kBoxColumns * 2, kBytes = kPanels * kPanelBytes;

  unsigned char* at;

  // The K-major operand: columns 16 k ... 16 k + 15 of the rows from first_row on, which go along M or N.
  TINYLLM_DEVICE uint64_t k_major(int first_row, int k) const {
    return smem_descriptor<false>(at + k / 4 * kPanelBytes + first_row * (kBoxColumns * 2) + k % 4 * 32);
  }
  // The MN-major operand: rows 16 k ... 16 k + 15, which go along K, with all columns along N.
  TINYLLM_DEVICE uint64_t mn_major(int k) const {
    return smem_descriptor<true>(at + k * 16 * (kBoxColumns * 2), kPanelBytes);
  }
  // Starts the copy of the tile; to be called by one thread, after the barrier has been told to expect the bytes.
  TINYLLM_DEVICE void load(const TensorMap& map, Barrier* barrier, int first_row, int head, int batch) const {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      tma_load(at + panel * kPanelBytes, map, barrier, panel * kBoxColumns, first_row, head, batch);
  }
};

// The number of this warp. A shuffle tells the compiler that all lanes agree on it; after branches that could diverge
// within a warp, it would serialise wgmma.
TINYLLM_DEVICE int warp_number() { return shuffle(static_cast<int>(threadIdx.x) / kWarp, 0); }

// The next stage of a ring, and the parity of its phase, which is 0 in the first round.
template <int kStages>
struct PipelineState {
  int stage = 0;
  uint32_t parity = 0;

  TINYLLM_DEVICE void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Tells the producer that this consumer warp has read a stage, after all its lanes have.
TINYLLM_DEVICE void release_stage(Barrier* empty) {
  sync_warp();
  if (threadIdx.x % kWarp == 0) barrier_arrive(empty);
}

// d (64 x kRowsB) = a b^T over D columns, for the 64 rows of a from first_row on.
template <class T, int D, int kRowsA, int kRowsB>
TINYLLM_DEVICE void multiply_abt(float (&d)[kRowsB / 8][4], const Tile<kRowsA, D>& a, int first_row,
                                 const Tile<kRowsB, D>& b) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) wgmma<T, false>(d, a.k_major(first_row, k), b.k_major(0, k), k > 0);
}

// d (64 x D) += a (64 x kRows, in registers) b.
template <class T, int D, int kRows>
TINYLLM_DEVICE void multiply_add(float (&d)[D / 8][4], const uint32_t (&a)[kRows / 16][4], const Tile<kRows, D>& b) {
#pragma unroll
  for (int k = 0; k < kRows / 16; ++k) wgmma<T, true>(d, a[k], b.mn_major(k), true);
}

// Zeroes the rows of a tile from first_row on. Keys or values beyond the end of the sequence may hold anything, and 0
// times NaN is NaN. Both consumers call this when the tile has arrived; `barrier` is a named one of both.
template <int D, int kRows>
TINYLLM_DEVICE void zero_rows(const Tile<kRows, D>& tile, int first_row, int barrier) {
  constexpr int kPieces = kBoxColumns / 8;  // pieces of 16 bytes in a row of a panel
  const int pieces = (kRows - first_row) * kPieces;
  for (int i = threadIdx.x - kGroupThreads; i < pieces; i += kConsumers * kGroupThreads)
#pragma unroll
    for (int panel = 0; panel < Tile<kRows, D>::kPanels; ++panel)
      *reinterpret_cast<uint4*>(tile.at + panel * Tile<kRows, D>::kPanelBytes + (first_row * kPieces + i) * 16) =
          make_uint4(0, 0, 0, 0);
  fence_async_proxy();
  named_barrier_sync(barrier, kConsumers * kGroupThreads);
}

template <int N>
TINYLLM_DEVICE void zero(float (&d)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) d[j][i] = 0.0f;
}

// Writes 64 rows of a warpgroup, times a factor for each of the two rows of a lane, to memory. They go through shared
// memory, so that a warp writes whole lines: the rows of `tile` from first_row on, which no other warpgroup uses.
// `barrier` is a named one of this warpgroup, and `limit` the number of rows to write.
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
  named_barrier_sync(barrier, kGroupThreads);
  constexpr int kPieces = D / 8;  // pieces of 16 bytes in a row
#pragma unroll 4
  for (int i = thread; i < kGroupRows * kPieces; i += kGroupThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    const int at =
        piece / 8 * static_cast<int>(Tile<kRows, D>::kPanelBytes) + row * 128 + ((piece % 8) ^ (row % 8)) * 16;
    if (row < limit)
      *reinterpret_cast<uint4*>(out + row * out_row + piece * 8) = *reinterpret_cast<const uint4*>(rows + at);
  }
}

// Recomputes a product with a causal tile whose keys or values hold NaN or infinity, which spread to queries that do
// not see them: sum (0 before the product) = weights times rows, as in multiply_ab_causal. With such a number no row of
// the product is finite, so either row of a lane shows it. To be called after the product, before the tile is released.
template <class T, int D, int N>
TINYLLM_DEVICE void redo_if_not_finite(float (&sum)[D / 8][4], const uint32_t (&weights)[N / 16][4], int ahead,
                                       const Tile<N, D>& rows) {
  float zeros[2] = {0.0f, 0.0f};
#pragma unroll
  for (int j = 0; j < D / 8; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) zeros[i] = fmaf(sum[j][i], 0.0f, zeros[i]);
  if (!any_lane(zeros[0] + zeros[1] != 0.0f)) return;
  zero(sum);
  // A panel has the layout of a tile of kBoxColumns columns in attention_tile.cuh.
  multiply_ab_causal<T, D, N>(sum, weights, ahead, [&](uint32_t (&b)[4], int row, int n) {
    constexpr int kSteps = kBoxColumns / 16;
    const unsigned char* const panel = rows.at + n / kSteps * static_cast<int>(Tile<N, D>::kPanelBytes);
    load_b<kBoxColumns>(b, reinterpret_cast<const T*>(panel), row, n % kSteps);
  });
}

// ---- On the host

// Makes the tensor map of a tensor for boxes of box_rows rows, and returns whether TMA supports it.
bool make_tensor_map(const Heads& heads, bool is_bf16, int batch, int num_heads, int rows, int columns, int box_rows,
                     TensorMap& map);

}  // namespace tinyllm::cuda
