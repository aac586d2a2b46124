// Operator schemas. Each <op>.cpp registers its own implementation.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(alitok, m) {
  m.def(
      "add_rms_norm(Tensor x, Tensor? delta, Tensor weight, float eps, float dropout, Tensor? seed) "
      "-> (Tensor sum, Tensor normed)");
  m.def(
      "add_rms_norm_backward(Tensor? grad_sum, Tensor grad_normed, Tensor x, Tensor weight, float eps, float dropout, "
      "Tensor? seed) -> (Tensor grad_x, Tensor grad_delta, Tensor grad_weight)");
  m.def(
      "decode(Tensor arena, Tensor vectors, Tensor embeddings, Tensor rope, Tensor ids, Tensor(a!) keys, "
      "Tensor(b!) values, Tensor positions, Tensor? slots, int hidden, int codes, int weight_bytes, "
      "int activation_bytes, float norm_eps) -> Tensor");
  m.def(
      "decode_tokens(Tensor arena, Tensor vectors, Tensor embeddings, Tensor rope, Tensor(a!) ids, Tensor(b!) keys, "
      "Tensor(c!) values, Tensor(d!) positions, Tensor? slots, Tensor(e!) tokens, Tensor prompt_lengths, "
      "Tensor? schedule, Tensor temperature, Tensor top_k, Tensor top_p, Tensor seeds, Tensor image_ids, "
      "Tensor(f!) passes_done, int passes, int window, int hidden, int codes, int weight_bytes, int activation_bytes, "
      "float norm_eps) -> ()");
  m.def(
      "cached_attention(Tensor qkv, Tensor(a!) keys, Tensor(b!) values, Tensor positions, Tensor? slots, "
      "Tensor? q_norm_weight, Tensor? k_norm_weight, float norm_eps, Tensor? rope, float scale, Tensor(c!)? arrivals) "
      "-> Tensor");
  m.def(
      "fused_linear(Tensor x, Tensor? norm_weight, float norm_eps, Tensor weight, Tensor? scale, Tensor? gate, "
      "Tensor? gate_scale, Tensor? bias, bool clusters) -> Tensor");
  m.def(
      "fused_linear_embed(Tensor ids, Tensor table, Tensor norm_weight, float norm_eps, Tensor weight, Tensor? scale, "
      "Tensor? bias, bool clusters) -> (Tensor, Tensor)");
  m.def(
      "fused_linear_add(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor(a!) residual, bool clusters) "
      "-> ()");
  m.def(
      "bf16_linear(Tensor x, Tensor weight, Tensor? bias, int outputs, ScalarType dtype, Tensor? norm_weight=None, "
      "Tensor? norm_bias=None, float norm_eps=1e-5, bool gelu=False, Tensor? residual=None) -> Tensor");
  m.def(
      "int8_linear(Tensor x, Tensor weight, Tensor? bias, int outputs, ScalarType dtype, Tensor? norm_weight=None, "
      "Tensor? norm_bias=None, float norm_eps=1e-5, bool gelu=False, Tensor? residual=None) -> Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "linear_backward(Tensor grad, Tensor x, Tensor weight, bool[3] wanted) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def("norm_head(Tensor x, Tensor norm_weight, float norm_eps, Tensor weight, Tensor? bias) -> Tensor");
  m.def("quantized_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor");
  m.def("quantized_linear_widen(Tensor weight, Tensor scale, ScalarType dtype) -> Tensor");
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor grad_gate, Tensor grad_up)");
  m.def(
      "vq_lookup(Tensor z, Tensor codebook, float commitment, bool with_closest) "
      "-> (Tensor quantized, Tensor indices, Tensor loss, Tensor usage, Tensor closest)");
  m.def(
      "vq_lookup_backward(Tensor grad_quantized, Tensor grad_loss, Tensor z, Tensor codebook, Tensor indices, "
      "float commitment) -> (Tensor grad_z, Tensor grad_codebook)");
  m.def(
      "prefix_attention(Tensor qkv, SymInt prefix_len, Tensor? q_norm_weight, Tensor? k_norm_weight, float norm_eps, "
      "Tensor? rope, float scale, float dropout, Tensor? seed) -> (Tensor out, Tensor lse)");
  m.def(
      "prefix_attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, SymInt prefix_len, "
      "Tensor? q_norm_weight, Tensor? k_norm_weight, float norm_eps, Tensor? rope, float scale, float dropout, "
      "Tensor? seed) -> (Tensor grad_qkv, Tensor grad_q_norm_weight, Tensor grad_k_norm_weight)");
  m.def(
      "sample_tokens(Tensor logits, Tensor? guidance_scale, Tensor temperature, Tensor top_k, Tensor top_p, "
      "Tensor seed, Tensor image_ids, Tensor step) -> Tensor");
  m.def(
      "sample_tokens_next(Tensor logits, Tensor(a!) ids, Tensor(b!) positions, Tensor(c!) tokens, "
      "Tensor prompt_lengths, Tensor? schedule, Tensor temperature, Tensor top_k, Tensor top_p, Tensor seeds, "
      "Tensor image_ids, Tensor(d!) passes_done, int window) -> ()");
}
