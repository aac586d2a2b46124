#include "bf16_linear.h"

#include "bf16_blocks.h"
#include "linear_rows.h"

namespace alitok {
namespace ALITOK_ISA {
namespace {

using bf16::kBlock;
static_assert(kBlock == kBf16PanelOutputs && kBlock == kBf16StepInputs);

template <class X>
void pack_block(const PackedLinearParams& p, int64_t block, float* values, uint16_t* packed) {
  const auto* x = static_cast<const typename X::Storage*>(p.x);
  for (int64_t r = 0; r < std::min(kBlock, p.rows - block * kBlock); ++r) {
    const int64_t row = block * kBlock + r;
    if (p.norm_weight == nullptr) {
      bf16::pack_row(x + row * p.inputs, p.inputs, r, packed);
    } else {
      load_row<X>(p, row, values);
      bf16::pack_row(values, p.inputs, r, packed);
    }
  }
}

// Packed blocks, and a row on its way into one.
struct Space {
  FloatBuffer memory;
  FloatRow row;
  Space(int64_t elements, int64_t inputs) : memory(elements / 2), row(inputs) {}
  uint16_t* packed() { return reinterpret_cast<uint16_t*>(+memory); }
};

template <class X, class Out>
struct Run {
  const PackedLinearParams& p;
  const Parallel& parallel;
  const int64_t steps = bf16::blocks_over(p.inputs), size = steps * bf16::kStep;
  const int64_t blocks = bf16::blocks_over(p.rows), panels = bf16::blocks_over(p.outputs);
  const bool stream = streams(p.rows * p.outputs * static_cast<int64_t>(sizeof(typename Out::Storage)));

  template <class Blocks>
  void run() const {
    using Setup = typename Blocks::Setup;
    const int64_t most = bf16::blocks_at_a_time(size);
    if (own_blocks(blocks, parallel)) {
      const int64_t slots = even_parts(blocks / parallel.threads, most);
      Scratch<Space> spaces(parallel, blocks, slots * size, p.inputs);
      for_own_blocks<Setup>(
          blocks, panels, slots, parallel, spaces,
          [&](Space& space, int64_t block, int64_t slot) {
            pack_block<X>(p, block, +space.row.values, space.packed() + slot * size);
          },
          [&](Space& space, int64_t panel, int64_t first, int64_t count) {
            multiply<Blocks>(space.packed(), panel, first, 0, count);
          });
      return;
    }
    const int64_t slots = even_parts(blocks, most);
    Space space(slots * size, 0);
    for_blocks_and_panels<Setup>(
        blocks, panels, slots, parallel,
        [&](int64_t first, int64_t count) {
          pack_slots(count, p.inputs, parallel, [&](int64_t slot, float* values) {
            pack_block<X>(p, first + slot, values, space.packed() + slot * size);
          });
        },
        [&](int64_t panel, int64_t first, int64_t begin, int64_t end) {
          multiply<Blocks>(space.packed(), panel, first, begin, end);
        });
  }

  // Slots `begin` to `end` of `packed`, whose first block is `first`, with a panel.
  template <class Blocks>
  void multiply(const uint16_t* packed, int64_t panel, int64_t first, int64_t begin, int64_t end) const {
    const int64_t column = panel * kBlock, columns = std::min(kBlock, p.outputs - column);
    bf16::multiply_each<Blocks>(
        begin, end, static_cast<const uint16_t*>(p.weight) + panel * size, steps,
        [&](int64_t slot) { return packed + slot * size; },
        [&](int64_t slot, int64_t r, const float* products) {
          const int64_t row = (first + slot) * kBlock + r;
          if (row < p.rows) store_row<Out>(p, row, column, columns, stream, products);
        });
  }
};

struct WithTypes {
  const PackedLinearParams& p;
  const Parallel& parallel;
  template <class X, class Out>
  void run() const {
    bf16::with_blocks(Run<X, Out>{p, parallel});
  }
};

}  // namespace

void bf16_linear_cpu(const PackedLinearParams& p, const Parallel& parallel) {
  with_linear_types(p, WithTypes{p, parallel});
}

}  // namespace ALITOK_ISA
}  // namespace alitok
