// Rows of a table looked up by index, plus a row of a second table: weight[ids] + positions. Backward is the reverse:
// each row of a gradient is the sum, in order, of the rows that contribute to it.
//
// Memory bandwidth is the limit. A row is read and written once, nothing is scattered, and no two threads write the
// same row. With dropout, generating the random bits is the limit; a block of columns is processed as soon as its
// factors are generated, in backward once more.
#pragma once
#include "dropout_kernel.h"

namespace tinyllm::TINYLLM_ISA {

template <class T>
void dropped_embedding(const cpu::Embedding& a, int64_t begin, int64_t end) {
  using S = compute_t<T>;
  using V = Vec<S>;
  alignas(64) S factors[kRandomBlock];
  for (int64_t token = begin; token < end; ++token)
    for (int64_t first = 0; first < a.size; first += kRandomBlock) {
      const int64_t width = std::min(kRandomBlock, a.size - first);
      const T* from = static_cast<const T*>(a.weight) + a.ids[token] * a.size + first;
      const T* position =
          a.positions == nullptr ? nullptr : static_cast<const T*>(a.positions) + token % a.seq_len * a.size + first;
      T* out = static_cast<T*>(a.out) + token * a.size + first;
      block_factors(a.dropout, token, a.size, first, width, factors);
      for_each_vector<V>(width, [&](int64_t i, int64_t n) {
        V x = load_n<V>(from + i, n);
        if (position != nullptr) x = x + load_n<V>(position + i, n);
        store_n(x * V::load(factors + i), out + i, n);
      });
    }
}

template <class T>
void embedding_fwd(const cpu::Embedding& a, int64_t begin, int64_t end) {
  if (a.dropout.p > 0) return dropped_embedding<T>(a, begin, end);
  using V = Vec<compute_t<T>>;
  const int64_t size = a.size;
  for (int64_t token = begin; token < end; ++token) {
    const T* from = static_cast<const T*>(a.weight) + a.ids[token] * size;
    T* out = static_cast<T*>(a.out) + token * size;
    if (a.positions == nullptr) {
      std::copy(from, from + size, out);
      continue;
    }
    const T* position = static_cast<const T*>(a.positions) + token % a.seq_len * size;
    for_each_vector<V>(
        size, [&](int64_t i, int64_t n) { store_n(load_n<V>(from + i, n) + load_n<V>(position + i, n), out + i, n); });
  }
}

template <class T>
void sum_dropped_rows(const cpu::SumRows& a, int64_t begin, int64_t end) {
  using S = compute_t<T>;
  using V = Vec<S>;
  alignas(64) S factors[kRandomBlock], sums[kRandomBlock];
  for (int64_t s = begin; s < end; ++s)
    for (int64_t first = 0; first < a.size; first += kRandomBlock) {
      const int64_t width = std::min(kRandomBlock, a.size - first);
      std::fill(sums, sums + kRandomBlock, S(0));
      for (int64_t k = a.starts[s]; k < a.starts[s + 1]; ++k) {
        const T* row = static_cast<const T*>(a.rows) + a.order[k] * a.size + first;
        block_factors(a.dropout, a.order[k], a.size, first, width, factors);
        for_each_vector<V>(width, [&](int64_t i, int64_t n) {
          fma(load_n<V>(row + i, n), V::load(factors + i), V::load(sums + i)).store(sums + i);
        });
      }
      T* out = static_cast<T*>(a.out) + a.targets[s] * a.size + first;
      for_each_vector<V>(width, [&](int64_t i, int64_t n) { store_n(V::load(sums + i), out + i, n); });
    }
}

template <class T>
void sum_rows(const cpu::SumRows& a, int64_t begin, int64_t end) {
  if (a.dropout.p > 0) return sum_dropped_rows<T>(a, begin, end);
  using V = Vec<compute_t<T>>;
  constexpr int64_t kWidth = 4 * V::size;  // columns whose sums fit the registers
  const int64_t size = a.size;
  const T* rows = static_cast<const T*>(a.rows);
  for (int64_t s = begin; s < end; ++s) {
    T* out = static_cast<T*>(a.out) + a.targets[s] * size;
    const int64_t first = a.starts[s], last = a.starts[s + 1];
    const auto row = [&](int64_t k) { return rows + a.order[k] * size; };
    if (last == first + 1) {
      std::copy(row(first), row(first) + size, out);
      continue;
    }
    int64_t i = 0;
    for (; i + kWidth <= size; i += kWidth) {
      V sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
      for (int64_t k = first; k < last; ++k)
        for (int j = 0; j < 4; ++j) sum[j] = sum[j] + V::load(row(k) + i + j * V::size);
      for (int j = 0; j < 4; ++j) sum[j].store(out + i + j * V::size);
    }
    for (; i < size; i += V::size) {
      const int64_t n = std::min<int64_t>(V::size, size - i);
      V sum = V::zero();
      for (int64_t k = first; k < last; ++k) sum = sum + load_n<V>(row(k) + i, n);
      store_n(sum, out + i, n);
    }
  }
}

// Writes zeros past the caches, for memory that is not read soon.
inline void stream_zeros(char* data, int64_t bytes) {
  using V = Vec<float>;
  constexpr int64_t kBytes = V::size * static_cast<int64_t>(sizeof(float));
  const int64_t to_aligned = (kBytes - static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) % kBytes)) % kBytes;
  const int64_t head = std::min(bytes, to_aligned), whole = (bytes - head) / kBytes * kBytes;
  std::memset(data, 0, static_cast<size_t>(head));
  for (int64_t i = 0; i < whole; i += kBytes) V::zero().stream(reinterpret_cast<float*>(data + head + i));
  end_of_stream();
  std::memset(data + head + whole, 0, static_cast<size_t>(bytes - head - whole));
}

}  // namespace tinyllm::TINYLLM_ISA
