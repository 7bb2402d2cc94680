// A vector of floats or doubles for each instruction set.
//
// isa_<name>.cpp defines TINYLLM_ISA (a namespace) and TINYLLM_AVX512, TINYLLM_AVX2 or neither (scalar), switches the
// compiler's target, and includes the kernels. Everything is in the namespace tinyllm::TINYLLM_ISA, so that the linker
// never merges a function compiled for one processor with the same function compiled for another.
//
// Vec<S> holds Vec<S>::size elements of type S. Loads and stores convert from and to 16-bit floats. max(a, b) and
// min(a, b) return b if either is NaN.
//
// The kernels need fewer than twenty operations, so this file is much smaller than a vendored library such as Highway,
// whose sizeless vectors could not be the elements of the micro-kernel's tile.
#pragma once
#include <cmath>
#include <cstring>

#include "types.h"

namespace tinyllm::TINYLLM_ISA {

template <class S>
struct Vec;

#if defined(TINYLLM_AVX512)

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
  // Writes past the caches; p is aligned to the size of the vector in memory.
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
  // Zero where gate <= 0. A NaN in the gate passes the element, as in PyTorch's threshold.
  Vec where_positive(Vec gate) const {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(gate.v, _mm512_setzero_ps(), _CMP_NLE_UQ), v)};
  }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
  float sum() const { return _mm512_reduce_add_ps(v); }
  float max_element() const { return _mm512_reduce_max_ps(v); }
  // The first n elements of a, followed by the others of b.
  static Vec first(Vec a, int64_t n, Vec b) {
    return {_mm512_mask_mov_ps(b.v, static_cast<__mmask16>((1u << n) - 1u), a.v)};
  }
  // a where x is finite, b elsewhere.
  static Vec where_finite(Vec x, Vec a, Vec b) {
    return {_mm512_mask_mov_ps(a.v, _mm512_fpclass_ps_mask(x.v, kNotFinite), b.v)};
  }
  // a where the byte is not 0, b elsewhere. The bytes are those of a bool tensor, which may hold other values than 0
  // and 1.
  static Vec where(const uint8_t* from, Vec a, Vec b) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return {_mm512_mask_mov_ps(b.v, _mm_test_epi8_mask(bytes, bytes), a.v)};
  }
  // Interleaves a0 b0 a1 b1 ...: the first half goes to a, the second to b.
  static void interleave(Vec& a, Vec& b) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512 low = _mm512_permutex2var_ps(a.v, first, b.v);
    b.v = _mm512_permutex2var_ps(a.v, _mm512_add_epi32(first, _mm512_set1_epi32(8)), b.v);
    a.v = low;
  }
  // 2^n for an integer n in [-127, 127], given as n + 1.5 * 2^23; n = -127 gives 0.
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

#elif defined(TINYLLM_AVX2)

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

#else  // scalar: any processor; the compiler vectorises what it can

template <class S>
struct Vec {
  static constexpr int size = 1;
  S v;
  static Vec set1(S x) { return {x}; }
  static Vec zero() { return {S(0)}; }
  template <class T>
  static Vec load(const T* p) {
    return {to_compute(*p)};
  }
  template <class T>
  void store(T* p) const {
    from_compute(v, *p);
  }
  template <class T>
  void stream(T* p) const {
    store(p);
  }
  Vec operator+(Vec b) const { return {v + b.v}; }
  Vec operator-(Vec b) const { return {v - b.v}; }
  Vec operator*(Vec b) const { return {v * b.v}; }
  Vec operator/(Vec b) const { return {v / b.v}; }
  Vec where_positive(Vec gate) const { return {gate.v <= S(0) ? S(0) : v}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
  static Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
  static Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
  static Vec first(Vec a, int64_t n, Vec b) { return n > 0 ? a : b; }
  static Vec where_finite(Vec x, Vec a, Vec b) { return std::isfinite(x.v) ? a : b; }
  static Vec where(const uint8_t* from, Vec a, Vec b) { return *from != 0 ? a : b; }
  S sum() const { return v; }
  S max_element() const { return v; }
};

#endif

// Orders streaming stores before all later stores of this thread.
inline void end_of_stream() {
#if defined(TINYLLM_AVX512) || defined(TINYLLM_AVX2)
  _mm_sfence();
#endif
}

template <class S>
inline Vec<S> fma(Vec<S> a, Vec<S> b, Vec<S> c) {
  return Vec<S>::fma(a, b, c);
}
template <class S>
inline Vec<S> max(Vec<S> a, Vec<S> b) {
  return Vec<S>::max(a, b);
}
template <class S>
inline Vec<S> min(Vec<S> a, Vec<S> b) {
  return Vec<S>::min(a, b);
}

// Transposes a square of vectors. One step interleaves row i with row i + size / 2 into rows 2i and 2i + 1, which
// rotates the bits of the index (row, column) by one; log2(size) steps exchange row and column.
template <class S>
inline void transpose(Vec<S> (&rows)[Vec<S>::size]) {
  constexpr int half = Vec<S>::size / 2;
  if constexpr (half > 0) {
#pragma GCC unroll 4
    for (int step = 1; step < Vec<S>::size; step *= 2) {
      Vec<S> mixed[Vec<S>::size];
#pragma GCC unroll 8
      for (int i = 0; i < half; ++i) {
        Vec<S> a = rows[i], b = rows[i + half];
        Vec<S>::interleave(a, b);
        mixed[2 * i] = a;
        mixed[2 * i + 1] = b;
      }
#pragma GCC unroll 16
      for (int i = 0; i < Vec<S>::size; ++i) rows[i] = mixed[i];
    }
  }
}

// Loads n < size elements, followed by zeros.
template <class V, class T>
inline V load_partial(const T* p, int64_t n) {
  if constexpr (V::size == 1) return V::load(p);
  T buffer[V::size] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return V::load(buffer);
}

template <class V, class T>
inline void store_partial(V x, T* p, int64_t n) {
  if constexpr (V::size == 1) return x.store(p);
  T buffer[V::size];
  x.store(buffer);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}

// Rounds x as a store to elements of type T does.
template <class T, class V>
inline V rounded(V x) {
  T buffer[V::size];
  x.store(buffer);
  return V::load(buffer);
}

// Calls f(i, n) for each vector of a row: i is the index of its first element, n the number of its elements inside the
// row.
template <class V, class F>
inline void for_each_vector(int64_t size, F&& f) {
  int64_t i = 0;
  for (; i + V::size <= size; i += V::size) f(i, static_cast<int64_t>(V::size));
  if (i < size) f(i, size - i);
}

// Load and store n elements, with n as given by for_each_vector.
template <class V, class T>
inline V load_n(const T* p, int64_t n) {
  return n == V::size ? V::load(p) : load_partial<V>(p, n);
}
template <class V, class T>
inline void store_n(V x, T* p, int64_t n) {
  if (n == V::size)
    x.store(p);
  else
    store_partial(x, p, n);
}

}  // namespace tinyllm::TINYLLM_ISA
