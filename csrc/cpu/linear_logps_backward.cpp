// Rebuilds blocks of the logits from the saved lse and turns them into gradients. Vocabulary blocks outside, token
// blocks inside: a block of d_weight gathers all tokens in float32 and is rounded once, so there is no float32 copy of
// (V, D); d_hidden gathers all of the vocabulary in one float32 (T, D) buffer. Products
// that the forward has left in the logit cache are read, not computed.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/block.h"

namespace groupdpo_kernels {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_logps_backward(
    const Head& head, const Tensor& targets, const Tensor& lse, const Tensor& d_target, const Tensor& d_softmax,
    const std::optional<Tensor>& d_entropy, const HeadOptions& options, const Needs& needs, const Tensor& logit_cache) {
  const NoGrad no_grad;
  check(head, targets);
  const int64_t T = head.hidden.size(0), V = head.weight.size(0);
  check_row_vector(lse, "lse", T, ScalarType::Double);
  check_row_vector(d_target, "d_target", T);
  check_row_vector(d_softmax, "d_softmax", T);
  if (d_entropy) check_row_vector(*d_entropy, "d_entropy", T);
  STD_TORCH_CHECK(!needs.bias || head.bias.numel() > 0, "needs_bias must be false for a head without a bias");

  const int64_t per_column = HeadBlocks::scratch_per_column(head) +
                             Gradient::scratch_per_row(head.weight, needs.weight) +
                             Gradient::scratch_per_row(head.low_rank_weight, needs.low_rank_weight) +
                             Gradient::scratch_per_row(head.bias, needs.bias) +
                             static_cast<int64_t>(sizeof(double) / sizeof(float));  // column_sums
  const BlockShape shape = block_shape(T, V, HeadBlocks::scratch_per_row(head), per_column,
                                       Narrowed::scratch_per_entry(head), options.workspace_bytes);
  const LogitMap map = logit_map(options);
  HeadBlocks blocks(head, shape);
  const LogitCache cache(head, logit_cache);
  const Narrowed narrowed(head, shape);
  const Gradient d_hidden(head, head.hidden, needs.hidden, T);
  const Gradient d_low_rank_hidden(head, head.low_rank_hidden, needs.low_rank_hidden, T);
  const Gradient d_weight(head, head.weight, needs.weight, shape.columns);
  const Gradient d_bias(head, head.bias, needs.bias, shape.columns);
  const Gradient d_low_rank_weight(head, head.low_rank_weight, needs.low_rank_weight, shape.columns);
  std::vector<double> column_sums(d_bias ? shape.columns : 0);
  const Tensor mass = torch::stable::full({needs.mass ? T : 0}, 0.0, ScalarType::Float);
  float* row_mass = needs.mass ? mass.mutable_data_ptr<float>() : nullptr;

  const int64_t* target = targets.const_data_ptr<int64_t>();
  const double* row_lse = lse.const_data_ptr<double>();
  const float* at_target = d_target.const_data_ptr<float>();
  const float* elsewhere = d_softmax.const_data_ptr<float>();
  const float* of_entropy = d_entropy ? d_entropy->const_data_ptr<float>() : nullptr;

  for (int64_t v0 = 0; v0 < V && T > 0; v0 += shape.columns) {
    const int64_t columns = std::min(shape.columns, V - v0);
    blocks.take_vocabulary(v0, columns);
    std::fill(column_sums.begin(), column_sums.end(), 0);
    for (int64_t t0 = 0; t0 < T; t0 += shape.rows) {
      const int64_t rows = std::min(shape.rows, T - t0);
      blocks.take_tokens(t0, rows);
      RowUnits(rows, in_bf16(head)).over([&](int64_t first, int64_t last) {
        const Slice z = blocks.products(first, last, cache);
        const Narrowed::Part part = narrowed.part(z, first);
        torch::stable::parallel_for(first, last, grain(columns), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t t = t0 + i;
            const bool known = target[t] >= 0 && target[t] < V;  // else NaN: never a plausible number
            const float d_others = known ? elsewhere[t] : std::numeric_limits<float>::quiet_NaN();
            // p = exp(logit - shift) factor: what rounding the lse costs is the same for all of a row (reference.py).
            const float shift = static_cast<float>(row_lse[t]), entropy = of_entropy ? of_entropy[t] : 0;
            const double owed = shift - row_lse[t], factor = std::exp(owed);
            const double seen = to_d_products(z.row(i - first), blocks.bias, columns, map, shift,
                                              static_cast<float>((d_others - entropy * owed) * factor),
                                              static_cast<float>(entropy * factor), at_target[t], target[t] - v0);
            if (row_mass) row_mass[t] += static_cast<float>(seen * factor);
            part.round(i - first);
          }
        });
        const int64_t t = t0 + first, count = last - first;
        const Factor d = part.take(0, count);
        if (d_hidden) multiply(d_hidden.accumulators(t, count), d, blocks.weight, v0 > 0);
        if (d_low_rank_hidden) multiply(d_low_rank_hidden.accumulators(t, count), d, blocks.low_rank_weight, v0 > 0);
      });
      const Matrix d_products = blocks.all_products();
      const Factor d = narrowed.all(d_products).transposed();
      if (d_weight) multiply(d_weight.accumulators(v0, columns), d, blocks.hidden, t0 > 0);
      if (d_low_rank_weight) multiply(d_low_rank_weight.accumulators(v0, columns), d, blocks.low_rank_hidden, t0 > 0);
      if (d_bias) {
        torch::stable::parallel_for(0, columns, grain(rows), [&](int64_t begin, int64_t end) {
          add_column_sums(column_sums.data() + begin, d_products.data + begin, rows, end - begin,
                          d_products.row_stride);
        });
      }
    }
    if (d_bias) std::copy_n(column_sums.begin(), columns, d_bias.accumulators(v0, columns).data);
    for (const Gradient* gradient : {&d_weight, &d_low_rank_weight, &d_bias}) {
      if (*gradient) gradient->round(v0, columns);
    }
  }
  for (const Gradient* gradient : {&d_hidden, &d_low_rank_hidden}) {
    if (*gradient && T > 0 && V > 0) gradient->round(0, T);
  }
  return {d_hidden.result(),          d_weight.result(),          d_bias.result(),
          d_low_rank_hidden.result(), d_low_rank_weight.result(), mass};
}

}  // namespace groupdpo_kernels
