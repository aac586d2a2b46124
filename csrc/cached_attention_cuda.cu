// A block for each row and head, or, where the cache is long and those are few, several that share its keys.
//
// The kernel is as fast as memory if enough of it is on its way at any time. So a block begins with all its copies:
// each of its warps has a share of the keys, a tile of which (most often all) it copies to shared memory behind its
// back, the keys first, then the values. Meanwhile query and new key are normalised and rotated. Then each warp goes
// on alone, without barriers of the block, tile by tile: scores (two lanes a key; they stay in registers), softmax
// with a running maximum, sum of the values (a lane for eight channels of every G-th key). Where one tile is not all,
// the next keys are copied to the place of those that have been read while the values are summed, and the other way
// round. In the end the sums of the warps are added up in their order.
//
// The new key and value come first in the tile of the last block's first warp, in front of the old ones. They are
// stored there as the cache rounds them, and in the cache.
//
// A window of new positions has blocks for each of them (blockIdx.z), which wait for nobody: a block puts the new keys and
// values before its own into the cache itself, as several others do at the same time with the same bits, and copies them
// from there with the old ones. So the bits of a position do not depend on the window that it is in.
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

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kVector = 8;          // channels a thread moves at once
constexpr int kPairs = 2;           // of channels to a lane, where a warp has a head: up to 128 channels
constexpr int kLanes = 2;           // of a key
constexpr int kKeys = 5;            // of a tile to a lane, their scores in registers: 80 to a warp, 320 to a block
constexpr int kRows = 4;            // of values that a lane loads before it uses the first
constexpr int kPass = 32 / kLanes;  // keys that a warp takes at once

// Shared memory of a block for keys and values. Where there are many blocks it should be so small that five share a
// multiprocessor of sm_90, one computing while others wait. Few blocks should begin with all of their copies at once.
constexpr int64_t kBytesOfMany = 36 * 1024, kBytesOfFew = 88 * 1024, kFewBlocks = 256;

// So many blocks find room beside the kernel ahead, or nearly, and ask for their keys and values while they wait for it.
constexpr unsigned kEarlyBlocks = 512;

// Keys of each block but the last, when `splits` blocks share `keys`.
ALITOK_HOST_DEVICE int share_of(int keys, int splits) {
  if (splits == 1) return keys;
  const int equal = (keys + splits - 1) / splits, least = static_cast<int>(kCachedAttentionLeastShare);
  return equal > least ? equal : least;
}

// Of this block's row, column and head.
__device__ __forceinline__ int64_t query_number(const CachedAttentionParams& p) {
  const int64_t row = blockIdx.x / p.heads, head = blockIdx.x % p.heads;
  return (row * p.columns + blockIdx.z) * p.heads + head;
}

// What a block leaves of its share: the largest score, the sum of exp(score - largest), and its values weighted by those.
__device__ __forceinline__ float* share_result(const CachedAttentionParams& p, int split) {
  return p.workspace + (query_number(p) * p.splits + split) * (p.head_dim + 2);
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

// Of a head, the pairs of channels that a lane of a warp takes: number lane, lane + 32, ...
struct Pairs {
  float even[kPairs], odd[kPairs];
};

template <class T>
__device__ __forceinline__ Pairs load_pairs(const T* x, int head_dim) {
  Pairs pairs;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int even = 2 * (threadIdx.x % 32 + 32 * i), from = even < head_dim ? even : 0;  // no branch around a load
    pairs.even[i] = to_float(x[from]);
    pairs.odd[i] = to_float(x[from + 1]);
    if (even >= head_dim) pairs.even[i] = pairs.odd[i] = 0;
  }
  return pairs;
}

template <class T>
__device__ __forceinline__ void store_pairs(T* x, const Pairs& pairs, int head_dim) {
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int even = 2 * (threadIdx.x % 32 + 32 * i);
    if (even >= head_dim) break;
    x[even] = from_float<T>(pairs.even[i]);
    x[even + 1] = from_float<T>(pairs.odd[i]);
  }
}

