// Entries drawn from a row's tail, which is what is neither target nor candidate, while the row streams by: each of
// kTailSamples draws is, at any time, one entry of what has joined so far, with a probability in proportion to
// exp(logit). Random numbers are a function of (seed, row, how many came before): no state beyond the row's own, the
// same draws whatever the number of threads. Estimator and variance: docs/math.md.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/row.h"

namespace groupdpo_kernels {

// Eight: on a trained model's rows the draws then add 2 % to the noise of the minibatch, for 8 entries in a backward
// that has 40; 16 make it 1 % and are felt in the time of sure rows (docs/log.md).
constexpr int64_t kTailSamples = 8;

// splitmix64 (Steele, Lea and Flood, 2014): the state walks by a constant, a hash of it is the number.
inline uint64_t splitmix64(uint64_t& state) {
  uint64_t x = state += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

struct Entry {
  float squashed;  // as to_squashed leaves it
  int32_t id;
};

class Tail {
 public:
  void start(uint64_t seed, int64_t row) {
    uint64_t state = splitmix64(seed) ^ static_cast<uint64_t>(row);
    state_ = splitmix64(state);
  }

  // The row's reference for exponentials has moved.
  void rescale(double factor) { sum_ *= sum_ == 0 ? 0 : factor; }

  // A block of to_squashed's (n,), whose exp(logit - shift) sum to `sum`, joins; -inf where an entry is no part of it.
  void join(const float* z, int64_t n, int64_t v0, double sum, const LogitMap& map, float shift) {
    double at[kTailSamples];
    int64_t which[kTailSamples], found[kTailSamples];
    const int64_t count = replaced(sum, at, which);
    if (count == 0) return;
    squashed_find(z, n, map, shift, at, count, found);
    for (int64_t i = 0; i < count; ++i) {
      if (found[i] < n) draws_[which[i]] = {z[found[i]], static_cast<int32_t>(v0 + found[i])};
    }
  }

  // Entries that were gathered and are not candidates after all join.
  void join(const Entry* entries, int64_t n, const LogitMap& map, float shift) {
    double sum = 0, at[kTailSamples];
    int64_t which[kTailSamples];
    for (int64_t j = 0; j < n; ++j) sum += weight(entries[j], map, shift);
    const int64_t count = replaced(sum, at, which);
    double before = 0;
    for (int64_t j = 0, i = 0; i < count && j < n; ++j) {
      before += weight(entries[j], map, shift);
      for (; i < count && (at[i] < before || j + 1 == n); ++i) draws_[which[i]] = entries[j];
    }
  }

  static double weight(const Entry& entry, const LogitMap& map, float shift) {
    return std::exp(static_cast<double>(squashed_logit(entry.squashed, map)) - shift);
  }

  // kTailSamples ids, and for each its part of the tail's probability, times the cap's slope there. `total`: of all
  // exp(logit - shift) of the row.
  void write(double total, const LogitMap& map, int32_t* ids, float* weights) const {
    if (sum_ == 0) return;
    for (int64_t k = 0; k < kTailSamples; ++k) {
      ids[k] = draws_[k].id;
      weights[k] = static_cast<float>(sum_ / total / kTailSamples * squashed_slope(draws_[k].squashed, map));
    }
  }

 private:
  // `sum` joins: which draws fall into it, and where, ascending. One number decides both: below `sum` / sum_ it is
  // uniform there. What is NaN replaces nothing, and stays in sum_.
  int64_t replaced(double sum, double* at, int64_t* which) {
    if (sum == 0) return 0;
    sum_ += sum;
    int64_t count = 0;
    for (int64_t k = 0; k < kTailSamples; ++k) {
      const double x = static_cast<double>(splitmix64(state_) >> 11) * 0x1p-53 * sum_;
      if (!(x < sum)) continue;
      int64_t i = count++;
      for (; i > 0 && at[i - 1] > x; --i) at[i] = at[i - 1], which[i] = which[i - 1];
      at[i] = x;
      which[i] = k;
    }
    return count;
  }

  double sum_ = 0;  // of exp(logit - shift)
  uint64_t state_ = 0;
  Entry draws_[kTailSamples] = {};
};

}  // namespace groupdpo_kernels
