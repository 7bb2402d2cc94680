// The vectors of NEON: 128 bits, for every AArch64 processor. See simd.h.
//
// Only what ARMv8.0 has: the conversions from and to float16 belong to it, its arithmetic (ARMv8.2) does not.
#pragma once
#include <cstring>

#include "types.h"

namespace tinyllm::TINYLLM_ISA {

template <>
struct Vec<float> {
  static constexpr int size = 4;
  float32x4_t v;
  static Vec set1(float x) { return {vdupq_n_f32(x)}; }
  static Vec zero() { return {vdupq_n_f32(0.0f)}; }
  static Vec load(const float* p) { return {vld1q_f32(p)}; }
  static Vec load(const bfloat16* p) { return {vreinterpretq_f32_u32(vshll_n_u16(bits_at(p), 16))}; }
  static Vec load(const float16* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(bits_at(p)))}; }
  static Vec load(const uint8_t* p) { return {vcvtq_f32_u32(words_at(p))}; }
  static void load_pairs(const bfloat16* p, Vec& even, Vec& odd) {
    const uint32x4_t bits = vreinterpretq_u32_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
    even = {vreinterpretq_f32_u32(vshlq_n_u32(bits, 16))};
    odd = {vreinterpretq_f32_u32(vandq_u32(bits, vdupq_n_u32(0xffff0000)))};
  }
  void store(float* p) const { vst1q_f32(p, v); }
  void store(bfloat16* p) const {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t rounded = vbslq_u32(vceqq_f32(v, v), up, vdupq_n_u32(0x7fc00000));
    store_bits(vshrn_n_u32(rounded, 16), p);
  }
  void store(float16* p) const { store_bits(vreinterpret_u16_f16(vcvt_f16_f32(v)), p); }
  // These processors recognise a stream of whole lines by themselves.
  template <class T>
  void stream(T* p) const {
    store(p);
  }
  Vec operator+(Vec b) const { return {vaddq_f32(v, b.v)}; }
  Vec operator-(Vec b) const { return {vsubq_f32(v, b.v)}; }
  Vec operator*(Vec b) const { return {vmulq_f32(v, b.v)}; }
  Vec operator/(Vec b) const { return {vdivq_f32(v, b.v)}; }
  Vec sqrt() const { return {vsqrtq_f32(v)}; }
  Vec where_positive(Vec gate) const {
    return {vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), vclezq_f32(gate.v)))};
  }
  static Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  // The instructions fmax and fmaxnm treat NaN in other ways.
  static Vec max(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
  static Vec min(Vec a, Vec b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
  float sum() const { return vaddvq_f32(v); }
  float max_element() const { return vmaxvq_f32(v); }
  static Vec first(Vec a, int64_t n, Vec b) {
    const uint32x4_t index = vcombine_u32(vcreate_u32(0x100000000), vcreate_u32(0x300000002));
    return {vbslq_f32(vcltq_u32(index, vdupq_n_u32(static_cast<uint32_t>(n))), a.v, b.v)};
  }
  static Vec where_finite(Vec x, Vec a, Vec b) {
    const float32x4_t zero = vsubq_f32(x.v, x.v);  // NaN where x is not finite
    return {vbslq_f32(vceqq_f32(zero, zero), a.v, b.v)};
  }
  static Vec where(const uint8_t* from, Vec a, Vec b) { return {vbslq_f32(vceqzq_u32(words_at(from)), b.v, a.v)}; }
  static void interleave(Vec& a, Vec& b) {
    const float32x4_t low = vzip1q_f32(a.v, b.v);
    b.v = vzip2q_f32(a.v, b.v);
    a.v = low;
  }
  static Vec pow2(Vec shifted) {
    const int32x4_t n = vreinterpretq_s32_f32(shifted.v);
    return {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23))};
  }

 private:
  template <class T>
  static uint16x4_t bits_at(const T* p) {
    return vld1_u16(reinterpret_cast<const uint16_t*>(p));
  }
  static uint32x4_t words_at(const uint8_t* p) {
    uint32_t bytes;
    std::memcpy(&bytes, p, sizeof(bytes));
    return vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes))));
  }
  template <class T>
  static void store_bits(uint16x4_t bits, T* p) {
    vst1_u16(reinterpret_cast<uint16_t*>(p), bits);
  }
};

