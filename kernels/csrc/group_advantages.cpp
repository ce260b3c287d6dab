// Group-relative advantages of rewards [P·G, R], in float64; the formulas are those of group_advantages.py. P·G·R is a
// few thousand, so nothing here is worth a vector instruction or a second thread.
#include <cmath>
#include <limits>
#include <vector>

#include "simd.h"

namespace bicot {
namespace {

enum Scale { kGroup, kBatch, kNone };

// Mean of value(begin), ..., value(end - 1), NaN left out; NaN of nothing. In float64 the sum of equal float32 values
// is exact, so they are exactly their own mean.
template <class F>
double mean(int64_t begin, int64_t end, F value) {
  double sum = 0;
  int64_t count = 0;
  for (int64_t s = begin; s < end; ++s) {
    const double v = value(s);
    sum += v == v ? v : 0.0;
    count += v == v;
  }
  return sum / count;
}

// Their unbiased standard deviation; 0 of fewer than two.
template <class F>
double deviation(int64_t begin, int64_t end, F value) {
  const double center = mean(begin, end, value);
  double squares = 0;
  int64_t count = 0;
  for (int64_t s = begin; s < end; ++s) {
    const double d = value(s) - center;
    squares += d == d ? d * d : 0.0;
    count += d == d;
  }
  return count > 1 ? std::sqrt(squares / (count - 1)) : 0.0;
}

double divide(double x, double divisor) { return divisor > 0 ? x / divisor : 0.0; }  // eps = 0 and no spread: 0

}  // namespace
}  // namespace bicot

// scale: 0 group, 1 batch, 2 none. An infinite reward sets `finite` to 0 and makes the advantages meaningless.
BICOT_EXPORT void bicot_group_advantages(const float* rewards, const float* weights, float* advantages, uint8_t* finite,
                                         int64_t P, int64_t G, int64_t R, int scale, int normalize, double eps) {
  using namespace bicot;
  const int64_t S = P * G;
  *finite = 1;
  for (int64_t i = 0; i < S * R; ++i)
    if (std::isinf(rewards[i])) *finite = 0;

  const bool of_batch = normalize || scale == kBatch;
  std::vector<double> x(S, std::numeric_limits<double>::quiet_NaN());  // NaN: no weighted reward
  std::vector<double> level(P, 0.0);  // what a group's weighted rewards are above the batch's
  for (int64_t r = 0; r < R; ++r) {
    const double weight = weights[r];
    if (weight == 0) continue;
    const auto reward = [=](int64_t s) { return static_cast<double>(rewards[s * R + r]); };
    const double batch_mean = of_batch ? mean(0, S, reward) : 0.0;
    for (int64_t p = 0; p < P; ++p) {
      const int64_t begin = p * G, end = begin + G;
      const double group_mean = mean(begin, end, reward);
      const double divisor = normalize ? deviation(begin, end, reward) + eps : 1.0;
      if (group_mean == group_mean) level[p] += weight * (group_mean - batch_mean);
      for (int64_t s = begin; s < end; ++s) {
        const double centered = reward(s) - group_mean;
        if (centered == centered) x[s] = (x[s] == x[s] ? x[s] : 0.0) + weight * divide(centered, divisor);
      }
    }
  }

  const auto sum = [&](int64_t s) { return x[s]; };
  const auto total = [&](int64_t s) { return x[s] + level[s / G]; };
  const double batch_divisor = of_batch ? (normalize ? deviation(0, S, sum) : deviation(0, S, total)) + eps : 1.0;
  for (int64_t p = 0; p < P; ++p) {
    const int64_t begin = p * G, end = begin + G;
    const double divisor = of_batch || scale == kNone ? batch_divisor : deviation(begin, end, sum) + eps;
    for (int64_t s = begin; s < end; ++s)
      advantages[s] = static_cast<float>(x[s] == x[s] ? divide(x[s], divisor) : 0.0);
  }
}
