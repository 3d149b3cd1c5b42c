// What weighted_rows.cu offers: launchers that take raw device pointers and a cudaStream_t and return a cudaError_t.
// Neither a torch header nor a CUDA one, so both sides include it.
#pragma once
#include <stdint.h>

namespace groupdpo_kernels {

struct WeightedRows {
  enum Dtype { kFloat32, kBfloat16, kFloat16 };

  Dtype dtype;                // of out and source
  void* out;                  // (m, n) contiguous
  const void* source;         // (k, n), rows `stride` elements apart
  const int64_t* begins;      // (m,)
  const int64_t* ends;        // (m,); a row that does not end after it begins owns nothing
  const int64_t* index;       // (K,)
  const float* coefficients;  // (K,)
  int64_t m, n, stride;
};

extern "C" int groupdpo_add_weighted_rows(const WeightedRows* x, void* stream);
// Whether the current device can run the code of this build.
extern "C" int groupdpo_cuda_probe();
extern "C" const char* groupdpo_cuda_error(int error);

}  // namespace groupdpo_kernels
