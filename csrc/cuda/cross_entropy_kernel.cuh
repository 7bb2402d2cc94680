// Cross-entropy over rows of logits. With p = softmax(x), the target t, the class weights w (ones by default), the
// label smoothing s and C classes
//
//   loss         = (1 - s) w_t (lse - x_t) + s / C sum_c w_c (lse - x_c)
//   dloss / dx_c = ((1 - s) w_t + s / C sum w) p_c - s / C w_c - (c == t) (1 - s) w_t
//
// A row is processed by one block, or by one warp if it is short. It is read once for its maximum and the sum of
// exponentials (online softmax, Milakov & Gimelshein 2018): each thread has a maximum of its own, which it updates once
// for sixteen elements (eight with label smoothing), and the threads combine their results after the loop. A second
// pass writes the gradient from what the first one has left in shared memory, where each thread finds its own vectors
// without a barrier or a bank conflict. What does not fit there is read again, backwards, since the caches hold what
// was read last.
//
// Why it is fast: memory is read once and written once, with 16-byte accesses wherever a row begins. For 50,257 classes
// of 16 bits, two blocks of 512 threads share a multiprocessor (384 with label smoothing, whose sums need registers),
// each with its row in shared memory. Four loads per thread are 64 KB in flight, while 4.8 TB/s over 132
// multiprocessors and a latency of 0.7 us require 26 KB; and while one block combines its sums, the other one loads.
// Two exponentials per element, at 16 per clock, take about two thirds of the time of memory and hide behind it. So
// would reads from the second-level cache in the second pass, which shared memory makes unnecessary.
//
// Few launches: the divisor of the mean is a sum over all targets, and rows that scale their gradient by it need it
// before they end. With up to kCountedByRows rows, each of them reads all targets, 8 KB from the second-level cache, in
// less time than a launch takes; for more rows a kernel of one block counts first. Without gradients only the last
// kernel, which sums the losses, needs the divisor, and computes it itself. A call thus takes two launches; three with
// gradients of many rows, or with label smoothing and class weights, whose sum must be known too; and one less without
// a reduction. Every sum has a fixed order.
#pragma once
#include "device.cuh"

namespace tinyllm::cuda {

// The threads of a row: the most, and the number with which two blocks share a multiprocessor. Label smoothing needs
// more registers per thread.
template <bool kSmoothing>
constexpr int kMaxRowThreads = kSmoothing ? 384 : 1024;
template <bool kSmoothing>
constexpr int kRowThreads = kSmoothing ? 384 : 512;
constexpr int kSumThreads = 1024;  // threads of the kernels with one block
constexpr int64_t kCountedByRows = 1024;
constexpr int kVectorsAtOnce = 4;    // loads of a thread that are in flight
constexpr int kElementsTaken = 16;   // elements between two updates of the maximum of a thread
constexpr int kElementsAtOnce = 8;   // loads in flight if the gradient is aligned differently from the row
constexpr int kScratchBytes = 1024;  // for the reductions over the threads of a row
constexpr float kLowest =
    -3.402823466e38f;  // not -inf, because logits that are all -inf must give exponentials of 0, not NaN
constexpr float kInfinity = __builtin_huge_valf();
constexpr float kNan = __builtin_nanf("");

// The targets and their weights. T is the dtype of the logits.
struct Targets {
  const int64_t* target;  // (rows)
  const void* weight;     // (columns), float32 or T, or null: ones
  bool float_weight;
  int64_t rows, ignore_index;
  int columns;

  // Returns -1 if c is not a class.
  TINYLLM_DEVICE int class_or_none(int64_t c) const { return c >= 0 && c < columns ? static_cast<int>(c) : -1; }
  template <class T>
  TINYLLM_DEVICE float weight_of(int c) const {
    if (weight == nullptr) return 1.0f;
    if (sizeof(T) == 4 || float_weight) return static_cast<const float*>(weight)[c];
    return to_float(static_cast<const T*>(weight)[c]);
  }
  // Sums the weights of the targets that are not ignored, over every step-th target from the first on.
  template <class T>
  TINYLLM_DEVICE double counted(int first, int step) const {
    double sum = 0.0;
#pragma unroll 8
    for (int64_t r = first; r < rows; r += step) {
      const int64_t row_target = target[r];
      if (row_target == ignore_index) continue;
      const int c = class_or_none(row_target);
      if (weight == nullptr)
        sum += 1.0;
      else if (c >= 0)
        sum += weight_of<T>(c);
    }
    return sum;
  }
};

struct CrossEntropy {
  Targets targets;
  const void* input;     // (rows, columns), input_row elements from row to row
  const double* totals;  // (2): the divisor of the mean and the sum of the class weights; null: to be counted
  const float* grad;     // (rows), or () with grad_step 0, or null: 1
  float* loss;           // (rows)
  float* max_and_sum;    // (rows, 2)
  void* grad_input;      // (rows, columns), contiguous, or null
  int64_t input_row, grad_step;
  float certain, uniform;  // 1 - s, s / C
  bool averaged;
  int kept;  // number of vectors of a row that shared memory keeps: all, or whole tiles
};

// e^x for x <= 0.
TINYLLM_DEVICE float softmax_exp(float x) { return fast_exp2(x * 1.4426950408889634f); }

// A row: the few elements before its first aligned vector, its vectors, and the few elements behind them. Of these
// edges, the first threads have one element each.
template <class T>
struct Row {
  static constexpr int N = kVector<T>;
  const T* begin;
  int columns, head, vectors;

