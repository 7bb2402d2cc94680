// Rows of a table looked up by id, plus a row of a second table, and the reverse: each row of a gradient is the sum of
// the rows that contribute to it, in the order of the tokens. There are no atomics, so results are bitwise
// reproducible.
//
// Forward: consecutive threads copy the row of a token, 16 bytes each at a time if rows are aligned, with up to four
// loads of a thread in flight.
//
// Backward: the tokens have been sorted by id, stably. A block has kRunTokens of them, and a thread a column (or 16
// bytes of columns). It sums each run of equal ids in registers, with eight loads in flight. A run inside the block is
// a finished row. Sums of other runs go to a workspace: the tail of the block if the run begins in it, otherwise its
// head. A second kernel adds each tail and the heads that follow it, by eight warps with four loads in flight each.
//
// Why it is fast: every gradient is read once, and every row with a gradient is written once. A run that extends over
// many blocks, such as that of a frequent word, is summed by all of them at the same time. Ids and orders go through
// shared memory, with one load each. For rows of 768 16-bit columns, or 96 vectors, a full multiprocessor has 48 rows
// in flight in forward: 72 KB, three times what hides the latency of memory. The gradients of 8192 tokens form 256
// blocks, two per multiprocessor, with 24 KB in flight each, which is just enough: hence eight rows at a time, and
// registers would allow few more.
#pragma once
#include "device.cuh"

namespace tinyllm::cuda {

constexpr int kRunTokens = 32;
constexpr int kGradsAtOnce = 8;   // rows in flight in the sums of a block
constexpr int kRowsAtOnce = 4;    // rows in flight if several warps sum
constexpr int kSummingWarps = 8;  // warps that sum rows of the same columns
constexpr int kColumnThreads = 256;
constexpr int kPiecesAtOnce = 4;

// The ids, int64 or int32.
struct Ids {
  const void* data;  // (tokens)
  bool is_long;

  TINYLLM_DEVICE int64_t at(int64_t i) const {
    return is_long ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

struct EmbeddingForward {
  Ids ids;                // (tokens)
  const void* weight;     // (table, columns), weight_row elements from row to row
  const void* positions;  // (seq_len, columns), position_row elements from row to row, or null
  void* out;              // (tokens, columns)
  int64_t weight_row, position_row, tokens, table, seq_len;
  int pieces;  // pieces of N elements in a row
};

// blockDim is (threads of a row, tokens). N is the number of elements that a thread moves at a time.
template <class T, int N>
__global__ void __launch_bounds__(kColumnThreads) embedding_forward_kernel(const EmbeddingForward a) {
  using Piece = Packed<T, N>;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= a.tokens) return;
  const int64_t id = a.ids.at(token);
  // An invalid id has no row; its output is NaN.
  const Piece* const from = id >= 0 && id < a.table
                                ? reinterpret_cast<const Piece*>(static_cast<const T*>(a.weight) + id * a.weight_row)
                                : nullptr;
  const Piece* position = nullptr;
  if (a.positions != nullptr)
    position = reinterpret_cast<const Piece*>(static_cast<const T*>(a.positions) + token % a.seq_len * a.position_row);
  Piece* const to = static_cast<Piece*>(a.out) + token * a.pieces;
  const int step = blockDim.x;
  for (int begin = threadIdx.x; begin < a.pieces; begin += kPiecesAtOnce * step) {
    Piece value[kPiecesAtOnce];
#pragma unroll
    for (int u = 0; u < kPiecesAtOnce; ++u) {
      value[u] = packed_filled<T, N>(__builtin_nanf(""));
      if (from != nullptr && begin + u * step < a.pieces) value[u] = from[begin + u * step];
    }
#pragma unroll
    for (int u = 0; u < kPiecesAtOnce; ++u) {
      if (begin + u * step >= a.pieces) continue;
      if (position != nullptr) {
        float x[N], added[N];
        unpack(x, value[u]);
        unpack(added, position[begin + u * step]);
#pragma unroll
        for (int j = 0; j < N; ++j) x[j] += added[j];
        value[u] = packed<T>(x);
      }
      to[begin + u * step] = value[u];
    }
  }
}

// Converts int64 ids to int32, which sorts in half the time. Ids out of range stay so.
__global__ void __launch_bounds__(kColumnThreads) embedding_short_ids_kernel(const int64_t* ids,  // (tokens)
                                                                             int32_t* out,        // (tokens)
                                                                             int64_t tokens, int32_t table) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= tokens) return;
  const int64_t id = ids[i];
  out[i] = id < 0 ? -1 : id >= table ? table : static_cast<int32_t>(id);
}

