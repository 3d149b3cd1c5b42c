// The CUDA implementations, as binding.cpp registers them in builds that have them. No CUDA header.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <string>

namespace groupdpo_kernels {

using torch::stable::Tensor;

// add_weighted_rows of cpu/linear_logps.h with begins and ends apart: row i owns begins[i] <= j < ends[i], none if that
// is nothing. float16 too. On the current stream of out's device; reads nothing back.
void add_weighted_rows_cuda(Tensor out,            // (m, n) float32 | bfloat16 | float16, contiguous; shares no memory
                            Tensor source,         // (k, n) likewise, columns side by side
                            Tensor begins,         // (m,) int64
                            Tensor ends,           // (m,) int64
                            Tensor index,          // (K,) int64
                            Tensor coefficients);  // (K,) float32

// Why device `device` cannot run these; empty if it can.
std::string cuda_error(int64_t device);

}  // namespace groupdpo_kernels
