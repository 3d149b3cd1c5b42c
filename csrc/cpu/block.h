// Blocks of the head's matrices, their products in float32, and how large a block may be: what forward and backward
// share. torch is used through its stable ABI alone, so one build runs on 2.11 and later.
//
// bfloat16 is multiplied as it is where the processor has an instruction for it and torch's library offers the product
// with a float32 result; everywhere else, and for float16 always, blocks are widened to float32 first.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <utility>

#include "cpu/linear_logps.h"
#include "cpu/ownership.h"
#include "cpu/row.h"
#include "cpu/sanitize.h"

namespace groupdpo_kernels {

using torch::headeronly::ScalarType;

// A float32 matrix in someone else's memory.
struct Matrix {
  float* data = nullptr;
  int64_t rows = 0, columns = 0;
  int64_t row_stride = 0, column_stride = 1;

  Matrix take(int64_t begin, int64_t count) const { return {row(begin), count, columns, row_stride, column_stride}; }
  Matrix take_columns(int64_t begin, int64_t count) const {
    return {data + begin * column_stride, rows, count, row_stride, column_stride};
  }
  float* row(int64_t i) const { return data + i * row_stride; }
};

// A factor of a product: float32, or bfloat16 where in_bf16(). Read only.
struct Factor {
  const void* data = nullptr;
  bool bf16 = false;
  int64_t rows = 0, columns = 0;
  int64_t row_stride = 0, column_stride = 1;

  Factor() = default;
  Factor(const Matrix& m)
      : data(m.data), rows(m.rows), columns(m.columns), row_stride(m.row_stride), column_stride(m.column_stride) {}
  Factor(const void* data, bool bf16, int64_t rows, int64_t columns, int64_t row_stride)
      : data(data), bf16(bf16), rows(rows), columns(columns), row_stride(row_stride) {}

  const void* at(int64_t entry) const { return static_cast<const char*>(data) + entry * (bf16 ? 2 : 4); }
  const void* row(int64_t i) const { return at(i * row_stride); }
  Factor take(int64_t begin, int64_t count) const {
    Factor part = *this;
    part.data = row(begin);
    part.rows = count;
    return part;
  }
  Factor take_columns(int64_t begin, int64_t count) const {
    Factor part = *this;
    part.data = at(begin * column_stride);
    part.columns = count;
    return part;
  }
  Factor transposed() const {
    Factor t = *this;
    std::swap(t.rows, t.columns);
    std::swap(t.row_stride, t.column_stride);
    return t;
  }
};

// Whether bfloat16 factors are multiplied as they are.
bool bf16_products();
// Turns that off, or on again where it can be: both ways run on one machine, in tests and benchmarks. Returns
// bf16_products() of before.
bool use_bf16_products(bool on);
// Whether those of this head are: bfloat16, and all of them laid out as the library wants them.
bool in_bf16(const Head& head);

// out = a @ b, or out += a @ b, accumulated in float32, on all cores, or on this one within parallel_for. Both factors
// of one dtype. The matrix library is given one tile of `out` at a time, on one thread, and the shape of a tile follows
// from the shapes here alone: the bits are the same at any number of threads.
void multiply(const Matrix& out, const Factor& a, const Factor& b, bool accumulate);

// float32 memory, allocated once by torch and reused for every block.
class Scratch {
 public:
  explicit Scratch(int64_t floats);
  float* data() const { return floats_.mutable_data_ptr<float>(); }
  Matrix matrix(int64_t rows, int64_t columns) const;  // contiguous, from the start

 private:
  Tensor floats_;
};

// Rows of a SharedScratch that its holder alone may write, until it is gone.
class Slice : public Matrix {
 public:
  Slice(const Matrix& rows, Ownership& ownership, int64_t begin) : Matrix(rows), ownership_(&ownership), begin_(begin) {
    ownership.take(begin, begin + rows.rows);
    for (int64_t i = 0; i < rows.rows; ++i) lend(row(i), rows.columns);
  }
  Slice(Slice&& other) noexcept
      : Matrix(other), ownership_(std::exchange(other.ownership_, nullptr)), begin_(other.begin_) {}
  Slice& operator=(Slice&&) = delete;
  ~Slice() {
    if (!ownership_) return;
    for (int64_t i = 0; i < rows; ++i) withhold(row(i), row_stride);
    ownership_->give_back(begin_, begin_ + rows);
  }

