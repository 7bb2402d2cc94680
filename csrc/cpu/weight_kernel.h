// Products of a few rows of activations with weights that are read once, from memory: the work of generating a token.
// The time is that of reading the weights, whose rows are therefore read as they lie, with as few bytes as their kind
// has, and from several places at once, because one stream does not hide the latency of memory.
//
// Each output is one sum over its row, in an order that depends neither on the number of rows of activations nor on how
// outputs are divided among threads.
//
// Quantised weights meet activations that are quantised per block of 64 as well: the products of a block are exact
// integers, and only their scales are floats (see quant_dot.h).
#pragma once
#include <algorithm>
#include <limits>

#include "activation.h"
#include "prefetch.h"
#include "quant_dot.h"
#include "scratch.h"

namespace tinyllm::TINYLLM_ISA {

using cpu::Activations;
using cpu::kQuantBlock;
using cpu::Weight;
using cpu::WeightKind;
using cpu::WeightProduct;

// ---- Activations

// Splits a row into the even and the odd elements of each 2 * Vec::size, which is how weights of bfloat16 are unpacked,
// and zeros the padding.
inline void split_activations(const float* x, int64_t n, int64_t padded, float* to) {
  constexpr int64_t half = Vec<float>::size, step = 2 * half;
  for (int64_t k = 0; k < padded; k += step)
    for (int64_t i = 0; i < half; ++i) {
      to[k + i] = k + 2 * i < n ? x[k + 2 * i] : 0.0f;
      to[k + half + i] = k + 2 * i + 1 < n ? x[k + 2 * i + 1] : 0.0f;
    }
}

// Quantises a block of n <= 64 activations to whole numbers in [-127, 127], in floats with 1.5 * 2^23 added, and
// returns their scale: NaN if an activation is not finite.
inline float quantize_block(const float* x, int64_t n, float* shifted) {
  using V = Vec<float>;
  V most = V::zero(), check = V::zero();
  for_each_vector<V>(n, [&](int64_t i, int64_t count) {
    const V v = load_n<V>(x + i, count);
    most = max(most, max(v, V::zero() - v));
    check = fma(v, V::zero(), check);
  });
  float scale = most.max_element() / 127.0f;
  const bool finite = check.sum() == 0.0f;
  const float inverse = finite && scale >= std::numeric_limits<float>::min() ? 1.0f / scale : 0.0f;
  if (inverse == 0.0f) scale = finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  const V shift = V::set1(0x1.8p23f);
  for (int64_t i = 0; i < kQuantBlock; i += V::size) {
    const int64_t count = std::clamp<int64_t>(n - i, 0, V::size);
    const V v = inverse == 0.0f || count == 0 ? V::zero() : load_n<V>(x + i, count);
    fma(v, V::set1(inverse), shift).store(shifted + i);
  }
  return scale;
}

// Stores the integers of a block, and returns their sum.
inline int32_t store_block(const float* shifted, int8_t* to) {
  int32_t sum = 0;
  for (int64_t i = 0; i < kQuantBlock; ++i) {
    const int32_t q = bit_cast<int32_t>(shifted[i]) - 0x4b400000;
    to[i] = static_cast<int8_t>(q);
    sum += q;
  }
  return sum;
}

// Fills the forms of rows [begin, end) that have memory.
inline void prepare_activations(const Activations& x, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Vec<float>::size;
  const int64_t blocks = x.blocks(), padded = x.padded();
  for (int64_t m = begin; m < end; ++m) {
    const float* row = x.data + m * x.row;
    if (x.split != nullptr) split_activations(row, x.inputs, padded, x.split + m * padded);
    if (x.quantized == nullptr) continue;
    for (int64_t b = 0; b < blocks; ++b) {
      alignas(64) float shifted[kQuantBlock];
      const int64_t first = b * kQuantBlock, at = m * blocks + b;
      x.scales[at] = quantize_block(row + first, std::min(kQuantBlock, x.inputs - first), shifted);
      const int32_t sum = store_block(shifted, x.quantized + at * kQuantBlock);
      if (x.offsets == nullptr) continue;
      std::fill_n(x.offsets + at * lanes, lanes, 0);
      x.offsets[at * lanes] = -cpu::kInt4Zero * sum;
    }
  }
}

// ---- Dot products of M rows of activations with R rows of a weight
//
// The R rows come from as many streams, parts of the weight that are far from one another: a hardware prefetcher
// follows each by itself, only so far ahead, and not beyond a page of memory. Measured on an AMD EPYC (Zen 3), one
// thread reads 22 GB/s as one stream, 29 as two and 32 as four, and neighbouring rows at once gain nothing.

// Bytes of all streams together that are prefetched before they are used: time enough for a memory's latency. Measured
// on Zen 3, more takes the hardware prefetchers' share.
constexpr int64_t kAhead = 2048;

// Prefetches the lines that are used `ahead` bytes later, as `bytes` are used.
template <int64_t bytes>
inline void prefetch_ahead(const void* at, int64_t ahead) {
  for (int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(static_cast<const char*>(at) + ahead + i);
}

// Where the sums of R rows of a weight with M rows of activations go, as the lanes of vectors.
struct Lanes {
  Vec<float>* data;
  int64_t of_output, of_row;
  Vec<float>& at(int r, int m) const { return data[r * of_output + m * of_row]; }
};

// bfloat16 meets activations that are split as it is unpacked.
template <int M, int R, class T>
inline void float_dots(const char* const (&rows)[R], int64_t depth, const float* x, int64_t x_row, int64_t ahead,
                       Lanes lanes) {
  using V = Vec<float>;
  constexpr int64_t step = 2 * V::size;
  constexpr bool is_float = std::is_same_v<T, float>;
  V sums[R][M];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) sums[r][m] = V::zero();
  const auto add = [&](const T* const(&at)[R], int64_t k, int64_t inside) {
    V first[R], second[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      if constexpr (is_float) {
        first[r] = V::load(at[r]);
        second[r] = V::load(at[r] + V::size);
      } else {
        V::load_pairs(at[r], first[r], second[r]);
      }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const float* xm = x + m * x_row + k;
      V x0, x1;
      if (!is_float || inside == step) {
        x0 = V::load(xm);
        x1 = V::load(xm + V::size);
      } else {
        x0 = load_n<V>(xm, std::min<int64_t>(inside, V::size));
        x1 = inside > V::size ? load_partial<V>(xm + V::size, inside - V::size) : V::zero();
      }
      if (R > 1 && M > 1) hold(x0), hold(x1);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r][m] = fma(x1, second[r], fma(x0, first[r], sums[r][m]));
    }
  };
  const T* at[R];
  int64_t k = 0;
  for (; k + step <= depth; k += step) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      at[r] = reinterpret_cast<const T*>(rows[r]) + k;
      prefetch_ahead<step * int64_t{sizeof(T)}>(at[r], ahead);
    }
    add(at, k, step);
  }
  if (k < depth) {
    T rest[R][step] = {};
    for (int r = 0; r < R; ++r) {
      std::copy_n(reinterpret_cast<const T*>(rows[r]) + k, depth - k, rest[r]);
      at[r] = rest[r];
    }
    add(at, k, depth - k);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) lanes.at(r, m) = sums[r][m];
}

