// The forward of a head that needs no gradient of its own: an online softmax that also gathers the expected row of the
// weight, so that no backward has to rebuild the logits. Token blocks outside: the accumulator of a block is rescaled
// whenever a row's maximum grows, which after the first few blocks of the vocabulary it hardly does.
//
// With grad_tol > 0 a row skips the second product in the blocks where its likely entries say nearly all: these are
// added one by one, and what the others would add is bounded by their probability, which is counted as dropped.
#include <algorithm>
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
  // With a tolerance alone:
  float expected_target = 0;  // the target's logit, before its block has come
  double dropped = 0;         // sum of exp(z - shift) left out
  double unlikely = 0;        // in the block at hand, without its likely entries
  bool whole = false;         // needed all of the last block
  std::vector<int32_t> likely;
};

constexpr size_t kMostLikely = 64;  // a block with more of them is no block to leave out

// exp(z - shift) of the target: as expected until its block has come.
double target_sum(const RowState& state) {
  const double known = std::isnan(state.target_logit) ? state.expected_target : state.target_logit;
  return std::exp(known - state.shift);
}

// Before to_weights: the likely entries of squashed logits (n,), by a lower bound on the row's sum of exponentials.
void find_likely(RowState& state, const float* z, int64_t n, const LogitMap& map, int64_t target, double least) {
  state.likely.clear();
  const double seen = state.rest + target_sum(state) + std::exp(static_cast<double>(state.top) - state.shift);
  const float threshold = squashed_at(state.shift + std::log(least * seen), map);
  for (int64_t j = 0; (j += first_at_least(z + j, n - j, threshold)) < n; ++j) {
    if (j == target) continue;
    if (state.likely.size() == kMostLikely) return;
    state.likely.push_back(static_cast<int32_t>(j));
  }
  state.unlikely = 0;
  for (const int32_t j : state.likely) {
    state.unlikely -= std::exp(static_cast<double>(squashed_logit(z[j], map)) - state.shift);
  }
}

// products (n,) -> exp(z - shift) times the cap's slope, in place; 0 at the target.
// look: whether to find its likely entries.
void add(RowState& state, float* z, const float* bias, int64_t n, const LogitMap& map, int64_t target, double least,
         bool look) {
  const float old_top = state.top;
  const float top = std::max(state.top, to_squashed(z, bias, n, map));
  const bool bounded = std::isfinite(top);
  const float shift = bounded ? top : 0;
  state.rescale = state.rest == 0 ? 0 : std::exp(state.shift - shift);
  state.rest *= state.rescale;
  state.dropped *= state.rescale;
  state.top = top;
  state.shift = shift;
  look |= least > 0 && (!state.whole || top > old_top);
  state.unlikely = std::numeric_limits<double>::infinity();
  if (look) find_likely(state, z, n, map, target, least);
  const double before = state.rest;
  if (target >= 0 && target < n) {
    state.target_logit = squashed_logit(z[target], map);
    state.target_slope = squashed_slope(z[target], map);
    state.rest += squashed_to_weights(z, target, map, shift, bounded);
    state.rest += squashed_to_weights(z + target + 1, n - target - 1, map, shift, bounded);
    z[target] = 0;
  } else {
    state.rest += squashed_to_weights(z, n, map, shift, bounded);
  }
  state.unlikely = std::max(0.0, state.unlikely + state.rest - before);
}

// Which rows of a range need their whole block: those with most in unlikely entries, until what the others leave out is
// at most grad_tol of what surrounds their targets, both as probabilities over the rows so far.
std::vector<int64_t> whole_rows(std::vector<RowState>& states, int64_t first, int64_t last, double grad_tol) {
  std::vector<int64_t> order(last - first);
  std::vector<double> cost(last - first);
  double allowed = 0;
  for (int64_t i = first; i < last; ++i) {
    const RowState& state = states[i];
    const double total = state.rest + target_sum(state);
    order[i - first] = i;
    cost[i - first] =
        std::isnan(state.unlikely / total) ? std::numeric_limits<double>::infinity() : state.unlikely / total;
    if (total > 0 && std::isfinite(total)) allowed += (grad_tol * state.rest - state.dropped) / total;
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost[a - first] < cost[b - first]; });
  auto row = order.begin();
  while (row != order.end() && cost[*row - first] <= allowed) allowed -= cost[*row++ - first];
  std::vector<int64_t> whole(row, order.end());
  std::sort(whole.begin(), whole.end());
  return whole;
}

