// What the kernels share: vectors in memory, and sums over warps and blocks.
#pragma once
#include "platform.cuh"

namespace tinyllm::cuda {

constexpr int kWarp = 32;

// N neighbours in memory, moved by one instruction of up to 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

// As many as fit 16 bytes.
template <class T>
constexpr int kVector = 16 / sizeof(T);

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

// The sum of N numbers a thread over a block, the same bits in every thread. shared: N * 32 floats, which nobody else
// uses until everybody has passed the next barrier.
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

}  // namespace tinyllm::cuda
