// The schemas of all operators. Each file of a device registers its own implementations.
#pragma once

namespace tinyllm {

template <class Library>
void define_operators(Library& m) {
  m.def(
      "layer_norm_fwd(Tensor input, int[] normalized_shape, Tensor? weight, Tensor? bias, float eps)"
      " -> (Tensor normed, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_bwd(Tensor grad, Tensor input, int[] normalized_shape, Tensor? weight, Tensor mean, Tensor rstd,"
      " bool parameter_grads) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "add_layer_norm_fwd(Tensor input, Tensor residual, int[] normalized_shape, Tensor? weight, Tensor? bias, float "
      "eps)"
      " -> (Tensor normed, Tensor sum, Tensor mean, Tensor rstd)");
  m.def(
      "add_layer_norm_bwd(Tensor grad_normed, Tensor? grad_sum, Tensor sum, int[] normalized_shape, Tensor? weight,"
      " Tensor mean, Tensor rstd, bool parameter_grads) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "rms_norm_fwd(Tensor input, int[] normalized_shape, Tensor? weight, float eps) -> (Tensor normed, Tensor rstd)");
  m.def(
      "rms_norm_bwd(Tensor grad, Tensor input, int[] normalized_shape, Tensor? weight, Tensor rstd,"
      " bool parameter_grads) -> (Tensor grad_input, Tensor grad_weight)");
  m.def(
      "add_rms_norm_fwd(Tensor input, Tensor residual, int[] normalized_shape, Tensor? weight, float eps)"
      " -> (Tensor normed, Tensor sum, Tensor rstd)");
  m.def(
      "add_rms_norm_bwd(Tensor grad_normed, Tensor? grad_sum, Tensor sum, int[] normalized_shape, Tensor? weight,"
      " Tensor rstd, bool parameter_grads) -> (Tensor grad_input, Tensor grad_weight)");
  // The angles' cos and sin are (B or 1, T, columns to rotate).
  m.def("rotary_embedding_fwd(Tensor query, Tensor key, Tensor cos, Tensor sin) -> (Tensor, Tensor)");
  m.def(
      "rotary_embedding_bwd(Tensor grad_query, Tensor grad_key, Tensor cos, Tensor sin)"
      " -> (Tensor grad_query, Tensor grad_key)");
  m.def(
      "embedding_fwd(Tensor input, Tensor weight, Tensor? positions, float dropout_p=0., Tensor? rng=None) -> Tensor");
  m.def(
      "embedding_bwd(Tensor grad, Tensor input, SymInt num_embeddings, int? padding_idx, bool weight_grad,"
      " bool positions_grad, float dropout_p=0., Tensor? rng=None) -> (Tensor grad_weight, Tensor grad_positions)");
  // lse is (B, H, T), or (2, B, H, T) with an additive mask: then lse[1] is the rounding error of lse[0]. key_lengths
  // and causal_offset are (B): with is_causal, query i of sequence b sees keys 0 ... causal_offset[b] + i, of which
  // there are key_lengths[b].
  m.def(
      "attention_fwd(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float scale,"
      " float dropout_p=0., Tensor? rng=None, Tensor? key_lengths=None, Tensor? causal_offset=None)"
      " -> (Tensor out, Tensor lse)");
  m.def(
      "attention_bwd(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor out, Tensor lse,"
      " bool is_causal, float scale, float dropout_p=0., Tensor? rng=None, Tensor? key_lengths=None,"
      " Tensor? causal_offset=None)"
      " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
  m.def("dropout_factors(Tensor rng, SymInt rows, SymInt columns, float p) -> Tensor");
  // reduction is 0 (none), 1 (mean) or 2 (sum), as in PyTorch. grad_input is empty unless with_grad.
  m.def(
      "cross_entropy_fwd(Tensor input, Tensor target, Tensor? weight, int reduction, int ignore_index,"
      " float label_smoothing, bool with_grad) -> (Tensor loss, Tensor max_and_sum, Tensor grad_input)");
  m.def(
      "cross_entropy_bwd(Tensor grad, Tensor input, Tensor target, Tensor? weight, Tensor max_and_sum, int reduction,"
      " int ignore_index, float label_smoothing) -> Tensor grad_input");
  // Gradients are in the compute dtype, and empty if they are not wanted.
  m.def(
      "linear_cross_entropy_fwd(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight,"
      " int reduction, int ignore_index, float label_smoothing, bool need_input, bool need_weight, bool need_bias)"
      " -> (Tensor loss, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "linear_cross_entropy_bwd(Tensor grad, Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias,"
      " Tensor? weight, int reduction, int ignore_index, float label_smoothing, bool need_input, bool need_weight,"
      " bool need_bias) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  // activation is none, relu, gelu, gelu_tanh or silu.
  m.def(
      "linear_fwd(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, str activation, bool slope)"
      " -> (Tensor out, Tensor slope)");
  m.def(
      "linear_bwd(Tensor grad, Tensor input, Tensor weight, Tensor? gate, str activation, bool input_grad,"
      " bool weight_grad, bool bias_grad)"
      " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "feed_forward_fwd(Tensor input, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor? residual,"
      " str activation, bool slope) -> (Tensor out, Tensor hidden, Tensor slope)");
  m.def(
      "feed_forward_bwd(Tensor grad, Tensor input, Tensor weight1, Tensor weight2, Tensor hidden, Tensor gate,"
      " str activation, bool input_grad, bool weight_grads, bool bias1_grad, bool bias2_grad) -> (Tensor grad_input, "
      "Tensor grad_weight1,"
      " Tensor grad_bias1, Tensor grad_weight2, Tensor grad_bias2)");
  m.def("gated_activation_fwd(Tensor gate, Tensor up, str activation) -> Tensor");
  m.def(
      "gated_activation_bwd(Tensor grad, Tensor gate, Tensor up, str activation) -> (Tensor grad_gate, Tensor "
      "grad_up)");
  // Whole models and blocks alone; cpu/transformer.cpp says what parameters lists. With a target (B T) the output is
  // the mean loss. rng is the (seed, offset) of dropout. grad_added is the gradient of positions, or of the input of
  // blocks alone.
  m.def(
      "transformer_fwd(Tensor input, Tensor[] parameters, Tensor? positions, Tensor? target, int num_layers,"
      " int num_heads, bool causal, bool norm_first, str activation, float eps1, float eps2, float dropout_p, Tensor? "
      "rng,"
      " bool save)"
      " -> (Tensor out, Tensor saved)");
  m.def(
      "transformer_bwd(Tensor grad, Tensor input, Tensor[] parameters, Tensor? positions, Tensor? target, Tensor saved,"
      " int num_layers, int num_heads, bool causal, bool norm_first, str activation, float eps1, float eps2,"
      " float dropout_p, Tensor? rng, bool positions_grad) -> (Tensor[] grads, Tensor grad_added)");
  // A weight (outputs, inputs) in 8 or 4 bits, and the scales of its groups; cpu/weight_args.h has the layout.
  m.def("quantize_weight(Tensor weight, int bits, int group_size) -> (Tensor data, Tensor scales)");
  m.def("dequantize_weight(Tensor data, Tensor? scales, SymInt inputs) -> Tensor");
  m.def(
      "quantized_linear(Tensor input, Tensor data, Tensor? scales, Tensor? bias, Tensor? residual, str activation)"
      " -> Tensor");
  // Generation with a cache of keys and values (layers, 2, B, H, length, head_dim); cpu/decoder.cpp says what weights
  // lists. Sequence b has read lengths[b] tokens. decoder_read reads counts[b] of ids (B, T) more, decoder_step one,
  // ids (B); both return the logits (B, V) of what follows. Sequences of decoder_step and decoder_write may share a
  // cache, as the places of one text that follow one another. decoder_write reads ids (B), then draws and reads tokens
  // until it has drawn as many as there are columns of uniforms; tokens are -1 behind the one with which the last
  // sequence came to a stop id.
  m.def(
      "decoder_read(Tensor ids, Tensor counts, Tensor[] weights, Tensor positions, Tensor(a!) cache, Tensor lengths,"
      " int num_layers, int num_heads, bool norm_first, str activation, float eps) -> Tensor");
  m.def(
      "decoder_step(Tensor ids, Tensor[] weights, Tensor positions, Tensor(a!) cache, Tensor lengths, int num_layers,"
      " int num_heads, bool norm_first, str activation, float eps) -> Tensor");
  m.def(
      "decoder_write(Tensor ids, Tensor uniforms, Tensor[] weights, Tensor positions, Tensor(a!) cache, Tensor lengths,"
      " int num_layers, int num_heads, bool norm_first, str activation, float eps, float temperature, int top_k,"
      " float top_p, float min_p, float repetition_penalty, int suppress_id, int ids_below, Tensor(b!)? seen, int[] "
      "stop_ids)"
      " -> (Tensor tokens, Tensor log_probs)");
  // A pre-norm block for one token of each sequence, whose cache of keys and values (B, H, length, head_dim) has as
  // many before. cpu/decode_block.cpp says what weights and sizes list.
  m.def(
      "decode_block(Tensor input, Tensor[] weights, int[] sizes, Tensor(a!) keys, Tensor(b!) values, int seen,"
      " Tensor? mask, Tensor? cos, Tensor? sin, str activation, float scale, float eps1, float eps2, float eps3)"
      " -> Tensor");
  // The Euclidean norm of all tensors together, in the compute dtype.
  m.def("adamw_norm(Tensor[] tensors) -> Tensor");
  // A step in place. Gradients are multiplied by clip_coef as they are read, and stay as they are.
  m.def(
      "adamw_step(Tensor(a!)[] parameters, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
      " Tensor(d!)[] steps, float lr, float beta1, float beta2, float eps, float weight_decay, float clip_coef) -> ()");
}

}  // namespace tinyllm