// `scales` are those of the blocks of each row, as floats; with `scaled` times those of the only row of activations.
template <int M, int R, WeightKind kind, bool scaled>
inline void quantized_dots(const char* const (&rows)[R], const float* const (&scales)[R], const Activations& a,
                           int64_t first, int64_t ahead, Lanes lanes) {
  using V = Vec<float>;
  constexpr bool int8 = kind == WeightKind::int8;
  using Block = std::conditional_t<int8, Block8, Block4>;
  constexpr int64_t bytes = int8 ? kQuantBlock : kQuantBlock / 2;
  const int64_t blocks = a.blocks(), padded = a.padded();
  const int8_t* const x = a.quantized + first * padded;
  const float* const x_scales = a.scales + first * blocks;
  const int32_t* const offsets = int8 ? nullptr : a.offsets + first * blocks * V::size;
  V sums[R][M];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) sums[r][m] = V::zero();
  const auto add_block = [&](int64_t b, bool prefetch) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const uint8_t* at = reinterpret_cast<const uint8_t*>(rows[r]) + b * bytes;
      if (prefetch) prefetch_ahead<kCacheLine>(at, ahead);
      const Block block = Block::load(at);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const Ints offset = int8 ? Ints::zero() : Ints::load(offsets + (m * blocks + b) * V::size);
        const V dots = block.dot(offset, x + m * padded + b * kQuantBlock).to_float();
        sums[r][m] = fma(dots, V::set1(scaled ? scales[r][b] : scales[r][b] * x_scales[m * blocks + b]), sums[r][m]);
      }
    }
  };
  int64_t b = 0;
  for (; b + 2 <= blocks; b += 2) {
    add_block(b, true);
    add_block(b + 1, int8);  // two blocks of int4 share a cache line
  }
  if (b < blocks) add_block(b, true);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) lanes.at(r, m) = sums[r][m];
}

