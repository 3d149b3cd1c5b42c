// Sums of rows of a matrix by coefficients: the product of a sparse matrix, given by its rows, and a dense one.
#include <algorithm>
#include <vector>

#include "cpu/block.h"

namespace groupdpo_kernels {

namespace {

void load(float* sums, const float* x, int64_t n) {
  std::copy_n(x, n, sums);
}
void load(float* sums, const uint16_t* x, int64_t n) {
  std::fill_n(sums, n, 0.0f);
  add_scaled(sums, x, 1, n);
}
void store(float* x, const float* sums, int64_t n) {
  std::copy_n(sums, n, x);
}
void store(uint16_t* x, const float* sums, int64_t n) {
  to_bf16(x, sums, n);
}

template <typename T>
void add(Tensor& out, const Tensor& source, const int64_t* owned, const int64_t* index, const float* coefficients) {
  const int64_t m = out.size(0), n = out.size(1), stride = source.stride(0);
  T* results = static_cast<T*>(out.mutable_data_ptr());
  const T* rows = static_cast<const T*>(source.const_data_ptr());
  torch::stable::parallel_for(0, m, std::max<int64_t>(1, m / 256), [&](int64_t begin, int64_t end) {
    std::vector<float> sums(n);
    for (int64_t i = begin; i < end; ++i) {
      if (owned[i] == owned[i + 1]) continue;
      load(sums.data(), results + i * n, n);
      for (int64_t j = owned[i]; j < owned[i + 1]; ++j) {
        add_scaled(sums.data(), rows + index[j] * stride, coefficients[j], n);
      }
      store(results + i * n, sums.data(), n);
    }
  });
}

// A wrong place would be read out of bounds. Looking at K of them costs nothing beside adding K rows.
void check_places(const int64_t* owned, int64_t m, int64_t K, const int64_t* index, int64_t k) {
  for (int64_t i = 0; i < m; ++i) {
    STD_TORCH_CHECK(owned[i] >= 0 && owned[i] <= owned[i + 1] && owned[i + 1] <= K,
                    "owned must not decrease and must lie in [0, K = ", K, "]; got ", owned[i], " and ", owned[i + 1]);
  }
  for (int64_t j = 0; j < K; ++j) {
    STD_TORCH_CHECK(index[j] >= 0 && index[j] < k, "index must be in [0, k = ", k, "); index[", j, "] is ", index[j]);
  }
}

}  // namespace

void add_weighted_rows(Tensor out, const Tensor& source, const Tensor& owned, const Tensor& index,
                       const Tensor& coefficients) {
  const ScalarType dtype = out.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "out must be float32 or bfloat16; got ",
                  torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(source.scalar_type() == dtype, "source must have the dtype of out");
  STD_TORCH_CHECK(out.dim() == 2 && source.dim() == 2 && out.size(1) == source.size(1) && out.is_contiguous() &&
                      (source.stride(1) == 1 || source.size(1) == 1),
                  "out must be contiguous (m, n), and source (k, n) with columns side by side");
  STD_TORCH_CHECK(owned.scalar_type() == ScalarType::Long && owned.is_contiguous() && owned.dim() == 1 &&
                      owned.size(0) == out.size(0) + 1,
                  "owned must be contiguous int64 (m + 1,) with m = ", out.size(0));
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long && index.is_contiguous() && index.dim() == 1 &&
                      coefficients.scalar_type() == ScalarType::Float && coefficients.is_contiguous() &&
                      coefficients.dim() == 1 && coefficients.size(0) == index.size(0),
                  "index must be int64 and coefficients float32, both contiguous (K,)");
  const int64_t* begins = owned.const_data_ptr<int64_t>();
  const int64_t* rows = index.const_data_ptr<int64_t>();
  check_places(begins, out.size(0), index.size(0), rows, source.size(0));
  const auto run = dtype == ScalarType::Float ? add<float> : add<uint16_t>;
  run(out, source, begins, rows, coefficients.const_data_ptr<float>());
}

}  // namespace groupdpo_kernels