// One warp: RMSNorm, weight and rotation of a head, rounded to T where the reference rounds. Weight and rope may be
// null.
template <class T>
__device__ __forceinline__ void normalise_and_rotate(Pairs& x, const float* weight, float eps, const float* rope,
                                                     int head_dim) {
  Pairs weights, turns;  // both on their way before the first use
  if (weight != nullptr) weights = load_pairs(weight, head_dim);
  if (rope != nullptr) turns = load_pairs(rope, head_dim);
  if (weight != nullptr) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) squares += x.even[i] * x.even[i] + x.odd[i] * x.odd[i];
    const float inverse = rsqrtf(warp_sum(squares) / head_dim + eps);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      x.even[i] = rounded<T>(rounded<T>(x.even[i] * inverse) * rounded<T>(weights.even[i]));
      x.odd[i] = rounded<T>(rounded<T>(x.odd[i] * inverse) * rounded<T>(weights.odd[i]));
    }
  }
  if (rope != nullptr) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float x0 = x.even[i], x1 = x.odd[i], cosine = turns.even[i], sine = turns.odd[i];
      x.even[i] = rounded<T>(x0 * cosine - x1 * sine);
      x.odd[i] = rounded<T>(x0 * sine + x1 * cosine);
    }
  }
}

// One warp: begins to copy memory that lies at, and is, a multiple of Bytes.
template <int Bytes>
__device__ __forceinline__ void copy_bytes(char* shared, const char* global, int bytes) {
  constexpr int kWarpBytes = 32 * Bytes, kUnrolled = 4;
#pragma unroll 1
  for (int i = threadIdx.x % 32 * Bytes; i < bytes; i += kUnrolled * kWarpBytes) {
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
      const int from = i + u * kWarpBytes;
      if (from < bytes) cp_async<Bytes>(shared + from, global + from);
    }
  }
}

// The same for a run of elements of a cache, as cached_attention_aligned() demands.
template <class Cache>
__device__ __forceinline__ void copy_run(Cache* shared, const Cache* global, int elements) {
  const int bytes = elements * static_cast<int>(sizeof(Cache));
  char* to = reinterpret_cast<char*>(shared);
  const char* from = reinterpret_cast<const char*>(global);
  if constexpr (sizeof(Cache) == 1) {  // the only one of which eight elements are less than 16 bytes
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16 != 0) {
      return copy_bytes<8>(to, from, bytes);
    }
  }
  copy_bytes<16>(to, from, bytes);
}

// One warp: scores of `count` keys in shared memory; that of key kPass * k + lane / kLanes, where there is one, in
// score[k].
template <class Cache>
__device__ __forceinline__ void score_keys(const Cache* keys, int count, int chunks, const float* query, float scale,
                                           float (&score)[kKeys]) {
  const int lane = threadIdx.x % 32, key = lane / kLanes;
  // Where keys lie a multiple of all banks apart, neighbouring lanes begin with different channels. kPass keys on it is
  // the same channel again.
  const int turn = chunks % 8 == 0 ? kLanes * key & (chunks - 1) : 0;
  const Cache* mine = keys + key * chunks * kVector;
  const int pass_stride = kPass * chunks * kVector;
#pragma unroll
  for (int k = 0; k < kKeys; ++k) score[k] = 0;
#pragma unroll 1
  for (int c = lane % kLanes; c < chunks; c += kLanes) {
    const int channel = (c + turn < chunks ? c + turn : c + turn - chunks) * kVector;
    float q[kVector];
    widen(load_eight(query + channel), q);
    PackedEight<Cache> rows[kKeys];  // all loads before the first use
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      if (kPass * k + key < count) rows[k] = load_eight(mine + k * pass_stride + channel);
    }
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      if (kPass * k >= count) break;
      float x[kVector];
      widen(rows[k], x);
#pragma unroll
      for (int d = 0; d < kVector; ++d) score[k] += q[d] * x[d];
    }
  }