struct EmbeddingBackward {
  const void* grad;      // (tokens, columns)
  Ids ids;               // (tokens), sorted
  const int64_t* order;  // (tokens): the tokens in the order of ids
  void* grad_weight;     // (table, columns), of zeros
  float* heads;          // sums of runs that continue from the previous block
  float* tails;          // sums of runs that begin here and continue in the next block
  int64_t tokens, table, padding_idx, columns;

  TINYLLM_DEVICE bool is_wanted(int64_t id) const { return id >= 0 && id < table && id != padding_idx; }
};

template <int N>
TINYLLM_DEVICE void store_sums(float* to, const float (&sums)[N]) {
  *reinterpret_cast<Packed<float, N>*>(to) = packed<float>(sums);
}

// gridDim is (blocks of kRunTokens, blocks of columns).
template <class T, int N>
__global__ void __launch_bounds__(kColumnThreads) embedding_sum_runs_kernel(const EmbeddingBackward a) {
  // The ids of the tokens, of the one before and of the one behind; -1 if there is none. Then the tokens.
  int64_t* const ids = reinterpret_cast<int64_t*>(shared_memory());
  int64_t* const tokens = ids + kRunTokens + 2;
  const int64_t block = blockIdx.x, begin = block * kRunTokens;
  for (int i = threadIdx.x; i < kRunTokens + 2; i += blockDim.x) {
    const int64_t place = begin + i - 1;
    ids[i] = place >= 0 && place < a.tokens ? a.ids.at(place) : -1;
    if (i < kRunTokens) tokens[i] = begin + i < a.tokens ? a.order[begin + i] : 0;
  }
  sync_block();
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (column >= a.columns) return;
  const T* const grad = static_cast<const T*>(a.grad) + column;
  const int count = static_cast<int>(a.tokens - begin < kRunTokens ? a.tokens - begin : kRunTokens);
  bool is_head = begin > 0 && ids[0] == ids[1];
  float sums[N] = {};
  for (int group = 0; group < count; group += kGradsAtOnce) {
    Packed<T, N> rows[kGradsAtOnce];
#pragma unroll
    for (int i = 0; i < kGradsAtOnce; ++i)
      if (group + i < count) rows[i] = *reinterpret_cast<const Packed<T, N>*>(grad + tokens[group + i] * a.columns);
#pragma unroll
    for (int i = 0; i < kGradsAtOnce; ++i) {
      const int place = group + i;
      if (place >= count) break;
      float x[N];
      unpack(x, rows[i]);
#pragma unroll
      for (int j = 0; j < N; ++j) sums[j] += x[j];
      const int64_t id = ids[place + 1];
      const bool goes_on = begin + place + 1 < a.tokens && ids[place + 2] == id;
      if (goes_on && place + 1 < kRunTokens) continue;
      if (a.is_wanted(id)) {
        if (is_head)
          store_sums(a.heads + block * a.columns + column, sums);
        else if (goes_on)
          store_sums(a.tails + block * a.columns + column, sums);
        else
          *reinterpret_cast<Packed<T, N>*>(static_cast<T*>(a.grad_weight) + id * a.columns + column) = packed<T>(sums);
      }
      is_head = false;
#pragma unroll
      for (int j = 0; j < N; ++j) sums[j] = 0.0f;
    }
  }
}

