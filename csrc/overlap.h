// Whether arguments that an operator writes share memory. Glue only: kernels may assume that nothing does.
//
// A written tensor has memory of its own for each element, and none in common with any other argument: otherwise
// numbers that were checked before the kernel could change under it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <utility>
#include <vector>

#include "checks.h"

namespace alitok {

// The bytes of a tensor as a block that repeats: along each remaining dimension `count` times, `step` bytes apart,
// from the largest step to the smallest. Nested: a step is at least as large as all that lies inside it.
struct Footprint {
  struct Repeat {
    int64_t count, step;
  };
  uintptr_t begin = 0;
  int64_t block = 0;  // bytes; 0: no memory at all
  std::vector<Repeat> repeats;
  bool nested = true;

  explicit Footprint(const Tensor& t) : begin(reinterpret_cast<uintptr_t>(t.const_data_ptr())) {
    if (t.numel() == 0) return;
    block = static_cast<int64_t>(t.element_size());
    std::vector<Repeat> dims;
    for (int64_t axis = 0; axis < t.dim(); ++axis) {
      if (t.size(axis) > 1) dims.push_back({t.size(axis), t.stride(axis) * block});
    }
    std::sort(dims.begin(), dims.end(), [](const Repeat& a, const Repeat& b) { return a.step < b.step; });
    for (const Repeat& dim : dims) {
      nested = nested && dim.step >= span();
      if (repeats.empty() && dim.step == block) {
        block *= dim.count;
      } else {
        repeats.insert(repeats.begin(), dim);
      }
    }
  }

  int64_t span() const {
    int64_t bytes = block;
    for (const Repeat& repeat : repeats) bytes += (repeat.count - 1) * repeat.step;
    return bytes;
  }

  // Whether a byte of [low, high), counted from the beginning, is one of the tensor's; of one that is not nested,
  // whether it may be.
  bool touches(int64_t low, int64_t high, size_t depth = 0) const {
    int64_t inner = block;
    for (size_t i = depth; i < repeats.size(); ++i) inner += (repeats[i].count - 1) * repeats[i].step;
    if (low >= high || high <= 0 || low >= inner) return false;
    if (!nested || depth == repeats.size()) return true;
    const auto [count, step] = repeats[depth];
    const int64_t inside = inner - (count - 1) * step;  // bytes of one repetition
    const int64_t first = low < inside ? 0 : (low - inside) / step + 1, last = std::min(count - 1, (high - 1) / step);
    if (last - first >= 2) return true;  // one in between lies in the range as a whole
    for (int64_t i = first; i <= last; ++i) {
      if (touches(low - i * step, high - i * step, depth + 1)) return true;
    }
    return false;
  }
};

inline bool share_memory(const Footprint& a, const Footprint& b) {
  if (a.block == 0 || b.block == 0) return false;
  const int64_t ahead = static_cast<int64_t>(b.begin - a.begin);  // separate allocations end here
  if (ahead >= a.span() || -ahead >= b.span()) return false;
  if (b.repeats.empty()) return a.touches(ahead, ahead + b.block);
  if (a.repeats.empty()) return b.touches(-ahead, -ahead + a.block);
  // Two with gaps: exact where they have one layout, as keys and values within one tensor do; a doubt is a yes.
  bool same = a.nested && b.nested && a.block == b.block && a.repeats.size() == b.repeats.size();
  for (size_t i = 0; same && i < a.repeats.size(); ++i)
    same = a.repeats[i].count == b.repeats[i].count && a.repeats[i].step == b.repeats[i].step;
  if (!same) return true;
  // Some (i - j) * step, summed over the repeats, brings the blocks within each other's reach. `from` is the distance
  // that is still to be covered, the differences of each repeat going from -(count - 1) to count - 1.
  const auto meet = [&](const auto& self, int64_t from, size_t depth) -> bool {
    if (depth == a.repeats.size()) return from > -a.block && from < a.block;
    const auto [count, step] = a.repeats[depth];
    const int64_t near = from / step;
    for (int64_t i = near - 1; i <= near + 1; ++i) {  // what lies inside a repetition reaches less than one step
      if (i > -count && i < count && self(self, from - i * step, depth + 1)) return true;
    }
    return false;
  };
  return meet(meet, ahead, 0);
}

// `written` have memory of their own, element by element, and share none with each other or with `read`.
inline void check_no_overlap(std::initializer_list<Argument> written, std::initializer_list<Argument> read) {
  std::vector<std::pair<const char*, Footprint>> owners;
  for (const Argument& argument : written) {
    if (argument.tensor == nullptr) continue;
    Footprint footprint(*argument.tensor);
    check(footprint.nested, argument.name, "memory of its own for each element, as it is written",
          "strides with which elements may share it");
    owners.emplace_back(argument.name, std::move(footprint));
  }
  const auto check_apart = [](const auto& owner, const char* other, const Footprint& footprint) {
    check(!share_memory(owner.second, footprint), owner.first, "memory of its own, as it is written",
          std::string("some that ") + other + " has too");
  };
  for (size_t i = 0; i < owners.size(); ++i) {
    for (size_t j = 0; j < i; ++j) check_apart(owners[i], owners[j].first, owners[j].second);
    for (const Argument& argument : read) {
      if (argument.tensor != nullptr) check_apart(owners[i], argument.name, Footprint(*argument.tensor));
    }
  }
}

}  // namespace alitok
