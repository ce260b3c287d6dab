// The C++ kernel of `cfg_sample`, which is explained in cfg_sample.py.
// Logits are read from memory once; what follows works on the guided logits of one row, which stay in L2. This file must
// be compiled with -ffp-contract=off (CMakeLists.txt): a fused multiply-add would round the race differently from the
// other implementations.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "simd.h"

namespace bicot {
namespace {

constexpr int64_t kBlock = 1024;  // 4 KiB of float32, an eighth of the smallest L1; also bounds float32 summation error
constexpr int64_t kLanes = 64, kChunk = 4 * kLanes;  // tokens that one word, or all four, of a run of Philox calls serve
constexpr int64_t kSerial = 32768;  // fewer logits than this cost less than waking a second thread
constexpr float kInf = std::numeric_limits<float>::infinity();

// 2^40 * 2^d, truncated. 2^d is 0 or a normal float32 in [2^-126, 1], so its bits hold the mantissa and the shift.
BICOT_INLINE int64_t weigh(float z, float top, float scale) {
  const uint32_t bits = bits_from_float(exp2_nonpositive((z - top) * scale));
  const uint64_t mantissa = (bits & 0x7fffffu) | 0x800000u;
  const uint32_t shift = 127u - (bits >> 23);
  return static_cast<int64_t>((mantissa << 17) >> (shift < 63u ? shift : 63u));
}

struct Mix {
  float top, top_c;
  bool good;
};

// The guided logits z of a row and, where there is guidance, the conditional ones c as floats.
template <class T>
BICOT_INLINE Mix mix_row(const T* cond, const T* uncond, int64_t V, float guidance, float* c, float* z) {
  float top = -kInf, top_c = -kInf;
  int32_t bad = 0;
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const int64_t end = std::min(V, begin + kBlock);
    for (int64_t j = begin; !uncond && j < end; ++j) z[j] = load(cond + j);
#pragma omp simd reduction(max : top_c) reduction(| : bad)
    for (int64_t j = begin; j < (uncond ? end : begin); ++j) {
      const float z_c = load(cond + j), z_u = load(uncond + j), mixed = z_u + guidance * (z_c - z_u);
      c[j] = z_c;
      z[j] = (z_c < z_u ? z_c : z_u) == -kInf ? -kInf : mixed;
      bad |= !(z_c < kInf) | !(z_u < kInf);  // true for NaN
      top_c = z_c > top_c ? z_c : top_c;
    }
#pragma omp simd reduction(max : top) reduction(| : bad)
    for (int64_t j = begin; j < end; ++j) {
      bad |= !(z[j] < kInf);
      top = z[j] > top ? z[j] : top;
    }
  }
  return {top, top_c, !bad && top > -kInf};
}

// target_clones does not apply to templates: one plain function for each dtype.
BICOT_CLONES Mix mix(const float* cond, const float* uncond, int64_t V, float guidance, float* c, float* z) {
  return mix_row(cond, uncond, V, guidance, c, z);
}
BICOT_CLONES Mix mix(const bfloat16* cond, const bfloat16* uncond, int64_t V, float guidance, float* c, float* z) {
  return mix_row(cond, uncond, V, guidance, c, z);
}

struct Key {
  uint64_t seed, counter;
};

// The four words of kLanes calls, word by word. A round at a time over all calls: the state stays in L1, and the
// compiler vectorises it.
BICOT_INLINE void philox(Key key, uint32_t call, uint32_t* words) {
  uint32_t key0 = static_cast<uint32_t>(key.seed), key1 = static_cast<uint32_t>(key.seed >> 32);
  uint32_t *c0 = words, *c1 = c0 + kLanes, *c2 = c1 + kLanes, *c3 = c2 + kLanes;
  for (int64_t j = 0; j < kLanes; ++j) {
    c0[j] = static_cast<uint32_t>(key.counter);
    c1[j] = static_cast<uint32_t>(key.counter >> 32);
    c2[j] = call + static_cast<uint32_t>(j);
    c3[j] = 0;
  }
  for (int round = 0; round < 7; ++round) {
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) {
      const uint32_t a = c0[j], b = c2[j];
      c0[j] = static_cast<uint32_t>((uint64_t{0xCD9E8D57} * b) >> 32) ^ c1[j] ^ key0;
      c1[j] = 0xCD9E8D57u * b;
      c2[j] = static_cast<uint32_t>((uint64_t{0xD2511F53} * a) >> 32) ^ c3[j] ^ key1;
      c3[j] = 0xD2511F53u * a;
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// -ln(1 - u), by the operations of `exponential` in cfg_sample.py.
float exponential(uint32_t word) {
  const float u = std::min((static_cast<float>(word) + 0.5f) * 0x1p-32f, 1 - 0x1p-24f), rest = 1 - u;
  int exponent;
  const float m = std::frexp(rest, &exponent);
  const float q = rest >= 0.5f ? u : 1 - m;
  float p = q * 1.16061389f - 1.03616726f;
  for (const float c : {0.75161618f, 0.0508236513f, 0.269662917f, 0.33212924f, 0.500024617f, 1.0f}) p = p * q + c;
  return q * p - static_cast<float>(std::min(exponent, 0)) * 0.693147182f;
}

struct Race {
  double sum;  // of 2^((z - top) * scale)
  int64_t first;
};

// The softmax sum of a row and, if it `draws`, the token that comes in first. Only a token that may beat the best so far
// needs its exact time E * 2^-d: u <= E tells from random bits and weight alone, so that a row takes some tens of them.
BICOT_CLONES Race race(const float* z, int64_t V, float top, float scale, bool draws, Key key) {
  Race row = {0, 0};
  float best = 17, weights[kChunk];  // the likeliest token comes in sooner whatever its noise
  uint32_t words[kChunk];
  for (int64_t begin = 0; begin < V; begin += kChunk) {
    const int64_t n = std::min(V - begin, kChunk);
    float sum = 0, most = 0;
#pragma omp simd reduction(+ : sum) reduction(max : most)
    for (int64_t j = 0; j < n; ++j) {
      const float w = exp2_nonpositive((z[begin + j] - top) * scale);
      weights[j] = w;
      sum += w;
      most = w > most ? w : most;
    }
    row.sum += sum;
    constexpr float kWords = 0x1p32f * 1.00001f;  // more than all that is rounded here
    if (!draws || most * best * kWords < 0.5f) continue;
    philox(key, static_cast<uint32_t>(begin / 4), words);
    for (int64_t part = 0; part < n; part += kLanes) {
      const int64_t end = std::min(n, part + kLanes);
      int32_t any = 0;
#pragma omp simd reduction(| : any)
      for (int64_t j = part; j < end; ++j) any |= static_cast<float>(words[j]) <= weights[j] * (best * kWords);
      for (int64_t j = part; any && j < end; ++j) {
        if (static_cast<float>(words[j]) > weights[j] * (best * kWords)) continue;
        const float time = exponential(words[j]) * exp2_near_zero(std::min((top - z[begin + j]) * scale, 64.0f));
        if (time < best) best = time, row.first = begin + j;
      }
    }
  }
  return row;
}

struct Probe {
  int64_t measure;
  float next, previous;  // the smallest logit >= the pivot, the largest below it
};

// The number of the logits >= pivot, or their weight.
template <class Measure>
BICOT_INLINE Probe probe(const float* z, int64_t V, float pivot, Measure measure) {
  decltype(measure(0.0f)) sum = 0;
  float next = kInf, previous = -kInf;
#pragma omp simd reduction(+ : sum) reduction(min : next) reduction(max : previous)
  for (int64_t j = 0; j < V; ++j) {
    const float up = z[j] >= pivot ? z[j] : kInf, down = z[j] >= pivot ? -kInf : z[j];
    sum += z[j] >= pivot ? measure(z[j]) : 0;
    next = up < next ? up : next;
    previous = down > previous ? down : previous;
  }
  return {sum, next, previous};
}
BICOT_CLONES Probe count_above(const float* z, int64_t V, float pivot) {
  return probe(z, V, pivot, [](float) __attribute__((always_inline)) { return int32_t{1}; });
}
BICOT_CLONES Probe weigh_above(const float* z, int64_t V, float pivot, float top, float scale) {
  return probe(z, V, pivot, [=](float x) __attribute__((always_inline)) { return weigh(x, top, scale); });
}

// Mask every logit below `cut`, and of those equal to it all but the first `ties`.
BICOT_CLONES void keep(float* z, int64_t V, float cut, int64_t ties) {
  int64_t begin = 0;
  for (; ties > 0 && begin < V; begin += kBlock) {
    float* block = z + begin;
    const int64_t n = V - begin < kBlock ? V - begin : kBlock;
    int32_t equal = 0;
#pragma omp simd reduction(+ : equal)
    for (int64_t j = 0; j < n; ++j) {
      equal += block[j] == cut;
      block[j] = block[j] < cut ? -kInf : block[j];
    }
    ties -= equal;
    for (int64_t j = n; ties < 0;)  // the last of them go again
      if (block[--j] == cut) block[j] = -kInf, ++ties;
  }
#pragma omp simd
  for (int64_t j = begin; j < V; ++j) z[j] = z[j] <= cut ? -kInf : z[j];
}

// An integer that orders like x; 0 for both zeros.
int64_t key(float x) {
  const int64_t bits = static_cast<int32_t>(bits_from_float(x));
  return bits < 0 ? INT32_MIN - bits : bits;
}
float value(int64_t key) { return float_from_bits(static_cast<uint32_t>(key < 0 ? INT32_MIN - key : key)); }

struct Selected {
  float cut;
  int64_t above;
};

// The cut, and the number (or weight) of the logits above it.
template <class Measure>
Selected select(float top, int64_t limit, Measure measure) {
  int64_t lo = key(-kInf), hi = key(top) + 1, above = 0;
  for (int step = 0; hi - lo > 1; ++step) {
    const int64_t middle = step < 16 ? key(0.5f * value(lo) + 0.5f * value(hi - 1)) : (lo + hi) >> 1;
    const Probe probe = measure(value(std::min(std::max(middle, lo + 1), hi - 1)));
    if (probe.measure >= limit) {
      lo = key(probe.next);
    } else {
      hi = key(probe.previous) + 1;
      above = probe.measure;
    }
  }
  return {value(lo), above};
}

struct Options {  // in the order of `Options` in cfg_sample_triton.py
  float guidance;
  double inverse_temperature;
  float scale;
  bool greedy;
  int64_t top_k;
  double top_p;
};

// Mask what truncation drops.
void truncate(float* z, int64_t V, float top, const Options& o) {
  if (o.top_k) {
    const Selected s = select(top, o.top_k, [=](float pivot) { return count_above(z, V, pivot); });
    keep(z, V, s.cut, o.top_k - s.above);
  }
  if (o.top_p < 1) {
    const auto measure = [=](float pivot) { return weigh_above(z, V, pivot, top, o.scale); };
    const int64_t mass = measure(-kInf).measure;
    // below the mass: top_p <= 1 - 2^-53 takes off at least what rounding the mass to a double may have added
    const int64_t limit = std::max(static_cast<int64_t>(static_cast<double>(mass) * o.top_p), int64_t{1});
    const Selected s = select(top, limit, measure);
    const int64_t weight = weigh(s.cut, top, o.scale);
    keep(z, V, s.cut, (limit - s.above + weight - 1) / weight);
  }
}

template <class T>
void sample(const T* cond, int64_t cond_stride, const T* uncond, int64_t uncond_stride, int64_t B, int64_t V,
            const Options& o, int64_t seed, const int64_t* offset, int64_t* token, float* logp_cond, float* logp_guided,
            int num_threads) {
#pragma omp parallel num_threads(num_threads) if (B * V > kSerial)
  {
    const std::unique_ptr<float[]> z(new float[V]), c(new float[uncond ? V : 0]);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < B; ++i) {
      const T* u = uncond ? uncond + i * uncond_stride : nullptr;
      const Mix row = mix(cond + i * cond_stride, u, V, o.guidance, c.get(), z.get());
      token[i] = 0;
      logp_cond[i] = logp_guided[i] = std::numeric_limits<float>::quiet_NaN();
      if (!row.good) continue;
      const auto logp = [&](float logit, float top, double sum) {
        return static_cast<float>((static_cast<double>(logit) - top) * o.inverse_temperature - std::log(sum));
      };
      const Key key = {static_cast<uint64_t>(seed), static_cast<uint64_t>(offset[i])};
      const bool truncated = !o.greedy && (o.top_k || o.top_p < 1);
      Race drawn = race(z.get(), V, row.top, o.scale, !o.greedy && !truncated, key);
      const double sum = drawn.sum;  // of the whole distribution
      if (truncated) {
        truncate(z.get(), V, row.top, o);
        drawn = race(z.get(), V, row.top, o.scale, true, key);
      }
      const int64_t v = o.greedy ? std::find(z.get(), z.get() + V, row.top) - z.get() : drawn.first;
      token[i] = v;
      logp_guided[i] = logp(z[v], row.top, sum);
      logp_cond[i] = uncond ? logp(c[v], row.top_c, race(c.get(), V, row.top_c, o.scale, false, key).sum) : logp_guided[i];
    }
  }
}

}  // namespace
}  // namespace bicot

// `uncond` may be null, top_k is below V and 0 for none; a row without an answer gets token 0 and NaN log-probs.
#define BICOT_CFG_SAMPLE(suffix, T)                                                                                    \
  BICOT_EXPORT void bicot_cfg_sample_##suffix(                                                                         \
      const T* cond, int64_t cond_stride, const T* uncond, int64_t uncond_stride, int64_t B, int64_t V,                \
      float guidance, double inverse_temperature, float scale, int greedy, int64_t top_k, double top_p,                \
      const int64_t* seed, const int64_t* offset, int64_t* token, float* logp_cond, float* logp_guided,                \
      int num_threads) {                                                                                               \
    bicot::sample(cond, cond_stride, uncond, uncond_stride, B, V,                                                      \
                  {guidance, inverse_temperature, scale, greedy != 0, top_k, top_p}, *seed, offset, token, logp_cond,  \
                  logp_guided, num_threads);                                                                           \
  }

BICOT_CFG_SAMPLE(float32, float)
BICOT_CFG_SAMPLE(bfloat16, bicot::bfloat16)