// Sums N numbers of each thread over threadIdx.y, in order; only the threads with threadIdx.y 0 get the result.
// `shared` has N * blockDim.x * blockDim.y floats.
template <int N>
TINYLLM_DEVICE void sum_of_rows(float (&sums)[N], float* shared) {
  const int place = threadIdx.y * blockDim.x + threadIdx.x, all = blockDim.x * blockDim.y;
#pragma unroll
  for (int j = 0; j < N; ++j) shared[j * all + place] = sums[j];
  sync_block();
  if (threadIdx.y > 0) return;
  for (unsigned y = 1; y < blockDim.y; ++y)
#pragma unroll
    for (int j = 0; j < N; ++j) sums[j] += shared[j * all + y * blockDim.x + threadIdx.x];
}

// gridDim is (blocks of kRunTokens except the last, from which no run continues; blocks of columns). blockDim is
// (columns, kSummingWarps).
template <class T, int N>
__global__ void __launch_bounds__(kWarp* kSummingWarps) embedding_join_runs_kernel(const EmbeddingBackward a) {
  const int64_t block = blockIdx.x, begin = block * kRunTokens, end = begin + kRunTokens;
  const int64_t id = a.ids.at(end - 1);
  if (a.ids.at(end) != id || !a.is_wanted(id) || (begin > 0 && a.ids.at(begin - 1) == id)) return;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  const bool inside = column < a.columns;
  float sums[N] = {};
  if (inside && threadIdx.y == 0)
    unpack(sums, *reinterpret_cast<const Packed<float, N>*>(a.tails + block * a.columns + column));
  int64_t following = block + 1 + threadIdx.y;
  for (bool more = inside; more; following += kRowsAtOnce * kSummingWarps) {
    Packed<float, N> heads[kRowsAtOnce];
#pragma unroll
    for (int u = 0; u < kRowsAtOnce; ++u) {
      const int64_t at = following + u * kSummingWarps;
      more = at * kRunTokens < a.tokens && a.ids.at(at * kRunTokens) == id;
      heads[u] = packed_filled<float, N>(0.0f);
      if (more) heads[u] = *reinterpret_cast<const Packed<float, N>*>(a.heads + at * a.columns + column);
    }
#pragma unroll
    for (int u = 0; u < kRowsAtOnce; ++u) {
      float x[N];
      unpack(x, heads[u]);
#pragma unroll
      for (int j = 0; j < N; ++j) sums[j] += x[j];
    }
  }
  sum_of_rows(sums, reinterpret_cast<float*>(shared_memory()));
  if (inside && threadIdx.y == 0)
    *reinterpret_cast<Packed<T, N>*>(static_cast<T*>(a.grad_weight) + id * a.columns + column) = packed<T>(sums);
}

// gridDim is (positions, blocks of columns). blockDim is (columns, kSummingWarps).
template <class T, int N>
__global__ void __launch_bounds__(kWarp* kSummingWarps)
    embedding_positions_kernel(const T* grad,      // (batch, seq_len, columns)
                               T* grad_positions,  // (seq_len, columns)
                               int64_t batch, int64_t seq_len, int64_t columns) {
  const int64_t position = blockIdx.x;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  const bool inside = column < columns;
  const T* const from = grad + position * columns + column;
  float sums[N] = {};
  for (int64_t b = threadIdx.y; inside && b < batch; b += kRowsAtOnce * kSummingWarps) {
    Packed<T, N> rows[kRowsAtOnce];
#pragma unroll
    for (int u = 0; u < kRowsAtOnce; ++u) {
      const int64_t at = b + u * kSummingWarps;
      rows[u] = packed_filled<T, N>(0.0f);
      if (at < batch) rows[u] = *reinterpret_cast<const Packed<T, N>*>(from + at * seq_len * columns);
    }
#pragma unroll
    for (int u = 0; u < kRowsAtOnce; ++u) {
      float x[N];
      unpack(x, rows[u]);
#pragma unroll
      for (int j = 0; j < N; ++j) sums[j] += x[j];
    }
  }
  sum_of_rows(sums, reinterpret_cast<float*>(shared_memory()));
  if (inside && threadIdx.y == 0)
    *reinterpret_cast<Packed<T, N>*>(grad_positions + position * columns + column) = packed<T>(sums);
}

}  // namespace tinyllm::cuda
