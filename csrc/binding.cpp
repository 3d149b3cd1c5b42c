// Registration only: the module object `groupdpo_kernels._C` and the C++ implementations of the ops, those for CUDA
// where the build has them. No schema (ops.py and extension.py have them), no maths (cpu/ and cuda/ have it).
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include <sstream>
#include <string>

#include "cpu/block.h"
#include "cpu/linear_logps.h"
#include "cpu/row.h"
#include "cpu/tail.h"
#ifdef GROUPDPO_KERNELS_CUDA_CODE
#include "cuda/ops.h"
#endif

namespace groupdpo_kernels {

namespace {

namespace py = pybind11;

// The argument lists of the schemas.

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward_cpu(Tensor hidden, Tensor weight, Tensor bias,
                                                                       Tensor low_rank_hidden, Tensor low_rank_weight,
                                                                       Tensor targets, double logit_scale,
                                                                       std::optional<double> softcap,
                                                                       double temperature, int64_t workspace_bytes,
                                                                       bool stats, Tensor logit_cache) {
  return linear_logps_forward({hidden, weight, bias, low_rank_hidden, low_rank_weight}, targets,
                              {logit_scale, softcap, temperature, workspace_bytes}, stats, logit_cache);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_cpu(
    Tensor hidden, Tensor weight, Tensor bias, Tensor low_rank_hidden, Tensor low_rank_weight, Tensor targets,
    Tensor lse, Tensor d_target, Tensor d_softmax, std::optional<Tensor> d_entropy, double logit_scale,
    std::optional<double> softcap, double temperature, int64_t workspace_bytes, bool needs_hidden, bool needs_weight, bool needs_bias,
    bool needs_low_rank_hidden, bool needs_low_rank_weight, bool needs_mass, Tensor logit_cache) {
  return linear_logps_backward(
      {hidden, weight, bias, low_rank_hidden, low_rank_weight}, targets, lse, d_target, d_softmax, d_entropy,
      {logit_scale, softcap, temperature, workspace_bytes},
      {needs_hidden, needs_weight, needs_bias, needs_low_rank_hidden, needs_low_rank_weight, needs_mass}, logit_cache);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> frozen_head_cpu(
    Tensor hidden, Tensor weight, Tensor bias, Tensor low_rank_hidden, Tensor low_rank_weight, Tensor targets,
    Tensor target_logits, double logit_scale, std::optional<double> softcap, double temperature,
    int64_t workspace_bytes, double grad_tol, double least) {
  return frozen_head({hidden, weight, bias, low_rank_hidden, low_rank_weight}, targets, target_logits,
                     {logit_scale, softcap, temperature, workspace_bytes}, grad_tol, least);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sparse_forward_cpu(
    Tensor hidden, Tensor weight, Tensor bias, Tensor low_rank_hidden, Tensor low_rank_weight, Tensor targets,
    Tensor target_logits, double logit_scale, std::optional<double> softcap, double temperature,
    int64_t workspace_bytes, double least, int64_t most, std::optional<int64_t> seed) {
  return sparse_forward({hidden, weight, bias, low_rank_hidden, low_rank_weight}, targets, target_logits,
                        {logit_scale, softcap, temperature, workspace_bytes}, least, most, seed);
}

void add_weighted_rows_cpu(Tensor out, Tensor source, Tensor owned, Tensor index, Tensor coefficients) {
  add_weighted_rows(out, source, owned, index, coefficients);
}

py::dict build_info() {
  using namespace py::literals;
  py::list architectures;
#ifdef GROUPDPO_KERNELS_CUDA_CODE
  std::istringstream names(GROUPDPO_KERNELS_CUDA_CODE);
  for (std::string name; std::getline(names, name, ',');) architectures.append(name);
#endif
#ifdef _OPENMP
  constexpr bool openmp = true;
#else
  constexpr bool openmp = false;  // threads are torch's own, through its stable parallel_for
#endif
  return py::dict("version"_a = GROUPDPO_KERNELS_VERSION, "torch"_a = GROUPDPO_KERNELS_TORCH_VERSION,
                  "compiler"_a = GROUPDPO_KERNELS_COMPILER, "abi"_a = "stable", "openmp"_a = openmp,
                  "cpu_capability"_a = cpu_capability(), "widest_cpu_capability"_a = widest_cpu_capability(),
                  "bf16_products"_a = bf16_products(), "block"_a = py::make_tuple(kMostBlockRows, kMostBlockColumns),
                  "sum_error"_a = kSumError, "tail_samples"_a = kTailSamples,
                  "cuda_architectures"_a = py::tuple(architectures));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(groupdpo_kernels, CPU, m) {
  m.impl("linear_logps_forward_cpu", TORCH_BOX(&forward_cpu));
  m.impl("linear_logps_backward_cpu", TORCH_BOX(&backward_cpu));
  m.impl("frozen_head_cpu", TORCH_BOX(&frozen_head_cpu));
  m.impl("sparse_forward_cpu", TORCH_BOX(&sparse_forward_cpu));
  m.impl("add_weighted_rows_cpu", TORCH_BOX(&add_weighted_rows_cpu));
}

#ifdef GROUPDPO_KERNELS_CUDA_CODE
STABLE_TORCH_LIBRARY_IMPL(groupdpo_kernels, CUDA, m) {
  m.impl("add_weighted_rows_cuda", TORCH_BOX(&add_weighted_rows_cuda));
}
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of groupdpo_kernels: importing this module registers them with torch.";
  m.def("build_info", &build_info, "Versions and compiler of this build, and what it can use on this machine.");
  if (const char* ignored = ignored_cpu_capability()) {
    if (PyErr_WarnEx(PyExc_RuntimeWarning, ignored, 1) != 0) throw py::error_already_set();
  }
  m.def("use_cpu_capability", &use_cpu_capability, py::arg("name"),
        "Which copy of the loops over a row runs: default, avx2 or avx512; ValueError for what this processor lacks."
        " Returns the one of before. Not while another thread computes.");
  m.def("use_bf16_products", &use_bf16_products, py::arg("on"),
        "Whether bfloat16 is multiplied as it is (where this machine can) or widened to float32 first. Returns what was"
        " before.");
#ifdef GROUPDPO_KERNELS_CUDA_CODE
  m.def("cuda_error", &cuda_error, py::arg("device"),
        "Why the device of that index cannot run this build's code, or ''.");
#endif
}

}  // namespace groupdpo_kernels
