// sample_tokens and sample_tokens_next: checks, allocation, dispatch.
#include "sample_tokens.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "checks.h"
#include "cuda_stream.h"
#include "overlap.h"
#include "sample_settings.h"
#include "torch_parallel.h"

namespace alitok {

namespace {

LogitsDtype logits_dtype(const Tensor& logits) {
  check_dtype(logits, "logits", {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  switch (logits.scalar_type()) {
    case ScalarType::BFloat16: return LogitsDtype::bfloat16;
    case ScalarType::Half: return LogitsDtype::float16;
    default: return LogitsDtype::float32;
  }
}

// What the logits alone say: their dtype, and how many images and codes they are for.
SampleTokensParams logits_params(const Tensor& logits, bool guided) {
  SampleTokensParams p{};
  p.dtype = logits_dtype(logits);
  const int64_t rows = logits.size(0);
  p.codes = logits.size(logits.dim() - 1);
  check(p.codes >= 1 && p.codes <= int64_t{1} << 30, "logits", "1..2^30 codes along the last dimension",
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

Tensor sample_tokens(const Tensor& logits_any, const std::optional<Tensor>& guidance_scale, const Tensor& temperature,
                     const Tensor& top_k, const Tensor& top_p, const Tensor& seed, const Tensor& image_ids,
                     const Tensor& step) {
  check_tensors({{"logits", logits_any},
                 {"guidance_scale", guidance_scale},
                 {"temperature", temperature},
                 {"top_k", top_k},
                 {"top_p", top_p},
                 {"seed", seed},
                 {"image_ids", image_ids},
                 {"step", step}});
  check_dim(logits_any, "logits", 2);
  SampleTokensParams p = logits_params(logits_any, guidance_scale.has_value());
  if (guidance_scale) {
    p.guidance_scale =
        per_image<float>(*guidance_scale, "guidance_scale", ScalarType::Float, p.batch, "", [](float) { return true; });
  }
  p.settings = sample_settings(temperature, top_k, top_p, seed, image_ids, p.batch, "seed");
  check_shape(image_ids, "image_ids", {p.batch});
  p.step = integer_per_image(step, "step", p.batch);

  Tensor ids = torch::stable::new_empty(logits_any, {p.batch}, ScalarType::Long);
  if (p.batch == 0) return ids;
  const Tensor logits = contiguous_rows(logits_any);
  p.logits = logits.const_data_ptr();
  p.row_stride = logits.stride(0);
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

// Positions stay on the device: the kernel itself lets an image rest whose position is outside of its sequence.
void sample_tokens_next(const Tensor& logits, Tensor ids, Tensor positions, Tensor tokens, const Tensor& prompt_lengths,
                        const std::optional<Tensor>& schedule, const Tensor& temperature, const Tensor& top_k,
                        const Tensor& top_p, const Tensor& seeds, const Tensor& image_ids, Tensor passes_done,
                        int64_t window) {
  check_tensors({{"logits", logits},
                 {"ids", ids},
                 {"positions", positions},
                 {"tokens", tokens},
                 {"prompt_lengths", prompt_lengths},
                 {"schedule", schedule},
                 {"temperature", temperature},
                 {"top_k", top_k},
                 {"top_p", top_p},
                 {"seeds", seeds},
                 {"image_ids", image_ids},
                 {"passes_done", passes_done}});
  check_dim(logits, "logits", 3);
  check_contiguous(logits, "logits");
  SampleTokensParams p = logits_params(logits, schedule.has_value());
  check_range(window, "window", 1, 65535);
  check_size(logits, "logits", 1, window);
  const int64_t rows = logits.size(0);
  check_dim(ids, "ids", 2);
  check_integers(ids, "ids", {rows, ids.size(1)});
  check(ids.size(1) >= window, "ids", "size " + std::to_string(window) + " or more along dimension 1",
        "shape " + shape_name(ids));
  check_integers(positions, "positions", {rows});
  check_dim(tokens, "tokens", 2);
  check_integers(tokens, "tokens", {p.batch, tokens.size(1)});
  check_integers(prompt_lengths, "prompt_lengths", {p.batch});
  check_integers(passes_done, "passes_done", {p.batch});
  if (schedule) {
    check_dtype(*schedule, "schedule", {ScalarType::Float});
    check_shape(*schedule, "schedule", {p.batch, tokens.size(1)});
    check_contiguous(*schedule, "schedule");
    p.guidance_scale = {static_cast<const float*>(schedule->const_data_ptr()), tokens.size(1)};
  }
  p.settings = sample_settings(temperature, top_k, top_p, seeds, image_ids, p.batch);
  check_no_overlap({{"ids", ids}, {"positions", positions}, {"tokens", tokens}, {"passes_done", passes_done}},
                   {{"logits", logits},
                    {"prompt_lengths", prompt_lengths},
                    {"schedule", schedule},
                    {"temperature", temperature},
                    {"top_k", top_k},
                    {"top_p", top_p},
                    {"seeds", seeds},
                    {"image_ids", image_ids}});
  if (tokens.numel() == 0) return;
  p.next.length = tokens.size(1);
  p.next.columns = ids.size(1);
  p.next.window = window;
  p.next.prompt_lengths = static_cast<const int64_t*>(prompt_lengths.const_data_ptr());
  const Tensor draws = torch::stable::new_empty(tokens, {p.batch, window});
  p.next.draws = static_cast<int64_t*>(draws.mutable_data_ptr());
  p.logits = logits.const_data_ptr();
  p.row_stride = p.codes;
  p.ids = static_cast<int64_t*>(ids.mutable_data_ptr());
  p.next.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  p.next.positions = static_cast<int64_t*>(positions.mutable_data_ptr());
  p.next.passes_done = static_cast<int64_t*>(passes_done.mutable_data_ptr());
  ALITOK_DISPATCH_CUDA(sample_tokens_cuda, logits.get_device_index(), p);
}

STABLE_TORCH_LIBRARY_IMPL(alitok, CPU, m) { m.impl("sample_tokens", TORCH_BOX(&sample_tokens)); }

STABLE_TORCH_LIBRARY_IMPL(alitok, CUDA, m) {
  m.impl("sample_tokens", TORCH_BOX(&sample_tokens));
  m.impl("sample_tokens_next", TORCH_BOX(&sample_tokens_next));
}

}  // namespace
}  // namespace alitok
