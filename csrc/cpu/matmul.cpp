#include "matmul.h"

#include <cstring>

#include "scratch.h"
#include "weights.h"

namespace tinyllm::cpu {
namespace {

const void* advance(const void* data, int64_t elements, DType dtype) {
  return data == nullptr ? nullptr : static_cast<const char*>(data) + elements * element_size(dtype);
}

double flops(const Matmul& p) {
  return 2.0 * static_cast<double>(p.rows) * static_cast<double>(p.columns) * static_cast<double>(p.depth);
}

Blocking blocking(DType dtype) { return kernels().blocking[dtype]; }

// Whether B can be used without packing: whole panels of the compute type, and short rows.
bool usable_unpacked(const Matmul& p, DType dtype) {
  if (p.weight != nullptr) return false;
  const Blocking b = blocking(dtype);
  return p.b.column == 1 && element_size(dtype) == compute_size(dtype) && p.columns % b.nr == 0 &&
         p.b.row <= b.in_place_row && (p.rows <= b.in_place_rows || !b.collides(p.b.row));
}

int64_t packed_elements(const Matmul& p, DType dtype) {
  if (usable_unpacked(p, dtype)) return 0;
  const int64_t nr = blocking(dtype).nr;
  return divide_up(p.columns, nr) * nr * p.depth;
}

// The same matmul restricted to columns [first, first + count).
Matmul columns_of(Matmul p, int64_t first, int64_t count, DType dtype) {
  p.b.data = advance(p.b.data, first * p.b.column, dtype);
  p.weight_column += first;
  p.out = const_cast<void*>(advance(p.out, first, dtype));
  p.bias = advance(p.bias, first, dtype);
  p.gate = advance(p.gate, first, dtype);
  p.residual = advance(p.residual, first, dtype);
  p.slope = const_cast<void*>(advance(p.slope, first, dtype));
  p.columns = count;
  return p;
}

// Whether a matmul of few rows is a row-major weight's, or one of float weights whose columns are contiguous and follow
// each other, as weight_dots takes them.
bool is_by_rows(const Matmul& p) { return p.b.column == 1 && p.b.row > 1; }
bool is_weight_product(const Matmul& p, DType dtype) {
  return dtype == DType::f32 && p.b.row == 1 && p.b.column == p.depth && p.a.row == p.depth && p.out_row == p.columns &&
         p.depth > 0 && p.gate == nullptr && p.slope == nullptr;
}

// Whether a matmul has so few rows that packing B does not pay.
bool takes_gemv(const Matmul& p, DType dtype) {
  if (p.weight != nullptr || p.a.column != 1) return false;
  if (is_by_rows(p) || is_weight_product(p, dtype)) return p.rows <= kFewRows;
  return p.rows <= blocking(dtype).gemv_rows && p.b.row == 1;
}

void run_gemv(const Matmul& p, DType dtype) {
  if (is_weight_product(p, dtype)) {
    const Weight weight{.kind = WeightKind::f32, .data = p.b.data, .outputs = p.columns, .inputs = p.depth};
    const auto floats = [](const void* data) { return static_cast<const float*>(data); };
    return weight_dots(weight, floats(p.a.data), p.rows, floats(p.bias), p.activation, floats(p.residual),
                       static_cast<float*>(p.out));
  }
  constexpr int64_t line = 16;  // columns whose memory no two threads share
  const bool by_rows = is_by_rows(p);
  const auto kernel = (by_rows ? kernels().gemv_by_rows : kernels().gemv)[dtype];
  const int64_t unit = by_rows ? line : 1, grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, p.depth) / unit);
  torch::stable::parallel_for(0, divide_up(p.columns, unit), grain, [&](int64_t begin, int64_t end) {
    kernel(p, begin * unit, std::min(p.columns, end * unit));
  });
}

// Whether a matmul reads the output of an earlier one, so that a task must compute whole rows.
bool is_chained(const Matmul* matmuls, int64_t count) {
  for (int64_t i = 1; i < count; ++i)
    for (int64_t j = 0; j < i; ++j)
      if (matmuls[i].a.data == matmuls[j].out) return true;
  return false;
}

// A part of a B that is packed at once: a panel, and if B is row-major some of its rows.
struct Packing {
  int64_t panels, rows, row_parts;

