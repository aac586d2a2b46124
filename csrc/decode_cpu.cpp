// CPU kernel of decode: one parallel region for a step, or for many with their draws. Each thread owns fixed panels of every matrix, so that it
// streams through its own part of the arena, and meets the others at a barrier where a phase needs all of the last one.
#include "decode.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <mutex>
#include <new>
#include <utility>

#include "decode_matmul.h"
#include "simd.h"

namespace alitok {
namespace ALITOK_ISA {
namespace {

// ---- threads ----

struct Range {
  int64_t begin, end;
};

// Where the threads of one step wait for each other. A thread may stand for several shares of the work, so that the step
// is right however many threads the pool really gives.
class Barrier {
 public:
  explicit Barrier(int shares) : shares_(shares) {}

  void wait(int shares) {
    if (shares == shares_) return;
    const uint32_t generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(shares, std::memory_order_acq_rel) + shares == shares_) {
      arrived_.store(0, std::memory_order_relaxed);
      {
        const std::lock_guard<std::mutex> lock(mutex_);  // no thread is between looking at the generation and sleeping
        generation_.store(generation + 1, std::memory_order_release);
      }
      condition_.notify_all();
      return;
    }
    for (int spins = 0; spins < kSpins; ++spins) {
      if (generation_.load(std::memory_order_acquire) != generation) return;
#if defined(__AVX2__)
      _mm_pause();
#endif
    }
    // A core too few: the thread that is waited for may need this one.
    std::unique_lock<std::mutex> lock(mutex_);
    condition_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != generation; });
  }

 private:
  static constexpr int kSpins = 2000;  // some 100 us, more than a phase's imbalance
  const int shares_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  std::mutex mutex_;
  std::condition_variable condition_;
};

class Worker {
 public:
  Worker(Barrier& barrier, int64_t first, int64_t last, int64_t shares)
      : barrier_(&barrier), first_(first), last_(last), shares_(shares) {}

  Range part_of(int64_t n) const { return {n * first_ / shares_, n * last_ / shares_}; }
  void wait() { barrier_->wait(static_cast<int>(last_ - first_)); }

  bool leads() const { return first_ == 0; }
  Worker with_all() const { return Worker(*barrier_, 0, shares_, shares_); }

 private:
  Barrier* barrier_;
  int64_t first_, last_, shares_;
};

class Clock {
 public:
  // Seconds since the last call, or since construction.
  double lap() {
    const auto now = std::chrono::steady_clock::now(), since = std::exchange(last_, now);
    return std::chrono::duration<double>(now - since).count();
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

// One call's dealings with the crew, shared by its threads. The one that leads keeps the times.
class Shift {
 public:
  using Mode = Crew::Mode;

  Shift(Crew& crew, const Crew::Work& work, int threads)
      : crew_(crew), work_(work), threads_(threads), modes_{{threads == 1 ? Mode::alone : crew.next(work)}, {}} {}

  // Of a step, counted from 0. All threads see the same one: it is written before they meet at the end of the step
  // before, and again two steps later, when each has read it.
  Mode mode(int64_t step) const { return modes_[step % 2].load(std::memory_order_relaxed); }

  // After a step, by the thread that leads, before all meet for the last time in it.
  void after(int64_t step) {
    const Mode done = mode(step);
    const double seconds = clock_.lap();
    Mode next = done;  // threads that have left do not come back in this call
    if (threads_ > 1) {
      done == Mode::together ? crew_.after_together(work_, seconds) : crew_.after_alone(work_, seconds);
      if (done != Mode::alone) next = crew_.next(work_);
    }
    modes_[(step + 1) % 2].store(next, std::memory_order_relaxed);
  }

  // When all threads of a call together have left.
  void part() { crew_.after_parting(work_, clock_.lap()); }

 private:
  Crew& crew_;
  const Crew::Work work_;
  const int threads_;
  Clock clock_;
  std::atomic<Mode> modes_[2];
};

// ---- AMX ----

#if defined(__AVX512BF16__)
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
__attribute__((target("amx-tile"))) void load_tile_config() {
  static const TileConfig config;  // static: the compiler does not see the instruction read more than eight bytes
  _tile_loadconfig(&config);
}
__attribute__((target("amx-tile"))) void release_tiles() { _tile_release(); }
#endif

class Tiles {
 public:
  explicit Tiles(bool amx) : amx_(amx) {
#if defined(__AVX512BF16__)
    if (amx_) load_tile_config();
#endif
  }
  ~Tiles() {
#if defined(__AVX512BF16__)
    if (amx_) release_tiles();
#endif
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  const bool amx_;
};

// ---- rows ----

// f(i, count): whole vectors, then what is left of n.
template <class F>
inline void for_vectors(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + Vec::lanes <= n; i += Vec::lanes) f(i, Vec::lanes);
  if (i < n) f(i, static_cast<int>(n - i));
}

// x / sqrt(mean(x^2) + eps) * weight; `out` may be x.
void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
  Vec squares;
  for_vectors(n, [&](int64_t i, int count) {
    const Vec v = Vec::load(x + i, count);
    squares = fma(v, v, squares);
  });
  const Vec scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(n) + eps);
  for_vectors(n, [&](int64_t i, int count) {
    (Vec::load(x + i, count) * scale * Vec::load(weight + i, count)).store(out + i, count);
  });
}

