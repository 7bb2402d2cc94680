// Layer normalisation, backward, and that of the root mean square norm (mean is null there). With g = grad * weight and
// n = (x - mean) * rstd, of each row
//
//     grad_input  = rstd * (g - mean(g) - n * mean(g * n))      (RMS: without mean(g))
//     grad_weight = sum over rows of grad * n
//     grad_bias   = sum over rows of grad
//
// One block a multiprocessor (two for short rows) holds several groups of threads; each takes rows of its own, a grid's
// width apart, and meets the others only at the end. The sums over rows stay in registers, 64 of a thread's 128, so
// that there is one partial sum a block to write, and a second small kernel adds them in their order: no atomics, the
// same bits each time. x and grad come through shared memory by asynchronous copies, one or two rows ahead (48 to 128
// KB a multiprocessor under way), so memory is busy while a row is reduced; each thread reads back only what it copied
// itself, for both passes over a row, so that the staging costs no barrier.
// Rows that move element by element are read again in the second pass, from the caches.
#pragma once
#include "layer_norm_kernel.cuh"

namespace tinyllm::cuda {

// Few or many: the most threads of a block of backward, and how many blocks a multiprocessor has registers for.
constexpr int backward_threads(bool few) { return few ? 256 : kNormThreads; }
constexpr int backward_blocks(bool few) { return few ? 3 : 1; }

struct NormBackward {
  const void* grad;      // (rows, columns), grad_row elements from row to row
  const void* grad_sum;  // likewise, or null: added to grad_input
  const void* input;     // likewise: what was normalised
  NormParameter weight;
  const float* mean;    // (rows) or null
  const float* rstd;    // (rows)
  void* grad_input;     // (rows, columns)
  float* weight_parts;  // (parts, columns) or null; a part for each block or cluster
  float* bias_parts;    // likewise
  int64_t grad_row, grad_sum_row, input_row;
  int64_t rows;
  int columns;
  int vectors;  // of a row in a thread, at most
  int stages;   // rows on their way to shared memory, 1 or 2
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

// A block's part of a parameter's gradient: over the rows that its threads had at a time, in their order.
template <int W, int N>
TINYLLM_DEVICE void write_part(const float (&sum)[N][W], float* part, float* shared, int columns, int first,
                               int count) {
  const int step = blockDim.x, rows = blockDim.y;
  if (rows > 1) sync_block();  // nobody needs what the memory had
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
    trap();  // it is compiled for chips without clusters: the host does not launch it, on whatever chip it runs
  } else {
    using V = Packed<T, W>;
    constexpr bool kStaged = W > 1;  // in shared memory; asynchronous copies have 16 bytes
    constexpr int kTogether = W > 1 ? 1 : kCluster ? 2 : 4;
    NormSums* const sums = reinterpret_cast<NormSums*>(shared_memory());
    V* const staged = reinterpret_cast<V*>(shared_memory() + kNormSumBytes);
    int step = blockDim.x;
    const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * step + threadIdx.x;
    const NormSpan span = norm_span<W, kCluster>(a.columns);
    const int first = span.first + threadIdx.x, vectors = span.count - static_cast<int>(threadIdx.x);

    // The rows that a warp has at a time are neighbours, and warps of different blocks take turns: whatever the number
    // of rows, all multiprocessors get about as many. The loop's end is one for the warp, which shuffles together.
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
    // Where this thread keeps a vector of a stage: of grad, input and grad_sum.
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
            copy_async(slot(stage, 0, j), grad + j * step, true);
            copy_async(slot(stage, 1, j), input + j * step, true);
            if (a.grad_sum != nullptr) copy_async(slot(stage, 2, j), grad_sum + j * step, true);
          }
        }
        commit_copies();
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
          wait_copies<1>();
        else
          wait_copies<0>();
      }
      // grad, (x - mean) * rstd and grad * weight of kTogether vectors from j0 on.
      const auto read = [&](int j0, float (&g)[kTogether][W], float (&n)[kTogether][W], float (&gw)[kTogether][W]) {
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          const int j = j0 + k;
          const bool inside = kTogether == 1 || j * step < count;
          if constexpr (kStaged) {
            unpack(g[k], *slot(stage, 0, j));
            unpack(n[k], *slot(stage, 1, j));
          } else {
            // The first of two times: the caches are to keep it.
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

      float along[2] = {0.0f, 0.0f};  // of g, and of g * n
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
            along[0] += gw[k][i];
            along[1] += gw[k][i] * n[k][i];
          }
        }
      }
      row_sum<kCluster, true>(along, sums[turn]);
      step = recomputed(step);
      const float along_one = a.mean != nullptr ? along[0] / static_cast<float>(a.columns) * rstd : 0.0f;
      const float along_n = along[1] / static_cast<float>(a.columns) * rstd;

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
            result[i] = gw[k][i] * rstd - along_one - n[k][i] * along_n;
          }
          if (a.grad_sum != nullptr) {
            float more[W];
            if constexpr (kStaged)
              unpack(more, *slot(stage, 2, j));
            else
              unpack(more, load_once(grad_sum_of(row) + j * step));
#pragma unroll
            for (int i = 0; i < W; ++i) result[i] += more[i];
          }
          grad_input[j * step] = packed<T>(result);
        }
      }
      fetch(row + a.stages * row_step, stage);  // this thread alone reads its slots, and has done so
      stage = stage + 1 < a.stages ? stage + 1 : 0;
    }

    if constexpr (kStaged) wait_copies<0>();
    float* const shared = reinterpret_cast<float*>(staged);
    if (a.weight_parts != nullptr)
      write_part(weight_sum, a.weight_parts + part * a.columns, shared, a.columns, first, vectors);
    if (a.bias_parts != nullptr)
      write_part(bias_sum, a.bias_parts + part * a.columns, shared, a.columns, first, vectors);
    if constexpr (kCluster) end_of_cluster();  // others may still read this block's sums
  }
}

// Adds the parts of a parameter's gradient, of the weight for blockIdx.y 0, of the bias for 1.
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