  Packing(const Matmul& p, int64_t nr)
      : panels(divide_up(p.columns, nr)), rows(p.weight == nullptr && p.b.column == 1 ? 64 : p.depth) {
    row_parts = divide_up(p.depth, std::max<int64_t>(1, rows));
  }
  int64_t parts() const { return panels * row_parts; }
};

// Packs parts [begin, end) of B, which are numbered along the rows of B first.
void pack_parts(const Matmul& p, DType dtype, const Packing& packing, int64_t begin, int64_t end) {
  const int64_t nr = blocking(dtype).nr;
  while (begin < end) {
    const int64_t panel = begin % packing.panels, row = begin / packing.panels * packing.rows;
    const int64_t last = std::min(packing.panels, panel + end - begin);
    kernels().matmul_pack_b[dtype](p, row, std::min(p.depth, row + packing.rows), panel * nr,
                                   std::min(p.columns, last * nr));
    begin += last - panel;
  }
}

// Runs matmuls with the same rows whose packed matrices together fit Blocking::packed_b_elements, or a single one:
// first packs all B, then computes.
void run_gemm(DType dtype, Matmul* matmuls, int64_t count) {
  const Kernels& k = kernels();
  const Blocking b = blocking(dtype);
  int64_t elements = 0, rows = 0, columns = 0, depth = 0;
  double work = 0;
  bool packs_transposed_a = false;
  for (int64_t i = 0; i < count; ++i) {
    elements += packed_elements(matmuls[i], dtype);
    rows = matmuls[i].rows;
    columns = std::max(columns, matmuls[i].columns);
    depth = std::max(depth, matmuls[i].depth);
    work += flops(matmuls[i]);
    const Matrix& a = matmuls[i].a;
    packs_transposed_a = packs_transposed_a || (a.column != 1 && b.packs_transposed(a.column));
  }
  const Scratch scratch(static_cast<size_t>(elements * compute_size(dtype)));
  int64_t used = 0, parts = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t size = packed_elements(matmuls[i], dtype);
    if (size == 0) continue;
    matmuls[i].packed = scratch.data() + used * compute_size(dtype);
    used += size;
    parts += Packing(matmuls[i], b.nr).parts();
  }
  const bool serial = work < b.serial_flops;
  torch::stable::parallel_for(0, parts, serial ? parts : 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0, first = 0; i < count; ++i) {
      if (matmuls[i].packed == nullptr) continue;
      const Packing packing(matmuls[i], b.nr);
      pack_parts(matmuls[i], dtype, packing, std::max(begin - first, int64_t{0}),
                 std::min(end - first, packing.parts()));
      first += packing.parts();
    }
  });
  const Plan tasks = plan(rows, columns, depth, serial ? 1 : torch::stable::get_num_threads(), b, packs_transposed_a,
                          is_chained(matmuls, count));
  const auto task = [&](int64_t t) {
    const int64_t row = t / tasks.column_blocks * tasks.block_rows, split = t % tasks.column_blocks;
    for (int64_t i = 0; i < count; ++i) {
      const Matmul& p = matmuls[i];
      const int64_t width = divide_up(divide_up(p.columns, b.nr), tasks.column_blocks) * b.nr;
      const int64_t begin = split * width, end = std::min(p.columns, begin + width);
      if (begin < end) k.matmul_block[dtype](p, row, std::min(rows, row + tasks.block_rows), begin, end);
    }
  };
  if (serial)
    for (int64_t t = 0; t < tasks.tasks(); ++t) task(t);
  else
    parallel_items(tasks.tasks(), task);
}

