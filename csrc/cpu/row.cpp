// See row.h. Every loop here is meant to be vectorised: no branch, no call that is not inlined, reductions over a fixed
// number of lanes, so that the order of additions is the same whatever instruction set is picked at load time.
#include "cpu/row.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/vector_math.h"

// CMakeLists.txt compiles this file once for each instruction set, into a namespace of its own. The attribute, not a
// flag of the compiler: what headers define stays of the baseline, or the linker might pick a wider copy of it for
// everybody.
#ifdef GROUPDPO_KERNELS_ROW_TARGET
#define EVERY_ISA __attribute__((target(GROUPDPO_KERNELS_ROW_TARGET)))
#else
#define EVERY_ISA
#endif

namespace groupdpo_kernels::GROUPDPO_KERNELS_ROW {

static constexpr int64_t LANES = 32;

EVERY_ISA void to_logits(float* z, const float* bias, int64_t n, const LogitMap& map) {
  const auto [scale, cap, temperature] = map;
  if (bias) {
    for (int64_t j = 0; j < n; ++j) z[j] += bias[j];
  }
  if (scale != 1) {
    for (int64_t j = 0; j < n; ++j) z[j] *= scale;
  }
  if (cap > 0) {
    for (int64_t j = 0; j < n; ++j) z[j] = cap * vtanh(z[j] / cap);
  }
  if (temperature != 1) {
    for (int64_t j = 0; j < n; ++j) z[j] /= temperature;
  }
}

EVERY_ISA float maximum(const float* z, int64_t n) {
  float lane[LANES];
  std::fill(lane, lane + LANES, -std::numeric_limits<float>::infinity());
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES) {
    for (int64_t l = 0; l < LANES; ++l) lane[l] = z[j + l] > lane[l] ? z[j + l] : lane[l];
  }
  for (; j < n; ++j) lane[0] = z[j] > lane[0] ? z[j] : lane[0];
  return *std::max_element(lane, lane + LANES);
}

int64_t first_index(const float* z, int64_t n, float value) {
  const float* found =
      std::isnan(value) ? std::find_if(z, z + n, [](float x) { return std::isnan(x); }) : std::find(z, z + n, value);
  return found == z + n ? -1 : found - z;
}

EVERY_ISA RowSums exp_sums(const float* z, int64_t n, float shift, bool bounded, bool stats) {
  float total[LANES] = {}, squares[LANES] = {}, weighted[LANES] = {}, plain[LANES] = {};
  int64_t j = 0;
  if (stats) {
    for (; j + LANES <= n; j += LANES) {
      for (int64_t l = 0; l < LANES; ++l) {
        const float x = z[j + l], y = x - shift, e = vexp(y), ey = e * y;
        total[l] += e;
        squares[l] += e * e;
        weighted[l] += e == 0 ? 0.0f : ey;
        plain[l] += x;
      }
    }
  } else if (bounded) {
    for (; j + LANES <= n; j += LANES) {
      for (int64_t l = 0; l < LANES; ++l) total[l] += vexp_to_88(z[j + l] - shift);
    }
  } else {
    for (; j + LANES <= n; j += LANES) {
      for (int64_t l = 0; l < LANES; ++l) total[l] += vexp(z[j + l] - shift);
    }
  }
  for (int64_t l = 0; j < n; ++j, ++l) {
    const float x = z[j], y = x - shift, e = vexp(y);
    total[l] += e;
    squares[l] += e * e;
    weighted[l] += e == 0 ? 0.0f : e * y;
    plain[l] += x;
  }
  RowSums sums{};
  for (int64_t l = 0; l < LANES; ++l) {
    sums.total += total[l];
    sums.squares += squares[l];
    sums.weighted += weighted[l];
    sums.plain += plain[l];
  }
  return sums;
}

EVERY_ISA float to_squashed(float* z, const float* bias, int64_t n, const LogitMap& map) {
  if (map.softcap > 0) {
    // tanh itself is kept, not the logit: 1 - tanh^2 from a logit scaled and divided again would lose the digits that
    // are left near the cap.
    to_logits(z, bias, n, {map.logit_scale, 0, 1});
    for (int64_t j = 0; j < n; ++j) z[j] = vtanh(z[j] / map.softcap);
  } else {
    to_logits(z, bias, n, map);
  }
  return squashed_logit(maximum(z, n), map);
}

float squashed_logit(float y, const LogitMap& map) {
  return map.softcap > 0 ? map.softcap * y / map.temperature : y;
}

float squashed_at(double logit, const LogitMap& map) {
  return static_cast<float>(map.softcap > 0 ? logit * map.temperature / map.softcap : logit);
}

