// Embedding over raw memory, distributed over threads, for embedding.cpp and for operators that contain an embedding.
#pragma once
#include <optional>

#include "torch_side.h"

namespace tinyllm::cpu {

// Returns the ids as contiguous int64, and checks that each is in [0, rows).
Tensor checked_ids(const char* op, const Tensor& input, const Tensor& like, int64_t rows);

void embedding_forward(DType dtype, const Embedding& args, int64_t tokens);

// Writes (rows, size): each row is the sum, in the order of the tokens, of the gradients of the tokens that read it.
// `dropout` is that of forward; the gradients of dropped elements are left out.
void embedding_weight_grad(DType dtype, const void* grad, const int64_t* ids, int64_t tokens,
                           std::optional<int64_t> padding_idx, void* out, int64_t rows, int64_t size,
                           const Dropout& dropout = {});

// Writes (seq_len, size): the sums over the batch, in its order.
void embedding_positions_grad(DType dtype, const void* grad, int64_t batch, void* out, int64_t seq_len, int64_t size,
                              const Dropout& dropout = {});

}  // namespace tinyllm::cpu
