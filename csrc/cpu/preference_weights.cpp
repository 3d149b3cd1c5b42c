#include "preference_weights.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace groupdpo_kernels {

namespace {

using torch::headeronly::ScalarType;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kUnit = std::numeric_limits<float>::epsilon();  // closer to 0 than this a mean log-probability is 0

// -log sigma(x) and sigma(x), without overflow.
double neg_log_sigmoid(double x) {
  return std::max(-x, 0.0) + std::log1p(std::exp(-std::abs(x)));
}
double sigma(double x) {
  const double e = std::exp(-std::abs(x));
  return (x >= 0 ? 1.0 : e) / (1.0 + e);
}
double square(double x) {
  return x * x;
}
double log1mexp(double m) {
  return std::log(-std::expm1(m > -kUnit ? -kUnit : m));
}
double log_add_exp(double a, double b) {
  if (a == -kInf && b == -kInf) return a;
  return std::max(a, b) + std::log1p(std::exp(-std::abs(a - b)));
}

// One group: what the losses read and write. Index i runs over its responses.
struct Group {
  int64_t size = 0;
  std::vector<double> s, r, n, m, u, d_u, b, w, v, a;
  std::vector<char> positive;
  double P = 0, N = 0;

  void resize(int64_t count) {
    size = count;
    for (auto* x : {&s, &r, &n, &m, &u, &d_u, &b, &w, &v, &a}) x->assign(count, 0.0);
    positive.assign(count, 0);
    P = N = 0;
  }
  // Sum of x over one side.
  double sum(const std::vector<double>& x, bool side) const {
    double total = 0;
    for (int64_t i = 0; i < size; ++i) total += (positive[i] != 0) == side ? x[i] : 0.0;
    return total;
  }
  // Log-sum-exp of v over one side.
  double lse(bool side) const {
    double top = -kInf, total = 0;
    for (int64_t i = 0; i < size; ++i)
      if ((positive[i] != 0) == side) top = v[i] > top ? v[i] : top;
    const double shift = top == -kInf ? 0.0 : top;
    for (int64_t i = 0; i < size; ++i)
      if ((positive[i] != 0) == side) total += std::exp(v[i] - shift);
    return shift + std::log(total);
  }
};

double balance_weight(double log_w, double ceiling) {
  if (log_w >= std::log(ceiling)) return ceiling;
  return std::exp(log_w);  // NaN stays
}

// Pairwise losses: the value; a holds d loss / d u.
double pair_loss(Group& g, const LossSpec& spec) {
  if (spec.loss == LossKind::orpo)
    for (int64_t i = 0; i < g.size; ++i) {
      g.v[i] = g.w[i] * (g.m[i] - log1mexp(g.m[i]));
      g.d_u[i] = (g.m[i] > -kUnit ? 1.0 : -1.0 / std::expm1(g.m[i])) / g.n[i];
    }
  const double v_w = g.sum(g.v, true), v_l = g.sum(g.v, false), x = v_w - v_l, e = spec.label_smoothing;
  double loss = 0, d_x = 0, d_w = 0, d_l = 0;  // derivatives in x, and in the two sides apart
  switch (spec.loss) {
    case LossKind::sigmoid:
      loss = (1 - e) * neg_log_sigmoid(x) + e * neg_log_sigmoid(-x);
      d_x = e * sigma(x) - (1 - e) * sigma(-x);
      break;
    case LossKind::hinge:
      loss = std::max(1 - x, 0.0);
      d_x = x < 1 ? -1.0 : 0.0;
      break;
    case LossKind::ipo:
      loss = square((x - 0.5) / spec.beta);
      d_x = 2 * (x - 0.5) / square(spec.beta);
      break;
    case LossKind::orpo:
      loss = spec.beta * neg_log_sigmoid(x);
      d_x = -spec.beta * sigma(-x);
      break;
    case LossKind::robust:
      loss = neg_log_sigmoid(x) - e / (1 - 2 * e) * x;
      d_x = -sigma(-x) - e / (1 - 2 * e);
      break;
    case LossKind::exo_pair:
      loss = -sigma(x) * (neg_log_sigmoid(x) + std::log1p(-e)) - sigma(-x) * (neg_log_sigmoid(-x) + std::log(e));
      d_x = sigma(x) * sigma(-x) * (x + std::log(e) - std::log1p(-e));
      break;
    case LossKind::discopop: {
      // 1 - m, and m e^-x as one exponential: for a negative x of a large size it is 0 times infinity.
      const double rest = sigma(-x / spec.tau), grown = std::exp(-x - neg_log_sigmoid(x / spec.tau));
      loss = rest * neg_log_sigmoid(x) + grown;
      d_x = rest * ((grown - sigma(x / spec.tau) * neg_log_sigmoid(x)) / spec.tau - sigma(-x)) - grown;
      break;
    }
    case LossKind::nca_pair:
      loss = neg_log_sigmoid(v_w) + 0.5 * (neg_log_sigmoid(-v_w) + neg_log_sigmoid(-v_l));
      d_w = 0.5 * sigma(v_w) - sigma(-v_w);
      d_l = 0.5 * sigma(v_l);
      break;
    case LossKind::apo_zero:
      loss = sigma(-v_w) + sigma(v_l);
      d_w = -sigma(v_w) * sigma(-v_w);
      d_l = sigma(v_l) * sigma(-v_l);
      break;
    case LossKind::apo_down:
      loss = sigma(v_w) + sigma(-x);
      d_x = -sigma(x) * sigma(-x);
      d_w = sigma(v_w) * sigma(-v_w);
      break;
    case LossKind::sppo_hard:
      loss = square((v_w - 0.5) / spec.beta) + square((v_l + 0.5) / spec.beta);
      d_w = 2 * (v_w - 0.5) / square(spec.beta);
      d_l = 2 * (v_l + 0.5) / square(spec.beta);
      break;
    default: {
      double y = x;
      if (spec.loss == LossKind::rdpo) y += spec.alpha * (g.sum(g.n, true) - g.sum(g.n, false));
      if (spec.loss == LossKind::simpo) y -= spec.gamma;
      loss = neg_log_sigmoid(y);
      d_x = -sigma(-y);
    }
  }
  for (int64_t i = 0; i < g.size; ++i)
    g.a[i] = std::isnan(loss) ? loss : g.positive[i] ? g.w[i] * (d_w + d_x) : d_l - d_x;
  return loss;
}

double all_pairs_loss(Group& g, const LossSpec& spec) {
  double total = 0;
  for (int64_t i = 0; i < g.size; ++i) {
    if (!g.positive[i]) continue;
    double weights = 0;
    for (int64_t j = 0; j < g.size; ++j) {
      if (g.positive[j]) continue;
      const double w = spec.ceiling > 0 ? balance_weight(g.b[i] - g.b[j], spec.ceiling) : 1.0;
      const double x = w * g.u[i] - g.u[j], mass = sigma(-x) / (g.P * g.N);
      total += neg_log_sigmoid(x);
      weights += w;
      g.a[i] -= w * mass;
      g.a[j] += mass;
    }
    g.w[i] = weights / g.N;
  }
  return total / (g.P * g.N);
}

// Ranked, best first: sum_k lse(v_k ..) - v_k, and d / d v_i = sum over k <= i of exp(v_i - lse_k), minus 1.
double plackett_luce_loss(Group& g) {
  std::vector<double> suffix(g.size);
  double running = -kInf, loss = 0;
  for (int64_t i = g.size; i-- > 0;) {
    suffix[i] = running = log_add_exp(running, g.v[i]);
    loss += running - g.v[i];
  }
  double prefix = -kInf;
  for (int64_t i = 0; i < g.size; ++i) {
    prefix = log_add_exp(prefix, -suffix[i]);
    g.a[i] = std::exp(g.v[i] + prefix) - 1.0;
  }
  return loss;
}

double group_loss(Group& g, const LossSpec& spec) {
  switch (spec.loss) {
    case LossKind::margin: {
      const double x = g.sum(g.v, true) / g.P - g.sum(g.v, false) / g.N, mass = sigma(-x);
      for (int64_t i = 0; i < g.size; ++i) g.a[i] = mass * (g.positive[i] ? -g.w[i] / g.P : 1.0 / g.N);
      return neg_log_sigmoid(x);
    }
    case LossKind::mpo: {
      const double lse_p = g.lse(true), lse_n = g.lse(false), mass_n = sigma(lse_n - lse_p);
      // softmax_all - softmax_P is -softmax_P times the mass on N: no cancellation.
      for (int64_t i = 0; i < g.size; ++i)
        g.a[i] = mass_n * (g.positive[i] ? -g.w[i] * std::exp(g.v[i] - lse_p) : std::exp(g.v[i] - lse_n));
      return neg_log_sigmoid(lse_p - lse_n);
    }
    case LossKind::softmax: {
      const double lse_n = g.lse(false);
      double loss = 0, shared = 0;
      for (int64_t i = 0; i < g.size; ++i) {
        if (!g.positive[i]) continue;
        const double x = g.v[i] - lse_n, mass_n = sigma(-x);
        loss += neg_log_sigmoid(x) / g.P;
        shared += mass_n / g.P;
        g.a[i] = -g.w[i] * mass_n / g.P;
      }
      for (int64_t i = 0; i < g.size; ++i)
        if (!g.positive[i]) g.a[i] = shared * std::exp(g.v[i] - lse_n);
      return loss;
    }
    case LossKind::all_pairs:
      return all_pairs_loss(g, spec);
    case LossKind::plackett_luce:
      return plackett_luce_loss(g);
    default:
      return pair_loss(g, spec);
  }
}

// Whether the group can be computed: both sides there, two responses for a pairwise loss, positives first in a ranking.
bool well_formed(const Group& g, LossKind loss) {
  if (loss == LossKind::plackett_luce)
    for (int64_t i = 1; i < g.size; ++i)
      if (g.positive[i] && !g.positive[i - 1]) return false;
  return g.P > 0 && g.N > 0 && (loss >= LossKind::margin || g.size == 2);
}

// Scores and balance of a group whose s, r, n and sides are set.
void score(Group& g, const LossSpec& spec) {
  for (int64_t i = 0; i < g.size; ++i) {
    g.m[i] = g.s[i] / g.n[i];
    g.d_u[i] = spec.average ? spec.beta / g.n[i] : spec.beta;
    g.u[i] = (spec.subtract_reference ? g.s[i] - g.r[i] : g.s[i]) * g.d_u[i];
    g.w[i] = 1.0;
    const double b = spec.balance_reference ? g.s[i] - g.r[i] : g.s[i];
    g.b[i] = spec.balance_normalize ? b / g.n[i] : b;
    if (spec.loss == LossKind::orpo) g.b[i] += log1mexp(g.m[i]);
  }
  if (spec.ceiling > 0 && spec.loss != LossKind::all_pairs) {
    const double mean_b = g.sum(g.b, false) / g.N;
    for (int64_t i = 0; i < g.size; ++i)
      if (g.positive[i]) g.w[i] = balance_weight(g.b[i] - mean_b, spec.ceiling);
  }
  for (int64_t i = 0; i < g.size; ++i) g.v[i] = g.w[i] * g.u[i];
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> preference_weights_forward(
    const Tensor& token_logps, const std::optional<Tensor>& ref_logps, const Tensor& cu_seqlens,
    const Tensor& cu_groups, const Tensor& positive, const LossSpec& spec) {
  const int64_t T = token_logps.size(0), S = positive.size(0), G = cu_groups.size(0) - 1;
  const auto vector = [](int64_t size) {
    return torch::stable::full({size}, std::numeric_limits<double>::quiet_NaN(), ScalarType::Float);
  };
  Tensor seq_logps = vector(S), rewards = vector(S), balance_weights = vector(S), coefficients = vector(S);
  Tensor group_losses = vector(G);
  Tensor loss = torch::stable::full({}, 0.0, ScalarType::Float);

  const auto* logps = static_cast<const float*>(token_logps.data_ptr());
  const float* ref = ref_logps ? static_cast<const float*>(ref_logps->data_ptr()) : nullptr;
  const bool ref_of_sequences = ref_logps && ref_logps->size(0) == S;
  const auto* seqs = static_cast<const int64_t*>(cu_seqlens.data_ptr());
  const auto* groups = static_cast<const int64_t*>(cu_groups.data_ptr());
  const auto* side = static_cast<const bool*>(positive.data_ptr());
  auto* out_s = static_cast<float*>(seq_logps.data_ptr());
  auto* out_u = static_cast<float*>(rewards.data_ptr());
  auto* out_w = static_cast<float*>(balance_weights.data_ptr());
  auto* out_c = static_cast<float*>(coefficients.data_ptr());
  auto* out_g = static_cast<float*>(group_losses.data_ptr());

  std::vector<double> s(S, kNaN), r(S, kNaN);
  torch::stable::parallel_for(0, S, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (seqs[i] < 0 || seqs[i + 1] > T || seqs[i] >= seqs[i + 1]) continue;
      double total = 0, ref_total = 0;
      for (int64_t t = seqs[i]; t < seqs[i + 1]; ++t) total += logps[t];
      if (ref && !ref_of_sequences)
        for (int64_t t = seqs[i]; t < seqs[i + 1]; ++t) ref_total += ref[t];
      if (ref_of_sequences) ref_total = ref[i];
      s[i] = total;
      r[i] = std::isfinite(ref_total) ? ref_total : kNaN;  // a policy that is not finite is shown as it is
      out_s[i] = static_cast<float>(total);
    }
  });
  const bool covered = seqs[0] == 0 && seqs[S] == T && groups[0] == 0 && groups[G] == S;
  torch::stable::parallel_for(0, G, 64, [&](int64_t begin, int64_t end) {
    Group g;  // one for all of this thread: no allocation after the largest
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = groups[k], last = groups[k + 1];
      if (first < 0 || last > S || first > last) continue;
      g.resize(last - first);
      for (int64_t i = 0; i < g.size; ++i) {
        const int64_t at = first + i;
        g.s[i] = s[at];
        g.r[i] = r[at];
        g.n[i] = static_cast<double>(seqs[at + 1] - seqs[at]);
        g.positive[i] = side[at];
        (side[at] ? g.P : g.N) += 1;
      }
      score(g, spec);
      const bool valid = covered && well_formed(g, spec.loss);
      double value = valid ? group_loss(g, spec) : kNaN;
      // In ORPO the negative log-likelihood is part of the loss.
      const double nll = spec.nll_weight + (spec.loss == LossKind::orpo ? 1.0 : 0.0);
      value -= nll * g.sum(g.m, true) / g.P;
      for (int64_t i = 0; i < g.size; ++i) {
        const double d_s = g.a[i] * g.d_u[i] - (g.positive[i] ? nll / (g.n[i] * g.P) : 0.0);
        out_u[first + i] = static_cast<float>(g.u[i]);
        out_w[first + i] = static_cast<float>(g.w[i]);
        out_c[first + i] = static_cast<float>(valid ? d_s / static_cast<double>(G) : kNaN);
      }
      out_g[k] = static_cast<float>(value);
    }
  });
  double mean = 0;
  for (int64_t k = 0; k < G; ++k) mean += out_g[k];
  *static_cast<float*>(loss.data_ptr()) = static_cast<float>(mean / static_cast<double>(G));
  return {loss, seq_logps, rewards, group_losses, balance_weights, coefficients};
}

Tensor preference_weights_backward(const Tensor& d_loss, const Tensor& coefficients, const Tensor& cu_seqlens,
                                   int64_t T) {
  // NaN where no sequence owns a token: its offsets are wrong, and so is its gradient.
  Tensor d_token_logps = torch::stable::full({T}, std::numeric_limits<double>::quiet_NaN(), ScalarType::Float);
  const float d = *static_cast<const float*>(d_loss.data_ptr());
  const auto* c = static_cast<const float*>(coefficients.data_ptr());
  const auto* seqs = static_cast<const int64_t*>(cu_seqlens.data_ptr());
  auto* out = static_cast<float*>(d_token_logps.data_ptr());
  torch::stable::parallel_for(0, coefficients.size(0), 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (seqs[i] >= 0 && seqs[i + 1] <= T && seqs[i] < seqs[i + 1])
        std::fill(out + seqs[i], out + seqs[i + 1], d * c[i]);
  });
  return d_token_logps;
}

}  // namespace groupdpo_kernels
