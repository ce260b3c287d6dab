// Rotary embedding of packed tokens, copied to their places in the input of attention, and the adjoint.
#include <vector>

#include "simd.h"

namespace bicot {
namespace {

constexpr int64_t kSerial = 65536;  // fewer elements than this cost less than waking a second thread

template <class T>
BICOT_INLINE void spread_token(const T* qkv, const T* cos, const T* sin, T* q, T* k, T* v, int64_t Hq, int64_t Hkv,
                               int64_t half) {
  const int64_t E = 2 * half;
  for (int64_t h = 0; h < Hq + Hkv; ++h) {
    const T* x = qkv + h * E;
    T* out = h < Hq ? q + h * E : k + (h - Hq) * E;
#pragma omp simd
    for (int64_t j = 0; j < half; ++j) {
      const float a = load(x + j), b = load(x + half + j), c = load(cos + j), s = load(sin + j);
      store(out + j, a * c - b * s);
      store(out + half + j, b * c + a * s);
    }
  }
  std::memcpy(v, qkv + (Hq + Hkv) * E, Hkv * E * sizeof(T));
}

template <class T>
BICOT_INLINE void add_heads(const T* x, float* sums, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) sums[j] += load(x + j);
}

// `sums` holds (Hq + 2 Hkv) E numbers.
template <class T>
BICOT_INLINE void gather_token(const T* q, const T* k, const T* v, const T* cos, const T* sin, const int64_t* places,
                               int64_t count, T* qkv, float* sums, int64_t Hq, int64_t Hkv, int64_t half) {
  const int64_t E = 2 * half;
  std::memset(sums, 0, (Hq + 2 * Hkv) * E * sizeof(float));
  for (int64_t i = 0; i < count; ++i) {
    add_heads(q + places[i] * Hq * E, sums, Hq * E);
    add_heads(k + places[i] * Hkv * E, sums + Hq * E, Hkv * E);
    add_heads(v + places[i] * Hkv * E, sums + (Hq + Hkv) * E, Hkv * E);
  }
  for (int64_t h = 0; h < Hq + Hkv; ++h) {
    const float* x = sums + h * E;
#pragma omp simd
    for (int64_t j = 0; j < half; ++j) {
      const float c = load(cos + j), s = load(sin + j);
      store(qkv + h * E + j, x[j] * c + x[half + j] * s);
      store(qkv + h * E + half + j, x[half + j] * c - x[j] * s);
    }
  }
#pragma omp simd
  for (int64_t j = (Hq + Hkv) * E; j < (Hq + 2 * Hkv) * E; ++j) store(qkv + j, sums[j]);
}

BICOT_CLONES void spread(const float* qkv, const float* cos, const float* sin, float* q, float* k, float* v, int64_t Hq,
                         int64_t Hkv, int64_t half) {
  spread_token(qkv, cos, sin, q, k, v, Hq, Hkv, half);
}
BICOT_CLONES void spread(const bfloat16* qkv, const bfloat16* cos, const bfloat16* sin, bfloat16* q, bfloat16* k,
                         bfloat16* v, int64_t Hq, int64_t Hkv, int64_t half) {
  spread_token(qkv, cos, sin, q, k, v, Hq, Hkv, half);
}
BICOT_CLONES void gather(const float* q, const float* k, const float* v, const float* cos, const float* sin,
                         const int64_t* places, int64_t count, float* qkv, float* sums, int64_t Hq, int64_t Hkv,
                         int64_t half) {
  gather_token(q, k, v, cos, sin, places, count, qkv, sums, Hq, Hkv, half);
}
BICOT_CLONES void gather(const bfloat16* q, const bfloat16* k, const bfloat16* v, const bfloat16* cos,
                         const bfloat16* sin, const int64_t* places, int64_t count, bfloat16* qkv, float* sums,
                         int64_t Hq, int64_t Hkv, int64_t half) {
  gather_token(q, k, v, cos, sin, places, count, qkv, sums, Hq, Hkv, half);
}

template <class T>
void spread_all(const T* qkv, const T* cos, const T* sin, const int64_t* token_at, T* q, T* k, T* v, int64_t M,
                int64_t Hq, int64_t Hkv, int64_t half, int num_threads) {
  const int64_t E = 2 * half, width = (Hq + 2 * Hkv) * E;
#pragma omp parallel for num_threads(num_threads) schedule(static) if (M * width > kSerial)
  for (int64_t m = 0; m < M; ++m) {
    const int64_t n = token_at[m];
    spread(qkv + n * width, cos + n * half, sin + n * half, q + m * Hq * E, k + m * Hkv * E, v + m * Hkv * E, Hq, Hkv,
           half);
  }
}

template <class T>
void gather_all(const T* q, const T* k, const T* v, const T* cos, const T* sin, const int64_t* starts,
                const int64_t* places, T* qkv, int64_t N, int64_t Hq, int64_t Hkv, int64_t half, int num_threads) {
  const int64_t width = (Hq + 2 * Hkv) * 2 * half;
#pragma omp parallel num_threads(num_threads) if (N * width > kSerial)
  {
    std::vector<float> sums(width);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < N; ++n)
      gather(q, k, v, cos + n * half, sin + n * half, places + starts[n], starts[n + 1] - starts[n], qkv + n * width,
             sums.data(), Hq, Hkv, half);
  }
}

}  // namespace
}  // namespace bicot

#define BICOT_PACKED_ROPE(suffix, T)                                                                               \
  BICOT_EXPORT void bicot_rope_spread_##suffix(const T* qkv, const T* cos, const T* sin, const int64_t* token_at,  \
                                               T* q, T* k, T* v, int64_t M, int64_t Hq, int64_t Hkv, int64_t half, \
                                               int num_threads) {                                                  \
    bicot::spread_all(qkv, cos, sin, token_at, q, k, v, M, Hq, Hkv, half, num_threads);                            \
  }                                                                                                                \
  BICOT_EXPORT void bicot_rope_gather_##suffix(const T* q, const T* k, const T* v, const T* cos, const T* sin,     \
                                               const int64_t* starts, const int64_t* places, T* qkv, int64_t N,    \
                                               int64_t Hq, int64_t Hkv, int64_t half, int num_threads) {           \
    bicot::gather_all(q, k, v, cos, sin, starts, places, qkv, N, Hq, Hkv, half, num_threads);                      \
  }

BICOT_PACKED_ROPE(float32, float)
BICOT_PACKED_ROPE(bfloat16, bicot::bfloat16)
