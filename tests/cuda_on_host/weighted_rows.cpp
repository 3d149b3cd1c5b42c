// weighted_rows.cu on the host, for tests through ctypes.
#include "cuda/weighted_rows.cu"

using namespace groupdpo_kernels;

extern "C" int add_weighted_rows(int dtype, void* out, const void* source, const int64_t* begins, const int64_t* ends,
                                 const int64_t* index, const float* coefficients, int64_t m, int64_t n,
                                 int64_t stride) {
  const WeightedRows x = {static_cast<WeightedRows::Dtype>(dtype), out, source, begins, ends, index, coefficients, m, n,
                          stride};
  return groupdpo_add_weighted_rows(&x, nullptr);
}

// What widen says of n values of bf16 or fp16, and narrow of n float32.
extern "C" void convert(int dtype, const uint16_t* bits, const float* x, float* wide, uint16_t* narrowed, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    wide[i] = dtype == 1 ? widen(Bf16{}, bits[i]) : widen(Fp16{}, bits[i]);
    narrowed[i] = static_cast<uint16_t>(dtype == 1 ? narrow(Bf16{}, x[i]) : narrow(Fp16{}, x[i]));
  }
}
