// A block for each row and head, or, where those are few, several that share its keys: the last of them appends the new
// key and value; each scores its keys (four lanes a key), takes the softmax, and sums the values (a thread for eight
// channels of every G-th key). Two passes with the scores in shared memory: the sequences are short (274 or 1058), so
// nothing is gained by an online softmax.
//
// The position is known on the device alone, so the host chooses the number of blocks by rows, heads and capacity, and
// each block finds its keys of [0, position]; those that have none leave at once. The block that finishes last, by a
// counter, merges. A second kernel would need no counter, but would be one more node of a sampling step's graph for
// each layer, where a step of batch 1 already is a chain of short ones; a cluster would need neither, but not on sm_80.
// The counter is the caller's: the module's would be shared by streams, one allocated here would need a node to zero it.
// It wraps to zero by itself, for the next launch or replay. Shares are merged in their order whichever block is last,
// so the bits are the same every time. tests/simt runs the blocks one after another, in several orders: it checks the
// arithmetic, the count and that no order matters, but not the two fences.
#include "cached_attention.h"

#include <cfloat>

#include "cuda_element.h"
#include "host_device.h"

namespace alitok {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;  // channels a thread moves at once
constexpr int kLanes = 4;   // of a key: neighbours read neighbouring memory

// Keys of each block but the last, when `splits` blocks share `keys`.
ALITOK_HOST_DEVICE int share_of(int keys, int splits) {
  const int equal = (keys + splits - 1) / splits, least = static_cast<int>(kCachedAttentionLeastShare);
  return equal > least ? equal : least;
}

// What a block leaves of its share: the largest score, the sum of exp(score - largest), and its values weighted by those.
__device__ __forceinline__ float* share_result(const CachedAttentionParams& p, int split) {
  return p.workspace + (static_cast<int64_t>(blockIdx.x) * p.splits + split) * (p.head_dim + 2);
}

// Whether this block is the last of `blocks` to come here; if so it sees what the others wrote before.
__device__ __forceinline__ bool is_last(unsigned* counter, unsigned blocks) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(counter, blocks - 1) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

template <class T>
__device__ __forceinline__ void merge_shares(const CachedAttentionParams& p, T* out, int blocks) {
  float largest = -FLT_MAX, sum = 0;
  for (int s = 0; s < blocks; ++s) largest = fmaxf(largest, __ldcg(share_result(p, s)));
  for (int s = 0; s < blocks; ++s) {
    const float* share = share_result(p, s);
    sum += __expf(__ldcg(share) - largest) * __ldcg(share + 1);
  }
  for (int d = threadIdx.x; d < p.head_dim; d += kThreads) {
    float total = 0;
    for (int s = 0; s < blocks; ++s) {
      const float* share = share_result(p, s);
      total += __expf(__ldcg(share) - largest) * __ldcg(share + 2 + d);
    }
    out[d] = from_float<T>(total / sum);
  }
}

// One warp: RMSNorm, weight and rotation of a head, rounded to T where the reference rounds. `x` and `y` (head_dim).
template <class T>
__device__ void normalise_and_rotate(const T* x, float* y, const float* weight, float eps, const float* rope,
                                     int head_dim) {
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
__global__ void __launch_bounds__(kThreads) cached_attention_kernel(const CachedAttentionParams p) {
  ALITOK_DYNAMIC_SHARED(float, shared);
  const int dim = static_cast<int>(p.head_dim), chunks = dim / kVector;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int64_t row = blockIdx.x / p.heads, head = blockIdx.x % p.heads;
  const int split = blockIdx.y, splits = gridDim.y;
  T* out = static_cast<T*>(p.out) + (row * p.heads + head) * dim;
  const int64_t position = *p.position;
  if (position < 0 || position >= p.capacity) {
    if (split == 0 && tid < dim) out[tid] = from_float<T>(NAN);
    return;
  }
  const int keys_seen = static_cast<int>(position) + 1;
  const int share = share_of(keys_seen, splits), blocks = (keys_seen + share - 1) / share;
  if (split >= blocks) return;
  const int begin = split * share, count = min(share, keys_seen - begin);

  float* query = shared;          // (dim)
  float* key = query + dim;       // (dim) the new one
  float* scratch = key + dim;     // (32)
  float* partial = scratch + 32;  // (groups, dim)
  const int groups = kThreads / chunks;
  float* scores = partial + groups * dim;  // (share)

  const T* qkv = static_cast<const T*>(p.qkv) + (row * 3 * p.heads + head) * dim;
  Cache* keys = static_cast<Cache*>(p.keys) + row * p.row_stride + head * p.head_stride;
  Cache* values = static_cast<Cache*>(p.values) + row * p.row_stride + head * p.head_stride;
  const float* rope = p.rope == nullptr ? nullptr : p.rope + position * dim;
  if (warp == 0) normalise_and_rotate(qkv, query, p.q_norm_weight, p.norm_eps, rope, dim);
  if (split == blocks - 1) {  // the position is in its share: nobody else reads what it appends
    if (warp == 1) {
      normalise_and_rotate(qkv + p.heads * dim, key, p.k_norm_weight, p.norm_eps, rope, dim);
      __syncwarp();
      for (int d = lane; d < dim; d += 32) keys[position * dim + d] = from_float<Cache>(key[d]);
    }
    if (warp == 2) {
      const T* value = qkv + 2 * p.heads * dim;
      for (int d = lane; d < dim; d += 32) values[position * dim + d] = from_float<Cache>(to_float(value[d]));
    }
  }
  __syncthreads();  // also makes what was appended visible to the block
  keys += static_cast<int64_t>(begin) * dim;
  values += static_cast<int64_t>(begin) * dim;

  float largest = -FLT_MAX;  // finite: scores of -inf weigh nothing, and nothing else in their share is lost
  for (int first = 0; first < count; first += kThreads / kLanes) {
    const int j = first + tid / kLanes;
    float dot = 0;
    if (j < count) {
      const Cache* row_j = keys + static_cast<int64_t>(j) * dim;
#pragma unroll 2
      for (int c = tid % kLanes; c < chunks; c += kLanes) {
        const Eight<Cache> k = *reinterpret_cast<const Eight<Cache>*>(row_j + c * kVector);
#pragma unroll
        for (int d = 0; d < kVector; ++d) dot += query[c * kVector + d] * to_float(k.x[d]);
      }
    }
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, offset);
    if (j < count) {
      const float score = dot * p.scale;
      if (tid % kLanes == 0) scores[j] = score;
      largest = fmaxf(largest, score);
    }
  }
  largest = block_reduce(largest, -FLT_MAX, scratch, warp_max);  // its barriers also publish the scores
  float sum = 0;
  for (int j = tid; j < count; j += kThreads) {
    scores[j] = __expf(scores[j] - largest);
    sum += scores[j];
  }
  sum = block_reduce(sum, 0.0f, scratch, warp_sum);  // and the weights

  const int group = tid / chunks, channel = tid % chunks * kVector;
  if (group < groups) {
    float accumulator[kVector] = {};
    for (int j = group; j < count; j += groups) {
      const Eight<Cache> v = *reinterpret_cast<const Eight<Cache>*>(values + static_cast<int64_t>(j) * dim + channel);
#pragma unroll
      for (int d = 0; d < kVector; ++d) accumulator[d] += scores[j] * to_float(v.x[d]);
    }
#pragma unroll
    for (int d = 0; d < kVector; ++d) partial[group * dim + channel + d] = accumulator[d];
  }
  __syncthreads();
  float* mine = blocks == 1 ? nullptr : share_result(p, split);
  for (int d = tid; d < dim; d += kThreads) {
    float total = 0;
    for (int g = 0; g < groups; ++g) total += partial[g * dim + d];
    if (blocks == 1)
      out[d] = from_float<T>(total / sum);
    else
      mine[2 + d] = total;
  }
  if (blocks == 1) return;
  if (tid == 0) mine[0] = largest, mine[1] = sum;
  if (is_last(p.arrivals + blockIdx.x, blocks)) merge_shares(p, out, blocks);
}

template <class T, class Cache>
void launch(const CachedAttentionParams& p, void* stream) {
  const int64_t share = share_of(static_cast<int>(p.capacity), static_cast<int>(p.splits));
  const size_t floats = 2 * p.head_dim + 32 + kThreads / (p.head_dim / kVector) * p.head_dim + share;
  const auto kernel = cached_attention_kernel<T, Cache>;
  allow_shared_bytes(kernel, floats * sizeof(float));
  const dim3 grid(static_cast<unsigned>(p.rows * p.heads), static_cast<unsigned>(p.splits));
  ALITOK_LAUNCH(kernel, grid, kThreads, floats * sizeof(float), stream, p);
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
    case CachedAttentionDtype::e4m3:
      throw std::invalid_argument("qkv: expected float32, bfloat16 or float16, got e4m3");
  }
}

}  // namespace alitok
