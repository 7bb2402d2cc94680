// Tiles of attention scores in the registers of a warp, in the layout of mma: for a tile of 16 rows and N columns, lane
// l holds in scores[j] the rows g = l / 4 (first two numbers) and g + 8 (last two), columns 8 j + l % 4 * 2 and the
// next. Also tiles of queries, keys or values in shared memory, for the kernels that read them by ldmatrix.
#pragma once
#include "attention.cuh"
#include "device.cuh"

namespace tinyllm::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInfinity = __builtin_huge_valf();

// The number of keys of a sequence that any query sees: at most its length and, with a causal mask, the number of
// queries.
TINYLLM_DEVICE int visible_keys(const Attention& call, int batch) {
  const int keys = call.causal ? min(call.keys, call.queries) : call.keys;
  if (call.key_lengths == nullptr) return keys;
  const int64_t length = call.long_lengths ? static_cast<const int64_t*>(call.key_lengths)[batch]
                                           : static_cast<const int32_t*>(call.key_lengths)[batch];
  return static_cast<int>(length < 0 ? 0 : length > keys ? keys : length);
}

// Sets the scores of keys at or beyond `visible` and, with a causal mask, of keys later than their query, to -inf (or
// `to`). `row` and `column` are the query and the key with which the tile begins or, if kTransposed, the key and the
// query.
template <int N, bool kTransposed = false>
TINYLLM_DEVICE void mask_scores(float (&scores)[N / 8][4], int row, int column, int visible, bool causal,
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

// The online softmax (Milakov & Gimelshein 2018) of the two rows of a lane: their largest scores so far, and the part
// of this lane in the sums of exp2((score - largest) * scale).
struct SoftmaxState {
  float largest[2] = {-kInfinity, -kInfinity};
  float sum[2] = {0.0f, 0.0f};
};

// Replaces scores by unnormalised weights. Sums over earlier tiles must be multiplied by `rescale`. `scale` includes
// log2(e).
template <int N>
TINYLLM_DEVICE void update_softmax(float (&scores)[N / 8][4], SoftmaxState& rows, float scale, float (&rescale)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = scores[0][2 * r];
#pragma unroll
    for (int j = 0; j < N / 8; ++j) largest = fmaxf(largest, fmaxf(scores[j][2 * r], scores[j][2 * r + 1]));
    largest = fmaxf(largest, shuffle_xor(largest, 1));
    largest = fmaxf(largest, shuffle_xor(largest, 2));
    largest = fmaxf(largest, rows.largest[r]);
    // For a row that has seen no key yet, -inf - -inf would be NaN.
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

// Computes the lse of whole rows in base 2, and the factor that normalises their sums of values: -inf and 0 for a row
// that saw no key.
TINYLLM_DEVICE void finish_softmax(SoftmaxState& rows, float scale, float (&lse)[2], float (&factor)[2]) {
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

// Rounds columns 16 k ... 16 k + 15 of scores to 16 bits, as a fragment of a.
template <class T, int N>
TINYLLM_DEVICE void as_a_fragment(const float (&scores)[N / 8][4], int k, uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = pack<T>(scores[2 * k + i / 2][i % 2 * 2], scores[2 * k + i / 2][i % 2 * 2 + 1]);
}

template <class T, int N>
TINYLLM_DEVICE void as_a_fragments(const float (&scores)[N / 8][4], uint32_t (&a)[N / 16][4]) {
#pragma unroll
  for (int k = 0; k < N / 16; ++k) as_a_fragment<T, N>(scores, k, a[k]);
}

// The shared memory that a block may use on every GPU from 8.0 on.
constexpr size_t kSharedMemoryOfAllGpus = 99 * 1024;

// ---- Tiles in shared memory: rows of D 16-bit numbers, in columns of 16 bytes, swizzled: column c of row r is stored
// at column c ^ r % 8. The same column of eight rows, which ldmatrix reads at a time, is thus spread over all 32 banks,
// and so are eight consecutive columns of a row, which copies write at a time.

template <int D>
TINYLLM_DEVICE int swizzled_index(int row, int column) {
  return row * D + (column ^ (row % 8)) * 8;
}

// The address from which cp_async_rows reads for a thread (0 ... THREADS - 1): rows of a head from `first` on.
template <int D, class T>
TINYLLM_DEVICE const T* copy_source(const T* head, int64_t stride, int first, int thread) {
  return head + (first + thread / (D / 8)) * stride + thread % (D / 8) * 8;
}

// Starts to copy ROWS rows of a head, with zeros behind the first `left`.
template <int D, int ROWS, int THREADS, class T>
TINYLLM_DEVICE void cp_async_rows(T* tile, const T* source, int64_t stride, int left, int thread) {
  constexpr int kColumns = D / 8, kRowsAtOnce = THREADS / kColumns;
  static_assert(ROWS % kRowsAtOnce == 0);
  const int column = thread % kColumns, row = thread / kColumns;
#pragma unroll
  for (int i = 0; i < ROWS; i += kRowsAtOnce)
    cp_async(tile + swizzled_index<D>(row + i, column), source + i * stride, row + i < left);
}

// The address of column `half` + 2 k of row `lane_row` + `row` of a tile; `row` is a multiple of 8 and a compile-time
// constant. A tile is aligned to the size of its rows, so that the swizzle is one XOR of the whole address, computed
// for each k from a single register.
template <int D, class T>
TINYLLM_DEVICE const void* swizzled(const T* tile, int lane_row, int half, int row, int k) {
  const unsigned at = static_cast<unsigned>(reinterpret_cast<const unsigned char*>(tile) - shared_memory()) +
                      static_cast<unsigned>(lane_row * D * 2 + (half ^ lane_row % 8) * 16);
  return shared_memory() + (at ^ static_cast<unsigned>(32 * k)) + row * D * 2;
}

// Loads rows row ... row + 15 and columns 16 k ... 16 k + 15 of a tile as a fragment of a.
template <int D, class T>
TINYLLM_DEVICE void load_a(uint32_t (&a)[4], const T* tile, int row, int k) {
  const int lane = threadIdx.x % kWarp;
  ldmatrix(a, swizzled<D>(tile, lane % 16, lane / 16, row, k));
}

// Loads the transpose of the same numbers as fragments of b for two products: columns (of b) row ... row + 7 in b[0]
// and b[1], the next eight in b[2] and b[3]. The two numbers of a register are consecutive in memory, as mma requires.
template <int D, class T>
TINYLLM_DEVICE void load_b_transposed(uint32_t (&b)[4], const T* tile, int row, int k) {
  const int lane = threadIdx.x % kWarp;
  ldmatrix(b, swizzled<D>(tile, lane % 8 + lane / 16 * 8, lane / 8 % 2, row, k));
}

// Loads the same numbers as fragments of b for two products: columns 16 k ... 16 k + 7 in b[0] and b[1], the next eight
// in b[2] and b[3].
template <int D, class T>
TINYLLM_DEVICE void load_b(uint32_t (&b)[4], const T* tile, int row, int k) {
  const int lane = threadIdx.x % kWarp;
  ldmatrix_transposed(b, swizzled<D>(tile, lane % 16, lane / 16, row, k));
}

// sum (16 M x N) += first (16 M x D) second^T (D x N). Both operands are rows of tiles, those of `first` already in
// registers.
template <class T, int D, int N, int M>
TINYLLM_DEVICE void multiply_abt(float (&sum)[M][N / 8][4], const uint32_t (&first)[M][D / 16][4], const T* second) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k)
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
      uint32_t b[4];
      load_b_transposed<D>(b, second, 16 * n, k);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<T>(sum[m][2 * n], first[m][k], b[0], b[1]);
        mma<T>(sum[m][2 * n + 1], first[m][k], b[2], b[3]);
      }
    }
}

