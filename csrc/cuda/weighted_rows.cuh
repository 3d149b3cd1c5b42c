// The arithmetic of weighted_rows.cu for one lane of a warp: which columns it owns, how it reads them, in which order
// it adds, how it rounds. Plain C++ apart from the loads and conversions of a device, so that tests compile it for the
// host too. Never launches, never synchronises, allocates nothing.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define GROUPDPO_LANE __host__ __device__ __forceinline__
#define GROUPDPO_UNROLL _Pragma("unroll")
#else
#define GROUPDPO_LANE inline
#define GROUPDPO_UNROLL
#endif

namespace groupdpo_kernels {

constexpr int kLanes = 32;
// Of a block. Part of the result: a long row is summed in as many pieces.
constexpr int kWarps = 8;
// Entries whose loads are under way at once. Half a KiB each: 4 KiB a warp, so that ten warps of an SM cover the
// latency of memory.
constexpr int kBatch = 8;
// Entries from which a row takes a whole block. d_hidden's rows (at most 257) keep to one warp each.
constexpr int64_t kLong = 512;

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

GROUPDPO_LANE float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
GROUPDPO_LANE uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

GROUPDPO_LANE float widen(float, uint32_t bits) {
  return as_float(bits);
}
GROUPDPO_LANE float widen(Bf16, uint32_t bits) {
  return as_float(bits << 16);
}
GROUPDPO_LANE float widen(Fp16, uint32_t bits) {
#ifdef __CUDA_ARCH__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
  return x;
#else
  const uint32_t special = (bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
  const float size = as_float((bits & 0x7fff) << 13) * 0x1p112f;  // exponents are biased by 15 and by 127
  return as_float(as_bits(size) | special | (bits & 0x8000) << 16);
#endif
}

// To the nearest, ties to even.
GROUPDPO_LANE uint32_t narrow(float, float x) {
  return as_bits(x);
}
GROUPDPO_LANE uint32_t narrow(Bf16, float x) {
#ifdef __CUDA_ARCH__
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  const uint32_t bits = as_bits(x);
  return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
#endif
}
GROUPDPO_LANE uint32_t narrow(Fp16, float x) {
#ifdef __CUDA_ARCH__
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  const uint32_t sign = as_bits(x) >> 16 & 0x8000, bits = as_bits(x) & 0x7fffffff;
  const float size = as_float(bits);
  if (x != x) return 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  if (size < 0x1p-14f) return sign | (as_bits(size + 0.5f) - as_bits(0.5f));  // 0.5 has the last place of a subnormal
  return sign | (bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13;
#endif
}

// 16 bytes: what one lane holds of one row.
struct Words {
  uint32_t word[4];
};

template <typename T>
GROUPDPO_LANE float value(const Words& x, int k) {
  if (sizeof(T) == 4) return widen(T{}, x.word[k]);
  return widen(T{}, x.word[k / 2] >> 16 * (k % 2) & 0xffff);
}

template <typename T>
GROUPDPO_LANE void put(Words& x, int k, uint32_t bits) {
  if (sizeof(T) == 4) {
    x.word[k] = bits;
  } else {
    x.word[k / 2] |= bits << 16 * (k % 2);
  }
}

// The columns of one lane. vector: side by side, moved 16 bytes at once, for which every row must start at a multiple
// of 16 bytes. Else every 32nd column, moved one by one, so that a warp still reads neighbours together.
template <typename T, bool vector>
struct Lane {
  static constexpr int kValues = 16 / sizeof(T);
  static constexpr int64_t kColumns = kLanes * kValues;  // of a warp

  int64_t first, n;
  bool outside;  // vector: past the last column. Such a lane reads what its neighbour does: no branch around a load

  GROUPDPO_LANE Lane(int64_t chunk, int lane, int64_t n)
      : first(chunk * kColumns + (vector ? lane * kValues : lane)), n(n), outside(vector && first >= n) {
    if (outside) first = n - kValues;
  }

  GROUPDPO_LANE Words read(const T* row) const {
    Words x = {};
    if (vector) {
#ifdef __CUDA_ARCH__
      const uint4 all = *reinterpret_cast<const uint4*>(row + first);
      return {all.x, all.y, all.z, all.w};
#else
      memcpy(&x, row + first, 16);
#endif
    } else {
      GROUPDPO_UNROLL
      for (int k = 0; k < kValues; ++k) {
        const int64_t column = first + k * kLanes;
        if (column < n) put<T>(x, k, load(row + column));
      }
    }
    return x;
  }

  // Of memory that nothing writes while the kernel runs.
  GROUPDPO_LANE Words read_constant(const T* row) const {
#ifdef __CUDA_ARCH__
    if (vector) {
      const uint4 all = __ldg(reinterpret_cast<const uint4*>(row + first));
      return {all.x, all.y, all.z, all.w};
    }
#endif
    return read(row);
  }

  GROUPDPO_LANE void write(T* row, const float (&sums)[kValues]) const {
    if (vector) {
      if (outside) return;
      Words x = {};
      GROUPDPO_UNROLL
      for (int k = 0; k < kValues; ++k) put<T>(x, k, narrow(T{}, sums[k]));
#ifdef __CUDA_ARCH__
      *reinterpret_cast<uint4*>(row + first) = make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]);
#else
      memcpy(row + first, &x, 16);
#endif
    } else {
      GROUPDPO_UNROLL
      for (int k = 0; k < kValues; ++k) {
        const int64_t column = first + k * kLanes;
        if (column < n) store(row + column, narrow(T{}, sums[k]));
      }
    }
  }

  GROUPDPO_LANE void start(float (&sums)[kValues], const T* row) const {
    const Words x = read(row);
    GROUPDPO_UNROLL
    for (int k = 0; k < kValues; ++k) sums[k] = value<T>(x, k);
  }

  // sums += coefficients[j] source[index[j]] for begin <= j < end, in order. An entry of coefficient 0 is not read.
  GROUPDPO_LANE void add(float (&sums)[kValues], const T* source, int64_t stride, const int64_t* index,
                         const float* coefficients, int64_t begin, int64_t end) const {
    for (int64_t j = begin; j < end; j += kBatch) {
      int64_t rows[kBatch];
      float factors[kBatch];
      Words x[kBatch];
      // Three loops, so that the loads of a batch are all under way before the first is waited for. The compiler would
      // rather save registers and mix the last two; it moves no load past a barrier.
      GROUPDPO_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        const bool here = j + b < end;
        rows[b] = here ? index[j + b] : 0;
        factors[b] = here ? coefficients[j + b] : 0;
      }
      GROUPDPO_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        x[b] = factors[b] != 0 ? read_constant(source + rows[b] * stride) : Words{};
      }
#ifdef __CUDA_ARCH__
      __syncwarp();
#endif
      GROUPDPO_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        GROUPDPO_UNROLL
        for (int k = 0; k < kValues; ++k) sums[k] = fmaf(factors[b], value<T>(x[b], k), sums[k]);
      }
    }
  }

 private:
  GROUPDPO_LANE static uint32_t load(const T* x) {
    uint32_t bits = 0;
    memcpy(&bits, x, sizeof(T));
    return bits;
  }
  GROUPDPO_LANE static void store(T* x, uint32_t bits) { memcpy(x, &bits, sizeof(T)); }
};

// Where the piece of warp `warp` begins in a long row begin..end; it ends where the next one begins.
GROUPDPO_LANE int64_t piece(int64_t begin, int64_t end, int warp) {
  const int64_t batches = (end - begin + kWarps * kBatch - 1) / (kWarps * kBatch);
  const int64_t at = begin + warp * batches * kBatch;
  return at < end ? at : end;
}

}  // namespace groupdpo_kernels