#pragma unroll
  for (int k = 0; k < kKeys; ++k) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      score[k] += __shfl_xor_sync(0xffffffffu, score[k], offset);
    }
    score[k] *= scale;
  }
}

// Asks for the old keys and values of a row and head. A hint, before the kernel ahead has ended: nothing depends on
// whether the position is the one that it will be.
template <class Cache>
__device__ __forceinline__ void prefetch_cache(const CachedAttentionParams& p, int64_t row, int64_t head) {
  constexpr int kLine = 128;
  const int64_t position = __ldcg(p.positions + row), slot = p.slot_of == nullptr ? row : __ldcg(p.slot_of + row);
  const bool rests = position < 0 || position >= p.capacity || slot < 0 || slot >= p.slots;
  const int64_t first = rests ? 0 : slot * p.slot_stride + head * p.head_stride;
  const int64_t bytes = rests ? 0 : position * p.head_dim * sizeof(Cache);
  const char* keys = reinterpret_cast<const char*>(static_cast<const Cache*>(p.keys) + first);
  const char* values = reinterpret_cast<const char*>(static_cast<const Cache*>(p.values) + first);
#pragma unroll 1
  for (int64_t i = threadIdx.x * kLine; i < bytes; i += kThreads * kLine) {
    prefetch(keys + i);
    prefetch(values + i);
  }
}

