// embedding on NVIDIA GPUs: checks, allocation, sorting of the tokens by id for backward, and launches. The arithmetic
// is in embedding_kernel.cuh.
#include "../embedding_checks.h"

#include <array>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "dtypes.cuh"
#include "embedding_kernel.cuh"
#include "torch_side.cuh"

namespace tinyllm::cuda {
namespace {

using Shape = std::vector<int64_t>;

void check_no_dropout(const char* op, double dropout_p, const OptionalTensor& rng) {
  if (dropout_p > 0.0 || rng.has_value()) fail(op, ": dropout_p is ", dropout_p, "; the CUDA kernel drops nothing");
}

// Returns rows with contiguous columns; a copy only if the strides require one.
Tensor as_rows(const Tensor& x) { return x.size(1) < 2 || x.stride(1) == 1 ? x : torch::stable::contiguous(x); }

bool is_long(const Tensor& ids) { return ids.scalar_type() == ScalarType::Long; }

unsigned blocks_of(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

// Whether all rows of a tensor are aligned to 16 bytes.
bool rows_aligned(const void* data, int64_t row, int64_t size) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row * size % 16 == 0;
}

// Calls f with a zero of the C++ type of the dtype, and the number of elements that a thread moves at a time as a
// constant.
template <class F>
void with_width(const char* op, ScalarType dtype, bool aligned, const F& f) {
  with_type(op, dtype, [&](auto number) {
    if (aligned)
      f(number, std::integral_constant<int, kVector<decltype(number)>>{});
    else
      f(number, std::integral_constant<int, 1>{});
  });
}

Tensor embedding_fwd(Tensor input, Tensor weight, OptionalTensor positions, double dropout_p, OptionalTensor rng) {
  const char* const op = "embedding";
  check_table(op, weight);
  check_ids(op, input, weight);
  check_no_dropout(op, dropout_p, rng);
  const int64_t seq_len = checked_seq_len(op, input, weight, positions);
  const Device device(weight);
  const int64_t columns = weight.size(1), size = static_cast<int64_t>(weight.element_size());
  Shape shape(input.sizes().begin(), input.sizes().end());
  shape.push_back(columns);
  const Tensor out = device.empty(shape, weight.scalar_type());
  const Tensor ids = as_contiguous(input), table = as_rows(weight);
  OptionalTensor added;
  if (positions.has_value()) added = as_rows(*positions);
  EmbeddingForward a{};
  a.ids = {data_of(ids), is_long(ids)};
  a.weight = data_of(table);
  a.positions = data_or_null(added);
  a.out = data_of(out);
  a.weight_row = table.stride(0);
  a.position_row = added ? added->stride(0) : 0;
  a.tokens = ids.numel();
  a.table = table.size(0);
  a.seq_len = seq_len;
  const bool aligned = rows_aligned(a.weight, a.weight_row, size) && rows_aligned(a.out, columns, size) &&
                       (!added || rows_aligned(a.positions, a.position_row, size));
  with_width(op, weight.scalar_type(), aligned && columns > 0, [&](auto number, auto width) {
    constexpr int N = decltype(width)::value;
    if (columns / N > std::numeric_limits<int>::max() / 2) fail(op, ": rows of ", columns, " columns are too wide");
    a.pieces = static_cast<int>(columns / N);
    if (out.numel() == 0) return;
    // A row gets so many threads that they cover at least 128 bytes of it, or all of it, and that each has about four
    // loads of a longer row.
    unsigned threads = 1;
    while (threads < kColumnThreads && (threads * kPiecesAtOnce < static_cast<unsigned>(a.pieces) ||
                                        (threads * N * size < 128 && threads < static_cast<unsigned>(a.pieces))))
      threads *= 2;
    const unsigned tokens = kColumnThreads / threads;
    device.launch(op, embedding_forward_kernel<decltype(number), N>,
                  {dim3(blocks_of(a.tokens, tokens)), dim3(threads, tokens)}, a);
  });
  return out;
}

// Returns the sorted ids and the tokens in their order. This uses the radix sort of aten, than which ours would be no
// faster.
std::pair<Tensor, Tensor> sorted(const Device& device, const Tensor& ids, int64_t table) {
  constexpr const char* op = "embedding_bwd";
  const Shape shape{ids.numel()};
  Tensor keys = torch::stable::view(ids, shape);
  if (is_long(ids) && table < std::numeric_limits<int32_t>::max()) {
    keys = device.empty(shape, ScalarType::Int);
    device.launch(op, embedding_short_ids_kernel, {dim3(blocks_of(ids.numel(), kColumnThreads)), dim3(kColumnThreads)},
                  static_cast<const int64_t*>(data_of(ids)), static_cast<int32_t*>(data_of(keys)), ids.numel(),
                  static_cast<int32_t>(table));
  }
  using torch::stable::detail::from;
  // sort.stable(Tensor self, *, bool? stable, int dim=-1, bool descending=False) -> (Tensor values, Tensor indices)
  std::array<StableIValue, 4> stack{from(keys), from(std::optional<bool>(true)), from(int64_t{-1}), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

template <class T, int N>
void weight_grad(const Device& device, EmbeddingBackward& a) {
  constexpr const char* op = "embedding_bwd";
  const unsigned blocks = blocks_of(a.tokens, kRunTokens);
  const int64_t threads = std::min<int64_t>(kColumnThreads, (a.columns / N + kWarp - 1) / kWarp * kWarp);
  device.launch(op, embedding_sum_runs_kernel<T, N>,
                {dim3(blocks, blocks_of(a.columns, threads * N)), dim3(static_cast<unsigned>(threads)),
                 (2 * kRunTokens + 2) * sizeof(int64_t)},
                a);
  device.launch(op, embedding_join_runs_kernel<T, N>,
                {dim3(blocks - 1, blocks_of(a.columns, kWarp * N)), dim3(kWarp, kSummingWarps),
                 sizeof(float) * N * kWarp * kSummingWarps},
                a);
}

std::tuple<Tensor, Tensor> embedding_bwd(Tensor grad, Tensor input, int64_t num_embeddings,
                                         std::optional<int64_t> padding_idx, bool weight_grad_wanted,
                                         bool positions_grad, double dropout_p, OptionalTensor rng) {
  const char* const op = "embedding_bwd";
  check_ids(op, input, grad);
  check_grad(op, grad, input, positions_grad);
  check_no_dropout(op, dropout_p, rng);
  const Device device(grad);
  const ScalarType dtype = grad.scalar_type();
  const int64_t columns = grad.size(grad.dim() - 1), tokens = input.numel();
  const int64_t seq_len = positions_grad ? input.size(input.dim() - 1) : 0;
  Tensor grad_weight = device.empty(weight_grad_wanted ? Shape{num_embeddings, columns} : Shape{0}, dtype);
  Tensor grad_positions = device.empty(positions_grad ? Shape{seq_len, columns} : Shape{0}, dtype);
  if (grad_weight.numel() > 0) torch::stable::zero_(grad_weight);
  if (grad.numel() == 0) {
    if (grad_positions.numel() > 0) torch::stable::zero_(grad_positions);
    return {grad_weight, grad_positions};
  }
  const Tensor dy = as_contiguous(grad);
  const bool aligned = rows_aligned(data_of(dy), columns, static_cast<int64_t>(dy.element_size()));
  with_width(op, dtype, aligned, [&](auto number, auto width) {
    using T = decltype(number);
    constexpr int N = decltype(width)::value;
    if (weight_grad_wanted) {
      const auto [ids, order] = sorted(device, as_contiguous(input), num_embeddings);
      const Shape shape{2, blocks_of(tokens, kRunTokens), columns};
      const Tensor sums = device.empty(shape, ScalarType::Float);
      EmbeddingBackward a{};
      a.grad = data_of(dy);
      a.ids = {data_of(ids), is_long(ids)};
      a.order = static_cast<const int64_t*>(data_of(order));
      a.grad_weight = data_of(grad_weight);
      a.heads = static_cast<float*>(data_of(sums));
      a.tails = a.heads + shape[1] * columns;
      a.tokens = tokens;
      a.table = num_embeddings;
      a.padding_idx = padding_idx.value_or(-1);
      a.columns = columns;
      weight_grad<T, N>(device, a);
    }
    if (positions_grad)
      device.launch(op, embedding_positions_kernel<T, N>,
                    {dim3(static_cast<unsigned>(seq_len), blocks_of(columns, kWarp * N)), dim3(kWarp, kSummingWarps),
                     sizeof(float) * N * kWarp * kSummingWarps},
                    static_cast<const T*>(data_of(dy)), static_cast<T*>(data_of(grad_positions)), tokens / seq_len,
                    seq_len, columns);
  });
  return {grad_weight, grad_positions};
}

}  // namespace

TINYLLM_CUDA_OPERATORS(m) {
  m.impl("embedding_fwd", TORCH_BOX(&embedding_fwd));
  m.impl("embedding_bwd", TORCH_BOX(&embedding_bwd));
}

}  // namespace tinyllm::cuda
