// Weights in fewer bits: how they are made of floats, and made floats again.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "pack.h"
#include "weight_args.h"

namespace tinyllm::TINYLLM_ISA {

using cpu::kQuantBlock;
using cpu::Weight;
using cpu::WeightKind;

// ---- Unpacking

// A block of a quantised row: weight i is (levels[i] - zero) * scale.
struct StoredBlock {
  const uint8_t* levels;
  Vec<float> zero, scale;

  Vec<float> at(int64_t i) const { return (Vec<float>::load(levels + i) - zero) * scale; }
};

// Returns the block of a row that begins at column k. `buffer` receives the unpacked levels of int4.
inline StoredBlock stored_block(const Weight& w, int64_t row, int64_t k, bfloat16 stored_scale,
                                uint8_t (&buffer)[kQuantBlock]) {
  using V = Vec<float>;
  const V scale = V::set1(to_compute(stored_scale));
  const uint8_t* data = reinterpret_cast<const uint8_t*>(w.row(row));
  if (w.kind == WeightKind::int8) return {data + k, V::set1(cpu::kInt8Zero), scale};
  constexpr int64_t half = kQuantBlock / 2;
  for (int64_t i = 0; i < half; ++i) {
    const uint8_t both = data[k / 2 + i];
    buffer[i] = both & 15;
    buffer[half + i] = both >> 4;
  }
  return {buffer, V::set1(cpu::kInt4Zero), scale};
}

// Writes columns [first, first + n) of a row; first is a multiple of 64 where the weight is quantised.
inline void dequantize_row(const Weight& w, int64_t row, int64_t first, int64_t n, float* to) {
  using V = Vec<float>;
  const auto copy = [&](const auto* from) {
    for_each_vector<V>(n, [&](int64_t i, int64_t count) { store_n(load_n<V>(from + i, count), to + i, count); });
  };
  if (w.kind == WeightKind::f32) return copy(reinterpret_cast<const float*>(w.row(row)) + first);
  if (w.kind == WeightKind::bf16) return copy(reinterpret_cast<const bfloat16*>(w.row(row)) + first);
  for (int64_t k = 0; k < n; k += kQuantBlock) {
    uint8_t buffer[kQuantBlock];
    const bfloat16 scale = w.scales[row * w.groups() + (first + k) / w.group];
    const StoredBlock block = stored_block(w, row, first + k, scale, buffer);
    for_each_vector<V>(std::min(kQuantBlock, n - k),
                       [&](int64_t i, int64_t count) { store_n(block.at(i), to + k + i, count); });
  }
}

// Packs columns [begin, end) of the B of a matmul, rows of its weight, into panels; see matmul_pack_b.
inline void pack_weight(const cpu::Matmul& p, int64_t begin, int64_t end) {
  using V = Vec<float>;
  const Weight& w = *p.weight;
  const auto pack_all = [&](auto* data) {
    pack_b(data + (p.weight_column + begin) * w.inputs + p.weight_depth, w.inputs, 1, end - begin, p.depth,
           static_cast<float*>(p.packed) + begin * p.depth, kNR<float> * p.depth, 1.0f);
  };
  if (w.kind == WeightKind::f32) return pack_all(static_cast<const float*>(w.data));
  if (w.kind == WeightKind::bf16) return pack_all(static_cast<const bfloat16*>(w.data));
  const int64_t groups = w.groups();
  const int64_t whole = (end + kNR<float> - 1) / kNR<float> * kNR<float>;
  for (int64_t c = begin; c < whole; c += V::size) {
    const int64_t strip = c % kNR<float>;
    float* to = static_cast<float*>(p.packed) + (c - strip) * p.depth + strip;
    for (int64_t k = 0; k < p.depth; k += kQuantBlock) {
      const int64_t column = p.weight_depth + k;
      const bfloat16* scales = w.scales + column / w.group;
      uint8_t buffers[V::size][kQuantBlock];
      StoredBlock blocks[V::size];
      for (int64_t i = 0; i < V::size; ++i) {
        const int64_t row = p.weight_column + std::min(c + i, end - 1);
        blocks[i] = stored_block(w, row, column, scales[row * groups], buffers[i]);
      }
      pack_squares<V>(std::min(kQuantBlock, p.depth - k), to + k * kNR<float>,
                      [&](int64_t i, int64_t at, int64_t) { return c + i < end ? blocks[i].at(at) : V::zero(); });
    }
  }
}

// ---- Quantisation

// The squared error of n weights divided by `scale` and rounded to whole numbers in [low, high], and in `best` the
// scale that suits these numbers best: sum(w q) / sum(q^2).
inline float rounding_error(const float* w, int64_t n, float scale, float low, float high, float& best) {
  using V = Vec<float>;
  const V inverse = V::set1(1.0f / scale), step = V::set1(scale), shift = V::set1(0x1.8p23f);
  V error = V::zero(), wq = V::zero(), qq = V::zero();
  for_each_vector<V>(n, [&](int64_t i, int64_t count) {
    const V x = load_n<V>(w + i, count);
    const V q = max(V::set1(low), min(V::set1(high), fma(x, inverse, shift) - shift));
    const V rest = x - q * step;
    error = fma(rest, rest, error);
    wq = fma(x, q, wq);
    qq = fma(q, q, qq);
  });
  best = wq.sum() / qq.sum();
  return error.sum();
}

// Chooses the scale of a group for the least squared error: of scales that spread the whole range or clip the largest
// weights, each improved once for the numbers that it rounds to. The largest weight may take the end of the range that
// has one number more.
inline bfloat16 group_scale(const float* w, int64_t n, float low, float high) {
  float most = 0.0f;
  for (int64_t i = 0; i < n; ++i)
    if (std::abs(w[i]) > std::abs(most)) most = w[i];
  bfloat16 chosen{0};
  if (std::abs(most) < 1e-35f) return chosen;
  float least = std::numeric_limits<float>::infinity();
  const int steps = high > 100.0f ? 3 : 12;  // clipping gains nothing with many levels
  for (const float end : {low, high})
    for (int i = 0; i < steps; ++i) {
      float better, scale = most / end * (1.0f - 0.03f * static_cast<float>(i));
      for (int round = 0; round < 2; ++round) {
        bfloat16 stored;
        from_compute(scale, stored);
        if (to_compute(stored) == 0.0f) break;
        const float error = rounding_error(w, n, to_compute(stored), low, high, better);
        if (error < least || chosen.bits == 0) {  // also where all errors overflow
          least = error;
          chosen = stored;
        }
        if (!std::isfinite(better) || better == 0.0f) break;
        scale = better;
      }
    }
  return chosen;
}

// Quantises rows [begin, end).
inline void quantize_rows(const cpu::Quantize& q, int64_t begin, int64_t end) {
  const Weight& w = q.to;
  const bool int8 = w.kind == WeightKind::int8;
  const float low = int8 ? -128.0f : -8.0f, high = int8 ? 127.0f : 7.0f;
  const int zero = int8 ? cpu::kInt8Zero : cpu::kInt4Zero;
  for (int64_t r = begin; r < end; ++r) {
    const float* row = q.weight + r * w.inputs;
    uint8_t* out = reinterpret_cast<uint8_t*>(const_cast<char*>(w.row(r)));
    for (int64_t g = 0; g < w.groups(); ++g) {
      const int64_t begin_of = g * w.group, n = std::min(w.group, w.inputs - begin_of);
      const bfloat16 stored = group_scale(row + begin_of, n, low, high);
      const_cast<bfloat16*>(w.scales)[r * w.groups() + g] = stored;
      const float scale = to_compute(stored), inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
      for (int64_t k = 0; k < w.group; k += kQuantBlock) {
        uint8_t levels[kQuantBlock];
        for (int64_t i = 0; i < kQuantBlock; ++i) {
          const float x = k + i < n ? row[begin_of + k + i] * inverse : 0.0f;
          const float level = (x + 0x1.8p23f) - 0x1.8p23f;  // to the nearest whole number
          levels[i] = static_cast<uint8_t>(static_cast<int>(std::clamp(level, low, high)) + zero);
        }
        uint8_t* to = out + (int8 ? begin_of + k : (begin_of + k) / 2);
        constexpr int64_t half = kQuantBlock / 2;
        for (int64_t i = 0; i < (int8 ? kQuantBlock : half); ++i)
          to[i] = int8 ? levels[i] : static_cast<uint8_t>(levels[i] | levels[half + i] << 4);
      }
    }
  }
}

}  // namespace tinyllm::TINYLLM_ISA
