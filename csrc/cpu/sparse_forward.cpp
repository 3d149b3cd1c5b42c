// The forward of a backward over few entries a row: token_logps and lse as in linear_logps_forward.cpp, and on the way,
// while a block of logits is in cache, the entries of it that may matter. The threshold of a row rises with its running
// sum of exponentials, which starts at the target's own: in a row that is sure of its target hardly an entry is looked
// at twice.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/block.h"
#include "cpu/tail.h"

namespace groupdpo_kernels {

namespace {

// Likelier first; among equals the lower id.
bool before(const Entry& a, const Entry& b) {
  return a.squashed != b.squashed ? a.squashed > b.squashed : a.id < b.id;
}

struct RowState {
  double rest = 0;  // sum of exp(z - shift) without the target: nothing cancels in a row that is sure of it
  float top = -std::numeric_limits<float>::infinity();
  float shift = 0;
  float target_logit = std::numeric_limits<float>::quiet_NaN();  // stays NaN where no block holds the target
  float target_slope = std::numeric_limits<float>::quiet_NaN();
  float expected_target = -std::numeric_limits<float>::infinity();  // its logit, before its block has come
  float threshold = -std::numeric_limits<float>::infinity();        // of squashed; never falls
  int32_t count = 0, overflows = 0;
};

constexpr int64_t kRoom = 2;  // a row gathers at most this many times what it may keep, then the likeliest stay

// Collects what candidates a row's block holds, and where there is a Tail sends all else there. room = kRoom * most
// entries.
class Collector {
 public:
  Collector(const LogitMap& map, double least, int64_t most) : map_(map), log_least_(std::log(least)), most_(most) {}

  // products (n,) -> squashed logits, in place, -inf where a Tail must not draw; 0 is the first id of the block.
  void add(RowState& state, Entry* gathered, Tail* tail, float* z, const float* bias, int64_t n, int64_t v0,
           int64_t target) const {
    const float block_top = to_squashed(z, bias, n, map_), top = std::max(state.top, block_top);
    const bool bounded = std::isfinite(top);
    const float shift = bounded ? top : 0;
    const double rescale = std::exp(static_cast<double>(state.shift) - shift);
    state.rest *= state.rest == 0 ? 0 : rescale;
    const bool here = target >= 0 && target < n;
    double sums[2] = {};  // before the target, after it
    if (here) {
      state.target_logit = squashed_logit(z[target], map_);
      state.target_slope = squashed_slope(z[target], map_);
      sums[0] = squashed_sum(z, target, map_, shift, bounded);
      sums[1] = squashed_sum(z + target + 1, n - target - 1, map_, shift, bounded);
    } else {
      sums[0] = squashed_sum(z, n, map_, shift, bounded);
    }
    state.rest += sums[0];
    state.rest += sums[1];
    state.top = top;
    state.shift = shift;
    if (tail) {
      tail->rescale(rescale);
      if (here) z[target] = kNothing;
    }
    const double taken = gather(state, gathered, tail, z, n, v0, here ? target : -1, block_top);
    if (!tail) return;
    // A difference keeps its digits only where no more than half was taken.
    double sum = sums[0] + sums[1];
    if (taken > 0) sum = 2 * taken <= sum ? sum - taken : squashed_sum(z, n, map_, shift, bounded);
    tail->join(z, n, v0, sum, map_, shift);
  }

  // Leaves the candidates in order of their ids; the rest of the row is probability `dropped`.
  void finish(RowState& state, Entry* gathered, Tail* tail, double row_lse, double non_target, int32_t* ids,
              float* weights, float& dropped) const {
    double kept = 0;
    if (state.overflows < 2 || tail) {
      raise(state, squashed_at(row_lse + log_least_, map_));
      Entry* end = std::partition(gathered, gathered + state.count,
                                  [&](const Entry& entry) { return entry.squashed >= state.threshold; });
      release(state, gathered, end - gathered, tail);
      if (state.count > most_) keep_likeliest(state, gathered, tail);
      std::sort(gathered, gathered + state.count, [](const Entry& a, const Entry& b) { return a.id < b.id; });
      for (int32_t k = 0; k < state.count; ++k) {
        const double p = std::exp(squashed_logit(gathered[k].squashed, map_) - row_lse);
        kept += p;
        ids[k] = gathered[k].id;
        weights[k] = static_cast<float>(p * squashed_slope(gathered[k].squashed, map_));
      }
    }
    dropped = static_cast<float>((non_target - kept < 0 ? 0 : non_target - kept) + non_target * kSumError);
  }

 private:
  static constexpr float kNothing = -std::numeric_limits<float>::infinity();

  // The sum of exp(logit - shift) over what it took from z, if there is a tail.
  double gather(RowState& state, Entry* gathered, Tail* tail, float* z, int64_t n, int64_t v0, int64_t target,
                float block_top) const {
    if (state.overflows > 1 && !tail) return 0;  // a flat row: the exact path is for it
    const double known = std::isnan(state.target_logit) ? state.expected_target : state.target_logit;
    raise(state, squashed_at(state.shift + std::log(state.rest + std::exp(known - state.shift)) + log_least_, map_));
    if (block_top < squashed_logit(state.threshold, map_)) return 0;
    if (count_at_least(z, n, state.threshold) > 2 * kRoom * most_) {
      if (!tail) state.overflows = 2;
      return 0;  // a Tail has the block: what was gathered before stays
    }
    double taken = 0;
    for (int64_t j = 0; (j += first_at_least(z + j, n - j, state.threshold)) < n; ++j) {
      if (j == target) continue;
      gathered[state.count++] = {z[j], static_cast<int32_t>(v0 + j)};
      if (tail) {
        taken += Tail::weight(gathered[state.count - 1], map_, state.shift);
        z[j] = kNothing;
      }
      if (state.count == kRoom * most_) {
        if (++state.overflows > 1 && !tail) return taken;
        keep_likeliest(state, gathered, tail);
      }
    }
    return taken;
  }

