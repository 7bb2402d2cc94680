// Checks the vectors of one instruction set, element by element, against plain C++: TINYLLM_ISA names it, and the macro
// that simd.h asks for is defined as well. Prints what differs, and a line "ok" or "failed".
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "../../csrc/cpu/activation.h"
#include "../../csrc/cpu/random_kernel.h"
#include "../../csrc/cpu/simd.h"

namespace tinyllm::TINYLLM_ISA {
namespace {

int failures = 0;

// Whether two numbers are the same, NaN included. The sign of zero counts.
template <class S>
bool same(S a, S b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

template <class S>
void expect(const char* what, S found, S wanted, S x, S y) {
  if (same(found, wanted)) return;
  if (++failures <= 20)
    std::printf("%s(%g, %g): %.9g, not %.9g\n", what, double(x), double(y), double(found), double(wanted));
}

template <class S>
void expect_near(const char* what, S found, double wanted, S x, double units) {
  const double allowed = units * std::fabs(wanted) * double(std::numeric_limits<S>::epsilon());
  if (std::isnan(wanted) ? std::isnan(found) : std::fabs(double(found) - wanted) <= allowed) return;
  if (++failures <= 20) std::printf("%s(%.9g): %.9g, not %.9g\n", what, double(x), double(found), wanted);
}

// Calls f(a, b, x, y) with vectors and their elements, such that all pairs of values meet in all places of a vector.
template <class S, class F>
void for_pairs(const std::vector<S>& values, F&& f) {
  constexpr int size = Vec<S>::size;
  const size_t n = values.size();
  for (size_t i = 0; i < n; ++i)
    for (size_t j = 0; j < n; ++j) {
      S x[size], y[size];
      for (size_t k = 0; k < size; ++k) x[k] = values[(i + k) % n], y[k] = values[(j + 2 * k) % n];
      f(Vec<S>::load(x), Vec<S>::load(y), x, y);
    }
}

template <class S, class F>
void check_pairs(const char* what, const std::vector<S>& values, F&& plain) {
  for_pairs<S>(values, [&](Vec<S> a, Vec<S> b, const S* x, const S* y) {
    S found[Vec<S>::size];
    const auto [vector, element] = plain(a, b);
    vector.store(found);
    for (int k = 0; k < Vec<S>::size; ++k) expect(what, found[k], element(x[k], y[k]), x[k], y[k]);
  });
}

template <class V, class F>
struct Both {
  V vector;
  F element;
};
template <class V, class F>
Both(V, F) -> Both<V, F>;

template <class S>
void check_arithmetic() {
  using V = Vec<S>;
  constexpr S inf = std::numeric_limits<S>::infinity(), nan = std::numeric_limits<S>::quiet_NaN();
  const std::vector<S> values = {S(0),
                                 S(-0.0),
                                 S(1),
                                 S(-1),
                                 S(0.1),
                                 S(-3.7),
                                 S(1e30),
                                 inf,
                                 -inf,
                                 nan,
                                 -nan,
                                 S(1e-30),
                                 S(2.5),
                                 std::numeric_limits<S>::max(),
                                 std::numeric_limits<S>::denorm_min(),
                                 std::numeric_limits<S>::lowest()};
  check_pairs<S>("add", values, [](V a, V b) { return Both{a + b, [](S x, S y) { return x + y; }}; });
  check_pairs<S>("subtract", values, [](V a, V b) { return Both{a - b, [](S x, S y) { return x - y; }}; });
  check_pairs<S>("multiply", values, [](V a, V b) { return Both{a * b, [](S x, S y) { return x * y; }}; });
  check_pairs<S>("divide", values, [](V a, V b) { return Both{a / b, [](S x, S y) { return x / y; }}; });
  check_pairs<S>("max", values, [](V a, V b) { return Both{max(a, b), [](S x, S y) { return x > y ? x : y; }}; });
  check_pairs<S>("min", values, [](V a, V b) { return Both{min(a, b), [](S x, S y) { return x < y ? x : y; }}; });
  check_pairs<S>("where_positive", values, [](V a, V b) {
    return Both{a.where_positive(b), [](S x, S gate) { return gate <= S(0) ? S(0) : x; }};
  });
  check_pairs<S>("where_finite", values, [](V a, V b) {
    return Both{V::where_finite(b, a, V::set1(S(7))), [](S x, S y) { return std::isfinite(y) ? x : S(7); }};
  });
  if (V::size > 1)  // a single element leaves it to the compiler whether the product is rounded
    check_pairs<S>("fma", values, [](V a, V b) {
      return Both{fma(a, b, V::set1(S(-0.37))), [](S x, S y) { return std::fma(x, y, S(-0.37)); }};
    });
}

void check_bytes() {
  using V = Vec<float>;
  uint8_t bytes[256];
  float found[V::size];
  for (int i = 0; i < 256; ++i) bytes[i] = uint8_t(i * 37);
  for (int i = 0; i + V::size <= 256; i += V::size) {
    V::load(bytes + i).store(found);
    for (int k = 0; k < V::size; ++k) expect("load", found[k], float(bytes[i + k]), float(i), float(k));
  }
}

template <class S>
void check_order() {
  using V = Vec<S>;
  constexpr int size = V::size;
  S x[size], y[size], found[size];
  uint8_t bytes[size];
  for (int k = 0; k < size; ++k) x[k] = S(k + 1), y[k] = S(-k - 1), bytes[k] = uint8_t((k * 5 % 3) * 100);
  const V a = V::load(x), b = V::load(y);
  expect("sum", a.sum(), S(size * (size + 1) / 2), S(0), S(0));
  for (int shift = 0; shift < size; ++shift) {
    S rotated[size];
    for (int k = 0; k < size; ++k) rotated[k] = y[(k + shift) % size];
    expect("max_element", V::load(rotated).max_element(), S(-1), S(shift), S(0));
  }
  for (int n = 0; n <= size; ++n) {
    V::first(a, n, b).store(found);
    for (int k = 0; k < size; ++k) expect("first", found[k], k < n ? x[k] : y[k], S(n), S(k));
  }
  for (int shift = 0; shift < 256; ++shift) {
    for (int k = 0; k < size; ++k) bytes[k] = uint8_t(k % 2 == 0 ? shift : k % 3);
    V::where(bytes, a, b).store(found);
    for (int k = 0; k < size; ++k) expect("where", found[k], bytes[k] != 0 ? x[k] : y[k], S(bytes[k]), S(k));
  }
  V square[size];
  for (int r = 0; r < size; ++r) {
    for (int k = 0; k < size; ++k) found[k] = S(r * size + k);
    square[r] = V::load(found);
  }
  transpose(square);
  for (int r = 0; r < size; ++r) {
    square[r].store(found);
    for (int k = 0; k < size; ++k) expect("transpose", found[k], S(k * size + r), S(r), S(k));
  }
  for (int r = 0; r < size; ++r) {
    for (int k = 0; k < size; ++k) found[k] = S(r * size + k);
    square[r] = V::load(found);
  }
  sum_each(square).store(found);
  for (int r = 0; r < size; ++r) expect("sum_each", found[r], S(size * (2 * r * size + size - 1) / 2), S(r), S(0));
  alignas(64) S streamed[size];
  a.stream(streamed);
  end_of_stream();
  for (int k = 0; k < size; ++k) expect("stream", streamed[k], x[k], S(k), S(0));
}

// All 16-bit numbers are read, and written again with the float between each and the next, and its neighbours.
template <class T>
void check_conversion() {
  using V = Vec<float>;
  constexpr int size = V::size;
  const auto check = [](const float* x) {
    T out[size], wanted;
    V::load(x).store(out);
    for (int k = 0; k < size; ++k) {
      from_compute(x[k], wanted);
      expect("store", to_compute(out[k]), to_compute(wanted), x[k], 0.0f);
    }
  };
  for (uint32_t bits = 0; bits < 65536; bits += size) {
    T in[size];
    float plain[size], found[size], between[size];
    for (uint32_t k = 0; k < size; ++k) in[k].bits = uint16_t(bits + k), plain[k] = to_compute(in[k]);
    V::load(in).store(found);
    for (int k = 0; k < size; ++k) expect("load", found[k], plain[k], float(bits), float(k));
    check(plain);
    for (int step = -1; step <= 1; ++step) {
      for (uint32_t k = 0; k < size; ++k) {
        const T next{uint16_t(bits + k + 1)};
        const float middle = plain[k] + (to_compute(next) - plain[k]) / 2;
        between[k] = step == 0 ? middle : std::nextafter(middle, step * std::numeric_limits<float>::infinity());
      }
      check(between);
    }
  }
}

template <class S, class F, class G>
void check_function(const char* what, S least, S most, double units, F&& ours, G&& plain) {
  constexpr int size = Vec<S>::size, steps = 4000;
  for (int i = 0; i < steps; ++i) {
    S x[size], found[size];
    for (int k = 0; k < size; ++k) x[k] = least + (most - least) * S(i * size + k) / S(steps * size);
    ours(Vec<S>::load(x)).store(found);
    for (int k = 0; k < size; ++k)
      expect_near(what, found[k], double(plain(static_cast<long double>(x[k]))), x[k], units);
  }
}

template <class S>
void check_functions() {
  using V = Vec<S>;
  const S small = sizeof(S) == 4 ? S(-87) : S(-700);
  check_function<S>("exp", small, S(88), 2, [](V x) { return exp(x); }, [](long double x) { return std::exp(x); });
  check_function<S>("sqrt", S(0), S(1e6), 1, [](V x) { return x.sqrt(); }, [](long double x) { return std::sqrt(x); });
  check_function<S>("exp2", small, S(0), 2, [](V x) { return exp2(x); }, [](long double x) { return std::exp2(x); });
  check_function<S>("erf", S(-5), S(5), 4, [](V x) { return erf(x); }, [](long double x) { return std::erf(x); });
  const S inf = std::numeric_limits<S>::infinity(), nan = std::numeric_limits<S>::quiet_NaN();
  const auto element = [](V x) { return x.max_element(); };
  expect("exp", element(exp(V::set1(-inf))), S(0), -inf, S(0));
  expect("exp2", element(exp2(V::set1(-inf))), S(0), -inf, S(0));
  expect("exp2", element(exp2(V::set1(S(0)))), S(1), S(0), S(0));
  expect("exp", element(exp(V::set1(nan))), nan, nan, S(0));
  expect("exp2", element(exp2(V::set1(nan))), nan, nan, S(0));
}

// The known answers of the authors' Philox4x32-10 (Random123's kat_vectors), and a digest of many other blocks, which
// is the same for all instruction sets.
void check_random() {
  uint32_t words[kRandomBlock];
  const auto check = [&](const char* what, uint32_t found, uint32_t wanted) {
    if (found != wanted && ++failures <= 20) std::printf("%s: %08x, not %08x\n", what, found, wanted);
  };
  random_words(0, 0, 0, words);
  const uint32_t zeros[4] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
  for (int w = 0; w < 4; ++w) check("random_words", words[16 * w], zeros[w]);
  uint64_t digest = 0;
  for (uint64_t i = 0; i < 1000; ++i) {
    random_words(i * 0x9E3779B97F4A7C15u, i * 0xBF58476D1CE4E5B9u, i * 0x94D049BB133111EBu, words);
    for (const uint32_t word : words) digest = (digest ^ word) * 0x100000001B3u;
  }
  std::printf("random %016llx\n", static_cast<unsigned long long>(digest));
}

}  // namespace

int check() {
  check_arithmetic<float>();
  check_arithmetic<double>();
  check_order<float>();
  check_order<double>();
  check_bytes();
  check_conversion<bfloat16>();
  check_conversion<float16>();
  check_functions<float>();
  check_functions<double>();
  check_random();
  std::printf(failures == 0 ? "ok\n" : "failed\n");
  return failures == 0 ? 0 : 1;
}

}  // namespace tinyllm::TINYLLM_ISA

int main() { return tinyllm::TINYLLM_ISA::check(); }
