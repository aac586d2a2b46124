// CPU kernels of vq_lookup. Lanes are codes: a tile scores kTile features against kVectors vectors of codes, with all
// scores in registers, and goes straight from there into the running minima of its features and of its codes.
#include "vq_lookup.h"

#include <limits>
#include <vector>

#include "scratch.h"
#include "simd.h"

namespace alitok::ALITOK_ISA {
namespace {

// Registers: kTile * kVectors scores, kVectors codes and one feature; 28 of 32 with AVX-512, 16 of 16 otherwise.
constexpr int kTile = Vec::lanes == 16 ? 8 : 4;
constexpr int kVectors = 3;
constexpr int kPanel = kVectors * Vec::lanes;  // codes scored together
constexpr int kBlock = 64;                     // features that stay in the first-level cache while the codes pass by
static_assert(kBlock % kTile == 0);

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Smallest score of each lane so far, and where it was. The index is an int32 in the bits of a lane, which blends leave
// as they are.
struct Best {
  Vec score = kInfinity;
  Vec index = index_bits(0);

  static float index_bits(int32_t index) { return bits_as<float>(index); }

  // Strictly smaller: of equals the first one stays. A NaN is never smaller.
  void update(Vec candidate, int32_t candidate_index) {
    const Mask smaller = candidate < score;
    score = select(smaller, candidate, score);
    index = select(smaller, index_bits(candidate_index), index);
  }
};

float half_norm(const float* row, int64_t channels) {
  double sum = 0;
  for (int64_t c = 0; c < channels; ++c) sum += double{row[c]} * row[c];
  return static_cast<float>(sum / 2);
}

// The codebook in panels of kPanel codes: (panels, channels, kPanel), and each code's half norm. Codes that fill up the
// last panel are zero with an infinite norm, so that they are never the nearest.
struct Codebook {
  int64_t panels;
  std::vector<Vec> codes, half_norms;  // of Vec, not float, for the alignment

  Codebook(const VqLookupParams& p, const Parallel& parallel)
      : panels((p.codes + kPanel - 1) / kPanel),
        codes(static_cast<size_t>(panels * p.channels * kVectors)),
        half_norms(static_cast<size_t>(panels * kVectors), Vec(kInfinity)) {
    float* columns = reinterpret_cast<float*>(codes.data());
    float* norms = reinterpret_cast<float*>(half_norms.data());
    parallel(0, p.codes, 16 * kPanel, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const float* code = p.codebook + k * p.channels;
        float* column = columns + k / kPanel * p.channels * kPanel + k % kPanel;
        for (int64_t c = 0; c < p.channels; ++c) column[c * kPanel] = code[c];
        norms[k] = half_norm(code, p.channels);
      }
    });
  }

  const Vec* panel(int64_t index, int64_t channels) const { return codes.data() + index * channels * kVectors; }
};

// Score kTile features, packed as (channels, kTile), against one panel.
template <bool kClosest>
void score_tile(const float* features, const float* feature_half_norms, int32_t first_feature, int64_t channels,
                const Vec* panel, const Vec* half_norms, int32_t first_vector, Best* rows, Best* columns) {
  Vec score[kTile][kVectors];
#pragma GCC unroll 8
  for (int f = 0; f < kTile; ++f) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) score[f][v] = half_norms[v];
  }
  for (int64_t c = 0; c < channels; ++c) {
    Vec code[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) code[v] = panel[c * kVectors + v];
#pragma GCC unroll 8
    for (int f = 0; f < kTile; ++f) {
      const Vec feature = features[c * kTile + f];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) score[f][v] = fnma(feature, code[v], score[f][v]);
    }
  }
#pragma GCC unroll 8
  for (int f = 0; f < kTile; ++f) {
    Best row = rows[f];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) row.update(score[f][v], first_vector + v);
    rows[f] = row;
  }
  if constexpr (kClosest) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      Best column = columns[v];
#pragma GCC unroll 8
      for (int f = 0; f < kTile; ++f) {
        column.update(score[f][v] + feature_half_norms[f], first_feature + f);
      }
      columns[v] = column;
    }
  }
}

// The search of one thread: its share of the features against all codes.
template <bool kClosest>
class Search {
 public:
  Search(const VqLookupParams& p, const Codebook& codebook)
      : p_(p),
        codebook_(codebook),
        features_(static_cast<size_t>(kBlock * p.channels)),
        columns_(static_cast<size_t>(kClosest ? codebook.panels * kVectors : 0)) {}

  // Returns the block's sum of squared distances between feature and code.
  double block(int64_t first) {
    pack(first);
    for (int64_t panel = 0; panel < codebook_.panels; ++panel) {
      for (int f = 0; f < kBlock && first + f < p_.features; f += kTile) {
        score_tile<kClosest>(features_.data() + f * p_.channels, half_norms_ + f, static_cast<int32_t>(first + f),
                             p_.channels, codebook_.panel(panel, p_.channels),
                             codebook_.half_norms.data() + panel * kVectors, static_cast<int32_t>(panel * kVectors),
                             rows_ + f, columns_.data() + panel * kVectors);
      }
    }
    double squares = 0;
    for (int f = 0; f < kBlock && first + f < p_.features; ++f) squares += finish(first + f, nearest(rows_[f]));
    return squares;
  }

