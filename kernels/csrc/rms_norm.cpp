// LlamaRMSNorm of N tokens x [N, D], after the residual add, and its gradients.
#include <cmath>

#include "simd.h"

namespace bicot {
namespace {

constexpr int64_t kSerial = 65536;  // fewer elements than this cost less than waking a second thread

template <class T>
BICOT_INLINE void norm_token(const T* x, const T* weight, T* residual, T* out, int64_t D, float eps) {
  if (residual) {
#pragma omp simd
    for (int64_t j = 0; j < D; ++j) store(residual + j, load(residual + j) + load(x + j));
    x = residual;
  }
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t j = 0; j < D; ++j) squares += load(x + j) * load(x + j);
  const float scale = 1.0f / std::sqrt(squares / D + eps);
#pragma omp simd
  for (int64_t j = 0; j < D; ++j) store(out + j, rounded(x, load(x + j) * scale) * load(weight + j));
}

BICOT_CLONES void forward(const float* x, const float* weight, float* residual, float* out, int64_t D, float eps) {
  norm_token(x, weight, residual, out, D, eps);
}
BICOT_CLONES void forward(const bfloat16* x, const bfloat16* weight, bfloat16* residual, bfloat16* out, int64_t D,
                          float eps) {
  norm_token(x, weight, residual, out, D, eps);
}

template <class T>
void forward_all(const T* x, const T* weight, T* residual, T* out, int64_t N, int64_t D, double eps, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static) if (N * D > kSerial)
  for (int64_t i = 0; i < N; ++i)
    forward(x + i * D, weight, residual ? residual + i * D : nullptr, out + i * D, D, static_cast<float>(eps));
}

// d_x of `tokens` tokens. `sums` [D], or null, receives the sum of their gradients of the weight.
template <class T>
BICOT_INLINE void backward_tokens(const T* total, const T* weight, const T* d_out, const T* d_total, T* d_x,
                                  float* sums, int64_t tokens, int64_t D, float eps) {
  if (sums) std::memset(sums, 0, D * sizeof(float));
  for (int64_t i = 0; i < tokens; ++i, total += D, d_out += D, d_x += D) {
    float squares = 0, along = 0;  // along: Σ g · total
#pragma omp simd reduction(+ : squares, along)
    for (int64_t j = 0; j < D; ++j) {
      const float x = load(total + j);
      squares += x * x;
      along += rounded(total, load(weight + j) * load(d_out + j)) * x;
    }
    const float r = 1.0f / std::sqrt(squares / D + eps), mean = along * r / D;
    if (sums)
#pragma omp simd
      for (int64_t j = 0; j < D; ++j) sums[j] += load(d_out + j) * rounded(total, load(total + j) * r);
#pragma omp simd
    for (int64_t j = 0; j < D; ++j) {
      const float g = rounded(total, load(weight + j) * load(d_out + j));
      store(d_x + j, r * (g - load(total + j) * r * mean) + (d_total ? load(d_total + j) : 0.0f));
    }
    if (d_total) d_total += D;
  }
}

BICOT_CLONES void backward(const float* total, const float* weight, const float* d_out, const float* d_total,
                           float* d_x, float* sums, int64_t tokens, int64_t D, float eps) {
  backward_tokens(total, weight, d_out, d_total, d_x, sums, tokens, D, eps);
}
BICOT_CLONES void backward(const bfloat16* total, const bfloat16* weight, const bfloat16* d_out,
                           const bfloat16* d_total, bfloat16* d_x, float* sums, int64_t tokens, int64_t D, float eps) {
  backward_tokens(total, weight, d_out, d_total, d_x, sums, tokens, D, eps);
}

// Each of the sums [⌈N/tokens_per_sum⌉, D] adds consecutive tokens, so it does not depend on the number of threads.
template <class T>
void backward_all(const T* total, const T* weight, const T* d_out, const T* d_total, T* d_x, float* sums, int64_t N,
                  int64_t D, int64_t tokens_per_sum, double eps, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static) if (N * D > kSerial)
  for (int64_t begin = 0; begin < N; begin += tokens_per_sum)
    backward(total + begin * D, weight, d_out + begin * D, d_total ? d_total + begin * D : nullptr, d_x + begin * D,
             sums ? sums + begin / tokens_per_sum * D : nullptr,
             N - begin < tokens_per_sum ? N - begin : tokens_per_sum, D, static_cast<float>(eps));
}

}  // namespace
}  // namespace bicot

#define BICOT_RMS_NORM(suffix, T)                                                                                   \
  BICOT_EXPORT void bicot_rms_norm_##suffix(const T* x, const T* weight, T* residual, T* out, int64_t N, int64_t D, \
                                            double eps, int num_threads) {                                          \
    bicot::forward_all(x, weight, residual, out, N, D, eps, num_threads);                                           \
  }                                                                                                                 \
  BICOT_EXPORT void bicot_rms_norm_backward_##suffix(const T* total, const T* weight, const T* d_out,               \
                                                     const T* d_total, T* d_x, float* sums, int64_t N, int64_t D,   \
                                                     int64_t tokens_per_sum, double eps, int num_threads) {         \
    bicot::backward_all(total, weight, d_out, d_total, d_x, sums, N, D, tokens_per_sum, eps, num_threads);          \
  }

BICOT_RMS_NORM(float32, float)
BICOT_RMS_NORM(bfloat16, bicot::bfloat16)
