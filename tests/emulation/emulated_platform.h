// The functions of csrc/cuda/platform.cuh and platform_sm90.cuh for the CPU, for tests alone: the kernels' own source,
// indexing, masks, reductions, barriers and all, runs without a GPU.
//
// Each thread of a block is a fiber. It runs until it waits for others: at a barrier, or where a warp or four work
// together (shuffles, matrix products). Warps go as far ahead of each other as barriers let them, so that a missing one
// shows; asynchronous copies and products happen as late as waiting allows. With TINYLLM_EMULATED_SCHEDULE=backward the
// last warp and lane go first, and everything asynchronous happens at once.
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

// Threads that do something together: they wait until all have come, then the last one does it for all.
struct Gathering {
  unsigned members = 0, arrived = 0;
  uint64_t generation = 0;
  std::vector<void*> brought;
};

// What one thread has asked for and not waited for: cp.async groups, oldest first.
struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Block;

struct Thread {
  Block* block = nullptr;
  dim3 index;
  unsigned linear = 0;
  std::vector<Copy> asked;
  std::vector<std::vector<Copy>> committed;
};

struct Warp {
  Gathering gathering;
};

// Products of a warpgroup that have been asked for and not waited for.
struct Warpgroup {
  Gathering gathering;
  std::vector<std::function<void()>> asked;
  std::vector<std::vector<std::function<void()>>> committed;
};

struct Block {
  dim3 index;
  unsigned rank = 0;  // in its cluster
  std::vector<Block*>* cluster = nullptr;
  Gathering* cluster_gathering = nullptr;
  unsigned threads = 0;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  Gathering all;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::vector<Gathering> named;
  // Bulk copies under way, by the barrier that they complete on.
  std::vector<std::pair<void*, std::function<void()>>> bulk;
};

extern Thread* current;
extern dim3 block_dim, grid_dim;

// Whether what is asynchronous happens at once, and the last threads go first.
bool backward();

// Lets others run until the condition holds.
void wait_for(const std::function<bool()>& condition);

// Every member calls it with its own item; once all have, `act` runs over the items, in the order of the members'
// places, and everybody goes on.
template <class Item>
void together(Gathering& gathering, unsigned members, unsigned place, Item& item, void (*act)(Item** items)) {
  if (gathering.brought.size() != members) gathering.brought.resize(members);
  gathering.brought[place] = &item;
  if (++gathering.arrived == members) {
    act(reinterpret_cast<Item**>(gathering.brought.data()));
    gathering.arrived = 0;
    ++gathering.generation;
    return;
  }
  const uint64_t mine = gathering.generation;
  wait_for([&gathering, mine] { return gathering.generation != mine; });
}

// A barrier of so many threads; arrive comes without waiting.
void arrive(Gathering& gathering, unsigned members);
void arrive_and_wait(Gathering& gathering, unsigned members);

inline Warp& warp() { return current->block->warps[current->linear / 32]; }
inline Warpgroup& warpgroup() { return current->block->warpgroups[current->linear / 128]; }

template <class Item>
void across_warp(Item& item, void (*act)(Item** items)) {
  const unsigned first = current->linear / 32 * 32;
  together(warp().gathering, std::min(32u, current->block->threads - first), current->linear - first, item, act);
}

// Runs body, which calls the kernel, as every thread of the grid.
void run_grid(const char* name, const void* function, dim3 grid, dim3 block, size_t shared, unsigned cluster,
              const std::function<void()>& body);

}  // namespace tinyllm::emulated

#define threadIdx (::tinyllm::emulated::current->index)
#define blockIdx (::tinyllm::emulated::current->block->index)
#define blockDim (::tinyllm::emulated::block_dim)
#define gridDim (::tinyllm::emulated::grid_dim)

// CUDA has them without a namespace.
using std::max;
using std::min;

// The vectors of CUDA's headers that kernels use.
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

inline void named_sync(int id, int threads) {
  emulated::arrive_and_wait(emulated::current->block->named.at(static_cast<size_t>(id)),
                            static_cast<unsigned>(threads));
}
inline void named_arrive(int id, int threads) {
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
inline V load_once(const V* p) {
  return *p;
}
template <class V>
inline void store_once(V* p, V v) {
  *p = v;
}

void copy_async(void* shared, const void* global, bool valid);
void commit_copies();
void wait_copies_until(size_t left);
template <int N>
inline void wait_copies() {
  wait_copies_until(N);
}

// ---- Tensor cores of a warp

struct Matrices {
  const void* row;
  uint32_t* result;
};
void load_matrices_of(Matrices** items, bool transposed);
inline void load_matrices(uint32_t (&r)[4], const void* row) {
  Matrices item{row, r};
  emulated::across_warp(item, +[](Matrices** items) { load_matrices_of(items, false); });
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  Matrices item{row, r};
  emulated::across_warp(item, +[](Matrices** items) { load_matrices_of(items, true); });
}

// Of a pair of 16-bit numbers in a register.
template <class T>
inline float half_of(uint32_t pair, int which) {
  T both[2];
  std::memcpy(both, &pair, 4);
  return to_float(both[which]);
}

struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};
template <class T>
inline void multiply_of(Product** lanes) {
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
inline void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Product item{d, a, {b0, b1}};
  emulated::across_warp(item, +[](Product** items) { multiply_of<T>(items); });
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

// Few, so that loops over a grid wrap.
inline int multiprocessors(int) { return 4; }
// TINYLLM_EMULATED_CAPABILITY, 90 if it is not set.
int capability(int);
// TINYLLM_EMULATED_CODE, or the device's own capability.
int emulated_code();
template <class... Parameters>
inline int compiled_for(void (*)(Parameters...)) {
  return emulated_code();
}

}  // namespace tinyllm::cuda