// `tile` is the number of keys for which each warp has memory.
template <class T, class Cache>
__global__ void __launch_bounds__(kThreads, sizeof(Cache) == 4 ? 4 : 5)
    cached_attention_kernel(const CachedAttentionParams p, int tile) {
  ALITOK_DYNAMIC_SHARED(float, shared);
  const int dim = static_cast<int>(p.head_dim), chunks = dim / kVector;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const unsigned heads = static_cast<unsigned>(p.heads);
  const int64_t row = blockIdx.x / heads, head = blockIdx.x % heads;
  const int column = blockIdx.z;
  const int split = blockIdx.y, splits = gridDim.y;
  let_next_kernel_begin();
  if (p.q_norm_weight != nullptr && tid * 32 < dim) {
    prefetch(p.q_norm_weight + tid * 32);
    prefetch(p.k_norm_weight + tid * 32);
  }
  if (splits == 1 && gridDim.x <= kEarlyBlocks) prefetch_cache<Cache>(p, row, head);
  wait_for_kernel_ahead();

  T* out = static_cast<T*>(p.out) + query_number(p) * dim;
  const int64_t first_position = __ldcg(p.positions + row), position = first_position + column;
  const int64_t slot = p.slot_of == nullptr ? row : __ldcg(p.slot_of + row);
  const int part = warp;  // of qkv: the first warp takes the query, the second the new key, the third the new value
  const int64_t column_stride = 3 * p.heads * dim;
  const T* qkv = static_cast<const T*>(p.qkv) + (row * p.columns + column) * column_stride + head * dim;
  Pairs x{};
  if (part < 3) x = load_pairs(qkv + part * p.heads * dim, dim);
  if (first_position < 0 || first_position >= p.capacity - column || slot < 0 || slot >= p.slots) {
    if (split == 0 && tid < dim) out[tid] = from_float<T>(NAN);
    return;
  }
  const int keys_seen = static_cast<int>(position) + 1;
  const int share = share_of(keys_seen, splits), blocks = splits == 1 ? 1 : (keys_seen + share - 1) / share;
  if (split >= blocks) return;
  const int begin = split * share, count = min(share, keys_seen - begin);
  const int fresh = split == blocks - 1;  // whether, and how many times, the new key is in this share: as its first
  const int warp_share = (count + kWarps - 1) / kWarps, warp_begin = warp * warp_share;
  const int warp_count = min(warp_share, count - warp_begin);  // may be negative

  float* query = shared;                                                             // (dim)
  float* partial = query + dim;                                                      // (kThreads, kVector)
  float* warp_largest = partial + kThreads * kVector;                                // (kWarps)
  float* warp_sums = warp_largest + kWarps;                                          // (kWarps)
  float* weights = warp_sums + kWarps + warp * tile;                                 // (kWarps, tile)
  Cache* first_tile = reinterpret_cast<Cache*>(warp_sums + kWarps + kWarps * tile);  // (kWarps, 2, tile, dim)
  Cache* tile_keys = first_tile + warp * 2 * tile * dim;
  Cache* tile_values = tile_keys + tile * dim;

  Cache* keys = static_cast<Cache*>(p.keys) + slot * p.slot_stride + head * p.head_stride;
  Cache* values = static_cast<Cache*>(p.values) + slot * p.slot_stride + head * p.head_stride;
  if (column > 0) {
    // Of the window's positions before this one; a warp takes every second key, or every second value.
    for (int before = warp / 2; before < column; before += kWarps / 2) {
      const bool is_key = warp % 2 == 0;
      const T* from = qkv - (column - before) * column_stride + (is_key ? 1 : 2) * p.heads * dim;
      Pairs earlier = load_pairs(from, dim);
      const int64_t at = first_position + before;
      const float* rope = !is_key || p.rope == nullptr ? nullptr : p.rope + at * dim;
      normalise_and_rotate<T>(earlier, is_key ? p.k_norm_weight : nullptr, p.norm_eps, rope, dim);
      store_pairs((is_key ? keys : values) + at * dim, earlier, dim);
    }
    __syncthreads();
  }
  // Begins to copy what belongs into a tile: old keys or values from number `first` of this warp's share on.
  const int64_t old = static_cast<int64_t>(begin + warp_begin - fresh) * dim;
  const auto begin_copy = [&](Cache* target, const Cache* source, int first) {
    const int skip = first == 0 && warp == 0 ? fresh : 0, wanted = min(tile, warp_count - first) - skip;
    if (wanted > 0) copy_run(target + skip * dim, source + old + (first + skip) * dim, wanted * dim);
    cp_async_commit();
  };
  begin_copy(tile_keys, keys, 0);
  begin_copy(tile_values, values, 0);

  if (part == 0 || (part < 3 && fresh)) {
    const float* weight = part == 0 ? p.q_norm_weight : part == 1 ? p.k_norm_weight : nullptr;
    const float* rope = part == 2 || p.rope == nullptr ? nullptr : p.rope + position * dim;
    normalise_and_rotate<T>(x, weight, p.norm_eps, rope, dim);
    Cache* in_tile = part == 1 ? first_tile : first_tile + tile * dim;
    Cache* in_cache = (part == 1 ? keys : values) + position * dim;
    if (part == 0) {
      store_pairs(query, x, dim);
    } else {
      store_pairs(in_tile, x, dim);
      store_pairs(in_cache, x, dim);
    }
  }
  __syncthreads();  // query, new key and new value are there

  const int groups = 32 / chunks, group = lane / chunks, channel = lane % chunks * kVector;
  float largest = -FLT_MAX;  // finite: scores of -inf weigh nothing, and nothing else in their share is lost
  float sum = 0, accumulator[kVector] = {};
  for (int first = 0; first < warp_count; first += tile) {
    const int here = min(tile, warp_count - first);
    cp_async_wait<1>();  // for keys; values may still be on their way
    __syncwarp();
    float score[kKeys];
    score_keys(tile_keys, here, chunks, query, p.scale, score);
    __syncwarp();  // the keys have been read
    begin_copy(tile_keys, keys, first + tile);

    float largest_here = largest;
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      if (kPass * k + lane / kLanes < here) largest_here = fmaxf(largest_here, score[k]);
    }
    largest_here = warp_max(largest_here);
    const float rescale = __expf(largest - largest_here);
    largest = largest_here;
    sum *= rescale;
#pragma unroll
    for (int d = 0; d < kVector; ++d) accumulator[d] *= rescale;
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      const int j = kPass * k + lane / kLanes;
      if (j < here && lane % kLanes == 0) {
        const float weight = __expf(score[k] - largest);
        weights[j] = weight;
        sum += weight;
      }
    }

    cp_async_wait<1>();  // for values; the next keys may still be on their way
    __syncwarp();        // also for the weights
    if (group < groups) {
#pragma unroll 1
      for (int next = group; next < here; next += kRows * groups) {
        PackedEight<Cache> rows[kRows];
        float weight[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int j = next + i * groups;
          if (j < here) rows[i] = load_eight(tile_values + j * dim + channel), weight[i] = weights[j];
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (next + i * groups >= here) break;
          float x[kVector];
          widen(rows[i], x);
#pragma unroll
          for (int d = 0; d < kVector; ++d) accumulator[d] += weight[i] * x[d];
        }
      }
    }
    __syncwarp();  // the values have been read
    begin_copy(tile_values, values, first + tile);
  }
  cp_async_wait<0>();  // there is nothing left
  sum = warp_sum(sum);
  if (lane == 0) warp_largest[warp] = largest, warp_sums[warp] = sum;
