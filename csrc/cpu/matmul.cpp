#include "matmul.h"

#include "scratch.h"

namespace tinyllm::cpu {
namespace {

// Blocking on the torch side; MR, NR, KC and NC are in gemm.h and matmul_kernel.h.
constexpr int64_t kPackedBBytes = int64_t{8} << 20;  // of packed B at a time, which Scratch caches
constexpr int64_t kABlockBytes = int64_t{1} << 20;   // of a block of A, which is packed into a second-level cache
constexpr int64_t kPackedDepth = 2048;               // rows of B packed at a time if sums can continue in the output
constexpr int64_t kGemvMaxRows = 4;                  // for so few rows, packing B does not pay
constexpr double kSmallFlops = 2e5;                  // take less time than waking a thread

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

const void* advance(const void* data, int64_t elements, DType dtype) {
  return data == nullptr ? nullptr : static_cast<const char*>(data) + elements * element_size(dtype);
}

double flops(const Matmul& p) {
  return 2.0 * static_cast<double>(p.rows) * static_cast<double>(p.columns) * static_cast<double>(p.depth);
}

// Whether B can be used without packing: whole panels, and rows so short that those of a panel are spread over many
// cache sets.
bool usable_unpacked(const Matmul& p, DType dtype) {
  return p.b.column == 1 && element_size(dtype) == compute_size(dtype) && p.columns % kernels().nr[dtype] == 0 &&
         p.b.row * element_size(dtype) <= 1024;
}

int64_t packed_bytes(const Matmul& p, DType dtype) {
  if (usable_unpacked(p, dtype)) return 0;
  const int64_t panel = kernels().nr[dtype];
  return divide_up(p.columns, panel) * panel * p.depth * compute_size(dtype);
}

// The same matmul restricted to columns [first, first + count).
Matmul columns_of(Matmul p, int64_t first, int64_t count, DType dtype) {
  p.b.data = advance(p.b.data, first * p.b.column, dtype);
  p.out = const_cast<void*>(advance(p.out, first, dtype));
  p.bias = advance(p.bias, first, dtype);
  p.gate = advance(p.gate, first, dtype);
  p.residual = advance(p.residual, first, dtype);
  p.slope = const_cast<void*>(advance(p.slope, first, dtype));
  p.columns = count;
  return p;
}

void run_gemv(const Matmul& p, DType dtype) {
  const auto kernel = kernels().gemv[dtype];
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, p.depth));
  torch::stable::parallel_for(0, p.columns, grain, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

// Whether a matmul reads the output of an earlier one, so that a task must compute whole rows.
bool is_chained(const Matmul* matmuls, int64_t count) {
  for (int64_t i = 1; i < count; ++i)
    for (int64_t j = 0; j < i; ++j)
      if (matmuls[i].a.data == matmuls[j].out) return true;
  return false;
}

// How a group of matmuls is divided into tasks: blocks of rows, each in column_splits parts.
struct Plan {
  int64_t block_rows, blocks, column_splits;
};

// A few tasks per thread balance the load, while each should be large enough to use the packed B often. Columns are
// split only if there are too few rows for that and no matmul needs whole rows of another.
Plan plan_blocks(int64_t rows, int64_t panels, int64_t depth_bytes, int64_t mr, int64_t threads, bool chained) {
  const int64_t limit = std::max<int64_t>(mr, kABlockBytes / std::max<int64_t>(1, depth_bytes)) / mr * mr;
  const int64_t wanted = std::max(divide_up(rows, 4 * threads), std::min<int64_t>(64, divide_up(rows, threads)));
  const int64_t block_rows = std::min(divide_up(wanted, mr) * mr, limit), blocks = divide_up(rows, block_rows);
  const bool enough = blocks >= threads || chained;
  return {block_rows, blocks, enough ? 1 : std::min(divide_up(4 * threads, blocks), panels)};
}

// Runs matmuls with the same rows whose packed matrices together fit kPackedBBytes, or a single one: first packs all B,
// then computes.
void run_gemm(DType dtype, Matmul* matmuls, int64_t count) {
  const Kernels& k = kernels();
  const int64_t nr = k.nr[dtype];
  int64_t bytes = 0, panels = 0, rows = 0, columns = 0, depth = 0;
  double work = 0;
  for (int64_t i = 0; i < count; ++i) {
    bytes += packed_bytes(matmuls[i], dtype);
    if (!usable_unpacked(matmuls[i], dtype)) panels += divide_up(matmuls[i].columns, nr);
    rows = matmuls[i].rows;
    columns = std::max(columns, matmuls[i].columns);
    depth = std::max(depth, matmuls[i].depth);
    work += flops(matmuls[i]);
  }
  const Scratch scratch(static_cast<size_t>(bytes));
  char* at = scratch.data();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t size = packed_bytes(matmuls[i], dtype);
    if (size > 0) matmuls[i].packed = at;
    at += size;
  }
  const bool serial = work < kSmallFlops;
  torch::stable::parallel_for(0, panels, serial ? panels : 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0, first = 0; i < count; ++i) {
      const Matmul& p = matmuls[i];
      if (p.packed == nullptr) continue;
      const int64_t own = divide_up(p.columns, nr);
      const int64_t from = std::max(begin - first, int64_t{0}), to = std::min(end - first, own);
      if (from < to) k.matmul_pack_b[dtype](p, from * nr, std::min(p.columns, to * nr));
      first += own;
    }
  });
  const Plan plan = plan_blocks(rows, divide_up(columns, nr), depth * compute_size(dtype), k.mr,
                                serial ? 1 : torch::stable::get_num_threads(), is_chained(matmuls, count));
  const auto task = [&](int64_t t) {
    const int64_t row = t / plan.column_splits * plan.block_rows, split = t % plan.column_splits;
    for (int64_t i = 0; i < count; ++i) {
      const Matmul& p = matmuls[i];
      const int64_t width = divide_up(divide_up(p.columns, nr), plan.column_splits) * nr;
      const int64_t begin = split * width, end = std::min(p.columns, begin + width);
      if (begin < end) k.matmul_block[dtype](p, row, std::min(rows, row + plan.block_rows), begin, end);
    }
  };
  const int64_t tasks = plan.blocks * plan.column_splits;
  if (serial)
    for (int64_t t = 0; t < tasks; ++t) task(t);
  else
    parallel_items(tasks, task);
}

