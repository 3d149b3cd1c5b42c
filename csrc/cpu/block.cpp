// See block.h.
#include "cpu/block.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>

namespace groupdpo_kernels {

namespace {

const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);

int64_t columns_of(const Tensor& x) {
  return x.dim() == 2 ? x.size(1) : 1;
}

// Whether the matrix product and the row functions can read x as it is: float32, columns side by side, rows apart and
// not expanded.
bool is_plain(const Tensor& x) {
  if (x.scalar_type() != ScalarType::Float) return false;
  if (x.dim() == 1) return x.stride(0) == 1;
  return x.stride(1) == 1 && x.stride(0) >= x.size(1);
}

Tensor wrap(const Matrix& m) {
  return torch::stable::from_blob(m.data, {m.rows, m.columns}, {m.row_stride, m.column_stride}, cpu, ScalarType::Float);
}

// Rows begin .. begin + count of an (n, k) or (n,) tensor, as a (count, k) view.
Tensor narrowed(const Tensor& x, int64_t begin, int64_t count) {
  Tensor all = x.dim() == 2 ? x : torch::stable::unsqueeze(x, 1);
  return torch::stable::narrow(all, 0, begin, count);
}

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// `size` cut into blocks of at most `most`, as even as can be: no last block of one row.
int64_t even(int64_t size, int64_t most) {
  return size == 0 ? 1 : ceil_div(size, ceil_div(size, most));
}

}  // namespace

void multiply(const Matrix& out, const Matrix& a, const Matrix& b, bool accumulate) {
  const Tensor o = wrap(out), x = wrap(a), y = wrap(b);
  if (accumulate) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(o.get(), o.get(), x.get(), y.get(), 1, 1));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(o.get(), x.get(), y.get()));
  }
}

Scratch::Scratch(int64_t floats) : floats_(torch::stable::empty({floats}, ScalarType::Float, std::nullopt, cpu)) {}

Matrix Scratch::matrix(int64_t rows, int64_t columns) const {
  return {floats_.mutable_data_ptr<float>(), rows, columns, columns};
}

int64_t Widened::scratch_per_row(const std::optional<Tensor>& source) {
  return source && !is_plain(*source) ? columns_of(*source) : 0;
}

Widened::Widened(const std::optional<Tensor>& source, int64_t block_rows)
    : source_(source), scratch_(block_rows * scratch_per_row(source)) {}

Matrix Widened::rows(int64_t begin, int64_t count) {
  if (!source_) return {};
  if (is_plain(*source_)) {
    float* data = const_cast<float*>(source_->const_data_ptr<float>());  // read only: a Matrix has one kind of pointer
    return {data + begin * source_->stride(0), count, columns_of(*source_), source_->stride(0)};
  }
  const Matrix copy = scratch_.matrix(count, columns_of(*source_));
  Tensor destination = wrap(copy);
  torch::stable::copy_(destination, narrowed(*source_, begin, count));
  return copy;
}

int64_t Gradient::scratch_per_row(const std::optional<Tensor>& input, bool needed) {
  return needed && input && input->scalar_type() != ScalarType::Float ? columns_of(*input) : 0;
}

Gradient::Gradient(const Head& head, const std::optional<Tensor>& input, bool needed, int64_t block_rows)
    : needed_(needed && input),
      block_rows_(block_rows),
      result_(needed_ ? torch::stable::new_empty(head.hidden, input->sizes())
                      : torch::stable::new_empty(head.hidden, {0})) {
  const int64_t per_row = scratch_per_row(input, needed);
  if (per_row > 0) scratch_.emplace(block_rows * per_row);
  // Nothing is accumulated without tokens or without a vocabulary.
  if (head.hidden.size(0) == 0 || head.weight.size(0) == 0) torch::stable::zero_(result_);
}

Matrix Gradient::accumulators(int64_t begin, int64_t count) const {
  const int64_t columns = columns_of(result_);
  const Matrix all = scratch_ ? scratch_->matrix(block_rows_, columns)
                              : Matrix{result_.mutable_data_ptr<float>(), result_.size(0), columns, columns};
  return {all.row(scratch_ ? begin % block_rows_ : begin), count, columns, columns};
}

void Gradient::round(int64_t begin, int64_t count) const {
  if (!scratch_) return;
  Tensor destination = narrowed(result_, begin, count);
  torch::stable::copy_(destination, wrap(accumulators(begin, count)));
}

