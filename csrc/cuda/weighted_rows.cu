// Sums of rows of a matrix by coefficients on a GPU: out[i] += sum of coefficients[j] source[index[j]] over begins[i]
// <= j < ends[i], in float32, rounded once. What it means: sparse.py; the arithmetic of a lane: weighted_rows.cuh.
//
// Rows own nothing, a few dozen entries or thousands, and which is not known when it is launched. Hence warps that
// decide for themselves: 32 lanes look at 32 rows at once and leave where none owns anything; a warp does a row's 32
// lanes x 16 bytes of columns; a row of more than kLong entries is cut among the warps of the block, whose sums are
// added in order. A row's sum has one order, whatever the launch: no atomics, the same bits every time.
//
// Never touches a row that owns nothing, allocates nothing, reads nothing back, so it may be captured in a graph.
// Precondition, checked in weighted_rows.cpp: shapes and dtypes; for the caller to see to: ids are rows of source, and
// out shares no memory with the rest. Cost: for each 32 x 16 bytes of columns 16 bytes a row of out, 12 bytes an entry;
// source once an entry, out twice for each row that owns one. No torch header, no Python.
#include <cuda_runtime.h>

#include "cuda/weighted_rows.cuh"
#include "cuda/weighted_rows.h"

namespace groupdpo_kernels {

namespace {

constexpr unsigned kAll = 0xffffffff;

// Block w of `work` takes chunk w / groups of the columns and rows w % groups, + groups, + 2 groups, ... of out. Rows
// side by side are much alike (an id's rank in a vocabulary says how frequent it is), so they go to different blocks;
// and blocks of one chunk run together, so that what they share of source is still in L2.
template <typename T, bool vector>
__global__ void __launch_bounds__(kWarps* kLanes)
    add_rows(T* out,                                                                     // (m, n) contiguous
             const T* __restrict__ source,                                               // (k, n), rows `stride` apart
             const int64_t* __restrict__ begins, const int64_t* __restrict__ ends,       // (m,)
             const int64_t* __restrict__ index, const float* __restrict__ coefficients,  // (K,)
             int64_t m, int64_t n, int64_t stride, int64_t groups, int64_t work) {
  using Columns = Lane<T, vector>;
  __shared__ float partials[kWarps - 1][Columns::kValues][kLanes];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  for (int64_t w = blockIdx.x; w < work; w += gridDim.x) {
    const int64_t chunk = w / groups, group = w - chunk * groups;
    const int64_t mine = group + lane * groups;
    int64_t begin = 0, end = 0;
    if (mine < m) {
      begin = begins[mine];
      end = ends[mine];
    }
    // The same in every warp of the block.
    const unsigned many = __ballot_sync(kAll, end - begin > kLong);
    const unsigned few = __ballot_sync(kAll, end > begin) & ~many;
    const Columns columns(chunk, lane, n);
    float sums[Columns::kValues];

    int turn = 0;
    for (unsigned left = few; left; left &= left - 1) {
      const int owner = __ffs(left) - 1;
      const int64_t first = __shfl_sync(kAll, begin, owner), last = __shfl_sync(kAll, end, owner);
      if (turn++ % kWarps != warp) continue;
      T* row = out + (group + owner * groups) * n;
      columns.start(sums, row);
      columns.add(sums, source, stride, index, coefficients, first, last);
      columns.write(row, sums);
    }

    for (unsigned left = many; left; left &= left - 1) {
      const int owner = __ffs(left) - 1;
      const int64_t first = __shfl_sync(kAll, begin, owner), last = __shfl_sync(kAll, end, owner);
      T* row = out + (group + owner * groups) * n;
      if (warp == 0) {
        columns.start(sums, row);
      } else {
        GROUPDPO_UNROLL
        for (int k = 0; k < Columns::kValues; ++k) sums[k] = 0;
      }
      columns.add(sums, source, stride, index, coefficients, piece(first, last, warp), piece(first, last, warp + 1));
      if (warp > 0) {
        GROUPDPO_UNROLL
        for (int k = 0; k < Columns::kValues; ++k) partials[warp - 1][k][lane] = sums[k];
      }
      __syncthreads();
      if (warp == 0) {
        for (int other = 0; other < kWarps - 1; ++other) {
          GROUPDPO_UNROLL
          for (int k = 0; k < Columns::kValues; ++k) sums[k] += partials[other][k][lane];
        }
        columns.write(row, sums);
      }
      __syncthreads();  // the next row writes partials again
    }
  }
}

template <typename T, bool vector>
cudaError_t launch(const WeightedRows& x, cudaStream_t stream) {
  const int64_t chunks = (x.n + Lane<T, vector>::kColumns - 1) / Lane<T, vector>::kColumns;
  // 32 rows a block; where that leaves a large GPU idle, a row for each warp. No result depends on it.
  int64_t groups = (x.m + kLanes - 1) / kLanes;
  if (groups * chunks < 1024) groups = (x.m + kWarps - 1) / kWarps;
  const int64_t work = groups * chunks, most = 0x7fffffff;
  cudaLaunchConfig_t launch = {};  // what <<< >>> says, in C++ that tests compile for the host
  launch.gridDim = dim3(static_cast<unsigned>(work < most ? work : most));
  launch.blockDim = dim3(kWarps * kLanes);
  launch.stream = stream;
  return cudaLaunchKernelEx(&launch, add_rows<T, vector>, static_cast<T*>(x.out), static_cast<const T*>(x.source),
                            x.begins, x.ends, x.index, x.coefficients, x.m, x.n, x.stride, groups, work);
}

template <typename T>
cudaError_t choose(const WeightedRows& x, cudaStream_t stream) {
  const int64_t values = 16 / sizeof(T);
  const bool aligned = (reinterpret_cast<uintptr_t>(x.out) | reinterpret_cast<uintptr_t>(x.source)) % 16 == 0;
  return aligned && x.n % values == 0 && x.stride % values == 0 ? launch<T, true>(x, stream)
                                                                : launch<T, false>(x, stream);
}

}  // namespace

extern "C" int groupdpo_add_weighted_rows(const WeightedRows* x, void* stream) {
  if (x->m == 0 || x->n == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (x->dtype) {
    case WeightedRows::kFloat32:
      return choose<float>(*x, on);
    case WeightedRows::kBfloat16:
      return choose<Bf16>(*x, on);
    case WeightedRows::kFloat16:
      return choose<Fp16>(*x, on);
  }
  return cudaErrorInvalidValue;
}

extern "C" int groupdpo_cuda_probe() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, add_rows<float, true>);
  cudaGetLastError();  // an answer, not a failure that the next launch should report
  return error;
}

extern "C" const char* groupdpo_cuda_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace groupdpo_kernels
