#include "products.h"

namespace tinyllm::cpu {
namespace {

constexpr int64_t kPackedBytes = int64_t{8} << 20;  // of B at a time: what Scratch keeps
constexpr int64_t kSlabBytes = int64_t{1} << 20;    // of A, where a slab is copied
constexpr int64_t kDeep = 2048;                     // rows of B packed at a time where sums can be continued in out
constexpr int64_t kFewRows = 4;                     // so few are not worth packing B for
constexpr double kSmallFlops = 2e5;                 // less than what waking a thread costs

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t compute_size(int dtype) { return std::max<int64_t>(4, element_size(dtype)); }

const void* advance(const void* data, int64_t elements, int dtype) {
  return data == nullptr ? nullptr : static_cast<const char*>(data) + elements * element_size(dtype);
}

double flops(const Product& p) {
  return 2.0 * static_cast<double>(p.rows) * static_cast<double>(p.columns) * static_cast<double>(p.depth);
}

// Whether B serves as it lies in memory: whole panels, and rows so close that a panel's fall into many cache sets.
bool is_panel(const Product& p, int dtype) {
  return p.b.column == 1 && element_size(dtype) == compute_size(dtype) && p.columns % kernels().panel[dtype] == 0 &&
         p.b.row * element_size(dtype) <= 2048;
}

int64_t packed_bytes(const Product& p, int dtype) {
  if (is_panel(p, dtype)) return 0;
  const int64_t panel = kernels().panel[dtype];
  return divide_up(p.columns, panel) * panel * p.depth * compute_size(dtype);
}

// Columns [first, first + count) alone.
Product columns_of(Product p, int64_t first, int64_t count, int dtype) {
  p.b.data = advance(p.b.data, first * p.b.column, dtype);
  p.out = const_cast<void*>(advance(p.out, first, dtype));
  p.bias = advance(p.bias, first, dtype);
  p.gate = advance(p.gate, first, dtype);
  p.residual = advance(p.residual, first, dtype);
  p.pre_activation = const_cast<void*>(advance(p.pre_activation, first, dtype));
  p.columns = count;
  return p;
}

void run_dots(const Product& p, int dtype) {
  const auto kernel = kernels().product_dots[dtype];
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, p.depth));
  torch::stable::parallel_for(0, p.columns, grain, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

// Whether one of the products multiplies what an earlier one wrote: a row must then be whole before it is read.
bool is_chain(const Product* products, int64_t count) {
  for (int64_t i = 1; i < count; ++i)
    for (int64_t j = 0; j < i; ++j)
      if (products[i].a.data == products[j].out) return true;
  return false;
}

// Products with the same rows whose packed matrices fit together into kPackedBytes, or one product.
void run_packed(int dtype, Product* products, int64_t count) {
  const Kernels& k = kernels();
  const int64_t panel = k.panel[dtype];
  int64_t bytes = 0, panels = 0, rows = 0, columns = 0, depth = 0;
  double work = 0;
  for (int64_t i = 0; i < count; ++i) {
    bytes += packed_bytes(products[i], dtype);
    if (!is_panel(products[i], dtype)) panels += divide_up(products[i].columns, panel);
    rows = products[i].rows;
    columns = std::max(columns, products[i].columns);
    depth = std::max(depth, products[i].depth);
    work += flops(products[i]);
  }
  const Scratch scratch(static_cast<size_t>(bytes));
  char* at = scratch.data();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t size = packed_bytes(products[i], dtype);
    if (size > 0) products[i].packed = at;
    at += size;
  }
  const bool alone = work < kSmallFlops;
  const int64_t threads = alone ? 1 : torch::stable::get_num_threads();
  torch::stable::parallel_for(0, panels, alone ? panels : 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0, first = 0; i < count; ++i) {
      const Product& p = products[i];
      if (p.packed == nullptr) continue;
      const int64_t own = divide_up(p.columns, panel);
      const int64_t from = std::max(begin - first, int64_t{0}), to = std::min(end - first, own);
      if (from < to) k.pack_product[dtype](p, from * panel, std::min(p.columns, to * panel));
      first += own;
    }
  });
  // A few tasks for each thread, so that one that is held up leaves work to the others; each long enough to use the
  // packed matrix often. Columns are divided where there are too few rows for that.
  const int64_t most = std::max<int64_t>(k.rows, kSlabBytes / std::max<int64_t>(1, depth * compute_size(dtype)));
  int64_t slab = std::max(divide_up(rows, 4 * threads), std::min<int64_t>(64, divide_up(rows, threads)));
  slab = std::min(divide_up(slab, k.rows) * k.rows, most / k.rows * k.rows);
  const int64_t slabs = divide_up(rows, slab);
  const int64_t parts = slabs >= threads || is_chain(products, count)
                            ? 1
                            : std::min(divide_up(4 * threads, slabs), divide_up(columns, panel));
  const auto task = [&](int64_t t) {
    const int64_t row = t / parts * slab, part = t % parts;
    for (int64_t i = 0; i < count; ++i) {
      const Product& p = products[i];
      const int64_t width = divide_up(divide_up(p.columns, panel), parts) * panel;
      const int64_t begin = part * width, end = std::min(p.columns, begin + width);
      if (begin < end) k.product_part[dtype](p, row, std::min(rows, row + slab), begin, end);
    }
  };
  if (alone)
    for (int64_t t = 0; t < slabs * parts; ++t) task(t);
  else
    parallel_items(slabs * parts, task);
}