// The scales of the blocks of rows [begin, end) as floats, times `factors`, if any: one for each block of a row, as
// often as a vector has elements, so that whole vectors of them go with as many rows.
inline void block_scales(const Weight& w, int64_t begin, int64_t end, const float* factors, float* to) {
  using V = Vec<float>;
  const int64_t blocks = w.blocks(), per_group = w.group / kQuantBlock, period = blocks * V::size;
  const bfloat16* from = w.scales + begin * w.groups();
  const int64_t count = (end - begin) * blocks;
  for (int64_t first = 0; first < count; first += period)
    for_each_vector<V>(std::min(period, count - first), [&](int64_t i, int64_t n) {
      V scale;
      if (per_group == 1) {
        scale = load_n<V>(from + first + i, n);
      } else {
        float each[V::size] = {};
        for (int64_t j = 0; j < n; ++j) each[j] = to_compute(from[(first + i + j) / per_group]);
        scale = V::load(each);
      }
      if (factors != nullptr) scale = scale * V::load(factors + i);
      store_n(scale, to + first + i, n);
    });
}

constexpr int kStreams = 4;

// The products with a row of each stream; Lanes has those of the streams as its outputs. Where the rows are in the
// caches, the next ones are prefetched meanwhile.
template <int M, WeightKind kind, bool scaled = false>
inline void dots(const char* const (&rows)[kStreams], const float* const (&scales)[kStreams], int64_t row_bytes,
                 bool cached, const Activations& a, int64_t first, Lanes lanes) {
  constexpr bool quantized = kind == WeightKind::int8 || kind == WeightKind::int4;
  // As many at once as registers hold the sums of, beside what bytes take to be multiplied.
  constexpr int R = std::min(kStreams, (quantized ? 4 : 8) / M);
  const int64_t ahead = cached ? row_bytes : kAhead / R;
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; s += R) {
    const char* at[R];
    const float* of[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      at[r] = rows[s + r];
      of[r] = scales[s + r];
    }
    const Lanes to{lanes.data + s * lanes.of_output, lanes.of_output, lanes.of_row};
    if constexpr (quantized)
      quantized_dots<M, R, kind, scaled>(at, of, a, first, ahead, to);
    else if constexpr (kind == WeightKind::f32)
      float_dots<M, R, float>(at, a.inputs, a.data + first * a.row, a.row, ahead, to);
    else
      float_dots<M, R, bfloat16>(at, a.inputs, a.split + first * a.padded(), a.padded(), ahead, to);
  }
}

// Finishes outputs [begin, end) of a row of activations.
inline void finish_product(const WeightProduct& p, int64_t m, int64_t begin, int64_t end, const float* sums) {
  using V = Vec<float>;
  const auto value = [&](int64_t i, int64_t n) {
    V x = load_n<V>(sums + i, n);
    if (p.bias != nullptr) x = x + load_n<V>(p.bias + begin + i, n);
    if (p.activation != cpu::Activation::none) x = activate(p.activation, x);
    if (p.residual != nullptr) x = x + load_n<V>(p.residual + m * p.out_row + begin + i, n);
    return x;
  };
  if (p.positions == nullptr) {
    float* out = p.out + m * p.out_row + begin;
    for_each_vector<V>(end - begin, [&](int64_t i, int64_t n) { store_n(value(i, n), out + i, n); });
    return;
  }
  for (int64_t r = begin; r < end;) {  // the part of each head
    const int64_t count = std::min(end, (r / p.head_dim + 1) * p.head_dim) - r;
    const int64_t at = m * p.cache.batch + r / p.head_dim * p.cache.head + p.positions[m] * p.cache.row;
    for_each_vector<V>(count, [&](int64_t i, int64_t n) {
      const int64_t to = at + r % p.head_dim + i;
      if (p.cache_bf16)
        store_n(value(r - begin + i, n), static_cast<bfloat16*>(p.cache.data) + to, n);
      else
        store_n(value(r - begin + i, n), static_cast<float*>(p.cache.data) + to, n);
    });
    r += count;
  }
}

