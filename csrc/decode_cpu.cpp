// CPU kernel of decode: one parallel region for a pass, or for many with their draws. Each thread owns fixed panels of every matrix, so that it
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

  // Of a step, counted from 0, and whether there is nothing left to do in it. All threads see the same: it is written
  // before they meet at the end of the step before, and again two steps later, when each has read it.
  Mode mode(int64_t step) const { return modes_[step % 2].load(std::memory_order_relaxed); }
  bool over(int64_t step) const { return over_[step % 2].load(std::memory_order_relaxed); }

  // After a step, by the thread that leads, before all meet for the last time in it; `last`: there is no other.
  void after(int64_t step, bool last) {
    const Mode done = mode(step);
    const double seconds = clock_.lap();
    Mode next = done;  // threads that have left do not come back in this call
    if (threads_ > 1) {
      done == Mode::together ? crew_.after_together(work_, seconds) : crew_.after_alone(work_, seconds);
      if (done != Mode::alone) next = crew_.next(work_);
    }
    modes_[(step + 1) % 2].store(next, std::memory_order_relaxed);
    over_[(step + 1) % 2].store(last, std::memory_order_relaxed);
  }

  // When all threads of a call together have left.
  void part() { crew_.after_parting(work_, clock_.lap()); }

 private:
  Crew& crew_;
  const Crew::Work work_;
  const int threads_;
  Clock clock_;
  std::atomic<Mode> modes_[2];
  std::atomic<bool> over_[2] = {false, false};
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

// ---- the pass ----

constexpr int64_t kAhead = 512 << 10;  // bytes of weights that may wait in a core's second-level cache

// One position that a pass appends to the cache.
struct Input {
  int64_t id, slot, position;
  int64_t row;             // of ids
  int64_t first, columns;  // the inputs of its row: the first one's number, and how many there are
  int64_t logits;          // row of the result
};

// What the threads do in a pass: written by the one that leads, read by all of them.
struct Plan {
  int64_t inputs = 0;
  bool windows = false;     // whether a row has several
  bool reads_only = false;  // all are of prompts: nobody wants their logits
};

// Buffers shared by the threads, each beginning at a cache line.
class Workspace {
 public:
  float *x, *wide, *scale;  // residual stream (inputs, width); results of the phases (inputs, widest); int8 row scales
  uint8_t* activations;     // (padded inputs, planes, depth)
  float* logits;            // (inputs, codes), where they are drawn from
  Input* inputs;            // of the pass
  int64_t* draws;           // of each input
  const int64_t most, widest;

  // For up to `most` inputs, with what `threads` shares of the work need for themselves.
  Workspace(const DecodeParams& p, int64_t most_inputs, int64_t drawn_inputs, int64_t threads)
      : most(most_inputs),
        widest(std::max(3 * p.width, p.hidden)),
        scores_size_(round_up(p.capacity + Vec::lanes, kLine / sizeof(float))),
        row_size_(drawn_inputs > 0 ? sample_row_size(p.codes) : 0) {
    const int64_t padded = round_up(most, 16);  // a tile reads 16 rows
    const int64_t depth = round_up(std::max(p.width, p.hidden), kDepthMultiple);
    const int64_t bytes[] = {
        most * p.width * kFloat,         most * widest * kFloat,        padded * kFloat,
        padded * depth * kFloat,  // two planes of bfloat16 are as large as one of float32
        drawn_inputs * p.codes * kFloat, most * int64_t{sizeof(Input)}, most * int64_t{sizeof(int64_t)},
        threads * scores_size_ * kFloat, threads * row_size_ * kFloat,  threads * row_size_ * kFloat};
    int64_t starts[10], size = 0;
    for (int i = 0; i < 10; ++i) {
      starts[i] = size;
      size += round_up(bytes[i], kLine);
    }
    memory_ = static_cast<uint8_t*>(::operator new(size, std::align_val_t{kLine}));
    std::fill(memory_, memory_ + size, 0);
    x = reinterpret_cast<float*>(memory_ + starts[0]);
    wide = reinterpret_cast<float*>(memory_ + starts[1]);
    scale = reinterpret_cast<float*>(memory_ + starts[2]);
    activations = memory_ + starts[3];
    logits = reinterpret_cast<float*>(memory_ + starts[4]);
    inputs = reinterpret_cast<Input*>(memory_ + starts[5]);
    draws = reinterpret_cast<int64_t*>(memory_ + starts[6]);
    scores_ = reinterpret_cast<float*>(memory_ + starts[7]);
    row_ = reinterpret_cast<float*>(memory_ + starts[8]);
    weights_ = reinterpret_cast<uint32_t*>(memory_ + starts[9]);
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
  static constexpr int64_t kFloat = sizeof(float);
  const int64_t scores_size_, row_size_;
  uint8_t* memory_;
  float *scores_, *row_;
  uint32_t* weights_;
};

// Which inputs a pass has, and what becomes of its draws. The thread that leads calls it, between two barriers.
class Schedule {
 public:
  Schedule(const DecodeParams& p, const DrawParams* draw, const Workspace& workspace)
      : p_(p), d_(draw), w_(workspace) {}

