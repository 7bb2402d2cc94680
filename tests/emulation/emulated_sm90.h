// The functions of csrc/cuda/platform_sm90.cuh for the CPU: barriers that count threads and bytes, copies of boxes with
// the swizzle that the hardware applies, and products that read their factors through descriptors, byte for byte where
// the instruction set says that they lie.
#pragma once
#include <emulated_platform.h>

#include <array>

namespace tinyllm::cuda {

// As an address of shared memory on a GPU: its beginning is at 0.
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
inline void barriers_ready() {}
inline void barrier_arrive(Barrier* barrier) {
  if (barrier->pending == 0) throw std::runtime_error("more threads arrive at a barrier than it expects");
  --barrier->pending;
  barrier_settle(barrier);
}
inline void barrier_arrive_expecting(Barrier* barrier, uint32_t bytes) {
  barrier->bytes += static_cast<int32_t>(bytes);
  barrier_arrive(barrier);
}
inline void barrier_wait(Barrier* barrier, uint32_t parity) {
  emulated::Block* const block = emulated::current->block;
  emulated::wait_for([=] {
    // Copies that nobody waited for before arrive now.
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

inline TensorMap describe(void* data, bool, const int64_t (&sizes)[4], const int64_t (&strides)[3], int box_rows) {
  TensorMap map{static_cast<const unsigned char*>(data), {}, {}, box_rows};
  std::copy(sizes, sizes + 4, map.sizes.begin());
  std::copy(strides, strides + 3, map.strides.begin());
  bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0 && box_rows >= 1 && box_rows <= 256;
  for (const int64_t size : sizes) fits = fits && size >= 1 && size < (int64_t{1} << 32);
  for (const int64_t stride : strides) fits = fits && stride > 0 && stride % 8 == 0 && stride < (int64_t{1} << 39);
  if (!fits) throw std::runtime_error("cuTensorMapEncodeTiled would refuse this tensor");
  return map;
}

// Of a byte of shared memory that is swizzled in rows of 128.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void copy_box(void* shared, const TensorMap& map, Barrier* barrier, int first_column, int first_row, int head,
                     int batch) {
  emulated::Block* const block = emulated::current->block;
  const uint32_t to = shared_address(shared), bytes = static_cast<uint32_t>(map.box_rows) * 128;
  if (to % 1024 != 0 || to + bytes > block->shared_bytes)
    throw std::runtime_error("copy_box: that is no place for a box");
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
inline void prefetch_map(const TensorMap&) {}

// ---- Threads

template <int kRegisters>
inline void more_registers() {}
template <int kRegisters>
inline void fewer_registers() {}

// ---- Products of a warpgroup

inline void products_begin() {}
inline void stores_for_products() {}

template <class Item>
inline void across_warpgroup(Item& item, void (*act)(Item** items)) {
  if (emulated::current->block->threads % 128 != 0)
    throw std::runtime_error("products of a warpgroup need blocks of whole warpgroups");
  emulated::together(emulated::warpgroup().gathering, 128, emulated::current->linear % 128, item, act);
}

struct ProductsGroup {
  emulated::Warpgroup* warpgroup;
  size_t left;
};
inline void products_commit() {
  ProductsGroup item{&emulated::warpgroup(), 0};
  across_warpgroup(
      item, +[](ProductsGroup** items) {
        auto& group = *items[0]->warpgroup;
        group.committed.push_back(std::move(group.asked));
        group.asked.clear();
      });
}
template <int N>
inline void products_wait() {
  ProductsGroup item{&emulated::warpgroup(), N};
  across_warpgroup(
      item, +[](ProductsGroup** items) {
        auto& committed = items[0]->warpgroup->committed;
        while (committed.size() > items[0]->left) {
          for (const auto& product : committed.front()) product();
          committed.erase(committed.begin());
        }
      });
}
template <int N>
inline void products_wait_here() {
  products_wait<N>();
}
template <int N>
inline void settle(float (&)[N][4]) {}
template <int N>
inline void settle(uint32_t (&)[N][4]) {}

template <bool kTransposed>
inline uint64_t factor(const void* first, uint32_t panel_bytes = 0) {
  const uint64_t leading = kTransposed ? panel_bytes / 16 : 1;
  return (shared_address(first) & 0x3ffff) >> 4 | leading << 16 | uint64_t{1024 / 16} << 32 | uint64_t{1} << 62;
}

// The number at (mn, k) of a factor.
template <class T, bool kTransposed>
inline float element(const emulated::Block& block, uint64_t descriptor, int mn, int k) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) * 16; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  if (descriptor >> 62 != 1) throw std::runtime_error("a factor is not swizzled in rows of 128 bytes");
  const uint32_t m = static_cast<uint32_t>(mn), n = static_cast<uint32_t>(k);
  const uint32_t at = swizzled(kTransposed ? start + m / 64 * leading + m % 64 * 2 + n / 8 * stride + n % 8 * 128
                                           : start + m / 8 * stride + m % 8 * 128 + n * 2);
  if (at + 2 > block.shared_bytes) throw std::runtime_error("a factor lies beyond the shared memory");
  T value;
  std::memcpy(&value, block.shared + at, 2);
  return to_float(value);
}

struct AsyncProduct {
  emulated::Warpgroup* warpgroup;
  const emulated::Block* block;
  float* d;           // [N / 8][4]
  const uint32_t* a;  // [4], or null: from shared memory
  uint64_t a_descriptor, b;
  bool add;
};

template <class T, bool kTransposed, int N>
inline void multiply_async_of(AsyncProduct** items) {
  std::array<AsyncProduct, 128> lanes;
  for (size_t l = 0; l < 128; ++l) {
    lanes[l] = *items[l];
    if (lanes[l].b != lanes[0].b || lanes[l].a_descriptor != lanes[0].a_descriptor || lanes[l].add != lanes[0].add)
      throw std::runtime_error("threads of a warpgroup disagree about a product");
  }
  const auto product = [lanes] {
    static float a[64][16], b[16][N];
    const AsyncProduct& first = lanes[0];
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
    lanes[0].warpgroup->asked.emplace_back(product);
}

template <class T, bool kTransposed, int N>
inline void multiply_async(float (&d)[N][4], uint64_t a, uint64_t b, bool add) {
  AsyncProduct item{&emulated::warpgroup(), emulated::current->block, d[0], nullptr, a, b, add};
  across_warpgroup(item, +[](AsyncProduct** items) { multiply_async_of<T, kTransposed, N * 8>(items); });
}
template <class T, bool kTransposed, int N>
inline void multiply_async(float (&d)[N][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  AsyncProduct item{&emulated::warpgroup(), emulated::current->block, d[0], a, 0, b, add};
  across_warpgroup(item, +[](AsyncProduct** items) { multiply_async_of<T, kTransposed, N * 8>(items); });
}

}  // namespace tinyllm::cuda
