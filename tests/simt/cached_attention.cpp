#include "cached_attention_cuda.cu"
#include "case.h"

void run_case(simt::Case& test) {
  using alitok::CachedAttentionDtype;
  alitok::CachedAttentionParams p{};
  p.dtype = static_cast<CachedAttentionDtype>(test.integer("dtype"));
  p.cache_dtype = static_cast<CachedAttentionDtype>(test.integer("cache_dtype"));
  p.rows = test.integer("rows");
  p.columns = test.integer("columns");
  p.slots = test.integer("slots");
  p.heads = test.integer("heads");
  p.head_dim = test.integer("head_dim");
  p.capacity = test.integer("capacity");
  p.qkv = test.input<void>("qkv");
  p.head_stride = p.capacity * p.head_dim;
  if (test.has("slot_stride")) {  // caches of float
    p.slot_stride = test.integer("slot_stride");
    p.keys = test.spread<float>("keys", p.slots, p.slot_stride);
    p.values = test.spread<float>("values", p.slots, p.slot_stride);
  } else {
    p.slot_stride = p.heads * p.head_stride;
    p.keys = test.inout<void>("keys");
    p.values = test.inout<void>("values");
  }
  if (test.has("offset")) {  // bytes before the first key and the first value
    p.keys = static_cast<char*>(p.keys) + test.integer("offset");
    p.values = static_cast<char*>(p.values) + test.integer("offset");
  }
  const bool aligned = alitok::cached_attention_aligned(p.keys, p.slot_stride, p.head_stride, p.cache_dtype) &&
                       alitok::cached_attention_aligned(p.values, p.slot_stride, p.head_stride, p.cache_dtype);
  *test.output<int>("aligned", 1) = aligned;
  if (!aligned && !test.has("unchecked")) return;  // as the operator's check
  p.positions = test.input<int64_t>("positions");
  p.slot_of = test.input<int64_t>("slots_of_rows");
  p.q_norm_weight = test.input<float>("q_norm_weight");
  p.k_norm_weight = test.input<float>("k_norm_weight");
  p.norm_eps = 1e-5f;
  p.rope = test.input<float>("rope");
  p.scale = static_cast<float>(test.number("scale"));
  const int64_t element = p.dtype == CachedAttentionDtype::float32 ? 4 : 2;
  p.out = test.output<unsigned char>("out", p.rows * p.columns * p.heads * p.head_dim * element);
  p.arrivals = test.inout<unsigned>("arrivals");
  const int64_t queries = p.rows * p.columns * p.heads, multiprocessors = alitok::cached_attention_multiprocessors();
  p.splits = p.arrivals == nullptr ? 1 : alitok::cached_attention_splits(queries, p.capacity, multiprocessors);
  p.workspace = test.workspace<float>(alitok::cached_attention_workspace(p));
  alitok::cached_attention_cuda(p, nullptr);
}
