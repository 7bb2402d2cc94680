// Argument checks shared by the CPU and CUDA sides. The Python functions check first and with better messages; these
// checks keep a direct call of torch.ops.tinyllm.* from accessing memory out of bounds.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>

namespace tinyllm {

using IntArray = torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream text;
  ((text << parts), ...);
  throw std::invalid_argument(text.str());
}

inline std::string shape_of(IntArray sizes) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << "]";
  return text.str();
}
inline std::string shape_of(const Tensor& t) { return shape_of(t.sizes()); }

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  if (t.device() != like.device()) fail(op, ": ", name, " is on another device than the first argument");
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType wanted) {
  if (t.scalar_type() != wanted)
    fail(op, ": ", name, " has dtype ", torch::headeronly::toString(t.scalar_type()), "; ",
         torch::headeronly::toString(wanted), " is needed");
}

inline bool same_shape(IntArray a, IntArray b) { return std::equal(a.begin(), a.end(), b.begin(), b.end()); }

inline void check_shape(const char* op, const char* name, const Tensor& t, IntArray wanted) {
  if (same_shape(t.sizes(), wanted)) return;
  fail(op, ": ", name, " has shape ", shape_of(t), "; ", shape_of(wanted), " is needed");
}

// The dtype in which a dtype is computed and accumulated.
inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace tinyllm
