#include "case.h"
#include "sample_tokens_cuda.cu"

void run_case(simt::Case& test) {
  alitok::SampleTokensParams p{};
  p.dtype = static_cast<alitok::LogitsDtype>(test.integer("dtype"));
  p.batch = test.integer("batch");
  p.codes = test.integer("codes");
  // Rows of `row_stride` elements; `offset` elements into them, so that a row can start anywhere.
  const int64_t bytes = p.dtype == alitok::LogitsDtype::float32 ? 4 : 2;
  p.logits = test.input<unsigned char>("logits") + test.integer("offset") * bytes;
  p.row_stride = test.integer("row_stride");
  p.guidance_scale = test.input<float>("guidance_scale");
  p.guidance_stride = test.integer("guidance_stride");
  p.rule = {static_cast<float>(test.number("temperature")), test.integer("top_k"), test.number("top_p")};
  p.seed = test.input<int64_t>("seed");
  p.image_ids = test.input<int64_t>("image_ids");
  p.step = test.input<int64_t>("step");
  if (test.has("length")) {
    p.next.tokens = test.inout<int64_t>("tokens");
    p.next.length = test.integer("length");
    p.next.prompt_length = test.input<int64_t>("prompt_length");
    p.ids = test.inout<int64_t>("ids");
  } else {
    p.ids = test.output<int64_t>("ids", p.batch);
  }
  alitok::sample_tokens_cuda(p, nullptr);
}
