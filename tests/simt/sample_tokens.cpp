#include "case.h"
#include "sample_tokens_cuda.cu"

// One element for all images, or one for each: `<name>_stride` says which.
template <class T>
alitok::PerImage<T> per_image(simt::Case& test, const std::string& name) {
  return {test.input<T>(name), test.has(name + "_stride") ? test.integer(name + "_stride") : 0};
}

void run_case(simt::Case& test) {
  alitok::SampleTokensParams p{};
  p.dtype = static_cast<alitok::LogitsDtype>(test.integer("dtype"));
  p.batch = test.integer("batch");
  p.codes = test.integer("codes");
  // Rows of `row_stride` elements; `offset` elements into them, so that a row can start anywhere.
  const int64_t bytes = p.dtype == alitok::LogitsDtype::float32 ? 4 : 2;
  p.logits = test.input<unsigned char>("logits") + test.integer("offset") * bytes;
  p.row_stride = test.integer("row_stride");
  p.guidance_scale = per_image<float>(test, "guidance_scale");
  p.settings = {per_image<float>(test, "temperature"), per_image<int64_t>(test, "top_k"),
                per_image<double>(test, "top_p"), per_image<int64_t>(test, "seed"),
                per_image<int64_t>(test, "image_ids")};
  if (test.has("length")) {
    p.next.tokens = test.inout<int64_t>("tokens");
    p.next.length = test.integer("length");
    p.next.columns = test.integer("columns");
    p.next.window = test.integer("window");
    p.next.prompt_lengths = test.input<int64_t>("prompt_lengths");
    p.next.positions = test.inout<int64_t>("positions");
    p.next.passes_done = test.inout<int64_t>("passes");
    p.next.draws = test.workspace<int64_t>(p.batch * p.next.window);
    p.ids = test.inout<int64_t>("ids");
  } else {
    p.step = per_image<int64_t>(test, "step");
    p.ids = test.output<int64_t>("ids", p.batch);
  }
  alitok::sample_tokens_cuda(p, nullptr);
}
