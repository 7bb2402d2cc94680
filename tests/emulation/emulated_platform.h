// The functions of csrc/cuda/platform.cuh and platform_sm90.cuh implemented for the CPU, for tests only: the source of
// the kernels, with its indexing, masks, reductions and barriers, runs without a GPU.
//
// Each thread of a block is a fiber. It runs until it must wait for others: at a barrier, or at an operation of a warp
// or a warpgroup (shuffles, matmuls). Warps run as far ahead of each other as barriers allow, so that a missing barrier
// shows, and asynchronous copies and matmuls are executed as late as waiting allows. With
// TINYLLM_EMULATED_SCHEDULE=backward the last warp and lane run first, and everything asynchronous is executed at once.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __grid_constant__
#define __launch_bounds__(...)
#define TINYLLM_DEVICE inline
#define TINYLLM_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(tinyllm_host, CPU, m)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace tinyllm::emulated {

// A collective operation: threads wait until all have arrived, then the last one executes it for all.
struct Rendezvous {
  unsigned members = 0, arrived = 0;
  uint64_t generation = 0;
  std::vector<void*> items_of_members;
};

// A cp.async copy that a thread has issued and not waited for; groups are kept oldest first.
struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Block;

struct Thread {
  Block* block = nullptr;
  dim3 index;
  unsigned linear = 0;
  std::vector<Copy> pending;
  std::vector<std::vector<Copy>> committed;
};

struct Warp {
  Rendezvous rendezvous;
};

// The wgmma operations of a warpgroup that have been issued and not waited for.
struct Warpgroup {
  Rendezvous rendezvous;
  std::vector<std::function<void()>> pending;
  std::vector<std::vector<std::function<void()>>> committed;
};

struct Block {
  dim3 index;
  unsigned rank = 0;  // the rank in its cluster
  std::vector<Block*>* cluster = nullptr;
  Rendezvous* cluster_rendezvous = nullptr;
  unsigned threads = 0;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  Rendezvous all;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::vector<Rendezvous> named;
  // Bulk copies in flight, each with the barrier on which it completes.
  std::vector<std::pair<void*, std::function<void()>>> bulk;
};

extern Thread* current;
extern dim3 block_dim, grid_dim;

// Whether asynchronous operations are executed at once and the last threads run first.
bool backward();

// Runs other threads until the condition holds.
void wait_for(const std::function<bool()>& condition);

// Collective: every member passes an item. Once all have arrived, `act` is called with the items in the order of the
// members, and all members continue.
template <class Item>
void gather(Rendezvous& rendezvous, unsigned members, unsigned place, Item& item, void (*act)(Item** items)) {
  if (rendezvous.items_of_members.size() != members) rendezvous.items_of_members.resize(members);
  rendezvous.items_of_members[place] = &item;
  if (++rendezvous.arrived == members) {
    act(reinterpret_cast<Item**>(rendezvous.items_of_members.data()));
    rendezvous.arrived = 0;
    ++rendezvous.generation;
    return;
  }
  const uint64_t mine = rendezvous.generation;
  wait_for([&rendezvous, mine] { return rendezvous.generation != mine; });
}

// A barrier of `members` threads; arrive does not wait.
void arrive(Rendezvous& rendezvous, unsigned members);
void arrive_and_wait(Rendezvous& rendezvous, unsigned members);

inline Warp& warp() { return current->block->warps[current->linear / 32]; }
inline Warpgroup& warpgroup() { return current->block->warpgroups[current->linear / 128]; }

template <class Item>
void across_warp(Item& item, void (*act)(Item** items)) {
  const unsigned first = current->linear / 32 * 32;
  gather(warp().rendezvous, std::min(32u, current->block->threads - first), current->linear - first, item, act);
}

// Runs `body`, which calls the kernel, as every thread of the grid.
void run_grid(const char* name, const void* function, dim3 grid, dim3 block, size_t shared, unsigned cluster,
              const std::function<void()>& body);

}  // namespace tinyllm::emulated

#define threadIdx (::tinyllm::emulated::current->index)
#define blockIdx (::tinyllm::emulated::current->block->index)
#define blockDim (::tinyllm::emulated::block_dim)
#define gridDim (::tinyllm::emulated::grid_dim)

// CUDA has these functions in the global namespace.
using std::max;
using std::min;

// The vector types of the CUDA headers that the kernels use.
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace tinyllm::cuda {

// ---- Numbers

struct bf16 {
  uint16_t bits;
};
struct f16 {
  _Float16 value;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float to_float(f16 x) { return static_cast<float>(x.value); }

template <class T>
inline T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (std::isnan(x)) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
  } else if constexpr (std::is_same_v<T, f16>) {
    return {static_cast<_Float16>(x)};
  } else {
    return x;
  }
}

