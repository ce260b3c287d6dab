// The fused pass of grpo_loss: log-prob and entropy of a token, its terms of the loss, and the gradient of its logits
// while they are still in cache. The formulas are in kernels/grpo_loss.py.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "log_softmax.h"

namespace bicot {
namespace {

// Run-time options, in the order that kernels/fused_grpo.py packs them.
struct Options {
  double beta, low, high, delta, clip_max, entropy_weight;
};

// The results of a token, in the order of fused_grpo.RESULTS.
struct Token {
  double loss, logprob, entropy, ratio, kl, clipped_low, clipped_high, correction, grad_logprob;
};

// `norm` and `entropy_weight` are multiplied by the token's own weight.
Token token_terms(double logprob, double entropy, double advantage, double norm, double entropy_weight,
                  const float* old_logprob, const float* ref_logprob, const float* sampling_logprob, bool cispo,
                  int kl_estimator, bool correct_kl, const Options& o) {
  const double before = old_logprob ? *old_logprob : logprob;
  const double ratio = std::exp(logprob - before);
  double objective, slope;  // and its derivative by the log-prob
  if (cispo) {
    slope = std::min(ratio, o.high) * advantage;
    objective = slope * logprob;
  } else {
    const double bounded = std::min(ratio, o.delta) * advantage;
    const double clipped = std::min(std::max(ratio, o.low), o.high) * advantage;
    objective = std::min(bounded, clipped);
    const bool outside = bounded <= clipped ? ratio > o.delta : ratio < o.low || ratio > o.high;  // not if it is NaN
    slope = outside ? 0 : ratio * advantage;
  }
  double correction = 1;
  if (sampling_logprob) {
    correction = std::exp(before - *sampling_logprob);
    objective *= std::min(correction, o.clip_max);
    slope *= std::min(correction, o.clip_max);
  }
  double kl = 0, kl_slope = 0;
  if (ref_logprob) {
    const double gap = *ref_logprob - logprob;
    if (kl_estimator == 1) {
      kl = -gap, kl_slope = 1;
    } else if (kl_estimator == 2) {
      kl = gap * gap / 2, kl_slope = -gap;
    } else {
      const double excess = std::expm1(gap);
      kl = excess - gap, kl_slope = -excess;
    }
    if (correct_kl) {
      kl_slope = ratio * (kl_slope + kl);
      kl *= ratio;
    }
  }
  const bool below = !cispo && ratio < o.low && advantage < 0;
  const bool above = ratio > o.high && advantage > 0;
  return {norm * (o.beta * kl - objective) - entropy_weight * entropy,
          logprob,
          entropy,
          ratio,
          kl,
          double(below),
          double(above),
          correction,
          norm * (o.beta * kl_slope - slope)};
}

template <class T>
void fused_grpo(const T* logits, int64_t stride, const int64_t* targets, int64_t N, int64_t V, double temperature,
                int num_threads, const int64_t* sample, const float* advantages, const float* norm, const float* old,
                const float* ref, const float* sampling, const float* token_weight, const double* options, bool cispo,
                int kl_estimator, bool correct_kl, float* results, int64_t results_stride, T* grad,
                int64_t grad_stride) {
  if (grad && grad != logits) prefer_huge_pages(grad, N * grad_stride * sizeof(T));
  const Options o = {options[0], options[1], options[2], options[3], options[4], options[5]};
#pragma omp parallel for num_threads(num_threads) schedule(static) if (N * V > kSerial)
  for (int64_t i = 0; i < N; ++i) {
    const T* x = logits + i * stride;
    const RowStats s = forward_row(x, V, targets[i], 1.0 / temperature);
    const double weight = token_weight ? token_weight[i] : 1, entropy_weight = weight * o.entropy_weight;
    Token token = token_terms(s.logprob, s.entropy, advantages[sample[i]], weight * norm[sample[i]], entropy_weight,
                              old ? old + i : nullptr, ref ? ref + i : nullptr, sampling ? sampling + i : nullptr,
                              cispo, kl_estimator, correct_kl, o);
    if (weight == 0) token.loss = token.grad_logprob = 0;  // 0 * inf is NaN
    const double values[] = {token.loss,        token.logprob,      token.entropy,    token.ratio,       token.kl,
                             token.clipped_low, token.clipped_high, token.correction, token.grad_logprob};
    for (int64_t k = 0; k < 9; ++k) results[k * results_stride + i] = static_cast<float>(values[k]);
    if (!grad) continue;
    if (token.grad_logprob == 0 && entropy_weight == 0) {
      std::memset(grad + i * grad_stride, 0, V * sizeof(T));  // all bits 0 is 0 in both dtypes
    } else {
      backward_row(x, grad + i * grad_stride, V, targets[i], 1.0 / temperature, static_cast<float>(token.grad_logprob),
                   static_cast<float>(-entropy_weight), s.lse, s.entropy);
    }
  }
}

}  // namespace
}  // namespace bicot

#define BICOT_FUSED_GRPO(suffix, T)                                                                                \
  BICOT_EXPORT void bicot_fused_grpo_##suffix(                                                                     \
      const T* logits, int64_t stride, const int64_t* targets, int64_t N, int64_t V, double temperature,           \
      int num_threads, const int64_t* sample, const float* advantages, const float* norm, const float* old,        \
      const float* ref, const float* sampling, const float* token_weight, const double* options, int cispo,        \
      int kl_estimator, int correct_kl, float* results, int64_t results_stride, T* grad, int64_t grad_stride) {    \
    bicot::fused_grpo(logits, stride, targets, N, V, temperature, num_threads, sample, advantages, norm, old, ref, \
                      sampling, token_weight, options, cispo != 0, kl_estimator, correct_kl != 0, results,         \
                      results_stride, grad, grad_stride);                                                          \
  }

BICOT_FUSED_GRPO(float32, float)
BICOT_FUSED_GRPO(bfloat16, bicot::bfloat16)