// The same with both operands in shared memory.
template <class T, int D, int N, int M>
TINYLLM_DEVICE void multiply_abt(float (&sum)[M][N / 8][4], const T* first, const T* second) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_a<D>(a[m], first, 16 * m, k);
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
      uint32_t b[4];
      load_b_transposed<D>(b, second, 16 * n, k);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<T>(sum[m][2 * n], a[m], b[0], b[1]);
        mma<T>(sum[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// sum (16 M x D) += weights (16 M x N) rows (N x D), for weights in registers and rows in a tile.
template <class T, int D, int N, int M>
TINYLLM_DEVICE void multiply_ab(float (&sum)[M][D / 8][4], const uint32_t (&weights)[M][N / 16][4], const T* rows) {
#pragma unroll
  for (int k = 0; k < N / 16; ++k)
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[4];
      load_b<D>(b, rows, 16 * k, n);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<T>(sum[m][2 * n], weights[m][k], b[0], b[1]);
        mma<T>(sum[m][2 * n + 1], weights[m][k], b[2], b[3]);
      }
    }
}

// ---- Causal tiles on the diagonal. Keys and values that a query does not see may hold anything, and 0 times NaN is
// NaN, so a product must not include them. Of the blocks of 16 queries by 16 keys, only those on the diagonal are
// partly visible.

// Whether one of the two numbers is infinite or NaN.
template <class T>
TINYLLM_DEVICE bool not_finite(uint32_t pair) {
  constexpr uint32_t kExponent = std::is_same_v<T, bf16> ? 0x7f80 : 0x7c00;
  return (pair & kExponent) == kExponent || (pair >> 16 & kExponent) == kExponent;
}

