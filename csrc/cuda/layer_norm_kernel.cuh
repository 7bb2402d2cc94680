// Layer normalisation over rows, with an optional residual added first, and without mean and bias (mean is null) root
// mean square normalisation: the forward kernel, and what it shares with backward (layer_norm_bwd_kernel.cuh).
//
// Memory bandwidth is the limit, so each element is read and written once, 16 bytes at a time, with many loads in
// flight.
//
// In forward, a row is processed by 1 to 512 threads of a block, with up to 32 elements each in registers. All loads of
// a row are in flight together (64 or 128 bytes per thread, 64 KB and more per multiprocessor), mean and variance are
// computed from the registers in two exact passes, and while one block reduces, others load. A row of up to 1024
// elements belongs to one warp, which waits for no other. If there are fewer rows than multiprocessors, more threads
// share a row.
//
// A row of more than 16,384 elements is split over a cluster of up to 8 blocks, which exchange their sums through each
// other's shared memory. Rows of odd widths or alignments are accessed element by element, consecutive elements by
// consecutive threads.
#pragma once
#include "cluster.cuh"
#include "device.cuh"

namespace tinyllm::cuda {

constexpr int kNormThreads = 512;  // the most threads of a block
constexpr int kNormElements = 32;  // the most elements of a row in a thread
constexpr int kNormWarps = kNormThreads / kWarp;

// The number of vectors of W elements in a thread: few for short rows, otherwise as many as fit the registers.
template <int W>
constexpr int kFewVectors = W == 1 ? 4 : 1;
template <int W>
constexpr int kManyVectors = kNormElements / W;

// A weight or bias, in the dtype of the rows or float32.
struct NormParameter {
  const void* data;  // (columns) or null
  bool is_float;
};

struct NormForward {
  const void* input;     // (rows, columns), input_row elements from row to row
  const void* residual;  // likewise, or null
  NormParameter weight, bias;
  void* normed;  // (rows, columns)
  void* sum;     // (rows, columns): input + residual; null without residual
  float* mean;   // (rows) or null
  float* rstd;   // (rows)
  int64_t input_row, residual_row;
  int64_t rows;
  int columns;
  float eps;
};

// ---- The threads of a row: blockDim.x, a power of two up to a warp, otherwise whole warps. A block processes
// blockDim.y rows.

// Shared memory for reductions: the sums of each warp and, in a cluster, of the block. Two of these alternate, so that
// one barrier per reduction suffices.
struct NormSums {
  float warps[2][kNormWarps], block[2];
};
constexpr size_t kNormSumBytes = 1024;
static_assert(2 * sizeof(NormSums) <= kNormSumBytes);

// Sums S numbers of each thread over a row; all its threads get the same bits. kSeveral: a block may have several rows
// of several warps each. The compiler does not know the numbers of their barriers and reserves all 16 that a block can
// have; four such blocks take all barriers of a multiprocessor, so kernels of which more would fit must not use it.
template <bool kCluster, bool kSeveral, int S>
TINYLLM_DEVICE void row_sum(float (&x)[S], NormSums& shared) {
  const int threads = blockDim.x;
  if (threads < kWarp) {
    for (int lanes = threads / 2; lanes > 0; lanes /= 2) {
#pragma unroll
      for (int i = 0; i < S; ++i) x[i] += shuffle_xor(x[i], lanes);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < S; ++i) x[i] = warp_sum(x[i]);
  const int warps = threads / kWarp, first = threadIdx.y * warps;
  if (warps > 1) {
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int i = 0; i < S; ++i) shared.warps[i][first + threadIdx.x / kWarp] = x[i];
    }
    if (!kSeveral || blockDim.y == 1)
      sync_block();
    else
      named_barrier_sync(1 + threadIdx.y, threads);
#pragma unroll
    for (int i = 0; i < S; ++i) {
      x[i] = 0.0f;
      for (int warp = 0; warp < warps; ++warp) x[i] += shared.warps[i][first + warp];
    }
  }
  if constexpr (kCluster) {
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < S; ++i) shared.block[i] = x[i];
    }
    sync_cluster();
    const unsigned blocks = cluster_blocks();
#pragma unroll
    for (int i = 0; i < S; ++i) {
      x[i] = 0.0f;
      for (unsigned rank = 0; rank < blocks; ++rank) x[i] += read_shared_of_block(&shared.block[i], rank);
    }
  }
}

// The vectors of a row that belong to this block: all of them, or its part in the cluster.
struct NormSpan {
  int first, count;
};
template <int W, bool kCluster>
TINYLLM_DEVICE NormSpan norm_span(int columns) {
  const int vectors = columns / W;
  if constexpr (!kCluster) return {0, vectors};
  const int blocks = cluster_blocks(), share = (vectors + blocks - 1) / blocks, first = cluster_rank() * share;
  return {first, min(share, vectors - first)};
}