  TINYLLM_DEVICE Row(const T* begin, int columns) : begin(begin), columns(columns) {
    const int beyond = static_cast<int>(reinterpret_cast<uintptr_t>(begin) % 16 / sizeof(T));
    head = beyond == 0 ? 0 : N - beyond < columns ? N - beyond : columns;
    vectors = (columns - head) / N;
  }
  // The column of the edges that belongs to a thread, or -1.
  TINYLLM_DEVICE int edge(int thread) const {
    if (thread < N) return thread < head ? thread : -1;
    const int column = head + vectors * N + thread - N;
    return thread < 2 * N && column < columns ? column : -1;
  }
};

// The statistics of a row, of one thread or combined.
struct RowSums {
  float max = kLowest, sum = 0.0f;
  float distances = 0.0f;  // sum_c w_c (x_c - near); with label smoothing only
  float counted = 0.0f;    // the divisor of the mean, if the rows count it
};

template <bool kSmoothing>
TINYLLM_DEVICE void combine_warp(RowSums& s, bool counting) {
  const float max = warp_max(s.max);
  s.sum = warp_sum(s.sum * softmax_exp(s.max - max));
  s.max = max;
  if (kSmoothing) s.distances = warp_sum(s.distances);
  if (counting) s.counted = warp_sum(s.counted);
}

// Combines the statistics over the threads of a row; all of them get the same bits.
template <bool kSmoothing>
TINYLLM_DEVICE void combine(RowSums& s, bool counting, unsigned char* scratch) {
  combine_warp<kSmoothing>(s, counting);
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (warps == 1) return;
  float* const floats = reinterpret_cast<float*>(scratch);
  if (lane == 0) {
    floats[warp] = s.max;
    floats[kWarp + warp] = s.sum;
    if (kSmoothing) floats[2 * kWarp + warp] = s.distances;
    if (counting) floats[3 * kWarp + warp] = s.counted;
  }
  sync_block();
  s = RowSums{};
  if (lane < warps) {
    s.max = floats[lane];
    s.sum = floats[kWarp + lane];
    if (kSmoothing) s.distances = floats[2 * kWarp + lane];
    if (counting) s.counted = floats[3 * kWarp + lane];
  }
  combine_warp<kSmoothing>(s, counting);
}

// The coefficients of the gradient of the logits of a row.
struct GradientTerms {
  int label;  // -1 if the target is no class; then everything is NaN
  float max, factor, target_offset, class_offset;
};

// (1 - s) w_t, or NaN if the target is no class.
template <class T>
TINYLLM_DEVICE float label_coefficient(const CrossEntropy& a, int label) {
  return label >= 0 ? a.targets.weight_of<T>(label) * a.certain : kNan;
}

// The factor of the gradient of a row: the upstream gradient of its loss, divided by the divisor of the mean.
TINYLLM_DEVICE float gradient_scale(const CrossEntropy& a, int64_t row, float counted) {
  const float scale = a.grad == nullptr ? 1.0f : a.grad[row * a.grad_step];
  return a.averaged ? scale / (a.totals == nullptr ? counted : static_cast<float>(a.totals[0])) : scale;
}

TINYLLM_DEVICE float sum_of_weights(const CrossEntropy& a) {
  return a.targets.weight == nullptr ? static_cast<float>(a.targets.columns) : static_cast<float>(a.totals[1]);
}

template <bool kSmoothing>
TINYLLM_DEVICE GradientTerms terms_of(const CrossEntropy& a, int label, float hard, float max, float sum, float scale) {
  const float total = kSmoothing ? hard + a.uniform * sum_of_weights(a) : hard;
  return {label, max, scale * total / sum, scale * hard, scale * a.uniform};
}

template <class T, bool kSmoothing>
TINYLLM_DEVICE float gradient_of(const CrossEntropy& a, const GradientTerms& terms, float x, int column) {
  float value = softmax_exp(x - terms.max) * terms.factor;
  if (kSmoothing) value -= a.targets.weight_of<T>(column) * terms.class_offset;
  return value;
}

// The first vector of a thread in a tile; the others are kWarp apart. The lanes of a warp have consecutive vectors, so
// that one address serves all accesses.
template <int kAtOnce>
TINYLLM_DEVICE int first_of_tile() {
  return threadIdx.x / kWarp * (kAtOnce * kWarp) + threadIdx.x % kWarp;
}

// Writes the gradient of `count` pieces of N elements from column `head` on; if `kept` is not null, the first a.kept
// pieces of the row are in shared memory.
template <class T, int N, int kAtOnce, bool kSmoothing>
TINYLLM_DEVICE void write_pieces(const CrossEntropy& a, const GradientTerms& terms, const T* x, T* out, int head,
                                 int count, const Packed<T, N>* kept) {
  const int tile = kAtOnce * blockDim.x;
  for (int begin = (count - 1) / tile * tile; begin >= 0; begin -= tile) {
    const int first = begin + first_of_tile<kAtOnce>(), left = count - first;
    const Packed<T, N>* const from = reinterpret_cast<const Packed<T, N>*>(x + head) + first;
    Packed<T, N>* const to = reinterpret_cast<Packed<T, N>*>(out + head) + first;
    Packed<T, N> v[kAtOnce];
    if (kept != nullptr && begin < a.kept) {
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u)
        if (u * kWarp < left) v[u] = kept[first + u * kWarp];
    } else {
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u)
        if (u * kWarp < left) v[u] = load_streaming(from + u * kWarp);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (u * kWarp >= left) continue;
      const int column = head + (first + u * kWarp) * N;
      float value[N];
      unpack(value, v[u]);
#pragma unroll
      for (int j = 0; j < N; ++j) value[j] = gradient_of<T, kSmoothing>(a, terms, value[j], column + j);
      if (static_cast<unsigned>(terms.label - column) < N) {
#pragma unroll
        for (int j = 0; j < N; ++j)
          if (terms.label == column + j) value[j] -= terms.target_offset;
      }
      store_streaming(to + u * kWarp, packed<T>(value));
    }
  }
}