 private:
  Ownership* ownership_;
  int64_t begin_;
};

// Scratch that threads write at one time: each takes the rows that it works on.
class SharedScratch {
 public:
  SharedScratch(int64_t rows, int64_t columns)
      : columns_(columns), ownership_(std::make_unique<Ownership>(rows)), floats_(rows * scratch_stride(columns)) {
    withhold(floats_.data(), rows * scratch_stride(columns));
  }
  // Rows begin .. end, `columns` of each; throws std::logic_error where somebody else holds one of them.
  Slice take(int64_t begin, int64_t end, int64_t columns) const {
    STD_TORCH_CHECK(columns <= columns_, "a row of this scratch has ", columns_, " columns; got ", columns);
    return Slice(part(begin, end - begin, columns), *ownership_, begin);
  }
  // To read what was written, when nobody holds a part.
  Matrix all(int64_t rows, int64_t columns) const {
    const Matrix whole = part(0, rows, columns);
    for (int64_t i = 0; i < rows; ++i) lend(whole.row(i), columns);
    return whole;
  }

 private:
  Matrix part(int64_t begin, int64_t rows, int64_t columns) const {
    const int64_t stride = scratch_stride(columns_);
    return {floats_.data() + begin * stride, rows, columns, stride};
  }

  int64_t columns_;
  std::unique_ptr<Ownership> ownership_;
  Scratch floats_;
};

// Rows of an (n, k) or (n,) input of any floating dtype and strides as a factor, a block at a time: a view where the
// memory can be read as it is, else a float32 copy. bf16: a bfloat16 input is to be read as it is.
class Rows {
 public:
  static int64_t scratch_per_row(const Tensor& source, bool bf16);  // in floats
  Rows(const Tensor& source, bool bf16, int64_t block_rows);
  Factor rows(int64_t begin, int64_t count);  // valid until the next call; null data of an empty source

 private:
  Tensor source_;
  bool bf16_;
  Scratch scratch_;
};

// The gradient of an (n, k) or (n,) input: accumulated in float32 by blocks of rows, rounded to the input's dtype once.
// A float32 gradient is its own accumulator, any other has one block of them. Not needed: the result is (0,), and
// nothing else is allocated.
class Gradient {
 public:
  static int64_t scratch_per_row(const Tensor& input, bool needed);  // in floats
  Gradient(const Head& head, const Tensor& input, bool needed, int64_t block_rows);
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

// The most of a block.
inline constexpr int64_t kMostBlockRows = 1024, kMostBlockColumns = 2048;

struct BlockShape {
  int64_t rows, columns;  // tokens, vocabulary
};

// The largest block such that rows * per_row + columns * per_column + rows * columns * per_entry floats fit in
// workspace_bytes; never below 16 x 16 (a smaller budget is exceeded), never so large that the block of logits leaves
// the cache.
BlockShape block_shape(int64_t T, int64_t V, int64_t per_row, int64_t per_column, int64_t per_entry,
                       int64_t workspace_bytes);

// The rows of a block in units, as even as can be: the tiles of products with all of them. They depend on the number of
// rows alone, so what is decided and computed for a unit is the same at any number of threads.
class RowUnits {
 public:
  RowUnits(int64_t rows, bool bf16);
  int64_t count() const { return (rows_ + each_ - 1) / each_; }
  int64_t begin(int64_t unit) const { return unit * each_; }
  int64_t end(int64_t unit) const { return std::min(rows_, (unit + 1) * each_); }

  // Runs f(begin, end) over all rows. With a unit for every core, a unit at a time: what f does to its rows, products
  // included, stays in one core's cache. With fewer f gets all of them, and the products in it share the cores.
  template <typename F>
  void over(const F& f) const {
    if (count() >= static_cast<int64_t>(torch::stable::get_num_threads())) {
      over_each(0, rows_, f);
    } else {
      f(0, rows_);
    }
  }
  // Runs f(begin, end) for every unit of first .. last, which are whole ones.
  template <typename F>
  void over_each(int64_t first, int64_t last, const F& f) const {
    torch::stable::parallel_for(first / each_, (last + each_ - 1) / each_, 1, [&](int64_t from, int64_t to) {
      for (int64_t unit = from; unit < to; ++unit) f(begin(unit), end(unit));
    });
  }

