// Software prefetching of memory whose access pattern the hardware prefetcher does not recognise. The lines of a region
// are requested in equal shares, one with each tile that is computed meanwhile, so that they do not evict what is in
// use.
#pragma once
#include <algorithm>
#include <cstdint>

#include "gemm.h"

namespace tinyllm::TINYLLM_ISA {

constexpr int64_t kCacheLine = 64;

// Prefetches contiguous memory into the second-level cache.
class RangePrefetcher {
 public:
  RangePrefetcher(const void* data, int64_t bytes, int64_t shares)
      : next_(static_cast<const char*>(data)), end_(next_ + bytes), share_((bytes / kCacheLine + shares) / shares) {}
  void prefetch_share() {
    for (int64_t i = 0; i < share_ && next_ < end_; ++i, next_ += kCacheLine) __builtin_prefetch(next_, 0, 2);
  }

 private:
  const char *next_, *end_;
  int64_t share_;
};

// Prefetches the next group of rows of A into the second-level cache, since panels of B fill the first. Without it, a
// tile leaves the kMR short rows that it walks along too soon for the hardware prefetcher to follow.
template <class S>
class RowPrefetcher {
 public:
  RowPrefetcher(OperandA<S> a, int64_t rows, bool row_major, int64_t depth, int64_t shares)
      : data_(a.data), row_(a.row), depth_(depth), rows_(row_major ? rows : 0) {
    share_ = (depth * rows_ / kLine + shares - 1) / std::max<int64_t>(1, shares);
  }
  void prefetch_share() {
    for (int64_t left = share_; left > 0 && rows_ > 0; --left) {
      __builtin_prefetch(data_ + at_, 0, 2);
      at_ += kLine;
      if (at_ < depth_) continue;
      at_ = 0;
      data_ += row_;
      --rows_;
    }
  }

 private:
  static constexpr int64_t kLine = kCacheLine / int64_t{sizeof(S)};
  const S* data_;
  int64_t row_, depth_, rows_, share_, at_ = 0;
};

}  // namespace tinyllm::TINYLLM_ISA
