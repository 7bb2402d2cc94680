// Shared by the kernels: vectors in memory, and reductions over warps and blocks.
#pragma once
#include "platform.cuh"

namespace tinyllm::cuda {

constexpr int kWarp = 32;

// N consecutive numbers in memory, moved by one instruction of up to 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

// The number of elements in 16 bytes.
template <class T>
constexpr int kVector = 16 / sizeof(T);

// Loads data that nothing writes while the kernel runs, so that the load may be moved across stores. V has 2, 4, 8 or
// 16 bytes.
template <class V>
TINYLLM_DEVICE V load_constant(const V* p) {
#if defined(__CUDA_ARCH__)
  static_assert(sizeof(V) == 16 || sizeof(V) == 8 || sizeof(V) == 4 || sizeof(V) == 2);
  using Bits =
      std::conditional_t<sizeof(V) == 16, int4,
                         std::conditional_t<sizeof(V) == 8, int2, std::conditional_t<sizeof(V) == 4, int, short>>>;
  const Bits bits = __ldg(reinterpret_cast<const Bits*>(p));
  V v;
  __builtin_memcpy(&v, &bits, sizeof(V));
  return v;
#else
  return *p;
#endif
}

// Returns x as a value that the compiler does not know. What depends on it is then computed again, instead of being
// kept in registers through a loop.
TINYLLM_DEVICE int recomputed(int x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

TINYLLM_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
  return x;
}

TINYLLM_DEVICE float warp_max(float x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = fmaxf(x, shuffle_xor(x, lanes));
  return x;
}

TINYLLM_DEVICE double warp_sum(double x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
  return x;
}

// N consecutive numbers as raw bits. The compiler would hold each 16-bit number of a Vector in a register of its own
// between load and use.
template <class T, int N>
struct alignas(sizeof(T) * N) Packed {
  using Word = std::conditional_t<sizeof(T) * N % 4 == 0, uint32_t, uint16_t>;
  static constexpr int kPerWord = sizeof(Word) / sizeof(T);
  Word word[N / kPerWord];
};

template <class T, int N>
TINYLLM_DEVICE void unpack(float (&x)[N], const Packed<T, N>& packed) {
  constexpr int kPerWord = Packed<T, N>::kPerWord;
#pragma unroll
  for (int i = 0; i < N / kPerWord; ++i) {
    T numbers[kPerWord];
    __builtin_memcpy(numbers, &packed.word[i], sizeof(numbers));
#pragma unroll
    for (int j = 0; j < kPerWord; ++j) x[i * kPerWord + j] = to_float(numbers[j]);
  }
}

// Rounds N numbers to T.
template <class T, int N>
TINYLLM_DEVICE Packed<T, N> packed(const float (&x)[N]) {
  constexpr int kPerWord = Packed<T, N>::kPerWord;
  Packed<T, N> result;
#pragma unroll
  for (int i = 0; i < N / kPerWord; ++i) {
    if constexpr (kPerWord == 2) {
      result.word[i] = pack<T>(x[2 * i], x[2 * i + 1]);
    } else {
      const T number = from_float<T>(x[i]);
      __builtin_memcpy(&result.word[i], &number, sizeof(number));
    }
  }
  return result;
}

template <class T, int N>
TINYLLM_DEVICE Packed<T, N> packed_filled(float x) {
  float all[N];
#pragma unroll
  for (int i = 0; i < N; ++i) all[i] = x;
  return packed<T>(all);
}

// Sums N numbers of each thread over a block; all threads get the same bits. `shared` has N * 32 floats, which must not
// be used otherwise until all threads have passed the next barrier.
template <int N>
TINYLLM_DEVICE void block_sum(float (&x)[N], float* shared) {
  const int warps = (blockDim.x + kWarp - 1) / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = warp_sum(x[i]);
  if (warps == 1) return;
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) shared[i * kWarp + warp] = x[i];
  }
  sync_block();
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = warp_sum(lane < warps ? shared[i * kWarp + lane] : 0.0f);
}

// The number of bytes of shared memory that a block may use, by the compute capability (80 for 8.0).
inline size_t shared_memory_limit(int capability) {
  const int major = capability / 10;
  const int kibibytes = capability == 80 || capability == 87 ? 163 : major == 8 || major == 12 ? 99 : 227;
  return static_cast<size_t>(kibibytes) * 1024;
}

}  // namespace tinyllm::cuda
