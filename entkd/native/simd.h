// What the kernels need of AVX-512 with bf16: exponentials, conversions, transposed blocks, operands
// of brgemm.

#pragma once

#include <immintrin.h>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <limits>

namespace entkd {

using c10::BFloat16;
using c10::Half;

constexpr int64_t kLanes = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= kLanes ? 0xFFFFu : (1u << count) - 1);
}

// e^x to two units in the last place. NaN is passed on; of numbers far below the smallest, -infinity too, it makes 0.
inline __m512 exp(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x); // in this order a NaN in x comes out
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x); // ln 2 in two parts, the first of few bits
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 p = _mm512_set1_ps(1.0f / 5040); // Taylor's series; its rest is 5e-9 where |r| is at most ln(2)/2
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 720));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// Numbers as fp32. Lanes beyond `lanes` are -infinity: no maximum, and 0 in a sum of exponentials.
inline __m512 load(const float* x, __mmask16 lanes) {
  return _mm512_mask_loadu_ps(_mm512_set1_ps(-kInfinity), lanes, x);
}

inline __m512 load(const Half* x, __mmask16 lanes) {
  return _mm512_mask_cvtph_ps(_mm512_set1_ps(-kInfinity), lanes, _mm256_maskz_loadu_epi16(lanes, x));
}

inline __m512 load(const BFloat16* x, __mmask16 lanes) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, x));
  return _mm512_mask_mov_ps(_mm512_set1_ps(-kInfinity), lanes, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
}

inline void store(float* out, __mmask16 lanes, __m512 x) {
  _mm512_mask_storeu_ps(out, lanes, x);
}

inline void store(BFloat16* out, __mmask16 lanes, __m512 x) {
  _mm256_mask_storeu_epi16(out, lanes, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

// 32 neighbours as 16 pairs of bf16.
inline __m512i pairs(const BFloat16* x) {
  return _mm512_loadu_si512(x);
}

inline __m512i pairs(const float* x) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + kLanes), _mm512_loadu_ps(x)));
}

// Lane i of the result pairs lane `from` + i of a with that of b, both of 32 bf16; `from` is 0 or 16.
inline __m512i zip(__m512i a, __m512i b, int from) {
  alignas(64) static const uint16_t order[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i index = _mm512_add_epi16(_mm512_load_si512(order), _mm512_set1_epi16(static_cast<short>(from)));
  return _mm512_permutex2var_epi16(a, index, b);
}

// 16 rows of 16 dwords, transposed in place.
inline void transpose(__m512i (&row)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    row[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    row[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    row[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    row[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) { // 0x88 takes the even quarters of both, 0xDD the odd ones
    t[i] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0xDD);
  }
  for (int i = 0; i < 8; ++i) {
    row[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    row[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
  }
}

inline uint32_t bits(BFloat16 value) {
  return value.x;
}

inline uint32_t bits(float value) {
  return c10::detail::round_to_nearest_even(value);
}

inline const BFloat16* numbers(const uint32_t* pairs) {
  return reinterpret_cast<const BFloat16*>(pairs);
}

// Pairs of neighbours in a row, as (D / 2, width). An fp32 weight is rounded on its way, which saves a pass over a copy
// of it.
template <typename Weight>
void pair_columns(const Weight* weight, int64_t rows, int64_t D, uint32_t* panel, int64_t width) {
  for (int64_t row = 0; row < rows; row += 16) {
    int64_t pair = 0;
    for (; rows - row >= 16 && pair + 16 <= D / 2; pair += 16) {
      __m512i block[16];
      for (int i = 0; i < 16; ++i) {
        block[i] = pairs(weight + (row + i) * D + 2 * pair);
      }
      transpose(block);
      for (int i = 0; i < 16; ++i) {
        _mm512_storeu_si512(panel + (pair + i) * width + row, block[i]);
      }
    }
    for (; pair < D / 2; ++pair) {
      for (int64_t i = row; i < std::min(rows, row + 16); ++i) {
        const Weight* source = weight + i * D + 2 * pair;
        panel[pair * width + i] = bits(source[0]) | bits(source[1]) << 16;
      }
    }
  }
}

// Pairs of neighbouring rows, as ((rows + 1) / 2, D); the last of an odd number is paired with zeros.
inline void pair_rows(const BFloat16* x, int64_t rows, int64_t D, uint32_t* panel) {
  for (int64_t row = 0; row < rows; row += 2) {
    const BFloat16 *upper = x + row * D, *lower = upper + D;
    const bool both = row + 1 < rows;
    uint32_t* out = panel + row / 2 * D;
    int64_t d = 0;
    for (; both && d + 32 <= D; d += 32) {
      const __m512i a = _mm512_loadu_si512(upper + d), b = _mm512_loadu_si512(lower + d);
      _mm512_storeu_si512(out + d, zip(a, b, 0));
      _mm512_storeu_si512(out + d + 16, zip(a, b, 16));
    }
    for (; d < D; ++d) {
      out[d] = bits(upper[d]) | (both ? bits(lower[d]) << 16 : 0);
    }
  }
}

// Some columns of x (R, V) as rows of `pairs` pairs, a multiple of 16: a transposed copy, with zeros behind the R
// numbers.
inline void transpose_columns(
    const BFloat16* x, int64_t R, int64_t V, int64_t columns, uint32_t* panel, int64_t pairs) {
  const auto half = [&](int64_t row, int64_t column) {
    return row < R ? _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + row * V + column)))
                   : _mm512_setzero_si512();
  };
  const auto number = [&](int64_t row, int64_t column) { return row < R ? bits(x[row * V + column]) : 0; };
  for (int64_t pair = 0; pair < pairs; pair += 16) {
    int64_t column = 0;
    for (; column + 16 <= columns; column += 16) {
      __m512i block[16];
      for (int i = 0; i < 16; ++i) {
        block[i] = zip(half(2 * (pair + i), column), half(2 * (pair + i) + 1, column), 0);
      }
      transpose(block);
      for (int i = 0; i < 16; ++i) {
        _mm512_storeu_si512(panel + (column + i) * pairs + pair, block[i]);
      }
    }
    for (; column < columns; ++column) {
      for (int64_t p = pair; p < pair + 16; ++p) {
        panel[column * pairs + p] = number(2 * p, column) | number(2 * p + 1, column) << 16;
      }
    }
  }
}

} // namespace entkd
