// What a sanitizer cannot see by itself, told to it: rows of scratch that nobody holds, and what the matrix library,
// which is not built with it, reads and writes. In other builds all of it is nothing. `make sanitize`.
#pragma once
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
extern "C" void __asan_loadN(void* begin, long bytes);
extern "C" void __asan_storeN(void* begin, long bytes);
#elif defined(__SANITIZE_THREAD__)
extern "C" void __tsan_read_range(void* begin, long bytes);
extern "C" void __tsan_write_range(void* begin, long bytes);
#endif

namespace groupdpo_kernels {

// Floats from a row of scratch that threads share to the next: with a gap that no row may touch, where that is seen.
inline int64_t scratch_stride(int64_t columns) {
#if defined(__SANITIZE_ADDRESS__)
  return (columns + 1) / 2 * 2 + 16;  // even: the sanitizer marks memory from multiples of 8 bytes on
#else
  return columns;
#endif
}

// Nobody may touch these floats until they are lent.
inline void withhold([[maybe_unused]] const float* begin, [[maybe_unused]] int64_t count) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(begin, count * sizeof(float));
#endif
}

inline void lend([[maybe_unused]] const float* begin, [[maybe_unused]] int64_t count) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(begin, count * sizeof(float));
#endif
}

// The library is about to read, or to write.
inline void library_reads([[maybe_unused]] const void* begin, [[maybe_unused]] int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_loadN(const_cast<void*>(begin), bytes);
#elif defined(__SANITIZE_THREAD__)
  __tsan_read_range(const_cast<void*>(begin), bytes);
#endif
}

inline void library_writes([[maybe_unused]] const void* begin, [[maybe_unused]] int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_storeN(const_cast<void*>(begin), bytes);
#elif defined(__SANITIZE_THREAD__)
  __tsan_write_range(const_cast<void*>(begin), bytes);
#endif
}

}  // namespace groupdpo_kernels
