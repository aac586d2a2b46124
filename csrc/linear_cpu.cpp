// Three products in blocks of bfloat16 (bf16_blocks.h), whose factors are packed as they come:
//   out = x W^T + bias;  grad_x = grad W;  grad_weight = grad^T x, over so many rows at a time.
#include "linear.h"

#include <algorithm>

#include "bf16_blocks.h"
#include "float_buffer.h"
#include "linear_rows.h"

namespace alitok {
namespace ALITOK_ISA {
namespace {

using bf16::blocks_over;
using bf16::kBlock;
using bf16::kStep;

constexpr int64_t kMostDepth = 3072;  // rows summed at a time: their blocks stay in the second-level cache

// Blocks of a left matrix, or panels of a right one, of so many elements each.
struct Packed {
  int64_t count, size;
  FloatBuffer memory;

  Packed(int64_t count, int64_t depth) : count(count), size(blocks_over(depth) * kStep), memory(count * size / 2) {}
  uint16_t* at(int64_t i) { return reinterpret_cast<uint16_t*>(+memory) + i * size; }

  // The first `blocks` of them, from a source in which each row is one depth (Along), or one row or column of the matrix.
  // Either way its rows are read along.
  template <bool Left, bool Along, class T>
  void pack(int64_t blocks, const T* source, int64_t stride, int64_t outer, int64_t depth, const Parallel& parallel) {
    if constexpr (Along) {
      parallel(0, size / kStep, 1, [&](int64_t begin, int64_t end) {
        for (int64_t step = begin; step < end; ++step)
          for (int64_t i = 0; i < blocks; ++i)
            bf16::pack_steps<Left, true>(source + step * kBlock * stride + i * kBlock, stride, outer - i * kBlock,
                                         std::min(kBlock, depth - step * kBlock), at(i) + step * kStep);
      });
    } else {
      parallel(0, blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          bf16::pack_steps<Left, false>(source + i * kBlock * stride, stride, outer - i * kBlock, depth, at(i));
      });
    }
  }
};

// The weights as right matrix: of x (outputs are its columns), or of grad (inputs are, Along).
template <bool Along>
Packed weight_panels(const LinearParams& p, const Parallel& parallel) {
  const int64_t columns = Along ? p.inputs : p.outputs, depth = Along ? p.outputs : p.inputs;
  Packed panels(blocks_over(columns), depth);
  if (p.float_weight) {
    const auto* weight = static_cast<const float*>(p.weight);
    panels.pack<false, Along>(panels.count, weight, p.inputs, columns, depth, parallel);
  } else {
    const auto* weight = static_cast<const uint16_t*>(p.weight);
    panels.pack<false, Along>(panels.count, weight, p.inputs, columns, depth, parallel);
  }
  return panels;
}

// The product of `rows` rows with the panels. pack(first row, rows, blocks) makes left blocks;
// store(row, column, columns, products) gets each row of each block of the result.
template <class Pack, class Store>
struct Product {
  int64_t rows, columns;
  Packed& panels;
  const Parallel& parallel;
  const Pack& pack;
  const Store& store;

