// See block.h.
#include "cpu/block.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
// A plain C function of the matrix library in torch's x86 builds; null where torch has none.
extern "C" __attribute__((weak)) void cblas_gemm_bf16bf16f32(int layout, int transpose_a, int transpose_b, int m, int n,
                                                             int k, float alpha, const uint16_t* a, int lda,
                                                             const uint16_t* b, int ldb, float beta, float* c, int ldc);
// Likewise: the most threads of this thread's calls from now on, 0 for the library's own choice; returns that of
// before.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);
#define HAS_BF16_LIBRARY 1
#else
#define HAS_BF16_LIBRARY 0
#endif

namespace groupdpo_kernels {

namespace {

const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);

int64_t columns_of(const Tensor& x) {
  return x.dim() == 2 ? x.size(1) : 1;
}

// Columns side by side, rows apart and not expanded.
bool is_row_major(const Tensor& x) {
  if (x.dim() == 1) return x.stride(0) == 1;
  return x.stride(1) == 1 && x.stride(0) >= x.size(1);
}

// Whether x can be a factor as it is.
bool is_factor(const Tensor& x, bool bf16) {
  return x.scalar_type() == (bf16 ? ScalarType::BFloat16 : ScalarType::Float) && is_row_major(x);
}

bool library_has_bf16() {
#if HAS_BF16_LIBRARY
  // Without the instruction the library is slower than float32.
  return cblas_gemm_bf16bf16f32 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool bf16_on = library_has_bf16();

Tensor wrap(const Factor& f) {
  void* data = const_cast<void*>(f.data);  // from_blob has one kind of pointer
  return torch::stable::from_blob(data, {f.rows, f.columns}, {f.row_stride, f.column_stride}, cpu, ScalarType::Float);
}

#if HAS_BF16_LIBRARY
void multiply_bf16(const Matrix& out, const Factor& a, const Factor& b, bool accumulate) {
  constexpr int row_major = 101, as_it_is = 111, transposed = 112;
  // Both strides of a transposed column are 1: the leading dimension decides.
  const auto plain = [](const Factor& f) { return f.column_stride == 1 && f.row_stride >= f.columns; };
  const auto flag = [&](const Factor& f) { return plain(f) ? as_it_is : transposed; };
  const auto leading = [&](const Factor& f) { return static_cast<int>(plain(f) ? f.row_stride : f.column_stride); };
  cblas_gemm_bf16bf16f32(row_major, flag(a), flag(b), static_cast<int>(out.rows), static_cast<int>(out.columns),
                         static_cast<int>(a.columns), 1, static_cast<const uint16_t*>(a.data), leading(a),
                         static_cast<const uint16_t*>(b.data), leading(b), accumulate ? 1 : 0, out.data,
                         static_cast<int>(out.row_stride));
}
#endif

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

// The most rows and columns of one product of the library: small enough that a block of 1024 x 2048 feeds 16 cores,
// large enough that packing its factors is felt little, which the faster units of bfloat16 and a transposed factor feel
// more.
int64_t most_tile_rows(bool large) {
  return large ? 512 : 256;
}
constexpr int64_t kMostTileColumns = 512;
constexpr int64_t kLongSum = 256;

// The library cuts a product by the number of threads that it may use, inside of a parallel region too, where it uses
// one: on processors with AVX-512 its sums then depend on that number. While this lives it may use one.
class OneThread {
 public:
#if HAS_BF16_LIBRARY
  OneThread() : before_(MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0) {}
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before_);
  }
#else
  OneThread() = default;
#endif
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  [[maybe_unused]] int before_ = 0;
};

// What the library reads of a factor, or writes of a result, row by row as they lie in memory.
template <typename F>
void each_line(const Factor& f, const F& touch) {
  const Factor lines = f.column_stride == 1 ? f : f.transposed();
  for (int64_t i = 0; i < lines.rows; ++i) touch(lines.row(i), lines.columns * (f.bf16 ? 2 : 4));
}