void rotate(float* x, const float* rope, int64_t head_dim) {
  for (int64_t i = 0; i < head_dim; i += 2) {
    const float even = x[i], odd = x[i + 1], cosine = rope[i], sine = rope[i + 1];
    x[i] = even * cosine - odd * sine;
    x[i + 1] = even * sine + odd * cosine;
  }
}

struct Float32Cache {
  using Element = float;
  static Vec load(const float* p, int count) { return Vec::load(p, count); }
  static Vec load(const float* p) { return Vec::load(p); }
  static void store(Vec v, float* p, int count) { v.store(p, count); }
};
struct Bfloat16Cache {
  using Element = uint16_t;
  static Vec load(const uint16_t* p, int count) { return Vec::load_bf16(p, count); }
  static Vec load(const uint16_t* p) { return Vec::load_bf16(p); }
  static void store(Vec v, uint16_t* p, int count) { v.store_bf16(p, count); }
};

// Lane i is the sum of v[i]: as many vectors as lanes.
inline Vec sum_each(const Vec* v) {
#if defined(__AVX512F__)
  __m512 fours[4];  // in lane 4 b + i of fours[a]: a quarter of the sum of vector 4 a + b
#pragma GCC unroll 4
  for (int a = 0; a < 4; ++a) {
    const __m512 v0 = v[4 * a].v, v1 = v[4 * a + 1].v, v2 = v[4 * a + 2].v, v3 = v[4 * a + 3].v;
    const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(v0, v1, 0x88), _mm512_shuffle_f32x4(v0, v1, 0xDD));
    const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(v2, v3, 0x88), _mm512_shuffle_f32x4(v2, v3, 0xDD));
    fours[a] = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xDD));
  }
  const auto pair = [](__m512 x, __m512 y) {
    return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y)));
  };
  const __m512d first = pair(fours[0], fours[1]), second = pair(fours[2], fours[3]);
  const __m512 sums = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(first, second)),
                                    _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)));  // 4 b + a: vector 4 a + b
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), sums);
#else
  float sums[Vec::lanes];
  for (int i = 0; i < Vec::lanes; ++i) sums[i] = sum(v[i]);
  return Vec::load(sums);
#endif
}

