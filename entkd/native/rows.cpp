// Losses of rows of logits, and their gradients: each row is read from memory once and stays in cache for the rest.
//
// R rows, V vocabulary; tensors are contiguous. k = 1 / T. A row of scale 0 gives value and gradient 0, whatever is in
// it. Logarithms of 0 are the lowest number, so that their product with 0 is 0.

#include "simd.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

using entkd::BFloat16;
using entkd::first_lanes;
using entkd::Half;
using entkd::kLanes;
using entkd::load;
using entkd::store;

namespace {

constexpr int64_t kBlock = 4096; // numbers that are summed in fp32; sums of blocks go on in fp64

// log softmax(k x) of a row: k (x - top) - log Σ exp(k (x - top)), whose parts are small where probabilities are large.
template <typename Number>
struct LogSoftmax {
  LogSoftmax(const Number* row, int64_t V, float k) : row(row), factor(_mm512_set1_ps(k)) {
    __m512 highest = _mm512_set1_ps(-entkd::kInfinity);
    for (int64_t v = 0; v < V; v += kLanes) {
      highest = _mm512_max_ps(highest, load(row + v, first_lanes(V - v)));
    }
    top = _mm512_set1_ps(_mm512_reduce_max_ps(highest));
    double sum = 0;
    for (int64_t block = 0; block < V; block += kBlock) {
      const int64_t end = std::min(V, block + kBlock);
      __m512 part = _mm512_setzero_ps();
      for (int64_t v = block; v < end; v += kLanes) {
        part = _mm512_add_ps(part, entkd::exp(_mm512_mul_ps(factor, below(v, first_lanes(end - v)))));
      }
      sum += _mm512_reduce_add_ps(part);
    }
    log_sum = _mm512_set1_ps(static_cast<float>(std::log(sum)));
  }

  __m512 below(int64_t v, __mmask16 lanes) const {
    return _mm512_sub_ps(load(row + v, lanes), top);
  }

  __m512 operator()(int64_t v, __mmask16 lanes) const {
    const __m512 lowest = _mm512_set1_ps(std::numeric_limits<float>::lowest());
    return _mm512_max_ps(lowest, _mm512_fmsub_ps(factor, below(v, lanes), log_sum));
  }

  const Number* row;
  __m512 factor, top, log_sum;
};

template <bool reverse, typename Student, typename Teacher, typename Gradient>
float kl(const Student* student, const Teacher* teacher, Gradient* gradient, int64_t V, float k, float scale) {
  const LogSoftmax<Student> log_q(student, V, k);
  const LogSoftmax<Teacher> log_p(teacher, V, k);
  const __m512 factor = _mm512_set1_ps(scale * k);
  double total = 0;
  for (int64_t block = 0; block < V; block += kBlock) {
    const int64_t end = std::min(V, block + kBlock);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t v = block; v < end; v += kLanes) {
      const __mmask16 lanes = first_lanes(end - v);
      const __m512 lq = log_q(v, lanes), lp = log_p(v, lanes);
      const __m512 q = entkd::exp(lq);
      if constexpr (reverse) {
        sum = _mm512_fmadd_ps(q, _mm512_sub_ps(lq, lp), sum);
      } else {
        const __m512 p = entkd::exp(lp);
        sum = _mm512_fmadd_ps(p, _mm512_sub_ps(lp, lq), sum);
        if (gradient) {
          store(gradient + v, lanes, _mm512_mul_ps(factor, _mm512_sub_ps(q, p)));
        }
      }
    }
    total += _mm512_reduce_add_ps(sum);
  }
  const float value = static_cast<float>(total);
  if constexpr (reverse) {
    const __m512 mean = _mm512_set1_ps(value);
    for (int64_t v = 0; gradient && v < V; v += kLanes) {
      const __mmask16 lanes = first_lanes(V - v);
      const __m512 lq = log_q(v, lanes);
      const __m512 excess = _mm512_sub_ps(_mm512_sub_ps(lq, log_p(v, lanes)), mean);
      store(gradient + v, lanes, _mm512_mul_ps(factor, _mm512_mul_ps(entkd::exp(lq), excess)));
    }
  }
  return value;
}

