// What `groupdpo_kernels._C` says of itself: shared by its two forms, module.cpp and limited_module.cpp.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/block.h"
#include "cpu/row.h"
#include "cpu/tail.h"
#ifdef GROUPDPO_KERNELS_CUDA_CODE
#include "cuda/ops.h"
#endif

namespace groupdpo_kernels {

inline constexpr const char* kModuleDoc =
    "C++ kernels of groupdpo_kernels: importing this module registers them with torch.";
inline constexpr const char* kBuildInfoDoc =
    "Versions and compiler of this build, and what it can use on this machine.";
inline constexpr const char* kCpuCapabilityDoc =
    "Which copy of the loops over a row runs: default, avx2 or avx512; ValueError for what this processor lacks. Returns"
    " the one of before. Not while another thread computes.";
inline constexpr const char* kBf16ProductsDoc =
    "Whether bfloat16 is multiplied as it is (where this machine can) or widened to float32 first. Returns what was"
    " before.";
inline constexpr const char* kCudaErrorDoc =
    "Why the device of that index cannot run this build's code, or ''.";

struct Names {
  const char* joined;  // by commas; empty for none. A tuple of strings in Python
};

// Calls field(name, value) for each entry of build_info(). Values: const char*, bool, int64_t, double, a pair of int64_t,
// Names.
template <typename Field>
void each_build_info(Field field) {
#ifdef _OPENMP
  constexpr bool openmp = true;
#else
  constexpr bool openmp = false;  // threads are torch's own, through its stable parallel_for
#endif
  field("version", GROUPDPO_KERNELS_VERSION);
  field("torch", GROUPDPO_KERNELS_TORCH_VERSION);
  field("compiler", GROUPDPO_KERNELS_COMPILER);
  field("abi", "stable");
  field("openmp", openmp);
  field("cpu_capability", cpu_capability());
  field("widest_cpu_capability", widest_cpu_capability());
  field("bf16_products", bf16_products());
  field("block", std::pair<int64_t, int64_t>(kMostBlockRows, kMostBlockColumns));
  field("sum_error", static_cast<double>(kSumError));
  field("tail_samples", static_cast<int64_t>(kTailSamples));
#ifdef GROUPDPO_KERNELS_CUDA_CODE
  field("cuda_architectures", Names{GROUPDPO_KERNELS_CUDA_CODE});
#else
  field("cuda_architectures", Names{""});
#endif
}

}  // namespace groupdpo_kernels
