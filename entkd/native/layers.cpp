// What a layer does between its matrix products, each in one pass over memory forwards and one backwards.
//
// R rows (tokens), D width, H heads; tensors are contiguous. Everything is computed in fp32.

#include "simd.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

using entkd::BFloat16;
using entkd::first_lanes;
using entkd::kLanes;
using entkd::store;

namespace {

constexpr int64_t kGrain = 1 << 14; // numbers that are worth a thread of their own

// Numbers as fp32; lanes beyond `lanes` are 0.
inline __m512 wide(const float* x, __mmask16 lanes) {
  return _mm512_maskz_loadu_ps(lanes, x);
}

inline __m512 wide(const BFloat16* x, __mmask16 lanes) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

inline __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, entkd::exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

template <typename Run>
void for_rows(int64_t R, int64_t D, const Run& run) {
  at::parallel_for(0, R, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, D)), run);
}

} // namespace

extern "C" {

// out = weight · x · inverse with inverse = (mean(x²) + epsilon)^-½ of each row.
void entkd_rms_norm(
    const float* x, const float* weight, float* inverse, float* out, float epsilon, int64_t R, int64_t D) {
  for_rows(R, D, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const float* row = x + r * D;
      __m512 sum = _mm512_setzero_ps();
      for (int64_t d = 0; d < D; d += kLanes) {
        const __m512 own = wide(row + d, first_lanes(D - d));
        sum = _mm512_fmadd_ps(own, own, sum);
      }
      inverse[r] = 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / static_cast<float>(D) + epsilon);
      const __m512 factor = _mm512_set1_ps(inverse[r]);
      for (int64_t d = 0; d < D; d += kLanes) {
        const __mmask16 lanes = first_lanes(D - d);
        const __m512 normed = _mm512_mul_ps(factor, wide(row + d, lanes));
        store(out + r * D + d, lanes, _mm512_mul_ps(wide(weight + d, lanes), normed));
      }
    }
  });
}

// With n = x · inverse and h = weight · gradient: of_x = inverse · (h - n · mean(h n)), of_weight = Σ gradient · n.
void entkd_rms_norm_gradient(
    const float* x, const float* weight, const float* inverse, const float* gradient, float* of_x, float* of_weight,
    int64_t R, int64_t D) {
  std::vector<std::vector<float>> sums(at::get_num_threads());
  for_rows(R, D, [&](int64_t first, int64_t last) {
    std::vector<float>& own = sums[at::get_thread_num()];
    own.resize(D);
    for (int64_t r = first; r < last; ++r) {
      const float *row = x + r * D, *slope = gradient + r * D;
      const __m512 factor = _mm512_set1_ps(inverse[r]);
      __m512 sum = _mm512_setzero_ps();
      for (int64_t d = 0; d < D; d += kLanes) {
        const __mmask16 lanes = first_lanes(D - d);
        const __m512 of_normed = wide(slope + d, lanes), normed = _mm512_mul_ps(factor, wide(row + d, lanes));
        const __m512 product = _mm512_mul_ps(of_normed, normed);
        store(own.data() + d, lanes, _mm512_add_ps(wide(own.data() + d, lanes), product));
        sum = _mm512_fmadd_ps(wide(weight + d, lanes), product, sum);
      }
      const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / static_cast<float>(D));
      for (int64_t d = 0; d < D; d += kLanes) {
        const __mmask16 lanes = first_lanes(D - d);
        const __m512 h = _mm512_mul_ps(wide(weight + d, lanes), wide(slope + d, lanes));
        const __m512 normed = _mm512_mul_ps(factor, wide(row + d, lanes));
        store(of_x + r * D + d, lanes, _mm512_mul_ps(factor, _mm512_fnmadd_ps(normed, mean, h)));
      }
    }
  });
  std::fill(of_weight, of_weight + D, 0.0f);
  for (const std::vector<float>& own : sums) {
    for (size_t d = 0; d < own.size(); ++d) {
      of_weight[d] += own[d];
    }
  }
}

// out = gate · sigmoid(gate) · up
void entkd_swiglu(const BFloat16* gate, const BFloat16* up, BFloat16* out, int64_t N) {
  at::parallel_for(0, (N + kLanes - 1) / kLanes, kGrain / kLanes, [&](int64_t first, int64_t last) {
    for (int64_t i = first * kLanes; i < std::min(N, last * kLanes); i += kLanes) {
      const __mmask16 lanes = first_lanes(N - i);
      const __m512 a = wide(gate + i, lanes);
      store(out + i, lanes, _mm512_mul_ps(_mm512_mul_ps(a, sigmoid(a)), wide(up + i, lanes)));
    }
  });
}

void entkd_swiglu_gradient(
    const BFloat16* gate, const BFloat16* up, const BFloat16* gradient, BFloat16* of_gate, BFloat16* of_up, int64_t N) {
  const __m512 one = _mm512_set1_ps(1.0f);
  at::parallel_for(0, (N + kLanes - 1) / kLanes, kGrain / kLanes, [&](int64_t first, int64_t last) {
    for (int64_t i = first * kLanes; i < std::min(N, last * kLanes); i += kLanes) {
      const __mmask16 lanes = first_lanes(N - i);
      const __m512 a = wide(gate + i, lanes), g = wide(gradient + i, lanes), s = sigmoid(a);
      const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(a, _mm512_sub_ps(one, s), one));
      store(of_gate + i, lanes, _mm512_mul_ps(_mm512_mul_ps(g, wide(up + i, lanes)), slope));
      store(of_up + i, lanes, _mm512_mul_ps(g, _mm512_mul_ps(a, s)));
    }
  });
}

// Rotary positions of x (R, H, D) by cos and sin (R, D): (x₁ cos₁ - x₂ sin₁, x₂ cos₂ + x₁ sin₂) of the two halves of a
// head; with `back` the gradient by x where x is that of the result.
void entkd_rotate(
    const BFloat16* x, const float* cos, const float* sin, BFloat16* out, int32_t back, int64_t R, int64_t H, int64_t D) {
  const int64_t half = D / 2;
  for_rows(R, H * D, [&](int64_t first, int64_t last) {
    for (int64_t row = first * H; row < last * H; ++row) {
      const BFloat16* own = x + row * D;
      const float *c = cos + row / H * D, *s = sin + row / H * D;
      for (int64_t d = 0; d < half; d += kLanes) {
        const __mmask16 lanes = first_lanes(half - d);
        const __m512 a = wide(own + d, lanes), b = wide(own + half + d, lanes);
        const __m512 s1 = wide(s + d, lanes), s2 = wide(s + half + d, lanes);
        const __m512 upper = _mm512_mul_ps(a, wide(c + d, lanes));
        const __m512 lower = _mm512_mul_ps(b, wide(c + half + d, lanes));
        store(out + row * D + d, lanes, back ? _mm512_fmadd_ps(b, s2, upper) : _mm512_fnmadd_ps(b, s1, upper));
        store(out + row * D + half + d, lanes, back ? _mm512_fnmadd_ps(a, s1, lower) : _mm512_fmadd_ps(a, s2, lower));
      }
    }
  });
}

} // extern "C"
