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
  STD_TORCH_CHECK(owned.scalar_type() == ScalarType::Long && owned.is_contiguous() && owned.size(0) == out.size(0) + 1,
                  "owned must be contiguous int64 (m + 1,) with m = ", out.size(0));
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long && index.is_contiguous() &&
                      coefficients.scalar_type() == ScalarType::Float && coefficients.is_contiguous() &&
                      coefficients.size(0) == index.size(0),
                  "index must be int64 and coefficients float32, both contiguous (K,)");
  const auto run = dtype == ScalarType::Float ? add<float> : add<uint16_t>;
  run(out, source, owned.const_data_ptr<int64_t>(), index.const_data_ptr<int64_t>(),
      coefficients.const_data_ptr<float>());
}

}  // namespace groupdpo_kernels
