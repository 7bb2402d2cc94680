// The functions of csrc/cuda/platform_sm90.cuh implemented for the CPU: barriers that count threads and bytes, copies
// of boxes with the swizzle that the hardware applies, and matmuls that read their operands through descriptors, byte
// for byte from where the instruction set specifies them.
#pragma once
#include <emulated_platform.h>

#include <array>

namespace tinyllm::cuda {

// An address of shared memory, which begins at 0.
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emulated::current->block->shared);
}

// ---- Barriers

struct alignas(8) Barrier {
  uint16_t expected, phase : 1, pending : 15;
  int32_t bytes;
};

inline void barrier_settle(Barrier* barrier) {
  if (barrier->pending != 0 || barrier->bytes != 0) return;
  barrier->phase ^= 1;
  barrier->pending = barrier->expected;
}
inline void barrier_init(Barrier* barrier, uint32_t arrivals) {
  *barrier = {};
  barrier->expected = static_cast<uint16_t>(arrivals);
  barrier->pending = static_cast<uint16_t>(arrivals) & 0x7fff;
}
inline void fence_barrier_init() {}
inline void barrier_arrive(Barrier* barrier) {
  if (barrier->pending == 0) throw std::runtime_error("more threads arrive at a barrier than it expects");
  --barrier->pending;
  barrier_settle(barrier);
}
inline void barrier_arrive_expect_bytes(Barrier* barrier, uint32_t bytes) {
  barrier->bytes += static_cast<int32_t>(bytes);
  barrier_arrive(barrier);
}
inline void barrier_wait(Barrier* barrier, uint32_t parity) {
  emulated::Block* const block = emulated::current->block;
  emulated::wait_for([=] {
    // Copies in flight for this barrier are executed now, when a thread waits for them.
    for (size_t i = 0; i < block->bulk.size();)
      if (block->bulk[i].first == barrier) {
        const std::function<void()> copy = std::move(block->bulk[i].second);
        block->bulk.erase(block->bulk.begin() + static_cast<std::ptrdiff_t>(i));
        copy();
      } else {
        ++i;
      }
    return barrier->phase != parity;
  });
}

// ---- Bulk tensor copies

constexpr int kBoxColumns = 64;

struct TensorMap {
  const unsigned char* data;
  std::array<int64_t, 4> sizes;
  std::array<int64_t, 3> strides;  // elements
  int box_rows;
};

inline TensorMap make_tensor_map(void* data, bool, const int64_t (&sizes)[4], const int64_t (&strides)[3],
                                 int box_rows) {
  TensorMap map{static_cast<const unsigned char*>(data), {}, {}, box_rows};
  std::copy(sizes, sizes + 4, map.sizes.begin());
  std::copy(strides, strides + 3, map.strides.begin());
  bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0 && box_rows >= 1 && box_rows <= 256;
  for (const int64_t size : sizes) fits = fits && size >= 1 && size < (int64_t{1} << 32);
  for (const int64_t stride : strides) fits = fits && stride > 0 && stride % 8 == 0 && stride < (int64_t{1} << 39);
  if (!fits) throw std::runtime_error("cuTensorMapEncodeTiled would refuse this tensor");
  return map;
}

// The address of a byte of shared memory with the 128-byte swizzle.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void tma_load(void* shared, const TensorMap& map, Barrier* barrier, int first_column, int first_row, int head,
                     int batch) {
  emulated::Block* const block = emulated::current->block;
  const uint32_t to = shared_address(shared), bytes = static_cast<uint32_t>(map.box_rows) * 128;
  if (to % 1024 != 0 || to + bytes > block->shared_bytes)
    throw std::runtime_error("tma_load: that is no place for a box");
  const auto copy = [=] {
    for (int row = 0; row < map.box_rows; ++row)
      for (int column = 0; column < kBoxColumns; ++column) {
        const int64_t at[4] = {first_column + column, first_row + row, head, batch};
        bool inside = true;
        for (int i = 0; i < 4; ++i) inside = inside && at[i] >= 0 && at[i] < map.sizes[i];
        unsigned char* const place =
            block->shared + swizzled(to + static_cast<uint32_t>(row) * 128 + static_cast<uint32_t>(column) * 2);
        if (inside)
          std::memcpy(place,
                      map.data + 2 * (at[0] + at[1] * map.strides[0] + at[2] * map.strides[1] + at[3] * map.strides[2]),
                      2);
        else
          std::memset(place, 0, 2);
      }
    barrier->bytes -= static_cast<int32_t>(bytes);
    barrier_settle(barrier);
  };
  if (emulated::backward())
    copy();
  else
    block->bulk.emplace_back(barrier, copy);
}
inline void prefetch_tensor_map(const TensorMap&) {}

// ---- Threads

template <int kRegisters>
inline void increase_registers() {}
template <int kRegisters>
inline void decrease_registers() {}

// ---- Matmuls of a warpgroup

inline void wgmma_fence() {}
inline void fence_async_proxy() {}

