// The dtypes for which CUDA kernels are compiled.
#pragma once
#include "../checks.h"
#include "platform.cuh"

namespace tinyllm::cuda {

// Calls f with a zero of the C++ type of the dtype.
template <class F>
void with_type(const char* op, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(bf16{});
    case ScalarType::Half:
      return f(f16{});
    default:
      fail(op, ": no CUDA kernel for dtype ", torch::headeronly::toString(dtype),
           "; float32, bfloat16 and float16 have one");
  }
}

}  // namespace tinyllm::cuda
