#include "prefix_attention_backward_cuda.cu"

#include "prefix_attention_params.h"

void run_case(simt::Case& test) {
  alitok::PrefixAttentionBackwardParams b{};
  b.forward = read_params(test);
  alitok::PrefixAttentionParams& p = b.forward;
  const bool normed = p.q_norm_weight != nullptr;
  b.grad_q_norm_weight = normed ? test.output<float>("grad_q_norm_weight", p.head_dim) : nullptr;
  b.grad_k_norm_weight = normed ? test.output<float>("grad_k_norm_weight", p.head_dim) : nullptr;
  with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    p.qkv = read_qkv<T>(test, p);
    p.out = const_cast<T*>(test.input<T>("out"));
    p.lse = const_cast<float*>(test.input<float>("lse"));
    b.grad_out = test.input<T>("grad_out");
    b.grad_qkv = test.output<T>("grad_qkv", 3 * p.batch * p.length * p.heads * p.head_dim);
    p.workspace = test.workspace<unsigned char>(alitok::prefix_attention_backward_workspace_cuda(p));
    alitok::prefix_attention_backward_cuda(b, nullptr);
  });
}
