// Tiles of attention scores in a warp's registers, as the tensor cores leave them: of 16 rows and N columns, lane l
// holds in scores[j] the rows g = l / 4 (first two numbers) and g + 8 (last two), columns 8 j + l % 4 * 2 and the next.
#pragma once
#include "device.cuh"

namespace tinyllm::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInfinity = __builtin_huge_valf();

// How many of a sequence's keys take part.
TINYLLM_DEVICE int visible_keys(const void* key_lengths, bool long_lengths, int batch, int keys) {
  if (key_lengths == nullptr) return keys;
  const int64_t length =
      long_lengths ? static_cast<const int64_t*>(key_lengths)[batch] : static_cast<const int32_t*>(key_lengths)[batch];
  return static_cast<int>(length < 0 ? 0 : length > keys ? keys : length);
}

// -inf where a key is beyond the visible ones or, with causal, later than its query. row, column: which query and key
// the tile begins with.
template <int N>
TINYLLM_DEVICE void hide(float (&scores)[N / 8][4], int row, int column, int visible, bool causal) {
  const int lane = threadIdx.x % kWarp, first_row = row + lane / 4, first_column = column + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < N / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = first_column + 8 * j + i % 2, query = first_row + i / 2 * 8;
      if (key >= visible || (causal && key > query)) scores[j][i] = -kInfinity;
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

}  // namespace tinyllm::cuda
