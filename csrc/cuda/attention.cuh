// The arguments of attention on NVIDIA GPUs, and the functions that its files provide to each other.
#pragma once
#include <cstdint>

#include "torch_side.cuh"

namespace tinyllm::cuda {

// A (B, H, rows, head_dim) tensor with contiguous columns, whose rows are aligned to 16 bytes.
struct Heads {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;  // strides, in elements
};

// Attention over 16-bit numbers with B batches, H heads of queries and H / group heads of keys and values, T queries
// and S keys.
struct Attention {
  Heads query, key, value, out;                      // with T, S, S and T rows
  Heads grad_out, grad_query, grad_key, grad_value;  // backward only
  float* lse = nullptr;                              // (B, H, T): log2 of the sum of exp2(score * scale * log2(e))
  float* delta = nullptr;                            // rowsum(grad_out * out); backward only
  const void* key_lengths = nullptr;                 // (B), int32 or int64, or null
  bool long_lengths = false;                         // whether key_lengths is int64
  int batch = 0, heads = 0, group = 1, queries = 0, keys = 0, head_dim = 0;
  float scale = 1.0f;   // factor of the scores, positive
  bool causal = false;  // query i sees keys 0 ... i
};

// The kernels for compute capability 8.0 and later. dtype is bfloat16 or float16; no tensor may be empty.
void attention_forward(const Device& device, const Attention& call, ScalarType dtype);
// Computes delta.
void attention_delta(const Device& device, const Attention& call, ScalarType dtype);
// Computes the gradients from delta.
void attention_backward(const Device& device, const Attention& call, ScalarType dtype);
// Whether a call has so few queries that its keys are split over multiprocessors, and the kernels for that.
bool attention_decodes(const Attention& call);
void attention_decode(const Device& device, const Attention& call, ScalarType dtype);

// The kernels for Hopper (wgmma and TMA). They return false if they do not support the call, which those of
// attention.cu must then serve.
bool attention_forward_sm90(const Device& device, const Attention& call, ScalarType dtype);
bool attention_backward_sm90(const Device& device, const Attention& call, ScalarType dtype);

}  // namespace tinyllm::cuda
