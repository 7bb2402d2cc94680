// Exact products of a block of 64 quantised weights with 64 quantised activations, in 32-bit integers.
//
// Block8 and Block4 hold the weights of a block as they are multiplied; `Input` is the type of the activations then.
// place says where its element i lies there.
//
// On x86, products of unsigned and signed bytes would saturate, while sums of pairs of 16-bit products do not. Block8
// therefore widens its bytes: the even ones by a mask and the odd ones by a shift, which take less than widening them
// in their order. Products with the half bytes of Block4 are so small that their 16-bit sums are exact. dot adds the
// products to a vector of integers with as many lanes as Vec<float>, of which each lane takes its share. The sums of a
// block are below 2^24, so that float holds them exactly.
#pragma once
#include "simd.h"
#include "weight_args.h"

namespace tinyllm::TINYLLM_ISA {

#if defined(TINYLLM_AVX512)

struct Ints {
  __m512i v;
  static Ints load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
  Vec<float> to_float() const { return {_mm512_cvtepi32_ps(v)}; }
};

struct Block8 {
  using Input = int16_t;
  __m512i w[2];
  static int64_t place(int64_t i) { return i % 2 * 32 + i / 2; }
  static Block8 load(const uint8_t* p) {
    const __m512i bytes = _mm512_loadu_si512(p);
    return {{_mm512_and_si512(bytes, _mm512_set1_epi16(255)), _mm512_srli_epi16(bytes, 8)}};
  }
  Ints dot(Ints sum, const Input* x) const {
    const __m512i a = _mm512_madd_epi16(w[0], _mm512_loadu_si512(x));
    const __m512i b = _mm512_madd_epi16(w[1], _mm512_loadu_si512(x + 32));
    return {_mm512_add_epi32(sum.v, _mm512_add_epi32(a, b))};
  }
};

struct Block4 {
  using Input = int8_t;
  static int64_t place(int64_t i) { return i; }
  __m512i w;
  static Block4 load(const uint8_t* p) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(bytes), _mm256_srli_epi16(bytes, 4), 1);
    return {_mm512_and_si512(both, _mm512_set1_epi8(15))};
  }
  Ints dot(Ints sum, const Input* x) const {
    const __m512i pairs = _mm512_maddubs_epi16(w, _mm512_loadu_si512(x));
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
  }
};

#elif defined(TINYLLM_AVX2)

struct Ints {
  __m256i v;
  static Ints load(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  Vec<float> to_float() const { return {_mm256_cvtepi32_ps(v)}; }
};

struct Block8 {
  using Input = int16_t;
  __m256i w[4];
  static int64_t place(int64_t i) { return i / 32 * 32 + i % 2 * 16 + i % 32 / 2; }
  static Block8 load(const uint8_t* p) {
    const auto at = [&](int i) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * i)); };
    const __m256i a = at(0), b = at(1), mask = _mm256_set1_epi16(255);
    return {{_mm256_and_si256(a, mask), _mm256_srli_epi16(a, 8), _mm256_and_si256(b, mask), _mm256_srli_epi16(b, 8)}};
  }
  Ints dot(Ints sum, const Input* x) const {
    const auto product = [&](int i) {
      return _mm256_madd_epi16(w[i], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 16 * i)));
    };
    const __m256i a = _mm256_add_epi32(product(0), product(1)), b = _mm256_add_epi32(product(2), product(3));
    return {_mm256_add_epi32(sum.v, _mm256_add_epi32(a, b))};
  }
};

struct Block4 {
  using Input = int8_t;
  static int64_t place(int64_t i) { return i; }
  __m256i low, high;
  static Block4 load(const uint8_t* p) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(bytes, mask), _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask)};
  }
  Ints dot(Ints sum, const Input* x) const {
    const auto at = [&](int i) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 32 * i)); };
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, at(0)), _mm256_maddubs_epi16(high, at(1)));
    return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
  }
};

#else

struct Ints {
  int32_t v;
  static Ints load(const int32_t* p) { return {*p}; }
  Vec<float> to_float() const {
    float lanes[Vec<float>::size] = {static_cast<float>(v)};
    return Vec<float>::load(lanes);
  }
};

// Loops that compilers vectorise.
struct Block8 {
  using Input = int16_t;
  static int64_t place(int64_t i) { return i; }
  const uint8_t* w;
  static Block8 load(const uint8_t* p) { return {p}; }
  Ints dot(Ints sum, const Input* x) const {
    for (int64_t i = 0; i < cpu::kQuantBlock; ++i) sum.v += int32_t{w[i]} * x[i];
    return sum;
  }
};

struct Block4 {
  using Input = int8_t;
  static int64_t place(int64_t i) { return i; }
  const uint8_t* w;
  static Block4 load(const uint8_t* p) { return {p}; }
  Ints dot(Ints sum, const Input* x) const {
    constexpr int64_t half = cpu::kQuantBlock / 2;
    for (int64_t i = 0; i < half; ++i) sum.v += int32_t{w[i] & 15} * x[i] + int32_t{w[i] >> 4} * x[half + i];
    return sum;
  }
};

#endif

}  // namespace tinyllm::TINYLLM_ISA