// Computes outputs [begin, end) of all rows of activations: a quarter of them from each of four streams.
template <WeightKind kind>
TINYLLM_FLATTEN void weight_product(const WeightProduct& p, int64_t begin, int64_t end) {
  using V = Vec<float>;
  constexpr int64_t kOfStream = std::max(V::size, 8), kOutputs = kStreams * kOfStream, kRows = 8;
  constexpr bool quantized = kind == WeightKind::int8 || kind == WeightKind::int4;
  V lanes[kRows * kOutputs];
  alignas(64) float sums[kOutputs];
  const Weight& w = p.weight;
  const Activations& x = *p.x;
  const int64_t blocks = w.blocks(), bytes = w.row_bytes(), length = (end - begin + kStreams - 1) / kStreams;
  const cpu::Scratch scratch(quantized ? static_cast<size_t>((kOutputs + V::size) * blocks) * sizeof(float) : 0);
  float* const scales = reinterpret_cast<float*>(scratch.data());
  float* const factors = quantized && x.rows == 1 ? scales + kOutputs * blocks : nullptr;
  if (factors != nullptr)
    for (int64_t i = 0; i < V::size; ++i) std::copy_n(x.scales, blocks, factors + i * blocks);
  for (int64_t done = 0; done < length; done += kOfStream) {
    int64_t firsts[kStreams], counts[kStreams];
    for (int64_t s = 0; s < kStreams; ++s) {
      firsts[s] = begin + s * length + done;
      const int64_t last = std::min({firsts[s] + kOfStream, begin + (s + 1) * length, end});
      counts[s] = std::max<int64_t>(0, last - firsts[s]);
      if (quantized) block_scales(w, firsts[s], firsts[s] + counts[s], factors, scales + s * kOfStream * blocks);
    }
    for (int64_t m0 = 0; m0 < x.rows; m0 += kRows) {
      const int64_t most = std::min(kRows, x.rows - m0);
      for (int64_t i = 0; i < counts[0]; ++i) {
        const char* at[kStreams];
        const float* of[kStreams];
        for (int s = 0; s < kStreams; ++s) {
          const int64_t from = i < counts[s] ? s : 0;  // instead of a stream that has ended
          at[s] = w.row(firsts[from] + i);
          of[s] = quantized ? scales + (from * kOfStream + i) * blocks : nullptr;
        }
        int64_t m = 0;
        const auto to = [&] { return Lanes{lanes + m * kOutputs + i, kOfStream, kOutputs}; };
        if (x.rows == 1) {
          dots<1, kind, true>(at, of, bytes, false, x, 0, to());
          continue;
        }
        for (; m + 4 <= most; m += 4) dots<4, kind>(at, of, bytes, m0 + m > 0, x, m0 + m, to());
        for (; m + 2 <= most; m += 2) dots<2, kind>(at, of, bytes, m0 + m > 0, x, m0 + m, to());
        if (m < most) dots<1, kind>(at, of, bytes, m0 + m > 0, x, m0 + m, to());
      }
      for (int64_t m = 0; m < most; ++m) {
        for (int64_t i = 0; i < kOutputs; i += V::size) {
          V each[V::size];
          for (int64_t k = 0; k < V::size; ++k)
            each[k] = (i + k) % kOfStream < counts[0] ? lanes[m * kOutputs + i + k] : V::zero();
          sum_each(each).store(sums + i);
        }
        for (int64_t s = 0; s < kStreams; ++s)
          finish_product(p, m0 + m, firsts[s], firsts[s] + counts[s], sums + s * kOfStream);
      }
    }
  }
}

}  // namespace tinyllm::TINYLLM_ISA
