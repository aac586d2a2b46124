// The settings of images as the operators that draw have them. Glue only.
#pragma once

#include <string>

#include "checks.h"
#include "sample_tokens.h"

namespace alitok {

// () or (batch) of `dtype`; on the CPU with values that `fits`.
template <class T, class Fits>
PerImage<T> per_image(const Tensor& t, const char* argument, ScalarType dtype, int64_t batch, const char* expected,
                      const Fits& fits) {
  check_dtype(t, argument, {dtype});
  check(t.dim() == 0 || (t.dim() == 1 && t.size(0) == batch), argument, "shape () or (" + std::to_string(batch) + ",)",
        "shape " + shape_name(t));
  const PerImage<T> values{static_cast<const T*>(t.const_data_ptr()), t.dim() == 0 ? 0 : t.stride(0)};
  if (!t.is_cuda() && t.numel() > 0) {
    for (int64_t b = 0; b < (t.dim() == 0 ? 1 : batch); ++b)
      check(fits(of_image(values, b)), argument, expected, of_image(values, b));
  }
  return values;
}

inline PerImage<int64_t> integer_per_image(const Tensor& t, const char* argument, int64_t batch) {
  return per_image<int64_t>(t, argument, ScalarType::Long, batch, "", [](int64_t) { return true; });
}

// Throws std::invalid_argument, naming the setting that is wrong; what lies on a device has no values to look at.
inline SampleSettings sample_settings(const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
                                      const Tensor& seeds, const Tensor& image_ids, int64_t batch,
                                      const char* seeds_name = "seeds") {
  SampleSettings s{};
  s.temperature = per_image<float>(temperature, "temperature", ScalarType::Float, batch,
                                   "0 (greedy) or a number in 1e-30..1e30", [](float t) { return is_temperature(t); });
  s.top_k =
      per_image<int64_t>(top_k, "top_k", ScalarType::Long, batch, "0 (all) or more", [](int64_t k) { return k >= 0; });
  s.top_p = per_image<double>(top_p, "top_p", ScalarType::Double, batch, "a number in (0, 1]",
                              [](double p) { return is_top_p(p); });
  s.seed = integer_per_image(seeds, seeds_name, batch);
  s.image_id = integer_per_image(image_ids, "image_ids", batch);
  return s;
}

}  // namespace alitok
