// Who writes where in scratch that threads share: the rows that one of them has taken, no other can take until they are
// given back. Knows no tensors and holds no memory of its own but one flag a row, so every build checks: a flag costs a
// thousandth of what is done to its row.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

namespace groupdpo_kernels {

class Ownership {
 public:
  explicit Ownership(int64_t rows) : rows_(rows), taken_(std::make_unique<std::atomic<bool>[]>(rows)) {}

  // Throws std::logic_error, and takes nothing, where a row is outside or taken already.
  void take(int64_t begin, int64_t end) {
    if (begin < 0 || end < begin || end > rows_) fail("are outside of", begin, end);
    for (int64_t i = begin; i < end; ++i) {
      if (taken_[i].exchange(true, std::memory_order_acquire)) {
        give_back(begin, i);
        fail("overlap with rows in use of", begin, end);
      }
    }
  }

  void give_back(int64_t begin, int64_t end) noexcept {
    for (int64_t i = begin; i < end; ++i) taken_[i].store(false, std::memory_order_release);
  }

 private:
  [[noreturn]] void fail(const char* what, int64_t begin, int64_t end) const {
    throw std::logic_error("rows " + std::to_string(begin) + " to " + std::to_string(end) + " " + what +
                           " a scratch of " + std::to_string(rows_) + " rows");
  }

  int64_t rows_;
  std::unique_ptr<std::atomic<bool>[]> taken_;
};

}  // namespace groupdpo_kernels
