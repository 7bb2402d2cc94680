// A sequence of phases, each of items that any thread may take, in one parallel region: what separates two phases costs
// a fraction of a microsecond instead of waking all threads.
//
// A phase ends when all its items are done, not when all threads have arrived: a thread that the pool starts late, or
// never, or that the system suspends between two items, holds nothing up. So there is no deadlock whatever number of
// threads run, whether this region is nested in another one or shares its threads with a region of another caller.
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <thread>

#include "torch_side.h"

namespace tinyllm::cpu {

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Program has:
//   items(): the number of items of the first phase; 0 ends the sequence.
//   run(item, thread): runs an item of the current phase; those of a phase run at once. `thread` is the number of the
//     thread, below that of the threads asked for: constant in a region, and usually the same in the next one.
//   next(): runs alone when all items of a phase are done, moves on, and returns the number of items of the next one.
template <class Program>
class Phases {
 public:
  Phases(Program& program, int64_t threads) : program_(program) {
    set(program.items());
    if (threads <= 1)
      work(0);
    else
      torch::stable::parallel_for(0, threads, 1, [this](int64_t thread, int64_t) { work(thread); });
    if (error_) std::rethrow_exception(error_);
  }

 private:
  // How many times a thread that waits looks again before it leaves its core to others.
  static constexpr int kSpins = 4000;
  static constexpr int kBits = 20;  // of the next item and of the number of items
  static constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;

  // The state is one word, so that an item is always of the phase that it was taken from: the phase in the upper bits,
  // the number of its items, and the next item.
  static uint64_t item_of(uint64_t state) { return state & kMask; }
  static uint64_t items_of(uint64_t state) { return state >> kBits & kMask; }
  static uint64_t phase_of(uint64_t state) { return state >> 2 * kBits; }

  void set(int64_t items) {
    if (items > static_cast<int64_t>(kMask)) throw std::length_error("a phase has too many items");
    state_.store(++phase_ << 2 * kBits | static_cast<uint64_t>(items) << kBits, std::memory_order_release);
  }

  void work(int64_t thread) {
    uint64_t state = state_.load(std::memory_order_acquire);
    while (items_of(state) > 0) {
      if (item_of(state) == items_of(state)) {  // all are taken: the phase ends when they are done
        const uint64_t phase = phase_of(state);
        for (int spins = 0; phase_of(state) == phase; ++spins) {
          spins < kSpins ? pause_briefly() : std::this_thread::yield();
          state = state_.load(std::memory_order_acquire);
        }
        continue;
      }
      // An item is taken of the state that was seen, or not at all: the phase may have ended since.
      if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel, std::memory_order_acquire))
        continue;
      try {
        program_.run(static_cast<int64_t>(item_of(state)), thread);
        if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == items_of(state)) {
          done_.store(0, std::memory_order_relaxed);
          set(program_.next());
        }
      } catch (...) {
        stop(std::current_exception());
      }
      state = state_.load(std::memory_order_acquire);
    }
  }

  void stop(std::exception_ptr error) {
    if (!failed_.test_and_set()) {
      error_ = std::move(error);
      set(0);  // an item that failed is not done, so no other thread moves on
    }
  }

  Program& program_;
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<uint64_t> done_{0};
  uint64_t phase_ = 0;
  std::atomic_flag failed_ = ATOMIC_FLAG_INIT;
  std::exception_ptr error_;
};

}  // namespace tinyllm::cpu
