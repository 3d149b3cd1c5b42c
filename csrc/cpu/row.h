// One row of a block of logits: the elementwise maths and the reductions, in float32, on one thread. Knows nothing of
// tensors, blocks or threads. Formulas: docs/math.md. Cost: one exponential a logit (and one tanh under softcap).
//
// row.cpp is compiled once for each instruction set, and the names here point at the copy in use: the widest that the
// processor has, or what the environment variable GROUPDPO_KERNELS_CPU_CAPABILITY says (row_choice.cpp). All copies
// give the same bits: the lanes and the order of additions are fixed, and no product is contracted with a sum.
#pragma once
#include <cstdint>

namespace groupdpo_kernels {

// From the head's product to a logit: logits = cap(logit_scale * (product + bias)) / temperature, cap(x) = softcap *
// tanh(x / softcap).
struct LogitMap {
  float logit_scale;
  float softcap;  // 0: no cap
  float temperature;
};

// What a row's log-probability and statistics are made of, relative to exp(shift): a common offset of all logits
// cancels before anything is rounded.
struct RowSums {
  double total;     // sum e,  e = exp(z - shift)
  double squares;   // sum e^2
  double weighted;  // sum e (z - shift), where e = 0 counts as 0 also for z = -inf
  double plain;     // sum z
};

// products (n,) -> logits, in place. bias (n,) or null.
extern void (*to_logits)(float* z, const float* bias, int64_t n, const LogitMap& map);

// Largest of z (n,), NaN passed over; -inf for none.
extern float (*maximum)(const float* z, int64_t n);

// Lowest index of `value` in z (n,); of NaN if value is NaN; -1 if absent.
extern int64_t (*first_index)(const float* z, int64_t n, float value);

// With stats, all of RowSums; else total alone. bounded: no z exceeds shift + 88.
extern RowSums (*exp_sums)(const float* z, int64_t n, float shift, bool bounded, bool stats);

// products (n,) -> d_products, in place, where d_logits is exp(y) (d_softmax - d_entropy y), with y = logits - shift,
// and d_target at the target. target is an index into the row; outside [0, n): none here. Returns sum exp(y).
extern double (*to_d_products)(float* z, const float* bias, int64_t n, const LogitMap& map, float shift,
                               float d_softmax, float d_entropy, float d_target, int64_t target);

// products (n,) -> in place the logits, or under softcap the tanh that they are made of. Returns the largest logit, NaN
// passed over.
extern float (*to_squashed)(float* z, const float* bias, int64_t n, const LogitMap& map);

// What one entry of to_squashed stands for: its logit, and the derivative of the cap there.
extern float (*squashed_logit)(float y, const LogitMap& map);
extern float (*squashed_at)(double logit, const LogitMap& map);  // the inverse
extern float (*squashed_slope)(float y, const LogitMap& map);

// to_squashed's result (n,) -> exp(logit - shift) times the derivative of the cap, in place. Returns sum exp(logit -
// shift). bounded: no logit exceeds shift + 88.
extern double (*squashed_to_weights)(float* z, int64_t n, const LogitMap& map, float shift, bool bounded);

// Of to_squashed's result (n,): sum exp(logit - shift). bounded: no logit exceeds shift + 88.
extern double (*squashed_sum)(const float* z, int64_t n, const LogitMap& map, float shift, bool bounded);

// Where the running sum of exp(logit - shift) over to_squashed's result (n,) first exceeds at[i], for `count` ascending
// at[i]: the last entry that adds anything where none does; n where nothing adds anything. -inf adds nothing.
extern void (*squashed_find)(const float* z, int64_t n, const LogitMap& map, float shift, const double* at,
                             int64_t count, int64_t* found);

// Index of the first of z (n,) that is at least `least`; n if there is none. NaN is not.
extern int64_t (*first_at_least)(const float* z, int64_t n, float least);

// How many of z (n,) are.
extern int64_t (*count_at_least)(const float* z, int64_t n, float least);

// sums (n,) += factor * x (n,); x float32 or bfloat16.
extern void (*add_scaled_float)(float* sums, const float* x, float factor, int64_t n);
extern void (*add_scaled_bf16)(float* sums, const uint16_t* x, float factor, int64_t n);
inline void add_scaled(float* sums, const float* x, float factor, int64_t n) {
  add_scaled_float(sums, x, factor, n);
}
inline void add_scaled(float* sums, const uint16_t* x, float factor, int64_t n) {
  add_scaled_bf16(sums, x, factor, n);
}

// x (n,) -> bfloat16, to nearest even; NaN stays NaN.
extern void (*to_bf16)(uint16_t* out, const float* x, int64_t n);

// sums (n,) += column sums of d (rows, n) with rows `stride` apart.
extern void (*add_column_sums)(double* sums, const float* d, int64_t rows, int64_t n, int64_t stride);

// The instruction set that the functions above use, and the widest that they could use on this machine: "default",
// "avx2" or "avx512".
const char* cpu_capability();
const char* widest_cpu_capability();

// Chooses one; returns the one of before. std::invalid_argument, in words, for a name that is unknown or that this
// processor lacks. Not while another thread computes.
const char* use_cpu_capability(const char* name);

// What GROUPDPO_KERNELS_CPU_CAPABILITY asked for and did not get, in words; null where it was heeded or is not set.
const char* ignored_cpu_capability();

}  // namespace groupdpo_kernels