  Plan plan;
  bool over() const { return plan.inputs == 0; }

  // The inputs of the next pass. Those of one row follow each other, and with guidance the conditional rows come first.
  void make() {
    plan = Plan{};
    if (d_ == nullptr) {
      for (int64_t r = 0; r < p_.rows; ++r) {
        if (p_.positions[r] >= 0) add_row(r, p_.columns, [&](int64_t w) { return p_.ids[r * p_.columns + w]; });
      }
      return;
    }
    for (int64_t r = 0; r < p_.rows; ++r) {
      if (d_->prompt_lengths[r % d_->batch] >= d_->length) d_->positions[r] = -1;  // nothing is left to draw
      plan.reads_only |= prompt_left(r) > 0;
    }
    for (int64_t r = 0; r < p_.rows; ++r) {
      const int64_t position = d_->positions[r], *ids = d_->ids + r * p_.columns;
      if (position < 0) continue;
      if (!plan.reads_only) {
        add_row(r, std::min(d_->window, d_->length - position), [&](int64_t w) { return ids[w]; });
      } else if (const int64_t columns = std::min(prompt_left(r), w_.most - plan.inputs); columns > 0) {
        const int64_t* before = tokens(r) + position - 1;
        add_row(r, columns, [&](int64_t w) { return w == 0 ? ids[0] : before[w]; });
      }
    }
  }

  // How many inputs of the pass are drawn from: those of conditional rows, which come first.
  int64_t drawn() const {
    int64_t n = 0;
    while (n < plan.inputs && w_.inputs[n].row < d_->batch) n += w_.inputs[n].columns;
    return n;
  }

  // The unconditional input that belongs to conditional input i, or -1 where its image has no guidance.
  int64_t partner(int64_t i) const {
    if (d_->guidance == nullptr) return -1;
    const int64_t row = w_.inputs[i].row + d_->batch;
    if (d_->positions[row] < 0) return -1;
    // Rows with guidance are all among the second half, in the same order.
    for (int64_t j = i + 1; j < plan.inputs; j += w_.inputs[j].columns) {
      if (w_.inputs[j].row == row) return w_.inputs[j].first + (i - w_.inputs[i].first);
    }
    return -1;
  }

  // After the draws: keeps those whose inputs were right, and writes what the next pass is fed.
  void advance() {
    for (int64_t i = 0; i < plan.inputs; i += w_.inputs[i].columns) {
      plan.reads_only ? read_on(w_.inputs[i]) : keep_draws(i);
    }
    for (int64_t r = 0; r < p_.rows; ++r) {
      if (d_->positions[r] >= d_->length) d_->positions[r] = -1;
    }
  }

 private:
  int64_t* tokens(int64_t row) const { return d_->tokens + row % d_->batch * d_->length; }

  // Inputs that the prompt determines before the first draw.
  int64_t prompt_left(int64_t row) const {
    const int64_t position = d_->positions[row], given = d_->prompt_lengths[row % d_->batch];
    return position < 0 ? 0 : given - position;
  }

  template <class Id>
  void add_row(int64_t row, int64_t columns, const Id& id) {
    const int64_t first = plan.inputs, slot = p_.slot_of == nullptr ? row : p_.slot_of[row];
    const int64_t position = p_.positions[row];
    for (int64_t w = 0; w < columns; ++w) {
      const int64_t result = d_ == nullptr ? row * p_.columns + w : first + w;
      w_.inputs[first + w] = {id(w), slot, position + w, row, first, columns, result};
    }
    plan.inputs += columns;
    plan.windows |= columns > 1;
  }

  void read_on(const Input& first) {
    feed(first.row, first.position + first.columns, nullptr, 0);
    if (first.row < d_->batch) ++d_->passes_done[first.row];
  }

