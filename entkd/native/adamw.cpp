// A step of AdamW in one pass over memory: what it costs is the traffic.

#include "simd.h"

#include <ATen/Parallel.h>

#include <algorithm>

using entkd::BFloat16;
using entkd::first_lanes;
using entkd::kLanes;

namespace {

constexpr int64_t kGrain = 1 << 16; // numbers that are worth a thread of their own

// As PyTorch rounds, subnormal numbers and NaN too, unlike the instruction: a copy is the same whoever made it.
__m256i rounded_to_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(result);
}

} // namespace

extern "C" {

// weight -= rate · (decay · weight + mean̅ / (√square̅ + epsilon)) with mean = β₁ mean + (1-β₁) g, square = β₂ square +
// (1-β₂) g², g = factor · gradient; mean̅ and √square̅ are divided by their corrections. `rounded` may be null.
void entkd_adamw(
    float* weight, float* mean, float* square, const float* gradient, BFloat16* rounded, float factor, float rate,
    float beta1, float beta2, float epsilon, float decay, float mean_correction, float root_correction, int64_t N) {
  const __m512 of_gradient = _mm512_set1_ps(factor);
  const __m512 kept = _mm512_set1_ps(1.0f - rate * decay);
  const __m512 new1 = _mm512_set1_ps(1.0f - beta1), old2 = _mm512_set1_ps(beta2), new2 = _mm512_set1_ps(1.0f - beta2);
  const __m512 step = _mm512_set1_ps(rate / mean_correction);
  const __m512 scale = _mm512_set1_ps(1.0f / root_correction), least = _mm512_set1_ps(epsilon);
  const int64_t vectors = (N + kLanes - 1) / kLanes;
  at::parallel_for(0, vectors, kGrain / kLanes, [&](int64_t first, int64_t last) {
    for (int64_t vector = first; vector < last; ++vector) {
      const int64_t i = vector * kLanes;
      const __mmask16 lanes = first_lanes(N - i);
      const __m512 g = _mm512_mul_ps(of_gradient, _mm512_maskz_loadu_ps(lanes, gradient + i));
      __m512 m = _mm512_maskz_loadu_ps(lanes, mean + i), v = _mm512_maskz_loadu_ps(lanes, square + i);
      m = _mm512_fmadd_ps(new1, _mm512_sub_ps(g, m), m);
      v = _mm512_fmadd_ps(old2, v, _mm512_mul_ps(new2, _mm512_mul_ps(g, g)));
      const __m512 root = _mm512_fmadd_ps(_mm512_sqrt_ps(v), scale, least);
      __m512 w = _mm512_mul_ps(kept, _mm512_maskz_loadu_ps(lanes, weight + i));
      w = _mm512_fnmadd_ps(step, _mm512_div_ps(m, root), w);
      _mm512_mask_storeu_ps(mean + i, lanes, m);
      _mm512_mask_storeu_ps(square + i, lanes, v);
      _mm512_mask_storeu_ps(weight + i, lanes, w);
      if (rounded) {
        _mm256_mask_storeu_epi16(rounded + i, lanes, rounded_to_bf16(w));
      }
    }
  });
}

} // extern "C"