// sums += factor * row i of m.
void add_row(float* sums, const Factor& m, int64_t i, float factor) {
  if (m.bf16) return add_scaled(sums, static_cast<const uint16_t*>(m.row(i)), factor, m.columns);
  add_scaled(sums, static_cast<const float*>(m.row(i)), factor, m.columns);
}

void scale_row(const Matrix& m, int64_t i, float factor) {
  float* x = m.row(i);
  for (int64_t j = 0; j < m.columns; ++j) x[j] *= factor;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> frozen_head(const Head& head, const Tensor& targets,
                                                                               const Tensor& target_logits,
                                                                               const HeadOptions& options,
                                                                               double grad_tol, double least) {
  const NoGrad no_grad;
  check(head, targets);
  const int64_t T = head.hidden.size(0), D = head.hidden.size(1), V = head.weight.size(0);
  const int64_t R = head.low_rank_weight.size(1);
  const bool sparse = grad_tol > 0;
  STD_TORCH_CHECK(!sparse || least > 0, "grad_tol > 0 wants a positive least; got ", least);
  if (sparse) check_row_vector(target_logits, "target_logits", T);
  const int64_t per_row = HeadBlocks::scratch_per_row(head) + static_cast<int64_t>(sizeof(RowState) / sizeof(float)) +
                          (sparse ? std::max(D, R) + static_cast<int64_t>(kMostLikely) : 0);
  const BlockShape shape = block_shape(T, V, per_row, HeadBlocks::scratch_per_column(head),
                                       Narrowed::scratch_per_entry(head), options.workspace_bytes);
  const LogitMap map = logit_map(options);
  HeadBlocks blocks(head, shape);
  const Narrowed narrowed(head, shape);
  const SharedScratch partial(sparse ? shape.rows : 0, std::max(D, R));

  const auto result = [&](std::initializer_list<int64_t> sizes) {
    return torch::stable::new_zeros(head.hidden, sizes, ScalarType::Float);
  };
  const Tensor token_logps = result({T}), coefficients = result({T});
  const Tensor lse = torch::stable::new_zeros(head.hidden, {T}, ScalarType::Double);
  const Tensor expected_weight = result({T, D}), expected_low_rank = result({T, R});
  const Tensor non_target_probs = result({sparse ? T : 0}), dropped = result({sparse ? T : 0});
  const int64_t* target = targets.const_data_ptr<int64_t>();

  for (int64_t t0 = 0; t0 < T; t0 += shape.rows) {
    const int64_t rows = std::min(shape.rows, T - t0);
    const RowUnits units(rows, in_bf16(head));
    std::vector<RowState> states(rows);
    if (sparse) {
      for (int64_t i = 0; i < rows; ++i) states[i].expected_target = target_logits.const_data_ptr<float>()[t0 + i];
    }
    blocks.take_tokens(t0, rows);
    const auto accumulator = [&](const Tensor& x) {
      const int64_t columns = x.size(1);
      return Matrix{x.mutable_data_ptr<float>() + t0 * columns, rows, columns, columns};
    };
    const Matrix weight = accumulator(expected_weight), low_rank = R ? accumulator(expected_low_rank) : Matrix{};
    for (int64_t v0 = 0; v0 < V; v0 += shape.columns) {
      const int64_t columns = std::min(shape.columns, V - v0);
      blocks.take_vocabulary(v0, columns);
      units.over([&](int64_t first, int64_t last) {
        const Slice z = blocks.products(first, last);
        Narrowed::Part e = narrowed.part(z, first);
        const auto round = [&](int64_t i) { e.round(i - first); };
        torch::stable::parallel_for(first, last, grain(columns), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            // A row that needed all of the last block is looked at again where its maximum grows, and now and then.
            add(states[i], z.row(i - first), blocks.bias, columns, map, target[t0 + i] - v0, least,
                sparse && v0 / shape.columns % 4 == 0);
            // While it is in cache; with a tolerance, the rows that needed all of the last block too.
            if (!sparse || states[i].whole) round(i);
            if (v0 > 0 && states[i].rescale != 1) {
              scale_row(weight, i, states[i].rescale);
              if (R) scale_row(low_rank, i, states[i].rescale);
            }
          }
        });
        const auto add_products = [&](int64_t begin, int64_t end) {
          const int64_t count = end - begin;
          const Factor factor = e.take(begin - first, count);
          multiply(weight.take(begin, count), factor, blocks.weight, v0 > 0);
          if (R) multiply(low_rank.take(begin, count), factor, blocks.low_rank_weight, v0 > 0);
        };
        if (!sparse) return add_products(first, last);
        units.over_each(first, last, [&](int64_t begin, int64_t end) {
          const std::vector<int64_t> whole = whole_rows(states, begin, end, grad_tol);
          const auto count = static_cast<int64_t>(whole.size());
          if (4 * count > 3 * (end - begin)) {  // hardly a row to leave out: one product, where the rows lie
            for (int64_t i = begin; i < end; ++i) {
              if (!states[i].whole) round(i);
              states[i].whole = true;
            }
            return add_products(begin, end);
          }
          for (int64_t i = begin; i < end; ++i) {
            const bool is_whole = std::binary_search(whole.begin(), whole.end(), i);
            if (is_whole && !states[i].whole) round(i);
            states[i].whole = is_whole;
            if (is_whole) continue;
            for (const int32_t j : states[i].likely) {
              add_row(weight.row(i), blocks.weight, j, z.row(i - first)[j]);
              if (R) add_row(low_rank.row(i), blocks.low_rank_weight, j, z.row(i - first)[j]);
            }
            states[i].dropped += states[i].unlikely;
          }
          if (count == 0) return;
          // The whole rows side by side, as the factor of one product; its rows are added to where they belong.
          for (int64_t k = 0; k < count; ++k) e.move(whole[k] - first, begin - first + k);
          const Slice sums = partial.take(begin, begin + count, std::max(D, R));
          const auto add_sums = [&](const Matrix& out, const Factor& by) {
            const Matrix products = sums.take_columns(0, out.columns);
            multiply(products, e.take(begin - first, count), by, false);
            for (int64_t k = 0; k < count; ++k) add_scaled(out.row(whole[k]), products.row(k), 1, out.columns);
          };
          add_sums(weight, blocks.weight);
          if (R) add_sums(low_rank, blocks.low_rank_weight);
        });
      });
    }
    for (int64_t i = 0; i < rows; ++i) {
      const RowState& state = states[i];
      const double sum = state.rest + std::exp(static_cast<double>(state.target_logit) - state.shift);
      const double row_lse = state.shift + std::log(sum), total = finite_or_nan(sum), non_target = state.rest / total;
      token_logps.mutable_data_ptr<float>()[t0 + i] = log_prob(state.target_logit, row_lse);
      lse.mutable_data_ptr<double>()[t0 + i] = row_lse;
      coefficients.mutable_data_ptr<float>()[t0 + i] = static_cast<float>(state.target_slope * non_target);
      if (sparse) {
        non_target_probs.mutable_data_ptr<float>()[t0 + i] = static_cast<float>(non_target);
        dropped.mutable_data_ptr<float>()[t0 + i] =
            state.dropped == 0 ? 0 : static_cast<float>(state.dropped / total + non_target * kSumError);
      }
      scale_row(weight, i, static_cast<float>(1 / total));
      if (R) scale_row(low_rank, i, static_cast<float>(1 / total));
    }
  }
  return {token_logps, lse, coefficients, expected_weight, expected_low_rank, non_target_probs, dropped};
}

}  // namespace groupdpo_kernels
