// Which copy of row.cpp is in use. One choice at load, by the processor and GROUPDPO_KERNELS_CPU_CAPABILITY, whose
// words are those of torch's ATEN_CPU_CAPABILITY. A call through a pointer is per row of a block: free.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/row.h"

namespace groupdpo_kernels {

decltype(to_logits) to_logits;
decltype(maximum) maximum;
decltype(first_index) first_index;
decltype(exp_sums) exp_sums;
decltype(to_d_products) to_d_products;
decltype(to_squashed) to_squashed;
decltype(squashed_logit) squashed_logit;
decltype(squashed_at) squashed_at;
decltype(squashed_slope) squashed_slope;
decltype(squashed_to_weights) squashed_to_weights;
decltype(squashed_sum) squashed_sum;
decltype(squashed_find) squashed_find;
decltype(first_at_least) first_at_least;
decltype(count_at_least) count_at_least;
decltype(to_bf16) to_bf16;
decltype(add_column_sums) add_column_sums;
decltype(add_scaled_float) add_scaled_float;
decltype(add_scaled_bf16) add_scaled_bf16;

namespace row_default {
void use();
}
#ifdef GROUPDPO_KERNELS_ROW_X86
namespace row_avx2 {
void use();
}
namespace row_avx512 {
void use();
}
#endif

namespace {

struct Copy {
  const char* name;
  void (*use)();
  bool runs;
};

// Widest first; the last runs anywhere.
const Copy* copies() {
  static const Copy all[] = {
#ifdef GROUPDPO_KERNELS_ROW_X86
      {"avx512", row_avx512::use, __builtin_cpu_supports("avx512f") != 0},
      {"avx2", row_avx2::use, __builtin_cpu_supports("avx2") != 0},
#endif
      {"default", row_default::use, true},
  };
  return all;
}

const Copy* widest() {
  const Copy* copy = copies();
  while (!copy->runs) ++copy;
  return copy;
}

const Copy* find(const std::string& name) {
  const std::string wanted = "must be default, avx2 or avx512, and one that this processor has (the widest is " +
                             std::string(widest()->name) + "); got '" + name + "'";
  for (const Copy* copy = copies();; ++copy) {
    if (name == copy->name && copy->runs) return copy;
    if (copy->name == std::string("default")) throw std::invalid_argument(wanted);
  }
}

const Copy* used;
std::string ignored;

const bool chosen = [] {
#ifdef GROUPDPO_KERNELS_ROW_X86
  __builtin_cpu_init();
#endif
  used = widest();
  const char* name = std::getenv("GROUPDPO_KERNELS_CPU_CAPABILITY");
  try {
    if (name && *name) used = find(name);
  } catch (const std::invalid_argument& error) {
    ignored = std::string("GROUPDPO_KERNELS_CPU_CAPABILITY ") + error.what() + "; " + used->name + " is used";
  }
  used->use();
  return true;
}();

}  // namespace

const char* cpu_capability() {
  return used->name;
}

const char* widest_cpu_capability() {
  return widest()->name;
}

const char* use_cpu_capability(const char* name) {
  const char* before = used->name;
  used = find(name);
  used->use();
  return before;
}

const char* ignored_cpu_capability() {
  return ignored.empty() ? nullptr : ignored.c_str();
}

}  // namespace groupdpo_kernels