#pragma unroll
  for (int d = 0; d < kVector; d += 4) {
    *reinterpret_cast<float4*>(partial + tid * kVector + d) =
        make_float4(accumulator[d], accumulator[d + 1], accumulator[d + 2], accumulator[d + 3]);
  }
  __syncthreads();

  largest = -FLT_MAX, sum = 0;
  for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, warp_largest[w]);
  for (int w = 0; w < kWarps; ++w) sum += __expf(warp_largest[w] - largest) * warp_sums[w];
  float* mine = blocks == 1 ? nullptr : share_result(p, split);
  if (tid < dim) {
    float total = 0, of_warp[kWarps] = {};
#pragma unroll 2
    for (int g = 0; g < groups; ++g) {  // each has dim channels
#pragma unroll
      for (int w = 0; w < kWarps; ++w) of_warp[w] += partial[w * 32 * kVector + g * dim + tid];
    }
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += __expf(warp_largest[w] - largest) * of_warp[w];
    if (blocks == 1)
      out[tid] = from_float<T>(total / sum);
    else
      mine[2 + tid] = total;
  }
  if (blocks == 1) return;
  if (tid == 0) mine[0] = largest, mine[1] = sum;
  if (is_last(p.arrivals + query_number(p), blocks)) merge_shares(p, out, blocks);
}

template <class T, class Cache>
void launch(const CachedAttentionParams& p, void* stream) {
  const int64_t share = share_of(static_cast<int>(p.capacity), static_cast<int>(p.splits));
  const int64_t bytes = p.rows * p.columns * p.heads * p.splits <= kFewBlocks ? kBytesOfFew : kBytesOfMany;
  const int64_t key_bytes = kWarps * 2 * p.head_dim * sizeof(Cache);
  int64_t tile = std::min<int64_t>((std::min(share, p.capacity) + kWarps - 1) / kWarps, kKeys * kPass);
  tile = (std::min(tile, bytes / key_bytes) + 1) / 2 * 2;  // even, so that every tile is aligned to 16 bytes
  const size_t floats = p.head_dim + kThreads * kVector + 2 * kWarps + kWarps * tile;
  const size_t shared_bytes = floats * sizeof(float) + tile * key_bytes;
  const auto kernel = cached_attention_kernel<T, Cache>;
  allow_shared_bytes(kernel, shared_bytes);
  const dim3 grid(static_cast<unsigned>(p.rows * p.heads), static_cast<unsigned>(p.splits),
                  static_cast<unsigned>(p.columns));
  ALITOK_LAUNCH_EARLY(kernel, grid, kThreads, shared_bytes, stream, p, static_cast<int>(tile));
}

template <class T>
void launch_for_cache(const CachedAttentionParams& p, void* stream) {
  if (p.cache_dtype == CachedAttentionDtype::e4m3) return launch<T, e4m3>(p, stream);
  launch<T, T>(p, stream);
}

}  // namespace

int64_t cached_attention_multiprocessors() {
  int device = 0, count = 0;
  ALITOK_CUDA_CHECK(cudaGetDevice(&device));
  ALITOK_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

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