template <typename Student, typename Gradient>
float cross_entropy(const Student* student, int64_t label, Gradient* gradient, int64_t V, float scale) {
  const LogSoftmax<Student> log_q(student, V, 1.0f);
  const float value = -_mm512_cvtss_f32(log_q(label, 1));
  if (gradient) {
    const __m512 factor = _mm512_set1_ps(scale);
    const int64_t before = label / kLanes * kLanes;
    for (int64_t v = 0; v < V; v += kLanes) {
      const __mmask16 lanes = first_lanes(V - v);
      __m512 slope = entkd::exp(log_q(v, lanes));
      if (v == before) {
        slope = _mm512_mask_sub_ps(slope, static_cast<__mmask16>(1u << (label - v)), slope, _mm512_set1_ps(1.0f));
      }
      store(gradient + v, lanes, _mm512_mul_ps(factor, slope));
    }
  }
  return value;
}

// Calls row(r, scale) → value for all rows that count; others get value 0 and, from `gradient` on, zeros.
template <typename Gradient, typename Row>
void for_rows(float* value, const float* scale, Gradient* gradient, int64_t R, int64_t V, const Row& row) {
  at::parallel_for(0, R, 1, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const float own = scale ? scale[r] : 1.0f;
      value[r] = own == 0 ? 0.0f : row(r, own, gradient ? gradient + r * V : nullptr);
      if (own == 0 && gradient) {
        std::fill(gradient + r * V, gradient + (r + 1) * V, static_cast<Gradient>(0.0f));
      }
    }
  });
}

// Call run(pointer) with the pointer as what `type` says: 0 fp32, 1 bf16, 2 fp16.
template <typename Run>
void typed(const void* pointer, int32_t type, const Run& run) {
  if (type == 0) {
    run(static_cast<const float*>(pointer));
  } else {
    run(static_cast<const BFloat16*>(pointer));
  }
}

template <typename Run>
void typed(void* pointer, int32_t type, const Run& run) {
  if (type == 0) {
    run(static_cast<float*>(pointer));
  } else {
    run(static_cast<BFloat16*>(pointer));
  }
}

template <typename Run>
void typed_or_half(const void* pointer, int32_t type, const Run& run) {
  if (type == 2) {
    run(static_cast<const Half*>(pointer));
  } else {
    typed(pointer, type, run);
  }
}

template <bool reverse>
void kl_of_rows(
    const void* student, int32_t student_type, const void* teacher, int32_t teacher_type, const float* k,
    const float* scale, float* value, void* gradient, int32_t gradient_type, int64_t R, int64_t V) {
  typed(student, student_type, [&](const auto* s) {
    typed_or_half(teacher, teacher_type, [&](const auto* t) {
      typed(gradient, gradient_type, [&](auto* g) {
        for_rows(value, scale, g, R, V, [&](int64_t r, float own, auto* g_row) {
          return kl<reverse>(s + r * V, t + r * V, g_row, V, k ? k[r] : 1.0f, own);
        });
      });
    });
  });
}

} // namespace

extern "C" {

// Pointers that may be null: k and scale, which are 1 then, and gradient.
void entkd_kl(
    int32_t reverse, const void* student, int32_t student_type, const void* teacher, int32_t teacher_type,
    const float* k, const float* scale, float* value, void* gradient, int32_t gradient_type, int64_t R, int64_t V) {
  const auto run = reverse ? kl_of_rows<true> : kl_of_rows<false>;
  run(student, student_type, teacher, teacher_type, k, scale, value, gradient, gradient_type, R, V);
}

void entkd_cross_entropy(
    const void* student, int32_t student_type, const int64_t* labels, const float* scale, float* value,
    void* gradient, int32_t gradient_type, int64_t R, int64_t V) {
  typed(student, student_type, [&](const auto* s) {
    typed(gradient, gradient_type, [&](auto* g) {
      for_rows(value, scale, g, R, V, [&](int64_t r, float own, auto* g_row) {
        return cross_entropy(s + r * V, labels[r], g_row, V, own);
      });
    });
  });
}

} // extern "C"
