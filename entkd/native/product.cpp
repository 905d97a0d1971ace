// out = hidden · weightᵀ with bf16 operands, summed and kept in fp32.
//
// PyTorch's CPU products of bf16 tensors round their result to bf16; torch.mm(..., out_dtype=float32) is there for CUDA
// only. The kernel that it runs inside, oneDNN's batch-reduce GEMM, does write fp32, and this file calls it.

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <memory>

using c10::BFloat16;

namespace {

constexpr int64_t kVocabulary = 64; // rows of the weight in a panel: with a width of 576 it fills a sixth of an L2 cache
constexpr int64_t kTokens = 256;

inline uint32_t bits(BFloat16 value) {
  return value.x;
}

inline uint32_t bits(float value) {
  return c10::detail::round_to_nearest_even(value);
}

// hidden (R, D), weight (V, D) and out (R, V) are contiguous; D is even.
template <typename Weight>
void product(const BFloat16* hidden, const Weight* weight, float* out, int64_t R, int64_t V, int64_t D) {
  const int64_t panels = (V + kVocabulary - 1) / kVocabulary;
  at::parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
    // The instruction multiplies pairs of neighbours along D, so a panel is (D / 2, kVocabulary) pairs. An fp32 weight
    // is rounded on its way here, which saves a pass over a copy of it.
    const auto panel = std::make_unique<uint32_t[]>((D / 2) * kVocabulary);
    for (int64_t index = first; index < last; ++index) {
      const int64_t start = index * kVocabulary;
      const int64_t rows = std::min(kVocabulary, V - start);
      for (int64_t row = 0; row < rows; ++row) {
        const Weight* source = weight + (start + row) * D;
        for (int64_t pair = 0; pair < D / 2; ++pair) {
          panel[pair * kVocabulary + row] = bits(source[2 * pair]) | bits(source[2 * pair + 1]) << 16;
        }
      }
      for (int64_t token = 0; token < R; token += kTokens) {
        at::native::cpublas::brgemm(
            std::min(kTokens, R - token), rows, D, D, kVocabulary, V, /*add_C=*/false, hidden + token * D,
            reinterpret_cast<const BFloat16*>(panel.get()), out + token * V + start, /*is_vnni=*/true);
      }
    }
    at::native::cpublas::brgemm_release(/*is_vnni=*/true);
  });
}

} // namespace

extern "C" void entkd_product_bf16(
    const BFloat16* hidden, const BFloat16* weight, float* out, int64_t R, int64_t V, int64_t D) {
  product(hidden, weight, out, R, V, D);
}

extern "C" void entkd_product_fp32(
    const BFloat16* hidden, const float* weight, float* out, int64_t R, int64_t V, int64_t D) {
  product(hidden, weight, out, R, V, D);
}
