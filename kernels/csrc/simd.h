// Shared by all CPU kernels: run-time ISA dispatch, loads and stores of the two dtypes, and a vectorisable 2^x.
#pragma once

#include <cstdint>
#include <cstring>

// Compiles a function three times; the loader picks the widest version for the processor (ifunc: x86 with glibc only).
// It does not apply to templates, so kernels have a plain function for each dtype.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones) && __GNUC__ >= 12
// AVX-512 with its 16-bit instructions: without them bfloat16 runs at half the speed.
#define BICOT_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#elif __has_attribute(target_clones)
#define BICOT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#endif
#ifndef BICOT_CLONES
#define BICOT_CLONES
#endif

// A helper that is not inlined into each clone would be compiled once, for the baseline processor.
#define BICOT_INLINE static inline __attribute__((always_inline))
#define BICOT_EXPORT extern "C" __attribute__((visibility("default")))

namespace bicot {

struct bfloat16 {
  uint16_t bits;
};

BICOT_INLINE float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

BICOT_INLINE uint32_t bits_from_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

BICOT_INLINE float load(const float* p) { return *p; }
BICOT_INLINE float load(const bfloat16* p) { return float_from_bits(static_cast<uint32_t>(p->bits) << 16); }

// x as the type pointed to would hold it: rounded to nearest even; a NaN stays a NaN.
BICOT_INLINE float rounded(const float*, float x) { return x; }
BICOT_INLINE float rounded(const bfloat16*, float x) {
  const uint32_t bits = bits_from_float(x);
  return float_from_bits(x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u : 0x7fc00000u);
}

BICOT_INLINE void store(float* p, float x) { *p = x; }
BICOT_INLINE void store(bfloat16* p, float x) { p->bits = static_cast<uint16_t>(bits_from_float(rounded(p, x)) >> 16); }

constexpr float kExp2Min = -126.0f;  // below it 2^x is not a normal float32: exp2_nonpositive returns 0

// 2^x for |x| <= 126, NaN for NaN. Maximum relative error over [-126, 0], measured against float64: 7.3e-8 (0.86 ulp)
// with fused multiply-add (AVX-512), 9.6e-8 (1.2 ulp) without.
// Adding 1.5 * 2^23 rounds x to the nearest integer n and leaves n in the low mantissa bits; the minimax polynomial
// covers 2^(x - n) on [-1/2, 1/2], and n is added to its exponent.
BICOT_INLINE float exp2_near_zero(float x) {
  const float shifted = x + 12582912.0f;
  const float r = x - (shifted - 12582912.0f);
  float p = 0.000154531634f;
  p = p * r + 0.00133908633f;
  p = p * r + 0.00961808302f;
  p = p * r + 0.0555035695f;
  p = p * r + 0.240226507f;
  p = p * r + 0.693147182f;
  p = p * r + 1.0f;
  return float_from_bits(bits_from_float(p) + (bits_from_float(shifted) << 23));
}

// The same for any x <= 0.
BICOT_INLINE float exp2_nonpositive(float x) {
  const float y = exp2_near_zero(x < kExp2Min ? kExp2Min : x);
  return x < kExp2Min ? 0.0f : y;
}

}  // namespace bicot