template <class T, bool kSmoothing>
TINYLLM_DEVICE void write_gradient(const CrossEntropy& a, const GradientTerms& terms, const Row<T>& x, int64_t row,
                                   const Packed<T, kVector<T>>* kept) {
  T* const out = static_cast<T*>(a.grad_input) + row * x.columns;
  if ((reinterpret_cast<uintptr_t>(out) - reinterpret_cast<uintptr_t>(x.begin)) % 16 != 0) {
    write_pieces<T, 1, kElementsAtOnce, kSmoothing>(a, terms, x.begin, out, 0, x.columns, nullptr);
    return;
  }
  const int edge = x.edge(threadIdx.x);
  const float at_edge = edge >= 0 ? to_float(x.begin[edge]) : 0.0f;
  write_pieces<T, kVector<T>, kVectorsAtOnce, kSmoothing>(a, terms, x.begin, out, x.head, x.vectors, kept);
  if (edge < 0) return;
  const float value = gradient_of<T, kSmoothing>(a, terms, at_edge, edge);
  out[edge] = from_float<T>(edge == terms.label ? value - terms.target_offset : value);
}

template <class T>
TINYLLM_DEVICE void zero_gradient(const CrossEntropy& a, int64_t row) {
  const Row<T> out(static_cast<const T*>(a.grad_input) + row * a.targets.columns, a.targets.columns);
  T* const begin = const_cast<T*>(out.begin);
  const Packed<T, kVector<T>> zeros{};
  for (int i = threadIdx.x; i < out.vectors; i += blockDim.x)
    store_streaming(reinterpret_cast<Packed<T, kVector<T>>*>(begin + out.head) + i, zeros);
  const int edge = out.edge(threadIdx.x);
  if (edge >= 0) begin[edge] = from_float<T>(0.0f);
}

