// The arguments of the CPU kernels: raw pointers, sizes and strides. A kernel for float64 computes in float64, all
// others in float32; that type is called the compute type below.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>

namespace tinyllm::cpu {

struct Weight;  // weight_args.h

// Rows of contiguous (rows, size) matrices. Statistics and weights are in the compute type.
struct LayerNormFwd {
  const void* input;
  const void* residual;  // null: nothing is added
  const void* weight;    // null: ones
  const void* bias;      // null: zeros
  void* normed;
  void* sum;  // input + residual; null without a residual
  void* mean;
  void* rstd;
  int64_t size;
  double eps;
  bool stream;  // write past the caches, which the outputs do not fit
};

struct LayerNormBwd {
  const void* grad_normed;
  const void* grad_sum;  // null: zeros
  const void* input;     // what was normalised, which is the sum for add_layer_norm
  const void* weight;
  const void* mean;
  const void* rstd;
  void* grad_input;
  int64_t size;
  bool stream;
};

enum class MaskKind : int { none = 0, boolean = 1, additive = 2 };

// A tensor whose element (b, h, t, d) is data[b * batch + h * head + t * row + d * column].
struct Strided {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, column = 0;
};

struct Dropout {
  double p = 0;                   // the probability that an element becomes 0
  uint64_t seed = 0, offset = 0;  // select the random bits (random_kernel.h)
};

// out = input * factors + residual, for rows of contiguous (rows, size) matrices; out may be one of the others.
struct DroppedSum {
  const void *input, *residual;  // residual may be null
  void* out;
  int64_t size;
  Dropout dropout;  // as element (row, column) of (rows, size rounded up to 64)
};

struct Attention {
  int64_t batch, heads, kv_heads;  // heads is a multiple of kv_heads
  int64_t queries, keys;
  int64_t head_dim, value_dim;
  double scale;
  bool causal;                   // query i of sequence b sees keys 0 ... causal_offset[b] + i
  const int64_t* causal_offset;  // null: 0
  const int64_t* key_lengths;    // sequence b has the keys 0 ... key_lengths[b] - 1; null: all keys
  Strided query, key, value, mask;
  MaskKind mask_kind;
  // Applies to the softmax weights, as element (b, h, t, s) of (batch, heads, queries, keys rounded up to 64).
  Dropout dropout;
  Strided out;
  // (batch, heads, queries), compute type: log2(sum(2^(scores * log2(e)))). Backward computes the scores again.
  void* lse;
  // The rounding error of lse; null without an additive mask. The most negative number in a mask absorbs the logarithm
  // of the sum, so that each of n keys that have it would count as 1 instead of 1 / n.
  void* lse_rest;

  // Forward: what attention_pack makes of up to `packed_keys` keys and values of each head, `packed_head` bytes, for
  // the parts of a head's queries to share. Null: each call packs those of its head.
  char* packed;
  int64_t packed_keys, packed_head;

  // Backward only.
  Strided grad_out, grad_query, grad_key, grad_value;
  Strided query_sums;  // accumulates dQ in the compute type, in rows of whole vectors; may be grad_query
  void* delta;         // (batch, heads, queries), compute type: rowsum(dO * O), written by the first range of keys

