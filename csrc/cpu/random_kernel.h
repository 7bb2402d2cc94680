// Counter-based random bits (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3": Philox4x32-10). The
// bits of an element depend only on its index, the seed and the offset, so that a kernel can regenerate them in any
// order and on any processor.
//
// Elements form blocks of kRandomBlock. Block i uses the counters 16 i ... 16 i + 15, each of which yields four words:
// word w of counter 16 i + c belongs to element 16 w + 2 (c % 8) + c / 8 of the block. With this order, instructions
// that multiply into 64 bits need no shuffle.
#pragma once
#include <algorithm>
#include <cmath>

#include "kernel_args.h"
#include "simd.h"

namespace tinyllm::TINYLLM_ISA {

constexpr int64_t kRandomBlock = 64;

// The distance between the first elements of rows of n elements, so that each row begins with a block.
inline int64_t random_row(int64_t n) { return (n + kRandomBlock - 1) / kRandomBlock * kRandomBlock; }

inline uint32_t low_word(uint64_t x) { return static_cast<uint32_t>(x); }
inline uint32_t high_word(uint64_t x) { return static_cast<uint32_t>(x >> 32); }

// Generates the words of the elements [kRandomBlock * block, kRandomBlock * (block + 1)).
inline void random_words(uint64_t seed, uint64_t offset, uint64_t block, uint32_t* words) {
  const uint64_t counter = block * 16;
  const Words multiplier0 = Words::set1(0xD2511F53u), multiplier1 = Words::set1(0xCD9E8D57u);
  for (uint32_t c = 0; c < 8; c += Words::size) {
    Words x[2][4];  // counters c ... and c + 8 ...
#pragma GCC unroll 2
    for (uint32_t i = 0; i < 2; ++i) {
      x[i][0] = Words::count(low_word(counter) + c + 8 * i);
      x[i][1] = Words::set1(high_word(counter));
      x[i][2] = Words::set1(low_word(offset));
      x[i][3] = Words::set1(high_word(offset));
    }
    uint32_t key0 = low_word(seed), key1 = high_word(seed);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const Words product0 = multiplier0 * x[i][0], product1 = multiplier1 * x[i][2];
        x[i][0] = product1.upper() ^ x[i][1] ^ Words::set1(key0);
        x[i][1] = product1;
        x[i][2] = product0.upper() ^ x[i][3] ^ Words::set1(key1);
        x[i][3] = product0;
      }
    }
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w) Words::store_pairs(x[0][w], x[1][w], words + 16 * w + 2 * c);
  }
}

// Generates the dropout factors of the elements [first, first + n): 0 with probability p, otherwise 1 / (1 - p). Writes
// whole blocks, at most n + 2 kRandomBlock elements, and returns the address of the factor of the first element.
template <class S>
inline const S* dropout_factors(const cpu::Dropout& dropout, uint64_t first, int64_t n, S* factors) {
  const S kept = static_cast<S>(dropout.p < 1.0 ? 1.0 / (1.0 - dropout.p) : 0.0);
  const uint32_t threshold = static_cast<uint32_t>(std::min(std::round(dropout.p * 0x1p32), 0x1p32 - 1.0));
  const uint64_t begin = first / kRandomBlock, end = first + static_cast<uint64_t>(n);
  S* at = factors;
  for (uint64_t block = begin; block * kRandomBlock < end; ++block, at += kRandomBlock) {
    alignas(64) uint32_t words[kRandomBlock];
    random_words(dropout.seed, dropout.offset, block, words);
    for (int64_t i = 0; i < kRandomBlock; ++i) at[i] = words[i] >= threshold ? kept : S(0);
  }
  return factors + (first - begin * kRandomBlock);
}

inline void write_dropout_factors(const cpu::Dropout& dropout, int64_t first, int64_t n, float* factors) {
  dropout_factors(dropout, static_cast<uint64_t>(first), n, factors);
}

}  // namespace tinyllm::TINYLLM_ISA