 private:
  int64_t rows_, each_;
};

// Products of all tokens with the first K of a head's vocabulary, between forward and backward. A block that is not in
// the cache as a whole is computed whole: no ragged products.
class LogitCache {
 public:
  LogitCache(const Head& head, const Tensor& products);  // (T, K) float32
  void populate() const;                                 // pages in memory at once, where the system can
  int64_t columns() const { return all_.columns; }
  float* row(int64_t token, int64_t column0) const { return all_.row(token) + column0; }

 private:
  Matrix all_;
};

// The blocks of a head that are at hand.
class HeadBlocks {
 public:
  static int64_t scratch_per_row(const Head& head);     // in floats
  static int64_t scratch_per_column(const Head& head);  // likewise
  HeadBlocks(const Head& head, BlockShape shape);
  void take_tokens(int64_t begin, int64_t count);
  void take_vocabulary(int64_t begin, int64_t count);
  // What products() has written of the blocks taken.
  Matrix all_products() const { return products_.all(hidden.rows, weight.rows); }
  // hidden @ weight^T + low_rank_hidden @ low_rank_weight^T of the blocks taken, without bias, for the rows begin ..
  // end of the token block.
  Slice products(int64_t begin, int64_t end) const;
  // The same, from the cache where it is there.
  Slice products(int64_t begin, int64_t end, const LogitCache& cache) const;

  Factor hidden, low_rank_hidden;  // tokens taken
  Factor weight, low_rank_weight;  // vocabulary taken
  const float* bias = nullptr;     // likewise, or null

 private:
  Rows hidden_, low_rank_hidden_, weight_, low_rank_weight_, bias_;
  SharedScratch products_;
  int64_t token0_ = 0, column0_ = 0;  // where the blocks taken begin
};

// A block of products as the factor of a second product: rounded to bfloat16 where the other factor is, as every
// implementation that multiplies in bfloat16 does; else itself.
class Narrowed {
 public:
  static int64_t scratch_per_entry(const Head& head) { return in_bf16(head) ? 2 : 1; }  // in floats, z included
  Narrowed(const Head& head, BlockShape shape);

  // The rows of z, which are rows first and following of the block, for their holder alone.
  class Part {
   public:
    Part(const Matrix& z, std::optional<Slice> rows) : z_(z), rows_(std::move(rows)) {}
    void round(int64_t i) const;                      // row i of z is what it shall be
    void move(int64_t from, int64_t to) const;        // row `from` to row `to`
    Factor take(int64_t begin, int64_t count) const;  // the rows rounded or moved

   private:
    uint16_t* row(int64_t i) const { return reinterpret_cast<uint16_t*>(rows_->row(i)); }
    Matrix z_;
    std::optional<Slice> rows_;
  };
  Part part(const Matrix& z, int64_t first) const;
  Factor all(const Matrix& z) const;  // all rows of the block, when nobody holds a part

 private:
  bool bf16_;
  SharedScratch scratch_;
};

// A message that names the first thing wrong with shapes and dtypes, by exception. Users meet the checks of
// lm_head/api.py; these are for callers of the raw ops.
void check(const Head& head, const Tensor& targets);
void check_row_vector(const Tensor& x, const char* name, int64_t T, ScalarType dtype = ScalarType::Float);

LogitMap logit_map(const HeadOptions& options);

// Float32 sums of exponentials by block err by at most this much of themselves: sparse.py.
constexpr double kSumError = 0x1p-18;

// What every row's result is made of. NaN where the lse is infinite, as in torch.log_softmax.
inline float log_prob(float logit, double lse) {
  return std::isinf(lse) ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(logit - lse);
}

// A sum of exponentials is infinite where a logit is: then no probability of the row is a number.
inline double finite_or_nan(double total) {
  return std::isinf(total) ? std::numeric_limits<double>::quiet_NaN() : total;
}

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
