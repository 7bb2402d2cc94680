// A vector of floats or doubles for each instruction set, and what is written in terms of it.
//
// isa_<name>.cpp defines TINYLLM_ISA (a namespace) and one of TINYLLM_AVX512, TINYLLM_AVX2, TINYLLM_NEON and
// TINYLLM_SCALAR, switches the compiler's target where that is needed, and includes the kernels. Everything is in the
// namespace tinyllm::TINYLLM_ISA, so that the linker never merges a function compiled for one processor with the same
// function compiled for another.
//
// vec_<name>.h defines, for its instruction set:
//
// Vec<S>, which holds Vec<S>::size elements of type S. Loads and stores convert from and to 16-bit floats.
//   load(bytes)             of floats only: unsigned bytes as numbers
//   load_pairs(p, even, odd)  the elements 0, 2, ... and 1, 3, ... of 2 * size bfloat16; of floats only
//   stream(p)               a store past the caches; p is aligned to the size of the vector in memory
//   fma(a, b, c)            a b + c
//   max(a, b), min(a, b)    b if either is NaN
//   x.where_positive(gate)  0 where gate <= 0, x elsewhere; a NaN in the gate passes x, as in PyTorch's threshold
//   first(a, n, b)          the first n elements of a, followed by the others of b
//   where_finite(x, a, b)   a where x is finite, b elsewhere
//   where(bytes, a, b)      a where the byte is not 0, b elsewhere; the bytes are those of a bool tensor, which may
//                           hold other values than 0 and 1
// and, except for single elements:
//   interleave(a, b)        a0 b0 a1 b1 ...: the first half goes to a, the second to b
//   pow2(shifted)           2^n for an integer n, given as n + 1.5 * 2^23 for float, of which n in [-127, 127], and as
//                           n + 1.5 * 2^52 for double, of which n in [-1023, 1023]; the least n gives 0
//
// Words, 64-bit lanes whose lower halves hold 32-bit words; their upper halves are ignored.
//   a * b                   the 64-bit products
//   upper()                 the upper halves as words
//   store_pairs(a, b, p)    stores the words of a and b alternately
//
// end_of_stream(), which orders streaming stores before all later stores of this thread.
//
// The kernels need fewer than twenty operations, so these files are much smaller than a vendored library such as
// Highway, whose sizeless vectors could not be the elements of the micro-kernel's tile.
#pragma once
#include <cstring>

#include "types.h"

namespace tinyllm::TINYLLM_ISA {
template <class S>
struct Vec;
}

#if defined(TINYLLM_AVX512)
#include "vec_avx512.h"
#elif defined(TINYLLM_AVX2)
#include "vec_avx2.h"
#elif defined(TINYLLM_NEON)
#include "vec_neon.h"
#elif defined(TINYLLM_SCALAR)
#include "vec_scalar.h"
#endif

namespace tinyllm::TINYLLM_ISA {

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

// Keeps x in a register. GCC would rather load it anew for each use, as the operand of a multiply-add, and processors
// do no more loads a cycle than these. (Clang does not define __AVX512F__ where only the source switches the target.)
template <class V>
inline void hold([[maybe_unused]] V& x) {
#if defined(TINYLLM_AVX2) || (defined(TINYLLM_AVX512) && defined(__AVX512F__))
  asm("" : "+v"(x.v));
#endif
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

// Returns the sum of each vector, which are overwritten: those of rows i and i + size / 2 are added where they lie side
// by side, until there is one vector of sums.
template <class S>
inline Vec<S> sum_each(Vec<S> (&rows)[Vec<S>::size]) {
  if constexpr (Vec<S>::size > 1) {
#pragma GCC unroll 4
    for (int half = Vec<S>::size / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < half; ++i) {
        Vec<S>::interleave(rows[i], rows[i + half]);
        rows[i] = rows[i] + rows[i + half];
      }
    }
  }
  return rows[0];
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

// Marks kernels whose loops call a lambda for each vector. Compilers tend to leave one that stands in two loops, for
// whole vectors and for the rest of a row, as a function, whose calls cost several times its work.
#define TINYLLM_FLATTEN __attribute__((flatten))

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
