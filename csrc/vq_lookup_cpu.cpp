// CPU kernels of vq_lookup. Lanes are codes: a tile scores kTile features against kVectors vectors of codes, with all
// scores in registers, and goes straight from there into the running minima of its features and of its codes.
#include "vq_lookup.h"

#include <cmath>
#include <cstring>
#include <limits>

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

// Smallest score of each lane so far, and where it was. The index travels as a bit pattern: blends leave it alone.
struct Best {
  Vec score = broadcast(kInfinity);
  Vec index = broadcast_bits(0);

  // Strictly smaller: of equals the first one stays. A NaN is never smaller.
  void update(Vec candidate, Vec candidate_index) {
    const Mask smaller = candidate < score;
    score = select(smaller, candidate, score);
    index = select(smaller, candidate_index, index);
  }
};

int32_t index_of(const Best& best, int lane) {
  float lanes[Vec::lanes];
  store(lanes, best.index);
  int32_t index;
  std::memcpy(&index, &lanes[lane], sizeof(index));
  return index;
}

float half_norm(const float* row, int64_t channels) {
  double sum = 0;
  for (int64_t c = 0; c < channels; ++c) sum += double{row[c]} * row[c];
  return static_cast<float>(sum / 2);
}

// The codebook in panels of kPanel codes: (panels, channels, kPanel), and each code's half norm. Codes that fill up the
// last panel have an infinite one, so that they are never the nearest.
struct Codebook {
  int64_t panels;
  Buffer<float> codes, half_norms;

  Codebook(const VqLookupParams& p, const Parallel& parallel)
      : panels((p.codes + kPanel - 1) / kPanel), codes(panels * p.channels * kPanel), half_norms(panels * kPanel) {
    parallel(0, panels * kPanel, 16 * kPanel, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const bool filler = k >= p.codes;
        const float* code = p.codebook + k * p.channels;
        float* column = codes.data() + k / kPanel * p.channels * kPanel + k % kPanel;
        for (int64_t c = 0; c < p.channels; ++c) column[c * kPanel] = filler ? 0.0f : code[c];
        half_norms[k] = filler ? kInfinity : half_norm(code, p.channels);
      }
    });
  }
};

// Score kTile features, packed as (channels, kTile), against one panel.
template <bool kClosest>
void score_tile(const float* features, const float* feature_half_norms, int32_t first_feature, int64_t channels,
                const float* panel, const float* half_norms, int32_t first_vector, Best* rows, Best* columns) {
  Vec score[kTile][kVectors];
#pragma GCC unroll 8
  for (int f = 0; f < kTile; ++f) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) score[f][v] = load(half_norms + v * Vec::lanes);
  }
  for (int64_t c = 0; c < channels; ++c) {
    Vec code[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) code[v] = load(panel + c * kPanel + v * Vec::lanes);
#pragma GCC unroll 8
    for (int f = 0; f < kTile; ++f) {
      const Vec feature = broadcast(features[c * kTile + f]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) score[f][v] = fnmadd(feature, code[v], score[f][v]);
    }
  }
#pragma GCC unroll 8
  for (int f = 0; f < kTile; ++f) {
    Best row = rows[f];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) row.update(score[f][v], broadcast_bits(first_vector + v));
    rows[f] = row;
  }
  if constexpr (kClosest) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      Best column = columns[v];
#pragma GCC unroll 8
      for (int f = 0; f < kTile; ++f) {
        column.update(score[f][v] + broadcast(feature_half_norms[f]), broadcast_bits(first_feature + f));
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
        features_(kBlock * p.channels),
        columns_(kClosest ? codebook.panels * kVectors : 0) {
    for (Best& column : columns_) column = Best{};
  }

  // Returns the block's sum of squared distances between feature and code.
  double block(int64_t first) {
    pack(first);
    for (int64_t panel = 0; panel < codebook_.panels; ++panel) {
      for (int f = 0; f < kBlock && first + f < p_.features; f += kTile) {
        score_tile<kClosest>(features_.data() + f * p_.channels, half_norms_ + f, static_cast<int32_t>(first + f),
                             p_.channels, codebook_.codes.data() + panel * p_.channels * kPanel,
                             codebook_.half_norms.data() + panel * kPanel, static_cast<int32_t>(panel * kVectors),
                             rows_ + f, columns_.data() + panel * kVectors);
      }
    }
    double squares = 0;
    for (int f = 0; f < kBlock && first + f < p_.features; ++f) squares += finish(first + f, nearest(rows_[f]));
    return squares;
  }

  // Lower each code's key to this thread's candidate.
  void merge_columns(uint64_t* keys) const {
    for (int64_t k = 0; k < p_.codes; ++k) {
      const Best& column = columns_[k / Vec::lanes];
      const int lane = static_cast<int>(k % Vec::lanes);
      float scores[Vec::lanes];
      store(scores, column.score + broadcast(0.0f));  // -0 becomes 0
      if (scores[lane] == kInfinity) continue;
      uint32_t bits;
      std::memcpy(&bits, &scores[lane], sizeof(bits));
      const uint64_t key = closest_key(bits, static_cast<uint32_t>(index_of(column, lane)));
      uint64_t current = __atomic_load_n(&keys[k], __ATOMIC_RELAXED);
      while (key < current && !__atomic_compare_exchange_n(&keys[k], &current, key, false, __ATOMIC_RELAXED,
                                                           __ATOMIC_RELAXED)) {
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
    float scores[Vec::lanes];
    store(scores, row.score);
    float score = kInfinity;
    int64_t code = 0;
    for (int lane = 0; lane < Vec::lanes; ++lane) {
      const int64_t candidate = int64_t{index_of(row, lane)} * Vec::lanes + lane;
      if (scores[lane] < score || (scores[lane] == score && candidate < code)) {
        score = scores[lane];
        code = candidate;
      }
    }
    return score < kInfinity ? code : 0;
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
  Buffer<float> features_;  // (kBlock / kTile, channels, kTile)
  Buffer<Best> columns_;
  float half_norms_[kBlock];
  Best rows_[kBlock];
};

template <bool kClosest>
void lookup(const VqLookupParams& p, const Parallel& parallel) {
  const Codebook codebook(p, parallel);
  const int64_t blocks = (p.features + kBlock - 1) / kBlock;
  Buffer<double> squares(blocks);
  for (int64_t k = 0; k < p.codes; ++k) p.usage[k] = 0;
  uint64_t* keys = reinterpret_cast<uint64_t*>(p.closest);
  for (int64_t k = 0; kClosest && k < p.codes; ++k) keys[k] = kNoFeature;

  parallel(0, blocks, 1, [&](int64_t begin, int64_t end) {
    Search<kClosest> search(p, codebook);
    for (int64_t b = begin; b < end; ++b) squares[b] = search.block(b * kBlock);
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
