// sample_tokens and sample_tokens_next: checks, allocation, dispatch.
#include "sample_tokens.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "checks.h"
#include "cuda_stream.h"
#include "overlap.h"
#include "torch_parallel.h"

namespace alitok {

SampleRule sample_rule(double temperature, std::optional<int64_t> top_k, std::optional<double> top_p, int64_t codes) {
  check(temperature == 0 || (temperature >= 1e-30 && temperature <= 1e30), "temperature",
        "0 (greedy) or a number in 1e-30..1e30", temperature);
  check(!top_k || *top_k >= 1, "top_k", "None or a number >= 1", top_k.value_or(0));
  check(!top_p || (*top_p > 0 && *top_p <= 1), "top_p", "None or a number in (0, 1]", top_p.value_or(0));
  return {static_cast<float>(temperature), top_k.value_or(codes), top_p.value_or(1.0)};
}

namespace {

LogitsDtype logits_dtype(const Tensor& logits) {
  check_dtype(logits, "logits", {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  switch (logits.scalar_type()) {
    case ScalarType::BFloat16: return LogitsDtype::bfloat16;
    case ScalarType::Half: return LogitsDtype::float16;
    default: return LogitsDtype::float32;
  }
}

const int64_t* one_integer(const Tensor& t, const char* argument) {
  check_dtype(t, argument, {ScalarType::Long});
  check(t.numel() == 1, argument, "one element", "shape " + shape_name(t));
  return static_cast<const int64_t*>(t.const_data_ptr());
}

// What the logits alone say: their dtype, and how many images and codes they are for.
SampleTokensParams logits_params(const Tensor& logits, bool guided) {
  SampleTokensParams p{};
  p.dtype = logits_dtype(logits);
  check_dim(logits, "logits", 2);
  const int64_t rows = logits.size(0);
  p.codes = logits.size(1);
  check(p.codes >= 1 && p.codes <= int64_t{1} << 30, "logits", "1..2^30 codes along dimension 1",
        "shape " + shape_name(logits));
  p.batch = guided ? rows / 2 : rows;
  check(p.batch <= INT32_MAX, "logits", "at most 2^31 - 1 images", "shape " + shape_name(logits));
  check(!guided || rows % 2 == 0, "logits", "an even number of rows with guidance (conditional, then unconditional)",
        "shape " + shape_name(logits));
  return p;
}

Tensor contiguous_rows(const Tensor& logits) {
  return logits.size(1) == 1 || logits.stride(1) == 1 ? logits : torch::stable::contiguous(logits);
}

Tensor sample_tokens(const Tensor& logits_any, const std::optional<Tensor>& guidance_scale, double temperature,
                     std::optional<int64_t> top_k, std::optional<double> top_p, const Tensor& seed,
                     const Tensor& image_ids_any, const Tensor& step) {
  check_tensors({{"logits", logits_any},
                 {"guidance_scale", guidance_scale},
                 {"seed", seed},
                 {"image_ids", image_ids_any},
                 {"step", step}});
  SampleTokensParams p = logits_params(logits_any, guidance_scale.has_value());
  if (guidance_scale) {
    check_dtype(*guidance_scale, "guidance_scale", {ScalarType::Float});
    check(guidance_scale->dim() == 0 || (guidance_scale->dim() == 1 && guidance_scale->size(0) == p.batch),
          "guidance_scale", "shape () or (" + std::to_string(p.batch) + ",)", "shape " + shape_name(*guidance_scale));
    p.guidance_scale = static_cast<const float*>(guidance_scale->const_data_ptr());
    p.guidance_stride = guidance_scale->dim() == 0 ? 0 : guidance_scale->stride(0);
  }
  p.rule = sample_rule(temperature, top_k, top_p, p.codes);
  p.seed = one_integer(seed, "seed");
  check_dtype(image_ids_any, "image_ids", {ScalarType::Long});
  check_shape(image_ids_any, "image_ids", {p.batch});
  p.step = one_integer(step, "step");

  Tensor ids = torch::stable::new_empty(logits_any, {p.batch}, ScalarType::Long);
  if (p.batch == 0) return ids;
  const Tensor logits = contiguous_rows(logits_any);
  const Tensor image_ids = torch::stable::contiguous(image_ids_any);
  p.logits = logits.const_data_ptr();
  p.row_stride = logits.stride(0);
  p.image_ids = static_cast<const int64_t*>(image_ids.const_data_ptr());
  p.ids = static_cast<int64_t*>(ids.mutable_data_ptr());
  if (logits.is_cuda()) {
    ALITOK_DISPATCH_CUDA(sample_tokens_cuda, logits.get_device_index(), p);
  } else {
    ALITOK_DISPATCH_ISA(sample_tokens_cpu, p, torch_parallel());
  }
  return ids;
}

void check_integers(const Tensor& t, const char* argument, std::initializer_list<int64_t> shape) {
  check_dtype(t, argument, {ScalarType::Long});
  check_shape(t, argument, shape);
  check_contiguous(t, argument);
}

// The position stays on the device: the kernel itself refuses one that is outside of the sequences.
void sample_tokens_next(const Tensor& logits_any, Tensor ids, Tensor tokens, const Tensor& prompt_length,
                        const std::optional<Tensor>& schedule, double temperature, std::optional<int64_t> top_k,
                        std::optional<double> top_p, const Tensor& seed, const Tensor& image_ids,
                        const Tensor& position) {
  check_tensors({{"logits", logits_any},
                 {"ids", ids},
                 {"tokens", tokens},
                 {"prompt_length", prompt_length},
                 {"schedule", schedule},
                 {"seed", seed},
                 {"image_ids", image_ids},
                 {"position", position}});
  SampleTokensParams p = logits_params(logits_any, schedule.has_value());
  check_integers(ids, "ids", {logits_any.size(0)});
  check_dim(tokens, "tokens", 2);
  check_integers(tokens, "tokens", {p.batch, tokens.size(1)});
  check_integers(image_ids, "image_ids", {p.batch});
  if (schedule) {
    check_dtype(*schedule, "schedule", {ScalarType::Float});
    check_shape(*schedule, "schedule", {tokens.size(1)});
    check_contiguous(*schedule, "schedule");
    p.guidance_scale = static_cast<const float*>(schedule->const_data_ptr());
  }
  p.rule = sample_rule(temperature, top_k, top_p, p.codes);
  p.seed = one_integer(seed, "seed");
  p.image_ids = static_cast<const int64_t*>(image_ids.const_data_ptr());
  p.step = one_integer(position, "position");
  p.next.length = tokens.size(1);
  p.next.prompt_length = one_integer(prompt_length, "prompt_length");
  check_no_overlap({{"ids", ids}, {"tokens", tokens}}, {{"logits", logits_any},
                                                        {"prompt_length", prompt_length},
                                                        {"schedule", schedule},
                                                        {"seed", seed},
                                                        {"image_ids", image_ids},
                                                        {"position", position}});
  if (tokens.numel() == 0) return;
  const Tensor logits = contiguous_rows(logits_any);
  p.logits = logits.const_data_ptr();
  p.row_stride = logits.stride(0);
  p.ids = static_cast<int64_t*>(ids.mutable_data_ptr());
  p.next.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  ALITOK_DISPATCH_CUDA(sample_tokens_cuda, logits.get_device_index(), p);
}

STABLE_TORCH_LIBRARY_IMPL(alitok, CPU, m) { m.impl("sample_tokens", TORCH_BOX(&sample_tokens)); }

STABLE_TORCH_LIBRARY_IMPL(alitok, CUDA, m) {
  m.impl("sample_tokens", TORCH_BOX(&sample_tokens));
  m.impl("sample_tokens_next", TORCH_BOX(&sample_tokens_next));
}

}  // namespace
}  // namespace alitok
