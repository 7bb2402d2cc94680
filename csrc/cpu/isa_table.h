// Included last by each isa_<name>.cpp: that instruction set's table of kernels.
#include "attention_bwd_kernel.h"
#include "attention_decode_kernel.h"
#include "attention_fwd_kernel.h"
#include "cross_entropy_kernel.h"
#include "embedding_kernel.h"
#include "layer_norm_kernel.h"
#include "linear_cross_entropy_kernel.h"
#include "linear_kernel.h"
#include "random_kernel.h"

#define TINYLLM_ALL_DTYPES(kernel) {kernel<float>, kernel<double>, kernel<bfloat16>, kernel<float16>}

namespace tinyllm::TINYLLM_ISA {

constexpr cpu::Kernels table(const char* name) {
  return {
      name,
      TINYLLM_ALL_DTYPES(layer_norm_fwd),
      TINYLLM_ALL_DTYPES(layer_norm_bwd),
      TINYLLM_ALL_DTYPES(rms_norm_fwd),
      TINYLLM_ALL_DTYPES(rms_norm_bwd),
      TINYLLM_ALL_DTYPES(embedding_fwd),
      TINYLLM_ALL_DTYPES(sum_rows),
      stream_zeros,
      write_dropout_factors,
      TINYLLM_ALL_DTYPES(attention_fwd),
      TINYLLM_ALL_DTYPES(attention_decode),
      TINYLLM_ALL_DTYPES(attention_decode_sum),
      TINYLLM_ALL_DTYPES(attention_bwd),
      TINYLLM_ALL_DTYPES(cross_entropy_fwd),
      TINYLLM_ALL_DTYPES(cross_entropy_bwd),
      TINYLLM_ALL_DTYPES(linear_cross_entropy_pack),
      TINYLLM_ALL_DTYPES(linear_cross_entropy_logits),
      TINYLLM_ALL_DTYPES(linear_cross_entropy_loss),
      TINYLLM_ALL_DTYPES(linear_cross_entropy_gradient),
      TINYLLM_ALL_DTYPES(linear_cross_entropy_grad_input),
      TINYLLM_ALL_DTYPES(linear_cross_entropy_grad_weight),
      TINYLLM_ALL_DTYPES(pack_product),
      TINYLLM_ALL_DTYPES(product_part),
      TINYLLM_ALL_DTYPES(product_dots),
      TINYLLM_ALL_DTYPES(column_sums),
      TINYLLM_ALL_DTYPES(activate_all),
      {Vec<float>::size, Vec<double>::size, Vec<float>::size, Vec<float>::size},
      {kPanel<float>, kPanel<double>, kPanel<float>, kPanel<float>},
      kRows,
  };
}

}  // namespace tinyllm::TINYLLM_ISA