// Softmax attention of one query over `length` keys and values of head_dim elements each. `scores` holds `length`
// floats and room for one vector more; the memory at `next` will be wanted after this.
template <class Cache, int Vectors>
void attend_whole(const float* q, const typename Cache::Element* keys, const typename Cache::Element* values,
                  const typename Cache::Element* next, int64_t length, float scale, float* scores, float* out) {
  constexpr int64_t head_dim = Vectors * Vec::lanes;
  constexpr int64_t block_bytes = Vec::lanes * head_dim * sizeof(*keys);
  Vec query[Vectors];
  for (int v = 0; v < Vectors; ++v) query[v] = Vec::load(q + v * Vec::lanes) * Vec(scale);
  Vec largest = -INFINITY;
  for (int64_t j = 0; j < length; j += Vec::lanes) {
    prefetch_bytes(values + j * head_dim, block_bytes);
    Vec dots[Vec::lanes];
#pragma GCC unroll 16
    for (int i = 0; i < Vec::lanes; ++i) {
      const auto* key = keys + std::min(j + i, length - 1) * head_dim;  // past the end the last key once more
      dots[i] = query[0] * Cache::load(key);
#pragma GCC unroll 8
      for (int v = 1; v < Vectors; ++v) dots[i] = fma(query[v], Cache::load(key + v * Vec::lanes), dots[i]);
    }
    const Vec block = sum_each(dots);
    largest = max(largest, block);
    block.store(scores + j);
  }
  const Vec top = max(largest);
  std::fill(scores + length, scores + round_up(length, Vec::lanes), -INFINITY);
  Vec total;
  for (int64_t j = 0; j < length; j += Vec::lanes) {
    const Vec e = exp(Vec::load(scores + j) - top);
    total += e;
    e.store(scores + j);
  }
  Vec mixed[Vectors];
  for (int64_t j = 0; j < length; ++j) {
    prefetch_bytes(next + j * head_dim, head_dim * sizeof(*next));
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v)
      mixed[v] = fma(scores[j], Cache::load(values + j * head_dim + v * Vec::lanes), mixed[v]);
  }
  const Vec share = 1.0f / sum(total);
  for (int v = 0; v < Vectors; ++v) (mixed[v] * share).store(out + v * Vec::lanes);
}

// The same for any head_dim.
template <class Cache>
void attend_any(const float* q, const typename Cache::Element* keys, const typename Cache::Element* values,
                int64_t head_dim, int64_t length, float scale, float* scores, float* out) {
  float largest = -INFINITY;
  for (int64_t j = 0; j < length; ++j) {
    Vec dot;
    for_vectors(head_dim, [&](int64_t i, int count) {
      dot = fma(Vec::load(q + i, count), Cache::load(keys + j * head_dim + i, count), dot);
    });
    scores[j] = sum(dot) * scale;
    largest = std::max(largest, scores[j]);
  }
  float total = 0.0f;
  for_vectors(length,
              [&](int64_t j, int count) { exp(Vec::load(scores + j, count) - Vec(largest)).store(scores + j, count); });
  for (int64_t j = 0; j < length; ++j) total += scores[j];
  for_vectors(head_dim, [&](int64_t i, int count) {
    Vec mixed;
    for (int64_t j = 0; j < length; ++j) mixed = fma(scores[j], Cache::load(values + j * head_dim + i, count), mixed);
    (mixed * Vec(1.0f / total)).store(out + i, count);
  });
}

template <class Cache>
void attend(const float* q, const typename Cache::Element* keys, const typename Cache::Element* values,
            const typename Cache::Element* next, int64_t head_dim, int64_t length, float scale, float* scores,
            float* out) {
  switch (head_dim) {
    case 3 * Vec::lanes: return attend_whole<Cache, 3>(q, keys, values, next, length, scale, scores, out);
    case 4 * Vec::lanes: return attend_whole<Cache, 4>(q, keys, values, next, length, scale, scores, out);
    case 5 * Vec::lanes: return attend_whole<Cache, 5>(q, keys, values, next, length, scale, scores, out);
    case 6 * Vec::lanes: return attend_whole<Cache, 6>(q, keys, values, next, length, scale, scores, out);
    case 8 * Vec::lanes: return attend_whole<Cache, 8>(q, keys, values, next, length, scale, scores, out);
    default: return attend_any<Cache>(q, keys, values, head_dim, length, scale, scores, out);
  }
}

// silu(a) b for each a
void swiglu(const float* a, const float* b, int64_t n, float* out) {
  for_vectors(n, [&](int64_t i, int count) {
    const Vec gate = Vec::load(a + i, count);
    (gate / (Vec(1.0f) + exp(Vec(0.0f) - gate)) * Vec::load(b + i, count)).store(out + i, count);
  });
}

