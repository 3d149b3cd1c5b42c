// Token log-probabilities to scores, balance, group losses and d loss / d seq_logps in closed form: the CPU twin of
// kernels/triton/preference_weights.py. Formulas: docs/math.md, section 3. Inside everything is double, in one fixed
// order. Wrong offsets, a group without both sides and a reference that is not finite give NaN; nothing is read or
// written out of bounds.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace groupdpo_kernels {

using torch::stable::Tensor;

// The losses in the order of LossKind: pairwise ones first.
inline constexpr const char* kPreferenceLosses[] = {
    "sigmoid",  "hinge",    "ipo",      "rdpo",     "simpo",     "cpo",    "orpo",
    "robust",   "exo_pair", "discopop", "nca_pair", "apo_zero",  "apo_down", "sppo_hard",
    "margin",   "mpo",      "all_pairs", "softmax", "plackett_luce"};

enum class LossKind {
  sigmoid,
  hinge,
  ipo,
  rdpo,
  simpo,
  cpo,
  orpo,
  robust,
  exo_pair,
  discopop,
  nca_pair,
  apo_zero,
  apo_down,
  sppo_hard,
  margin,  // the first of the group-wise ones
  mpo,
  all_pairs,
  softmax,
  plackett_luce
};

// An Objective with its conventions resolved, as LossSpec in fused.py.
struct LossSpec {
  LossKind loss;
  double beta;
  bool average;
  bool subtract_reference;
  double nll_weight;
  double label_smoothing;
  double gamma;
  double alpha;
  double tau;
  double ceiling;  // 0: no balance
  bool balance_reference;
  bool balance_normalize;
};

// loss (), seq_logps (S,), rewards (S,), group_losses (G,), balance_weights (S,), coefficients (S,), all float32.
// O(T + S); all_pairs O(T + pairs).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> preference_weights_forward(
    const Tensor& token_logps,               // (T,) float32
    const std::optional<Tensor>& ref_logps,  // (S,) or (T,) float32
    const Tensor& cu_seqlens,                // (S+1,) int64
    const Tensor& cu_groups,                 // (G+1,) int64
    const Tensor& positive,                  // (S,) bool
    const LossSpec& spec);

// d_token_logps (T,) float32: d_loss times the coefficient of each token's sequence.
Tensor preference_weights_backward(const Tensor& d_loss,        // () float32
                                   const Tensor& coefficients,  // (S,) float32
                                   const Tensor& cu_seqlens,    // (S+1,) int64
                                   int64_t T);

}  // namespace groupdpo_kernels
