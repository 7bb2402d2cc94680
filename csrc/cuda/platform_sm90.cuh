// The hardware abstraction for Hopper (compute capability 9.0, built for sm_90a), in addition to platform.cuh: barriers
// in shared memory (mbarrier), bulk tensor copies (TMA), and matmuls of a warpgroup (wgmma). Compiled for anything but
// sm_90a these functions trap; no launcher calls the kernels that use them there.
#pragma once
#include "platform.cuh"

#if defined(__CUDACC__)

#include <cuda.h>  // only for its types; the one driver function that is needed is looked up through the runtime

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TINYLLM_SM90(...) asm volatile(__VA_ARGS__)
#else
#define TINYLLM_SM90(...) __trap()
#endif

namespace tinyllm::cuda {

TINYLLM_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- Barriers of threads and bytes (mbarrier)

// A phase completes when the expected number of threads have arrived and all announced bytes have been copied. Phases
// are distinguished by their parity, which is 0 for the first one.
struct alignas(8) Barrier {
  uint64_t state;
};

TINYLLM_DEVICE void barrier_init(Barrier* barrier, uint32_t arrivals) {
  TINYLLM_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes barrier_init visible to TMA; to be called after all of them and before the block synchronises.
TINYLLM_DEVICE void fence_barrier_init() { TINYLLM_SM90("fence.mbarrier_init.release.cluster;" :: : "memory"); }
TINYLLM_DEVICE void barrier_arrive(Barrier* barrier) {
  TINYLLM_SM90("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
TINYLLM_DEVICE void barrier_arrive_expect_bytes(Barrier* barrier, uint32_t bytes) {
  TINYLLM_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes) : "memory");
}
// Waits for the end of the current phase if it has that parity. Parity 1 does not wait before the end of the first
// phase.
TINYLLM_DEVICE void barrier_wait(Barrier* barrier, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0)
    TINYLLM_SM90(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(shared_address(barrier)),
        "r"(parity) : "memory");
}

// ---- Bulk tensor copies (TMA)

// A box of kBoxColumns columns (128 bytes) and several rows of one head is stored in shared memory as rows of 128 bytes
// with the 128-byte swizzle: piece p of 16 bytes of row r is at p ^ r % 8. This is the layout that wgmma reads without
// bank conflicts.
constexpr int kBoxColumns = 64;
using TensorMap = CUtensorMap;

// Copies the box at (first_row, first_column) of a head of a (B, H, rows, columns) tensor to shared memory aligned to
// 1024 bytes. Rows beyond the tensor are filled with zeros. The copy completes on the barrier, in bytes.
TINYLLM_DEVICE void tma_load(void* shared, const TensorMap& map, Barrier* barrier, int first_column, int first_row,
                             int head, int batch) {
  TINYLLM_SM90(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(first_column), "r"(first_row), "r"(head), "r"(batch) : "memory");
}
TINYLLM_DEVICE void prefetch_tensor_map(const TensorMap& map) {
  TINYLLM_SM90("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Called on the host. `sizes` and `strides` are those of columns (whose stride is 1 and not listed), rows, heads and
// batches, in elements.
inline TensorMap make_tensor_map(void* data, bool is_bf16, const int64_t (&sizes)[4], const int64_t (&strides)[3],
                                 int box_rows) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status{};
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status),
          "cuTensorMapEncodeTiled");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status),
          "cuTensorMapEncodeTiled");
#endif
    if (status != cudaDriverEntryPointSuccess || found == nullptr)
      throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled; 12.0 or later is needed");
    return reinterpret_cast<Encode>(found);
  }();
  cuuint64_t dims[4], steps[3];
  for (int i = 0; i < 4; ++i) dims[i] = static_cast<cuuint64_t>(sizes[i]);
  for (int i = 0; i < 3; ++i) steps[i] = static_cast<cuuint64_t>(strides[i]) * 2;
  const cuuint32_t box[4] = {kBoxColumns, static_cast<cuuint32_t>(box_rows), 1, 1}, every[4] = {1, 1, 1, 1};
  TensorMap map;
  const CUresult result =
      encode(&map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, data, dims, steps,
             box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled failed with CUDA error " + std::to_string(result));
  return map;
}

