// As much of the CUDA runtime as csrc/cuda uses, for a C++ compiler and no GPU: blocks run one after another, and the
// threads of a block as fibers that take turns wherever they would wait for each other. So tests run the launchers and
// kernels themselves: grids, votes, shuffles and barriers, a barrier that not all reach included (it aborts).
//
// What it cannot show: memory order (fibers never race), time, and what is written in a device's own instructions,
// which is under __CUDA_ARCH__. A __shared__ array is one for the whole process, and not cleared between blocks.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <strings.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#define __global__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
struct cudaFuncAttributes {};
struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace on_host {

// Those of one warp, or of the block, that have come to a point where they wait for each other.
struct Meeting {
  unsigned here = 0, round = 0;
  uint64_t said[32], heard[32];
};

inline std::vector<ucontext_t> fibers;
inline std::vector<Meeting> warps;
inline Meeting block;
inline ucontext_t scheduler;
inline unsigned moves = 0;  // since the last time that every fiber had its turn

inline void meet(Meeting& meeting, unsigned size) {
  const unsigned self = threadIdx.x, round = meeting.round;
  ++moves;
  if (++meeting.here == size) {
    for (int i = 0; i < 32; ++i) meeting.heard[i] = meeting.said[i];
    meeting.here = 0;
    ++meeting.round;
    return;
  }
  while (meeting.round == round) swapcontext(&fibers[self], &scheduler);
  ++moves;
}

// What every lane says, once all have said it.
inline const uint64_t* exchange(uint64_t value) {
  Meeting& warp = warps[threadIdx.x / 32];
  warp.said[threadIdx.x % 32] = value;
  meet(warp, 32);
  return warp.heard;
}

inline std::function<void()> body;
inline std::vector<bool> done;
inline void fiber() {
  body();
  done[threadIdx.x] = true;
  ++moves;
}

inline void run_block(unsigned threads) {
  static std::vector<std::vector<char>> stacks;
  stacks.resize(threads, std::vector<char>(1 << 16));
  fibers.assign(threads, {});
  warps.assign(threads / 32, {});
  block = {};
  done.assign(threads, false);
  for (unsigned t = 0; t < threads; ++t) {
    getcontext(&fibers[t]);
    fibers[t].uc_stack.ss_sp = stacks[t].data();
    fibers[t].uc_stack.ss_size = stacks[t].size();
    fibers[t].uc_link = &scheduler;
    makecontext(&fibers[t], fiber, 0);
  }
  for (unsigned left = threads; left;) {
    moves = 0;
    left = 0;
    for (unsigned t = 0; t < threads; ++t) {
      if (done[t]) continue;
      threadIdx.x = t;
      swapcontext(&scheduler, &fibers[t]);
      left += !done[t];
    }
    if (left && moves == 0) {
      fprintf(stderr, "%u threads of block %u wait for threads that never come\n", left, blockIdx.x);
      abort();
    }
  }
}

}  // namespace on_host

inline unsigned __ballot_sync(unsigned, bool vote) {
  const uint64_t* votes = on_host::exchange(vote);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(votes[i] != 0) << i;
  return bits;
}
inline int64_t __shfl_sync(unsigned, int64_t value, int lane) {
  return static_cast<int64_t>(on_host::exchange(static_cast<uint64_t>(value))[lane]);
}
inline void __syncthreads() {
  on_host::meet(on_host::block, blockDim.x);
}
inline int __ffs(unsigned bits) {
  return ffs(static_cast<int>(bits));
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  if (gridDim.x == 0 || blockDim.x == 0 || blockDim.x % 32) return cudaErrorInvalidConfiguration;
  on_host::body = [&] { kernel(arguments...); };
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) on_host::run_block(blockDim.x);
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "";
}
