// embedding on the CPU: checks, allocation, sorting of the tokens by id for backward, and distribution over threads.
// The arithmetic is in embedding_kernel.h.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "../embedding_checks.h"
#include "cpu_info.h"
#include "embedding.h"
#include "random.h"

namespace tinyllm::cpu {
namespace {

using torch::stable::parallel_for;
using Index = std::vector<int64_t>;

// The number of rows for which waking a thread pays: about 32 KB.
int64_t grain(int64_t size) { return std::max<int64_t>(1, 8192 / std::max<int64_t>(1, size)); }

// Returns the tokens in the order of their ids, and tokens of the same id in their own order, by a radix sort.
Index sorted_by_id(const int64_t* ids, int64_t tokens, int64_t rows) {
  constexpr int kBits = 11;
  Index order(tokens), other(tokens);
  std::iota(order.begin(), order.end(), 0);
  for (int shift = 0; (rows - 1) >> shift > 0; shift += kBits) {
    int64_t starts[(1 << kBits) + 1] = {};
    const auto digit = [&](int64_t token) { return (ids[token] >> shift) & ((1 << kBits) - 1); };
    for (int64_t i = 0; i < tokens; ++i) ++starts[digit(i) + 1];
    for (int i = 0; i < 1 << kBits; ++i) starts[i + 1] += starts[i];
    for (const int64_t token : order) other[starts[digit(token)]++] = token;
    order.swap(other);
  }
  return order;
}

}  // namespace

Tensor checked_ids(const char* op, const Tensor& input, const Tensor& like, int64_t rows) {
  check_ids(op, input, like);
  const bool is_long = input.scalar_type() == ScalarType::Long;
  const Tensor ids = as_contiguous(is_long ? input : torch::stable::to(input, ScalarType::Long));
  const int64_t* const id = static_cast<const int64_t*>(data_of(ids));
  for (int64_t i = 0; i < ids.numel(); ++i)
    if (id[i] < 0 || id[i] >= rows) fail(op, ": input has the id ", id[i], "; ids must be in 0 .. ", rows - 1);
  return ids;
}

void embedding_forward(DType dtype, const Embedding& args, int64_t tokens) {
  const auto kernel = kernels().embedding_fwd[dtype];
  parallel_for(0, tokens, grain(args.size), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// The gradient of a row is the sum, in the order of the tokens, of the gradients of those that read it; rows that no
// token read are zero. A row belongs to one thread, so the result does not depend on the number of threads.
void embedding_weight_grad(DType dtype, const void* grad, const int64_t* id, int64_t tokens,
                           std::optional<int64_t> padding_idx, void* out, int64_t rows, int64_t size,
                           const Dropout& dropout) {
  const Index order = sorted_by_id(id, tokens, rows);
  Index starts, targets;  // one for each row that was read
  for (int64_t i = 0; i < tokens; ++i)
    if (i == 0 || id[order[i]] != id[order[i - 1]]) {
      starts.push_back(i);
      targets.push_back(id[order[i]]);
    }
  starts.push_back(tokens);
  const SumRows args{grad, order.data(), starts.data(), targets.data(), out, size, dropout};
  const auto kernel = kernels().sum_rows[dtype];
  const int64_t row_bytes = size * element_size(dtype);
  const bool stream = rows * row_bytes > last_level_cache() / 2;  // the gradient does not fit the caches
  char* const base = static_cast<char*>(out);
  const int64_t chunk = std::max<int64_t>(grain(size), (rows + 63) / 64);
  parallel_items((rows + chunk - 1) / chunk, [&](int64_t c) {
    const int64_t begin = c * chunk, end = std::min(rows, begin + chunk);
    int64_t zeros = begin;  // the first row that is not written yet
    const auto zero_until = [&](int64_t row) {
      char* const from = base + zeros * row_bytes;
      stream ? kernels().stream_zeros(from, (row - zeros) * row_bytes)
             : static_cast<void>(std::memset(from, 0, static_cast<size_t>((row - zeros) * row_bytes)));
    };
    for (auto s = std::lower_bound(targets.begin(), targets.end(), begin) - targets.begin();
         s < static_cast<int64_t>(targets.size()) && targets[s] < end; ++s) {
      if (targets[s] == padding_idx) continue;
      zero_until(targets[s]);
      kernel(args, s, s + 1);
      zeros = targets[s] + 1;
    }
    zero_until(end);
  });
}

void embedding_positions_grad(DType dtype, const void* grad, int64_t batch, void* out, int64_t seq_len, int64_t size,
                              const Dropout& dropout) {
  const int64_t tokens = batch * seq_len;
  Index order(tokens), starts(seq_len + 1), targets(seq_len);
  for (int64_t t = 0; t < seq_len; ++t) {
    for (int64_t b = 0; b < batch; ++b) order[t * batch + b] = b * seq_len + t;
    starts[t] = t * batch;
    targets[t] = t;
  }
  starts[seq_len] = tokens;
  const SumRows args{grad, order.data(), starts.data(), targets.data(), out, size, dropout};
  const auto kernel = kernels().sum_rows[dtype];
  parallel_for(0, seq_len, grain(size * std::max<int64_t>(1, batch)),
               [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

namespace {

Tensor embedding_fwd(Tensor input, Tensor weight, OptionalTensor positions, double dropout_p, OptionalTensor rng) {
  const char* const op = "embedding";
  check_table(op, weight);
  const DType dtype = dtype_of(op, weight);
  const int64_t size = weight.size(1);
  const Tensor ids = checked_ids(op, input, weight, weight.size(0)), table = as_contiguous(weight);
  const int64_t seq_len = checked_seq_len(op, input, weight, positions);
  OptionalTensor added;
  if (positions.has_value()) added = as_contiguous(*positions);
  Index shape(input.sizes().begin(), input.sizes().end());
  shape.push_back(size);
  const Tensor out = empty(shape, weight.scalar_type());
  const Embedding args{
      data_of(table), static_cast<const int64_t*>(data_of(ids)), added ? data_of(*added) : nullptr, data_of(out), size,
      seq_len,        dropout_state(op, rng, dropout_p)};
  embedding_forward(dtype, args, ids.numel());
  return out;
}

std::tuple<Tensor, Tensor> embedding_bwd(Tensor grad, Tensor input, int64_t num_embeddings,
                                         std::optional<int64_t> padding_idx, bool weight_grad, bool positions_grad,
                                         double dropout_p, OptionalTensor rng) {
  const char* const op = "embedding_bwd";
  const DType dtype = dtype_of(op, grad);
  const Tensor ids = checked_ids(op, input, grad, num_embeddings), dy = as_contiguous(grad);
  check_grad(op, grad, input, positions_grad);
  const int64_t size = grad.size(grad.dim() - 1), tokens = ids.numel();
  const Dropout dropout = dropout_state(op, rng, dropout_p);
  const Tensor grad_weight = empty(weight_grad ? Index{num_embeddings, size} : Index{0}, grad.scalar_type());
  if (weight_grad)
    embedding_weight_grad(dtype, data_of(dy), static_cast<const int64_t*>(data_of(ids)), tokens, padding_idx,
                          data_of(grad_weight), num_embeddings, size, dropout);
  const int64_t seq_len = input.dim() > 0 ? input.size(input.dim() - 1) : 1;
  const Tensor grad_positions = empty(positions_grad ? Index{seq_len, size} : Index{0}, grad.scalar_type());
  if (positions_grad)
    embedding_positions_grad(dtype, data_of(dy), seq_len == 0 ? 0 : tokens / seq_len, data_of(grad_positions), seq_len,
                             size, dropout);
  return {grad_weight, grad_positions};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tinyllm, CPU, m) {
  m.impl("embedding_fwd", TORCH_BOX(&embedding_fwd));
  m.impl("embedding_bwd", TORCH_BOX(&embedding_bwd));
}

}  // namespace tinyllm::cpu
