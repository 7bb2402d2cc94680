// The hardware abstraction of the kernels and, with platform_sm90.cuh and cluster.cuh, the only files with inline
// assembly. All code above them is plain C++ with threadIdx and blockIdx, which tests/emulation also compiles for the
// CPU, against an implementation of the same functions that runs the threads of a block as fibers.
#pragma once

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#define TINYLLM_DEVICE __device__ __forceinline__
// The library and the dispatch key under which the implementations are registered.
#define TINYLLM_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(tinyllm, CUDA, m)

namespace tinyllm::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

// ---- Numbers

TINYLLM_DEVICE float to_float(float x) { return x; }
TINYLLM_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
TINYLLM_DEVICE float to_float(f16 x) { return __half2float(x); }

template <class T>
TINYLLM_DEVICE T from_float(float x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else if constexpr (std::is_same_v<T, bf16>)
    return __float2bfloat16_rn(x);
  else
    return __float2half_rn(x);
}

// Packs two numbers as 16-bit ones into a register, the first in the lower half.
template <class T>
TINYLLM_DEVICE uint32_t pack(float low, float high) {
  uint32_t both;
  if constexpr (std::is_same_v<T, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// 2^x in one instruction; 2^-inf is 0.
TINYLLM_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- Threads

// The block's dynamic shared memory, aligned to 1024 bytes.
TINYLLM_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

TINYLLM_DEVICE void sync_block() { __syncthreads(); }
TINYLLM_DEVICE void sync_warp() { __syncwarp(); }
// Named barriers 1 to 15 of a block, each for a given number of threads; an arrival does not wait.
TINYLLM_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
TINYLLM_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Read values of other lanes; all lanes of the warp must call these functions.
template <class T>
TINYLLM_DEVICE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
template <class T>
TINYLLM_DEVICE T shuffle(T x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
// Whether x holds in any lane.
TINYLLM_DEVICE bool any_lane(bool x) { return __any_sync(0xffffffffu, x); }

// Aborts the launch with an error.
TINYLLM_DEVICE void trap() { __trap(); }

// ---- Global memory

// Access data that is not used again soon, so that caches need not keep it. V has 2, 4, 8 or 16 bytes and is aligned to
// its size.
template <class V>
TINYLLM_DEVICE V load_streaming(const V* p) {
  static_assert(sizeof(V) == 16 || sizeof(V) == 8 || sizeof(V) == 4 || sizeof(V) == 2);
  V v;
  if constexpr (sizeof(V) == 16) {
    const int4 bits = __ldcs(reinterpret_cast<const int4*>(p));
    __builtin_memcpy(&v, &bits, 16);
  } else if constexpr (sizeof(V) == 8) {
    const int2 bits = __ldcs(reinterpret_cast<const int2*>(p));
    __builtin_memcpy(&v, &bits, 8);
  } else if constexpr (sizeof(V) == 4) {
    const int bits = __ldcs(reinterpret_cast<const int*>(p));
    __builtin_memcpy(&v, &bits, 4);
  } else {
    const short bits = __ldcs(reinterpret_cast<const short*>(p));
    __builtin_memcpy(&v, &bits, 2);
  }
  return v;
}
template <class V>
TINYLLM_DEVICE void store_streaming(V* p, V v) {
  static_assert(sizeof(V) == 16 || sizeof(V) == 8 || sizeof(V) == 4 || sizeof(V) == 2);
  if constexpr (sizeof(V) == 16) {
    int4 bits;
    __builtin_memcpy(&bits, &v, 16);
    __stcs(reinterpret_cast<int4*>(p), bits);
  } else if constexpr (sizeof(V) == 8) {
    int2 bits;
    __builtin_memcpy(&bits, &v, 8);
    __stcs(reinterpret_cast<int2*>(p), bits);
  } else if constexpr (sizeof(V) == 4) {
    int bits;
    __builtin_memcpy(&bits, &v, 4);
    __stcs(reinterpret_cast<int*>(p), bits);
  } else {
    short bits;
    __builtin_memcpy(&bits, &v, 2);
    __stcs(reinterpret_cast<short*>(p), bits);
  }
}

// Copies 16 bytes asynchronously from global to shared memory without a register in between; writes zeros, and reads
// nothing, if not valid. The data is visible to the calling thread after cp_async_commit and cp_async_wait, and to
// other threads after a barrier in addition.
TINYLLM_DEVICE void cp_async(void* shared, const void* global, bool valid) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
TINYLLM_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N groups that this thread has committed are in flight.
template <int N>
TINYLLM_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- Tensor cores of a warp (8.0 and later)

// Loads four 8x8 matrices of 16-bit numbers from shared memory. Lane l passes the address of row l % 8 of matrix l / 8,
// which has 16 bytes, and gets in r[i] two numbers of matrix i: row l / 4, columns l % 4 * 2 and the next.
TINYLLM_DEVICE void ldmatrix(uint32_t (&r)[4], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}
// The same for the transposes of the matrices: rows l % 4 * 2 and the next, column l / 4.
TINYLLM_DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

// d += a b for fragments of a 16x16 matrix a and a 16x8 matrix b. With g = l / 4 and c = l % 4 * 2, lane l holds the
// elements
//
//   a: (g, c), (g + 8, c), (g, c + 8), (g + 8, c + 8), each with the next column
//   b: (c, g) and (c + 8, g), each with the next row
//   d: (g, c), (g, c + 1), (g + 8, c), (g + 8, c + 1)
template <class T>
TINYLLM_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- Launching, on the host

struct LaunchShape {
  dim3 grid, block;
  size_t shared = 0;     // bytes of dynamic shared memory
  unsigned cluster = 1;  // blocks along x that can read each other's shared memory (9.0 and later)
};

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // otherwise PyTorch would find the error after its next launch and blame that
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape, void* stream,
            const Arguments&... arguments) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shape.shared > kWithoutAsking)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared)),
          name);
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = shape.cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}
inline int multiprocessors(int device) { return device_attribute(cudaDevAttrMultiProcessorCount, device); }
// The compute capability as an integer, 80 for 8.0.
inline int capability(int device) {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, device) +
         device_attribute(cudaDevAttrComputeCapabilityMinor, device);
}
// Returns the compute capability for which the current device's code of a kernel was compiled. A later GPU may run code
// that was compiled for an earlier one, without the parts that __CUDA_ARCH__ excluded from it.
template <class... Parameters>
int compiled_for(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), "cudaFuncGetAttributes");
  return attributes.ptxVersion;
}

}  // namespace tinyllm::cuda

#else
#include <emulated_platform.h>
#endif