  void keep_draws(int64_t first) {
    const Input* inputs = w_.inputs + first;
    const int64_t row = inputs->row, columns = inputs->columns, *draws = w_.draws + first;
    if (row >= d_->batch) return;  // moves on with its conditional row
    int64_t* sequence = tokens(row) + inputs->position;
    const int64_t partner = this->partner(first);
    const auto was_fed = [&](int64_t w, int64_t id) {  // to both rows of the image
      return inputs[w].id == id && (partner < 0 || w_.inputs[partner + w].id == id);
    };
    int64_t kept = 0;
    do {
      sequence[kept] = draws[kept];
      ++kept;
    } while (kept < columns && was_fed(kept, draws[kept - 1]));
    ++d_->passes_done[row];
    const int64_t end = inputs->position + kept;
    feed(row, end, draws + kept, columns - kept);
    if (d_->guidance != nullptr && d_->positions[row + d_->batch] >= 0)
      feed(row + d_->batch, end, draws + kept, columns - kept);
  }

  // Row `row` goes on at `position`: its last token is certain; then come `count` draws that were not kept (in a prompt
  // these are its tokens), what stands in the sequence, and where that is no code the one before again.
  void feed(int64_t row, int64_t position, const int64_t* draws, int64_t count) {
    int64_t* ids = d_->ids + row * p_.columns;
    d_->positions[row] = position;
    const int64_t *follows = tokens(row) + position - 1, left = d_->length - position;
    ids[0] = std::max<int64_t>(follows[0], 0);  // -1: no distribution; whoever reads the tokens reports it
    for (int64_t w = 1; w < d_->window; ++w) {
      const int64_t guess = w <= count ? draws[w - 1] : w <= left ? follows[w] : -1;
      ids[w] = guess >= 0 && guess < p_.codes ? guess : ids[w - 1];
    }
  }

  const DecodeParams& p_;
  const DrawParams* d_;
  const Workspace& w_;
};

template <class Weights, class Head, class Cache>
class Pass {
 public:
  Pass(const DecodeParams& p, const Workspace& workspace, Schedule& schedule, Worker worker, int64_t share,
       MatmulUnit unit)
      : p_(p),
        w_(workspace),
        schedule_(schedule),
        plan_(schedule.plan),
        worker_(worker),
        share_(share),
        unit_(unit),
        arena_(layer_arena(p)) {}

  // A thread that throws would be missed by the others for ever: all that it works with was allocated before.
  void run(const DrawParams* draw, Shift& shift) noexcept {
    if (draw == nullptr) return decode(p_.logits);
    const Worker one_of_all = worker_;
    for (int64_t pass = 0; pass < draw->passes && !shift.over(pass); ++pass) {
      const Shift::Mode mode = shift.mode(pass);
      if (mode == Shift::Mode::alone && !one_of_all.leads()) return;
      if (mode == Shift::Mode::together || one_of_all.leads()) {
        worker_ = mode == Shift::Mode::together ? one_of_all : one_of_all.with_all();
        decode(w_.logits);
        if (!plan_.reads_only) {
          worker_.wait();
          const Range mine = worker_.part_of(schedule_.drawn());
          for (int64_t i = mine.begin; i < mine.end; ++i) w_.draws[i] = token(*draw, i);
        }
        worker_.wait();
        if (worker_.leads()) {
          schedule_.advance();
          schedule_.make();
          shift.after(pass, schedule_.over());
        }
      }
      worker_ = one_of_all;
      if (mode != Shift::Mode::alone) worker_.wait();
    }
  }

 private:
  void decode(float* logits) {
    for_inputs([&](int64_t i) {
      const float* from = p_.embeddings + w_.inputs[i].id * p_.width;
      std::copy(from, from + p_.width, x(i));
    });
    const float* vectors = p_.vectors;
    for (int64_t i = 0; i < p_.layers; ++i, vectors += layer_vectors(p_)) layer(i, vectors);
    if (plan_.reads_only) return;
    norm_rows<Head>(vectors);
    const float* bias = vectors + p_.width;
    matmul<Head>(p_.arena + p_.layers * arena_.bytes, p_.width, p_.codes,
                 [&](int64_t i, int64_t o, int64_t count, const float* product) {
                   add_bias(product, bias + o, count, logits + w_.inputs[i].logits * p_.codes + o);
                 });
  }

