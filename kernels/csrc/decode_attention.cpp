// Attention of one query token per sequence over keys and values in a pool of slots: float32, bfloat16, or scaled
// float8_e4m3fn. The keys of a sequence are read once, in the order of their slots: tiles of keys, all heads of each.
#include <limits>
#include <vector>

#include "simd.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // wide vectors are passed to inlined functions only

namespace bicot {

struct float8 {  // float8_e4m3fn
  uint8_t bits;
};

namespace {

constexpr int64_t kTile = 64;       // keys at a time: their scores stay in L1, their prefetched values in L2
constexpr int64_t kAhead = 8;       // tokens from a key's prefetch to its use
constexpr int64_t kSerial = 32768;  // fewer numbers of the pool than this cost less than waking a second thread
constexpr double kLog2e = 1.4426950408889634;
constexpr float kInf = std::numeric_limits<float>::infinity();

// Sixteen numbers, which the compiler splits for narrower processors. Without these types it does not vectorise loads
// that widen, and the remainders of loops over E cost more than the loops.
constexpr int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

BICOT_INLINE Floats load_lanes(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

BICOT_INLINE Floats load_lanes(const bfloat16* p) {
  Halves bits;
  std::memcpy(&bits, p, sizeof bits);
  return (Floats)(__builtin_convertvector(bits, Words) << 16);
}

BICOT_INLINE Floats load_lanes(const float8* p) {
  Bytes bits;
  std::memcpy(&bits, p, sizeof bits);
  const Halves half = __builtin_convertvector(bits, Halves);  // through 16 bits: GCC does not vectorise 8 to 32
  const Words wide = __builtin_convertvector(half, Words), x = wide & 0x7fu;
  const Floats normal = (Floats)((x << 20) + (120u << 23));  // changes the exponent's bias from 7 to 127
  const Floats subnormal = normal + normal - 0x1p-6f;        // right for exponent 0; larger than `normal` for others
  const Words y = (Words)(normal < subnormal ? normal : subnormal);
  const Words nan = (Words)(x == 0x7fu) & 0x7fc00000u;
  return (Floats)(y | nan | (wide & 0x80u) << 24);
}

BICOT_INLINE void store_lanes(float* p, const Floats& x) { std::memcpy(p, &x, sizeof x); }

// n < kLanes numbers, then zeros.
template <class T>
BICOT_INLINE Floats load_some(const T* p, int64_t n) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load_lanes(lanes);
}

BICOT_INLINE float sum_lanes(const Floats& x) {
  typedef float Eight __attribute__((vector_size(32)));
  typedef float Four __attribute__((vector_size(16)));
  Eight a[2];
  std::memcpy(a, &x, sizeof a);
  a[0] += a[1];
  Four b[2];
  std::memcpy(b, &a[0], sizeof b);
  b[0] += b[1];
  return (b[0][0] + b[0][2]) + (b[0][1] + b[0][3]);
}

// The numbers of a token are few and far from those of the next, so the processor's own prefetching does not help.
template <class T>
BICOT_INLINE void prefetch(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + i, 0, 2);
}

// x is padded to a multiple of kLanes, y is not.
template <class T>
BICOT_INLINE float dot(const float* x, const T* y, int64_t E) {
  Floats sum = {};
  int64_t e = 0;
  for (; e + kLanes <= E; e += kLanes) sum += load_lanes(x + e) * load_lanes(y + e);
  if (e < E) sum += load_lanes(x + e) * load_some(y + e, E - e);
  return sum_lanes(sum);
}

// sum += Σ_i p_i·v_i for four values v.
template <class T>
BICOT_INLINE void add_four(float* sum, const float* p, const T* const* v, int64_t E) {
  int64_t e = 0;
  for (; e + kLanes <= E; e += kLanes)
    store_lanes(sum + e, load_lanes(sum + e) + (p[0] * load_lanes(v[0] + e) + p[1] * load_lanes(v[1] + e)) +
                             (p[2] * load_lanes(v[2] + e) + p[3] * load_lanes(v[3] + e)));
  if (e < E)
    store_lanes(sum + e, load_lanes(sum + e) + (p[0] * load_some(v[0] + e, E - e) + p[1] * load_some(v[1] + e, E - e)) +
                             (p[2] * load_some(v[2] + e, E - e) + p[3] * load_some(v[3] + e, E - e)));
}

// The segments of a sequence, and which of its Hkv key heads to compute: `heads`, from `first` on.
struct Sequence {
  int64_t prefix_start, prefix_length, start, length, Hkv, first, heads;
};

template <class T>
struct Pool {
  const T *keys, *values;
  const float *key_scales, *value_scales;  // or null
};

BICOT_INLINE int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Floats that `attend` needs for H query heads: queries, sums of values, scores, and two numbers of the softmax.
inline int64_t work_size(int64_t H, int64_t E) { return H * (2 * padded(E) + kTile + 2); }

// `scale` includes log2 e. Query head h belongs to key head h / G, counted from `sequence.first`.
template <class Q, class T>
BICOT_INLINE void attend(const Q* q, const Pool<T>& pool, const Sequence& sequence, int64_t G, int64_t E, float scale,
                         float* work, Q* out) {
  const int64_t H = sequence.heads * G, D = padded(E), total = sequence.prefix_length + sequence.length;
  float *query = work, *acc = query + H * D, *score = acc + H * D, *max = score + H * kTile, *sum = max + H;
  for (int64_t h = 0; h < H; ++h) {
    for (int64_t e = 0; e < D; ++e) query[h * D + e] = e < E ? load(q + h * E + e) * scale : 0.0f;
    for (int64_t e = 0; e < D; ++e) acc[h * D + e] = 0;
    max[h] = -kInf;
    sum[h] = 0;
  }
  for (int64_t begin = 0; begin < total; begin += kTile) {
    const int64_t n = total - begin < kTile ? total - begin : kTile;
    int64_t index[kTile];  // of the first head of each key; padding repeats the last key, with probability 0
    for (int64_t t = 0; t < padded(n); ++t) {
      const int64_t j = t < n ? begin + t : total - 1;
      const int64_t slot =
          j < sequence.prefix_length ? sequence.prefix_start + j : sequence.start + j - sequence.prefix_length;
      index[t] = slot * sequence.Hkv + sequence.first;
    }
    for (int64_t t = 0; t < n; ++t) {
      prefetch(pool.values + index[t] * E, sequence.heads * E);
      if (t + kAhead < n) prefetch(pool.keys + index[t + kAhead] * E, sequence.heads * E);
      for (int64_t h = 0, at = index[t]; h < H; ++at)
        for (const int64_t end = h + G; h < end; ++h) {
          const float s = dot(query + h * D, pool.keys + at * E, E);
          score[h * kTile + t] = pool.key_scales ? s * pool.key_scales[at] : s;
        }
    }
    for (int64_t h = 0; h < H; ++h) {
      float* s = score + h * kTile;
      for (int64_t t = n; t < padded(n); ++t) s[t] = -kInf;
      float top = max[h];
      for (int64_t b = 0; b < n; b += kLanes)
#pragma omp simd reduction(max : top)
        for (int64_t t = b; t < b + kLanes; ++t) top = s[t] > top ? s[t] : top;
      if (top > max[h]) {
        const float factor = exp2_nonpositive(max[h] - top);
        for (int64_t e = 0; e < D; ++e) acc[h * D + e] *= factor;
        sum[h] *= factor;
        max[h] = top;
      }
      float tile_sum = 0;
      for (int64_t b = 0; b < n; b += kLanes)
#pragma omp simd reduction(+ : tile_sum)
        for (int64_t t = b; t < b + kLanes; ++t) {
          s[t] = exp2_nonpositive(s[t] - top);
          tile_sum += s[t];
        }
      sum[h] += tile_sum;
    }
    for (int64_t t = 0; t < n; t += 4)
      for (int64_t h = 0, kv = 0; h < H; ++kv)
        for (const int64_t end = h + G; h < end; ++h) {
          const T* v[4];
          float p[4];
          for (int64_t i = 0; i < 4; ++i) {
            const int64_t at = index[t + i] + kv;
            v[i] = pool.values + at * E;
            p[i] = score[h * kTile + t + i] * (pool.value_scales ? pool.value_scales[at] : 1.0f);
          }
          add_four(acc + h * D, p, v, E);
        }
  }
  for (int64_t h = 0; h < H; ++h)
    for (int64_t e = 0; e < E; ++e) store(out + h * E + e, acc[h * D + e] / sum[h]);
}

#define BICOT_ATTEND(Q, T)                                                                                      \
  BICOT_CLONES void attend_one(const Q* q, const Pool<T>& pool, const Sequence& sequence, int64_t G, int64_t E, \
                               float scale, float* work, Q* out) {                                              \
    attend(q, pool, sequence, G, E, scale, work, out);                                                          \
  }

BICOT_ATTEND(float, float)
BICOT_ATTEND(float, float8)
BICOT_ATTEND(bfloat16, bfloat16)
BICOT_ATTEND(bfloat16, float8)

// The first sequence that has no key, or one outside the P slots; R if there is none.
inline int64_t first_outside(const int64_t* prefix_start, const int64_t* prefix_length, const int64_t* start,
                             const int64_t* length, int64_t R, int64_t P) {
  const auto inside = [P](int64_t from, int64_t n) { return n == 0 || (n > 0 && from >= 0 && from <= P - n); };
  for (int64_t r = 0; r < R; ++r)
    if (!inside(prefix_start[r], prefix_length[r]) || !inside(start[r], length[r]) || prefix_length[r] + length[r] == 0)
      return r;
  return R;
}

template <class Q, class T>
void attend_all(const Q* q, int64_t q_stride, const Pool<T>& pool, const int64_t* prefix_start,
                const int64_t* prefix_length, const int64_t* start, const int64_t* length, int64_t R, int64_t Hq,
                int64_t Hkv, int64_t E, int64_t P, double scale, int num_threads, Q* out, int64_t* outside) {
  *outside = first_outside(prefix_start, prefix_length, start, length, R, P);
  if (*outside < R) return;
  const int64_t G = Hq / Hkv;
  int64_t total = 0;
  for (int64_t r = 0; r < R; ++r) total += prefix_length[r] + length[r];
  int64_t blocks = 1;  // of heads of a sequence, if there are fewer sequences than threads
  while (R * blocks < num_threads && blocks < Hkv) ++blocks;
#pragma omp parallel num_threads(num_threads) if (total * Hkv * E > kSerial)
  {
    std::vector<float> work(work_size(Hq, E));
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < R * blocks; ++i) {
      const int64_t r = i / blocks, first = i % blocks * Hkv / blocks, end = (i % blocks + 1) * Hkv / blocks;
      const Sequence sequence = {prefix_start[r], prefix_length[r], start[r], length[r], Hkv, first, end - first};
      attend_one(q + r * q_stride + first * G * E, pool, sequence, G, E, static_cast<float>(scale * kLog2e),
                 work.data(), out + (r * Hq + first * G) * E);
    }
  }
}

}  // namespace
}  // namespace bicot

#define BICOT_DECODE_ATTENTION(suffix, Q, T)                                                                          \
  BICOT_EXPORT void bicot_decode_attention_##suffix(                                                                  \
      const Q* q, int64_t q_stride, const T* keys, const T* values, const float* key_scales,                          \
      const float* value_scales, const int64_t* prefix_start, const int64_t* prefix_length, const int64_t* start,     \
      const int64_t* length, int64_t R, int64_t Hq, int64_t Hkv, int64_t E, int64_t P, double scale, int num_threads, \
      Q* out, int64_t* outside) {                                                                                     \
    bicot::attend_all(q, q_stride, bicot::Pool<T>{keys, values, key_scales, value_scales}, prefix_start,              \
                      prefix_length, start, length, R, Hq, Hkv, E, P, scale, num_threads, out, outside);              \
  }

BICOT_DECODE_ATTENTION(float32, float, float)
BICOT_DECODE_ATTENTION(float32_float8, float, bicot::float8)
BICOT_DECODE_ATTENTION(bfloat16, bicot::bfloat16, bicot::bfloat16)
BICOT_DECODE_ATTENTION(bfloat16_float8, bicot::bfloat16, bicot::float8)
