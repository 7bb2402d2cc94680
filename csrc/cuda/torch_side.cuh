// The torch side of the CUDA operators: the device and its current stream, new tensors, and launches.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../tensors.h"
#include "platform.cuh"

namespace tinyllm::cuda {

// Makes the device of a tensor the current one during its lifetime, and launches on the current stream of that device.
class Device {
 public:
  explicit Device(const Tensor& t) : index_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type_));
#if defined(__CUDACC__)
    guard_.emplace(index_);
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
#endif
  }

  int index() const { return index_; }
  int multiprocessors() const { return cuda::multiprocessors(index_); }
  int capability() const { return cuda::capability(index_); }  // 80 for 8.0

  // Allocates an uninitialised tensor on this device.
  Tensor empty(IntArray sizes, ScalarType dtype) const {
    const IntArray strides = contiguous_strides(sizes);
    return empty_strided(sizes, strides, dtype);
  }
  Tensor empty_strided(IntArray sizes, IntArray strides, ScalarType dtype) const {
    return tinyllm::empty_strided(sizes, strides, dtype, type_, index_);
  }

  template <class... Parameters, class... Arguments>
  void launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape,
              const Arguments&... arguments) const {
    cuda::launch(name, kernel, shape, stream_, arguments...);
  }

 private:
  int32_t index_ = 0, type_ = 0;
  void* stream_ = nullptr;
#if defined(__CUDACC__)
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
};

}  // namespace tinyllm::cuda
