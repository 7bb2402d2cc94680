// Argument checks shared by the CPU and CUDA sides. The Python functions check first and with better messages; these
// checks keep a direct call of torch.ops.tinyllm.* from accessing memory out of bounds.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace tinyllm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream text;
  ((text << parts), ...);
  throw std::invalid_argument(text.str());
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << "]";
  return text.str();
}

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  if (t.device() != like.device()) fail(op, ": ", name, " is on another device than the first argument");
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType wanted) {
  if (t.scalar_type() != wanted)
    fail(op, ": ", name, " has dtype ", torch::headeronly::toString(t.scalar_type()), "; ",
         torch::headeronly::toString(wanted), " is needed");
}

inline void check_shape(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> wanted) {
  bool same = t.dim() == static_cast<int64_t>(wanted.size());
  int64_t i = 0;
  if (same)
    for (const int64_t size : wanted) same = same && t.size(i++) == size;
  if (same) return;
  std::ostringstream text;
  for (const int64_t size : wanted) text << (text.tellp() > 0 ? ", " : "") << size;
  fail(op, ": ", name, " has shape ", shape_of(t), "; [", text.str(), "] is needed");
}

// The dtype in which a dtype is computed and accumulated.
inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace tinyllm
