// Vectors of a single element for any processor, of which the compiler vectorises what it can. See simd.h.
#pragma once
#include <cmath>

#include "types.h"

namespace tinyllm::TINYLLM_ISA {

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
  static Vec load(const uint8_t* p) { return {static_cast<S>(*p)}; }
  static void load_pairs(const bfloat16* p, Vec& even, Vec& odd) {
    even = load(p);
    odd = load(p + 1);
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
  Vec sqrt() const { return {std::sqrt(v)}; }
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

struct Words {
  static constexpr int size = 1;
  uint64_t v;
  static Words set1(uint32_t x) { return {x}; }
  static Words count(uint32_t x) { return {x}; }
  Words operator*(Words b) const { return {(v & 0xffffffffu) * (b.v & 0xffffffffu)}; }
  Words operator^(Words b) const { return {v ^ b.v}; }
  Words upper() const { return {v >> 32}; }
  static void store_pairs(Words a, Words b, uint32_t* to) {
    to[0] = static_cast<uint32_t>(a.v);
    to[1] = static_cast<uint32_t>(b.v);
  }
};

inline void end_of_stream() {}

}  // namespace tinyllm::TINYLLM_ISA