float squashed_slope(float y, const LogitMap& map) {
  return map.softcap > 0 ? 1 - y * y : 1;
}

EVERY_ISA double squashed_to_weights(float* z, int64_t n, const LogitMap& map, float shift, bool bounded) {
  const auto [scale, cap, temperature] = map;
  float total[LANES] = {};
  int64_t j = 0;
  if (cap > 0) {
    for (; j + LANES <= n; j += LANES) {
      for (int64_t l = 0; l < LANES; ++l) {
        const float y = z[j + l], e = vexp(cap * y / temperature - shift);
        total[l] += e;
        z[j + l] = e * (1 - y * y);
      }
    }
    for (int64_t l = 0; j < n; ++j, ++l) {
      const float y = z[j], e = vexp(cap * y / temperature - shift);
      total[l] += e;
      z[j] = e * (1 - y * y);
    }
  } else {
    if (bounded) {
      for (; j + LANES <= n; j += LANES) {
        for (int64_t l = 0; l < LANES; ++l) total[l] += z[j + l] = vexp_to_88(z[j + l] - shift);
      }
    }
    for (; j + LANES <= n; j += LANES) {
      for (int64_t l = 0; l < LANES; ++l) total[l] += z[j + l] = vexp(z[j + l] - shift);
    }
    for (int64_t l = 0; j < n; ++j, ++l) total[l] += z[j] = vexp(z[j] - shift);
  }
  double sum = 0;
  for (int64_t l = 0; l < LANES; ++l) sum += total[l];
  return sum;
}

EVERY_ISA double squashed_sum(const float* z, int64_t n, const LogitMap& map, float shift, bool bounded) {
  const auto [scale, cap, temperature] = map;
  if (cap <= 0) return exp_sums(z, n, shift, bounded, false).total;
  float total[LANES] = {};
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES) {
    for (int64_t l = 0; l < LANES; ++l) total[l] += vexp(cap * z[j + l] / temperature - shift);
  }
  for (int64_t l = 0; j < n; ++j, ++l) total[l] += vexp(cap * z[j] / temperature - shift);
  double sum = 0;
  for (int64_t l = 0; l < LANES; ++l) sum += total[l];
  return sum;
}

EVERY_ISA void squashed_find(const float* z, int64_t n, const LogitMap& map, float shift, const double* at,
                             int64_t count, int64_t* found) {
  constexpr int64_t few = 4 * LANES;
  const bool capped = map.softcap > 0;
  const float factor = capped ? map.softcap : 1, divisor = capped ? map.temperature : 1;
  double before = 0;
  int64_t last = n, next = 0;
  for (int64_t j = 0; j < n && next < count; j += few) {
    const int64_t width = std::min(few, n - j);
    float e[few], lane[LANES] = {};
    for (int64_t i = 0; i < width; ++i) e[i] = vexp(factor * z[j + i] / divisor - shift);
    std::fill(e + width, e + few, 0.0f);
    for (int64_t i = 0; i < few; i += LANES) {
      for (int64_t l = 0; l < LANES; ++l) lane[l] += e[i + l];
    }
    double sum = 0;
    for (int64_t l = 0; l < LANES; ++l) sum += lane[l];
    if (sum == 0) continue;
    double running = before;
    int64_t i = 0;
    for (; next < count && at[next] < before + sum; ++next) {
      while (i + 1 < width && running + e[i] <= at[next]) running += e[i++];
      int64_t k = i;
      while (e[k] == 0) --k;  // the end, by rounding alone
      found[next] = j + k;
    }
    for (last = width - 1; e[last] == 0;) --last;
    last += j;
    before += sum;
  }
  for (; next < count; ++next) found[next] = last;
}

EVERY_ISA int64_t first_at_least(const float* z, int64_t n, float least) {
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES) {
    int32_t found = 0;
    for (int64_t l = 0; l < LANES; ++l) found |= z[j + l] >= least;
    if (found) break;
  }
  while (j < n && !(z[j] >= least)) ++j;
  return j;
}

EVERY_ISA int64_t count_at_least(const float* z, int64_t n, float least) {
  int32_t found = 0;
  for (int64_t j = 0; j < n; ++j) found += z[j] >= least;
  return found;
}

EVERY_ISA void add_scaled(float* sums, const float* x, float factor, int64_t n) {
  for (int64_t j = 0; j < n; ++j) sums[j] += factor * x[j];
}

EVERY_ISA void add_scaled(float* sums, const uint16_t* x, float factor, int64_t n) {
  for (int64_t j = 0; j < n; ++j) sums[j] += factor * std::bit_cast<float>(static_cast<uint32_t>(x[j]) << 16);
}