// sum (16 x 8) += weights (16 x 16) rows (16 x 8), where query i sees keys 0 ... i. The keys are added one by one, each
// to the queries that see it. b0 and b1 are the fragments of rows.
template <class T>
TINYLLM_DEVICE void multiply_ab_diagonal(float (&sum)[4], const uint32_t (&weights)[4], uint32_t b0, uint32_t b1) {
#pragma unroll 1
  for (int key = 0; key < 16; ++key) {
    const int lane = recomputed(threadIdx.x % kWarp);
    const uint32_t own = lane % 4 != key % 8 / 2 ? 0 : key % 2 == 0 ? 0xffffu : 0xffff0000u;
    float more[4] = {sum[0], sum[1], sum[2], sum[3]};
    mma<T>(more, weights, b0 & (key < 8 ? own : 0), b1 & (key < 8 ? 0 : own));
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = lane / 4 + i / 2 * 8 >= key ? more[i] : sum[i];
  }
}

// multiply_ab for 16 queries with a causal mask; the first query is `ahead` (a multiple of 16) behind the first key of
// the tile. load(b, row, n) loads the fragments of rows row ... row + 15 and columns 16 n ... 16 n + 15.
template <class T, int D, int N, class Load>
TINYLLM_DEVICE void multiply_ab_causal(float (&sum)[D / 8][4], const uint32_t (&weights)[N / 16][4], int ahead,
                                       const Load& load) {
  uint32_t diagonal[4] = {weights[0][0], weights[0][1], weights[0][2], weights[0][3]};
#pragma unroll
  for (int k = 0; k < N / 16; ++k) {
    if (16 * k < ahead) {
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        uint32_t b[4];
        load(b, 16 * k, n);
        mma<T>(sum[2 * n], weights[k], b[0], b[1]);
        mma<T>(sum[2 * n + 1], weights[k], b[2], b[3]);
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
      multiply_ab_diagonal<T>(sum[2 * n], diagonal, b[0], b[1]);
      multiply_ab_diagonal<T>(sum[2 * n + 1], diagonal, b[2], b[3]);
    } else {
      mma<T>(sum[2 * n], diagonal, b[0], b[1]);
      mma<T>(sum[2 * n + 1], diagonal, b[2], b[3]);
    }
  }
}

// Rounds 16 rows of sums of a warp to 16 bits and writes them to rows first ... first + 15 of a head, as far as they
// are below `end`. They go through 16 rows of shared memory of this warp, so that each store has 16 bytes and those of
// neighbouring lanes are contiguous.
template <class T, int D>
TINYLLM_DEVICE void store_rows(T* head, int64_t stride, int first, int end, const float (&sum)[D / 8][4], T* tile) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int j = 0; j < D / 8; ++j)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      T* const to = tile + swizzled_index<D>(lane / 4 + 8 * r, j) + lane % 4 * 2;
      *reinterpret_cast<uint32_t*>(to) = pack<T>(sum[j][2 * r], sum[j][2 * r + 1]);
    }
  sync_warp();
  constexpr int kColumns = D / 8, kRowsAtOnce = kWarp / kColumns;
  const int column = lane % kColumns, row = lane / kColumns;
#pragma unroll
  for (int i = row; i < 16; i += kRowsAtOnce)
    if (first + i < end)
      *reinterpret_cast<uint4*>(head + (first + i) * stride + column * 8) =
          *reinterpret_cast<const uint4*>(tile + swizzled_index<D>(i, column));
}

template <class T>
TINYLLM_DEVICE T* head_of(const Heads& heads, int batch, int head) {
  return static_cast<T*>(heads.data) + batch * heads.batch + head * heads.head;
}

// ---- The distribution of work over blocks

// Returns the task of this block. With a causal mask the last queries of a head have the most keys, and the first keys
// the most queries: the longest tasks go first, so that short ones fill the end. Only so many heads are processed at
// once that the cache holds what their blocks share.
struct BlockTask {
  int block, head, batch;
};
TINYLLM_DEVICE BlockTask block_task(int blocks, int heads, int heads_of_all, int heads_at_once, bool last_first) {
  const int at_once = heads_at_once * blocks, bunch = blockIdx.x / at_once, rest = blockIdx.x % at_once;
  const int bunch_heads =
      heads_of_all - bunch * heads_at_once < heads_at_once ? heads_of_all - bunch * heads_at_once : heads_at_once;
  const int block = rest / bunch_heads, head = bunch * heads_at_once + rest % bunch_heads;
  return {last_first ? blocks - 1 - block : block, head % heads, head / heads};
}

// Returns heads_at_once for heads that share so many bytes: half of the smallest second-level cache.
inline int heads_that_fit(int64_t bytes_of_one, int64_t heads_of_all) {
  constexpr int64_t kCache = 16 << 20;
  const int64_t fit = kCache / (bytes_of_one > 0 ? bytes_of_one : 1);
  return static_cast<int>(fit < 1 ? 1 : fit > heads_of_all ? heads_of_all : fit);
}

}  // namespace tinyllm::cuda