void multiply_tile(const Matrix& out, const Factor& a, const Factor& b, bool accumulate) {
  for (const Factor& factor : {a, b}) {
    each_line(factor, [](const void* line, int64_t bytes) { library_reads(line, bytes); });
  }
  each_line(out, [](const void* line, int64_t bytes) { library_writes(line, bytes); });
#if HAS_BF16_LIBRARY
  if (a.bf16) return multiply_bf16(out, a, b, accumulate);
#endif
  const Tensor o = wrap(out), x = wrap(a), y = wrap(b);
  if (accumulate) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(o.get(), o.get(), x.get(), y.get(), 1, 1));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(o.get(), x.get(), y.get()));
  }
}

}  // namespace

bool bf16_products() {
  return bf16_on;
}

bool use_bf16_products(bool on) {
  return std::exchange(bf16_on, on && library_has_bf16());
}

bool in_bf16(const Head& head) {
  const auto ready = [](const Tensor& x) {
    return x.numel() == 0 || (is_factor(x, true) && x.stride(0) <= std::numeric_limits<int>::max());
  };
  // Below two tiles of the unit there is nothing to gain, and a gradient of few columns sums few roundings of d_logits.
  constexpr int64_t enough = 64;
  return bf16_on && head.hidden.size(1) >= enough && ready(head.hidden) && ready(head.weight) &&
         ready(head.low_rank_hidden) && ready(head.low_rank_weight);
}

void multiply(const Matrix& out, const Factor& a, const Factor& b, bool accumulate) {
  if (out.rows == 0 || out.columns == 0) return;
  const int64_t rows = even(out.rows, most_tile_rows(a.bf16 || a.column_stride != 1));
  const int64_t columns = even(out.columns, kMostTileColumns);
  const int64_t across = ceil_div(out.columns, columns), tiles = ceil_div(out.rows, rows) * across;
  // A long sum is added to `out` once it is whole. Some kernels of the library would begin with what is there, and add
  // thousands of small terms to what one large term, a token's target, has left.
  const bool apart = accumulate && a.columns >= kLongSum;
  // A second, empty task makes a parallel region of a single tile: outside of one the library would take all threads.
  torch::stable::parallel_for(0, std::max<int64_t>(tiles, 2), 1, [&](int64_t begin, int64_t end) {
    const OneThread limit;
    const auto sums = std::make_unique_for_overwrite<float[]>(apart && begin < tiles ? rows * columns : 0);
    for (int64_t tile = begin; tile < std::min(end, tiles); ++tile) {
      const int64_t i = tile / across * rows, j = tile % across * columns;
      const int64_t height = std::min(rows, out.rows - i), width = std::min(columns, out.columns - j);
      const Matrix here = out.take(i, height).take_columns(j, width);
      const Matrix sum = apart ? Matrix{sums.get(), height, width, width} : here;
      multiply_tile(sum, a.take(i, height), b.take_columns(j, width), accumulate && !apart);
      for (int64_t row = 0; apart && row < height; ++row) {
        std::transform(here.row(row), here.row(row) + width, sum.row(row), here.row(row), std::plus<>());
      }
    }
  });
}

RowUnits::RowUnits(int64_t rows, bool bf16) : rows_(rows), each_(even(rows, most_tile_rows(bf16))) {}

Scratch::Scratch(int64_t floats) : floats_(torch::stable::empty({floats}, ScalarType::Float, std::nullopt, cpu)) {}

Matrix Scratch::matrix(int64_t rows, int64_t columns) const {
  return {data(), rows, columns, columns};
}

int64_t Rows::scratch_per_row(const Tensor& source, bool bf16) {
  return source.numel() > 0 && !is_factor(source, bf16) ? columns_of(source) : 0;
}

Rows::Rows(const Tensor& source, bool bf16, int64_t block_rows)
    : source_(source), bf16_(bf16), scratch_(block_rows * scratch_per_row(source, bf16)) {}