void run_one(const Product& p, int dtype) {
  if (p.rows == 0 || p.columns == 0) return;
  if (p.rows <= kFewRows && p.a.column == 1 && p.b.row == 1) return run_dots(p, dtype);
  // A sum can be continued in out only if nothing but the bias follows it, and only in the compute type.
  const bool continues = p.activation == Activation::none && p.gate == nullptr && p.residual == nullptr &&
                         p.pre_activation == nullptr && element_size(dtype) == compute_size(dtype);
  const int64_t deep = continues ? kDeep : std::max<int64_t>(1, p.depth);
  int64_t k = 0;
  do {  // once for depth 0, which must still write out
    Product part = p;
    part.depth = std::min(deep, p.depth - k);
    part.a.data = advance(p.a.data, k * p.a.column, dtype);
    part.b.data = advance(p.b.data, k * p.b.row, dtype);
    if (k > 0) part.residual = p.out;
    if (k + part.depth < p.depth) part.bias = nullptr;
    const int64_t panel = kernels().panel[dtype];
    const int64_t panel_bytes = std::max<int64_t>(1, part.depth * panel * compute_size(dtype));
    const int64_t width = std::max<int64_t>(1, kPackedBytes / panel_bytes) * panel;
    for (int64_t c = 0; c < p.columns; c += width) {
      Product block = columns_of(part, c, std::min(width, p.columns - c), dtype);
      run_packed(dtype, &block, 1);
    }
    k += part.depth;
  } while (k < p.depth);
}

}  // namespace

void run_products(int dtype, std::vector<Product> products) {
  int64_t bytes = 0;
  bool together = products.size() > 1 && products[0].rows > kFewRows;
  for (const Product& p : products) {
    bytes += packed_bytes(p, dtype);
    together = together && p.rows == products[0].rows && p.depth <= kDeep && p.columns > 0;
  }
  if (together && bytes <= kPackedBytes)
    return run_packed(dtype, products.data(), static_cast<int64_t>(products.size()));
  for (const Product& p : products) run_one(p, dtype);
}

void sum_columns(int dtype, const void* data, int64_t rows, int64_t columns, void* out) {
  const ColumnSums args{data, rows, columns, out};
  const auto kernel = kernels().column_sums[dtype];
  const int64_t grain = std::max<int64_t>(64, 65536 / std::max<int64_t>(1, rows));
  torch::stable::parallel_for(0, columns, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void activate(int dtype, Activation activation, const void* x, const void* grad, void* out, int64_t count) {
  const auto kernel = kernels().activate[dtype];
  torch::stable::parallel_for(0, count, 16384,
                              [&](int64_t begin, int64_t end) { kernel(activation, x, grad, out, begin, end); });
}

}  // namespace tinyllm::cpu