template <>
struct Vec<double> {
  static constexpr int size = 2;
  float64x2_t v;
  static Vec set1(double x) { return {vdupq_n_f64(x)}; }
  static Vec zero() { return {vdupq_n_f64(0.0)}; }
  static Vec load(const double* p) { return {vld1q_f64(p)}; }
  void store(double* p) const { vst1q_f64(p, v); }
  void stream(double* p) const { store(p); }
  Vec operator+(Vec b) const { return {vaddq_f64(v, b.v)}; }
  Vec operator-(Vec b) const { return {vsubq_f64(v, b.v)}; }
  Vec operator*(Vec b) const { return {vmulq_f64(v, b.v)}; }
  Vec operator/(Vec b) const { return {vdivq_f64(v, b.v)}; }
  Vec sqrt() const { return {vsqrtq_f64(v)}; }
  Vec where_positive(Vec gate) const {
    return {vreinterpretq_f64_u64(vbicq_u64(vreinterpretq_u64_f64(v), vclezq_f64(gate.v)))};
  }
  static Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f64(c.v, a.v, b.v)}; }
  static Vec max(Vec a, Vec b) { return {vbslq_f64(vcgtq_f64(a.v, b.v), a.v, b.v)}; }
  static Vec min(Vec a, Vec b) { return {vbslq_f64(vcltq_f64(a.v, b.v), a.v, b.v)}; }
  double sum() const { return vaddvq_f64(v); }
  double max_element() const { return vmaxvq_f64(v); }
  static Vec first(Vec a, int64_t n, Vec b) {
    const uint64x2_t index = vcombine_u64(vcreate_u64(0), vcreate_u64(1));
    return {vbslq_f64(vcltq_u64(index, vdupq_n_u64(static_cast<uint64_t>(n))), a.v, b.v)};
  }
  static Vec where_finite(Vec x, Vec a, Vec b) {
    const float64x2_t zero = vsubq_f64(x.v, x.v);
    return {vbslq_f64(vceqq_f64(zero, zero), a.v, b.v)};
  }
  static Vec where(const uint8_t* from, Vec a, Vec b) {
    const uint64x2_t words = vcombine_u64(vcreate_u64(from[0]), vcreate_u64(from[1]));
    return {vbslq_f64(vceqzq_u64(words), b.v, a.v)};
  }
  static void interleave(Vec& a, Vec& b) {
    const float64x2_t low = vzip1q_f64(a.v, b.v);
    b.v = vzip2q_f64(a.v, b.v);
    a.v = low;
  }
  static Vec pow2(Vec shifted) {
    const int64x2_t n = vreinterpretq_s64_f64(shifted.v);
    return {vreinterpretq_f64_s64(vshlq_n_s64(vaddq_s64(n, vdupq_n_s64(1023)), 52))};
  }
};

struct Words {
  static constexpr int size = 2;
  uint64x2_t v;
  static Words set1(uint32_t x) { return {vdupq_n_u64(x)}; }
  static Words count(uint32_t x) { return {vaddq_u64(vdupq_n_u64(x), vcombine_u64(vcreate_u64(0), vcreate_u64(1)))}; }
  Words operator*(Words b) const { return {vmull_u32(vmovn_u64(v), vmovn_u64(b.v))}; }
  Words operator^(Words b) const { return {veorq_u64(v, b.v)}; }
  Words upper() const { return {vshrq_n_u64(v, 32)}; }
  static void store_pairs(Words a, Words b, uint32_t* to) {
    vst1q_u32(to, vtrn1q_u32(vreinterpretq_u32_u64(a.v), vreinterpretq_u32_u64(b.v)));
  }
};

inline void end_of_stream() {}

}  // namespace tinyllm::TINYLLM_ISA
