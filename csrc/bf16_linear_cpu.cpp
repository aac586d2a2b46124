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

template <class X, class Out>
struct Run {
  const PackedLinearParams& p;
  const Parallel& parallel;

  template <class Blocks>
  void run() const {
    const int64_t steps = bf16::blocks_over(p.inputs), size = steps * bf16::kStep;
    const int64_t blocks = bf16::blocks_over(p.rows), panels = bf16::blocks_over(p.outputs);
    const int64_t slots = even_parts(blocks, bf16::blocks_at_a_time(size));
    const auto* weight = static_cast<const uint16_t*>(p.weight);
    FloatBuffer chunk(slots * size / 2);
    auto* packed = reinterpret_cast<uint16_t*>(+chunk);
    const bool stream = streams(p.rows * p.outputs * static_cast<int64_t>(sizeof(typename Out::Storage)));
    for_blocks_and_panels<typename Blocks::Setup>(
        blocks, panels, slots, parallel,
        [&](int64_t first, int64_t count) {
          pack_slots(count, p.inputs, parallel, [&](int64_t slot, float* values) {
            pack_block<X>(p, first + slot, values, packed + slot * size);
          });
        },
        [&](int64_t panel, int64_t first, int64_t begin, int64_t end) {
          alignas(64) float product[kBlock * kBlock];
          for (int64_t slot = begin; slot < end; ++slot) {
            Blocks::multiply(packed + slot * size, weight + panel * size, steps, product);
            const int64_t row = (first + slot) * kBlock, column = panel * kBlock;
            for (int64_t r = 0; r < std::min(kBlock, p.rows - row); ++r)
              store_row<Out>(p, row + r, column, std::min(kBlock, p.outputs - column), stream, product + r * kBlock);
          }
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