void run_matmul(const Matmul& p, DType dtype) {
  if (p.rows == 0 || p.columns == 0) return;
  if (p.rows <= kGemvMaxRows && p.a.column == 1 && p.b.row == 1) return run_gemv(p, dtype);
  // The sum of a chunk of the depth can continue in `out` only if nothing but the bias follows it, and only if `out`
  // has the compute type.
  const bool can_continue = p.activation == Activation::none && p.gate == nullptr && p.residual == nullptr &&
                            p.slope == nullptr && element_size(dtype) == compute_size(dtype);
  const int64_t max_depth = can_continue ? kPackedDepth : std::max<int64_t>(1, p.depth);
  int64_t k = 0;
  do {  // runs once even for depth 0, which must still write out
    Matmul chunk = p;
    chunk.depth = std::min(max_depth, p.depth - k);
    chunk.a.data = advance(p.a.data, k * p.a.column, dtype);
    chunk.b.data = advance(p.b.data, k * p.b.row, dtype);
    if (k > 0) chunk.residual = p.out;
    if (k + chunk.depth < p.depth) chunk.bias = nullptr;
    const int64_t nr = kernels().nr[dtype];
    const int64_t panel_bytes = std::max<int64_t>(1, chunk.depth * nr * compute_size(dtype));
    const int64_t width = std::max<int64_t>(1, kPackedBBytes / panel_bytes) * nr;
    for (int64_t c = 0; c < p.columns; c += width) {
      Matmul block = columns_of(chunk, c, std::min(width, p.columns - c), dtype);
      run_gemm(dtype, &block, 1);
    }
    k += chunk.depth;
  } while (k < p.depth);
}

}  // namespace

void run_matmuls(DType dtype, std::vector<Matmul> matmuls) {
  int64_t bytes = 0;
  bool together = matmuls.size() > 1 && matmuls[0].rows > kGemvMaxRows;
  for (const Matmul& p : matmuls) {
    bytes += packed_bytes(p, dtype);
    together = together && p.rows == matmuls[0].rows && p.depth <= kPackedDepth && p.columns > 0;
  }
  if (together && bytes <= kPackedBBytes) return run_gemm(dtype, matmuls.data(), static_cast<int64_t>(matmuls.size()));
  for (const Matmul& p : matmuls) run_matmul(p, dtype);
}

void sum_columns(DType dtype, const void* data, int64_t rows, int64_t columns, void* out) {
  const ColumnSums args{data, rows, columns, out};
  const auto kernel = kernels().column_sums[dtype];
  const int64_t grain = std::max<int64_t>(64, 65536 / std::max<int64_t>(1, rows));
  torch::stable::parallel_for(0, columns, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void pass_gate(DType dtype, Activation activation, const void* gate, const void* grad, void* out, int64_t count) {
  const auto kernel = kernels().gate[dtype];
  torch::stable::parallel_for(0, count, 16384,
                              [&](int64_t begin, int64_t end) { kernel(activation, gate, grad, out, begin, end); });
}

}  // namespace tinyllm::cpu
