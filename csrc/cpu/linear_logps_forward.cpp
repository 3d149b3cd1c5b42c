// Streams blocks of the vocabulary past blocks of tokens: log-sum-exp, the target's logit and the statistics of every
// row, one pass, logits never stored. Token blocks outside: what a row has gathered so far lives for one block only.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/block.h"

namespace groupdpo_kernels {

namespace {

// What a row has gathered from the blocks seen so far. Sums are relative to exp(shift) and in float64: thousands of
// blocks lose nothing.
struct RowState {
  RowSums sums{};
  float top = -std::numeric_limits<float>::infinity();
  float shift = 0;
  float target_logit = std::numeric_limits<float>::quiet_NaN();  // stays NaN where no block holds the target
  int64_t top_index = -1;
};

void add(RowState& state, const float* z, int64_t n, int64_t column0, int64_t target, bool stats) {
  if (target >= column0 && target < column0 + n) state.target_logit = z[target - column0];
  const float block_top = maximum(z, n), top = std::max(state.top, block_top);
  // exp(-inf + inf) and exp(inf - inf) are NaN: rows of -inf so far, and rows that hold +inf, are not shifted.
  const float shift = std::isfinite(top) ? top : 0;
  const RowSums block = exp_sums(z, n, shift, std::isfinite(top), stats);
  // total is 0 while only -inf was seen; 0 * exp(0 - shift) could be 0 * inf.
  const double moved = static_cast<double>(state.shift) - shift;
  const double rescale = state.sums.total == 0 ? 0 : std::exp(moved);
  if (stats && !std::isnan(state.sums.total)) {
    // As torch.argmax: NaN wins over everything, and among equals the lowest index.
    if (std::isnan(block.total)) {
      state.top_index = column0 + first_index(z, n, block.total);
    } else if (block_top > state.top || state.top_index < 0) {
      state.top_index = column0 + first_index(z, n, block_top);
    }
  }
  state.sums.weighted = (state.sums.weighted + state.sums.total * moved) * rescale + block.weighted;
  state.sums.total = state.sums.total * rescale + block.total;
  state.sums.squares = state.sums.squares * rescale * rescale + block.squares;
  state.sums.plain += block.plain;
  state.top = top;
  state.shift = shift;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_logps_forward(const Head& head, const Tensor& targets,
                                                                                const HeadOptions& options, bool stats,
                                                                                const Tensor& logit_cache) {
  const NoGrad no_grad;
  check(head, targets);
  const int64_t T = head.hidden.size(0), V = head.weight.size(0);
  const int64_t per_row = HeadBlocks::scratch_per_row(head) + static_cast<int64_t>(sizeof(RowState) / sizeof(float));
  const BlockShape shape = block_shape(T, V, per_row, HeadBlocks::scratch_per_column(head), 1, options.workspace_bytes);
  const LogitMap map = logit_map(options);
  HeadBlocks blocks(head, shape);
  const LogitCache cache(head, logit_cache);
  cache.populate();

  const auto row_result = [&](bool wanted, ScalarType dtype) {
    return torch::stable::new_empty(head.hidden, {wanted ? T : 0}, dtype);
  };
  const Tensor token_logps = row_result(true, ScalarType::Float), lse = row_result(true, ScalarType::Double);
  const Tensor entropy = row_result(stats, ScalarType::Float), mean_logits = row_result(stats, ScalarType::Float);
  const Tensor log_sum_sq_probs = row_result(stats, ScalarType::Float), is_top1 = row_result(stats, ScalarType::Bool);
  const int64_t* target = targets.const_data_ptr<int64_t>();

  for (int64_t t0 = 0; t0 < T; t0 += shape.rows) {
    const int64_t rows = std::min(shape.rows, T - t0);
    const RowUnits units(rows, in_bf16(head));
    std::vector<RowState> states(rows);
    blocks.take_tokens(t0, rows);
    for (int64_t v0 = 0; v0 < V; v0 += shape.columns) {
      const int64_t columns = std::min(shape.columns, V - v0);
      const int64_t keeps = std::clamp<int64_t>(cache.columns() - v0, 0, columns);
      blocks.take_vocabulary(v0, columns);
      units.over([&](int64_t first, int64_t last) {
        const Slice z = blocks.products(first, last);
        torch::stable::parallel_for(first, last, grain(columns), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            if (keeps > 0) std::copy_n(z.row(i - first), keeps, cache.row(t0 + i, v0));
            to_logits(z.row(i - first), blocks.bias, columns, map);
            add(states[i], z.row(i - first), columns, v0, target[t0 + i], stats);
          }
        });
      });
    }
    for (int64_t i = 0; i < rows; ++i) {
      const auto& [sums, top, shift, target_logit, top_index] = states[i];
      const double row_lse = shift + std::log(sums.total);
      token_logps.mutable_data_ptr<float>()[t0 + i] = log_prob(target_logit, row_lse);
      lse.mutable_data_ptr<double>()[t0 + i] = row_lse;
      if (stats) {
        entropy.mutable_data_ptr<float>()[t0 + i] =
            static_cast<float>(std::log(sums.total) - sums.weighted / sums.total);
        mean_logits.mutable_data_ptr<float>()[t0 + i] = static_cast<float>(sums.plain / static_cast<double>(V));
        log_sum_sq_probs.mutable_data_ptr<float>()[t0 + i] =
            static_cast<float>(std::log(sums.squares) - 2 * std::log(sums.total));
        is_top1.mutable_data_ptr<bool>()[t0 + i] = top_index == target[t0 + i];
      }
    }
  }
  return {token_logps, lse, entropy, mean_logits, log_sum_sq_probs, is_top1};
}

}  // namespace groupdpo_kernels