// Runs a matmul of few rows with a stored weight, or a chunk of its depth: a thread multiplies what it has packed while
// that is in its caches.
void run_unpacking(Matmul p, DType dtype) {
  constexpr int64_t item_elements = 65536;  // with 256 KB half of a second-level cache, or less
  constexpr double unpacking_flops = 16;    // of a weight; they take as long
  const Kernels& k = kernels();
  const Blocking b = blocking(dtype);
  // Each item would copy rows of A that it cannot read in place.
  const int64_t row = p.depth + 16;
  const bool copies = p.rows > 1 && p.a.row * compute_size(dtype) % kCollidingBytes == 0;
  const Scratch copied(copies ? static_cast<size_t>(p.rows * row * compute_size(dtype)) : 0);
  if (copies) {
    for (int64_t r = 0; r < p.rows; ++r)
      std::memcpy(copied.data() + r * row * compute_size(dtype), advance(p.a.data, r * p.a.row, dtype),
                  static_cast<size_t>(p.depth * compute_size(dtype)));
    p.a = {copied.data(), row, 1};
  }
  const int64_t panels = divide_up(p.columns, b.nr), each = 2 * torch::stable::get_num_threads();
  const double work = flops(p) + unpacking_flops * static_cast<double>(p.columns) * static_cast<double>(p.depth);
  const int64_t fitting = std::max<int64_t>(1, item_elements / (b.nr * std::max<int64_t>(1, p.depth)));
  const int64_t width = (work < b.serial_flops ? panels : std::min(fitting, divide_up(panels, each))) * b.nr;
  parallel_items(divide_up(p.columns, width), [&](int64_t item) {
    Matmul part = columns_of(p, item * width, std::min(width, p.columns - item * width), dtype);
    const Scratch scratch(static_cast<size_t>(packed_elements(part, dtype) * compute_size(dtype)));
    part.packed = scratch.data();
    k.matmul_pack_b[dtype](part, 0, part.depth, 0, part.columns);
    k.matmul_block[dtype](part, 0, part.rows, 0, part.columns);
  });
}

void run_matmul(DType dtype, const Matmul& p) {
  if (p.rows == 0 || p.columns == 0) return;
  const Blocking b = blocking(dtype);
  if (takes_gemv(p, dtype)) return run_gemv(p, dtype);
  // The sum of a chunk of the depth can continue in `out` only if nothing but the bias follows it, and only if `out`
  // has the compute type.
  const bool can_continue = p.activation == Activation::none && p.gate == nullptr && p.residual == nullptr &&
                            p.slope == nullptr && element_size(dtype) == compute_size(dtype);
  const int64_t max_depth = can_continue ? b.packed_depth : std::max<int64_t>(1, p.depth);
  int64_t k = 0;
  do {  // runs once even for depth 0, which must still write out
    Matmul chunk = p;
    chunk.depth = std::min(max_depth, p.depth - k);
    chunk.a.data = advance(p.a.data, k * p.a.column, dtype);
    chunk.b.data = advance(p.b.data, k * p.b.row, dtype);
    chunk.weight_depth = p.weight_depth + k;
    if (k > 0) chunk.residual = p.out;
    if (k + chunk.depth < p.depth) chunk.bias = nullptr;
    k += chunk.depth;
    if (p.weight != nullptr && p.rows <= b.unpacking_rows) {
      run_unpacking(chunk, dtype);
      continue;
    }
    const int64_t width = std::max<int64_t>(1, b.packed_b_elements / (std::max<int64_t>(1, chunk.depth) * b.nr)) * b.nr;
    for (int64_t c = 0; c < p.columns; c += width) {
      Matmul block = columns_of(chunk, c, std::min(width, p.columns - c), dtype);
      run_gemm(dtype, &block, 1);
    }
  } while (k < p.depth);
}

}  // namespace

void run_matmuls(DType dtype, std::vector<Matmul> matmuls) {
  const Blocking b = blocking(dtype);
  const int64_t count = static_cast<int64_t>(matmuls.size()), rows = matmuls[0].rows;
  const bool chained = is_chained(matmuls.data(), count);
  int64_t elements = 0;
  bool together = count > 1 && (matmuls[0].weight == nullptr || rows > b.unpacking_rows);
  if (chained && rows < b.chained_rows * torch::stable::get_num_threads()) together = false;
  for (const Matmul& p : matmuls) {
    elements += packed_elements(p, dtype);
    together = together && p.rows == rows && p.depth <= b.packed_depth && p.columns > 0 && !takes_gemv(p, dtype);
  }
  if (together && elements <= b.packed_b_elements) return run_gemm(dtype, matmuls.data(), count);
  for (const Matmul& p : matmuls) run_matmul(dtype, p);
}

void pack_b(DType dtype, const Matmul& p) {
  const int64_t nr = blocking(dtype).nr;
  const Packing packing(p, nr);
  const int64_t grain = divide_up(32768, nr * std::max<int64_t>(1, packing.rows));  // less does not pay a thread
  torch::stable::parallel_for(0, packing.parts(), grain,
                              [&](int64_t begin, int64_t end) { pack_parts(p, dtype, packing, begin, end); });
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
