#include "prefix_attention_cuda.cu"

#include "prefix_attention_params.h"

void run_case(simt::Case& test) {
  alitok::PrefixAttentionParams p = read_params(test);
  with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    p.qkv = read_qkv<T>(test, p);
    p.out = test.output<T>("out", p.batch * p.length * p.heads * p.head_dim);
    p.lse = test.output<float>("lse", p.batch * p.heads * p.length);
    p.workspace = test.workspace<unsigned char>(alitok::prefix_attention_workspace_cuda(p));
    alitok::prefix_attention_cuda(p, nullptr);
  });
}
