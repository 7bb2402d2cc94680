// The functions of csrc/cuda/cluster.cuh implemented for the CPU.
#pragma once
#include <emulated_platform.h>

namespace tinyllm::cuda {

constexpr bool kClusters = true;

inline unsigned cluster_rank() { return emulated::current->block->rank; }
inline unsigned cluster_blocks() { return static_cast<unsigned>(emulated::current->block->cluster->size()); }

inline void sync_cluster() {
  emulated::Block& block = *emulated::current->block;
  emulated::arrive_and_wait(*block.cluster_rendezvous, block.threads * cluster_blocks());
}

inline void cluster_exit_barrier() { sync_cluster(); }

inline float read_shared_of_block(const float* shared, unsigned rank) {
  const emulated::Block& own = *emulated::current->block;
  const auto offset = reinterpret_cast<const unsigned char*>(shared) - own.shared;
  if (rank >= cluster_blocks() || offset < 0 || offset + sizeof(float) > own.shared_bytes)
    throw std::runtime_error("read_shared_of_block: the address is not in the shared memory of the cluster");
  float value;
  std::memcpy(&value, (*own.cluster)[rank]->shared + offset, sizeof value);
  return value;
}

}  // namespace tinyllm::cuda
