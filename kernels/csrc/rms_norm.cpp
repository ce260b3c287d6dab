// LlamaRMSNorm of each row of x [N, D], with the residual add in front of it, and its gradients.
#include <cmath>

#include "simd.h"

namespace bicot {
namespace {

constexpr int64_t kSerial = 65536;  // fewer elements than this cost less than waking a second thread

// Each sweep after the first finds the row in L1.
template <class T>
BICOT_INLINE void norm_row(const T* x, const T* weight, T* residual, T* out, int64_t D, float eps) {
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

// target_clones does not apply to templates: one plain function for each dtype.
BICOT_CLONES void row(const float* x, const float* weight, float* residual, float* out, int64_t D, float eps) {
  norm_row(x, weight, residual, out, D, eps);
}
BICOT_CLONES void row(const bfloat16* x, const bfloat16* weight, bfloat16* residual, bfloat16* out, int64_t D,
                      float eps) {
  norm_row(x, weight, residual, out, D, eps);
}

template <class T>
void rows(const T* x, const T* weight, T* residual, T* out, int64_t N, int64_t D, double eps, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static) if (N * D > kSerial)
  for (int64_t i = 0; i < N; ++i)
    row(x + i * D, weight, residual ? residual + i * D : nullptr, out + i * D, D, static_cast<float>(eps));
}

// Some rows of d_x; `sums` [D], if there is one, receives their part of the weight's gradient.
template <class T>
BICOT_INLINE void backward_rows(const T* total, const T* weight, const T* d_out, const T* d_total, T* d_x, float* sums,
                                int64_t rows, int64_t D, float eps) {
  if (sums) std::memset(sums, 0, D * sizeof(float));
  for (int64_t i = 0; i < rows; ++i, total += D, d_out += D, d_x += D) {
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
                           float* d_x, float* sums, int64_t rows, int64_t D, float eps) {
  backward_rows(total, weight, d_out, d_total, d_x, sums, rows, D, eps);
}
BICOT_CLONES void backward(const bfloat16* total, const bfloat16* weight, const bfloat16* d_out,
                           const bfloat16* d_total, bfloat16* d_x, float* sums, int64_t rows, int64_t D, float eps) {
  backward_rows(total, weight, d_out, d_total, d_x, sums, rows, D, eps);
}

// `chunk` rows share one of the sums [⌈N/chunk⌉, D]: their order does not depend on the number of threads.
template <class T>
void all_backward(const T* total, const T* weight, const T* d_out, const T* d_total, T* d_x, float* sums, int64_t N,
                  int64_t D, int64_t chunk, double eps, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static) if (N * D > kSerial)
  for (int64_t begin = 0; begin < N; begin += chunk)
    backward(total + begin * D, weight, d_out + begin * D, d_total ? d_total + begin * D : nullptr, d_x + begin * D,
             sums ? sums + begin / chunk * D : nullptr, N - begin < chunk ? N - begin : chunk, D,
             static_cast<float>(eps));
}

}  // namespace
}  // namespace bicot

#define BICOT_RMS_NORM(suffix, T)                                                                                    \
  BICOT_EXPORT void bicot_rms_norm_##suffix(const T* x, const T* weight, T* residual, T* out, int64_t N, int64_t D,  \
                                            double eps, int num_threads) {                                           \
    bicot::rows(x, weight, residual, out, N, D, eps, num_threads);                                                   \
  }                                                                                                                  \
  BICOT_EXPORT void bicot_rms_norm_backward_##suffix(const T* total, const T* weight, const T* d_out,                \
                                                     const T* d_total, T* d_x, float* sums, int64_t N, int64_t D,    \
                                                     int64_t chunk, double eps, int num_threads) {                   \
    bicot::all_backward(total, weight, d_out, d_total, d_x, sums, N, D, chunk, eps, num_threads);                    \
  }

BICOT_RMS_NORM(float32, float)
BICOT_RMS_NORM(bfloat16, bicot::bfloat16)