// ---- the step ----

constexpr int64_t kAhead = 512 << 10;  // bytes of weights that may wait in a core's second-level cache

// Buffers shared by the threads, each beginning at a cache line.
class Workspace {
 public:
  float *x, *wide, *scale;  // residual stream (rows, width); results of the phases (rows, widest); int8 row scales
  uint8_t* activations;     // (padded rows, planes, depth)
  const int64_t widest;

  // With what `threads` shares of the work need for themselves.
  Workspace(const DecodeParams& p, bool draws, int64_t threads)
      : widest(std::max(3 * p.width, p.hidden)),
        scores_size_(round_up(p.capacity + Vec::lanes, kLine / sizeof(float))),
        row_size_(draws ? sample_row_size(p.codes) : 0) {
    const int64_t padded_rows = round_up(p.rows, 16);  // a tile reads 16 rows
    const int64_t depth = round_up(std::max(p.width, p.hidden), kDepthMultiple);
    const int64_t floats[] = {p.rows * p.width,       p.rows * widest,     padded_rows,
                              padded_rows * depth,  // two planes of bfloat16 are as large as one of float32
                              threads * scores_size_, threads * row_size_, threads * row_size_};
    int64_t starts[7], size = 0;
    for (int i = 0; i < 7; ++i) {
      starts[i] = size;
      size += round_up(floats[i], kLine / sizeof(float));
    }
    memory_ = static_cast<float*>(::operator new(size * sizeof(float), std::align_val_t{kLine}));
    std::fill(memory_, memory_ + size, 0.0f);
    x = memory_ + starts[0];
    wide = memory_ + starts[1];
    scale = memory_ + starts[2];
    activations = reinterpret_cast<uint8_t*>(memory_ + starts[3]);
    scores_ = memory_ + starts[4];
    row_ = memory_ + starts[5];
    weights_ = reinterpret_cast<uint32_t*>(memory_ + starts[6]);
  }
  ~Workspace() { ::operator delete(memory_, std::align_val_t{kLine}); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // Of one share: floats for the scores of a head, and for a row of logits, and as many weights of it.
  float* scores(int64_t share) const { return scores_ + share * scores_size_; }
  float* row(int64_t share) const { return row_ + share * row_size_; }
  uint32_t* weights(int64_t share) const { return weights_ + share * row_size_; }

 private:
  static constexpr size_t kLine = 64;
  const int64_t scores_size_, row_size_;
  float *memory_, *scores_, *row_;
  uint32_t* weights_;
};

template <class Weights, class Head, class Cache>
class Step {
 public:
  Step(const DecodeParams& p, const Workspace& workspace, Worker worker, int64_t share, MatmulUnit unit)
      : p_(p),
        w_(workspace),
        worker_(worker),
        share_(share),
        unit_(unit),
        arena_(layer_arena(p)),
        position_(p.position) {}

  // A thread that throws would be missed by the others for ever: all that it works with was allocated before.
  void run(const DrawParams* draw, Shift& shift) noexcept {
    if (draw == nullptr) return decode();
    const Worker one_of_all = worker_;
    for (int64_t step = 0; step < draw->steps; ++step, ++position_) {
      const Shift::Mode mode = shift.mode(step);
      if (mode == Shift::Mode::alone && !one_of_all.leads()) return;
      if (mode == Shift::Mode::together || one_of_all.leads()) {
        worker_ = mode == Shift::Mode::together ? one_of_all : one_of_all.with_all();
        decode();
        worker_.wait();
        const Range mine = worker_.part_of(draw->batch);
        for (int64_t b = mine.begin; b < mine.end; ++b) draw_token(*draw, b);
        if (worker_.leads()) shift.after(step);
      }
      worker_ = one_of_all;
      if (mode != Shift::Mode::alone) worker_.wait();
    }
  }