// Adds M vectors, kWarp apart, with the first at `column`, to the statistics of a thread.
template <class T, int M, bool kSmoothing>
TINYLLM_DEVICE void accumulate(const Targets& targets, const Packed<T, kVector<T>>* v, int column, int columns,
                               float near, RowSums& s) {
  constexpr int N = kVector<T>;
  float x[M][N], higher = s.max;
#pragma unroll
  for (int u = 0; u < M; ++u) {
    unpack(x[u], v[u]);
#pragma unroll
    for (int j = 0; j < N; ++j) higher = fmaxf(higher, x[u][j]);
  }
  s.sum *= softmax_exp(s.max - higher);
  s.max = higher;
#pragma unroll
  for (int u = 0; u < M; ++u) {
    float exps = 0.0f;
#pragma unroll
    for (int j = 0; j < N; ++j) exps += softmax_exp(x[u][j] - higher);
    s.sum += exps;
    const int begin = column + u * kWarp * N;
    if (kSmoothing && begin < columns) {
      float distances = 0.0f;
#pragma unroll
      for (int j = 0; j < N; ++j) distances += targets.weight_of<T>(begin + j) * (x[u][j] - near);
      s.distances += distances;
    }
  }
}

// Computes the part of a thread in the statistics of a row: maximum, sum of exponentials, and distances.
template <class T, bool kSmoothing>
TINYLLM_DEVICE void read_row(const CrossEntropy& a, const Row<T>& x, float near, Packed<T, kVector<T>>* kept,
                             RowSums& s) {
  constexpr int N = kVector<T>, kTaken = kSmoothing ? 1 : kElementsTaken / N;  // distances need registers as well
  const int edge = x.edge(threadIdx.x);
  const float at_edge = edge >= 0 ? to_float(x.begin[edge]) : 0.0f;  // has arrived when the loop ends
  const int tile = kVectorsAtOnce * blockDim.x;
  for (int begin = 0; begin < x.vectors; begin += tile) {
    const int first = begin + first_of_tile<kVectorsAtOnce>(), left = x.vectors - first;
    const Packed<T, N>* const from = reinterpret_cast<const Packed<T, N>*>(x.begin + x.head) + first;
    Packed<T, N> v[kVectorsAtOnce];
#pragma unroll
    for (int u = 0; u < kVectorsAtOnce; ++u) {
      v[u] = packed_filled<T, N>(-kInfinity);
      if (u * kWarp < left) v[u] = from[u * kWarp];
    }
    if (begin < a.kept) {
#pragma unroll
      for (int u = 0; u < kVectorsAtOnce; ++u)
        if (u * kWarp < left) kept[first + u * kWarp] = v[u];
    }
#pragma unroll
    for (int u = 0; u < kVectorsAtOnce; u += kTaken)
      accumulate<T, kTaken, kSmoothing>(a.targets, v + u, x.head + (first + u * kWarp) * N, x.head + x.vectors * N,
                                        near, s);
  }
  if (edge < 0) return;
  const float higher = fmaxf(s.max, at_edge);
  s.sum = s.sum * softmax_exp(s.max - higher) + softmax_exp(at_edge - higher);
  s.max = higher;
  if (kSmoothing) s.distances += a.targets.weight_of<T>(edge) * (at_edge - near);
}

// blockDim is (threads of a row, rows); there are several rows only if each has one warp.
TINYLLM_DEVICE int64_t row_of_block() { return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; }

template <class T>
TINYLLM_DEVICE Row<T> input_row(const CrossEntropy& a, int64_t row) {
  return {static_cast<const T*>(a.input) + row * a.input_row, a.targets.columns};
}

