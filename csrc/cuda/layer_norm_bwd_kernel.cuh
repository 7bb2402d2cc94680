// The backward kernel of layer normalisation and of root mean square normalisation (mean is null). With g = grad *
// weight and n = (x - mean) * rstd, for each row
//
//     grad_input  = rstd * (g - mean(g) - n * mean(g * n))      (RMS: without mean(g))
//     grad_weight = sum over rows of grad * n
//     grad_bias   = sum over rows of grad
//
// A multiprocessor has one block (more for short rows) with several groups of threads. Each group processes rows of its
// own, a grid's width apart, and meets the others only at the end. The sums over rows stay in registers, 64 of the 128
// of a thread, so that a block writes one partial sum. A second small kernel adds these in their order: results are
// bitwise reproducible, without atomics. x and grad are copied to shared memory by cp.async one or two rows ahead (48
// to 128 KB in flight per multiprocessor), so that memory is busy while a row is reduced. Each thread reads only what
// it has copied itself, in both passes over a row, so the staging needs no barrier. Rows that are accessed element by
// element are read again in the second pass, from the caches.
#pragma once
#include "layer_norm_kernel.cuh"

namespace tinyllm::cuda {

// The most threads of a block of backward, and the number of blocks for which a multiprocessor has registers, with few
// or many vectors in a thread.
constexpr int backward_threads(bool few) { return few ? 256 : kNormThreads; }
constexpr int backward_blocks(bool few) { return few ? 3 : 1; }

struct NormBackward {
  const void* grad;      // (rows, columns), grad_row elements from row to row
  const void* grad_sum;  // likewise, or null; added to grad_input
  const void* input;     // likewise; what was normalised
  NormParameter weight;
  const float* mean;    // (rows) or null
  const float* rstd;    // (rows)
  void* grad_input;     // (rows, columns)
  float* weight_parts;  // (parts, columns) or null; one part for each block or cluster
  float* bias_parts;    // likewise
  int64_t grad_row, grad_sum_row, input_row;
  int64_t rows;
  int columns;
  int vectors;  // the most vectors of a row in a thread
  int stages;   // rows in flight to shared memory, 1 or 2
};

template <int W>
TINYLLM_DEVICE void store_floats(float* to, const float (&x)[W]) {
  constexpr int kPiece = W < 4 ? W : 4;
#pragma unroll
  for (int i = 0; i < W; i += kPiece) {
    Vector<float, kPiece> piece;
#pragma unroll
    for (int j = 0; j < kPiece; ++j) piece.at[j] = x[i + j];
    *reinterpret_cast<Vector<float, kPiece>*>(to + i) = piece;
  }
}

// Writes the partial gradient of a parameter of this block: the sum over its groups of threads, in their order.
template <int W, int N>
TINYLLM_DEVICE void write_part(const float (&sum)[N][W], float* part, float* shared, int columns, int first,
                               int count) {
  const int step = blockDim.x, rows = blockDim.y;
  if (rows > 1) sync_block();  // no thread needs the previous contents of the memory any more
  float* const to = (rows == 1 ? part : shared + threadIdx.y * columns) + first * W;
#pragma unroll
  for (int j = 0; j < N; ++j)
    if (j * step < count) store_floats(to + j * step * W, sum[j]);
  if (rows == 1) return;
  sync_block();
  for (int column = threadIdx.y * step + threadIdx.x; column < columns; column += rows * step) {
    float total = 0.0f;
    for (int row = 0; row < rows; ++row) total += shared[row * columns + column];
    part[column] = total;
  }
}

template <class T, int W, int N, bool kCluster>
__global__ void __launch_bounds__(backward_threads(N* W < kNormElements), backward_blocks(N* W < kNormElements))
    norm_backward_kernel(const NormBackward a) {
  if constexpr (kCluster && !kClusters) {
    trap();  // code without clusters, which the host does not launch on any chip
  } else {
    using V = Packed<T, W>;
    constexpr bool kStaged = W > 1;  // whether rows go through shared memory; cp.async copies 16 bytes
    constexpr int kTogether = W > 1 ? 1 : kCluster ? 2 : 4;
    NormSums* const sums = reinterpret_cast<NormSums*>(shared_memory());
    V* const staged = reinterpret_cast<V*>(shared_memory() + kNormSumBytes);
    int step = blockDim.x;
    const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * step + threadIdx.x;
    const NormSpan span = norm_span<W, kCluster>(a.columns);
    const int first = span.first + threadIdx.x, vectors = span.count - static_cast<int>(threadIdx.x);

    // The rows that a warp processes at a time are consecutive, and warps of different blocks take turns, so that all
    // multiprocessors get about as many rows whatever their number. All lanes leave the loop together, because they
    // shuffle.
    const int at_a_time = step < kWarp ? kWarp / step : 1;
    const int64_t part = kCluster ? blockIdx.x / cluster_blocks() : blockIdx.x;
    const int64_t parts = kCluster ? gridDim.x / cluster_blocks() : gridDim.x;
    const int in_turn = threadIdx.y % at_a_time;
    const int64_t row_step = parts * blockDim.y;
    int64_t row = (part + parts * (threadIdx.y / at_a_time)) * at_a_time + in_turn;

    const auto grad_of = [&](int64_t r) {
      return reinterpret_cast<const V*>(static_cast<const T*>(a.grad) + r * a.grad_row) + first;
    };
    const auto input_of = [&](int64_t r) {
      return reinterpret_cast<const V*>(static_cast<const T*>(a.input) + r * a.input_row) + first;
    };
    const auto grad_sum_of = [&](int64_t r) {
      return reinterpret_cast<const V*>(static_cast<const T*>(a.grad_sum) + r * a.grad_sum_row) + first;
    };
    // The place of a vector of this thread in a stage: of grad, input or grad_sum.
    const int arrays = a.grad_sum != nullptr ? 3 : 2;
    const auto slot = [&](int stage, int array, int j) {
      return staged + ((stage * arrays + array) * a.vectors + j) * threads + thread;
    };
    const auto fetch = [&](int64_t r, int stage) {
      if constexpr (kStaged) {
        if (r < a.rows) {
          const V *const grad = grad_of(r), *const input = input_of(r), *const grad_sum = grad_sum_of(r);
#pragma unroll
          for (int j = 0; j < N; ++j) {
            if (j * step >= vectors) break;
            cp_async(slot(stage, 0, j), grad + j * step, true);
            cp_async(slot(stage, 1, j), input + j * step, true);
            if (a.grad_sum != nullptr) cp_async(slot(stage, 2, j), grad_sum + j * step, true);
          }
        }
        cp_async_commit();
      }
    };

    float weight_sum[N][W] = {}, bias_sum[N][W] = {};
    fetch(row, 0);
    if (a.stages == 2) fetch(row + row_step, 1);
    float next_mean = 0.0f, next_rstd = 0.0f;
    const auto fetch_statistics = [&](int64_t r) {
      if (r >= a.rows) return;
      next_rstd = a.rstd[r];
      if (a.mean != nullptr) next_mean = a.mean[r];
    };
    fetch_statistics(row);
    for (int stage = 0, turn = 0; row - in_turn < a.rows; row += row_step, turn ^= 1) {
      const float mean = next_mean, rstd = next_rstd;
      step = recomputed(step);
      fetch_statistics(row + row_step);
      const int count = row < a.rows ? vectors : 0;
      V* const grad_input = reinterpret_cast<V*>(static_cast<T*>(a.grad_input) + row * a.columns) + first;
      if constexpr (kStaged) {
        if (a.stages == 2)
          cp_async_wait<1>();
        else
          cp_async_wait<0>();
      }
      // Computes grad, n and g of kTogether vectors from j0 on.
      const auto read = [&](int j0, float (&g)[kTogether][W], float (&n)[kTogether][W], float (&gw)[kTogether][W]) {
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          const int j = j0 + k;
          const bool inside = kTogether == 1 || j * step < count;
          if constexpr (kStaged) {
            unpack(g[k], *slot(stage, 0, j));
            unpack(n[k], *slot(stage, 1, j));
          } else {
            // The caches should keep it, because it is read twice.
            const V grad = inside ? load_constant(grad_of(row) + j * step) : V{};
            const V input = inside ? load_constant(input_of(row) + j * step) : V{};
            unpack(g[k], grad);
            unpack(n[k], input);
          }
          if (a.weight.data != nullptr && inside) load_parameter<T>(gw[k], a.weight, first + j * step);
        }
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
#pragma unroll
          for (int i = 0; i < W; ++i) {
            n[k][i] = (n[k][i] - mean) * rstd;
            gw[k][i] = a.weight.data != nullptr ? g[k][i] * gw[k][i] : g[k][i];
          }
        }
      };

      float sums_of_row[2] = {0.0f, 0.0f};  // sum(g) and sum(g * n)
#pragma unroll
      for (int j0 = 0; j0 < N; j0 += kTogether) {
        if (j0 * step >= count) break;
        float g[kTogether][W], n[kTogether][W], gw[kTogether][W];
        read(j0, g, n, gw);
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          if (kTogether > 1 && (j0 + k) * step >= count) continue;
#pragma unroll
          for (int i = 0; i < W; ++i) {
            sums_of_row[0] += gw[k][i];
            sums_of_row[1] += gw[k][i] * n[k][i];
          }
        }
      }
      row_sum<kCluster, true>(sums_of_row, sums[turn]);
      step = recomputed(step);
      const float mean_gw = a.mean != nullptr ? sums_of_row[0] / static_cast<float>(a.columns) * rstd : 0.0f;
      const float mean_gw_n = sums_of_row[1] / static_cast<float>(a.columns) * rstd;

#pragma unroll
      for (int j0 = 0; j0 < N; j0 += kTogether) {
        if (j0 * step >= count) break;
        float g[kTogether][W], n[kTogether][W], gw[kTogether][W];
        read(j0, g, n, gw);
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          const int j = j0 + k;
          if (kTogether > 1 && j * step >= count) continue;
          float result[W];
#pragma unroll
          for (int i = 0; i < W; ++i) {
            weight_sum[j][i] += g[k][i] * n[k][i];
            bias_sum[j][i] += g[k][i];
            result[i] = gw[k][i] * rstd - mean_gw - n[k][i] * mean_gw_n;
          }
          if (a.grad_sum != nullptr) {
            float more[W];
            if constexpr (kStaged)
              unpack(more, *slot(stage, 2, j));
            else
              unpack(more, load_streaming(grad_sum_of(row) + j * step));
#pragma unroll
            for (int i = 0; i < W; ++i) result[i] += more[i];
          }
          grad_input[j * step] = packed<T>(result);
        }
      }
      fetch(row + a.stages * row_step, stage);  // only this thread reads its slots, and it has done so
      stage = stage + 1 < a.stages ? stage + 1 : 0;
    }

    if constexpr (kStaged) cp_async_wait<0>();
    float* const shared = reinterpret_cast<float*>(staged);
    if (a.weight_parts != nullptr)
      write_part(weight_sum, a.weight_parts + part * a.columns, shared, a.columns, first, vectors);
    if (a.bias_parts != nullptr)
      write_part(bias_sum, a.bias_parts + part * a.columns, shared, a.columns, first, vectors);
    if constexpr (kCluster) cluster_exit_barrier();  // other blocks may still read the sums of this one
  }
}