 private:
  void decode() {
    for_rows([&](int64_t r) {
      const float* from = p_.embeddings + p_.ids[r] * p_.width;
      std::copy(from, from + p_.width, x(r));
    });
    const float* vectors = p_.vectors;
    for (int64_t i = 0; i < p_.layers; ++i, vectors += layer_vectors(p_)) layer(i, vectors);
    norm_rows<Head>(vectors);
    const float* bias = vectors + p_.width;
    matmul<Head>(p_.arena + p_.layers * arena_.bytes, p_.width, p_.codes,
                 [&](int64_t r, int64_t o, int64_t count, const float* product) {
                   add_bias(product, bias + o, count, p_.logits + r * p_.codes + o);
                 });
  }

  // Token `position_` of image b, which its rows are fed next.
  void draw_token(const DrawParams& draw, int64_t b) {
    float* row = w_.row(share_);
    int64_t& token = draw.tokens[b * draw.tokens_stride + position_];
    if (position_ >= draw.prompt_length) {
      const float *c = p_.logits + b * p_.codes, *u = c + draw.batch * p_.codes;
      if (draw.guidance == nullptr) {
        std::copy(c, c + p_.codes, row);
      } else {
        guide_row(c, u, draw.guidance[position_], p_.codes, row);
      }
      const SampleKey key{draw.seed, static_cast<uint64_t>(draw.image_ids[b]), static_cast<uint32_t>(position_)};
      token = sample_row(row, w_.weights(share_), p_.codes, draw.rule, key);
    }
    // A row without a distribution is marked -1; whoever reads the tokens reports it.
    for (int64_t r = b; r < p_.rows; r += draw.batch) draw.ids[r] = std::max<int64_t>(token, 0);
  }

  void layer(int64_t index, const float* vectors) {
    const uint8_t* arena = p_.arena + index * arena_.bytes;
    const float *norm1 = vectors, *qkv_bias = norm1 + p_.width, *q_norm = qkv_bias + 3 * p_.width;
    const float *k_norm = q_norm + p_.head_dim, *proj_bias = k_norm + p_.head_dim, *norm2 = proj_bias + p_.width;
    constexpr int64_t half = kPanelOutputs / 2;
    const int64_t gate_outputs = 2 * round_up(p_.hidden, half);

    prefetch_matrix<Weights>(arena + arena_.qkv, p_.width, 3 * p_.width);
    norm_rows<Weights>(norm1);
    matmul<Weights>(arena + arena_.qkv, p_.width, 3 * p_.width,
                    [&](int64_t r, int64_t o, int64_t count, const float* product) {
                      add_bias(product, qkv_bias + o, count, wide(r) + o);
                    });
    worker_.wait();
    // Attention leaves the memory idle half of the time: the next matrix comes in meanwhile.
    const Range items = worker_.part_of(p_.rows * p_.heads), proj = part_of_matrix<Weights>(p_.width, p_.width);
    const int64_t ahead = std::min(proj.end - proj.begin, kAhead) / std::max<int64_t>(items.end - items.begin, 1);
    for (int64_t i = items.begin; i < items.end; ++i) {
      prefetch_bytes(arena + arena_.proj + proj.begin + (i - items.begin) * ahead, ahead);
      attention(index, i / p_.heads, i % p_.heads, q_norm, k_norm);
    }
    worker_.wait();
    for_rows([&](int64_t r) { pack<Weights>(wide(r), p_.width, r); });
    worker_.wait();
    matmul<Weights>(arena + arena_.proj, p_.width, p_.width,
                    [&](int64_t r, int64_t o, int64_t count, const float* product) {
                      add_bias(product, proj_bias + o, count, x(r) + o, x(r) + o);
                    });
    prefetch_matrix<Weights>(arena + arena_.gate, p_.width, gate_outputs);
    worker_.wait();
    norm_rows<Weights>(norm2);
    matmul<Weights>(arena + arena_.gate, p_.width, gate_outputs,
                    [&](int64_t r, int64_t o, int64_t, const float* product) {
                      swiglu(product, product + half, std::min(half, p_.hidden - o / 2), wide(r) + o / 2);
                    });
    prefetch_matrix<Weights>(arena + arena_.down, p_.hidden, p_.width);
    worker_.wait();
    for_rows([&](int64_t r) { pack<Weights>(wide(r), p_.hidden, r); });
    worker_.wait();
    matmul<Weights>(arena + arena_.down, p_.hidden, p_.width,
                    [&](int64_t r, int64_t o, int64_t count, const float* product) {
                      add_bias(product, nullptr, count, x(r) + o, x(r) + o);
                    });
    worker_.wait();
  }

