// Scratch memory of kernels: a per-thread stack allocator, and the arena that divides a block of it into arrays.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(TINYLLM_SANITIZED)
#include <sanitizer/asan_interface.h>
#endif

namespace tinyllm::cpu {

// A lease of `bytes` of memory of the calling thread, aligned to 64 bytes, which ends with this object. Leases nest.
// A thread keeps blocks of up to 16 MiB in all for its next leases, because fresh pages from the system cost more than
// a small attention takes; larger blocks are freed with their lease.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return data_; }

 private:
  char* data_;
  bool owned_;
};

// Hands out consecutive arrays of a block of memory, each aligned to 64 bytes. Without a block it only adds up their
// sizes, so that the same code first measures a layout and then fills it in.
class Arena {
 public:
  explicit Arena(char* base = nullptr) : base_(base) {}
  template <class S>
  S* take(int64_t count) {
    char* at = base_ == nullptr ? nullptr : base_ + used_;
    const size_t bytes = static_cast<size_t>(count) * sizeof(S);
    used_ += (bytes + 63) / 64 * 64;
#if defined(TINYLLM_SANITIZED)
    // A poisoned gap behind each array makes the address sanitizer report accesses that run into the next one.
    used_ += 64;
    if (base_ != nullptr) ASAN_POISON_MEMORY_REGION(at + bytes, static_cast<size_t>(base_ + used_ - at) - bytes);
#endif
    return reinterpret_cast<S*>(at);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace tinyllm::cpu
