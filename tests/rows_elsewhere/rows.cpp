// The loops of csrc/cpu/row.cpp on fixed inputs; prints the bits of what they give, so that processors can be compared.
// No torch: it is compiled for another architecture and run by an emulator (`make test-aarch64`).
#include <bit>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <vector>

#include "cpu/row.h"

using namespace groupdpo_kernels;

namespace {

uint64_t state = 1;

float draw() {  // in [-8, 8), the same everywhere
  state = state * 6364136223846793005ULL + 1442695040888963407ULL;
  return static_cast<float>(static_cast<int64_t>(state >> 40)) * (16.0f / 16777216.0f) - 8.0f;
}

std::vector<float> row(int64_t n) {
  std::vector<float> out(n);
  for (float& x : out) x = draw();
  return out;
}

uint64_t hash = 14695981039346656037ULL;

void add(uint64_t bits) {
  hash = (hash ^ bits) * 1099511628211ULL;
}
void add(double x) {
  constexpr uint64_t nan = 0x7ff8000000000000;  // one NaN is as good as another
  add(x != x ? nan : std::bit_cast<uint64_t>(x));
}
void add(const std::vector<float>& values) {
  for (float x : values) add(static_cast<double>(x));
}
void say(const char* name, int64_t n) {
  std::printf("%s %lld %016llx\n", name, static_cast<long long>(n), static_cast<unsigned long long>(hash));
}

}  // namespace

int main() {
  const LogitMap maps[] = {{1, 0, 1}, {3, 0, 0.7f}, {1, 5, 1}, {0.5f, 30, 1.3f}};
  for (const int64_t n : {1, 31, 32, 33, 300, 1027}) {
    for (const LogitMap& map : maps) {
      const std::vector<float> drawn = row(n), bias = row(n);
      std::vector<float> z = drawn;
      to_logits(z.data(), bias.data(), n, map);
      add(z), say("to_logits", n);
      if (n > 40) z[7] = -std::numeric_limits<float>::infinity(), z[39] = std::numeric_limits<float>::quiet_NaN();
      const float top = maximum(z.data(), n);
      add(static_cast<double>(top)), add(static_cast<uint64_t>(first_index(z.data(), n, top))), say("maximum", n);
      for (const bool stats : {false, true}) {
        const RowSums sums = exp_sums(z.data(), n, top, !stats, stats);
        add(sums.total);
        if (stats) add(sums.squares), add(sums.weighted), add(sums.plain);
        say("exp_sums", n);
      }
      add(static_cast<uint64_t>(first_at_least(z.data(), n, top / 2)));
      add(static_cast<uint64_t>(count_at_least(z.data(), n, top / 2))), say("at_least", n);
      z = drawn;
      add(to_d_products(z.data(), bias.data(), n, map, top, 0.3f, -0.7f, n / 2)), add(z), say("to_d_products", n);
      z = drawn;
      const float largest = to_squashed(z.data(), bias.data(), n, map);
      add(static_cast<double>(largest)), add(z), say("to_squashed", n);
      add(squashed_sum(z.data(), n, map, largest, true)), say("squashed_sum", n);
      add(squashed_to_weights(z.data(), n, map, largest, true)), add(z), say("squashed_to_weights", n);
      std::vector<uint16_t> narrow(n);
      to_bf16(narrow.data(), drawn.data(), n);
      for (uint16_t x : narrow) add(static_cast<uint64_t>(x));
      say("to_bf16", n);
      std::vector<float> sums = bias;
      add_scaled(sums.data(), drawn.data(), 0.37f, n), add_scaled(sums.data(), narrow.data(), -1.3f, n);
      add(sums), say("add_scaled", n);
      std::vector<double> columns(n, 0.25);
      add_column_sums(columns.data(), drawn.data(), 1, n, n);
      for (double x : columns) add(x);
      say("add_column_sums", n);
    }
  }
}
