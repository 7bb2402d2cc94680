#include "cpu_info.h"

#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include <algorithm>

namespace tinyllm::cpu {

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
#elif defined(__aarch64__) && defined(__APPLE__)
  return "apple";
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which older headers lack
  return (getauxval(AT_HWCAP2) & kBf16) != 0 ? "arm-bf16" : "arm";
#else
  return "other";
#endif
}

int64_t last_level_cache() {
#if defined(TINYLLM_SANITIZED)
  return int64_t{32} << 10;  // so small that the sanitizers see streaming stores of small tensors as well
#endif
  static const int64_t bytes = [] {
    int64_t found = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    found = std::max<int64_t>(sysconf(_SC_LEVEL3_CACHE_SIZE), sysconf(_SC_LEVEL2_CACHE_SIZE));
#endif
    // One process rarely has more to itself, and a virtual machine may report the sum of all caches of its host.
    constexpr int64_t kLimit = int64_t{32} << 20;
    return found > 0 ? std::min(found, kLimit) : kLimit;
  }();
  return bytes;
}

}  // namespace tinyllm::cpu
