// Blocks of a cluster, which wait for each other and read each other's shared memory (compute capability 9.0 and
// later). tests/emulation has the same functions for the CPU.
#pragma once
#include "platform.cuh"

#if defined(__CUDACC__)

namespace tinyllm::cuda {

// Whether this compilation has what follows. A kernel with clusters is compiled for older chips too, with no body.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kClusters = false;
TINYLLM_DEVICE unsigned cluster_rank() { return 0; }
TINYLLM_DEVICE unsigned cluster_blocks() { return 1; }
TINYLLM_DEVICE void sync_cluster() {}
TINYLLM_DEVICE void end_of_cluster() {}
TINYLLM_DEVICE float read_from_block(const float* shared, unsigned) { return *shared; }
#else
constexpr bool kClusters = true;

// This block's place in its cluster, and how many blocks it has. Clusters lie along x.
TINYLLM_DEVICE unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
TINYLLM_DEVICE unsigned cluster_blocks() {
  unsigned blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
}

// A barrier of all threads of all blocks of the cluster: what they wrote to shared memory before it, all can read
// behind it.
TINYLLM_DEVICE void sync_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// Before a block ends, since others may still read its memory. No more than that: what it wrote is not waited for.
TINYLLM_DEVICE void end_of_cluster() {
  asm volatile(
      "barrier.cluster.arrive.relaxed.aligned;\n"
      "barrier.cluster.wait.aligned;" ::
          : "memory");
}

// What another block of the cluster has where this one has `shared`.
TINYLLM_DEVICE float read_from_block(const float* shared, unsigned rank) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  float value;
  asm volatile(
      "mapa.shared::cluster.u32 %0, %0, %2;\n"
      "ld.shared::cluster.f32 %1, [%0];"
      : "+r"(address), "=f"(value)
      : "r"(rank)
      : "memory");
  return value;
}
#endif

}  // namespace tinyllm::cuda

#else
#include <emulated_cluster.h>
#endif
