// What a call of attention is made of, and what its files offer each other.
#pragma once
#include <cstdint>

#include "torch_side.cuh"

namespace tinyllm::cuda {

// (B, H, rows, head_dim) with neighbouring columns next to each other, rows at multiples of 16 bytes.
struct Heads {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;  // strides, in elements
};

// B batches, H heads of queries, H / group of keys and values; T queries, S keys; 16-bit numbers.
struct Attention {
  Heads query, key, value, out;                      // of T, S, S, T rows
  Heads grad_out, grad_query, grad_key, grad_value;  // backward only
  float* lse = nullptr;                              // (B, H, T): log2 of the sum of exp2(score * scale * log2(e))
  float* delta = nullptr;                            // (B, H, T): sums of grad_out * out over columns; backward only
  const void* key_lengths = nullptr;                 // (B), int32 or int64, or null
  bool long_lengths = false;                         // int64
  int batch = 0, heads = 0, group = 1, queries = 0, keys = 0, head_dim = 0;
  float scale = 1.0f;   // of the scores, positive
  bool causal = false;  // query i sees keys 0 ... i
};

// The kernels for compute capability 8.0 and later. dtype: bfloat16 or float16. Of what is empty: nothing to call.
void attention_forward(const Device& device, const Attention& call, ScalarType dtype);
// Writes delta.
void attention_delta(const Device& device, const Attention& call, ScalarType dtype);
// Reads delta.
void attention_backward(const Device& device, const Attention& call, ScalarType dtype);
// Few queries, of any group: keys split over multiprocessors.
bool attention_decodes(const Attention& call);
void attention_decode(const Device& device, const Attention& call, ScalarType dtype);

// Hopper's own kernels (wgmma and TMA). False where they do not take the call and attention.cu's must.
bool attention_forward_sm90(const Device& device, const Attention& call, ScalarType dtype);
bool attention_backward_sm90(const Device& device, const Attention& call, ScalarType dtype);

}  // namespace tinyllm::cuda
