// How a matmul C[rows x columns] = A B is cut into blocks: for the caches of a core, and into tasks for threads.
#pragma once
#include <cstdint>

namespace tinyllm::cpu {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Addresses so far apart fall into the same set of the first-level cache.
constexpr int64_t kCollidingBytes = 4096;

// The sizes of blocks for an instruction set and a compute type, in elements of that type.
struct Blocking {
  // The micro-kernel computes mr x nr elements of C at a time. These and nc are constants of the compiled kernels.
  int64_t mr, nr;
  // The columns that are processed together: where panels stay in the first-level cache they bound the sums of a block
  // that are kept, elsewhere a block of B of so many columns and as much of A fit the second-level cache.
  int64_t nc;

  // A block of A has at most so many elements and rows, so that its packed copy, and for deep matmuls the sums of its
  // rows, stay in the second-level cache.
  int64_t a_block_elements, a_block_rows = 256;
  // B is packed in parts of at most so many elements, which Scratch keeps, and of so many rows if sums can continue in
  // C.
  int64_t packed_b_elements, packed_depth = 2048;
  // Rows of B, and columns of a transposed A, up to this length are read in place: those of a panel are then spread
  // over many cache sets.
  int64_t in_place_row;
  // But not if they are a multiple of colliding_step apart (unless that is 0), and more rows of A than these use them:
  // a panel that should stay in the first-level cache would fall into half of its sets or fewer.
  int64_t colliding_step, in_place_rows = 24;
  // For so few rows of A, packing B does not pay.
  int64_t gemv_rows = 4;
  // So few rows of A take less time than packing a stored weight.
  int64_t unpacking_rows = 64;
  // A matmul that another one continues is cut into blocks of rows only. With fewer rows for each thread, it is better
  // to compute them one after the other.
  int64_t chained_rows = 48;
  // A matmul with fewer operations takes less time than waking a thread.
  double serial_flops = 2e5;

  bool collides(int64_t step) const { return colliding_step > 0 && step % colliding_step == 0; }
  // Whether a transposed A of the compute type whose columns are `step` apart is copied.
  bool packs_transposed(int64_t step) const { return step > in_place_row || collides(step); }
};

// A matmul's tasks: row_blocks x column_blocks blocks of C. The last ones may be smaller.
struct Plan {
  int64_t block_rows, row_blocks;
  int64_t block_columns, column_blocks;  // block_columns is a multiple of nr

  int64_t tasks() const { return row_blocks * column_blocks; }
};

// Plans the tasks for a number of threads. Depends on its arguments only. Each element of C is the same sum in every
// plan, so that results do not depend on the number of threads. Each task copies its rows of a transposed A that is
// packed.
Plan plan(int64_t rows, int64_t columns, int64_t depth, int64_t threads, const Blocking& blocking,
          bool packs_transposed_a = false, bool whole_rows = false);

}  // namespace tinyllm::cpu
