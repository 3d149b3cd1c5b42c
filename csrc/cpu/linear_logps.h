// The CPU implementations of the head's two ops, as binding.cpp registers them. What inputs and outputs mean: ops.py,
// reference.py; formulas: docs/math.md. Arithmetic and row results are float32. Ids are checked by the caller; one
// outside [0, V) gives NaN in its row, never a plausible number.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace groupdpo_kernels {

using torch::stable::Tensor;

// One dtype of float32, bfloat16, float16, any strides. What a head lacks is empty.
struct Head {
  Tensor hidden;           // (T, D)
  Tensor weight;           // (V, D)
  Tensor bias;             // (V,), or (0,) without one
  Tensor low_rank_hidden;  // (T, R), R = 0 without a low-rank segment
  Tensor low_rank_weight;  // (V, R)
};

struct HeadOptions {
  double logit_scale;
  std::optional<double> softcap;
  double temperature;
  // Bound on everything allocated beyond the results and one float32 accumulator for each of d_hidden and
  // d_low_rank_hidden.
  int64_t workspace_bytes;
};

// token_logps, entropy, mean_logits, log_sum_sq_probs (T,) float32 and, second, lse (T,) float64, sixth is_top1 (T,)
// bool; the last four are (0,) without stats. 2 T D V FLOP. `logit_cache` becomes hidden @ weight^T + low_rank_hidden @
// low_rank_weight^T of the first K of V, for the backward; K may be 0.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_logps_forward(
    const Head& head,
    const Tensor& targets,  // (T,) int64
    const HeadOptions& options, bool stats,
    const Tensor& logit_cache);  // (T, K) float32

// token_logps, lse and c_y (1 - p_y), all (T,), with y the target and c the cap's slope; sum over v != y of p_v c_v
// weight_v (T, D); the same of low_rank_weight (T, R); with grad_tol > 0 also 1 - p_y and at least the sum of the p_v
// that the sums leave out, else (0,). All float32 but lse, float64. 4 T D V FLOP, with grad_tol > 0 between half of
// that and all. What is left out is within grad_tol of the sum of 1 - p_y, where all rows weigh the same.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> frozen_head(
    const Head& head,
    const Tensor& targets,        // (T,) int64
    const Tensor& target_logits,  // (T,) float32 with grad_tol > 0: need not be exact; else not read
    const HeadOptions& options, double grad_tol,
    double least);  // probability of an entry that is not left out

// token_logps, lse, 1 - p_y, c_y, at least the sum of p_v over what is neither target nor candidate: (T,), float32 but
// lse, float64. Then the candidates, ids (T, most) int32 and p_v c_v (T, most) float32, by id, 0 past the last: entries
// of probability at least `least`, of more than `most` the likeliest; none in a row that overflows twice. With a seed
// no row overflows, and there are kTailSamples more columns: entries drawn from all that is neither target nor
// candidate (tail.h). 2 T D V FLOP.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sparse_forward(
    const Head& head,
    const Tensor& targets,        // (T,) int64
    const Tensor& target_logits,  // (T,) float32: of the targets, for the first thresholds; need not be exact
    const HeadOptions& options, double least, int64_t most, std::optional<int64_t> seed);

// out[i] += sum of coefficients[j] source[index[j]] over owned[i] <= j < owned[i + 1]: in order, in float32, rounded
// once.
void add_weighted_rows(Tensor out,                   // (m, n) float32 | bfloat16
                       const Tensor& source,         // (k, n) likewise
                       const Tensor& owned,          // (m + 1,) int64, in order; checked, as index is
                       const Tensor& index,          // (K,) int64 into source
                       const Tensor& coefficients);  // (K,) float32

// Which of the five tensors of Head need a gradient; and whether mass, (T,) float32, sum_v exp(logits - lse), is
// wanted.
struct Needs {
  bool hidden, weight, bias, low_rank_hidden, low_rank_weight, mass;
};

// d_hidden, d_weight, d_bias, d_low_rank_hidden, d_low_rank_weight in the dtype of the inputs, then mass; (0,) where
// not needed. 2 T D V FLOP for the logits again, and as many for each of d_hidden and d_weight. Deterministic: every
// sum has one order. What the forward has left in `logit_cache` is read, not computed: the bits are the same.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_logps_backward(
    const Head& head,
    const Tensor& targets,    // (T,) int64
    const Tensor& lse,        // (T,) float64, from the forward
    const Tensor& d_target,   // (T,) float32: d_logits at the target; p (d_softmax - d_entropy log p) elsewhere
    const Tensor& d_softmax,  // (T,) float32
    const std::optional<Tensor>& d_entropy,  // (T,) float32, or none: 0
    const HeadOptions& options, const Needs& needs,
    const Tensor& logit_cache);  // (T, K) float32

}  // namespace groupdpo_kernels
