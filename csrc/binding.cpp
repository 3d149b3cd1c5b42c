// Registration only: the C++ implementations of the ops, those for CUDA where the build has them. No schema (ops.py and
// extension.py have them), no maths (cpu/ and cuda/ have it), no Python (module.cpp).
#include <torch/csrc/stable/library.h>

#include "cpu/linear_logps.h"
#ifdef GROUPDPO_KERNELS_CUDA_CODE
#include "cuda/ops.h"
#endif

namespace groupdpo_kernels {

namespace {

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
    std::optional<double> softcap, double temperature, int64_t workspace_bytes, bool needs_hidden, bool needs_weight,
    bool needs_bias, bool needs_low_rank_hidden, bool needs_low_rank_weight, bool needs_mass, Tensor logit_cache) {
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

}  // namespace groupdpo_kernels
