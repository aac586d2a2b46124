// CUDA kernels of vq_lookup. A block scores its kFeatures features against all codes, kCodes at a time, as a matrix
// product in fp32: 16 x 16 threads with 8 x 8 scores each, operands through double-buffered shared memory. Scores go
// from registers into the running minima; nothing of size (N, K) is written.
#include "vq_lookup.h"

#include "cuda_kernel.h"

namespace alitok {
namespace {

constexpr int kThreads = 256;
constexpr int kSide = 16;  // threads along features and along codes
constexpr int kThreadFeatures = 8, kThreadCodes = 4;
constexpr int kFeatures = kSide * kThreadFeatures;
constexpr int kCodes = kSide * kThreadCodes;
static_assert(kFeatures == kVqLookupBlock);
constexpr int kChannels = 16;           // in shared memory at a time
constexpr int kStride = kChannels + 4;  // floats; eight threads reading float4 of eight rows meet no bank twice
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

struct Workspace {
  double* squares;    // (blocks) sums of squared distances
  float* half_norms;  // (K)
};

int64_t blocks_of(int64_t features) { return (features + kFeatures - 1) / kFeatures; }

Workspace workspace_of(const VqLookupParams& p) {
  double* squares = static_cast<double*>(p.workspace);
  return {squares, reinterpret_cast<float*>(squares + blocks_of(p.features))};
}

__device__ float half_norm(const float* row, int64_t channels) {
  double sum = 0;
  for (int64_t c = 0; c < channels; ++c) sum += static_cast<double>(row[c]) * row[c];
  return static_cast<float>(sum / 2);
}

__global__ void prepare(VqLookupParams p, Workspace workspace) {
  const int64_t k = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (k >= p.codes) return;
  workspace.half_norms[k] = half_norm(p.codebook + k * p.channels, p.channels);
  p.usage[k] = 0;
  if (p.closest != nullptr) p.closest[k] = static_cast<int64_t>(kNoFeature);
}

// One step's operands: rows of kChannels channels; zeros beyond the last row and the last channel.
struct alignas(16) Stage {
  float features[kFeatures * kStride];
  float codes[kCodes * kStride];
};

// Start copying kRows rows of a (rows, channels) matrix, from `first` on. Width: floats a copy, 4 where rows allow it.
template <int kRows, int Width>
__device__ void load_rows(float* shared, const float* matrix, int64_t first, int64_t rows, int64_t first_channel,
                          int64_t channels) {
  constexpr int kCopies = kChannels / Width;  // of one row
  for (int i = threadIdx.x; i < kRows * kCopies; i += kThreads) {
    const int row = i / kCopies, channel = i % kCopies * Width;
    const bool valid = first + row < rows && first_channel + channel < channels;
    const float* source = valid ? matrix + (first + row) * channels + first_channel + channel : matrix;
    cp_async<Width * 4>(shared + row * kStride + channel, source, valid);
  }
}

// Subtract the products of kChannels channels from a thread's scores.
__device__ void multiply(const Stage& stage, int row, int column, float (&score)[kThreadFeatures][kThreadCodes]) {
#pragma unroll
  for (int c = 0; c < kChannels; c += 4) {
    float4 z[kThreadFeatures];
#pragma unroll
    for (int i = 0; i < kThreadFeatures; ++i) {
      z[i] = *reinterpret_cast<const float4*>(&stage.features[(i * kSide + row) * kStride + c]);
    }
#pragma unroll
    for (int j = 0; j < kThreadCodes; ++j) {
      const float4 e = *reinterpret_cast<const float4*>(&stage.codes[(j * kSide + column) * kStride + c]);
#pragma unroll
      for (int i = 0; i < kThreadFeatures; ++i) {
        score[i][j] = fmaf(-z[i].x, e.x, score[i][j]);
        score[i][j] = fmaf(-z[i].y, e.y, score[i][j]);
        score[i][j] = fmaf(-z[i].z, e.z, score[i][j]);
        score[i][j] = fmaf(-z[i].w, e.w, score[i][j]);
      }
    }
  }
}

// Offer the best of a thread's features to its code j. Offers that are too late, nearly all, cost a read and no atomic.
__device__ void offer(unsigned long long* key, int j, const float (&score)[kThreadFeatures][kThreadCodes],
                      uint32_t first_feature) {
  float least = score[0][j];
#pragma unroll
  for (int i = 1; i < kThreadFeatures; ++i) least = fminf(least, score[i][j]);
  if (!(least < INFINITY)) return;
  const uint32_t bits = __float_as_uint(least + 0.0f);  // -0 becomes 0
  if (relaxed_load(key) < closest_key(bits, first_feature)) return;
  uint32_t feature = first_feature;
#pragma unroll
  for (int i = kThreadFeatures - 1; i >= 0; --i) {
    if (score[i][j] == least) feature = first_feature + i * kSide;
  }
  atomicMin(key, static_cast<unsigned long long>(closest_key(bits, feature)));
}

__device__ bool precedes(float score, int index, float other_score, int other_index) {
  return score < other_score || (score == other_score && index < other_index);
}

// Sum over the block in a fixed order; the result is thread 0's.
__device__ double block_sum(double value) {
  __shared__ double warps[kWarps];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(kAllLanes, value, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; threadIdx.x == 0 && warp < kWarps; ++warp) sum += warps[warp];
  return sum;
}

template <int Width>
__global__ void __launch_bounds__(kThreads, 2) lookup(VqLookupParams p, Workspace workspace) {
  __shared__ Stage stages[2];
  __shared__ float feature_half_norms[kFeatures];
  __shared__ int nearest[kFeatures];

  const int thread = threadIdx.x, column = thread % kSide, row = thread / kSide;
  const int64_t first_feature = int64_t{blockIdx.x} * kFeatures;
  const int64_t chunks = (p.channels + kChannels - 1) / kChannels;
  const int64_t steps = (p.codes + kCodes - 1) / kCodes * chunks;

  auto load = [&](int64_t step) {
    Stage& stage = stages[step % 2];
    const int64_t channel = step % chunks * kChannels;
    load_rows<kFeatures, Width>(stage.features, p.z, first_feature, p.features, channel, p.channels);
    load_rows<kCodes, Width>(stage.codes, p.codebook, step / chunks * kCodes, p.codes, channel, p.channels);
    cp_async_commit();
  };

  load(0);
  if (thread < kFeatures) {
    // Features past the end are at infinity: they are nobody's closest.
    const int64_t n = first_feature + thread;
    feature_half_norms[thread] = n < p.features ? half_norm(p.z + n * p.channels, p.channels) : INFINITY;
  }
  float best[kThreadFeatures], score[kThreadFeatures][kThreadCodes];
  int best_code[kThreadFeatures];
#pragma unroll
  for (int i = 0; i < kThreadFeatures; ++i) {
    best[i] = INFINITY;
    best_code[i] = 0;
  }

  for (int64_t step = 0; step < steps; ++step) {
    // The barrier shows everyone's copies for this step, and that all are done with the buffer that the next one fills.
    cp_async_wait<0>();
    __syncthreads();
    if (step + 1 < steps) load(step + 1);

    const int64_t first_code = step / chunks * kCodes + column;
    if (step % chunks == 0) {
#pragma unroll
      for (int j = 0; j < kThreadCodes; ++j) {
        const int64_t k = first_code + j * kSide;
        const float half = k < p.codes ? workspace.half_norms[k] : INFINITY;
#pragma unroll
        for (int i = 0; i < kThreadFeatures; ++i) score[i][j] = half;
      }
    }
    multiply(stages[step % 2], row, column, score);
    if (step % chunks < chunks - 1) continue;

#pragma unroll
    for (int j = 0; j < kThreadCodes; ++j) {
      const int64_t k = first_code + j * kSide;
#pragma unroll
      for (int i = 0; i < kThreadFeatures; ++i) {
        if (score[i][j] < best[i]) {
          best[i] = score[i][j];
          best_code[i] = static_cast<int>(k);
        }
        score[i][j] += feature_half_norms[i * kSide + row];
      }
      if (p.closest == nullptr || k >= p.codes) continue;
      offer(reinterpret_cast<unsigned long long*>(p.closest + k), j, score, static_cast<uint32_t>(first_feature + row));
    }
  }

#pragma unroll
  for (int i = 0; i < kThreadFeatures; ++i) {
    for (int offset = kSide / 2; offset > 0; offset /= 2) {
      const float other = __shfl_xor_sync(kAllLanes, best[i], offset);
      const int other_code = __shfl_xor_sync(kAllLanes, best_code[i], offset);
      if (precedes(other, other_code, best[i], best_code[i])) {
        best[i] = other;
        best_code[i] = other_code;
      }
    }
    const int64_t n = first_feature + i * kSide + row;
    if (column == 0 && n < p.features) {
      nearest[i * kSide + row] = best_code[i];
      p.indices[n] = best_code[i];
      atomicAdd(reinterpret_cast<unsigned long long*>(&p.usage[best_code[i]]), 1ull);
    }
  }
  __syncthreads();

  const int64_t features_here = min(int64_t{kFeatures}, p.features - first_feature);
  double squares = 0;
  for (int64_t i = thread; i < features_here * p.channels; i += kThreads) {
    const float code = p.codebook[nearest[i / p.channels] * p.channels + i % p.channels];
    const int64_t at = first_feature * p.channels + i;
    const double difference = static_cast<double>(code) - p.z[at];
    squares += difference * difference;
    p.quantized[at] = code;
  }
  squares = block_sum(squares);
  if (thread == 0) workspace.squares[blockIdx.x] = squares;
}

__global__ void finish(VqLookupParams p, Workspace workspace, int64_t blocks) {
  const int64_t k = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (p.closest != nullptr && k < p.codes) {
    p.closest[k] = closest_feature(static_cast<uint64_t>(p.closest[k]), p.features);
  }
  if (blockIdx.x > 0) return;
  double sum = 0;
  for (int64_t b = threadIdx.x; b < blocks; b += kThreads) sum += workspace.squares[b];
  sum = block_sum(sum);
  if (threadIdx.x > 0) return;
  const double elements = static_cast<double>(p.features) * static_cast<double>(p.channels);
  *p.loss = p.features > 0 ? static_cast<float>((1.0 + p.commitment) * sum / elements) : 0.0f;
}

__device__ float loss_scale(const VqLookupBackwardParams& p) {
  const double elements = static_cast<double>(p.features) * static_cast<double>(p.channels);
  return p.features > 0 ? static_cast<float>(2.0 / elements * *p.grad_loss) : 0.0f;
}

// An index that is no code's reads nothing: its feature's gradient is NaN, and no code's gradient counts the feature.
__global__ void feature_gradient(VqLookupBackwardParams p) {
  const float scale = p.commitment * loss_scale(p);
  const int64_t size = p.features * p.channels;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < size; i += int64_t{gridDim.x} * kThreads) {
    const int64_t index = p.indices[i / p.channels];
    const bool valid = index >= 0 && index < p.codes;
    const float code = valid ? p.codebook[index * p.channels + i % p.channels] : NAN;
    p.grad_z[i] = p.grad_quantized[i] + scale * (p.z[i] - code);
  }
}

// A block owns kOwned codes and 32 channels, a warp of it one eighth of the features, which it takes in order, so that
// every sum has one order. Lanes look at 32 indices at once, then work as 32 channels on each index that is theirs.
constexpr int kOwned = 32;

__global__ void __launch_bounds__(kThreads) codebook_gradient(VqLookupBackwardParams p) {
  __shared__ float sums[kWarps][kOwned][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_code = int64_t{blockIdx.x} * kOwned, channel = int64_t{blockIdx.y} * 32 + lane;
  for (int code = 0; code < kOwned; ++code) sums[warp][code][lane] = 0;

  const int64_t share = (p.features + kWarps - 1) / kWarps;
  const int64_t end = min(p.features, (warp + 1) * share);
  for (int64_t n = warp * share; n < end; n += 32) {
    const int64_t index = n + lane < end ? p.indices[n + lane] : -1, mine = index < 0 ? -1 : index - first_code;
    unsigned found = __ballot_sync(kAllLanes, mine >= 0 && mine < kOwned && index < p.codes);
    while (found != 0) {
      const int source = __ffs(found) - 1;
      found &= found - 1;
      const int code = static_cast<int>(__shfl_sync(kAllLanes, static_cast<int>(mine), source));
      if (channel < p.channels) {
        sums[warp][code][lane] +=
            p.codebook[(first_code + code) * p.channels + channel] - p.z[(n + source) * p.channels + channel];
      }
    }
  }
  __syncthreads();

  const float scale = loss_scale(p);
  for (int code = warp; code < kOwned && first_code + code < p.codes; code += kWarps) {
    float sum = 0;
    for (int part = 0; part < kWarps; ++part) sum += sums[part][code][lane];
    if (channel < p.channels) p.grad_codebook[(first_code + code) * p.channels + channel] = scale * sum;
  }
}

bool aligned_rows(const VqLookupParams& p) {
  const auto address = reinterpret_cast<uintptr_t>(p.z) | reinterpret_cast<uintptr_t>(p.codebook);
  return p.channels % 4 == 0 && address % 16 == 0;
}

unsigned grid_of(int64_t items, int64_t block) { return static_cast<unsigned>((items + block - 1) / block); }

}  // namespace

void vq_lookup_cuda(const VqLookupParams& p, void* stream) {
  const Workspace workspace = workspace_of(p);
  const int64_t blocks = blocks_of(p.features);
  const unsigned code_blocks = grid_of(p.codes, kThreads);
  ALITOK_LAUNCH(prepare, code_blocks, kThreads, 0, stream, p, workspace);
  if (blocks > 0) {
    const auto grid = static_cast<unsigned>(blocks);
    if (aligned_rows(p)) {
      ALITOK_LAUNCH(lookup<4>, grid, kThreads, 0, stream, p, workspace);
    } else {
      ALITOK_LAUNCH(lookup<1>, grid, kThreads, 0, stream, p, workspace);
    }
  }
  ALITOK_LAUNCH(finish, code_blocks, kThreads, 0, stream, p, workspace, blocks);
}

void vq_lookup_backward_cuda(const VqLookupBackwardParams& p, void* stream) {
  constexpr int64_t kMostBlocks = 4096;  // each thread strides over the rest
  const int64_t elements = p.features * p.channels;
  if (elements > 0) {
    const unsigned grid = grid_of(elements < kMostBlocks * kThreads ? elements : kMostBlocks * kThreads, kThreads);
    ALITOK_LAUNCH(feature_gradient, grid, kThreads, 0, stream, p);
  }
  const dim3 grid(grid_of(p.codes, kOwned), grid_of(p.channels, 32));
  ALITOK_LAUNCH(codebook_gradient, grid, kThreads, 0, stream, p);
}

}  // namespace alitok
