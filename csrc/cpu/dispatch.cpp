#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace tinyllm::cpu {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool (*usable)();
};

// All instruction sets of this build, best first.
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
#elif defined(__aarch64__)
      {&neon_kernels, [] { return true; }},
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

}  // namespace tinyllm::cpu