template <class Item>
inline void across_warpgroup(Item& item, void (*act)(Item** items)) {
  if (emulated::current->block->threads % 128 != 0) throw std::runtime_error("wgmma needs blocks of whole warpgroups");
  emulated::gather(emulated::warpgroup().rendezvous, 128, emulated::current->linear % 128, item, act);
}

struct WgmmaGroup {
  emulated::Warpgroup* warpgroup;
  size_t left;
};
inline void wgmma_commit() {
  WgmmaGroup item{&emulated::warpgroup(), 0};
  across_warpgroup(
      item, +[](WgmmaGroup** items) {
        auto& group = *items[0]->warpgroup;
        group.committed.push_back(std::move(group.pending));
        group.pending.clear();
      });
}
template <int N>
inline void wgmma_wait() {
  WgmmaGroup item{&emulated::warpgroup(), N};
  across_warpgroup(
      item, +[](WgmmaGroup** items) {
        auto& committed = items[0]->warpgroup->committed;
        while (committed.size() > items[0]->left) {
          for (const auto& product : committed.front()) product();
          committed.erase(committed.begin());
        }
      });
}
template <int N>
inline void wgmma_wait_here() {
  wgmma_wait<N>();
}
template <int N>
inline void fence_operands(float (&)[N][4]) {}
template <int N>
inline void fence_operands(uint32_t (&)[N][4]) {}

template <bool kTransposed>
inline uint64_t smem_descriptor(const void* first, uint32_t panel_bytes = 0) {
  const uint64_t leading = kTransposed ? panel_bytes / 16 : 1;
  return (shared_address(first) & 0x3ffff) >> 4 | leading << 16 | uint64_t{1024 / 16} << 32 | uint64_t{1} << 62;
}

// Returns the element (mn, k) of an operand.
template <class T, bool kTransposed>
inline float element(const emulated::Block& block, uint64_t descriptor, int mn, int k) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) * 16; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  if (descriptor >> 62 != 1) throw std::runtime_error("an operand is not swizzled in rows of 128 bytes");
  const uint32_t m = static_cast<uint32_t>(mn), n = static_cast<uint32_t>(k);
  const uint32_t at = swizzled(kTransposed ? start + m / 64 * leading + m % 64 * 2 + n / 8 * stride + n % 8 * 128
                                           : start + m / 8 * stride + m % 8 * 128 + n * 2);
  if (at + 2 > block.shared_bytes) throw std::runtime_error("an operand lies beyond the shared memory");
  T value;
  std::memcpy(&value, block.shared + at, 2);
  return to_float(value);
}

struct Wgmma {
  emulated::Warpgroup* warpgroup;
  const emulated::Block* block;
  float* d;           // [N / 8][4]
  const uint32_t* a;  // [4], or null if a is in shared memory
  uint64_t a_descriptor, b;
  bool add;
};

template <class T, bool kTransposed, int N>
inline void wgmma_of(Wgmma** items) {
  std::array<Wgmma, 128> lanes;
  for (size_t l = 0; l < 128; ++l) {
    lanes[l] = *items[l];
    if (lanes[l].b != lanes[0].b || lanes[l].a_descriptor != lanes[0].a_descriptor || lanes[l].add != lanes[0].add)
      throw std::runtime_error("threads of a warpgroup disagree about a wgmma");
  }
  const auto product = [lanes] {
    static float a[64][16], b[16][N];
    const Wgmma& first = lanes[0];
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < N; ++n) b[k][n] = element<T, kTransposed>(*first.block, first.b, n, k);
      if (first.a == nullptr)
        for (int m = 0; m < 64; ++m) a[m][k] = element<T, false>(*first.block, first.a_descriptor, m, k);
    }
    for (int l = 0; l < 128 && first.a != nullptr; ++l)
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 2; ++j)
          a[l / 32 * 16 + l % 32 / 4 + i % 2 * 8][l % 4 * 2 + i / 2 * 8 + j] = half_of<T>(lanes[l].a[i], j);
    for (int l = 0; l < 128; ++l)
      for (int j = 0; j < N / 8; ++j)
        for (int i = 0; i < 4; ++i) {
          const int row = l / 32 * 16 + l % 32 / 4 + i / 2 * 8, column = 8 * j + l % 4 * 2 + i % 2;
          float sum = first.add ? lanes[l].d[4 * j + i] : 0.0f;
          for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
          lanes[l].d[4 * j + i] = sum;
        }
  };
  if (emulated::backward())
    product();
  else
    lanes[0].warpgroup->pending.emplace_back(product);
}

template <class T, bool kTransposed, int N>
inline void wgmma(float (&d)[N][4], uint64_t a, uint64_t b, bool add) {
  Wgmma item{&emulated::warpgroup(), emulated::current->block, d[0], nullptr, a, b, add};
  across_warpgroup(item, +[](Wgmma** items) { wgmma_of<T, kTransposed, N * 8>(items); });
}
template <class T, bool kTransposed, int N>
inline void wgmma(float (&d)[N][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  Wgmma item{&emulated::warpgroup(), emulated::current->block, d[0], a, 0, b, add};
  across_warpgroup(item, +[](Wgmma** items) { wgmma_of<T, kTransposed, N * 8>(items); });
}

}  // namespace tinyllm::cuda
