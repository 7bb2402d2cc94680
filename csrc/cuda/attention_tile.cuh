// Tiles of attention scores in a warp's registers, as the tensor cores leave them: of 16 rows and N columns, lane l
// holds in scores[j] the rows g = l / 4 (first two numbers) and g + 8 (last two), columns 8 j + l % 4 * 2 and the next.
// And tiles of queries, keys or values in shared memory, for the kernels that read them by load_matrices.
#pragma once
#include "attention.cuh"
#include "device.cuh"

namespace tinyllm::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInfinity = __builtin_huge_valf();

// How many of a sequence's keys any query sees: no more than its length and, with causal, than there are queries.
TINYLLM_DEVICE int visible_keys(const Attention& call, int batch) {
  const int keys = call.causal ? min(call.keys, call.queries) : call.keys;
  if (call.key_lengths == nullptr) return keys;
  const int64_t length = call.long_lengths ? static_cast<const int64_t*>(call.key_lengths)[batch]
                                           : static_cast<const int32_t*>(call.key_lengths)[batch];
  return static_cast<int>(length < 0 ? 0 : length > keys ? keys : length);
}

// Sets what belongs to a key beyond the visible ones or, with causal, later than its query: scores to -inf. row,
// column: which query and key the tile begins with; of transposed scores, whose rows are keys, which key and query.
template <int N, bool kTransposed = false>
TINYLLM_DEVICE void hide(float (&scores)[N / 8][4], int row, int column, int visible, bool causal,
                         float to = -kInfinity) {
  const int lane = threadIdx.x % kWarp, first_row = row + lane / 4, first_column = column + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < N / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int across = first_row + i / 2 * 8, along = first_column + 8 * j + i % 2;
      const int key = kTransposed ? across : along, query = kTransposed ? along : across;
      if (key >= visible || (causal && key > query)) scores[j][i] = to;
    }
}

// The softmax of rows whose scores come tile by tile (Milakov & Gimelshein 2018): of the lane's two rows, the largest
// score so far, and this lane's share of the sum of exp2((score - largest) * scale).
struct RowStates {
  float largest[2] = {-kInfinity, -kInfinity};
  float sum[2] = {0.0f, 0.0f};
};

// Turns scores into weights; rescale: what everything summed before is to be multiplied by. scale includes log2(e).
template <int N>
TINYLLM_DEVICE void update(float (&scores)[N / 8][4], RowStates& rows, float scale, float (&rescale)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = scores[0][2 * r];
#pragma unroll
    for (int j = 0; j < N / 8; ++j) largest = fmaxf(largest, fmaxf(scores[j][2 * r], scores[j][2 * r + 1]));
    largest = fmaxf(largest, shuffle_xor(largest, 1));
    largest = fmaxf(largest, shuffle_xor(largest, 2));
    largest = fmaxf(largest, rows.largest[r]);
    // A row that has seen no key yet: -inf - -inf would be NaN.
    const float shift = largest == -kInfinity ? 0.0f : largest * scale;
    rescale[r] = fast_exp2(rows.largest[r] * scale - shift);
    rows.largest[r] = largest;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; ++i) {
        scores[j][i] = fast_exp2(fmaf(scores[j][i], scale, -shift));
        sum += scores[j][i];
      }
    rows.sum[r] = rows.sum[r] * rescale[r] + sum;
  }
}

// The whole rows' log2 of the sum of exp2, and what their accumulated values are to be multiplied by. Of a row that saw
// no key: -inf and 0.
TINYLLM_DEVICE void finish(RowStates& rows, float scale, float (&lse)[2], float (&factor)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = rows.sum[r];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    const bool blind = sum == 0.0f;
    lse[r] = blind ? -kInfinity : rows.largest[r] * scale + log2f(sum);
    factor[r] = blind ? 0.0f : 1.0f / sum;
  }
}

