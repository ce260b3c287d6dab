// Rotary embedding of the queries and keys of each token, and the write of its keys and values to their slot.
#include "simd.h"

namespace bicot {
namespace {

constexpr int64_t kSerial = 65536;  // fewer elements than this cost less than waking a second thread

// `out` may be `x`: every pair is read before it is written.
template <class T>
BICOT_INLINE void rotate(const T* x, const T* cos, const T* sin, T* out, int64_t half) {
#pragma omp simd
  for (int64_t j = 0; j < half; ++j) {
    const float a = load(x + j), b = load(x + half + j), c = load(cos + j), s = load(sin + j);
    store(out + j, a * c - b * s);
    store(out + half + j, b * c + a * s);
  }
}

template <class T>
BICOT_INLINE void write_token(T* qkv, const T* cos, const T* sin, T* key, T* value, int64_t Hq, int64_t Hkv,
                              int64_t half) {
  const int64_t E = 2 * half;
  for (int64_t h = 0; h < Hq; ++h) rotate(qkv + h * E, cos, sin, qkv + h * E, half);
  for (int64_t h = 0; h < Hkv; ++h) rotate(qkv + (Hq + h) * E, cos, sin, key + h * E, half);
  std::memcpy(value, qkv + (Hq + Hkv) * E, Hkv * E * sizeof(T));
}

BICOT_CLONES void token(float* qkv, const float* cos, const float* sin, float* key, float* value, int64_t Hq,
                        int64_t Hkv, int64_t half) {
  write_token(qkv, cos, sin, key, value, Hq, Hkv, half);
}
BICOT_CLONES void token(bfloat16* qkv, const bfloat16* cos, const bfloat16* sin, bfloat16* key, bfloat16* value,
                        int64_t Hq, int64_t Hkv, int64_t half) {
  write_token(qkv, cos, sin, key, value, Hq, Hkv, half);
}

// The first token with a position or slot out of range, or N.
inline int64_t first_outside(const int64_t* positions, const int64_t* slots, int64_t N, int64_t L, int64_t P) {
  for (int64_t n = 0; n < N; ++n)
    if (positions[n] < 0 || positions[n] >= L || slots[n] < 0 || slots[n] >= P) return n;
  return N;
}

template <class T>
void tokens(T* qkv, const T* cos, const T* sin, const int64_t* positions, const int64_t* slots, T* keys, T* values,
            int64_t N, int64_t Hq, int64_t Hkv, int64_t half, int64_t L, int64_t P, int num_threads, int64_t* outside) {
  *outside = first_outside(positions, slots, N, L, P);
  if (*outside < N) return;  // before anything is written
  const int64_t E = 2 * half, width = (Hq + 2 * Hkv) * E;
#pragma omp parallel for num_threads(num_threads) schedule(static) if (N * width > kSerial)
  for (int64_t n = 0; n < N; ++n)
    token(qkv + n * width, cos + positions[n] * half, sin + positions[n] * half, keys + slots[n] * Hkv * E,
          values + slots[n] * Hkv * E, Hq, Hkv, half);
}

}  // namespace
}  // namespace bicot

#define BICOT_ROPE_KV_WRITE(suffix, T)                                                                             \
  BICOT_EXPORT void bicot_rope_kv_write_##suffix(                                                                  \
      T* qkv, const T* cos, const T* sin, const int64_t* positions, const int64_t* slots, T* keys, T* values,      \
      int64_t N, int64_t Hq, int64_t Hkv, int64_t half, int64_t L, int64_t P, int num_threads, int64_t* outside) { \
    bicot::tokens(qkv, cos, sin, positions, slots, keys, values, N, Hq, Hkv, half, L, P, num_threads, outside);    \
  }

BICOT_ROPE_KV_WRITE(float32, float)
BICOT_ROPE_KV_WRITE(bfloat16, bicot::bfloat16)