// Loads vector number `vector` of W elements as floats.
template <class T, int W>
TINYLLM_DEVICE void load_parameter(float (&x)[W], const NormParameter& p, int vector) {
  if (sizeof(T) == 4 || p.is_float) {
    constexpr int kPiece = W < 4 ? W : 4;
    const auto* from = static_cast<const Vector<float, kPiece>*>(p.data) + vector * (W / kPiece);
#pragma unroll
    for (int i = 0; i < W; i += kPiece) {
      const Vector<float, kPiece> piece = load_constant(from + i / kPiece);
#pragma unroll
      for (int j = 0; j < kPiece; ++j) x[i + j] = piece.at[j];
    }
  } else {
    unpack(x, load_constant(static_cast<const Packed<T, W>*>(p.data) + vector));
  }
}

// ---- Forward

template <class T, int W, int N, bool kCluster>
__global__ void __launch_bounds__(kNormThreads, N < 32 ? 2 : 1) norm_forward_kernel(const NormForward a) {
  if constexpr (kCluster && !kClusters) {
    trap();  // code without clusters, which the host does not launch on any chip
  } else {
    // Without clusters, either a row has one warp or a block has one row. With clusters kSeveral is set nevertheless:
    // registers limit a multiprocessor to two blocks anyway, and ptxas spills without it.
    using V = Packed<T, W>;
    constexpr int kTogether = W == 1 ? 4 : 1;  // vectors whose parameters are loaded together
    NormSums* const sums = reinterpret_cast<NormSums*>(shared_memory());
    int step = blockDim.x;
    const int64_t row =
        static_cast<int64_t>(kCluster ? blockIdx.x / cluster_blocks() : blockIdx.x) * blockDim.y + threadIdx.y;
    const NormSpan span = norm_span<W, kCluster>(a.columns);
    const int first = span.first + threadIdx.x;
    // The number of vectors from the first one of this thread on; none beyond the last row.
    const int count = row < a.rows ? span.count - static_cast<int>(threadIdx.x) : 0;

    V x[N];
    const V* const input = reinterpret_cast<const V*>(static_cast<const T*>(a.input) + row * a.input_row) + first;
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = j * step < count ? load_streaming(input + j * step) : V{};
    if (a.residual != nullptr) {
      step = recomputed(step);
      const V* const residual =
          reinterpret_cast<const V*>(static_cast<const T*>(a.residual) + row * a.residual_row) + first;
      V* const sum = reinterpret_cast<V*>(static_cast<T*>(a.sum) + row * a.columns) + first;
      constexpr int kAtOnce = N < 4 ? N : 4;
#pragma unroll
      for (int j0 = 0; j0 < N; j0 += kAtOnce) {
        V more[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k)
          more[k] = (j0 + k) * step < count ? load_streaming(residual + (j0 + k) * step) : V{};
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int j = j0 + k;
          float total[W], added[W];
          unpack(total, x[j]);
          unpack(added, more[k]);
#pragma unroll
          for (int i = 0; i < W; ++i) total[i] += added[i];
          // The sum is normalised as it is stored, so that backward sees the same numbers.
          x[j] = packed<T>(total);
          if (j * step < count) sum[j * step] = x[j];
        }
      }
    }

    float mean = 0.0f;
    if (a.mean != nullptr) {
      float total[1] = {0.0f};
#pragma unroll
      for (int j = 0; j < N; ++j) {
        float values[W];
        unpack(values, x[j]);
#pragma unroll
        for (int i = 0; i < W; ++i) total[0] += values[i];
      }
      row_sum<kCluster, kCluster>(total, sums[0]);
      mean = total[0] / static_cast<float>(a.columns);
    }
    step = recomputed(step);
    float squares[1] = {0.0f};
#pragma unroll
    for (int j = 0; j < N; ++j) {
      float values[W];
      unpack(values, x[j]);
      if (j * step < count) {
#pragma unroll
        for (int i = 0; i < W; ++i) squares[0] += (values[i] - mean) * (values[i] - mean);
      }
    }
    row_sum<kCluster, kCluster>(squares, sums[1]);
    const float rstd = 1.0f / sqrtf(squares[0] / static_cast<float>(a.columns) + a.eps);
    if (first == 0 && row < a.rows) {
      if (a.mean != nullptr) a.mean[row] = mean;
      a.rstd[row] = rstd;
    }

    step = recomputed(step);
    V* const normed = reinterpret_cast<V*>(static_cast<T*>(a.normed) + row * a.columns) + first;
#pragma unroll
    for (int j0 = 0; j0 < N; j0 += kTogether) {
      if (j0 * step >= count) break;
      float weight[kTogether][W], bias[kTogether][W];
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if ((j0 + k) * step >= count) continue;
        if (a.weight.data != nullptr) load_parameter<T>(weight[k], a.weight, first + (j0 + k) * step);
        if (a.bias.data != nullptr) load_parameter<T>(bias[k], a.bias, first + (j0 + k) * step);
      }
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        float y[W];
        unpack(y, x[j0 + k]);
#pragma unroll
        for (int i = 0; i < W; ++i) {
          y[i] = (y[i] - mean) * rstd;
          if (a.weight.data != nullptr) y[i] *= weight[k][i];
          if (a.bias.data != nullptr) y[i] += bias[k][i];
        }
        if ((j0 + k) * step < count) normed[(j0 + k) * step] = packed<T>(y);
      }
    }
    if constexpr (kCluster) cluster_exit_barrier();  // other blocks may still read the sums of this one
  }
}

}  // namespace tinyllm::cuda