  static void raise(RowState& state, float threshold) {
    if (threshold > state.threshold) state.threshold = threshold;  // false for NaN
  }

  // All but the first `count` are no candidates after all.
  void release(RowState& state, const Entry* gathered, int64_t count, Tail* tail) const {
    if (tail) tail->join(gathered + count, state.count - count, map_, state.shift);
    state.count = static_cast<int32_t>(count);
  }

  void keep_likeliest(RowState& state, Entry* gathered, Tail* tail) const {
    std::nth_element(gathered, gathered + most_ - 1, gathered + state.count, before);
    release(state, gathered, most_, tail);
    raise(state, gathered[most_ - 1].squashed);
  }

  LogitMap map_;
  double log_least_;
  int64_t most_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sparse_forward(
    const Head& head, const Tensor& targets, const Tensor& target_logits, const HeadOptions& options, double least,
    int64_t most, std::optional<int64_t> seed) {
  const NoGrad no_grad;
  check(head, targets);
  check_row_vector(target_logits, "target_logits", head.hidden.size(0));
  const int64_t T = head.hidden.size(0), V = head.weight.size(0);
  STD_TORCH_CHECK(least > 0 && most > 0 && most <= std::max<int64_t>(V, 1),
                  "least and most must be positive, and most at most V = ", V, "; got ", least, " and ", most);
  const int64_t state_bytes = sizeof(RowState) + (seed ? sizeof(Tail) : 0);
  const int64_t per_row =
      HeadBlocks::scratch_per_row(head) + kRoom * most * 2 + state_bytes / static_cast<int64_t>(sizeof(float));
  const BlockShape shape = block_shape(T, V, per_row, HeadBlocks::scratch_per_column(head), 1, options.workspace_bytes);
  const LogitMap map = logit_map(options);
  const Collector collector(map, least, most);
  HeadBlocks blocks(head, shape);

  const auto result = [&] { return torch::stable::new_empty(head.hidden, {T}, ScalarType::Float); };
  const Tensor token_logps = result(), non_target_probs = result(), target_slopes = result(), dropped = result();
  const Tensor lse = torch::stable::new_empty(head.hidden, {T}, ScalarType::Double);
  const int64_t width = most + (seed ? kTailSamples : 0);
  const Tensor ids = torch::stable::new_zeros(head.hidden, {T, width}, ScalarType::Int);
  const Tensor weights = torch::stable::new_zeros(head.hidden, {T, width}, ScalarType::Float);
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const SharedScratch room(shape.rows, kRoom * most * 2);
  const auto gathered = [](const Slice& rows, int64_t i) { return reinterpret_cast<Entry*>(rows.row(i)); };

  for (int64_t t0 = 0; t0 < T; t0 += shape.rows) {
    const int64_t rows = std::min(shape.rows, T - t0);
    const RowUnits units(rows, in_bf16(head));
    std::vector<RowState> states(rows);
    for (int64_t i = 0; i < rows; ++i) states[i].expected_target = target_logits.const_data_ptr<float>()[t0 + i];
    std::vector<Tail> tails(seed ? rows : 0);
    for (size_t i = 0; i < tails.size(); ++i) tails[i].start(*seed, t0 + i);
    blocks.take_tokens(t0, rows);
    for (int64_t v0 = 0; v0 < V; v0 += shape.columns) {
      const int64_t columns = std::min(shape.columns, V - v0);
      blocks.take_vocabulary(v0, columns);
      units.over([&](int64_t first, int64_t last) {
        const Slice z = blocks.products(first, last);
        torch::stable::parallel_for(first, last, grain(columns), [&](int64_t begin, int64_t end) {
          const Slice mine = room.take(begin, end, kRoom * most * 2);
          for (int64_t i = begin; i < end; ++i) {
            collector.add(states[i], gathered(mine, i - begin), seed ? &tails[i] : nullptr, z.row(i - first),
                          blocks.bias, columns, v0, target[t0 + i] - v0);
          }
        });
      });
    }
    torch::stable::parallel_for(0, rows, grain(most), [&](int64_t begin, int64_t end) {
      const Slice mine = room.take(begin, end, kRoom * most * 2);
      for (int64_t i = begin; i < end; ++i) {
        RowState& state = states[i];
        const int64_t t = t0 + i;
        const double sum = state.rest + std::exp(static_cast<double>(state.target_logit) - state.shift);
        const double row_lse = state.shift + std::log(sum), total = finite_or_nan(sum), non_target = state.rest / total;
        token_logps.mutable_data_ptr<float>()[t] = log_prob(state.target_logit, row_lse);
        lse.mutable_data_ptr<double>()[t] = row_lse;
        non_target_probs.mutable_data_ptr<float>()[t] = static_cast<float>(non_target);
        target_slopes.mutable_data_ptr<float>()[t] = state.target_slope;
        int32_t* row_ids = ids.mutable_data_ptr<int32_t>() + t * width;
        float* row_weights = weights.mutable_data_ptr<float>() + t * width;
        collector.finish(state, gathered(mine, i - begin), seed ? &tails[i] : nullptr, row_lse, non_target, row_ids,
                         row_weights, dropped.mutable_data_ptr<float>()[t]);
        if (seed) tails[i].write(total, map, row_ids + most, row_weights + most);
      }
    });
  }
  return {token_logps, lse, non_target_probs, target_slopes, dropped, ids, weights};
}

}  // namespace groupdpo_kernels
