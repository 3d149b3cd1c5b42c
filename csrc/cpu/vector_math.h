// exp and tanh as straight-line code, so that the compiler vectorises the loops around them; libm's are calls, one
// element at a time. Within 2 ulp of the true value (tests/test_csrc.py). NaN stays NaN. exp flushes below the least
// normal number to 0.
#pragma once
#include <bit>
#include <cstdint>
#include <limits>

namespace groupdpo_kernels {

#define ALWAYS_INLINE inline __attribute__((always_inline))

// Cephes expf: x = n ln 2 + r, a polynomial in r, times 2^n. For x <= 88: larger ones give garbage.
ALWAYS_INLINE float vexp_to_88(float x) {
  constexpr float least = -87.33654f;   // ln of the least normal float32
  constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
  const float y = x < least ? least : x;
  const float t = y * 1.44269504088896341f + round, n = t - round;
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: the first product is exact
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // n into the exponent of p. Unsigned: bits of a NaN may overflow.
  const float value = std::bit_cast<float>(std::bit_cast<uint32_t>(p) + (std::bit_cast<uint32_t>(t) << 23));
  const float flushed = x < least ? 0.0f : value;
  return x != x ? x : flushed;
}

ALWAYS_INLINE float vexp(float x) {
  constexpr float largest = 88.0f;  // 2^n stays finite up to here; beyond is inf
  return x > largest ? std::numeric_limits<float>::infinity() : vexp_to_88(x > largest ? largest : x);
}

// Cephes tanhf: a polynomial near 0, where 1 - 2 / (exp(2x) + 1) would cancel.
ALWAYS_INLINE float vtanh(float x) {
  const float a = x < 0 ? -x : x;
  const float s = x * x;
  float p = -5.70498872745e-3f;
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const float near = p * s * x + x;
  const float far = 1.0f - 2.0f / (vexp(2.0f * a) + 1.0f);
  return a < 0.625f ? near : x < 0 ? -far : far;
}

}  // namespace groupdpo_kernels