// Columns 16 k ... 16 k + 15 as the first factor of a product, in 16 bits.
template <class T, int N>
TINYLLM_DEVICE void as_factor(const float (&scores)[N / 8][4], int k, uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = pack<T>(scores[2 * k + i / 2][i % 2 * 2], scores[2 * k + i / 2][i % 2 * 2 + 1]);
}

template <class T, int N>
TINYLLM_DEVICE void as_factors(const float (&scores)[N / 8][4], uint32_t (&a)[N / 16][4]) {
#pragma unroll
  for (int k = 0; k < N / 16; ++k) as_factor<T, N>(scores, k, a[k]);
}

// What a block may have of shared memory on every GPU from 8.0 on.
constexpr size_t kSharedEverywhere = 99 * 1024;

// ---- Tiles in shared memory: rows of D numbers of 16 bits, in columns of 16 bytes. Column c of row r lies where
// column c ^ r % 8 would, so that the same column of eight rows, which is what load_matrices reads at a time, lies in
// 32 different banks; and so do eight neighbouring columns of a row, which is what copies write at a time.

template <int D>
TINYLLM_DEVICE int place_in_tile(int row, int column) {
  return row * D + (column ^ (row % 8)) * 8;
}

// What copy_rows is to read for a thread (0 ... THREADS - 1) of a head's rows from `first` on.
template <int D, class T>
TINYLLM_DEVICE const T* source_of(const T* head, int64_t stride, int first, int thread) {
  return head + (first + thread / (D / 8)) * stride + thread % (D / 8) * 8;
}

// Asks for ROWS rows of a head; zeros after the first `left`.
template <int D, int ROWS, int THREADS, class T>
TINYLLM_DEVICE void copy_rows(T* tile, const T* source, int64_t stride, int left, int thread) {
  constexpr int kColumns = D / 8, kRowsAtOnce = THREADS / kColumns;
  static_assert(ROWS % kRowsAtOnce == 0);
  const int column = thread % kColumns, row = thread / kColumns;
#pragma unroll
  for (int i = 0; i < ROWS; i += kRowsAtOnce)
    copy_async(tile + place_in_tile<D>(row + i, column), source + i * stride, row + i < left);
}

// The address of column `half` + 2 k of a tile's row `lane_row` + row, where row is a multiple of 8 and known to the
// compiler. A tile begins at a multiple of its rows' size, so that swizzling is one XOR of the whole address, made anew
// for each k from one register that serves all.
template <int D, class T>
TINYLLM_DEVICE const void* swizzled(const T* tile, int lane_row, int half, int row, int k) {
  const unsigned at = static_cast<unsigned>(reinterpret_cast<const unsigned char*>(tile) - shared_memory()) +
                      static_cast<unsigned>(lane_row * D * 2 + (half ^ lane_row % 8) * 16);
  return shared_memory() + (at ^ static_cast<unsigned>(32 * k)) + row * D * 2;
}

// Rows row ... row + 15 and columns 16 k ... 16 k + 15 of a tile, as the first factor of a product.
template <int D, class T>
TINYLLM_DEVICE void load_first(uint32_t (&a)[4], const T* tile, int row, int k) {
  const int lane = threadIdx.x % kWarp;
  load_matrices(a, swizzled<D>(tile, lane % 16, lane / 16, row, k));
}

// The same numbers, transposed, as the second factor of two products: columns (of the factor) row ... row + 7 in b[0]
// and b[1], the next eight in b[2] and b[3]. The halves of a pair must be neighbours: so the hardware wants them.
template <int D, class T>
TINYLLM_DEVICE void load_second_transposed(uint32_t (&b)[4], const T* tile, int row, int k) {
  const int lane = threadIdx.x % kWarp;
  load_matrices(b, swizzled<D>(tile, lane % 8 + lane / 16 * 8, lane / 8 % 2, row, k));
}

// The same numbers, as they are, as the second factor of two products: columns 16 k ... 16 k + 7 in b[0] and b[1], the
// next eight in b[2] and b[3].
template <int D, class T>
TINYLLM_DEVICE void load_second(uint32_t (&b)[4], const T* tile, int row, int k) {
  const int lane = threadIdx.x % kWarp;
  load_matrices_transposed(b, swizzled<D>(tile, lane % 16, lane / 16, row, k));
}

