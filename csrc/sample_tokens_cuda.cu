// Guidance, temperature, top-k, top-p and draw on CUDA: one block for each image, one launch. Without top-k and top-p
// the logits are read once and held nowhere; with them the guided row lies in shared memory, or, where it is too long
// for that, is read and guided again for each step of the search.
//
// In the sampling loop (sample_tokens_next) the block also writes its token and what is fed next. A window has a block for
// each of its positions, and a second, small launch that keeps the draws whose inputs had been guessed rightly.
#include "cuda_kernel.h"
#include "sample_math.h"
#include "sample_tokens.h"

namespace alitok {
namespace {

constexpr int kWarp = 32, kMaxWarps = 32, kMaxThreads = kWarp * kMaxWarps;
constexpr int kGroup = 4;                       // codes that share a Philox counter
constexpr int64_t kMaxSharedBytes = 96 * 1024;  // what every device from sm_80 on has
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
struct alignas(kGroup * sizeof(T)) Group {
  T value[kGroup];
};

// The guided logits of one image.
template <class T>
struct Row {
  const T* c;
  const T* u;  // null: no guidance
  float scale;
  int64_t codes;
  bool aligned;  // to whole groups

  __device__ float at(int64_t k) const {
    return u == nullptr ? to_float(c[k]) : guided(to_float(c[k]), to_float(u[k]), scale);
  }

  // Codes k .. k + 3; -inf behind the last one.
  __device__ void load(int64_t k, float (&x)[kGroup]) const {
    if (!aligned || k + kGroup > codes) {
      for (int i = 0; i < kGroup; ++i) x[i] = k + i < codes ? at(k + i) : -kInfinity;
      return;
    }
    const auto conditional = *reinterpret_cast<const Group<T>*>(c + k);
    if (u == nullptr) {
      for (int i = 0; i < kGroup; ++i) x[i] = to_float(conditional.value[i]);
      return;
    }
    const auto unconditional = *reinterpret_cast<const Group<T>*>(u + k);
    for (int i = 0; i < kGroup; ++i) {
      x[i] = guided(to_float(conditional.value[i]), to_float(unconditional.value[i]), scale);
    }
  }
};

// One draw: of image b, the column `column` of its window, for the token at `step`.
struct Draw {
  int64_t b, column, step;
  SampleRule rule;
  bool guided;
  float scale;
};

__device__ Draw plain_draw(const SampleTokensParams& p, int64_t b) {
  const bool guided = p.guidance_scale.data != nullptr;
  return {b, 0, of_image(p.step, b), rule_of(p.settings, b), guided, guided ? of_image(p.guidance_scale, b) : 0.0f};
}

// An image whose unconditional row rests has no guidance.
__device__ Draw next_draw(const SampleTokensParams& p, int64_t b, int64_t column, int64_t step) {
  const bool guided = p.guidance_scale.data != nullptr && p.next.positions[p.batch + b] >= 0;
  const float scale = guided ? p.guidance_scale.data[b * p.guidance_scale.stride + step] : 0.0f;
  return {b, column, step, rule_of(p.settings, b), guided, scale};
}

template <class T>
__device__ Row<T> row_of(const SampleTokensParams& p, const Draw& d) {
  const int64_t columns = p.next.tokens == nullptr ? 1 : p.next.window;
  const T* c = static_cast<const T*>(p.logits) + (d.b * columns + d.column) * p.row_stride;
  const T* u = d.guided ? c + p.batch * columns * p.row_stride : nullptr;
  const uintptr_t misaligned = (reinterpret_cast<uintptr_t>(c) | reinterpret_cast<uintptr_t>(u)) % sizeof(Group<T>);
  return {c, u, d.scale, p.codes, misaligned == 0};
}

// Reduces over the block and gives every thread the result. The scratch has two halves, used in turn, so that one
// barrier a call is enough: a thread that already writes the next result cannot meet one that still reads this one.
template <class V>
struct BlockReduce {
  V* scratch;  // 2 * kMaxWarps
  int turn = 0;