// Adds the partial gradients of a parameter: of the weight if blockIdx.y is 0, of the bias if it is 1.
constexpr int kPartColumns = 32, kPartRows = 16;
static __global__ void __launch_bounds__(kPartColumns* kPartRows)
    norm_sum_parts_kernel(const float* weight_parts,  // (count, columns)
                          const float* bias_parts,    // likewise
                          float* grad_weight,         // (columns)
                          float* grad_bias,           // likewise
                          int count, int columns) {
  float* const shared = reinterpret_cast<float*>(shared_memory());  // (kPartRows, kPartColumns)
  const float* const parts = blockIdx.y == 0 ? weight_parts : bias_parts;
  const int column = blockIdx.x * kPartColumns + threadIdx.x;
  float sum = 0.0f;
  if (column < columns) {
#pragma unroll 4
    for (int part = threadIdx.y; part < count; part += kPartRows)
      sum += parts[static_cast<int64_t>(part) * columns + column];
  }
  shared[threadIdx.y * kPartColumns + threadIdx.x] = sum;
  sync_block();
  if (threadIdx.y != 0 || column >= columns) return;
  for (int row = 1; row < kPartRows; ++row) sum += shared[row * kPartColumns + threadIdx.x];
  (blockIdx.y == 0 ? grad_weight : grad_bias)[column] = sum;
}

}  // namespace tinyllm::cuda