// (16 M x N) += first (16 M x D) second^T (D x N): both factors in tiles' rows, the first's already in registers.
template <class T, int D, int N, int M>
TINYLLM_DEVICE void multiply_rows(float (&sum)[M][N / 8][4], const uint32_t (&first)[M][D / 16][4], const T* second) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k)
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
      uint32_t b[4];
      load_second_transposed<D>(b, second, 16 * n, k);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply<T>(sum[m][2 * n], first[m][k], b[0], b[1]);
        multiply<T>(sum[m][2 * n + 1], first[m][k], b[2], b[3]);
      }
    }
}

// The same with the first factor in a tile too.
template <class T, int D, int N, int M>
TINYLLM_DEVICE void multiply_rows(float (&sum)[M][N / 8][4], const T* first, const T* second) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_first<D>(a[m], first, 16 * m, k);
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
      uint32_t b[4];
      load_second_transposed<D>(b, second, 16 * n, k);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply<T>(sum[m][2 * n], a[m], b[0], b[1]);
        multiply<T>(sum[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// (16 M x D) += weights (16 M x N) rows (N x D): scores turned weights, in 16 bits by as_factors, times a tile.
template <class T, int D, int N, int M>
TINYLLM_DEVICE void multiply_weights(float (&sum)[M][D / 8][4], const uint32_t (&weights)[M][N / 16][4],
                                     const T* rows) {
#pragma unroll
  for (int k = 0; k < N / 16; ++k)
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[4];
      load_second<D>(b, rows, 16 * k, n);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply<T>(sum[m][2 * n], weights[m][k], b[0], b[1]);
        multiply<T>(sum[m][2 * n + 1], weights[m][k], b[2], b[3]);
      }
    }
}

// ---- Causal tiles on the diagonal. A key or value that a query does not see may hold anything, and 0 times NaN is
// NaN: products must not have both. Of 16 queries by 16 keys only those on the diagonal are seen in part.

// Whether one of two numbers is infinite or NaN.
template <class T>
TINYLLM_DEVICE bool not_finite(uint32_t pair) {
  constexpr uint32_t kExponent = std::is_same_v<T, bf16> ? 0x7f80 : 0x7c00;
  return (pair & kExponent) == kExponent || (pair >> 16 & kExponent) == kExponent;
}

// sum (16 x 8) += weights (16 x 16) rows (16 x 8), where query i sees keys 0 ... i: key by key, each only for the
// queries that see it. b0, b1: the rows as multiply's second factor.
template <class T>
TINYLLM_DEVICE void multiply_triangle(float (&sum)[4], const uint32_t (&weights)[4], uint32_t b0, uint32_t b1) {
#pragma unroll 1
  for (int key = 0; key < 16; ++key) {
    const int lane = recomputed(threadIdx.x % kWarp);
    const uint32_t own = lane % 4 != key % 8 / 2 ? 0 : key % 2 == 0 ? 0xffffu : 0xffff0000u;
    float more[4] = {sum[0], sum[1], sum[2], sum[3]};
    multiply<T>(more, weights, b0 & (key < 8 ? own : 0), b1 & (key < 8 ? 0 : own));
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = lane / 4 + i / 2 * 8 >= key ? more[i] : sum[i];
  }
}