  // Norms and rotates the new query and key, appends key and value, attends. The result takes the query's place.
  void attention(int64_t layer, int64_t row, int64_t head, const float* q_norm, const float* k_norm) {
    float* q = wide(row) + head * p_.head_dim;
    float *k = q + p_.width, *v = k + p_.width;
    rms_norm(q, q_norm, p_.head_dim, p_.norm_eps, q);
    rms_norm(k, k_norm, p_.head_dim, p_.norm_eps, k);
    const float* rope = p_.rope + position_ * p_.head_dim;
    rotate(q, rope, p_.head_dim);
    rotate(k, rope, p_.head_dim);
    const int64_t start = ((layer * p_.rows + row) * p_.heads + head) * p_.capacity * p_.head_dim;
    auto* keys = static_cast<typename Cache::Element*>(p_.keys) + start;
    auto* values = static_cast<typename Cache::Element*>(p_.values) + start;
    for_vectors(p_.head_dim, [&](int64_t i, int count) {
      Cache::store(Vec::load(k + i, count), keys + position_ * p_.head_dim + i, count);
      Cache::store(Vec::load(v + i, count), values + position_ * p_.head_dim + i, count);
    });
    const float scale = 1.0f / std::sqrt(static_cast<float>(p_.head_dim));
    const auto* next = keys + p_.capacity * p_.head_dim;  // those of the next head
    attend<Cache>(q, keys, values, next, p_.head_dim, position_ + 1, scale, w_.scores(share_), q);
  }

  // Normalised rows as activations, in place of the rows' results.
  template <class W>
  void norm_rows(const float* weight) {
    for_rows([&](int64_t r) {
      rms_norm(x(r), weight, p_.width, p_.norm_eps, wide(r));
      pack<W>(wide(r), p_.width, r);
    });
    worker_.wait();
  }

  template <class W>
  void pack(const float* values, int64_t n, int64_t r) {
    const Activations a = activations<W>(n);
    W::pack_row(values, n, round_up(n, kDepthMultiple), a.data + r * a.row_bytes, a.plane_bytes, a.scale + r);
  }

  // store(row, first output, outputs, products) for this thread's panels and all rows.
  template <class W, class Store>
  void matmul(const uint8_t* matrix, int64_t inputs, int64_t outputs, const Store& store) {
    const Activations a = activations<W>(inputs);
    const int64_t bytes = panel_bytes(W::kFormat, inputs), depth = round_up(inputs, kDepthMultiple);
    const Range mine = worker_.part_of(panels(outputs));
    for (int64_t panel = mine.begin; panel < mine.end; ++panel) {
      const int64_t first = panel * kPanelOutputs, count = std::min(kPanelOutputs, outputs - first);
      for (int64_t row0 = 0; row0 < p_.rows; row0 += kRowBlock) {
        const int64_t rows = std::min(kRowBlock, p_.rows - row0);
        W::multiply(unit_, matrix + panel * bytes, depth, a, row0, rows, products_);
        for (int64_t r = 0; r < rows; ++r) store(row0 + r, first, count, products_ + r * kPanelOutputs);
      }
    }
  }

  // The bytes of a matrix that this thread reads.
  template <class W>
  Range part_of_matrix(int64_t inputs, int64_t outputs) const {
    const Range mine = worker_.part_of(panels(outputs));
    const int64_t bytes = panel_bytes(W::kFormat, inputs);
    return {mine.begin * bytes, mine.end * bytes};
  }