  // What follows input i of an image: a token of the prompt, or one that is drawn.
  int64_t token(const DrawParams& draw, int64_t i) {
    const Input& input = w_.inputs[i];
    const int64_t image = input.row;
    if (input.position < draw.prompt_lengths[image]) return draw.tokens[image * draw.length + input.position];
    float* row = w_.row(share_);
    const float* c = w_.logits + i * p_.codes;
    const int64_t partner = schedule_.partner(i);
    if (partner < 0) {
      std::copy(c, c + p_.codes, row);
    } else {
      const float scale = draw.guidance[image * draw.length + input.position];
      guide_row(c, w_.logits + partner * p_.codes, scale, p_.codes, row);
    }
    const SampleSettings& settings = draw.settings;
    const SampleKey key{static_cast<uint64_t>(of_image(settings.seed, image)),
                        static_cast<uint64_t>(of_image(settings.image_id, image)),
                        static_cast<uint32_t>(input.position)};
    return sample_row(row, w_.weights(share_), p_.codes, rule_of(settings, image), key);
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
    const Range items = worker_.part_of(plan_.inputs * p_.heads);
    if (plan_.windows) {  // the later inputs of a row see the keys of the earlier ones, which another thread may append
      for (int64_t i = items.begin; i < items.end; ++i) append(index, i / p_.heads, i % p_.heads, q_norm, k_norm);
      worker_.wait();
    }
    // Attention leaves the memory idle half of the time: the next matrix comes in meanwhile.
    const Range proj = part_of_matrix<Weights>(p_.width, p_.width);
    const int64_t ahead = std::min(proj.end - proj.begin, kAhead) / std::max<int64_t>(items.end - items.begin, 1);
    for (int64_t i = items.begin; i < items.end; ++i) {
      prefetch_bytes(arena + arena_.proj + proj.begin + (i - items.begin) * ahead, ahead);
      // All inputs of a row, then its next head: they share the keys and values.
      const Input& some = w_.inputs[i / p_.heads];
      const int64_t within = i - some.first * p_.heads, input = some.first + within % some.columns;
      const int64_t head = within / some.columns;
      if (!plan_.windows) append(index, input, head, q_norm, k_norm);
      attention(index, input, head);
    }
    worker_.wait();
    for_inputs([&](int64_t r) { pack<Weights>(wide(r), p_.width, r); });
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
    for_inputs([&](int64_t r) { pack<Weights>(wide(r), p_.hidden, r); });
    worker_.wait();
    matmul<Weights>(arena + arena_.down, p_.hidden, p_.width,
                    [&](int64_t r, int64_t o, int64_t count, const float* product) {
                      add_bias(product, nullptr, count, x(r) + o, x(r) + o);
                    });
    worker_.wait();
  }

  // Of a head of the cache: where its first position is.
  int64_t cache_start(int64_t layer, const Input& input, int64_t head) const {
    return ((layer * p_.slots + input.slot) * p_.heads + head) * p_.capacity * p_.head_dim;
  }

  // Norms and rotates the new query and key, and appends key and value.
  void append(int64_t layer, int64_t index, int64_t head, const float* q_norm, const float* k_norm) {
    const Input& input = w_.inputs[index];
    float* q = wide(index) + head * p_.head_dim;
    float *k = q + p_.width, *v = k + p_.width;
    rms_norm(q, q_norm, p_.head_dim, p_.norm_eps, q);
    rms_norm(k, k_norm, p_.head_dim, p_.norm_eps, k);
    const float* rope = p_.rope + input.position * p_.head_dim;
    rotate(q, rope, p_.head_dim);
    rotate(k, rope, p_.head_dim);
    const int64_t start = cache_start(layer, input, head) + input.position * p_.head_dim;
    auto* keys = static_cast<typename Cache::Element*>(p_.keys) + start;
    auto* values = static_cast<typename Cache::Element*>(p_.values) + start;
    for_vectors(p_.head_dim, [&](int64_t i, int count) {
      Cache::store(Vec::load(k + i, count), keys + i, count);
      Cache::store(Vec::load(v + i, count), values + i, count);
    });
  }

  // Attends from a query to its position and those before. The result takes the query's place.
  void attention(int64_t layer, int64_t index, int64_t head) {
    const Input& input = w_.inputs[index];
    float* q = wide(index) + head * p_.head_dim;
    const int64_t start = cache_start(layer, input, head);
    const auto* keys = static_cast<const typename Cache::Element*>(p_.keys) + start;
    const auto* values = static_cast<const typename Cache::Element*>(p_.values) + start;
    const float scale = 1.0f / std::sqrt(static_cast<float>(p_.head_dim));
    const auto* next = keys + p_.capacity * p_.head_dim;  // those of the next head
    attend<Cache>(q, keys, values, next, p_.head_dim, input.position + 1, scale, w_.scores(share_), q);
  }

