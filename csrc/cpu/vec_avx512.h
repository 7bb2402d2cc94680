// The vectors of AVX-512: 512 bits. See simd.h.
#pragma once
#include "types.h"

namespace tinyllm::TINYLLM_ISA {

constexpr int kNotFinite = 0x99;  // for vfpclass: quiet and signalling NaN, both infinities

template <>
struct Vec<float> {
  static constexpr int size = 16;
  __m512 v;
  static Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const bfloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  static Vec load(const float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static Vec load(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  static void load_pairs(const bfloat16* p, Vec& even, Vec& odd) {
    const __m512i bits = _mm512_loadu_si512(p);
    even = {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
    odd = {_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void stream(float* p) const { _mm512_stream_ps(p, v); }
  void store(bfloat16* p) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i high = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
  }
  void store(float16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  template <class T>
  void stream(T* p) const {
    alignas(32) T buffer[size];
    store(buffer);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_load_si256(reinterpret_cast<const __m256i*>(buffer)));
  }
  Vec operator+(Vec b) const { return {_mm512_add_ps(v, b.v)}; }
  Vec operator-(Vec b) const { return {_mm512_sub_ps(v, b.v)}; }
  Vec operator*(Vec b) const { return {_mm512_mul_ps(v, b.v)}; }
  Vec operator/(Vec b) const { return {_mm512_div_ps(v, b.v)}; }
  Vec sqrt() const { return {_mm512_sqrt_ps(v)}; }
  Vec where_positive(Vec gate) const {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(gate.v, _mm512_setzero_ps(), _CMP_NLE_UQ), v)};
  }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
  float sum() const { return _mm512_reduce_add_ps(v); }
  float max_element() const { return _mm512_reduce_max_ps(v); }
  static Vec first(Vec a, int64_t n, Vec b) {
    return {_mm512_mask_mov_ps(b.v, static_cast<__mmask16>((1u << n) - 1u), a.v)};
  }
  static Vec where_finite(Vec x, Vec a, Vec b) {
    return {_mm512_mask_mov_ps(a.v, _mm512_fpclass_ps_mask(x.v, kNotFinite), b.v)};
  }
  static Vec where(const uint8_t* from, Vec a, Vec b) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return {_mm512_mask_mov_ps(b.v, _mm_test_epi8_mask(bytes, bytes), a.v)};
  }
  static void interleave(Vec& a, Vec& b) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512 low = _mm512_permutex2var_ps(a.v, first, b.v);
    b.v = _mm512_permutex2var_ps(a.v, _mm512_add_epi32(first, _mm512_set1_epi32(8)), b.v);
    a.v = low;
  }
  static Vec pow2(Vec shifted) {
    return {_mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_add_epi32(_mm512_castps_si512(shifted.v), _mm512_set1_epi32(127)), 23))};
  }
};

template <>
struct Vec<double> {
  static constexpr int size = 8;
  __m512d v;
  static Vec set1(double x) { return {_mm512_set1_pd(x)}; }
  static Vec zero() { return {_mm512_setzero_pd()}; }
  static Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void stream(double* p) const { _mm512_stream_pd(p, v); }
  Vec operator+(Vec b) const { return {_mm512_add_pd(v, b.v)}; }
  Vec operator-(Vec b) const { return {_mm512_sub_pd(v, b.v)}; }
  Vec operator*(Vec b) const { return {_mm512_mul_pd(v, b.v)}; }
  Vec operator/(Vec b) const { return {_mm512_div_pd(v, b.v)}; }
  Vec sqrt() const { return {_mm512_sqrt_pd(v)}; }
  Vec where_positive(Vec gate) const {
    return {_mm512_maskz_mov_pd(_mm512_cmp_pd_mask(gate.v, _mm512_setzero_pd(), _CMP_NLE_UQ), v)};
  }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm512_max_pd(a.v, b.v)}; }
  static Vec min(Vec a, Vec b) { return {_mm512_min_pd(a.v, b.v)}; }
  double sum() const { return _mm512_reduce_add_pd(v); }
  double max_element() const { return _mm512_reduce_max_pd(v); }
  static Vec first(Vec a, int64_t n, Vec b) {
    return {_mm512_mask_mov_pd(b.v, static_cast<__mmask8>((1u << n) - 1u), a.v)};
  }
  static Vec where_finite(Vec x, Vec a, Vec b) {
    return {_mm512_mask_mov_pd(a.v, _mm512_fpclass_pd_mask(x.v, kNotFinite), b.v)};
  }
  static Vec where(const uint8_t* from, Vec a, Vec b) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return {_mm512_mask_mov_pd(b.v, static_cast<__mmask8>(_mm_test_epi8_mask(bytes, bytes)), a.v)};
  }
  static void interleave(Vec& a, Vec& b) {
    const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    const __m512d low = _mm512_permutex2var_pd(a.v, first, b.v);
    b.v = _mm512_permutex2var_pd(a.v, _mm512_add_epi64(first, _mm512_set1_epi64(4)), b.v);
    a.v = low;
  }
  static Vec pow2(Vec shifted) {
    return {_mm512_castsi512_pd(
        _mm512_slli_epi64(_mm512_add_epi64(_mm512_castpd_si512(shifted.v), _mm512_set1_epi64(1023)), 52))};
  }
};

struct Words {
  static constexpr int size = 8;
  __m512i v;
  static Words set1(uint32_t x) { return {_mm512_set1_epi64(x)}; }
  static Words count(uint32_t x) {
    return {_mm512_add_epi64(_mm512_set1_epi64(x), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7))};
  }
  Words operator*(Words b) const { return {_mm512_mul_epu32(v, b.v)}; }
  Words operator^(Words b) const { return {_mm512_xor_si512(v, b.v)}; }
  Words upper() const { return {_mm512_srli_epi64(v, 32)}; }
  static void store_pairs(Words a, Words b, uint32_t* to) {
    _mm512_storeu_si512(to, _mm512_mask_mov_epi32(_mm512_slli_epi64(b.v, 32), 0x5555, a.v));
  }
};

inline void end_of_stream() { _mm_sfence(); }

}  // namespace tinyllm::TINYLLM_ISA
