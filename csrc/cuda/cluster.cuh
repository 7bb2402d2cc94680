// Clusters of blocks that synchronise and read each other's shared memory (compute capability 9.0 and later).
// tests/emulation has the same functions for the CPU.
#pragma once
#include "platform.cuh"

#if defined(__CUDACC__)

namespace tinyllm::cuda {

// Whether the target architecture has clusters. A kernel that uses them is compiled for older ones too, with an empty
// body.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kClusters = false;
TINYLLM_DEVICE unsigned cluster_rank() { return 0; }
TINYLLM_DEVICE unsigned cluster_blocks() { return 1; }
TINYLLM_DEVICE void sync_cluster() {}
TINYLLM_DEVICE void cluster_exit_barrier() {}
TINYLLM_DEVICE float read_shared_of_block(const float* shared, unsigned) { return *shared; }
#else
constexpr bool kClusters = true;

// The rank of this block in its cluster, and the number of blocks in it. Clusters extend along x.
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

// Synchronises all threads of all blocks of the cluster and makes their writes to shared memory visible to each other.
TINYLLM_DEVICE void sync_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// To be called before a block ends, because others may still read its shared memory. It does not wait for writes.
TINYLLM_DEVICE void cluster_exit_barrier() {
  asm volatile(
      "barrier.cluster.arrive.relaxed.aligned;\n"
      "barrier.cluster.wait.aligned;" ::
          : "memory");
}

// Reads the number that another block of the cluster has at the place of `shared`.
TINYLLM_DEVICE float read_shared_of_block(const float* shared, unsigned rank) {
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