Factor Rows::rows(int64_t begin, int64_t count) {
  if (source_.numel() == 0) return {};
  if (is_factor(source_, bf16_)) {
    const Factor all(source_.const_data_ptr(), bf16_, source_.size(0), columns_of(source_), source_.stride(0));
    return all.take(begin, count);
  }
  const Matrix copy = scratch_.matrix(count, columns_of(source_));
  Tensor destination = wrap(copy);
  torch::stable::copy_(destination, narrowed(source_, begin, count));
  return copy;
}

int64_t Gradient::scratch_per_row(const Tensor& input, bool needed) {
  return needed && input.scalar_type() != ScalarType::Float ? columns_of(input) : 0;
}

Gradient::Gradient(const Head& head, const Tensor& input, bool needed, int64_t block_rows)
    : needed_(needed),
      block_rows_(block_rows),
      result_(needed ? torch::stable::new_empty(head.hidden, input.sizes())
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

BlockShape block_shape(int64_t T, int64_t V, int64_t per_row, int64_t per_column, int64_t per_entry,
                       int64_t workspace_bytes) {
  constexpr int64_t least = 16;
  const int64_t budget = workspace_bytes / static_cast<int64_t>(sizeof(float));
  // A quarter for the tokens and the least of columns: the vocabulary side has the gradient of the weight besides.
  const int64_t rows = even(T, std::clamp(budget / 4 / (per_row + least * per_entry), least, kMostBlockRows));
  const int64_t columns =
      even(V, std::clamp((budget - rows * per_row) / (per_column + rows * per_entry), least, kMostBlockColumns));
  return {rows, columns};
}

LogitCache::LogitCache(const Head& head, const Tensor& products) {
  STD_TORCH_CHECK(products.scalar_type() == ScalarType::Float && products.dim() == 2 && products.is_contiguous() &&
                      products.size(0) == head.hidden.size(0) && products.size(1) <= head.weight.size(0),
                  "logit_cache must be contiguous float32 (T, K) with T = ", head.hidden.size(0),
                  ", K <= V = ", head.weight.size(0));
  all_ = {products.mutable_data_ptr<float>(), products.size(0), products.size(1), products.size(1)};
}

void LogitCache::populate() const {
#ifdef __linux__
  constexpr int populate_write = 23;  // MADV_POPULATE_WRITE, of Linux 5.14: older headers lack the name
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(all_.data) + page - 1) / page * page;
  const uintptr_t end = reinterpret_cast<uintptr_t>(all_.row(all_.rows)) / page * page;
  // A fault a page costs twice as much. A refusal changes nothing: the pages come one by one.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, populate_write);
#endif
}

int64_t HeadBlocks::scratch_per_row(const Head& head) {
  const bool bf16 = in_bf16(head);
  return Rows::scratch_per_row(head.hidden, bf16) + Rows::scratch_per_row(head.low_rank_hidden, bf16);
}

int64_t HeadBlocks::scratch_per_column(const Head& head) {
  const bool bf16 = in_bf16(head);
  return Rows::scratch_per_row(head.weight, bf16) + Rows::scratch_per_row(head.low_rank_weight, bf16) +
         Rows::scratch_per_row(head.bias, false);
}

HeadBlocks::HeadBlocks(const Head& head, BlockShape shape)
    : hidden_(head.hidden, in_bf16(head), shape.rows),
      low_rank_hidden_(head.low_rank_hidden, in_bf16(head), shape.rows),
      weight_(head.weight, in_bf16(head), shape.columns),
      low_rank_weight_(head.low_rank_weight, in_bf16(head), shape.columns),
      bias_(head.bias, false, shape.columns),
      products_(shape.rows, shape.columns) {}

void HeadBlocks::take_tokens(int64_t begin, int64_t count) {
  token0_ = begin;
  hidden = hidden_.rows(begin, count);
  low_rank_hidden = low_rank_hidden_.rows(begin, count);
}

