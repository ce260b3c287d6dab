// silu(gate) * up of N tokens gate_up [N, 2 I] = [gate, up], and its gradient.
#include "simd.h"

namespace bicot {
namespace {

constexpr int64_t kSerial = 32768;  // fewer elements than this cost less than waking a second thread

template <class T>
BICOT_INLINE void forward_token(const T* gate, const T* up, T* out, int64_t I) {
#pragma omp simd
  for (int64_t j = 0; j < I; ++j) {
    const float g = load(gate + j);
    const float e = exp2_nonpositive((g < 0 ? g : -g) * 1.44269504f);  // e^-|g|: never overflows
    store(out + j, rounded(gate, (g < 0 ? g * e : g) / (1.0f + e)) * load(up + j));
  }
}

BICOT_CLONES void forward(const float* gate, const float* up, float* out, int64_t I) {
  forward_token(gate, up, out, I);
}
BICOT_CLONES void forward(const bfloat16* gate, const bfloat16* up, bfloat16* out, int64_t I) {
  forward_token(gate, up, out, I);
}

template <class T>
BICOT_INLINE void backward_token(const T* gate, const T* up, const T* d_out, T* d_gate, T* d_up, int64_t I) {
#pragma omp simd
  for (int64_t j = 0; j < I; ++j) {
    const float g = load(gate + j), d = load(d_out + j);
    const float e = exp2_nonpositive((g < 0 ? g : -g) * 1.44269504f);
    const float s = (g < 0 ? e : 1.0f) / (1.0f + e);
    store(d_gate + j, d * load(up + j) * (s + g * s * (1.0f - s)));
    store(d_up + j, d * rounded(gate, g * s));
  }
}

BICOT_CLONES void backward(const float* gate, const float* up, const float* d_out, float* d_gate, float* d_up,
                           int64_t I) {
  backward_token(gate, up, d_out, d_gate, d_up, I);
}
BICOT_CLONES void backward(const bfloat16* gate, const bfloat16* up, const bfloat16* d_out, bfloat16* d_gate,
                           bfloat16* d_up, int64_t I) {
  backward_token(gate, up, d_out, d_gate, d_up, I);
}

template <class T>
void backward_all(const T* gate_up, const T* d_out, T* d_gate_up, int64_t N, int64_t I, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static) if (N * I > kSerial)
  for (int64_t i = 0; i < N; ++i) {
    const T* gate = gate_up + i * 2 * I;
    T* d_gate = d_gate_up + i * 2 * I;
    backward(gate, gate + I, d_out + i * I, d_gate, d_gate + I, I);
  }
}

template <class T>
void forward_all(const T* gate_up, T* out, int64_t N, int64_t I, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static) if (N * I > kSerial)
  for (int64_t i = 0; i < N; ++i) forward(gate_up + i * 2 * I, gate_up + i * 2 * I + I, out + i * I, I);
}

}  // namespace
}  // namespace bicot

#define BICOT_SILU_MUL(suffix, T)                                                                               \
  BICOT_EXPORT void bicot_silu_mul_##suffix(const T* gate_up, T* out, int64_t N, int64_t I, int num_threads) {  \
    bicot::forward_all(gate_up, out, N, I, num_threads);                                                        \
  }                                                                                                             \
  BICOT_EXPORT void bicot_silu_mul_backward_##suffix(const T* gate_up, const T* d_out, T* d_gate_up, int64_t N, \
                                                     int64_t I, int num_threads) {                              \
    bicot::backward_all(gate_up, d_out, d_gate_up, N, I, num_threads);                                          \
  }

BICOT_SILU_MUL(float32, float)
BICOT_SILU_MUL(bfloat16, bicot::bfloat16)