template <class T>
inline uint32_t pack(float low, float high) {
  const T both[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  std::memcpy(&bits, both, 4);
  return bits;
}

inline float fast_exp2(float x) { return std::exp2(x); }

// ---- Threads

inline unsigned char* shared_memory() { return emulated::current->block->shared; }

inline void sync_block() {
  emulated::Block& block = *emulated::current->block;
  emulated::arrive_and_wait(block.all, block.threads);
}
inline void sync_warp() {
  int nothing = 0;
  emulated::across_warp(nothing, +[](int**) {});
}

inline void named_barrier_sync(int id, int threads) {
  emulated::arrive_and_wait(emulated::current->block->named.at(static_cast<size_t>(id)),
                            static_cast<unsigned>(threads));
}
inline void named_barrier_arrive(int id, int threads) {
  emulated::arrive(emulated::current->block->named.at(static_cast<size_t>(id)), static_cast<unsigned>(threads));
}

template <class T>
struct Shuffle {
  T value, result;
  unsigned from, lanes;
};
template <class T>
inline T shuffle_from(T x, unsigned lane) {
  const unsigned first = emulated::current->linear / 32 * 32;
  Shuffle<T> item{x, x, lane, std::min(32u, emulated::current->block->threads - first)};
  emulated::across_warp(
      item, +[](Shuffle<T>** items) {
        for (unsigned i = 0; i < items[0]->lanes; ++i) items[i]->result = items[items[i]->from % 32]->value;
      });
  return item.result;
}
template <class T>
inline T shuffle_xor(T x, int mask) {
  return shuffle_from(x, (emulated::current->linear % 32) ^ static_cast<unsigned>(mask));
}
template <class T>
inline T shuffle(T x, int lane) {
  return shuffle_from(x, static_cast<unsigned>(lane));
}
inline bool any_lane(bool x) {
  int any = x;
  for (int lanes = 16; lanes > 0; lanes /= 2) any |= shuffle_xor(any, lanes);
  return any != 0;
}

inline void trap() { throw std::runtime_error("a kernel traps"); }

// ---- Global memory

template <class V>
inline V load_streaming(const V* p) {
  return *p;
}
template <class V>
inline void store_streaming(V* p, V v) {
  *p = v;
}

void cp_async(void* shared, const void* global, bool valid);
void cp_async_commit();
void cp_async_wait_until(size_t left);
template <int N>
inline void cp_async_wait() {
  cp_async_wait_until(N);
}

// ---- Tensor cores of a warp

struct Matrices {
  const void* row;
  uint32_t* result;
};
void ldmatrix_of(Matrices** items, bool transposed);
inline void ldmatrix(uint32_t (&r)[4], const void* row) {
  Matrices item{row, r};
  emulated::across_warp(item, +[](Matrices** items) { ldmatrix_of(items, false); });
}
inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  Matrices item{row, r};
  emulated::across_warp(item, +[](Matrices** items) { ldmatrix_of(items, true); });
}

// Returns one of the two 16-bit numbers in a register.
template <class T>
inline float half_of(uint32_t pair, int which) {
  T both[2];
  std::memcpy(both, &pair, 4);
  return to_float(both[which]);
}

struct Mma {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};
template <class T>
inline void mma_of(Mma** lanes) {
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; ++l) {
    const int g = l / 4, c = l % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      a[g][c + i] = half_of<T>(lanes[l]->a[0], i);
      a[g + 8][c + i] = half_of<T>(lanes[l]->a[1], i);
      a[g][c + 8 + i] = half_of<T>(lanes[l]->a[2], i);
      a[g + 8][c + 8 + i] = half_of<T>(lanes[l]->a[3], i);
      b[c + i][g] = half_of<T>(lanes[l]->b[0], i);
      b[c + 8 + i][g] = half_of<T>(lanes[l]->b[1], i);
    }
  }
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
      float sum = lanes[l]->d[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      lanes[l]->d[i] = sum;
    }
}
template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Mma item{d, a, {b0, b1}};
  emulated::across_warp(item, +[](Mma** items) { mma_of<T>(items); });
}

// ---- Launching

struct LaunchShape {
  dim3 grid, block;
  size_t shared = 0;
  unsigned cluster = 1;
};

template <class... Parameters, class... Arguments>
inline void launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape, void*,
                   const Arguments&... arguments) {
  const std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
  emulated::run_grid(name, reinterpret_cast<const void*>(kernel), shape.grid, shape.block, shape.shared, shape.cluster,
                     [&] { std::apply([&](const auto&... each) { kernel(each...); }, values); });
}

// Few, so that loops over a grid have several iterations.
inline int multiprocessors(int) { return 4; }
// TINYLLM_EMULATED_CAPABILITY, or 90 if it is not set.
int capability(int);
// TINYLLM_EMULATED_CODE, or the capability of the device if it is not set.
int emulated_code();
template <class... Parameters>
inline int compiled_for(void (*)(Parameters...)) {
  return emulated_code();
}

}  // namespace tinyllm::cuda
