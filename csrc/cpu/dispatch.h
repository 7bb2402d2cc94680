// What the torch side knows of the CPU kernels: their arguments, one table of functions for each instruction set, and
// the choice among them.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "types.h"

#if defined(TINYLLM_SANITIZED)
#include <sanitizer/asan_interface.h>
#endif

namespace tinyllm::cpu {

// Rows of a contiguous (rows, size) matrix. Statistics and weights are in the compute type of the element type.
struct LayerNormFwd {
  const void* input;
  const void* residual;  // null: no addition
  const void* weight;    // null: ones
  const void* bias;      // null: zeros
  void* normed;
  void* sum;  // input + residual; null without residual
  void* mean;
  void* rstd;
  int64_t size;
  double eps;
  bool stream;  // write past the caches: the outputs are larger than them
};

struct LayerNormBwd {
  const void* grad_normed;
  const void* grad_sum;  // null: zeros
  const void* input;     // what was normalised: the sum, for add_layer_norm
  const void* weight;
  const void* mean;
  const void* rstd;
  void* grad_input;
  int64_t size;
  bool stream;
};

enum class MaskKind : int { none = 0, boolean = 1, additive = 2 };

// Element (b, h, t, d) of a tensor at data[b * batch + h * head + t * row + d * column].
struct Strided {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, column = 0;
};

// p: the probability that an element becomes 0; (seed, offset) select the bits (random_kernel.h).
struct Dropout {
  double p = 0;
  uint64_t seed = 0, offset = 0;
};

struct Attention {
  int64_t batch, heads, kv_heads;  // heads is a multiple of kv_heads
  int64_t queries, keys;
  int64_t head_dim, value_dim;
  double scale;
  bool causal;                 // query i sees keys 0..i
  const int64_t* key_lengths;  // sequence b has keys 0 ... key_lengths[b] - 1, at most `keys`; null: all
  Strided query, key, value, mask;
  MaskKind mask_kind;
  Dropout dropout;  // of the weights: element (b, h, t, s) of (batch, heads, queries, keys rounded up to 64)
  Strided out;
  // (batch, heads, queries), compute type: log2(sum(2^(scores * log2(e)))), for backward, which repeats the very
  // scores.
  void* lse;
  // What rounding took from lse, beside it; null without an additive mask. A mask's most negative number swallows the
  // logarithm of the sum, so that each of n keys that have it would count as 1 instead of 1 / n.
  void* lse_rest;
  // backward
  Strided grad_out, grad_query, grad_key, grad_value;
  Strided query_sums;  // where dQ is summed, compute type, whole vectors; may be grad_query
  void* delta;  // (batch, heads, queries), compute type: rowsum(dO * O), which the first range of keys leaves there
  // Backward and decoding work on a head's keys in `parts` ranges of `part` keys.
  int64_t part, parts;
  // Backward: (batch, kv_heads, parts), how many blocks of queries each range has finished. Null: there is one range.
  std::atomic<int64_t>* turns;
  // Decoding: the ranges' outputs, (batch, kv_heads, parts, heads / kv_heads, queries, share_row), compute type.
  void* shares;
  int64_t share_row;
};

constexpr int64_t kNoTurn = std::numeric_limits<int64_t>::max();  // a range that failed: none waits for it

// Keys that backward takes at once: fewer for wide heads, whose blocks of K and V fill the second-level cache. A
// multiple of every panel of gemm.h and of a block of queries.
inline int64_t bwd_key_block(const Attention& a) { return a.head_dim <= 64 && a.value_dim <= 64 ? 256 : 128; }

// Rows of contiguous (rows, classes) logits. A row's target is ignore_index or a class.
struct CrossEntropy {
  const void* input;
  const int64_t* target;
  const void* weight;  // (classes), compute type; null: ones
  double weight_sum;   // of all classes
  int64_t classes, ignore_index;
  double label_smoothing;
  void* loss;         // (rows), before any reduction; compute type
  void* max_and_sum;  // (rows, 2): the largest logit, and the sum of exp(logit - largest); compute type
  void* grad_input;   // null: not wanted
  const void* grad;   // row r's upstream gradient is scale * grad[r * grad_step], or scale where this is null
  int64_t grad_step;
  double scale;
  bool stream;
};

// Classes whose logits are worked on together.
constexpr int64_t kClassRange = 256;

// A block of rows of the cross-entropy of a linear projection. Logits are transposed: (classes, rows of the block).
struct LinearCrossEntropy {
  CrossEntropy row;           // the loss of a row; its input, statistics and grad_input are not used
  const void* input;          // (rows, features)
  const void* linear_weight;  // (classes, features)
  const void* bias;           // (classes), compute type; null: zeros
  int64_t features;
  int64_t first, count;  // the block
  void* packed;          // input's block in panels
  void* logits;          // null: only the loss is wanted
  int64_t logits_row;    // a multiple of every Vec's size, or the block is
  void* statistics;      // (ranges, 3, padded): for each row the range's largest logit, sum of exponentials, distances
  void* terms;           // (3, padded): for each row the target's logit, and what its gradient and all others lose
  int64_t padded;        // count, rounded up to a multiple of every Vec's size
  void* grad_input;      // (rows, features), compute type; null: not wanted
  void* grad_weight;     // (classes, features), compute type; may be where the logits are
  void* grad_bias;       // (classes), compute type
  bool accumulate;       // grad_weight and grad_bias hold earlier blocks' gradients
};

// Element (r, c) at data[r * row + c * column].
struct Matrix {
  const void* data;
  int64_t row, column;
};

enum class Activation : int { none = 0, relu = 1, gelu = 2, gelu_tanh = 3 };

// out = activation(A B + bias) + residual, or, with a gate, out = (A B + bias) * activation'(gate) + residual. Bias,
// gate, residual, pre_activation and out have A's element type; the last four are (rows, columns) with rows out_row
// apart, and residual may be out.
struct Product {
  int64_t rows, columns, depth;
  Matrix a;  // (rows, depth)
  Matrix b;  // (depth, columns)
  void* out;
  int64_t out_row;
  const void* bias = nullptr;  // (columns)
  Activation activation = Activation::none;
  const void* gate = nullptr;  // where the derivative is taken
  const void* residual = nullptr;
  void* pre_activation = nullptr;  // receives A B + bias
  void* packed = nullptr;          // B in panels, compute type; null: B is read where it is
};

struct ColumnSums {
  const void* data;
  int64_t rows, row;  // how many, and how far apart
  void* out;
};

// Rows of contiguous matrices with `size` columns.
struct Embedding {
  const void* weight;
  const int64_t* ids;     // (tokens), each a row of weight
  const void* positions;  // (seq_len rows), token t gets row t % seq_len; null: zeros
  void* out;              // (tokens rows)
  int64_t size, seq_len;
  Dropout dropout = {};  // of the sums: element (token, column) of (tokens, size rounded up to 64)
};

// Sums of rows: out[targets[s]] = rows[order[starts[s]]] + ... + rows[order[starts[s + 1] - 1]], in this order.
struct SumRows {
  const void* rows;
  const int64_t* order;
  const int64_t* starts;
  const int64_t* targets;
  void* out;
  int64_t size;
  Dropout dropout = {};  // of the rows that are summed, as in Embedding
};

struct Kernels {
  const char* name;
  // Rows [begin, end).
  void (*layer_norm_fwd[kNumDTypes])(const LayerNormFwd&, int64_t begin, int64_t end);
  // Adds the rows' share of the weight's and the bias' gradients to `grads` (2 x size, compute type) unless null.
  void (*layer_norm_bwd[kNumDTypes])(const LayerNormBwd&, int64_t begin, int64_t end, void* grads);
  // The same without mean and bias, which are not looked at; `grads` is 1 x size.
  void (*rms_norm_fwd[kNumDTypes])(const LayerNormFwd&, int64_t begin, int64_t end);
  void (*rms_norm_bwd[kNumDTypes])(const LayerNormBwd&, int64_t begin, int64_t end, void* grads);
  // Tokens [begin, end).
  void (*embedding_fwd[kNumDTypes])(const Embedding&, int64_t begin, int64_t end);
  // Sums [begin, end), in the compute type until they are written.
  void (*sum_rows[kNumDTypes])(const SumRows&, int64_t begin, int64_t end);
  void (*stream_zeros)(char* data, int64_t bytes);
  // What dropout multiplies the elements [first, first + n) by; whole blocks of 64.
  void (*dropout_factors)(const Dropout&, int64_t first, int64_t n, float* factors);
  // Queries [begin, end) of one head.
  void (*attention_fwd[kNumDTypes])(const Attention&, int64_t b, int64_t h, int64_t begin, int64_t end);
  // Few queries, many keys: all queries of all heads of a key/value head against one range of its keys; then the ranges
  // put together.
  void (*attention_decode[kNumDTypes])(const Attention&, int64_t b, int64_t kv_head, int64_t part);
  void (*attention_decode_sum[kNumDTypes])(const Attention&, int64_t b, int64_t kv_head);
  // One range of keys of a key/value head with all its query heads. Ranges may run at once if those before are begun.
  void (*attention_bwd[kNumDTypes])(const Attention&, int64_t b, int64_t kv_head, int64_t part);
  // Rows [begin, end): loss, statistics, and grad_input where wanted; grad_input from the statistics.
  void (*cross_entropy_fwd[kNumDTypes])(const CrossEntropy&, int64_t begin, int64_t end);
  void (*cross_entropy_bwd[kNumDTypes])(const CrossEntropy&, int64_t begin, int64_t end);
  // The steps of a block, each finished before the next begins; the parts of one may run at once. `range`: its classes
  // begin at range * kClassRange.
  void (*linear_cross_entropy_pack[kNumDTypes])(const LinearCrossEntropy&, bool transposed);
  void (*linear_cross_entropy_logits[kNumDTypes])(const LinearCrossEntropy&, int64_t range);
  void (*linear_cross_entropy_loss[kNumDTypes])(const LinearCrossEntropy&);
  void (*linear_cross_entropy_gradient[kNumDTypes])(const LinearCrossEntropy&, int64_t range);
  void (*linear_cross_entropy_grad_input[kNumDTypes])(const LinearCrossEntropy&, int64_t begin, int64_t end);
  void (*linear_cross_entropy_grad_weight[kNumDTypes])(const LinearCrossEntropy&, int64_t range);
  // Columns [begin, end) of B, begin a multiple of `panel`; then a part of the product, its columns begin likewise.
  void (*pack_product[kNumDTypes])(const Product&, int64_t begin, int64_t end);
  void (*product_part[kNumDTypes])(const Product&, int64_t row_begin, int64_t row_end, int64_t column_begin,
                                   int64_t column_end);
  // Columns [begin, end) of a product of few rows, without packing. A and B must be contiguous along the depth.
  void (*product_dots[kNumDTypes])(const Product&, int64_t begin, int64_t end);
  void (*column_sums[kNumDTypes])(const ColumnSums&, int64_t begin, int64_t end);
  // out[i] = activation(x[i]) for i in [begin, end), or grad[i] * activation'(x[i]) with a gradient.
  void (*activate[kNumDTypes])(Activation, const void* x, const void* grad, void* out, int64_t begin, int64_t end);
  int64_t vector[kNumDTypes];  // elements of a vector of the compute type
  int64_t panel[kNumDTypes];   // columns of a panel
  int64_t rows;                // of a tile
};

// The table in use: the best set that was built and that the processor has, or the one TINYLLM_CPU_ISA names. Throws
// std::runtime_error when that is none of them.
const Kernels& kernels();

std::vector<std::string> built_isas();
std::vector<std::string> usable_isas();

// Who made the processor, and by which instructions it multiplies 16-bit numbers that our kernels widen first: "amd",
// "intel" or "other", then "-bf16" or "-amx" where it has them.
std::string cpu_family();

// Bytes of the last-level cache that a process can count on; at most 32 MiB, and that where the system does not say.
int64_t last_level_cache();

// `bytes` of 64-byte aligned memory of the calling thread, for as long as the lease lives; leases nest. Small blocks
// are kept for the next lease, because asking the system for fresh pages costs more than a small attention; larger ones
// die with theirs.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return data_; }

 private:
  char* data_;
  bool owned_;
};

// Hands out arrays of a block; with no block it only adds up their sizes.
class Arena {
 public:
  explicit Arena(char* base = nullptr) : base_(base) {}
  template <class S>
  S* take(int64_t count) {
    char* at = base_ == nullptr ? nullptr : base_ + used_;
    const size_t bytes = static_cast<size_t>(count) * sizeof(S);
    used_ += (bytes + 63) / 64 * 64;
#if defined(TINYLLM_SANITIZED)
    // The next array is out of this one's reach.
    used_ += 64;
    if (base_ != nullptr) ASAN_POISON_MEMORY_REGION(at + bytes, static_cast<size_t>(base_ + used_ - at) - bytes);
#endif
    return reinterpret_cast<S*>(at);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

extern const Kernels scalar_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace tinyllm::cpu
