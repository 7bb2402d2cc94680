#include "dispatch.h"

#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <new>
#include <stdexcept>

namespace tinyllm::cpu {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool (*usable)();
};

// Best first.
const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> all = {
#if defined(__x86_64__)
      {&avx512_kernels,
       [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
       }},
      {&avx2_kernels,
       [] {
         return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
       }},
#endif
      {&scalar_kernels, [] { return true; }},
  };
  return all;
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const Kernels& choose() {
  const char* wanted = std::getenv("TINYLLM_CPU_ISA");
  for (const Candidate& candidate : candidates()) {
    if (!candidate.usable()) continue;
    if (wanted == nullptr || *wanted == '\0' || candidate.kernels->name == std::string(wanted))
      return *candidate.kernels;
  }
  throw std::runtime_error("TINYLLM_CPU_ISA is '" + std::string(wanted) +
                           "'; this build on this processor allows: " + join(usable_isas()));
}

#if defined(TINYLLM_SANITIZED)
constexpr size_t kKeptBytes = 0;  // each lease is memory of its own, exact to the byte
#else
constexpr size_t kKeptBytes = size_t{16} << 20;  // of a thread, in all
#endif
constexpr int kKeptBlocks = 4;

char* allocate(size_t bytes) { return static_cast<char*>(::operator new(bytes, std::align_val_t{64})); }
void release(char* data) { ::operator delete(data, std::align_val_t{64}); }

// A stack of kept blocks: leases of one thread end in the opposite order of their beginning.
struct Kept {
  char* data[kKeptBlocks] = {};
  size_t bytes[kKeptBlocks] = {};
  int leases = 0;
  ~Kept() {
    for (char* block : data) release(block);
  }
};
thread_local Kept kept;

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) names.emplace_back(candidate.kernels->name);
  return names;
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates())
    if (candidate.usable()) names.emplace_back(candidate.kernels->name);
  return names;
}

std::string cpu_family() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  std::string family = "other";
  if (__get_cpuid(0, &a, &b, &c, &d)) {
    if (b == signature_AMD_ebx && c == signature_AMD_ecx) family = "amd";
    if (b == signature_INTEL_ebx && c == signature_INTEL_ecx) family = "intel";
  }
  constexpr unsigned kAmxBf16 = 1u << 22, kAvx512Bf16 = 1u << 5;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBf16) != 0) return family + "-amx";
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvx512Bf16) != 0) return family + "-bf16";
  return family;
#else
  return "other";
#endif
}

int64_t last_level_cache() {
#if defined(TINYLLM_SANITIZED)
  return int64_t{32} << 10;  // small tensors are written past the caches, too
#endif
  static const int64_t bytes = [] {
    int64_t found = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    found = std::max<int64_t>(sysconf(_SC_LEVEL3_CACHE_SIZE), sysconf(_SC_LEVEL2_CACHE_SIZE));
#endif
    // More is rarely one process's share, and a virtual machine may report all the caches of its host together.
    constexpr int64_t kShare = int64_t{32} << 20;
    return found > 0 ? std::min(found, kShare) : kShare;
  }();
  return bytes;
}

Scratch::Scratch(size_t bytes) {
  const int level = kept.leases;
  size_t others = 0;
  for (int i = 0; i < kKeptBlocks; ++i) others += i == level ? 0 : kept.bytes[i];
  owned_ = level >= kKeptBlocks || others + bytes > kKeptBytes;
  if (owned_) {
    data_ = allocate(bytes);
  } else {
    if (kept.bytes[level] < bytes) {
      release(kept.data[level]);
      kept.data[level] = nullptr;
      kept.bytes[level] = 0;
      kept.data[level] = allocate(bytes);
      kept.bytes[level] = bytes;
    }
    data_ = kept.data[level];
  }
  ++kept.leases;  // last: an allocation that throws leaves no lease behind
}

Scratch::~Scratch() {
  --kept.leases;
  if (owned_) release(data_);
}

}  // namespace tinyllm::cpu
