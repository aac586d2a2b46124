#include "case.h"
#include "prefix_attention_cuda.cu"

namespace {

using namespace alitok;

template <class T>
void run(simt::Case& test, PrefixAttentionParams p) {
  const int64_t elements = p.batch * p.length * p.heads * p.head_dim;
  p.qkv = test.input<T>("qkv") + test.integer("offset");
  p.out = test.output<T>("out", elements);
  p.workspace = test.workspace<unsigned char>(prefix_attention_workspace_cuda(p));
  prefix_attention_cuda(p, nullptr);
}

}  // namespace

void run_case(simt::Case& test) {
  PrefixAttentionParams p{};
  p.dtype = static_cast<AttentionDtype>(test.integer("dtype"));
  p.batch = test.integer("batch");
  p.length = test.integer("length");
  p.heads = test.integer("heads");
  p.head_dim = test.integer("head_dim");
  p.prefix_len = test.integer("prefix_len");
  p.qkv_row_stride = test.integer("row_stride");
  p.qkv_batch_stride = test.integer("batch_stride");
  p.q_norm_weight = test.input<float>("q_norm_weight");
  p.k_norm_weight = test.input<float>("k_norm_weight");
  p.norm_eps = static_cast<float>(test.number("norm_eps"));
  p.rope = test.input<float>("rope");
  p.scale = static_cast<float>(test.number("scale"));
  p.dropout_threshold = static_cast<uint32_t>(test.integer("dropout_threshold"));
  p.dropout_scale = static_cast<float>(test.number("dropout_scale"));
  p.seed = test.input<int64_t>("seed");
  p.lse = test.output<float>("lse", p.batch * p.heads * p.length);
  switch (p.dtype) {
    case AttentionDtype::float32: return run<float>(test, p);
    case AttentionDtype::bfloat16: return run<__nv_bfloat16>(test, p);
    case AttentionDtype::float16: return run<__half>(test, p);
  }
}