BlockShape block_shape(int64_t T, int64_t V, int64_t per_row, int64_t per_column, int64_t workspace_bytes) {
  constexpr int64_t least = 16, most_rows = 1024, most_columns = 2048;
  const int64_t budget = workspace_bytes / static_cast<int64_t>(sizeof(float));
  // A quarter for the tokens and the least of columns: the vocabulary side has the gradient of the weight besides.
  const int64_t rows = even(T, std::clamp(budget / 4 / (per_row + least), least, most_rows));
  const int64_t columns = even(V, std::clamp((budget - rows * per_row) / (per_column + rows), least, most_columns));
  return {rows, columns};
}

int64_t HeadBlocks::scratch_per_row(const Head& head) {
  return Widened::scratch_per_row(head.hidden) + Widened::scratch_per_row(head.low_rank_hidden);
}

int64_t HeadBlocks::scratch_per_column(const Head& head) {
  return Widened::scratch_per_row(head.weight) + Widened::scratch_per_row(head.low_rank_weight) +
         Widened::scratch_per_row(head.bias);
}

HeadBlocks::HeadBlocks(const Head& head, BlockShape shape)
    : hidden_(head.hidden, shape.rows),
      low_rank_hidden_(head.low_rank_hidden, shape.rows),
      weight_(head.weight, shape.columns),
      low_rank_weight_(head.low_rank_weight, shape.columns),
      bias_(head.bias, shape.columns),
      products_(shape.rows * shape.columns) {}

void HeadBlocks::take_tokens(int64_t begin, int64_t count) {
  hidden = hidden_.rows(begin, count);
  low_rank_hidden = low_rank_hidden_.rows(begin, count);
}

void HeadBlocks::take_vocabulary(int64_t begin, int64_t count) {
  weight = weight_.rows(begin, count);
  low_rank_weight = low_rank_weight_.rows(begin, count);
  bias = bias_.rows(begin, count);
}

Matrix HeadBlocks::products() const {
  const Matrix z = products_.matrix(hidden.rows, weight.rows);
  multiply(z, hidden, weight.transposed(), false);
  if (low_rank_weight.data) multiply(z, low_rank_hidden, low_rank_weight.transposed(), true);
  return z;
}

void check(const Head& head, const Tensor& targets) {
  const auto& [hidden, weight, bias, low_rank_hidden, low_rank_weight] = head;
  const ScalarType dtype = hidden.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "hidden must be float32, bfloat16 or float16; got ", torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2, "hidden and weight must have 2 dimensions; got ",
                  hidden.dim(), " and ", weight.dim());
  STD_TORCH_CHECK(hidden.size(1) == weight.size(1), "hidden and weight must agree in D; got ", hidden.size(1), " and ",
                  weight.size(1));
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long && targets.dim() == 1 &&
                      targets.size(0) == hidden.size(0) && targets.is_contiguous(),
                  "targets must be contiguous int64 (T,) with T = ", hidden.size(0));
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)),
                  "bias must be (V,) with V = ", weight.size(0));
  STD_TORCH_CHECK(low_rank_hidden.has_value() == low_rank_weight.has_value(),
                  "low_rank_hidden and low_rank_weight must come together");
  STD_TORCH_CHECK(
      !low_rank_weight ||
          (low_rank_hidden->dim() == 2 && low_rank_weight->dim() == 2 && low_rank_hidden->size(0) == hidden.size(0) &&
           low_rank_weight->size(0) == weight.size(0) && low_rank_hidden->size(1) == low_rank_weight->size(1)),
      "low_rank_hidden must be (T, R) and low_rank_weight (V, R)");
  for (const auto* x : {&bias, &low_rank_hidden, &low_rank_weight}) {
    STD_TORCH_CHECK(!*x || (*x)->scalar_type() == dtype, "all inputs must have the dtype of hidden, ",
                    torch::headeronly::toString(dtype));
  }
  STD_TORCH_CHECK(weight.scalar_type() == dtype, "weight must have the dtype of hidden, ",
                  torch::headeronly::toString(dtype));
}

LogitMap logit_map(const HeadOptions& options) {
  return {static_cast<float>(options.logit_scale), static_cast<float>(options.softcap.value_or(0)),
          static_cast<float>(options.temperature)};
}

}  // namespace groupdpo_kernels
