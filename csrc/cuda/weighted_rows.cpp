// The torch op over weighted_rows.cu: checks, the device and its current stream. No maths, no CUDA header, and of torch
// the stable ABI alone, so that one file runs on torch 2.11 and later, and loads where torch has no CUDA.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cuda/ops.h"
#include "cuda/weighted_rows.h"

namespace groupdpo_kernels {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;

// cudaStream_t. The device-generic way to it (Stream::nativeHandle) came with torch 2.13; the stable function of 2.11
// is in the library of torch's CUDA half, which a torch without one does not have: a name that the loader looks for
// would keep the whole module from loading there. `import torch` has loaded it, though not for all to see.
void* current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(function, "this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

WeightedRows::Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return WeightedRows::kFloat32;
    case ScalarType::BFloat16:
      return WeightedRows::kBfloat16;
    case ScalarType::Half:
      return WeightedRows::kFloat16;
    default:
      break;
  }
  STD_TORCH_CHECK(false, "out must be float32, bfloat16 or float16; got ",
                  torch::headeronly::toString(x.scalar_type()));
}

}  // namespace

void add_weighted_rows_cuda(Tensor out, Tensor source, Tensor begins, Tensor ends, Tensor index, Tensor coefficients) {
  const auto device = out.get_device_index();
  for (const Tensor* x : {&out, &source, &begins, &ends, &index, &coefficients}) {
    STD_TORCH_CHECK(x->is_cuda() && x->get_device_index() == device, "all tensors must be on the device of out");
  }
  const WeightedRows::Dtype dtype = dtype_of(out);
  STD_TORCH_CHECK(source.scalar_type() == out.scalar_type(), "source must have the dtype of out");
  STD_TORCH_CHECK(out.dim() == 2 && source.dim() == 2 && out.size(1) == source.size(1) && out.is_contiguous() &&
                      (source.stride(1) == 1 || source.size(1) == 1),
                  "out must be contiguous (m, n), and source (k, n) with columns side by side");
  for (const Tensor* x : {&begins, &ends}) {
    STD_TORCH_CHECK(
        x->scalar_type() == ScalarType::Long && x->dim() == 1 && x->is_contiguous() && x->size(0) == out.size(0),
        "begins and ends must be contiguous int64 (m,) with m = ", out.size(0));
  }
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long && index.dim() == 1 && index.is_contiguous() &&
                      coefficients.scalar_type() == ScalarType::Float && coefficients.dim() == 1 &&
                      coefficients.is_contiguous() && coefficients.size(0) == index.size(0),
                  "index must be int64 and coefficients float32, both contiguous (K,)");
  if (out.numel() == 0 || index.size(0) == 0) return;
  const WeightedRows x = {dtype,
                          out.mutable_data_ptr(),
                          source.const_data_ptr(),
                          begins.const_data_ptr<int64_t>(),
                          ends.const_data_ptr<int64_t>(),
                          index.const_data_ptr<int64_t>(),
                          coefficients.const_data_ptr<float>(),
                          out.size(0),
                          out.size(1),
                          source.stride(0)};
  const DeviceGuard guard(device);
  const int error = groupdpo_add_weighted_rows(&x, current_stream(device));
  STD_TORCH_CHECK(error == 0, "groupdpo_kernels::add_weighted_rows_cuda: ", groupdpo_cuda_error(error));
}

std::string cuda_error(int64_t device) {
  const DeviceGuard guard(static_cast<int32_t>(device));
  const int error = groupdpo_cuda_probe();
  return error == 0 ? "" : groupdpo_cuda_error(error);
}

}  // namespace groupdpo_kernels