  template <class Combine>
  __device__ V operator()(V value, V neutral, const Combine& combine) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    V* half = scratch + turn * kMaxWarps;
    turn ^= 1;
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value = combine(value, shuffle(value, offset));
    if (lane == 0) half[warp] = value;
    __syncthreads();
    value = lane < warps ? half[lane] : neutral;
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value = combine(value, shuffle(value, offset));
    return value;
  }

  __device__ static V shuffle(V value, int offset) { return __shfl_xor_sync(kAllLanes, value, offset); }
};

// A score and its code in one number: the larger score wins, then the lower code.
__device__ __forceinline__ int64_t ranked(float score, int64_t code) {
  return static_cast<int64_t>(order_key(score)) * (int64_t{1} << 32) + (0x7FFFFFFF - code);
}
__device__ __forceinline__ int64_t ranked_code(int64_t rank) { return 0x7FFFFFFF - (rank & 0xFFFFFFFF); }

struct Largest {
  __device__ int64_t operator()(int64_t a, int64_t b) const { return a > b ? a : b; }
};
struct Sum {
  __device__ int64_t operator()(int64_t a, int64_t b) const { return a + b; }
};

// Calls f(k, x) for each group of four codes of this thread.
template <class Source, class F>
__device__ __forceinline__ void for_each_group(const Source& source, int64_t codes, const F& f) {
  for (int64_t k = int64_t{kGroup} * threadIdx.x; k < codes; k += int64_t{kGroup} * blockDim.x) {
    float x[kGroup];
    source.load(k, x);
    f(k, x);
  }
}

// A guided row in shared memory, padded with -inf to whole groups. Each thread reads back only what it wrote.
struct SharedRow {
  float* x;
  __device__ void load(int64_t k, float (&out)[kGroup]) const {
    const float4 group = *reinterpret_cast<const float4*>(x + k);
    out[0] = group.x, out[1] = group.y, out[2] = group.z, out[3] = group.w;
  }
};

// The smallest logit that top-k, then top-p keep.
template <class Source>
__device__ float keep_threshold(const Source& source, const SampleRule& rule, int64_t codes, float largest,
                                BlockReduce<int64_t>& reduce) {
  float threshold = -kInfinity;
  if (rule.top_k > 0 && rule.top_k < codes) {
    threshold = largest_threshold(-kInfinity, largest, [&](float t) {
      int64_t count = 0;
      for_each_group(source, codes, [&](int64_t, const float (&x)[kGroup]) {
        for (int i = 0; i < kGroup; ++i) count += x[i] >= t;
      });
      return reduce(count, 0, Sum()) - rule.top_k;
    });
  }
  if (rule.top_p < 1) {
    const float scale = softmax_scale(rule.temperature);
    const auto mass_above = [&](float t) {
      int64_t mass = 0;
      for_each_group(source, codes, [&](int64_t, const float (&x)[kGroup]) {
        for (int i = 0; i < kGroup; ++i) mass += x[i] >= t ? softmax_weight(x[i] - largest, scale) : 0;
      });
      return static_cast<double>(reduce(mass, 0, Sum()));
    };
    const double wanted = rule.top_p * mass_above(threshold);
    threshold = largest_threshold(threshold, largest, [&](float t) { return mass_above(t) >= wanted ? 1 : -1; });
  }
  return threshold;
}

// The noise's place in a row: seed, step and image id, once for each thread.
__device__ SampleKey key_of(const SampleTokensParams& p, const Draw& d) {
  return {static_cast<uint64_t>(of_image(p.settings.seed, d.b)),
          static_cast<uint64_t>(of_image(p.settings.image_id, d.b)), static_cast<uint32_t>(d.step)};
}

// Rank of the best code among those at or above `threshold`; also tells whether all logits were numbers below +inf.
template <class Source>
__device__ int64_t best_code(const Source& source, int64_t codes, float temperature, const SampleKey& key,
                             float threshold, BlockReduce<int64_t>& reduce) {
  const uint32_t id_low = static_cast<uint32_t>(key.image_id), id_high = static_cast<uint32_t>(key.image_id >> 32);
  const int64_t none = ranked(-kInfinity, -1);
  int64_t best = none;
  bool wrong = false;
  for_each_group(source, codes, [&](int64_t k, const float (&x)[kGroup]) {
    Philox4x32 noise = {};
    if (temperature > 0) {
      noise = philox4x32(key.seed, static_cast<uint32_t>(k / kGroup) | kPhiloxSample, key.step, id_low, id_high);
    }
    for (int i = 0; i < kGroup; ++i) {
      wrong |= !is_logit(x[i]);
      if (!(x[i] >= threshold) || x[i] == -kInfinity) continue;
      const float score = temperature > 0 ? fmaf(temperature, gumbel(noise.word[i]), x[i]) : x[i] + 0.0f;
      const int64_t rank = ranked(score, k + i);
      best = rank > best ? rank : best;
    }
  });
  // One reduction for both: above every rank is the mark of a row that is no distribution.
  constexpr int64_t kWrong = INT64_MAX;
  best = reduce(wrong ? kWrong : best, none, Largest());
  return best == kWrong || best == none ? -1 : ranked_code(best);
}

// The code of a draw, to every thread of its block; -1 where its row is no distribution, or its rule none.
template <class T, bool Shared>
__device__ __forceinline__ int64_t sampled_code(const SampleTokensParams& p, const Draw& d, int64_t* scratch) {
  if (!is_rule(d.rule)) return -1;
  const Row<T> row = row_of<T>(p, d);
  const float temperature = d.rule.temperature;
  BlockReduce<int64_t> reduce{scratch};
  if (!filters(d.rule, p.codes)) return best_code(row, p.codes, temperature, key_of(p, d), -kInfinity, reduce);
  ALITOK_DYNAMIC_SHARED(float, held);
  // The largest logit first: top-p weighs against it, and it tells rows that are no distribution.
  int64_t largest_rank = ranked(-kInfinity, -1);
  for_each_group(row, p.codes, [&](int64_t k, const float (&x)[kGroup]) {
    if constexpr (Shared) *reinterpret_cast<float4*>(held + k) = make_float4(x[0], x[1], x[2], x[3]);
    for (int i = 0; i < kGroup; ++i) {
      const int64_t rank = ranked(is_logit(x[i]) ? x[i] : kInfinity, 0);
      largest_rank = rank > largest_rank ? rank : largest_rank;
    }
  });
  largest_rank = reduce(largest_rank, ranked(-kInfinity, -1), Largest());
  const float largest = order_value(static_cast<int32_t>(largest_rank >> 32));
  if (largest == kInfinity || largest == -kInfinity) return -1;
  const auto draw_from = [&](const auto& source) {
    const float threshold = keep_threshold(source, d.rule, p.codes, largest, reduce);
    return best_code(source, p.codes, temperature, key_of(p, d), threshold, reduce);
  };
  if constexpr (Shared) {
    return draw_from(SharedRow{held});
  } else {
    return draw_from(row);
  }
}

// What the rows of image b are fed next, at `position`: its last token is certain; then come `count` draws that were not
// kept (in a prompt these are its tokens), what stands in the sequence, and where that is no code the one before again.
// At the end of the sequence the rows rest.
__device__ void feed(const SampleTokensParams& p, int64_t b, int64_t position, int64_t last, const int64_t* draws,
                     int64_t count) {
  const SampleNextParams& next = p.next;
  const int64_t rows = p.guidance_scale.data != nullptr && next.positions[p.batch + b] >= 0 ? 2 : 1;
  const int64_t* follows = next.tokens + b * next.length + position - 1;
  const int64_t left = next.length - position;
  for (int64_t row = b, r = 0; r < rows; ++r, row += p.batch) {
    int64_t* ids = p.ids + row * next.columns;
    next.positions[row] = position < next.length ? position : -1;
    ids[0] = last > 0 ? last : 0;
    for (int64_t w = 1; w < next.window; ++w) {
      const int64_t guess = w <= count ? draws[w - 1] : w <= left ? follows[w] : -1;
      ids[w] = guess >= 0 && guess < p.codes ? guess : ids[w - 1];
    }
  }
}

template <class T, bool Shared>
__global__ void __launch_bounds__(kMaxThreads, 1) sample_tokens_kernel(const SampleTokensParams p) {
  __shared__ int64_t scratch[2 * kMaxWarps];
  let_next_kernel_begin();
  wait_for_kernel_ahead();
  const int64_t b = blockIdx.x, column = blockIdx.y;
  const SampleNextParams& next = p.next;
  if (next.tokens == nullptr) {
    const int64_t code = sampled_code<T, Shared>(p, plain_draw(p, b), scratch);
    if (threadIdx.x == 0) p.ids[b] = code;
    return;
  }
  const int64_t position = next.positions[b], step = position + column;
  if (position < 0 || position >= next.length - column) return;
  int64_t* token = next.tokens + b * next.length + step;
  const bool given = step < next.prompt_lengths[b];
  const int64_t code = given ? *token : sampled_code<T, Shared>(p, next_draw(p, b, column, step), scratch);
  __syncthreads();  // everyone has read what is written now
  if (threadIdx.x > 0) return;
  if (next.window > 1) {
    next.draws[b * next.window + column] = code;
    return;
  }
  *token = code;
  ++next.passes_done[b];
  feed(p, b, step + 1, code, nullptr, 0);
}

// A thread for each image: keeps the draws of its window whose inputs were right.
__global__ void keep_draws_kernel(const SampleTokensParams p) {
  let_next_kernel_begin();
  wait_for_kernel_ahead();
  const SampleNextParams& next = p.next;
  const int64_t b = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (b >= p.batch) return;
  const int64_t position = next.positions[b];
  if (position < 0 || position >= next.length) return;
  const int64_t left = next.length - position, columns = left < next.window ? left : next.window;
  const int64_t *ids = p.ids + b * next.columns, *draws = next.draws + b * next.window;
  const bool guided = p.guidance_scale.data != nullptr && next.positions[p.batch + b] >= 0;
  const int64_t* other_ids = guided ? ids + p.batch * next.columns : ids;
  int64_t* tokens = next.tokens + b * next.length + position;
  int64_t kept = 0;
  do {
    tokens[kept] = draws[kept];
    ++kept;
  } while (kept < columns && ids[kept] == draws[kept - 1] && other_ids[kept] == draws[kept - 1]);
  ++next.passes_done[b];
  feed(p, b, position + kept, draws[kept - 1], draws + kept, columns - kept);
}

template <class T>
void launch(const SampleTokensParams& p, void* stream) {
  const int64_t groups = (p.codes + kGroup - 1) / kGroup;
  const int64_t warps = (groups + kWarp - 1) / kWarp;
  const unsigned threads = kWarp * static_cast<unsigned>(warps < kMaxWarps ? warps : kMaxWarps);
  const bool next = p.next.tokens != nullptr;
  const dim3 grid(static_cast<unsigned>(p.batch), next ? static_cast<unsigned>(p.next.window) : 1);
  const int64_t bytes = groups * kGroup * sizeof(float);
  if (bytes <= kMaxSharedBytes) {
    allow_shared_bytes(sample_tokens_kernel<T, true>, bytes);
    ALITOK_LAUNCH_EARLY((sample_tokens_kernel<T, true>), grid, threads, bytes, stream, p);
  } else {
    ALITOK_LAUNCH_EARLY((sample_tokens_kernel<T, false>), grid, threads, 0, stream, p);
  }
  if (next && p.next.window > 1) {
    const unsigned blocks = static_cast<unsigned>((p.batch + kWarp - 1) / kWarp);
    ALITOK_LAUNCH_EARLY(keep_draws_kernel, blocks, kWarp, 0, stream, p);
  }
}

}  // namespace

void sample_tokens_cuda(const SampleTokensParams& p, void* stream) {
  switch (p.dtype) {
    case LogitsDtype::float32: return launch<float>(p, stream);
    case LogitsDtype::bfloat16: return launch<__nv_bfloat16>(p, stream);
    case LogitsDtype::float16: return launch<__half>(p, stream);
  }
}

}  // namespace alitok
