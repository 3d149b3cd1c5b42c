// Blocks of the head's matrices as float32, their products, and how large a block may be: what forward and backward
// share. torch is used through its stable ABI alone, so one build runs on 2.11 and later.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "cpu/linear_logps.h"
#include "cpu/row.h"

namespace groupdpo_kernels {

using torch::headeronly::ScalarType;

// A float32 matrix in someone else's memory.
struct Matrix {
  float* data = nullptr;
  int64_t rows = 0, columns = 0;
  int64_t row_stride = 0, column_stride = 1;

  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
  float* row(int64_t i) const { return data + i * row_stride; }
};

// out = a @ b, or out += a @ b, by torch's matrix product on all cores.
void multiply(const Matrix& out, const Matrix& a, const Matrix& b, bool accumulate);

// float32 memory, allocated once by torch and reused for every block.
class Scratch {
 public:
  explicit Scratch(int64_t floats);
  Matrix matrix(int64_t rows, int64_t columns) const;  // contiguous, from the start

 private:
  Tensor floats_;
};

// Rows of an (n, k) or (n,) input of any floating dtype and strides as float32, a block at a time: a view where the
// memory can be read as it is, else a copy.
class Widened {
 public:
  static int64_t scratch_per_row(const std::optional<Tensor>& source);  // in floats
  Widened(const std::optional<Tensor>& source, int64_t block_rows);
  Matrix rows(int64_t begin, int64_t count);  // valid until the next call; null data without a source

 private:
  std::optional<Tensor> source_;
  Scratch scratch_;
};

// The gradient of an (n, k) or (n,) input: accumulated in float32 by blocks of rows, rounded to the input's dtype once.
// A float32 gradient is its own accumulator, any other has one block of them. Not needed: the result is (0,), and
// nothing else is allocated.
class Gradient {
 public:
  static int64_t scratch_per_row(const std::optional<Tensor>& input, bool needed);  // in floats
  Gradient(const Head& head, const std::optional<Tensor>& input, bool needed, int64_t block_rows);
  explicit operator bool() const { return needed_; }
  Matrix accumulators(int64_t begin, int64_t count) const;  // of these rows of the input; begin within its block
  void round(int64_t begin, int64_t count) const;           // them -> the result; begin at the start of a block
  const Tensor& result() const { return result_; }

 private:
  bool needed_;
  int64_t block_rows_;
  Tensor result_;
  std::optional<Scratch> scratch_;
};

struct BlockShape {
  int64_t rows, columns;  // tokens, vocabulary
};

// The largest block such that rows * per_row + columns * per_column + rows * columns floats fit in workspace_bytes;
// never below 16 x 16 (a smaller budget is exceeded), never so large that the block of logits leaves the cache.
BlockShape block_shape(int64_t T, int64_t V, int64_t per_row, int64_t per_column, int64_t workspace_bytes);

// The blocks of a head that are at hand.
class HeadBlocks {
 public:
  static int64_t scratch_per_row(const Head& head);     // in floats
  static int64_t scratch_per_column(const Head& head);  // likewise
  HeadBlocks(const Head& head, BlockShape shape);
  void take_tokens(int64_t begin, int64_t count);
  void take_vocabulary(int64_t begin, int64_t count);
  // hidden @ weight^T + low_rank_hidden @ low_rank_weight^T of the blocks taken, without bias. Valid until the next
  // call.
  Matrix products() const;

  Matrix hidden, low_rank_hidden;        // tokens taken
  Matrix weight, low_rank_weight, bias;  // vocabulary taken; bias (n, 1)

 private:
  Widened hidden_, low_rank_hidden_, weight_, low_rank_weight_, bias_;
  Scratch products_;
};

// A message that names the first thing wrong with shapes and dtypes, by exception. Users meet the checks of logps.py;
// these are for callers of the raw ops.
void check(const Head& head, const Tensor& targets);

LogitMap logit_map(const HeadOptions& options);

// How many rows of a block make a task worth its start.
inline int64_t grain(int64_t columns) {
  return 1 + 16384 / (columns + 1);
}

// Gradients are written by hand here: torch must not record block products of inputs that require grad.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

}  // namespace groupdpo_kernels