// multiply_weights of 16 queries that see the keys up to their own number, the first of them `ahead` (a multiple of 16)
// of the tile's first key. load(b, row, n) loads the second factor of rows row ... row + 15, columns 16 n ... 16 n
// + 15.
template <class T, int D, int N, class Load>
TINYLLM_DEVICE void multiply_seen_weights(float (&sum)[D / 8][4], const uint32_t (&weights)[N / 16][4], int ahead,
                                          const Load& load) {
  uint32_t diagonal[4] = {weights[0][0], weights[0][1], weights[0][2], weights[0][3]};
#pragma unroll
  for (int k = 0; k < N / 16; ++k) {
    if (16 * k < ahead) {
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        uint32_t b[4];
        load(b, 16 * k, n);
        multiply<T>(sum[2 * n], weights[k], b[0], b[1]);
        multiply<T>(sum[2 * n + 1], weights[k], b[2], b[3]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) diagonal[i] = 16 * k == ahead ? weights[k][i] : diagonal[i];
  }
  if (ahead < 0 || ahead >= N) return;
#pragma unroll
  for (int n = 0; n < D / 16; ++n) {
    uint32_t b[4];
    load(b, ahead, n);
    if (any_lane(not_finite<T>(b[0]) || not_finite<T>(b[1]) || not_finite<T>(b[2]) || not_finite<T>(b[3]))) {
      multiply_triangle<T>(sum[2 * n], diagonal, b[0], b[1]);
      multiply_triangle<T>(sum[2 * n + 1], diagonal, b[2], b[3]);
    } else {
      multiply<T>(sum[2 * n], diagonal, b[0], b[1]);
      multiply<T>(sum[2 * n + 1], diagonal, b[2], b[3]);
    }
  }
}

// A warp's 16 rows of sums, in 16 bits, to rows first ... first + 15 of a head below row `end`, through 16 rows of
// shared memory that belong to this warp, so that a store takes 16 bytes and neighbouring lanes neighbouring ones.
template <class T, int D>
TINYLLM_DEVICE void store_rows(T* head, int64_t stride, int first, int end, const float (&sum)[D / 8][4], T* tile) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int j = 0; j < D / 8; ++j)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      T* const to = tile + place_in_tile<D>(lane / 4 + 8 * r, j) + lane % 4 * 2;
      *reinterpret_cast<uint32_t*>(to) = pack<T>(sum[j][2 * r], sum[j][2 * r + 1]);
    }
  sync_warp();
  constexpr int kColumns = D / 8, kRowsAtOnce = kWarp / kColumns;
  const int column = lane % kColumns, row = lane / kColumns;
#pragma unroll
  for (int i = row; i < 16; i += kRowsAtOnce)
    if (first + i < end)
      *reinterpret_cast<uint4*>(head + (first + i) * stride + column * 8) =
          *reinterpret_cast<const uint4*>(tile + place_in_tile<D>(i, column));
}

template <class T>
TINYLLM_DEVICE T* head_of(const Heads& heads, int batch, int head) {
  return static_cast<T*>(heads.data) + batch * heads.batch + head * heads.head;
}

// ---- Which part of the work is a block's

// The last rows of a causal head have the most keys, the first keys the most queries: the longest blocks go first, so
// that short ones fill the end. Of not more heads at once than the cache keeps what their blocks share.
struct Place {
  int block, head, batch;
};
TINYLLM_DEVICE Place place_of(int blocks, int heads, int heads_of_all, int heads_at_once, bool last_first) {
  const int at_once = heads_at_once * blocks, bunch = blockIdx.x / at_once, rest = blockIdx.x % at_once;
  const int bunch_heads =
      heads_of_all - bunch * heads_at_once < heads_at_once ? heads_of_all - bunch * heads_at_once : heads_at_once;
  const int block = rest / bunch_heads, head = bunch * heads_at_once + rest % bunch_heads;
  return {last_first ? blocks - 1 - block : block, head % heads, head / heads};
}

// heads_at_once for heads that share so many bytes: half of what the smaller second-level caches hold.
inline int heads_that_fit(int64_t bytes_of_one, int64_t heads_of_all) {
  constexpr int64_t kCache = 16 << 20;
  const int64_t fit = kCache / (bytes_of_one > 0 ? bytes_of_one : 1);
  return static_cast<int>(fit < 1 ? 1 : fit > heads_of_all ? heads_of_all : fit);
}

}  // namespace tinyllm::cuda
