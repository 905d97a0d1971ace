// The three matrix products of an output projection with bf16 operands, summed and kept in fp32.
//
// PyTorch's CPU products of bf16 tensors round their result to bf16; torch.mm(..., out_dtype=float32) is there for CUDA
// only. The kernel that it runs inside, oneDNN's batch-reduce GEMM, does write fp32, and this file calls it. It takes
// its second operand as pairs of neighbours along the dimension that is summed over.
//
// R tokens, V vocabulary, D width; all tensors are contiguous, and D is even.

#include "simd.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <vector>

using at::native::cpublas::brgemm;
using at::native::cpublas::brgemm_release;
using entkd::BFloat16;
using entkd::numbers;
using entkd::pair_columns;
using entkd::pair_rows;
using entkd::transpose_columns;

namespace {

constexpr int64_t kVocabulary = 64; // rows of the weight in a panel: with a width of 576 it fills a sixth of an L2 cache
constexpr int64_t kDepth = 512; // rows of the weight that are summed over at once
constexpr int64_t kTokens = 256;
constexpr int64_t kTile = 32; // rows of AMX

// out (R, V) = hidden (R, D) · weightᵀ (D, V)
template <typename Weight>
void logits(const BFloat16* hidden, const Weight* weight, float* out, int64_t R, int64_t V, int64_t D) {
  const int64_t panels = (V + kVocabulary - 1) / kVocabulary;
  at::parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
    const auto panel = std::make_unique<uint32_t[]>((D / 2) * kVocabulary);
    for (int64_t index = first; index < last; ++index) {
      const int64_t start = index * kVocabulary;
      const int64_t rows = std::min(kVocabulary, V - start);
      pair_columns(weight + start * D, rows, D, panel.get(), kVocabulary);
      for (int64_t token = 0; token < R; token += kTokens) {
        brgemm(
            std::min(kTokens, R - token), rows, D, D, kVocabulary, V, /*add_C=*/false, hidden + token * D,
            numbers(panel.get()), out + token * V + start, /*is_vnni=*/true);
      }
    }
    brgemm_release(/*is_vnni=*/true);
  });
}

// out (R, D) = gradient (R, V) · weight (V, D). Every thread sums over a part of the vocabulary.
void hidden_gradient(
    const BFloat16* gradient, const BFloat16* weight, float* out, int64_t R, int64_t V, int64_t D) {
  const int64_t even = V / 2 * 2;
  const int64_t panels = (even + kDepth - 1) / kDepth;
  const int64_t whole = R / kTile * kTile;
  std::vector<std::vector<float>> sums(at::get_num_threads());
  at::parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
    std::vector<float>& sum = sums[at::get_thread_num()];
    sum.resize((whole < R ? whole + kTile : whole) * D);
    std::vector<BFloat16> rest(whole < R ? kTile * kDepth : 0);
    const auto panel = std::make_unique<uint32_t[]>(kDepth / 2 * D);
    for (int64_t index = first; index < last; ++index) {
      const int64_t start = index * kDepth;
      const int64_t depth = std::min(kDepth, even - start);
      pair_rows(weight + start * D, depth, D, panel.get());
      for (int64_t token = 0; token < whole; token += kTokens) {
        brgemm(
            std::min(kTokens, whole - token), D, depth, V, D, D, /*add_C=*/true, gradient + token * V + start,
            numbers(panel.get()), sum.data() + token * D, /*is_vnni=*/true);
      }
      if (whole < R) {
        for (int64_t row = whole; row < R; ++row) {
          std::copy_n(gradient + row * V + start, depth, rest.data() + (row - whole) * kDepth);
        }
        brgemm(
            kTile, D, depth, kDepth, D, D, /*add_C=*/true, rest.data(), numbers(panel.get()), sum.data() + whole * D,
            /*is_vnni=*/true);
      }
    }
    brgemm_release(/*is_vnni=*/true);
  });
  std::fill(out, out + R * D, 0.0f);
  for (const std::vector<float>& sum : sums) {
    for (int64_t i = 0; i < (sum.empty() ? 0 : R * D); ++i) {
      out[i] += sum[i];
    }
  }
  for (int64_t r = 0; even < V && r < R; ++r) {
    for (int64_t d = 0; d < D; ++d) {
      out[r * D + d] += static_cast<float>(gradient[r * V + even]) * static_cast<float>(weight[even * D + d]);
    }
  }
}

// sum (V, D) = or += gradientᵀ (V, R) · hidden (R, D)
void weight_gradient(
    const BFloat16* gradient, const BFloat16* hidden, float* sum, int64_t R, int64_t V, int64_t D, bool add) {
  // Whole tiles of AMX, 32 numbers deep, with zeros behind the last: for the rest of an odd depth the kernel changes the
  // shape of its tiles twice per block of the result, which took half of its time.
  const int64_t pairs = (R + 31) / 32 * 16;
  const auto paired = std::make_unique<uint32_t[]>(pairs * D); // zeros
  pair_rows(hidden, R, D, paired.get());
  const int64_t panels = (V + kVocabulary - 1) / kVocabulary;
  at::parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
    const auto panel = std::make_unique<uint32_t[]>(kVocabulary * pairs);
    for (int64_t index = first; index < last; ++index) {
      const int64_t start = index * kVocabulary;
      const int64_t rows = std::min(kVocabulary, V - start);
      transpose_columns(gradient + start, R, V, rows, panel.get(), pairs);
      brgemm(
          rows, D, 2 * pairs, 2 * pairs, D, D, add, numbers(panel.get()), numbers(paired.get()), sum + start * D,
          /*is_vnni=*/true);
    }
    brgemm_release(/*is_vnni=*/true);
  });
}

} // namespace

extern "C" {

// Whether brgemm runs here: it throws where oneDNN is off or kept from the instructions, and nothing may be thrown into
// Python.
int32_t entkd_runs() {
  try {
    const std::vector<BFloat16> operand(kTile * kTile);
    std::vector<float> out(kTile * kTile);
    logits(operand.data(), operand.data(), out.data(), kTile, kTile, kTile);
    return 1;
  } catch (const std::exception&) {
    return 0;
  }
}

void entkd_logits(
    const BFloat16* hidden, const void* weight, int32_t fp32_weight, float* out, int64_t R, int64_t V, int64_t D) {
  if (fp32_weight) {
    logits(hidden, static_cast<const float*>(weight), out, R, V, D);
  } else {
    logits(hidden, static_cast<const BFloat16*>(weight), out, R, V, D);
  }
}

void entkd_hidden_gradient(
    const BFloat16* gradient, const BFloat16* weight, float* out, int64_t R, int64_t V, int64_t D) {
  hidden_gradient(gradient, weight, out, R, V, D);
}

void entkd_weight_gradient(
    const BFloat16* gradient, const BFloat16* hidden, float* sum, int32_t add, int64_t R, int64_t V, int64_t D) {
  weight_gradient(gradient, hidden, sum, R, V, D, add != 0);
}

} // extern "C"
