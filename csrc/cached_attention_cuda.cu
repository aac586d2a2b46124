// One block for each row and head: append the new key and value, score every key (a thread each), softmax, then sum the
// values (a thread for eight channels of every G-th key). Two passes with the scores in shared memory: the sequences
// are short (274 or 1058), so nothing is gained by an online softmax or, over keys, by more blocks than that.
#include "cached_attention.h"
#include "cuda_element.h"

namespace alitok {
namespace {

constexpr int kVector = 8;  // channels a thread moves at once

// One warp: RMSNorm, weight and rotation of a head, rounded to T where the reference rounds. `x` and `y` (head_dim).
template <class T>
__device__ void normalise_and_rotate(const T* x, float* y, const float* weight, float eps, const float* rope, int head_dim) {
  const int lane = threadIdx.x % 32;
  float squares = 0;
  for (int d = lane; d < head_dim; d += 32) squares += to_float(x[d]) * to_float(x[d]);
  const float inverse = weight == nullptr ? 1.0f : rsqrtf(warp_sum(squares) / head_dim + eps);
  for (int pair = lane; pair < head_dim / 2; pair += 32) {
    float even = to_float(x[2 * pair]), odd = to_float(x[2 * pair + 1]);
    if (weight != nullptr) {
      even = rounded<T>(rounded<T>(even * inverse) * rounded<T>(weight[2 * pair]));
      odd = rounded<T>(rounded<T>(odd * inverse) * rounded<T>(weight[2 * pair + 1]));
    }
    if (rope != nullptr) {
      const float c = rope[2 * pair], s = rope[2 * pair + 1], x0 = even, x1 = odd;
      even = rounded<T>(x0 * c - x1 * s);
      odd = rounded<T>(x0 * s + x1 * c);
    }
    y[2 * pair] = even;
    y[2 * pair + 1] = odd;
  }
}

template <class T, class Cache>
__global__ void cached_attention_kernel(const CachedAttentionParams p) {
  ALITOK_DYNAMIC_SHARED(float, shared);
  const int dim = static_cast<int>(p.head_dim), chunks = dim / kVector;
  const int tid = threadIdx.x, warp = tid / 32, threads = blockDim.x;
  const int64_t row = blockIdx.x / p.heads, head = blockIdx.x % p.heads;
  T* out = static_cast<T*>(p.out) + (row * p.heads + head) * dim;
  const int64_t position = *p.position;
  if (position < 0 || position >= p.capacity) {
    if (tid < dim) out[tid] = from_float<T>(NAN);
    return;
  }
  const int keys_seen = static_cast<int>(position) + 1;

  float* query = shared;                 // (dim)
  float* key = query + dim;              // (dim) the new one
  float* scratch = key + dim;            // (32)
  float* scores = scratch + 32;          // (capacity)
  float* partial = scores + p.capacity;  // (groups, dim)

  const T* qkv = static_cast<const T*>(p.qkv) + (row * 3 * p.heads + head) * dim;
  Cache* keys = static_cast<Cache*>(p.keys) + row * p.row_stride + head * p.head_stride;
  Cache* values = static_cast<Cache*>(p.values) + row * p.row_stride + head * p.head_stride;
  const float* rope = p.rope == nullptr ? nullptr : p.rope + position * dim;
  if (warp == 0) normalise_and_rotate(qkv, query, p.q_norm_weight, p.norm_eps, rope, dim);
  if (warp == 1) normalise_and_rotate(qkv + p.heads * dim, key, p.k_norm_weight, p.norm_eps, rope, dim);
  const T* value = qkv + 2 * p.heads * dim;
  __syncthreads();
  for (int d = tid; d < dim; d += threads) {
    const Cache stored = from_float<Cache>(key[d]);
    keys[position * dim + d] = stored;
    key[d] = to_float(stored);  // scored as later steps will read it
    values[position * dim + d] = from_float<Cache>(to_float(value[d]));
  }
  __syncthreads();  // also makes the appended value visible to the block

  float largest = -INFINITY;
  for (int j = tid; j < keys_seen; j += threads) {
    float dot = 0;
    if (j == position) {
      for (int d = 0; d < dim; ++d) dot += query[d] * key[d];
    } else {
      const Cache* row_j = keys + static_cast<int64_t>(j) * dim;
#pragma unroll 2
      for (int c = 0; c < chunks; ++c) {
        const Eight<Cache> k = *reinterpret_cast<const Eight<Cache>*>(row_j + c * kVector);
#pragma unroll
        for (int d = 0; d < kVector; ++d) dot += query[c * kVector + d] * to_float(k.x[d]);
      }
    }
    scores[j] = dot * p.scale;
    largest = fmaxf(largest, scores[j]);
  }
  largest = block_reduce(largest, -INFINITY, scratch, warp_max);
  float sum = 0;
  for (int j = tid; j < keys_seen; j += threads) {
    scores[j] = __expf(scores[j] - largest);
    sum += scores[j];
  }
  sum = block_reduce(sum, 0.0f, scratch, warp_sum);  // its barriers also publish the scores

  const int groups = threads / chunks, group = tid / chunks, channel = tid % chunks * kVector;
  if (group < groups) {
    float accumulator[kVector] = {};
    for (int j = group; j < keys_seen; j += groups) {
      const Eight<Cache> v = *reinterpret_cast<const Eight<Cache>*>(values + static_cast<int64_t>(j) * dim + channel);
#pragma unroll
      for (int d = 0; d < kVector; ++d) accumulator[d] += scores[j] * to_float(v.x[d]);
    }
#pragma unroll
    for (int d = 0; d < kVector; ++d) partial[group * dim + channel + d] = accumulator[d];
  }
  __syncthreads();
  for (int d = tid; d < dim; d += threads) {
    float total = 0;
    for (int g = 0; g < groups; ++g) total += partial[g * dim + d];
    out[d] = from_float<T>(total / sum);
  }
}

template <class T, class Cache>
void launch(const CachedAttentionParams& p, void* stream) {
  // Few blocks: more warps each, so that enough loads are under way. Many: smaller blocks leave fewer idle at barriers.
  const int threads = p.rows * p.heads <= 256 ? 512 : 256;
  const size_t floats = 2 * p.head_dim + 32 + p.capacity + threads / (p.head_dim / kVector) * p.head_dim;
  const auto kernel = cached_attention_kernel<T, Cache>;
  allow_shared_bytes(kernel, floats * sizeof(float));
  ALITOK_LAUNCH(kernel, dim3(static_cast<unsigned>(p.rows * p.heads)), threads, floats * sizeof(float), stream, p);
}

template <class T>
void launch_for_cache(const CachedAttentionParams& p, void* stream) {
  if (p.cache_dtype == CachedAttentionDtype::e4m3) return launch<T, e4m3>(p, stream);
  launch<T, T>(p, stream);
}

}  // namespace

void cached_attention_cuda(const CachedAttentionParams& p, void* stream) {
  switch (p.dtype) {
    case CachedAttentionDtype::float32: return launch_for_cache<float>(p, stream);
    case CachedAttentionDtype::bfloat16: return launch_for_cache<__nv_bfloat16>(p, stream);
    case CachedAttentionDtype::float16: return launch_for_cache<__half>(p, stream);
    case CachedAttentionDtype::e4m3: throw std::invalid_argument("qkv: expected float32, bfloat16 or float16, got e4m3");
  }
}

}  // namespace alitok
