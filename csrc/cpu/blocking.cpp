#include "blocking.h"

#include <algorithm>
#include <limits>

namespace tinyllm::cpu {
namespace {

// The numbers of blocks that are tried: 1, 2, 3, 4, 6, 8, 12, 16, 24, ...
int64_t next_count(int64_t n) { return n < 3 ? n + 1 : n % 3 == 0 ? n / 3 * 4 : n / 2 * 3; }

}  // namespace

// A task of r x c elements is taken to cost r c + kTraffic (r + c): beside the multiplications, its rows of A and its
// columns of B come from a farther cache. Rows of a transposed A that are copied cost kTranspose each instead: an
// estimate, from the copies' share of a profile on an AMD EPYC (Zen 3). The threads take tasks in turns, and since
// other programs may hold one of them up, the last turn costs kTail of a task more. So small matmuls have one task for
// each thread and large ones several, and neither operand is read again for every few rows or columns of the other.
Plan plan(int64_t rows, int64_t columns, int64_t depth, int64_t threads, const Blocking& b, bool packs_transposed_a,
          bool whole_rows) {
  constexpr double kTraffic = 8, kTranspose = 24, kTail = 0.25;
  constexpr int64_t kTasksPerThread = 8;
  const int64_t tiles = divide_up(std::max<int64_t>(1, rows), b.mr);
  const int64_t panels = divide_up(std::max<int64_t>(1, columns), b.nr);
  const int64_t block_rows = std::min(b.a_block_rows, b.a_block_elements / std::max<int64_t>(1, depth));
  const int64_t block_tiles = std::max<int64_t>(1, block_rows / b.mr);
  const int64_t fewest = divide_up(tiles, block_tiles), most = std::max(fewest, kTasksPerThread * threads);
  Plan best{};
  double least = std::numeric_limits<double>::infinity();
  for (int64_t i = 1; i <= std::min(tiles, most); i = next_count(i)) {
    const int64_t rows_each = divide_up(tiles, std::max(i, fewest)), row_blocks = divide_up(tiles, rows_each);
    for (int64_t j = 1; j <= (whole_rows ? 1 : std::min(panels, std::max<int64_t>(1, most / row_blocks)));
         j = next_count(j)) {
      const int64_t columns_each = divide_up(panels, j), column_blocks = divide_up(panels, columns_each);
      const Plan p{rows_each * b.mr, row_blocks, columns_each * b.nr, column_blocks};
      const double r = static_cast<double>(p.block_rows), c = static_cast<double>(p.block_columns);
      const double turns = static_cast<double>(divide_up(p.tasks(), threads)) + (threads > 1 ? kTail : 0);
      const double cost = turns * (r * c + (packs_transposed_a ? kTranspose : kTraffic) * r + kTraffic * c);
      if (cost < least) {
        least = cost;
        best = p;
      }
    }
  }
  return best;
}

}  // namespace tinyllm::cpu
