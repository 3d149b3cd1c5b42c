// The forward of a head that needs no gradient of its own: an online softmax that also gathers the expected row of the
// weight, so that no backward has to rebuild the logits. Token blocks outside: the accumulator of a block is rescaled
// whenever a row's maximum grows, which after the first few blocks of the vocabulary it hardly does.
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/block.h"

namespace groupdpo_kernels {

namespace {

struct RowState {
  double rest = 0;  // sum of exp(z - shift) without the target: nothing cancels in a row that is sure of it
  float top = -std::numeric_limits<float>::infinity();
  float shift = 0;
  float rescale = 1;  // of what the row has accumulated, by the block at hand
  float target_logit = std::numeric_limits<float>::quiet_NaN();  // stays NaN where no block holds the target
  float target_slope = std::numeric_limits<float>::quiet_NaN();
};

// products (n,) -> exp(z - shift) times the cap's slope, in place; 0 at the target.
void add(RowState& state, float* z, const float* bias, int64_t n, const LogitMap& map, int64_t target) {
  const float top = std::max(state.top, to_squashed(z, bias, n, map));
  const bool bounded = std::isfinite(top);
  const float shift = bounded ? top : 0;
  state.rescale = state.rest == 0 ? 0 : std::exp(state.shift - shift);
  state.rest *= state.rescale;
  if (target >= 0 && target < n) {
    state.target_logit = squashed_logit(z[target], map);
    state.target_slope = squashed_slope(z[target], map);
    state.rest += squashed_to_weights(z, target, map, shift, bounded);
    state.rest += squashed_to_weights(z + target + 1, n - target - 1, map, shift, bounded);
    z[target] = 0;
  } else {
    state.rest += squashed_to_weights(z, n, map, shift, bounded);
  }
  state.top = top;
  state.shift = shift;
}

void scale_row(const Matrix& m, int64_t i, float factor) {
  float* x = m.row(i);
  for (int64_t j = 0; j < m.columns; ++j) x[j] *= factor;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_logps_expectations(const Head& head, const Tensor& targets,
                                                                             const HeadOptions& options) {
  const NoGrad no_grad;
  check(head, targets);
  const int64_t T = head.hidden.size(0), V = head.weight.size(0);
  const int64_t R = head.low_rank_weight ? head.low_rank_weight->size(1) : 0;
  const int64_t per_row = HeadBlocks::scratch_per_row(head) + static_cast<int64_t>(sizeof(RowState) / sizeof(float));
  const BlockShape shape = block_shape(T, V, per_row, HeadBlocks::scratch_per_column(head),
                                       Narrowed::scratch_per_entry(head), options.workspace_bytes);
  const LogitMap map = logit_map(options);
  HeadBlocks blocks(head, shape);
  const Narrowed narrowed(head, shape);

  const auto result = [&](std::initializer_list<int64_t> sizes) {
    return torch::stable::new_zeros(head.hidden, sizes, ScalarType::Float);
  };
  const Tensor token_logps = result({T}), lse = result({T}), coefficients = result({T});
  const Tensor expected_weight = result({T, head.weight.size(1)}), expected_low_rank = result({R ? T : 0, R});
  const int64_t* target = targets.const_data_ptr<int64_t>();

  for (int64_t t0 = 0; t0 < T; t0 += shape.rows) {
    const int64_t rows = std::min(shape.rows, T - t0);
    std::vector<RowState> states(rows);
    blocks.take_tokens(t0, rows);
    const auto accumulator = [&](const Tensor& x) {
      const int64_t columns = x.size(1);
      return Matrix{x.mutable_data_ptr<float>() + t0 * columns, rows, columns, columns};
    };
    const Matrix weight = accumulator(expected_weight), low_rank = R ? accumulator(expected_low_rank) : Matrix{};
    for (int64_t v0 = 0; v0 < V; v0 += shape.columns) {
      const int64_t columns = std::min(shape.columns, V - v0);
      blocks.take_vocabulary(v0, columns);
      over_rows(rows, [&](int64_t first, int64_t last) {
        const Matrix z = blocks.products(first, last);
        torch::stable::parallel_for(first, last, grain(columns), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            add(states[i], z.row(i - first), blocks.bias, columns, map, target[t0 + i] - v0);
            narrowed.take(z, i - first, i);
            if (v0 > 0 && states[i].rescale != 1) {
              scale_row(weight, i, states[i].rescale);
              if (R) scale_row(low_rank, i, states[i].rescale);
            }
          }
        });
        const Factor e = narrowed.factor(z, first);
        multiply(weight.take(first, last - first), e, blocks.weight, v0 > 0);
        if (R) multiply(low_rank.take(first, last - first), e, blocks.low_rank_weight, v0 > 0);
      });
    }
    for (int64_t i = 0; i < rows; ++i) {
      const RowState& state = states[i];
      const double total = state.rest + std::exp(static_cast<double>(state.target_logit) - state.shift);
      const double row_lse = state.shift + std::log(total);
      token_logps.mutable_data_ptr<float>()[t0 + i] = static_cast<float>(state.target_logit - row_lse);
      lse.mutable_data_ptr<float>()[t0 + i] = static_cast<float>(row_lse);
      coefficients.mutable_data_ptr<float>()[t0 + i] = static_cast<float>(state.target_slope * (state.rest / total));
      scale_row(weight, i, static_cast<float>(1 / total));
      if (R) scale_row(low_rank, i, static_cast<float>(1 / total));
    }
  }
  return {token_logps, lse, coefficients, expected_weight, expected_low_rank};
}

}  // namespace groupdpo_kernels
