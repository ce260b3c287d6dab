// The C++ kernel of `cfg_sample`: mix, truncate and race as cfg_sample.py explains them.
// Logits are read from memory once; what follows works on the guided logits of one row, which stay in L2. This file
// must be compiled with -ffp-contract=off (CMakeLists.txt): a fused multiply-add would round the race differently from
// the other implementations.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>

#include "simd.h"

namespace bicot {
namespace {

constexpr int64_t kBlock = 1024;  // 4 KiB of float32, an eighth of the smallest L1
constexpr int64_t kLanes = 64, kChunk = 4 * kLanes;  // Philox calls of a run, and the tokens that their words serve
constexpr int64_t kSerial = 32768;  // fewer logits than this cost less than waking a second thread
constexpr float kInf = std::numeric_limits<float>::infinity();

struct Options {  // in the order of `Options` in cfg_sample_triton.py
  float guidance;
  double inverse_temperature;
  float scale;
  bool greedy;
  int64_t top_k;
  double top_p;
};

struct Row {
  float* z;
  int64_t V;
  float scale, top;
};

// Write the conditional logits c, the guided ones z (which are c without `uncond`) and the largest of each. The largest
// of z is +inf if either row has a NaN or +inf.
template <class T>
BICOT_INLINE void mix_row(const T* cond, const T* uncond, float guidance, Row& row_c, Row& row) {
  float *c = row_c.z, *z = row.z, top_c = -kInf, top = -kInf;
  for (int64_t begin = 0; begin < row.V; begin += kBlock) {
    const int64_t end = std::min(row.V, begin + kBlock);
    for (int64_t j = begin; j < end; ++j) c[j] = load(cond + j);
#pragma omp simd reduction(max : top_c)
    for (int64_t j = begin; j < (uncond ? end : begin); ++j) {
      const float u = load(uncond + j), mixed = u + guidance * (c[j] - u);
      const float masked_or_mixed = (c[j] < u ? c[j] : u) == -kInf ? -kInf : mixed;
      z[j] = (c[j] < kInf) & (u < kInf) ? masked_or_mixed : kInf;  // false for NaN
      top_c = c[j] > top_c ? c[j] : top_c;
    }
#pragma omp simd reduction(max : top)
    for (int64_t j = begin; j < end; ++j) {
      const float bounded = z[j] < kInf ? z[j] : kInf;
      top = bounded > top ? bounded : top;
    }
  }
  row_c.top = top_c, row.top = top;
}

BICOT_CLONES void mix(const float* cond, const float* uncond, float guidance, Row& row_c, Row& row) {
  mix_row(cond, uncond, guidance, row_c, row);
}
BICOT_CLONES void mix(const bfloat16* cond, const bfloat16* uncond, float guidance, Row& row_c, Row& row) {
  mix_row(cond, uncond, guidance, row_c, row);
}

// 2^40 * 2^d, truncated, from the bits of 2^d, which is 0 or a normal float32 in [2^-126, 1]: AVX2 cannot convert
// floats to int64.
BICOT_INLINE int64_t weigh(float z, const Row& row) {
  const uint32_t bits = bits_from_float(exp2_nonpositive((z - row.top) * row.scale));
  const uint64_t mantissa = (bits & 0x7fffffu) | 0x800000u;
  const uint32_t shift = 127u - (bits >> 23);
  return static_cast<int64_t>((mantissa << 17) >> (shift < 63u ? shift : 63u));
}

struct Probe {
  int64_t amount;
  float next, previous;  // the smallest logit >= the pivot, the largest below it
};

// The number of the logits >= pivot or, if MASS, their weight.
template <bool MASS>
BICOT_INLINE Probe probe_row(const Row& row, float pivot) {
  std::conditional_t<MASS, int64_t, int32_t> amount = 0;
  float next = kInf, previous = -kInf;
#pragma omp simd reduction(+ : amount) reduction(min : next) reduction(max : previous)
  for (int64_t j = 0; j < row.V; ++j) {
    const float z = row.z[j], up = z >= pivot ? z : kInf, down = z >= pivot ? -kInf : z;
    amount += z >= pivot ? (MASS ? weigh(z, row) : 1) : 0;
    next = up < next ? up : next;
    previous = down > previous ? down : previous;
  }
  return {amount, next, previous};
}
BICOT_CLONES Probe probe(const Row row, float pivot, bool mass) {
  return mass ? probe_row<true>(row, pivot) : probe_row<false>(row, pivot);
}

// An integer that orders like x; 0 for both zeros.
int64_t key(float x) {
  const int64_t bits = static_cast<int32_t>(bits_from_float(x));
  return bits < 0 ? INT32_MIN - bits : bits;
}
float value(int64_t key) { return float_from_bits(static_cast<uint32_t>(key < 0 ? INT32_MIN - key : key)); }

// -> cut, not below `lowest`, and the number (or weight, if `mass`) of the logits above it.
std::pair<float, int64_t> select(const Row& row, float lowest, int64_t limit, bool mass) {
  int64_t lo = key(lowest), hi = key(row.top) + 1, above = 0;
  for (int step = 0; hi - lo > 1; ++step) {
    const int64_t middle = step < 16 ? key(0.5f * value(lo) + 0.5f * value(hi - 1)) : (lo + hi) >> 1;
    const Probe found = probe(row, value(std::min(std::max(middle, lo + 1), hi - 1)), mass);
    if (found.amount >= limit) {
      lo = key(found.next);
    } else {
      hi = key(found.previous) + 1;
      above = found.amount;
    }
  }
  return {value(lo), above};
}

// -> cut, last: every logit above `cut` stays, and of those equal to it the first, up to column `last`.
std::pair<float, int64_t> truncate(const Row& row, const Options& o) {
  float cut = o.greedy ? row.top : -kInf;
  int64_t above, ties = o.greedy, last = -1;
  if (o.top_k) {
    std::tie(cut, above) = select(row, cut, o.top_k, false);
    ties = o.top_k - above;
  }
  if (o.top_p < 1) {
    const int64_t mass = probe(row, value(key(cut) + 1), true).amount + ties * weigh(cut, row);
    // below the mass: top_p <= 1 - 2^-53 takes off at least what rounding the mass to a double may have added
    const int64_t limit = std::max(static_cast<int64_t>(static_cast<double>(mass) * o.top_p), int64_t{1});
    std::tie(cut, above) = select(row, cut, limit, true);
    const int64_t weight = std::max(weigh(cut, row), int64_t{1});
    ties = (limit - above + weight - 1) / weight;
  }
  for (; ties > 0; --ties) last = std::find(row.z + last + 1, row.z + row.V, cut) - row.z;
  return {cut, last};
}

// The four words of kLanes calls, word by word. A round at a time over all calls: the state stays in L1, and the
// compiler vectorises it.
BICOT_INLINE void philox(uint64_t seed, uint64_t counter, uint32_t call, uint32_t* words) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t *c0 = words, *c1 = c0 + kLanes, *c2 = c1 + kLanes, *c3 = c2 + kLanes;
  for (int64_t j = 0; j < kLanes; ++j) {
    c0[j] = static_cast<uint32_t>(counter);
    c1[j] = static_cast<uint32_t>(counter >> 32);
    c2[j] = call + static_cast<uint32_t>(j);
    c3[j] = 0;
  }
  for (int round = 0; round < 7; ++round) {
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) {
      const uint64_t p0 = uint64_t{0xD2511F53} * c0[j], p1 = uint64_t{0xCD9E8D57} * c2[j];
      c0[j] = static_cast<uint32_t>(p1 >> 32) ^ c1[j] ^ key0;
      c1[j] = static_cast<uint32_t>(p1);
      c2[j] = static_cast<uint32_t>(p0 >> 32) ^ c3[j] ^ key1;
      c3[j] = static_cast<uint32_t>(p0);
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

// -> the sum of 2^d over the whole row, and of the tokens kept the first to come in. Only a token that may beat the
// best so far needs its exact time E * 2^-d: u <= E tells from random bits and weight alone, so a row takes some tens.
BICOT_CLONES std::pair<double, int64_t> race(const Row row, float cut, int64_t last, uint64_t seed, uint64_t counter) {
  double total = 0;
  int64_t first = 0;
  float best = 17, weights[kChunk];  // the likeliest token comes in sooner whatever its noise
  uint32_t words[kChunk];
  for (int64_t begin = 0; begin < row.V; begin += kChunk) {
    const int64_t n = std::min(row.V - begin, kChunk);
    const float* z = row.z + begin;
    float sum = 0, high = -kInf;
#pragma omp simd reduction(+ : sum) reduction(max : high)
    for (int64_t j = 0; j < n; ++j) {
      weights[j] = exp2_nonpositive((z[j] - row.top) * row.scale);
      sum += weights[j];
      high = z[j] > high ? z[j] : high;
    }
    total += sum;
    constexpr float kWords = 0x1p32f * 1.00001f;  // more than all that is rounded here
    if (high < cut || exp2_nonpositive((high - row.top) * row.scale) * best * kWords < 0.5f) continue;
    philox(seed, counter, static_cast<uint32_t>(begin / 4), words);
    for (int64_t part = 0; part < n; part += kLanes) {
      const int64_t end = std::min(n, part + kLanes);
      int32_t any = 0;
#pragma omp simd reduction(| : any)
      for (int64_t j = part; j < end; ++j)
        any |= (z[j] >= cut) & (static_cast<float>(words[j]) <= weights[j] * (best * kWords));
      for (int64_t j = part; any && j < end; ++j) {
        if (static_cast<float>(words[j]) > weights[j] * (best * kWords)) continue;
        if (z[j] < cut || (z[j] == cut && begin + j > last)) continue;
        const float time = exponential(words[j]) * exp2_near_zero(std::min((row.top - z[j]) * row.scale, 64.0f));
        if (time < best) best = time, first = begin + j;
      }
    }
  }
  return {total, first};
}

float logp(const Row& row, int64_t token, double total, const Options& o) {
  return static_cast<float>((static_cast<double>(row.z[token]) - row.top) * o.inverse_temperature - std::log(total));
}

template <class T>
void sample(const T* cond, int64_t cond_stride, const T* uncond, int64_t uncond_stride, int64_t B, int64_t V,
            const Options& o, uint64_t seed, const int64_t* offset, int64_t* token, float* logp_cond,
            float* logp_guided, int num_threads) {
#pragma omp parallel num_threads(num_threads) if (B * V > kSerial)
  {
    const std::unique_ptr<float[]> c(new float[V]), guided(new float[uncond ? V : 0]);
    Row row_c = {c.get(), V, o.scale, 0}, row = {uncond ? guided.get() : c.get(), V, o.scale, 0};
#pragma omp for schedule(static)
    for (int64_t i = 0; i < B; ++i) {
      mix(cond + i * cond_stride, uncond ? uncond + i * uncond_stride : nullptr, o.guidance, row_c, row);
      token[i] = 0;
      logp_cond[i] = logp_guided[i] = std::numeric_limits<float>::quiet_NaN();
      if (!std::isfinite(row.top)) continue;
      const auto [cut, last] = truncate(row, o);
      const auto [total, first] = race(row, cut, last, seed, offset[i]);
      token[i] = first;
      logp_cond[i] = logp_guided[i] = logp(row, first, total, o);
      if (uncond) logp_cond[i] = logp(row_c, first, race(row_c, kInf, -1, seed, offset[i]).first, o);
    }
  }
}

}  // namespace
}  // namespace bicot

// `uncond` may be null; a row without an answer gets token 0 and NaN log-probs.
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
