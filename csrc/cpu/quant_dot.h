// Exact products of a block of 64 quantised weights with 64 quantised activations, in 32-bit integers.
//
// Block8 and Block4 hold the weights of a block as they are multiplied. dot adds the products to a vector of integers
// with as many lanes as Vec<float>, of which each lane takes its share; their sums are below 2^24, so that float holds
// them exactly. Block4 multiplies the stored halves of bytes, which are too large by kInt4Zero.
//
// On x86, sums of two products of unsigned and signed bytes saturate at 16 bits. Those of Block4 are small enough, and
// so are those of absolute weights, at most 128, with activations, at most 127, that have taken over the weights'
// signs: 2 * 128 * 127 < 2^15.
#pragma once
#include "simd.h"
#include "weight_args.h"

namespace tinyllm::TINYLLM_ISA {

#if defined(TINYLLM_AVX512)

struct Ints {
  __m512i v;
  static Ints zero() { return {_mm512_setzero_si512()}; }
  static Ints load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
  Vec<float> to_float() const { return {_mm512_cvtepi32_ps(v)}; }
};

struct Block8 {
  __m512i absolute;
  __mmask64 negative;
  static Block8 load(const uint8_t* p) {
    const __m512i w = _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
    return {_mm512_abs_epi8(w), _mm512_movepi8_mask(w)};
  }
  Ints dot(Ints sum, const int8_t* x) const {
    const __m512i inputs = _mm512_loadu_si512(x);
    const __m512i with_signs = _mm512_mask_sub_epi8(inputs, negative, _mm512_setzero_si512(), inputs);
    const __m512i pairs = _mm512_maddubs_epi16(absolute, with_signs);
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
  }
};

struct Block4 {
  __m512i w;
  static Block4 load(const uint8_t* p) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(bytes), _mm256_srli_epi16(bytes, 4), 1);
    return {_mm512_and_si512(both, _mm512_set1_epi8(15))};
  }
  Ints dot(Ints sum, const int8_t* x) const {
    const __m512i pairs = _mm512_maddubs_epi16(w, _mm512_loadu_si512(x));
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
  }
};

#elif defined(TINYLLM_AVX2)

struct Ints {
  __m256i v;
  static Ints zero() { return {_mm256_setzero_si256()}; }
  static Ints load(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  Vec<float> to_float() const { return {_mm256_cvtepi32_ps(v)}; }
};

struct Block8 {
  __m256i low, high;
  static Block8 load(const uint8_t* p) { return {signed_at(p), signed_at(p + 32)}; }
  Ints dot(Ints sum, const int8_t* x) const {
    return {_mm256_add_epi32(sum.v, _mm256_add_epi32(product(low, x), product(high, x + 32)))};
  }

 private:
  static __m256i signed_at(const uint8_t* p) {
    return _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_set1_epi8(-128));
  }
  static __m256i product(__m256i w, const int8_t* x) {
    const __m256i with_signs = _mm256_sign_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), w);
    return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), with_signs), _mm256_set1_epi16(1));
  }
};

struct Block4 {
  __m256i low, high;
  static Block4 load(const uint8_t* p) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(bytes, mask), _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask)};
  }
  Ints dot(Ints sum, const int8_t* x) const {
    const auto at = [&](int i) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 32 * i)); };
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, at(0)), _mm256_maddubs_epi16(high, at(1)));
    return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
  }
};

#else

struct Ints {
  int32_t v;
  static Ints zero() { return {0}; }
  static Ints load(const int32_t* p) { return {*p}; }
  Vec<float> to_float() const {
    float lanes[Vec<float>::size] = {static_cast<float>(v)};
    return Vec<float>::load(lanes);
  }
};

// Loops that compilers vectorise.
struct Block8 {
  const uint8_t* w;
  static Block8 load(const uint8_t* p) { return {p}; }
  Ints dot(Ints sum, const int8_t* x) const {
    for (int64_t i = 0; i < cpu::kQuantBlock; ++i) sum.v += (int32_t{w[i]} - cpu::kInt8Zero) * x[i];
    return sum;
  }
};

struct Block4 {
  const uint8_t* w;
  static Block4 load(const uint8_t* p) { return {p}; }
  Ints dot(Ints sum, const int8_t* x) const {
    constexpr int64_t half = cpu::kQuantBlock / 2;
    for (int64_t i = 0; i < half; ++i) sum.v += int32_t{w[i] & 15} * x[i] + int32_t{w[i] >> 4} * x[half + i];
    return sum;
  }
};

#endif

}  // namespace tinyllm::TINYLLM_ISA
