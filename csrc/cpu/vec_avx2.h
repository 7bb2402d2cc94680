// The vectors of AVX2: 256 bits. See simd.h.
#pragma once
#include <cstring>

#include "types.h"

namespace tinyllm::TINYLLM_ISA {

template <>
struct Vec<float> {
  static constexpr int size = 8;
  __m256 v;
  static Vec set1(float x) { return {_mm256_set1_ps(x)}; }
  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const bfloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  static Vec load(const float16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  static Vec load(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
  }
  static void load_pairs(const bfloat16* p, Vec& even, Vec& odd) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    even = {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
    odd = {_mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000))))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void stream(float* p) const { _mm256_stream_ps(p, v); }
  void store(bfloat16* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0b11011000);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  void store(float16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  template <class T>
  void stream(T* p) const {
    alignas(16) T buffer[size];
    store(buffer);
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm_load_si128(reinterpret_cast<const __m128i*>(buffer)));
  }
  Vec operator+(Vec b) const { return {_mm256_add_ps(v, b.v)}; }
  Vec operator-(Vec b) const { return {_mm256_sub_ps(v, b.v)}; }
  Vec operator*(Vec b) const { return {_mm256_mul_ps(v, b.v)}; }
  Vec operator/(Vec b) const { return {_mm256_div_ps(v, b.v)}; }
  Vec sqrt() const { return {_mm256_sqrt_ps(v)}; }
  Vec where_positive(Vec gate) const {
    return {_mm256_and_ps(_mm256_cmp_ps(gate.v, _mm256_setzero_ps(), _CMP_NLE_UQ), v)};
  }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  static Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  float sum() const {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  float max_element() const {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }
  static Vec first(Vec a, int64_t n, Vec b) {
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), index);
    return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(inside))};
  }
  static Vec where_finite(Vec x, Vec a, Vec b) {
    const __m256 zero = _mm256_sub_ps(x.v, x.v);  // NaN where x is not finite
    return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(zero, zero, _CMP_ORD_Q))};
  }
  static Vec where(const uint8_t* from, Vec a, Vec b) {
    const __m256i words = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    const __m256i hidden = _mm256_cmpeq_epi32(words, _mm256_setzero_si256());
    return {_mm256_blendv_ps(a.v, b.v, _mm256_castsi256_ps(hidden))};
  }
  static void interleave(Vec& a, Vec& b) {
    const __m256 low = _mm256_unpacklo_ps(a.v, b.v), high = _mm256_unpackhi_ps(a.v, b.v);
    a.v = _mm256_permute2f128_ps(low, high, 0x20);
    b.v = _mm256_permute2f128_ps(low, high, 0x31);
  }
  static Vec pow2(Vec shifted) {
    return {_mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_castps_si256(shifted.v), _mm256_set1_epi32(127)), 23))};
  }
};

// transpose and sum_each (simd.h) in half as many shuffles: steps that stay in the halves of registers come first.
inline Vec<float> sum_each(Vec<float> (&rows)[8]) {
  __m256 pairs[4], fours[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256 a = rows[2 * i].v, b = rows[2 * i + 1].v;
    pairs[i] = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256d a = _mm256_castps_pd(pairs[2 * i]), b = _mm256_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  }
  return {_mm256_add_ps(_mm256_permute2f128_ps(fours[0], fours[1], 0x20),
                        _mm256_permute2f128_ps(fours[0], fours[1], 0x31))};
}
inline void transpose(Vec<float> (&rows)[8]) {
  __m256 pairs[8], fours[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int from = i / 2 * 4 + i % 2, to = i / 2 * 4 + i % 2 * 2;
    const __m256d a = _mm256_castps_pd(pairs[from]), b = _mm256_castps_pd(pairs[from + 2]);
    fours[to] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
    fours[to + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    rows[i + 4].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}

template <>
struct Vec<double> {
  static constexpr int size = 4;
  __m256d v;
  static Vec set1(double x) { return {_mm256_set1_pd(x)}; }
  static Vec zero() { return {_mm256_setzero_pd()}; }
  static Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  void stream(double* p) const { _mm256_stream_pd(p, v); }
  Vec operator+(Vec b) const { return {_mm256_add_pd(v, b.v)}; }
  Vec operator-(Vec b) const { return {_mm256_sub_pd(v, b.v)}; }
  Vec operator*(Vec b) const { return {_mm256_mul_pd(v, b.v)}; }
  Vec operator/(Vec b) const { return {_mm256_div_pd(v, b.v)}; }
  Vec sqrt() const { return {_mm256_sqrt_pd(v)}; }
  Vec where_positive(Vec gate) const {
    return {_mm256_and_pd(_mm256_cmp_pd(gate.v, _mm256_setzero_pd(), _CMP_NLE_UQ), v)};
  }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm256_max_pd(a.v, b.v)}; }
  static Vec min(Vec a, Vec b) { return {_mm256_min_pd(a.v, b.v)}; }
  double sum() const {
    const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
  }
  double max_element() const {
    const __m128d half = _mm_max_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_max_sd(half, _mm_unpackhi_pd(half, half)));
  }
  static Vec first(Vec a, int64_t n, Vec b) {
    const __m256i inside = _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
    return {_mm256_blendv_pd(b.v, a.v, _mm256_castsi256_pd(inside))};
  }
  static Vec where_finite(Vec x, Vec a, Vec b) {
    const __m256d zero = _mm256_sub_pd(x.v, x.v);
    return {_mm256_blendv_pd(b.v, a.v, _mm256_cmp_pd(zero, zero, _CMP_ORD_Q))};
  }
  static Vec where(const uint8_t* from, Vec a, Vec b) {
    int bytes;
    std::memcpy(&bytes, from, sizeof(bytes));
    const __m256i words = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes));
    const __m256i hidden = _mm256_cmpeq_epi64(words, _mm256_setzero_si256());
    return {_mm256_blendv_pd(a.v, b.v, _mm256_castsi256_pd(hidden))};
  }
  static void interleave(Vec& a, Vec& b) {
    const __m256d low = _mm256_unpacklo_pd(a.v, b.v), high = _mm256_unpackhi_pd(a.v, b.v);
    a.v = _mm256_permute2f128_pd(low, high, 0x20);
    b.v = _mm256_permute2f128_pd(low, high, 0x31);
  }
  static Vec pow2(Vec shifted) {
    return {_mm256_castsi256_pd(
        _mm256_slli_epi64(_mm256_add_epi64(_mm256_castpd_si256(shifted.v), _mm256_set1_epi64x(1023)), 52))};
  }
};

struct Words {
  static constexpr int size = 4;
  __m256i v;
  static Words set1(uint32_t x) { return {_mm256_set1_epi64x(x)}; }
  static Words count(uint32_t x) { return {_mm256_add_epi64(_mm256_set1_epi64x(x), _mm256_setr_epi64x(0, 1, 2, 3))}; }
  Words operator*(Words b) const { return {_mm256_mul_epu32(v, b.v)}; }
  Words operator^(Words b) const { return {_mm256_xor_si256(v, b.v)}; }
  Words upper() const { return {_mm256_srli_epi64(v, 32)}; }
  static void store_pairs(Words a, Words b, uint32_t* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_blend_epi32(_mm256_slli_epi64(b.v, 32), a.v, 0x55));
  }
};

inline void end_of_stream() { _mm_sfence(); }

}  // namespace tinyllm::TINYLLM_ISA