  // Lower each code's key to this thread's candidate.
  void merge_columns(uint64_t* keys) const {
    for (int64_t first = 0; first < p_.codes; first += Vec::lanes) {
      const Best& column = columns_[static_cast<size_t>(first / Vec::lanes)];
      float scores[Vec::lanes], indices[Vec::lanes];
      (column.score + 0.0f).store(scores);  // -0 becomes 0
      column.index.store(indices);
      for (int lane = 0; lane < Vec::lanes && first + lane < p_.codes; ++lane) {
        if (scores[lane] == kInfinity) continue;
        const uint64_t key = closest_key(bits_as<uint32_t>(scores[lane]), bits_as<uint32_t>(indices[lane]));
        uint64_t* target = keys + first + lane;
        uint64_t current = __atomic_load_n(target, __ATOMIC_RELAXED);
        while (key < current &&
               !__atomic_compare_exchange_n(target, &current, key, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        }
      }
    }
  }

 private:
  // The last tile is filled up with copies of the last feature: later equals, they change no minimum.
  void pack(int64_t first) {
    for (int f = 0; f < kBlock; ++f) {
      const int64_t n = first + f < p_.features ? first + f : p_.features - 1;
      const float* feature = p_.z + n * p_.channels;
      float* column = features_.data() + f / kTile * kTile * p_.channels + f % kTile;
      for (int64_t c = 0; c < p_.channels; ++c) column[c * kTile] = feature[c];
      half_norms_[f] = half_norm(feature, p_.channels);
      rows_[f] = Best{};
    }
  }

  static int64_t nearest(const Best& row) {
    float scores[Vec::lanes], vectors[Vec::lanes];
    row.score.store(scores);
    row.index.store(vectors);
    float score = kInfinity;
    int64_t code = 0;
    for (int lane = 0; lane < Vec::lanes; ++lane) {
      const int64_t candidate = int64_t{bits_as<int32_t>(vectors[lane])} * Vec::lanes + lane;
      if (scores[lane] < score || (scores[lane] == score && candidate < code)) {
        score = scores[lane];
        code = candidate;
      }
    }
    return code;
  }

  double finish(int64_t n, int64_t k) {
    const float* feature = p_.z + n * p_.channels;
    const float* code = p_.codebook + k * p_.channels;
    float* quantized = p_.quantized + n * p_.channels;
    double squares = 0;
    for (int64_t c = 0; c < p_.channels; ++c) {
      const double difference = double{code[c]} - feature[c];
      squares += difference * difference;
      quantized[c] = code[c];
    }
    p_.indices[n] = k;
    __atomic_fetch_add(&p_.usage[k], 1, __ATOMIC_RELAXED);
    return squares;
  }

  const VqLookupParams& p_;
  const Codebook& codebook_;
  std::vector<float> features_;  // (kBlock / kTile, channels, kTile)
  std::vector<Best> columns_;
  float half_norms_[kBlock];
  Best rows_[kBlock];
};

template <bool kClosest>
void lookup(const VqLookupParams& p, const Parallel& parallel) {
  const Codebook codebook(p, parallel);
  const int64_t blocks = (p.features + kBlock - 1) / kBlock;
  std::vector<double> squares(static_cast<size_t>(blocks));
  for (int64_t k = 0; k < p.codes; ++k) p.usage[k] = 0;
  uint64_t* keys = reinterpret_cast<uint64_t*>(p.closest);
  for (int64_t k = 0; kClosest && k < p.codes; ++k) keys[k] = kNoFeature;

  Scratch<Search<kClosest>> scratch(parallel, blocks, p, codebook);
  parallel(0, blocks, 1, [&](int64_t begin, int64_t end) {
    Search<kClosest>& search = scratch.take();
    for (int64_t b = begin; b < end; ++b) squares[static_cast<size_t>(b)] = search.block(b * kBlock);
    if constexpr (kClosest) search.merge_columns(keys);
  });

  for (int64_t k = 0; kClosest && k < p.codes; ++k) p.closest[k] = closest_feature(keys[k], p.features);
  double sum = 0;
  for (const double part : squares) sum += part;
  const double elements = static_cast<double>(p.features) * static_cast<double>(p.channels);
  *p.loss = p.features > 0 ? static_cast<float>((1.0 + p.commitment) * sum / elements) : 0.0f;
}

}  // namespace

void vq_lookup_cpu(const VqLookupParams& p, const Parallel& parallel) {
  if (p.closest != nullptr) {
    lookup<true>(p, parallel);
  } else {
    lookup<false>(p, parallel);
  }
}

void vq_lookup_backward_cpu(const VqLookupBackwardParams& p, const Parallel& parallel) {
  const int64_t channels = p.channels;
  const double elements = static_cast<double>(p.features) * static_cast<double>(channels);
  const float scale = p.features > 0 ? static_cast<float>(2.0 / elements * *p.grad_loss) : 0.0f;

  const int64_t rows_at_least = 1 + 16384 / channels;
  parallel(0, p.features, rows_at_least, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const float* code = p.codebook + p.indices[n] * channels;
      for (int64_t c = n * channels; c < (n + 1) * channels; ++c) {
        p.grad_z[c] = p.grad_quantized[c] + p.commitment * scale * (p.z[c] - code[c - n * channels]);
      }
    }
  });

  // A thread owns a range of codes and takes their features in order, so that sums do not depend on the threads.
  const int64_t codes_at_least = (p.codes + parallel.threads - 1) / parallel.threads;
  parallel(0, p.codes, codes_at_least, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * channels; i < end * channels; ++i) p.grad_codebook[i] = 0.0f;
    for (int64_t n = 0; n < p.features; ++n) {
      const int64_t k = p.indices[n];
      if (k < begin || k >= end) continue;
      const float* feature = p.z + n * channels;
      const float* code = p.codebook + k * channels;
      float* grad = p.grad_codebook + k * channels;
      for (int64_t c = 0; c < channels; ++c) grad[c] += scale * (code[c] - feature[c]);
    }
  });
}

}  // namespace alitok::ALITOK_ISA
