#include "scratch.h"

#include <new>

namespace tinyllm::cpu {
namespace {

#if defined(TINYLLM_SANITIZED)
constexpr size_t kCachedBytes = 0;  // Each lease is an allocation of its own, so that its bounds are checked exactly.
#else
constexpr size_t kCachedBytes = size_t{16} << 20;  // per thread
#endif
constexpr int kCachedBlocks = 4;

char* allocate(size_t bytes) { return static_cast<char*>(::operator new(bytes, std::align_val_t{64})); }
void release(char* data) { ::operator delete(data, std::align_val_t{64}); }

// The blocks that a thread keeps, one for each nesting level: leases of a thread end in the reverse order of their
// beginning.
struct Cache {
  char* data[kCachedBlocks] = {};
  size_t bytes[kCachedBlocks] = {};
  int leases = 0;
  ~Cache() {
    for (char* block : data) release(block);
  }
};
thread_local Cache cache;

}  // namespace

Scratch::Scratch(size_t bytes) {
  const int level = cache.leases;
  size_t others = 0;
  for (int i = 0; i < kCachedBlocks; ++i) others += i == level ? 0 : cache.bytes[i];
  owned_ = level >= kCachedBlocks || others + bytes > kCachedBytes;
  if (owned_) {
    data_ = allocate(bytes);
  } else {
    if (cache.bytes[level] < bytes) {
      release(cache.data[level]);
      cache.data[level] = nullptr;
      cache.bytes[level] = 0;
      cache.data[level] = allocate(bytes);
      cache.bytes[level] = bytes;
    }
    data_ = cache.data[level];
  }
  ++cache.leases;  // Only now, so that an allocation that throws leaves no lease behind.
}

Scratch::~Scratch() {
  --cache.leases;
  if (owned_) release(data_);
}

}  // namespace tinyllm::cpu