  // Backward and decoding split the keys of a head into `ranges` ranges of `range_keys` keys.
  int64_t range_keys, ranges;
  // Backward: (batch, kv_heads, ranges), the number of blocks of queries that each range has finished. Null if there is
  // only one range.
  std::atomic<int64_t>* turns;
  // Decoding: the partial outputs of the ranges, (batch, kv_heads, ranges, heads / kv_heads, queries, partial_row),
  // compute type.
  void* partials;
  int64_t partial_row;
};

// The number of keys of sequence b.
inline int64_t keys_of(const Attention& a, int64_t b) {
  return a.key_lengths == nullptr ? a.keys : std::clamp<int64_t>(a.key_lengths[b], 0, a.keys);
}

// The number of keys before the one that the causal mask lets the first query of sequence b see last.
inline int64_t offset_of(const Attention& a, int64_t b) { return a.causal_offset == nullptr ? 0 : a.causal_offset[b]; }

// The number of keys of [first, first + count) that the causal mask lets query `row` of sequence b see.
inline int64_t visible(const Attention& a, int64_t b, int64_t row, int64_t first, int64_t count) {
  return a.causal ? std::clamp<int64_t>(offset_of(a, b) + row + 1 - first, 0, count) : count;
}

// The first query of sequence b that the causal mask lets see a key.
inline int64_t first_query(const Attention& a, int64_t b, int64_t key) {
  return a.causal ? std::max<int64_t>(0, key - offset_of(a, b)) : 0;
}

// The keys that a thread packs at a time: whole panels of every instruction set.
constexpr int64_t kPackedKeys = 64;

constexpr int64_t kNoTurn = std::numeric_limits<int64_t>::max();  // marks a range that failed, for which none waits

// The number of keys in a block of backward. Wide heads have smaller blocks, whose K and V still fit the second-level
// cache.
inline int64_t bwd_key_block(const Attention& a) { return a.head_dim <= 64 && a.value_dim <= 64 ? 256 : 128; }

// Rows of contiguous (rows, classes) logits. The target of a row is ignore_index or a class.
struct CrossEntropy {
  const void* input;
  const int64_t* target;
  const void* weight;  // (classes), compute type; null: ones
  double weight_sum;   // over all classes
  int64_t classes, ignore_index;
  double label_smoothing;
  void* loss;         // (rows), before any reduction; compute type
  void* max_and_sum;  // (rows, 2), compute type: the largest logit, and the sum of exp(logit - largest)
  void* grad_input;   // null: not wanted
  const void* grad;   // the upstream gradient of row r is scale * grad[r * grad_step], or scale if this is null
  int64_t grad_step;
  double scale;
  bool stream;
};

// The number of classes whose logits are processed together.
constexpr int64_t kClassRange = 256;

// A block of rows of the cross-entropy of a linear projection. Logits are transposed: (classes, rows of the block).
struct LinearCrossEntropy {
  CrossEntropy row;           // the loss of a row; its input, statistics and grad_input are not used
  const void* input;          // (rows, features)
  const void* linear_weight;  // (classes, features)
  const void* bias;           // (classes), compute type; null: zeros
  int64_t features;
  int64_t first, count;  // the rows of this block
  void* packed;          // the rows of input as a packed B
  void* logits;          // null: only the loss is wanted
  int64_t logits_row;    // at least count rounded up to whole vectors
  void* statistics;      // (ranges, 3, padded): for each row, the largest logit of the range, the sum of its
                         // exponentials, and the weighted sum of its distances from the largest
  void* terms;           // (3, padded): for each row, the logit of the target, and the gradient offsets of the target
                         // and of every class
  int64_t padded;        // count rounded up to whole vectors
  void* grad_input;      // (rows, features), compute type; null: not wanted
  void* grad_weight;     // (classes, features), compute type; may share memory with the logits
  void* grad_bias;       // (classes), compute type
  bool accumulate;       // add to grad_weight and grad_bias, which hold the gradients of earlier blocks
};

// A matrix whose element (r, c) is data[r * row + c * column].
struct Matrix {
  const void* data;
  int64_t row, column;
};

enum class Activation : int { none = 0, relu = 1, gelu = 2, gelu_tanh = 3, silu = 4 };

// A matmul with its epilogue: out = activation(A B + bias) + residual or, with a gate,
// out = (A B + bias) * gate + residual. Bias, gate, residual, slope and out have the element type of A; the last four
// are (rows, columns) matrices whose rows are out_row apart. residual and out may be the same.
struct Matmul {
  int64_t rows, columns, depth;
  Matrix a;  // (rows, depth)
  Matrix b;  // (depth, columns)
  void* out;
  int64_t out_row;
  const void* bias = nullptr;  // (columns)
  Activation activation = Activation::none;
  const void* gate = nullptr;  // a slope; or of relu any matrix that is positive where its slope is 1
  const void* residual = nullptr;
  void* slope = nullptr;   // receives activation'(A B + bias)
  void* packed = nullptr;  // B in packed panels, compute type; null: B is read in place
  // Instead of b, which is ignored: column n and row k of B are row weight_column + n and column weight_depth + k of a
  // weight that is stored in fewer bits. A is float.
  const Weight* weight = nullptr;
  int64_t weight_column = 0, weight_depth = 0;
};

struct ColumnSums {
  const void* data;
  int64_t rows, row;  // the number of rows, and the distance between them
  void* out;
};

// Rows of contiguous matrices with `size` columns.
struct Embedding {
  const void* weight;
  const int64_t* ids;     // (tokens), each the index of a row of weight
  const void* positions;  // (seq_len rows), added to token t from row t % seq_len; null: zeros
  void* out;              // (tokens rows)
  int64_t size, seq_len;
  Dropout dropout = {};  // applies to the sums, as element (token, column) of (tokens, size rounded up to 64)
};

// Segment sums of rows: out[targets[s]] = rows[order[starts[s]]] + ... + rows[order[starts[s + 1] - 1]], in this order.
struct SumRows {
  const void* rows;
  const int64_t* order;
  const int64_t* starts;
  const int64_t* targets;
  void* out;
  int64_t size;
  Dropout dropout = {};  // applies to the rows that are summed, as in Embedding
};

// One contiguous tensor of an AdamW step.
struct AdamW {
  void* parameter;
  const void* grad;
  void *exp_avg, *exp_avg_sq;
  double clip_coef;  // multiplies the gradient
  double beta1, beta2, eps;
  double keep;               // 1 - lr * weight_decay
  double step_size;          // lr / (1 - beta1^step)
  double denominator_scale;  // 1 / sqrt(1 - beta2^step)
};

// activation(gate) * up of contiguous tensors, and the gradients of both.
struct GatedActivation {
  Activation activation;
  const void *gate, *up;
  void* out;         // forward
  const void* grad;  // backward
  void *grad_gate, *grad_up;
};

// The first `rotated` columns of each head, an even number, are rotated: column i and i + rotated / 2 by an angle whose
// cosines and sines have rows of `rotated` columns, compute type, angle_row and angle_batch apart. Columns follow one
// another. The inverse is the transposed matrix.
struct Rotary {
  Strided input, out;
  int64_t heads, tokens, head_dim, rotated;
  const void *cos, *sin;
  int64_t angle_batch, angle_row;
  bool inverse;
};

}  // namespace tinyllm::cpu
