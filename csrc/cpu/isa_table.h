// Included last by each isa_<name>.cpp: the table of all kernels, compiled for that instruction set.
#include "adamw_kernel.h"
#include "attention_bwd_kernel.h"
#include "attention_decode_kernel.h"
#include "attention_fwd_kernel.h"
#include "cross_entropy_kernel.h"
#include "dispatch.h"
#include "draw_kernel.h"
#include "embedding_kernel.h"
#include "gated_activation_kernel.h"
#include "layer_norm_kernel.h"
#include "linear_cross_entropy_kernel.h"
#include "matmul_kernel.h"
#include "random_kernel.h"
#include "rotary_kernel.h"
#include "weight_kernel.h"
#include "weight_storage.h"

// The instantiations of a kernel in the order of DType.
#define TINYLLM_ALL_DTYPES(kernel)                                     \
  {                                                                    \
    {                                                                  \
      kernel<float>, kernel<double>, kernel<bfloat16>, kernel<float16> \
    }                                                                  \
  }

namespace tinyllm::TINYLLM_ISA {

constexpr cpu::Kernels table(const char* name) {
  return {
      .name = name,
      .layer_norm_fwd = TINYLLM_ALL_DTYPES(layer_norm_fwd),
      .layer_norm_bwd = TINYLLM_ALL_DTYPES(layer_norm_bwd),
      .rms_norm_fwd = TINYLLM_ALL_DTYPES(rms_norm_fwd),
      .rms_norm_bwd = TINYLLM_ALL_DTYPES(rms_norm_bwd),
      .embedding_fwd = TINYLLM_ALL_DTYPES(embedding_fwd),
      .sum_rows = TINYLLM_ALL_DTYPES(sum_rows),
      .stream_zeros = stream_zeros,
      .dropped_sum = TINYLLM_ALL_DTYPES(dropped_sum),
      .dropout_factors = write_dropout_factors,
      .attention_pack = TINYLLM_ALL_DTYPES(attention_pack),
      .attention_packed_head = TINYLLM_ALL_DTYPES(attention_packed_head),
      .attention_fwd = TINYLLM_ALL_DTYPES(attention_fwd),
      .attention_decode = TINYLLM_ALL_DTYPES(attention_decode),
      .attention_decode_combine = TINYLLM_ALL_DTYPES(attention_decode_combine),
      .attention_bwd = TINYLLM_ALL_DTYPES(attention_bwd),
      .cross_entropy_fwd = TINYLLM_ALL_DTYPES(cross_entropy_fwd),
      .cross_entropy_bwd = TINYLLM_ALL_DTYPES(cross_entropy_bwd),
      .linear_cross_entropy_logits = TINYLLM_ALL_DTYPES(linear_cross_entropy_logits),
      .linear_cross_entropy_loss = TINYLLM_ALL_DTYPES(linear_cross_entropy_loss),
      .linear_cross_entropy_gradient = TINYLLM_ALL_DTYPES(linear_cross_entropy_gradient),
      .linear_cross_entropy_grad_input = TINYLLM_ALL_DTYPES(linear_cross_entropy_grad_input),
      .linear_cross_entropy_grad_weight = TINYLLM_ALL_DTYPES(linear_cross_entropy_grad_weight),
      .matmul_pack_b = TINYLLM_ALL_DTYPES(matmul_pack_b),
      .matmul_block = TINYLLM_ALL_DTYPES(matmul_block),
      .gemv = TINYLLM_ALL_DTYPES(gemv),
      .gemv_by_rows = TINYLLM_ALL_DTYPES(gemv_by_rows),
      .column_sums = TINYLLM_ALL_DTYPES(column_sums),
      .gated_activation_fwd = TINYLLM_ALL_DTYPES(gated_activation_fwd),
      .gated_activation_bwd = TINYLLM_ALL_DTYPES(gated_activation_bwd),
      .rotary = TINYLLM_ALL_DTYPES(rotary),
      .gate = TINYLLM_ALL_DTYPES(gate_all),
      .sum_of_squares = TINYLLM_ALL_DTYPES(sum_of_squares),
      .adamw_step = TINYLLM_ALL_DTYPES(adamw_step),
      .attention_decode_bf16 = attention_decode<bfloat16, float>,
      .prepare_activations = prepare_activations,
      .weight_product = {weight_product<WeightKind::f32>, weight_product<WeightKind::bf16>,
                         weight_product<WeightKind::int8>, weight_product<WeightKind::int4>},
      .dequantize_row = dequantize_row,
      .quantize_rows = quantize_rows,
      .exponentials = exponentials,
      .vector = {{Vec<float>::size, Vec<double>::size, Vec<float>::size, Vec<float>::size}},
      .blocking = {{kBlocking<float>, kBlocking<double>, kBlocking<float>, kBlocking<float>}},
  };
}

}  // namespace tinyllm::TINYLLM_ISA
