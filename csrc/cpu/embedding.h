// Embedding over raw memory, split over threads: for embedding.cpp, and for operators that contain an embedding.
#pragma once
#include <optional>

#include "torch_side.h"

namespace tinyllm::cpu {

// The ids as contiguous int64, each in [0, rows).
Tensor checked_ids(const char* op, const Tensor& input, const Tensor& like, int64_t rows);

void embedding_forward(int dtype, const Embedding& args, int64_t tokens);

// Writes (rows, size): each row the sum, in the order of the tokens, of the gradients of those that read it. dropout:
// what forward was given; the gradients of what it dropped are left out.
void embedding_weight_grad(int dtype, const void* grad, const int64_t* ids, int64_t tokens,
                           std::optional<int64_t> padding_idx, void* out, int64_t rows, int64_t size,
                           const Dropout& dropout = {});

// Writes (seq_len, size): the sums over the batch, in its order.
void embedding_positions_grad(int dtype, const void* grad, int64_t batch, void* out, int64_t seq_len, int64_t size,
                              const Dropout& dropout = {});

}  // namespace tinyllm::cpu
