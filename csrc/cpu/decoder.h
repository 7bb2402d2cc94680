// A language model that generates: its weights, and the keys and values of the tokens that it has read.
#pragma once
#include <string>
#include <vector>

#include "transformer_block.h"
#include "weights.h"

namespace tinyllm::cpu {

// A parameter: a matrix in any kind, or a vector of floats.
struct Operand {
  Weight matrix;
  const float* vector = nullptr;
};

struct Decoder {
  BlockSizes sizes;  // batch, width, heads and what all blocks share; tokens, rows and hidden are not used
  int64_t vocab_size, classes, most_positions;
  std::vector<BlockSizes> blocks;
  std::vector<BlockParameters<Operand>> parameters;
  Operand table, norm, norm_bias, output, output_bias;
  const float* positions;

  // The cache of a layer's keys or values: element (b, h, t, d), and its number of rows t.
  char* cache;
  int64_t cache_length, cache_layer, cache_value;  // the last two are bytes from one to the next, from keys to values
  Strided cache_strides;                           // without data
  bool cache_bf16;

  std::vector<int64_t> lengths;  // the tokens that each sequence has read

  int64_t head_dim() const { return sizes.width / sizes.heads; }
  // The keys (0) or values (1) of a layer.
  Strided cache_of(int64_t layer, int value) const {
    Strided s = cache_strides;
    s.data = cache + layer * cache_layer + value * cache_value;
    return s;
  }
};

// Checks the arguments that decoder_read and decoder_write share; `tokens` more are to be read by each sequence.
Decoder read_decoder(const char* op, const std::vector<Tensor>& weights, const Tensor& positions, const Tensor& cache,
                     const Tensor& lengths, int64_t num_layers, int64_t num_heads, bool norm_first,
                     const std::string& activation, double eps, int64_t batch, int64_t tokens);

// Writes the embedding of a token at a position.
void embed(const Decoder& d, int64_t id, int64_t position, float* to);

// Raises an error unless all ids are in the vocabulary.
void check_ids(const char* op, const Decoder& d, const int64_t* ids, int64_t count);

}  // namespace tinyllm::cpu
