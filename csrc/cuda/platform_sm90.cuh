// What the kernels ask of Hopper (compute capability 9.0, built for sm_90a) beside platform.cuh: barriers in shared
// memory, the bulk tensor copy engine, and products of four warps. The code is there where it is compiled for sm_90a;
// elsewhere these functions trap, and no launcher calls the kernels that have them.
#pragma once
#include "platform.cuh"

#if defined(__CUDACC__)

#include <cuda.h>  // types alone; the one function of the driver is found through the runtime

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TINYLLM_SM90(...) asm volatile(__VA_ARGS__)
#else
#define TINYLLM_SM90(...) __trap()
#endif

namespace tinyllm::cuda {

TINYLLM_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- Barriers of threads and bytes (mbarrier)

// Completes a phase when so many threads have arrived and all bytes announced have been copied. Phases are told apart
// by their parity: the first has 0.
struct alignas(8) Barrier {
  uint64_t state;
};

TINYLLM_DEVICE void barrier_init(Barrier* barrier, uint32_t arrivals) {
  TINYLLM_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Behind all barrier_init, before the block's barrier: the copy engine sees them then.
TINYLLM_DEVICE void barriers_ready() { TINYLLM_SM90("fence.mbarrier_init.release.cluster;" :: : "memory"); }
TINYLLM_DEVICE void barrier_arrive(Barrier* barrier) {
  TINYLLM_SM90("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
TINYLLM_DEVICE void barrier_arrive_expecting(Barrier* barrier, uint32_t bytes) {
  TINYLLM_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes) : "memory");
}
// Waits for the end of the latest phase of that parity; before the first phase's end, of parity 1 there is none to wait
// for.
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

// A box of kBoxColumns (128 bytes) x rows of one head goes to shared memory as rows of 128 bytes, whose eight pieces of
// 16 bytes change places with the row (piece p of row r to p ^ r % 8): what wgmma reads without bank conflicts.
constexpr int kBoxColumns = 64;
using TensorMap = CUtensorMap;

// Box (rows of a (B, H, rows, columns) tensor at first_row, columns at first_column) to a multiple of 1024 bytes. Rows
// beyond the tensor are zeros. Completes on the barrier, by its bytes.
TINYLLM_DEVICE void copy_box(void* shared, const TensorMap& map, Barrier* barrier, int first_column, int first_row,
                             int head, int batch) {
  TINYLLM_SM90(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(first_column), "r"(first_row), "r"(head), "r"(batch) : "memory");
}
TINYLLM_DEVICE void prefetch_map(const TensorMap& map) {
  TINYLLM_SM90("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// On the host. sizes and strides (elements) of columns (stride 1), rows, heads, batches.
inline TensorMap describe(void* data, bool is_bf16, const int64_t (&sizes)[4], const int64_t (&strides)[3],
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

// A warpgroup's share of the registers, a multiple of 8; every thread of it calls it.
template <int kRegisters>
TINYLLM_DEVICE void more_registers() {
  TINYLLM_SM90("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
TINYLLM_DEVICE void fewer_registers() {
  TINYLLM_SM90("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- Products of a warpgroup (wgmma), asynchronous

// Before the first product after ordinary code has touched the registers of d or a.
TINYLLM_DEVICE void products_begin() { TINYLLM_SM90("wgmma.fence.sync.aligned;" :: : "memory"); }
TINYLLM_DEVICE void products_commit() { TINYLLM_SM90("wgmma.commit_group.sync.aligned;" :: : "memory"); }
// Waits until at most N committed groups are under way.
template <int N>
TINYLLM_DEVICE void products_wait() {
  TINYLLM_SM90("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// The same where ordinary code before it is to overlap with what is waited for: the compiler sees no dependence between
// the two, and would move the wait up. It does not move it out of a loop, although of one round; the empty assembly
// hides how many there are.
template <int N>
TINYLLM_DEVICE void products_wait_here() {
  int rounds = 1;
  asm volatile("" : "+r"(rounds));
#pragma unroll 1
  do products_wait<N>();
  while (--rounds);
}
// Behind a thread's own stores to shared memory, and before a barrier: products see them then.
TINYLLM_DEVICE void stores_for_products() { TINYLLM_SM90("fence.proxy.async.shared::cta;" :: : "memory"); }
// Registers that a product under way writes or reads: whatever uses them stays behind the wait that this follows.
template <int N>
TINYLLM_DEVICE void settle(float (&d)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[j][i])::"memory");
}
template <int N>
TINYLLM_DEVICE void settle(uint32_t (&a)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[j][i])::"memory");
}

// Where a factor lies in shared memory, in rows of 128 bytes as copy_box leaves them. kTransposed false: the rows go
// along the product's M or N, 16 columns of them along K. True: rows go along K, columns along N, and the next 64
// columns of N lie panel_bytes further.
template <bool kTransposed>
TINYLLM_DEVICE uint64_t factor(const void* first, uint32_t panel_bytes = 0) {
  constexpr uint64_t kSwizzle128 = 1, kEightRows = 1024;
  const uint64_t leading = kTransposed ? panel_bytes / 16 : 1;
  return (shared_address(first) & 0x3ffff) >> 4 | leading << 16 | kEightRows / 16 << 32 | kSwizzle128 << 62;
}

// The accumulators' numbers in the instruction's text, and the operands themselves.
#define TINYLLM_REGISTERS_32                                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TINYLLM_REGISTERS_64                                                                          \
  TINYLLM_REGISTERS_32                                                                                \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
  "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TINYLLM_ROW(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define TINYLLM_ROWS(j) TINYLLM_ROW(j), TINYLLM_ROW(j + 1), TINYLLM_ROW(j + 2), TINYLLM_ROW(j + 3)
// N, the type, the accumulators, the factors' operands, what says whether to add, and what follows it.
#define TINYLLM_PRODUCT(n, type, registers, factors, add, rest) \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " add                       \
  ", 0;\n"                                                      \
  "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type " {" registers "}, " factors ", p, " rest ";\n}"

// d = a b, or d += a b with add, of 64x16 times 16xN: warp w of the four holds rows 16 w ... of d and a, as multiply's
// (platform.cuh). a from shared memory (its rows along M), or from registers; b from shared memory.
// clang-format off: it takes the colons between operands for something else
template <class T, bool kTransposed>
TINYLLM_DEVICE void multiply_async(float (&d)[8][4], uint64_t a, uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, bf16>)
    TINYLLM_SM90(TINYLLM_PRODUCT(64, bf16, TINYLLM_REGISTERS_32, "%32, %33", "%34", "1, 1, 0, %35")
                 : TINYLLM_ROWS(0), TINYLLM_ROWS(4)
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)),
                   "n"(kTransposed ? 1 : 0));
  else
    TINYLLM_SM90(TINYLLM_PRODUCT(64, f16, TINYLLM_REGISTERS_32, "%32, %33", "%34", "1, 1, 0, %35")
                 : TINYLLM_ROWS(0), TINYLLM_ROWS(4)
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)),
                   "n"(kTransposed ? 1 : 0));
}
template <class T, bool kTransposed>
TINYLLM_DEVICE void multiply_async(float (&d)[16][4], uint64_t a, uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, bf16>)
    TINYLLM_SM90(TINYLLM_PRODUCT(128, bf16, TINYLLM_REGISTERS_64, "%64, %65", "%66", "1, 1, 0, %67")
                 : TINYLLM_ROWS(0), TINYLLM_ROWS(4), TINYLLM_ROWS(8), TINYLLM_ROWS(12)
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)),
                   "n"(kTransposed ? 1 : 0));
  else
    TINYLLM_SM90(TINYLLM_PRODUCT(128, f16, TINYLLM_REGISTERS_64, "%64, %65", "%66", "1, 1, 0, %67")
                 : TINYLLM_ROWS(0), TINYLLM_ROWS(4), TINYLLM_ROWS(8), TINYLLM_ROWS(12)
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)),
                   "n"(kTransposed ? 1 : 0));
}
template <class T, bool kTransposed>
TINYLLM_DEVICE void multiply_async(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, bf16>)
    TINYLLM_SM90(TINYLLM_PRODUCT(64, bf16, TINYLLM_REGISTERS_32, "{%32, %33, %34, %35}, %36", "%37", "1, 1, %38")
                 : TINYLLM_ROWS(0), TINYLLM_ROWS(4)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),
                   "n"(kTransposed ? 1 : 0));
  else
    TINYLLM_SM90(TINYLLM_PRODUCT(64, f16, TINYLLM_REGISTERS_32, "{%32, %33, %34, %35}, %36", "%37", "1, 1, %38")
                 : TINYLLM_ROWS(0), TINYLLM_ROWS(4)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),
                   "n"(kTransposed ? 1 : 0));
}
template <class T, bool kTransposed>
TINYLLM_DEVICE void multiply_async(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, bf16>)
    TINYLLM_SM90(TINYLLM_PRODUCT(128, bf16, TINYLLM_REGISTERS_64, "{%64, %65, %66, %67}, %68", "%69", "1, 1, %70")
                 : TINYLLM_ROWS(0), TINYLLM_ROWS(4), TINYLLM_ROWS(8), TINYLLM_ROWS(12)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),
                   "n"(kTransposed ? 1 : 0));
  else
    TINYLLM_SM90(TINYLLM_PRODUCT(128, f16, TINYLLM_REGISTERS_64, "{%64, %65, %66, %67}, %68", "%69", "1, 1, %70")
                 : TINYLLM_ROWS(0), TINYLLM_ROWS(4), TINYLLM_ROWS(8), TINYLLM_ROWS(12)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),
                   "n"(kTransposed ? 1 : 0));
}
// clang-format on

#undef TINYLLM_PRODUCT
#undef TINYLLM_ROWS
#undef TINYLLM_ROW
#undef TINYLLM_REGISTERS_64
#undef TINYLLM_REGISTERS_32

}  // namespace tinyllm::cuda

#else
#include <emulated_sm90.h>
#endif