  // Normalised rows as activations, in place of the rows' results.
  template <class W>
  void norm_rows(const float* weight) {
    for_inputs([&](int64_t r) {
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

  // store(input, first output, outputs, products) for this thread's panels and all inputs.
  template <class W, class Store>
  void matmul(const uint8_t* matrix, int64_t inputs, int64_t outputs, const Store& store) {
    const Activations a = activations<W>(inputs);
    const int64_t bytes = panel_bytes(W::kFormat, inputs), depth = round_up(inputs, kDepthMultiple);
    const Range mine = worker_.part_of(panels(outputs));
    for (int64_t panel = mine.begin; panel < mine.end; ++panel) {
      const int64_t first = panel * kPanelOutputs, count = std::min(kPanelOutputs, outputs - first);
      for (int64_t row0 = 0; row0 < plan_.inputs; row0 += kRowBlock) {
        const int64_t rows = std::min(kRowBlock, plan_.inputs - row0);
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
  void for_inputs(const F& f) {
    const Range mine = worker_.part_of(plan_.inputs);
    for (int64_t r = mine.begin; r < mine.end; ++r) f(r);
  }

  template <class W>
  Activations activations(int64_t inputs) const {
    const int64_t plane = round_up(inputs, kDepthMultiple) * weight_bytes(W::kFormat);
    return {w_.activations, w_.scale, W::row_bytes(round_up(inputs, kDepthMultiple)), plane};
  }
  float* x(int64_t r) const { return w_.x + r * p_.width; }
  float* wide(int64_t r) const { return w_.wide + r * w_.widest; }

  const DecodeParams& p_;
  const Workspace& w_;
  Schedule& schedule_;
  const Plan& plan_;
  Worker worker_;
  const int64_t share_;  // whose scratch this thread has
  const MatmulUnit unit_;
  const LayerArena arena_;
  alignas(64) float products_[kRowBlock * kPanelOutputs];
};

// The most inputs that one pass may have.
int64_t most_inputs(const DecodeParams& p, const DrawParams* draw) {
  if (draw == nullptr) return p.rows * p.columns;
  bool reads = false;
  for (int64_t r = 0; r < p.rows; ++r)
    reads |= p.positions[r] >= 0 && draw->prompt_lengths[r % draw->batch] > p.positions[r];
  return std::max(p.rows * draw->window, reads ? kPrefillInputs : 0);
}

template <class Weights, class Head, class Cache>
void run_passes(const DecodeParams& p, const DrawParams* draw, Crew& crew, const Parallel& parallel) {
  const MatmulUnit unit{cpu_has_amx()};
  const int shares = parallel.threads;
  const Workspace workspace(p, most_inputs(p, draw), draw == nullptr ? 0 : p.rows * draw->window, shares);
  Schedule schedule(p, draw, workspace);
  schedule.make();
  if (schedule.over()) return;
  const Crew::Work work = {static_cast<int64_t>(p.weights) + (p.narrow ? 8 : 0),
                           p.layers,
                           schedule.plan.inputs,
                           p.width,
                           p.hidden,
                           p.codes,
                           shares,
                           draw != nullptr};
  Shift shift(crew, work, shares);
  Barrier barrier(shares);
  const auto run = [&](int64_t first, int64_t last) {
    const Tiles tiles(unit.amx && Weights::kFormat != WeightFormat::float32);
    Pass<Weights, Head, Cache>(p, workspace, schedule, Worker(barrier, first, last, shares), first, unit)
        .run(draw, shift);
  };
  const Crew::Mode mode = shift.mode(0);
  const bool together = mode == Crew::Mode::together || (mode == Crew::Mode::probe && draw != nullptr);
  if (together) {
    parallel(0, shares, 1, run);
  } else {
    run(0, shares);  // the other threads are not even woken
  }
  if (draw == nullptr) {
    shift.after(0, true);
  } else if (together) {
    shift.part();
  }
}

template <class Cache>
void run_with_cache(const DecodeParams& p, const DrawParams* draw, Crew& crew, const Parallel& parallel) {
  switch (p.weights) {
    case WeightFormat::float32: return run_passes<Float32Weights, Float32Weights, Cache>(p, draw, crew, parallel);
    case WeightFormat::bfloat16:
      return run_passes<Bfloat16Weights<1>, Bfloat16Weights<2>, Cache>(p, draw, crew, parallel);
    case WeightFormat::int8:
      if (p.narrow) return run_passes<Int8WeightsAndActivations, Bfloat16Weights<2>, Cache>(p, draw, crew, parallel);
      return run_passes<Int8Weights, Bfloat16Weights<2>, Cache>(p, draw, crew, parallel);
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