template <class T, bool kSmoothing>
__global__ void __launch_bounds__(kMaxRowThreads<kSmoothing>, 1024 / kMaxRowThreads<kSmoothing>)
    cross_entropy_forward_kernel(const CrossEntropy a) {
  const int64_t row = row_of_block();
  if (row >= a.targets.rows) return;
  const int64_t target = a.targets.target[row];
  if (target == a.targets.ignore_index) {
    if (threadIdx.x == 0) {
      a.loss[row] = 0.0f;
      a.max_and_sum[2 * row] = 0.0f;
      a.max_and_sum[2 * row + 1] = 1.0f;
    }
    if (a.grad_input != nullptr) zero_gradient<T>(a, row);
    return;
  }
  const Row<T> x = input_row<T>(a, row);
  const int label = a.targets.class_or_none(target);
  const float at_target = label >= 0 ? to_float(x.begin[label]) : kNan;
  // Label smoothing sums distances from a logit that is known in advance; sums of large logits would cancel.
  const float near = fabsf(at_target) < kInfinity ? at_target : 0.0f;
  unsigned char* const shared = shared_memory();
  auto* const kept = reinterpret_cast<Packed<T, kVector<T>>*>(shared + kScratchBytes) + threadIdx.y * a.kept;
  const bool counting = a.averaged && a.grad_input != nullptr && a.totals == nullptr;

  RowSums s;
  if (counting) s.counted = static_cast<float>(a.targets.counted<T>(threadIdx.x, blockDim.x));
  read_row<T, kSmoothing>(a, x, near, kept, s);
  combine<kSmoothing>(s, counting, shared);

  const float hard = label_coefficient<T>(a, label);
  if (threadIdx.x == 0) {
    const float log_sum = logf(s.sum);
    float loss = hard * (log_sum - (at_target - s.max));
    if (kSmoothing) loss += a.uniform * (sum_of_weights(a) * (log_sum + (s.max - near)) - s.distances);
    a.loss[row] = loss;
    a.max_and_sum[2 * row] = s.max;
    a.max_and_sum[2 * row + 1] = s.sum;
  }
  if (a.grad_input == nullptr) return;
  const float scale = gradient_scale(a, row, s.counted);
  write_gradient<T, kSmoothing>(a, terms_of<kSmoothing>(a, label, hard, s.max, s.sum, scale), x, row, kept);
}

template <class T, bool kSmoothing>
__global__ void __launch_bounds__(kMaxRowThreads<kSmoothing>, 1024 / kMaxRowThreads<kSmoothing>)
    cross_entropy_backward_kernel(const CrossEntropy a) {
  const int64_t row = row_of_block();
  if (row >= a.targets.rows) return;
  const int64_t target = a.targets.target[row];
  if (target == a.targets.ignore_index) {
    zero_gradient<T>(a, row);
    return;
  }
  const Row<T> x = input_row<T>(a, row);
  const int label = a.targets.class_or_none(target);
  const float hard = label_coefficient<T>(a, label);
  const float max = a.max_and_sum[2 * row], sum = a.max_and_sum[2 * row + 1];
  RowSums s;
  if (a.averaged && a.totals == nullptr) {
    s.counted = static_cast<float>(a.targets.counted<T>(threadIdx.x, blockDim.x));
    combine<false>(s, true, shared_memory());
  }
  const float scale = gradient_scale(a, row, s.counted);
  write_gradient<T, kSmoothing>(a, terms_of<kSmoothing>(a, label, hard, max, sum, scale), x, row, nullptr);
}

// Sums over the threads of a block; all of them get the result. `shared` has 32 numbers, which must not be used
// otherwise until all threads have passed the next barrier.
TINYLLM_DEVICE double sum_over_block(double x, double* shared) {
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  x = warp_sum(x);
  if (warps == 1) return x;
  if (lane == 0) shared[warp] = x;
  sync_block();
  return warp_sum(lane < warps ? shared[lane] : 0.0);
}

// Launched with one block.
template <class T>
__global__ void __launch_bounds__(kSumThreads) cross_entropy_totals_kernel(const Targets targets,
                                                                           double* totals,  // (2)
                                                                           bool divisor, bool sum_weights) {
  double* const shared = reinterpret_cast<double*>(shared_memory());
  if (divisor) {
    const double sum = sum_over_block(targets.counted<T>(threadIdx.x, blockDim.x), shared);
    if (threadIdx.x == 0) totals[0] = sum;
  }
  if (sum_weights) {
    double sum = 0.0;
#pragma unroll 8
    for (int c = threadIdx.x; c < targets.columns; c += blockDim.x) sum += targets.weight_of<T>(c);
    sum = sum_over_block(sum, shared + kWarp);
    if (threadIdx.x == 0) totals[1] = sum;
  }
}

// Launched with one block.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    cross_entropy_reduce_kernel(const Targets targets,
                                const float* loss,     // (rows)
                                const double* totals,  // (2), or null if this kernel counts the divisor
                                float* out,            // ()
                                bool averaged) {
  double* const shared = reinterpret_cast<double*>(shared_memory());
  double divisor = 1.0, sum = 0.0;
  if (averaged) {
    divisor =
        totals != nullptr ? totals[0] : sum_over_block(targets.counted<T>(threadIdx.x, blockDim.x), shared + kWarp);
  }
#pragma unroll 8
  for (int64_t r = threadIdx.x; r < targets.rows; r += blockDim.x) sum += loss[r];
  sum = sum_over_block(sum, shared);
  if (threadIdx.x == 0) *out = static_cast<float>(sum / divisor);
}

}  // namespace tinyllm::cuda
