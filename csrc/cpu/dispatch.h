// The table of CPU kernels of each instruction set, and the choice among these tables.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "blocking.h"
#include "kernel_args.h"
#include "types.h"
#include "weight_args.h"

namespace tinyllm::cpu {

// One value for each dtype.
template <class V>
struct PerDType {
  V values[kNumDTypes];
  constexpr V operator[](DType dtype) const { return values[static_cast<int>(dtype)]; }
};

template <class... Arguments>
using Kernel = PerDType<void (*)(Arguments...)>;

struct Kernels {
  const char* name;

  // Process rows [begin, end).
  Kernel<const LayerNormFwd&, int64_t, int64_t> layer_norm_fwd;
  // Process rows [begin, end) and add their part of the gradients of weight and bias to `grads` (2 x size, compute
  // type) unless it is null.
  Kernel<const LayerNormBwd&, int64_t, int64_t, void*> layer_norm_bwd;
  // The same without mean and bias, whose pointers are ignored; `grads` is 1 x size.
  Kernel<const LayerNormFwd&, int64_t, int64_t> rms_norm_fwd;
  Kernel<const LayerNormBwd&, int64_t, int64_t, void*> rms_norm_bwd;

  // Process tokens [begin, end).
  Kernel<const Embedding&, int64_t, int64_t> embedding_fwd;
  // Compute segment sums [begin, end), accumulated in the compute type.
  Kernel<const SumRows&, int64_t, int64_t> sum_rows;
  void (*stream_zeros)(char* data, int64_t bytes);
  // Process rows [begin, end).
  Kernel<const DroppedSum&, int64_t, int64_t> dropped_sum;
  // Write the factors of the elements [first, first + n), in whole blocks of 64.
  void (*dropout_factors)(const Dropout&, int64_t first, int64_t n, float* factors);

  // Pack keys [begin, end) of key/value head (b, kv_head), and their values; begin is a multiple of kPackedKeys.
  Kernel<const Attention&, int64_t, int64_t, int64_t, int64_t> attention_pack;
  // Return the bytes of a packed head.
  PerDType<int64_t (*)(const Attention&)> attention_packed_head;
  // Process queries [begin, end) of head (b, h).
  Kernel<const Attention&, int64_t, int64_t, int64_t, int64_t> attention_fwd;
  // For few queries and many keys: process all queries of all heads that share key/value head (b, kv_head), against one
  // range of its keys; then combine the partial results of its ranges.
  Kernel<const Attention&, int64_t, int64_t, int64_t> attention_decode;
  Kernel<const Attention&, int64_t, int64_t> attention_decode_combine;
  // Process one range of keys of a key/value head with all its query heads. Several ranges may run at once, provided
  // that all earlier ones of the head have begun.
  Kernel<const Attention&, int64_t, int64_t, int64_t> attention_bwd;

  // Process rows [begin, end): forward writes loss and statistics, and grad_input where wanted; backward writes
  // grad_input from the statistics.
  Kernel<const CrossEntropy&, int64_t, int64_t> cross_entropy_fwd;
  Kernel<const CrossEntropy&, int64_t, int64_t> cross_entropy_bwd;
  // The steps for a block of rows. Each must have finished before the next begins; the calls of one step may run at
  // once. A range of classes begins at class range * kClassRange.
  Kernel<const LinearCrossEntropy&, int64_t> linear_cross_entropy_logits;
  Kernel<const LinearCrossEntropy&, int64_t, int64_t> linear_cross_entropy_loss;
  Kernel<const LinearCrossEntropy&, int64_t> linear_cross_entropy_gradient;
  Kernel<const LinearCrossEntropy&, int64_t, int64_t, int64_t, int64_t> linear_cross_entropy_grad_input;
  Kernel<const LinearCrossEntropy&, int64_t> linear_cross_entropy_grad_weight;

  // Pack rows [row_begin, row_end) of columns [column_begin, column_end) of B; column_begin is a multiple of nr.
  Kernel<const Matmul&, int64_t, int64_t, int64_t, int64_t> matmul_pack_b;
  // Compute rows [row_begin, row_end) of columns [column_begin, column_end); column_begin is a multiple of nr.
  Kernel<const Matmul&, int64_t, int64_t, int64_t, int64_t> matmul_block;
  // Compute columns [begin, end) of a matmul with few rows, without packing. A and B must be contiguous along the
  // depth.
  Kernel<const Matmul&, int64_t, int64_t> gemv;
  // The same of a row-major B.
  Kernel<const Matmul&, int64_t, int64_t> gemv_by_rows;
  Kernel<const ColumnSums&, int64_t, int64_t> column_sums;
  // Process the elements [begin, end).
  Kernel<const GatedActivation&, int64_t, int64_t> gated_activation_fwd;
  Kernel<const GatedActivation&, int64_t, int64_t> gated_activation_bwd;
  // Process tokens [begin, end) of all sequences.
  Kernel<const Rotary&, int64_t, int64_t> rotary;
  // Write the gradient in front of an activation, from its gate and the gradient behind it, for elements [begin, end).
  Kernel<Activation, const void*, const void*, void*, int64_t, int64_t> gate;

  // Return the sum of the squares of the elements [begin, end).
  PerDType<double (*)(const void*, int64_t, int64_t)> sum_of_squares;
  // Process the elements [begin, end).
  Kernel<const AdamW&, int64_t, int64_t> adamw_step;

  // attention_decode for float queries and outputs, and keys and values of bfloat16.
  void (*attention_decode_bf16)(const Attention&, int64_t, int64_t, int64_t);
  // Fill the forms of rows [begin, end) of activations.
  void (*prepare_activations)(const Activations&, int64_t, int64_t);
  // By WeightKind: compute outputs [begin, end) of all rows.
  void (*weight_product[kNumWeightKinds])(const WeightProduct&, int64_t, int64_t);
  // Write columns [first, first + n) of a row as floats; first is a multiple of kQuantBlock.
  void (*dequantize_row)(const Weight&, int64_t row, int64_t first, int64_t n, float*);
  // Quantise rows [begin, end).
  void (*quantize_rows)(const Quantize&, int64_t, int64_t);
  // Replace n numbers x by exp(x - most), where x <= most, and return their sum.
  double (*exponentials)(float* x, int64_t n, float most);

  PerDType<int64_t> vector;  // elements of the compute type in a vector
  PerDType<Blocking> blocking;
};

// The table in use: the best instruction set that was built and that the processor has, or the one that the environment
// variable TINYLLM_CPU_ISA names. Throws std::runtime_error if that one cannot be used.
const Kernels& kernels();

std::vector<std::string> built_isas();
std::vector<std::string> usable_isas();

extern const Kernels scalar_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#elif defined(__aarch64__)
extern const Kernels neon_kernels;
#endif

}  // namespace tinyllm::cpu