// An entry of to_squashed's result becomes exp(y) (d_softmax - d_entropy y) times the derivative of the cap, with y =
// logit - shift. Returns exp(y).
template <bool capped>
ALWAYS_INLINE float to_d_entry(float& z, const LogitMap& map, float shift, float d_softmax, float d_entropy) {
  constexpr float least = -1e4f;  // of y: exp(y) is 0 long before, and 0 times -inf is no number
  const float x = z, y = (capped ? map.softcap * x / map.temperature : x) - shift, e = vexp(y);
  const float d = e * (d_softmax - d_entropy * (y < least ? least : y));
  z = capped ? d * (1 - x * x) : d;
  return e;
}

// to_d_entry of to_squashed's result (n,). Returns sum exp(logit - shift).
template <bool capped>
EVERY_ISA static double to_d_entries(float* z, int64_t n, const LogitMap& all, float shift, float d_softmax,
                                     float d_entropy) {
  const LogitMap map = all;  // z may not point into it
  float total[LANES] = {};
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES) {
    for (int64_t l = 0; l < LANES; ++l) total[l] += to_d_entry<capped>(z[j + l], map, shift, d_softmax, d_entropy);
  }
  for (int64_t l = 0; j < n; ++j, ++l) total[l] += to_d_entry<capped>(z[j], map, shift, d_softmax, d_entropy);
  double sum = 0;
  for (int64_t l = 0; l < LANES; ++l) sum += total[l];
  return sum;
}

EVERY_ISA double to_d_products(float* z, const float* bias, int64_t n, const LogitMap& map, float shift,
                               float d_softmax, float d_entropy, float d_target, int64_t target) {
  const float chain = map.logit_scale / map.temperature, coefficient = d_softmax * chain;
  const bool bounded = to_squashed(z, bias, n, map) - shift <= 88;
  const bool here = target >= 0 && target < n;
  const float at_target = here ? d_target * chain * squashed_slope(z[target], map) : 0;
  double mass;
  if (d_entropy == 0) {
    mass = squashed_to_weights(z, n, map, shift, bounded);
    for (int64_t j = 0; j < n; ++j) z[j] *= coefficient;
  } else {
    const auto run = map.softcap > 0 ? to_d_entries<true> : to_d_entries<false>;
    mass = run(z, n, map, shift, coefficient, d_entropy * chain);
  }
  if (here) z[target] = at_target;
  return mass;
}

EVERY_ISA void to_bf16(uint16_t* out, const float* x, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t bits = std::bit_cast<uint32_t>(x[j]), rounded = bits + 0x7fff + ((bits >> 16) & 1);
    out[j] = static_cast<uint16_t>((x[j] != x[j] ? 0x7fc00000u : rounded) >> 16);
  }
}

EVERY_ISA void add_column_sums(double* sums, const float* d, int64_t rows, int64_t n, int64_t stride) {
  // 32 rows in float32, then in float64: sums over any number of tokens keep their digits.
  constexpr int64_t few = 32, tile = 256;
  float part[tile];
  for (int64_t j = 0; j < n; j += tile) {
    const int64_t width = std::min(tile, n - j);
    for (int64_t i0 = 0; i0 < rows; i0 += few) {
      std::fill(part, part + width, 0.0f);
      for (int64_t i = i0; i < std::min(rows, i0 + few); ++i) {
        for (int64_t l = 0; l < width; ++l) part[l] += d[i * stride + j + l];
      }
      for (int64_t l = 0; l < width; ++l) sums[j + l] += part[l];
    }
  }
}

// Points the names of row.h at the functions above.
void use() {
  groupdpo_kernels::to_logits = to_logits;
  groupdpo_kernels::maximum = maximum;
  groupdpo_kernels::first_index = first_index;
  groupdpo_kernels::exp_sums = exp_sums;
  groupdpo_kernels::to_d_products = to_d_products;
  groupdpo_kernels::to_squashed = to_squashed;
  groupdpo_kernels::squashed_logit = squashed_logit;
  groupdpo_kernels::squashed_at = squashed_at;
  groupdpo_kernels::squashed_slope = squashed_slope;
  groupdpo_kernels::squashed_to_weights = squashed_to_weights;
  groupdpo_kernels::squashed_sum = squashed_sum;
  groupdpo_kernels::squashed_find = squashed_find;
  groupdpo_kernels::first_at_least = first_at_least;
  groupdpo_kernels::count_at_least = count_at_least;
  groupdpo_kernels::to_bf16 = to_bf16;
  groupdpo_kernels::add_column_sums = add_column_sums;
  groupdpo_kernels::add_scaled_float = add_scaled;
  groupdpo_kernels::add_scaled_bf16 = add_scaled;
}

}  // namespace groupdpo_kernels::GROUPDPO_KERNELS_ROW