  template <class Blocks>
  void run() const {
    const int64_t size = panels.size, blocks = blocks_over(rows);
    Packed chunk(even_parts(blocks, bf16::blocks_at_a_time(size)), size / kStep * kBlock);
    for_blocks_and_panels<typename Blocks::Setup>(
        blocks, panels.count, chunk.count, parallel,
        [&](int64_t first, int64_t slots) {
          pack(first * kBlock, std::min(slots * kBlock, rows - first * kBlock), chunk);
        },
        [&](int64_t panel, int64_t first, int64_t begin, int64_t end) {
          alignas(64) float product[kBlock * kBlock];
          const int64_t column = panel * kBlock;
          for (int64_t slot = begin; slot < end; ++slot) {
            Blocks::multiply(chunk.at(slot), panels.at(panel), size / kStep, product);
            const int64_t row = (first + slot) * kBlock;
            for (int64_t r = 0; r < std::min(kBlock, rows - row); ++r)
              store(row + r, column, std::min(kBlock, columns - column), product + r * kBlock);
          }
        });
  }
};

template <class Pack, class Store>
void multiply(int64_t rows, int64_t columns, Packed& panels, const Parallel& parallel, const Pack& pack,
              const Store& store) {
  bf16::with_blocks(Product<Pack, Store>{rows, columns, panels, parallel, pack, store});
}

// x or grad as left matrix: (rows, depth) times the panels, to out (rows, columns).
void multiply_rows(const uint16_t* x, int64_t rows, int64_t depth, Packed& panels, const float* bias, uint16_t* out,
                   int64_t columns, const Parallel& parallel) {
  const bool stream = streams(rows * columns * static_cast<int64_t>(sizeof *out));
  multiply(
      rows, columns, panels, parallel,
      [&](int64_t row, int64_t count, Packed& blocks) {
        blocks.pack<true, false>(blocks_over(count), x + row * depth, depth, count, depth, parallel);
      },
      [&](int64_t row, int64_t column, int64_t count, const float* products) {
        write_panel<BFloat16>(out + row * columns + column, count, stream, [&](int64_t i, auto n) {
          const Vec v = Vec::load(products + i);
          return bias == nullptr ? v : v + Vec::load(bias + column + i, n);
        });
      });
}

// Adds the sums over the rows to `sums`.
void add_columns(const uint16_t* x, int64_t stride, int64_t rows, int64_t columns, float* sums,
                 const Parallel& parallel) {
  parallel(0, blocks_over(columns), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kBlock; i < std::min(columns, end * kBlock); i += kBlock)
      for_panel(std::min(kBlock, columns - i), [&](int64_t v, auto n) {
        Vec total = Vec::load(sums + i + v, n);
        for (int64_t r = 0; r < rows; ++r) total += Vec::load_bf16(x + r * stride + i + v, n);
        total.store(sums + i + v, n);
      });
  });
}

// grad_weight and grad_bias, of which either may be missing.
void sum_over_rows(const LinearBackwardParams& b, const Parallel& parallel) {
  const LinearParams& p = b.forward;
  if (b.grad_bias != nullptr) std::fill(b.grad_bias, b.grad_bias + p.outputs, 0.0f);
  if (b.grad_weight != nullptr && p.rows == 0) std::fill(b.grad_weight, b.grad_weight + p.outputs * p.inputs, 0.0f);
  const bool stream = streams(p.outputs * p.inputs * static_cast<int64_t>(sizeof(float)));
  const int64_t part = even_parts(blocks_over(p.rows), kMostDepth / kBlock) * kBlock;
  for (int64_t first = 0; first < p.rows; first += part) {
    const int64_t depth = std::min(part, p.rows - first);
    const uint16_t* grad = b.grad + first * p.outputs;
    Packed panels(b.grad_weight == nullptr ? 0 : blocks_over(p.inputs), depth);
    panels.pack<false, true>(panels.count, p.x + first * p.inputs, p.inputs, p.inputs, depth, parallel);
    multiply(
        p.outputs, p.inputs, panels, parallel,
        [&](int64_t output, int64_t count, Packed& blocks) {
          if (b.grad_weight != nullptr)
            blocks.pack<true, true>(blocks_over(count), grad + output, p.outputs, count, depth, parallel);
          if (b.grad_bias != nullptr)
            add_columns(grad + output, p.outputs, depth, count, b.grad_bias + output, parallel);
        },
        [&](int64_t output, int64_t input, int64_t count, const float* products) {
          float* to = b.grad_weight + output * p.inputs + input;
          write_panel<Float32>(to, count, stream, [&](int64_t i, auto n) {
            const Vec v = Vec::load(products + i);
            return first == 0 ? v : v + Vec::load(to + i, n);
          });
        });
  }
}

}  // namespace

void linear_cpu(const LinearParams& p, const Parallel& parallel) {
  Packed panels = weight_panels<false>(p, parallel);
  multiply_rows(p.x, p.rows, p.inputs, panels, p.bias, p.out, p.outputs, parallel);
}

void linear_backward_cpu(const LinearBackwardParams& b, const Parallel& parallel) {
  const LinearParams& p = b.forward;
  if (b.grad_x != nullptr) {
    Packed panels = weight_panels<true>(p, parallel);
    multiply_rows(b.grad, p.rows, p.outputs, panels, nullptr, b.grad_x, p.inputs, parallel);
  }
  if (b.grad_weight != nullptr || b.grad_bias != nullptr) sum_over_rows(b, parallel);
}

}  // namespace ALITOK_ISA
}  // namespace alitok
