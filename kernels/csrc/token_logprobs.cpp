// Log-probability, entropy and log-sum-exp of N tokens from logits [N, V], and the gradient of the first two.
#include "log_softmax.h"

namespace bicot {
namespace {

template <class T>
void forward(const T* logits, int64_t row_stride, const int64_t* targets, int64_t N, int64_t V, double temperature,
             int num_threads, float* logprob, float* entropy, double* lse) {
#pragma omp parallel for num_threads(num_threads) schedule(static) if (N * V > kSerial)
  for (int64_t i = 0; i < N; ++i) {
    const RowStats token = forward_row(logits + i * row_stride, V, targets[i], 1.0 / temperature);
    logprob[i] = token.logprob;
    entropy[i] = token.entropy;
    lse[i] = token.lse;
  }
}

template <class T>
void backward(const T* logits, int64_t row_stride, const int64_t* targets, int64_t N, int64_t V, double temperature,
              int num_threads, const float* grad_logprob, const float* grad_entropy, const double* lse,
              const float* entropy, T* grad_logits, int64_t grad_stride) {
  if (grad_logits != logits) prefer_huge_pages(grad_logits, N * grad_stride * sizeof(T));
#pragma omp parallel for num_threads(num_threads) schedule(static) if (N * V > kSerial)
  for (int64_t i = 0; i < N; ++i)
    backward_row(logits + i * row_stride, grad_logits + i * grad_stride, V, targets[i], 1.0 / temperature,
                 grad_logprob[i], grad_entropy[i], lse[i], entropy[i]);
}

}  // namespace
}  // namespace bicot

#define BICOT_TOKEN_LOGPROBS(suffix, T)                                                                               \
  BICOT_EXPORT void bicot_token_logprobs_##suffix(const T* logits, int64_t row_stride, const int64_t* targets,        \
                                                  int64_t N, int64_t V, double temperature, int num_threads,          \
                                                  float* logprob, float* entropy, double* lse) {                      \
    bicot::forward(logits, row_stride, targets, N, V, temperature, num_threads, logprob, entropy, lse);               \
  }                                                                                                                   \
  BICOT_EXPORT void bicot_token_logprobs_backward_##suffix(                                                           \
      const T* logits, int64_t row_stride, const int64_t* targets, int64_t N, int64_t V, double temperature,          \
      int num_threads, const float* grad_logprob, const float* grad_entropy, const double* lse, const float* entropy, \
      T* grad_logits, int64_t grad_stride) {                                                                          \
    bicot::backward(logits, row_stride, targets, N, V, temperature, num_threads, grad_logprob, grad_entropy, lse,     \
                    entropy, grad_logits, grad_stride);                                                               \
  }

BICOT_TOKEN_LOGPROBS(float32, float)
BICOT_TOKEN_LOGPROBS(bfloat16, bicot::bfloat16)
