// The products of a phase of generation (phases.h): weights of several linear layers, one behind the other, divided
// among threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "torch_side.h"

namespace tinyllm::cpu {

// The form of the activations that a weight is multiplied with, for Activations::layout.
inline unsigned kind_of(const Weight& w) { return 1u << static_cast<int>(w.kind); }

// As many threads as have so much of a phase's weights to read that meeting at its end takes little beside it.
inline int64_t threads_for(int64_t bytes_of_phase) {
  constexpr int64_t bytes_of_thread = 131072;
  return std::clamp<int64_t>(bytes_of_phase / bytes_of_thread, 1, torch::stable::get_num_threads());
}

class Products {
 public:
  explicit Products(int64_t threads)
      : table_(kernels()), threads_(threads), ranges_(std::make_unique<Range[]>(static_cast<size_t>(threads))) {}

  void clear() { products_.clear(); }
  WeightProduct& add(const WeightProduct& p) {
    products_.push_back(p);
    return products_.back();
  }

  // Divides the outputs into a range for each thread, and returns the number of items. A thread takes most of its own
  // range as one piece, whose streams prefetchers follow for long, then the rest in small ones, then what is left of
  // the others'. Weights that lie by inputs are read in rows of a piece, which therefore is all of a range.
  int64_t divide() {
    constexpr int64_t line = 16;  // outputs of a cache line
    int64_t outputs = 0;
    bool whole = threads_ == 1;
    for (const WeightProduct& p : products_) {
      outputs += p.weight.outputs;
      whole = whole || p.weight.by_inputs;
    }
    cuts_.assign(1, 0);
    for (int64_t t = 0; t < threads_; ++t) {
      const int64_t end = t + 1 == threads_ ? outputs : outputs * (t + 1) / threads_ / line * line;
      const int64_t size = end - cuts_.back(), small = divide_up(size, 16 * line) * line;
      ranges_[t].next.store(cuts_.size() - 1, std::memory_order_relaxed);
      if (whole && size > 0) cuts_.push_back(end);
      if (const int64_t large = size * 3 / 4 / line * line; !whole && large > 0) cuts_.push_back(cuts_.back() + large);
      while (cuts_.back() < end) cuts_.push_back(std::min(end, cuts_.back() + small));
      ranges_[t].end = cuts_.size() - 1;
    }
    return static_cast<int64_t>(cuts_.size()) - 1;
  }

  // Runs one of the items.
  void run(int64_t thread) {
    const size_t piece = take_piece(thread);
    int64_t begin = cuts_[piece], end = cuts_[piece + 1];
    for (const WeightProduct& p : products_) {  // the part of each
      const int64_t outputs = p.weight.outputs, first = std::max<int64_t>(begin, 0), last = std::min(end, outputs);
      if (first < last) multiply(p, first, last);
      begin -= outputs;
      end -= outputs;
    }
  }

 private:
  struct alignas(64) Range {
    std::atomic<size_t> next;  // piece
    size_t end;
  };

  void multiply(const WeightProduct& p, int64_t begin, int64_t end) const {
    if (!p.weight.by_inputs) return table_.weight_product[static_cast<int>(p.weight.kind)](p, begin, end);
    Matmul m{
        p.x->rows, p.weight.outputs, p.weight.inputs, {p.x->data, p.x->row, 1}, {p.weight.data, p.weight.outputs, 1},
        p.out,     p.out_row};
    m.bias = p.bias;
    m.activation = p.activation;
    m.residual = p.residual;
    table_.gemv_by_rows[DType::f32](m, begin, end);
  }

  // There are as many pieces as items.
  size_t take_piece(int64_t thread) {
    for (int64_t t = thread;; t = (t + 1) % threads_) {
      const size_t piece = ranges_[t].next.fetch_add(1, std::memory_order_relaxed);
      if (piece < ranges_[t].end) return piece;
    }
  }

  const Kernels& table_;
  const int64_t threads_;
  std::vector<WeightProduct> products_;
  std::unique_ptr<Range[]> ranges_;  // of each thread
  std::vector<int64_t> cuts_;        // where the pieces of a phase begin
};

}  // namespace tinyllm::cpu
