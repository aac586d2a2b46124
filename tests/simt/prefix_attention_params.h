// The part of a prefix_attention case that forward and backward share.
#pragma once

#include "case.h"
#include "prefix_attention.h"

inline alitok::PrefixAttentionParams read_params(simt::Case& test) {
  alitok::PrefixAttentionParams p{};
  p.dtype = static_cast<alitok::AttentionDtype>(test.integer("dtype"));
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
  p.dropout = test.dropout();
  return p;
}

// Rows of qkv: `offset` elements into the tensor, or, with the scalar `far`, spread out by the row stride.
template <class T>
const T* read_qkv(simt::Case& test, const alitok::PrefixAttentionParams& p) {
  if (test.has("far")) return test.spread<T>("qkv", p.batch * p.length, p.qkv_row_stride);
  return test.input<T>("qkv") + test.integer("offset");
}

// Calls f(T{}) with the element type of the case.
template <class F>
void with_dtype(alitok::AttentionDtype dtype, const F& f) {
  switch (dtype) {
    case alitok::AttentionDtype::float32: return f(float{});
    case alitok::AttentionDtype::bfloat16: return f(__nv_bfloat16{});
    case alitok::AttentionDtype::float16: return f(__half{});
  }
}
