// The element types of tensors and the types they are computed in. No torch header: kernels see raw memory.
#pragma once
#include <cstdint>
#include <cstring>

namespace tinyllm {

// 16-bit floats as tensors store them; arithmetic happens in float.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The order of the values in PerDType (dispatch.h).
enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };
constexpr int kNumDTypes = 4;

// The type that an element type is computed and accumulated in: float, or double for double.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float to_compute(float x) { return x; }
inline double to_compute(double x) { return x; }
inline float to_compute(bfloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_compute(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u)  // inf, nan
    return bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // The shifted bits are value * 2^-112, exactly and for subnormals too.
  const float shifted = bit_cast<float>(magnitude << 13) * 0x1p112f;
  return bit_cast<float>(sign | bit_cast<uint32_t>(shifted));
}

inline void from_compute(float x, float& out) { out = x; }
inline void from_compute(double x, double& out) { out = x; }
inline void from_compute(float x, bfloat16& out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  // Round to nearest, ties to even; a NaN must not round up into infinity.
  out.bits = is_nan ? 0x7fc0u : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void from_compute(float x, float16& out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out.bits = sign | 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    out.bits = sign | 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: let a float addition round at 2^-24
    const float rounded = bit_cast<float>(magnitude) + 0.5f;
    out.bits = sign | static_cast<uint16_t>(bit_cast<uint32_t>(rounded) - 0x3f000000u);
  } else {
    magnitude += 0xfffu + ((magnitude >> 13) & 1u);
    out.bits = sign | static_cast<uint16_t>((magnitude - 0x38000000u) >> 13);
  }
}

}  // namespace tinyllm
