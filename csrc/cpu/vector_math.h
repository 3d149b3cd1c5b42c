// exp and tanh as straight-line code, so that the compiler vectorises the loops around them; libm's are calls, one
// element at a time. Within 2 ulp of the true value (tests/test_csrc.py). NaN stays NaN. exp flushes below the least
// normal number to 0.
#pragma once
#include <bit>
#include <cstdint>
#include <limits>

namespace groupdpo_kernels {

#define ALWAYS_INLINE inline __attribute__((always_inline))

// Cephes expf: x = n ln 2 + r, a polynomial in r, times 2^n.
ALWAYS_INLINE float vexp(float x) {
  constexpr float least = -87.33654f;   // ln of the least normal float32
  constexpr float largest = 88.0f;      // 2^n stays finite up to here; beyond is inf
  constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer
  float y = x > least ? x : least;      // NaN too: the conversion to an integer below is defined for every x
  y = y > largest ? largest : y;
  const float n = (y * 1.44269504088896341f + round) - round;
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: the first product is exact
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float value = p * std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
  const float bounded = x < least ? 0.0f : x > largest ? std::numeric_limits<float>::infinity() : value;
  return x != x ? x : bounded;
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
