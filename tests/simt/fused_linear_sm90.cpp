#include "fused_linear_params.h"
#include "fused_linear_sm90.cu"

void run_case(simt::Case& test) { alitok::fused_linear_sm90(fused_linear_params(test), nullptr); }
