// LlamaRMSNorm of each row of x [N, D], with the residual add in front of it.
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

}  // namespace
}  // namespace bicot

#define BICOT_RMS_NORM(suffix, T)                                                                                    \
  BICOT_EXPORT void bicot_rms_norm_##suffix(const T* x, const T* weight, T* residual, T* out, int64_t N, int64_t D,  \
                                            double eps, int num_threads) {                                           \
    bicot::rows(x, weight, residual, out, N, D, eps, num_threads);                                                   \
  }

BICOT_RMS_NORM(float32, float)
BICOT_RMS_NORM(bfloat16, bicot::bfloat16)
