#include "fused_linear_cuda.cu"
#include "fused_linear_params.h"

void run_case(simt::Case& test) { alitok::fused_linear_cuda(fused_linear_params(test), nullptr); }