void HeadBlocks::take_vocabulary(int64_t begin, int64_t count) {
  column0_ = begin;
  weight = weight_.rows(begin, count);
  low_rank_weight = low_rank_weight_.rows(begin, count);
  bias = static_cast<const float*>(bias_.rows(begin, count).data);
}

Slice HeadBlocks::products(int64_t begin, int64_t end) const {
  const int64_t count = end - begin;
  Slice z = products_.take(begin, end, weight.rows);
  multiply(z, hidden.take(begin, count), weight.transposed(), false);
  if (low_rank_weight.data) multiply(z, low_rank_hidden.take(begin, count), low_rank_weight.transposed(), true);
  return z;
}

Slice HeadBlocks::products(int64_t begin, int64_t end, const LogitCache& cache) const {
  if (column0_ + weight.rows > cache.columns()) return products(begin, end);
  Slice z = products_.take(begin, end, weight.rows);
  torch::stable::parallel_for(begin, end, grain(z.columns), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      std::copy_n(cache.row(token0_ + i, column0_), z.columns, z.row(i - begin));
    }
  });
  return z;
}

Narrowed::Narrowed(const Head& head, BlockShape shape)
    : bf16_(in_bf16(head)), scratch_(bf16_ ? shape.rows : 0, (shape.columns + 1) / 2) {}

Narrowed::Part Narrowed::part(const Matrix& z, int64_t first) const {
  if (!bf16_) return Part(z, std::nullopt);
  return Part(z, scratch_.take(first, first + z.rows, (z.columns + 1) / 2));
}

void Narrowed::Part::round(int64_t i) const {
  if (rows_) to_bf16(row(i), z_.row(i), z_.columns);
}

void Narrowed::Part::move(int64_t from, int64_t to) const {
  if (from == to) return;
  if (rows_) {
    std::copy_n(row(from), z_.columns, row(to));
  } else {
    std::copy_n(z_.row(from), z_.columns, z_.row(to));
  }
}

Factor Narrowed::Part::take(int64_t begin, int64_t count) const {
  if (!rows_) return z_.take(begin, count);
  return Factor(row(begin), true, count, z_.columns, 2 * rows_->row_stride);
}

Factor Narrowed::all(const Matrix& z) const {
  if (!bf16_) return z;
  const Matrix rows = scratch_.all(z.rows, (z.columns + 1) / 2);
  return Factor(rows.data, true, z.rows, z.columns, 2 * rows.row_stride);
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
  STD_TORCH_CHECK(bias.dim() == 1 && (bias.size(0) == weight.size(0) || bias.size(0) == 0),
                  "bias must be (V,) with V = ", weight.size(0), ", or (0,)");
  STD_TORCH_CHECK(low_rank_hidden.dim() == 2 && low_rank_weight.dim() == 2 &&
                      low_rank_hidden.size(0) == hidden.size(0) && low_rank_weight.size(0) == weight.size(0) &&
                      low_rank_hidden.size(1) == low_rank_weight.size(1),
                  "low_rank_hidden must be (T, R) and low_rank_weight (V, R)");
  for (const Tensor* x : {&bias, &low_rank_hidden, &low_rank_weight}) {
    STD_TORCH_CHECK(x->scalar_type() == dtype, "all inputs must have the dtype of hidden, ",
                    torch::headeronly::toString(dtype));
  }
  STD_TORCH_CHECK(weight.scalar_type() == dtype, "weight must have the dtype of hidden, ",
                  torch::headeronly::toString(dtype));
}

void check_row_vector(const Tensor& x, const char* name, int64_t T, ScalarType dtype) {
  STD_TORCH_CHECK(x.scalar_type() == dtype && x.dim() == 1 && x.size(0) == T && x.is_contiguous(), name,
                  " must be contiguous ", torch::headeronly::toString(dtype), " (T,) with T = ", T);
}

LogitMap logit_map(const HeadOptions& options) {
  return {static_cast<float>(options.logit_scale), static_cast<float>(options.softcap.value_or(0)),
          static_cast<float>(options.temperature)};
}

}  // namespace groupdpo_kernels