  // Starts to fetch this thread's part of the matrix that comes after a barrier.
  template <class W>
  void prefetch_matrix(const uint8_t* matrix, int64_t inputs, int64_t outputs) const {
    const Range part = part_of_matrix<W>(inputs, outputs);
    prefetch_bytes(matrix + part.begin, std::min(part.end - part.begin, kPrefetch));
  }

  // product + bias + base, the latter two where not null
  static void add_bias(const float* product, const float* bias, int64_t n, float* out, const float* base = nullptr) {
    for_vectors(n, [&](int64_t i, int count) {
      Vec v = Vec::load(product + i, count);
      if (bias != nullptr) v += Vec::load(bias + i, count);
      if (base != nullptr) v += Vec::load(base + i, count);
      v.store(out + i, count);
    });
  }

  template <class F>
  void for_rows(const F& f) {
    const Range mine = worker_.part_of(p_.rows);
    for (int64_t r = mine.begin; r < mine.end; ++r) f(r);
  }

  template <class W>
  Activations activations(int64_t inputs) const {
    const int64_t plane = round_up(inputs, kDepthMultiple) * weight_bytes(W::kFormat);
    return {w_.activations, w_.scale, W::kPlanes * plane, plane};
  }
  float* x(int64_t r) const { return w_.x + r * p_.width; }
  float* wide(int64_t r) const { return w_.wide + r * w_.widest; }

  const DecodeParams& p_;
  const Workspace& w_;
  Worker worker_;
  const int64_t share_;  // whose scratch this thread has
  const MatmulUnit unit_;
  const LayerArena arena_;
  int64_t position_;
  alignas(64) float products_[kRowBlock * kPanelOutputs];
};

template <class Weights, class Head, class Cache>
void run_steps(const DecodeParams& p, const DrawParams* draw, Crew& crew, const Parallel& parallel) {
  const MatmulUnit unit{cpu_has_amx()};
  const int shares = parallel.threads;
  const Workspace workspace(p, draw != nullptr, shares);
  const Crew::Work work = {
      static_cast<int64_t>(p.weights), p.layers, p.rows, p.width, p.hidden, p.codes, shares, draw != nullptr};
  Shift shift(crew, work, shares);
  Barrier barrier(shares);
  const auto run = [&](int64_t first, int64_t last) {
    const Tiles tiles(unit.amx && Weights::kFormat != WeightFormat::float32);
    Step<Weights, Head, Cache>(p, workspace, Worker(barrier, first, last, shares), first, unit).run(draw, shift);
  };
  const Crew::Mode mode = shift.mode(0);
  const bool together = mode == Crew::Mode::together || (mode == Crew::Mode::probe && draw != nullptr);
  if (together) {
    parallel(0, shares, 1, run);
  } else {
    run(0, shares);  // the other threads are not even woken
  }
  if (draw == nullptr) {
    shift.after(0);
  } else if (together) {
    shift.part();
  }
}

template <class Cache>
void run_with_cache(const DecodeParams& p, const DrawParams* draw, Crew& crew, const Parallel& parallel) {
  switch (p.weights) {
    case WeightFormat::float32: return run_steps<Float32Weights, Float32Weights, Cache>(p, draw, crew, parallel);
    case WeightFormat::bfloat16:
      return run_steps<Bfloat16Weights<1>, Bfloat16Weights<2>, Cache>(p, draw, crew, parallel);
    case WeightFormat::int8: return run_steps<Int8Weights, Bfloat16Weights<2>, Cache>(p, draw, crew, parallel);
  }
}

void run(const DecodeParams& p, const DrawParams* draw, Crew& crew, const Parallel& parallel) {
  if (p.cache == CacheFormat::float32) return run_with_cache<Float32Cache>(p, draw, crew, parallel);
  return run_with_cache<Bfloat16Cache>(p, draw, crew, parallel);
}

}  // namespace

void decode_cpu(const DecodeParams& p, Crew& crew, const Parallel& parallel) { run(p, nullptr, crew, parallel); }
void decode_tokens_cpu(const DecodeParams& p, const DrawParams& draw, Crew& crew, const Parallel& parallel) {
  run(p, &draw, crew, parallel);
}

}  // namespace ALITOK_ISA
}  // namespace alitok
