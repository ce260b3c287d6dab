// Log-probability, entropy and log-sum-exp of one token from its row of logits, and the gradient of the first two.
// Each logit is read from memory once: a block is scanned for its maximum, then summed while it is still in L1.
#pragma once

#include <cmath>
#include <limits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "simd.h"

namespace bicot {

constexpr int64_t kBlock = 1024;  // 4 KiB of float32, an eighth of the smallest L1; also bounds float32 summation error
constexpr int64_t kSerial = 32768;  // fewer logits than this cost less than waking a second thread
constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kInf = std::numeric_limits<float>::infinity();

// A hint before a large new buffer is first written: page faults of 4 KiB would cost more than the pass over the
// logits.
inline void prefer_huge_pages(void* buffer, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(buffer) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(buffer) + bytes) / kHuge * kHuge;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)buffer, (void)bytes;
#endif
}

struct RowStats {
  float logprob, entropy;
  double lse;  // with logits near 1e4, a float32 log-sum-exp would cost the backward pass three digits
};

// The block as float32. bfloat16 is converted once, into L1: loads of 16 bits would halve the width of the loops below.
BICOT_INLINE const float* widen(const float* x, int64_t, float*) { return x; }
BICOT_INLINE const float* widen(const bfloat16* x, int64_t n, float* buffer) {
  for (int64_t j = 0; j < n; ++j) buffer[j] = load(x + j);
  return buffer;
}

BICOT_INLINE float block_max(const float* x, int64_t n) {
  float m = -kInf;
#pragma omp simd reduction(max : m)
  for (int64_t j = 0; j < n; ++j) m = x[j] > m ? x[j] : m;
  return m;
}

// With d_j = (x_j - max) * log2(e) / temperature: sum = Σ 2^d_j and weighted = Σ d_j 2^d_j. Both are kept relative to
// the running maximum and rescaled when a block raises it.
template <class T>
BICOT_INLINE RowStats row_forward(const T* x, int64_t V, int64_t target, double inv_temperature) {
  const float scale = static_cast<float>(inv_temperature * kLog2e);
  float max = -kInf;
  double sum = 0, weighted = 0;
  float buffer[kBlock];
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const int64_t n = V - begin < kBlock ? V - begin : kBlock;
    const float* block = widen(x + begin, n, buffer);
    const float candidate = block_max(block, n);
    if (candidate > max) {
      if (sum > 0) {
        const double shift = (static_cast<double>(max) - candidate) * inv_temperature * kLog2e;
        const double factor = std::exp2(shift);
        weighted = factor > 0 ? (weighted + shift * sum) * factor : 0;
        sum *= factor;
      }
      max = candidate;
    }
    const float base = max == -kInf ? 0 : max;  // of only -inf so far, x - max would be NaN
    float block_sum = 0, block_weighted = 0;
#pragma omp simd reduction(+ : block_sum, block_weighted)
    for (int64_t j = 0; j < n; ++j) {
      const float d = (block[j] - base) * scale;
      const float e = exp2_nonpositive(d);
      block_sum += e;
      block_weighted += (d < kExp2Min ? 0.0f : d) * e;  // not -inf * 0
    }
    sum += block_sum;
    weighted += block_weighted;
  }
  const double log_sum = std::log(sum);
  const double target_logit = (static_cast<double>(load(x + target)) - max) * inv_temperature;
  return {static_cast<float>(target_logit - log_sum), static_cast<float>(log_sum - weighted / sum * kLn2),
          max * inv_temperature + log_sum};
}

// d loss / d x_j = (g_lp (1[j = t] - p_j) - g_H p_j (log p_j + H)) / temperature = p_j (a + b log2 p_j) + 1[j = t] g_lp
// / temperature
template <class T>
BICOT_INLINE void row_backward(const T* x, T* grad, int64_t V, int64_t target, double inv_temperature,
                               float grad_logprob, float grad_entropy, double lse, float entropy) {
  const float scale = static_cast<float>(inv_temperature * kLog2e);
  const double pivot = lse / inv_temperature;  // split in two floats, so that x_j - pivot keeps float32 precision
  const float pivot_high = static_cast<float>(pivot);
  const float pivot_low = static_cast<float>(pivot - pivot_high);
  const float a = static_cast<float>(-(grad_logprob + static_cast<double>(grad_entropy) * entropy) * inv_temperature);
  const float b = static_cast<float>(-grad_entropy * inv_temperature * kLn2);
  const auto softmax_term = [=](float v) __attribute__((always_inline)) {
    const float d = ((v - pivot_high) - pivot_low) * scale;
    return exp2_nonpositive(d) * (a + b * (d < kExp2Min ? kExp2Min : d));
  };
  const float at_target = softmax_term(load(x + target)) + static_cast<float>(grad_logprob * inv_temperature);
#pragma omp simd
  for (int64_t j = 0; j < V; ++j) store(grad + j, softmax_term(load(x + j)));
  store(grad + target, at_target);
}

static BICOT_CLONES RowStats forward_row(const float* x, int64_t V, int64_t target, double inv_temperature) {
  return row_forward(x, V, target, inv_temperature);
}
static BICOT_CLONES RowStats forward_row(const bfloat16* x, int64_t V, int64_t target, double inv_temperature) {
  return row_forward(x, V, target, inv_temperature);
}
static BICOT_CLONES void backward_row(const float* x, float* grad, int64_t V, int64_t target, double inv_temperature,
                                      float grad_logprob, float grad_entropy, double lse, float entropy) {
  row_backward(x, grad, V, target, inv_temperature, grad_logprob, grad_entropy, lse, entropy);
}
static BICOT_CLONES void backward_row(const bfloat16* x, bfloat16* grad, int64_t V, int64_t target,
                                      double inv_temperature, float grad_logprob, float grad_entropy, double lse,
                                      float entropy) {
  row_backward(x, grad, V, target, inv_temperature, grad_logprob, grad_entropy, lse, entropy);
}

}  // namespace bicot