// ---- Threads

// Change the number of registers of each thread of a warpgroup to kRegisters, a multiple of 8; all its threads must
// call this.
template <int kRegisters>
TINYLLM_DEVICE void increase_registers() {
  TINYLLM_SM90("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
TINYLLM_DEVICE void decrease_registers() {
  TINYLLM_SM90("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- Asynchronous matmuls of a warpgroup (wgmma)

// To be called before the first wgmma after other code has accessed the registers of d or a.
TINYLLM_DEVICE void wgmma_fence() { TINYLLM_SM90("wgmma.fence.sync.aligned;" :: : "memory"); }
TINYLLM_DEVICE void wgmma_commit() { TINYLLM_SM90("wgmma.commit_group.sync.aligned;" :: : "memory"); }
// Waits until at most N committed groups are in flight.
template <int N>
TINYLLM_DEVICE void wgmma_wait() {
  TINYLLM_SM90("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// The same where the code before it is meant to overlap with the wgmma in flight. The compiler sees no dependence
// between the two and would move the wait up. It does not move it out of a loop, even one with a single iteration; the
// empty assembly hides the number of iterations.
template <int N>
TINYLLM_DEVICE void wgmma_wait_here() {
  int rounds = 1;
  asm volatile("" : "+r"(rounds));
#pragma unroll 1
  do wgmma_wait<N>();
  while (--rounds);
}
// Makes the preceding stores of this thread to shared memory visible to wgmma, after a barrier.
TINYLLM_DEVICE void fence_async_proxy() { TINYLLM_SM90("fence.proxy.async.shared::cta;" :: : "memory"); }
// Marks registers that a wgmma in flight reads or writes, so that the compiler keeps all uses of them behind the
// preceding wait.
template <int N>
TINYLLM_DEVICE void fence_operands(float (&d)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[j][i])::"memory");
}
template <int N>
TINYLLM_DEVICE void fence_operands(uint32_t (&a)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[j][i])::"memory");
}

// Returns the descriptor of an operand in shared memory, in rows of 128 bytes as tma_load writes them. If kTransposed
// is false, the operand is K-major: its rows go along M or N, and 16 of their columns along K. If true, rows go along K
// and columns along N, and the next 64 columns of N are panel_bytes further.
template <bool kTransposed>
TINYLLM_DEVICE uint64_t smem_descriptor(const void* first, uint32_t panel_bytes = 0) {
  constexpr uint64_t kSwizzle128 = 1, kEightRows = 1024;
  const uint64_t leading = kTransposed ? panel_bytes / 16 : 1;
  return (shared_address(first) & 0x3ffff) >> 4 | leading << 16 | kEightRows / 16 << 32 | kSwizzle128 << 62;
}

// The numbers of the accumulators in the text of the instruction, and the operands.
#define TINYLLM_REGISTERS_32                                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TINYLLM_REGISTERS_64                                                                          \
  TINYLLM_REGISTERS_32                                                                                \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
  "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TINYLLM_ROW(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define TINYLLM_ROWS(j) TINYLLM_ROW(j), TINYLLM_ROW(j + 1), TINYLLM_ROW(j + 2), TINYLLM_ROW(j + 3)
// The parameters are N, the type, the accumulators, the operands a and b, the flag whether to accumulate, and the
// immediates that follow it.
#define TINYLLM_WGMMA(n, type, registers, factors, add, rest) \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " add                     \
  ", 0;\n"                                                    \
  "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type " {" registers "}, " factors ", p, " rest ";\n}"

// d = a b, or d += a b if `add`, for a 64x16 matrix a and a 16xN matrix b. Warp w of the four holds the rows 16 w ...
// 16 w + 15 of d and a in the layout of mma (platform.cuh). a comes from shared memory (K-major) or from registers, b
// from shared memory.
// clang-format off: it misinterprets the colons between operands
template <class T, bool kTransposed>
TINYLLM_DEVICE void wgmma(float (&d)[8][4], uint64_t a, uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, bf16>)
    TINYLLM_SM90(TINYLLM_WGMMA(64, bf16, TINYLLM_REGISTERS_32, "%32, %33", "%34", "1, 1, 0, %35")
                 : TINYLLM_ROWS(0), TINYLLM_ROWS(4)
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)),
                   "n"(kTransposed ? 1 : 0));
  else
    TINYLLM_SM90(TINYLLM_WGMMA(64, f16, TINYLLM_REGISTERS_32, "%32, %33", "%34", "1, 1, 0, %35")
                 : TINYLLM_ROWS(0), TINYLLM_ROWS(4)
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)),
                   "n"(kTransposed ? 1 : 0));
}
template <class T, bool kTransposed>
TINYLLM_DEVICE void wgmma(float (&d)[16][4], uint64_t a, uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, bf16>)
    TINYLLM_SM90(TINYLLM_WGMMA(128, bf16, TINYLLM_REGISTERS_64, "%64, %65", "%66", "1, 1, 0, %67")
                 : TINYLLM_ROWS(0), TINYLLM_ROWS(4), TINYLLM_ROWS(8), TINYLLM_ROWS(12)
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)),
                   "n"(kTransposed ? 1 : 0));
  else
    TINYLLM_SM90(TINYLLM_WGMMA(128, f16, TINYLLM_REGISTERS_64, "%64, %65", "%66", "1, 1, 0, %67")
                 : TINYLLM_ROWS(0), TINYLLM_ROWS(4), TINYLLM_ROWS(8), TINYLLM_ROWS(12)
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)),
                   "n"(kTransposed ? 1 : 0));
}
template <class T, bool kTransposed>
TINYLLM_DEVICE void wgmma(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, bf16>)
    TINYLLM_SM90(TINYLLM_WGMMA(64, bf16, TINYLLM_REGISTERS_32, "{%32, %33, %34, %35}, %36", "%37", "1, 1, %38")
                 : TINYLLM_ROWS(0), TINYLLM_ROWS(4)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),
                   "n"(kTransposed ? 1 : 0));
  else
    TINYLLM_SM90(TINYLLM_WGMMA(64, f16, TINYLLM_REGISTERS_32, "{%32, %33, %34, %35}, %36", "%37", "1, 1, %38")
                 : TINYLLM_ROWS(0), TINYLLM_ROWS(4)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),
                   "n"(kTransposed ? 1 : 0));
}
template <class T, bool kTransposed>
TINYLLM_DEVICE void wgmma(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, bf16>)
    TINYLLM_SM90(TINYLLM_WGMMA(128, bf16, TINYLLM_REGISTERS_64, "{%64, %65, %66, %67}, %68", "%69", "1, 1, %70")
                 : TINYLLM_ROWS(0), TINYLLM_ROWS(4), TINYLLM_ROWS(8), TINYLLM_ROWS(12)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),
                   "n"(kTransposed ? 1 : 0));
  else
    TINYLLM_SM90(TINYLLM_WGMMA(128, f16, TINYLLM_REGISTERS_64, "{%64, %65, %66, %67}, %68", "%69", "1, 1, %70")
                 : TINYLLM_ROWS(0), TINYLLM_ROWS(4), TINYLLM_ROWS(8), TINYLLM_ROWS(12)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),
                   "n"(kTransposed ? 1 : 0));
}
// clang-format on

#undef TINYLLM_WGMMA
#undef TINYLLM_ROWS
#undef TINYLLM_ROW
#undef TINYLLM_REGISTERS_64
#undef TINYLLM_REGISTERS_32

}  // namespace tinyllm::cuda

#else
#include <emulated_sm90.h>
#endif
