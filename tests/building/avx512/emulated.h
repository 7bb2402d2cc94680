// The intrinsics of AVX-512 for processors without it: those of SIMDe, and the ones that it lacks.
#pragma once
#include <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace tinyllm::emulated {

template <class To, class From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T, class V>
using Elements = std::array<T, sizeof(V) / sizeof(T)>;

// Halves the vector until one element is left, as the compilers' reductions do.
template <class T, class V, class F>
inline T reduce(V v, const F& f) {
  auto x = bits_as<Elements<T, V>>(v);
  for (size_t n = x.size() / 2; n > 0; n /= 2)
    for (size_t i = 0; i < n; ++i) x[i] = f(x[i], x[i + n]);
  return x[0];
}

template <class W, class To, class From, class V>
inline W convert(V v) {
  const auto x = bits_as<Elements<From, V>>(v);
  Elements<To, W> converted;
  std::copy(x.begin(), x.end(), converted.begin());
  return bits_as<W>(converted);
}

template <class V>
struct Halves {
  V low, high;
};

inline simde__m512 cvtph_ps(__m256i v) {
  const auto x = bits_as<Halves<__m128i>>(v);
  return bits_as<simde__m512>(Halves<__m256>{_mm256_cvtph_ps(x.low), _mm256_cvtph_ps(x.high)});
}

inline __m256i cvtps_ph(simde__m512 v) {
  const auto x = bits_as<Halves<__m256>>(v);
  return bits_as<__m256i>(Halves<__m128i>{_mm256_cvtps_ph(x.low, 0), _mm256_cvtps_ph(x.high, 0)});
}

// Which elements are NaN or infinite, the classes that the kernels ask for.
template <class T, class V>
inline auto not_finite_mask(V v) {
  const auto x = bits_as<Elements<T, V>>(v);
  unsigned mask = 0;
  for (size_t i = 0; i < x.size(); ++i) mask |= static_cast<unsigned>(!std::isfinite(x[i])) << i;
  return static_cast<std::conditional_t<sizeof(T) == 4, uint16_t, uint8_t>>(mask);
}

inline uint16_t test_epi8_mask(__m128i a, __m128i b) {
  return static_cast<uint16_t>(~_mm_movemask_epi8(_mm_cmpeq_epi8(_mm_and_si128(a, b), _mm_setzero_si128())));
}

template <class T, class V>
inline void stream(T* p, V v) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V) != 0) __builtin_trap();  // as the processor would
  std::memcpy(p, &v, sizeof(V));
}

inline constexpr auto add = [](auto a, auto b) { return a + b; };
inline constexpr auto larger = [](auto a, auto b) { return a > b ? a : b; };

}  // namespace tinyllm::emulated

#define _mm512_cvtepu16_epi32(v) (tinyllm::emulated::convert<simde__m512i, int32_t, uint16_t>(v))
#define _mm512_cvtepu8_epi32(v) (tinyllm::emulated::convert<simde__m512i, int32_t, uint8_t>(v))
#define _mm512_cvtepi32_ps(v) (tinyllm::emulated::convert<simde__m512, float, int32_t>(v))
#define _mm512_cvtepi32_epi16(v) (tinyllm::emulated::convert<__m256i, int16_t, int32_t>(v))
#define _mm512_cvtph_ps(v) tinyllm::emulated::cvtph_ps(v)
#define _mm512_cvtps_ph(v, rounding) tinyllm::emulated::cvtps_ph(v)
#define _mm512_reduce_add_ps(v) tinyllm::emulated::reduce<float>(v, tinyllm::emulated::add)
#define _mm512_reduce_add_pd(v) tinyllm::emulated::reduce<double>(v, tinyllm::emulated::add)
#define _mm512_reduce_max_ps(v) tinyllm::emulated::reduce<float>(v, tinyllm::emulated::larger)
#define _mm512_reduce_max_pd(v) tinyllm::emulated::reduce<double>(v, tinyllm::emulated::larger)
#define _mm512_stream_ps(p, v) tinyllm::emulated::stream(p, v)
#define _mm512_stream_pd(p, v) tinyllm::emulated::stream(p, v)
#define _mm512_fpclass_ps_mask(v, classes) tinyllm::emulated::not_finite_mask<float>(v)
#define _mm512_fpclass_pd_mask(v, classes) tinyllm::emulated::not_finite_mask<double>(v)
#define _mm_test_epi8_mask(a, b) tinyllm::emulated::test_epi8_mask(a, b)
#undef _mm512_madd_epi16  // SIMDe 0.7 has that of the masked form
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
