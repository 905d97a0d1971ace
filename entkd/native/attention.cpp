// Gradients of causal attention of documents that lie behind one another, by products with fp32 sums of bf16 operands.
//
// With S = scale Q Kᵀ, P = exp(S - logsumexp) and dS = P (dO Vᵀ - dO · out): dV = Pᵀ dO, dK = scale dSᵀ Q and
// dQ = scale dS K, all computed transposed, with a row for every key: Pᵀ and dSᵀ are left operands as they come then,
// and to pair neighbouring rows of dSᵀ, which makes it a right operand, is cheap.
//
// H heads, G heads of the keys, R = H / G, D width, W = D up to a multiple of 32. The C columns are some queries of all
// heads that share keys. Tiles of AMX are whole, with zeros in the rest: for others brgemm changes the shape of its
// tiles within each product. It also compiles code for each shape of products in each thread, so there are few of them.

#include "simd.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <vector>

using at::native::cpublas::brgemm;
using at::native::cpublas::brgemm_release;
using entkd::BFloat16;
using entkd::first_lanes;
using entkd::kLanes;
using entkd::numbers;

namespace {

constexpr int64_t kTile = 32; // rows of AMX
constexpr int64_t kColumns = 96; // at most, but a tile of queries; with more of them, more keys are of no use to some
constexpr int64_t kKeys = 128; // at a time: what goes from product to product stays in the cache

inline int64_t whole_tiles(int64_t count) {
  return (count + kTile - 1) / kTile * kTile;
}

struct Input {
  const BFloat16* data;
  int64_t per_token, per_head;

  const BFloat16* at(int64_t token, int64_t head) const {
    return data + token * per_token + head * per_head;
  }
};

struct Output { // (tokens, heads, D)
  void* data;
  int32_t type; // 0 fp32, 1 bf16
  int64_t heads, D;

  // Writes factor · source.
  void write(int64_t token, int64_t head, const float* source, float factor) const {
    const int64_t start = (token * heads + head) * D;
    for (int64_t d = 0; d < D; d += kLanes) {
      const __mmask16 lanes = first_lanes(D - d);
      const __m512 x = _mm512_mul_ps(_mm512_set1_ps(factor), _mm512_maskz_loadu_ps(lanes, source + d));
      if (type == 0) {
        entkd::store(static_cast<float*>(data) + start + d, lanes, x);
      } else {
        entkd::store(static_cast<BFloat16*>(data) + start + d, lanes, x);
      }
    }
  }
};

struct Problem {
  Input query, key, value, out, gradient;
  const float* logsumexp; // (H, Q)
  Output of_query, of_key, of_value;
  float scale;
  int64_t R, Q, D;
};

struct Document {
  int64_t queries, first_query, keys, first_key;
  const int64_t* at; // the last of its keys that each query sees
};

// Σ x y of D numbers
float dot(const BFloat16* x, const BFloat16* y, int64_t D) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t d = 0; d < D; d += kLanes) {
    const __mmask16 lanes = first_lanes(D - d);
    sum = _mm512_mask3_fmadd_ps(entkd::load(x + d, lanes), entkd::load(y + d, lanes), sum, lanes);
  }
  return _mm512_reduce_add_ps(sum);
}

// The tokens of a head as rows (count, W), with zeros behind the D numbers of each and behind the `given` tokens.
void gather(const Input& x, int64_t token, int64_t head, int64_t given, int64_t count, int64_t D, BFloat16* rows) {
  const int64_t W = whole_tiles(D);
  std::fill(rows + given * W, rows + count * W, BFloat16());
  for (int64_t i = 0; i < given; ++i) {
    std::copy_n(x.at(token + i, head), D, rows + i * W);
    std::fill(rows + i * W + D, rows + (i + 1) * W, BFloat16());
  }
}

// Takes a document and a head of its keys at a time. Nobody else writes what it writes, nor sums it in another order.
class Worker {
 public:
  explicit Worker(const Problem& problem)
      : p(problem),
        W(whole_tiles(p.D)),
        queries(kTile * std::max<int64_t>(1, kColumns / kTile / p.R)),
        C(queries * p.R),
        rows(C * W), paired_query(C * W / 2), query_columns(C * W / 2), paired_gradient(C * W / 2),
        gradient_columns(C * W / 2), logsumexp(C), mean(C), at(C), logits(kKeys * C), of_p(kKeys * C),
        probability(kKeys * C), of_logits(kKeys * C), paired_of_logits(kKeys / 2 * C), of_query(W * C),
        turned(kLanes * W) {}

  void run(const Document& document, int64_t g) {
    gather_keys(document, g);
    for (int64_t query = 0; query < document.queries; query += queries) {
      const int64_t count = std::min(queries, document.queries - query);
      gather_queries(document, g, query, count);
      const int64_t seen = whole_tiles(std::min(document.keys, document.at[query + count - 1] + 1));
      for (int64_t first = 0; first < seen; first += kKeys) {
        add_products(first, std::min(kKeys, seen - first));
      }
      write_queries(document, g, query, count);
    }
    for (int64_t k = 0; k < document.keys; ++k) {
      p.of_key.write(document.first_key + k, g, of_key.data() + k * W, p.scale);
      p.of_value.write(document.first_key + k, g, of_value.data() + k * W, 1.0f);
    }
  }

 private:
  void gather_keys(const Document& document, int64_t g) {
    const int64_t count = whole_tiles(document.keys);
    key.resize(count * W);
    value.resize(count * W);
    transposed_key.resize((count + kKeys - 1) / kKeys * kKeys / 2 * W);
    of_key.assign(count * W, 0.0f);
    of_value.assign(count * W, 0.0f);
    gather(p.key, document.first_key, g, document.keys, count, p.D, key.data());
    gather(p.value, document.first_key, g, document.keys, count, p.D, value.data());
    for (int64_t first = 0; first < count; first += kKeys) { // (W, kKeys) each: a length of rows is part of a shape
      const int64_t some = std::min(kKeys, count - first);
      uint32_t* columns = transposed_key.data() + first / 2 * W;
      entkd::transpose_columns(key.data() + first * W, some, W, W, columns, kKeys / 2);
    }
  }

  void gather_queries(const Document& document, int64_t g, int64_t query, int64_t count) {
    const int64_t token = document.first_query + query;
    const auto paired = [&](const Input& x, std::vector<uint32_t>& by_row, std::vector<uint32_t>& by_column) {
      for (int64_t r = 0; r < p.R; ++r) {
        gather(x, token, g * p.R + r, count, queries, p.D, rows.data() + r * queries * W);
      }
      entkd::pair_rows(rows.data(), C, W, by_row.data());
      entkd::pair_columns(rows.data(), C, W, by_column.data(), C);
    };
    paired(p.query, paired_query, query_columns);
    paired(p.gradient, paired_gradient, gradient_columns);
    std::fill(of_query.begin(), of_query.end(), 0.0f);
    for (int64_t column = 0; column < C; ++column) {
      const int64_t head = g * p.R + column / queries, i = column % queries;
      const bool given = i < count;
      logsumexp[column] = given ? p.logsumexp[head * p.Q + token + i] : 0.0f;
      mean[column] = given ? dot(p.gradient.at(token + i, head), p.out.at(token + i, head), p.D) : 0.0f;
      at[column] = given ? static_cast<int32_t>(document.at[query + i]) : -1;
    }
  }

  // What the keys from `first` on and the gathered queries add to each other's gradients.
  void add_products(int64_t first, int64_t count) {
    const auto product = [](int64_t M, int64_t N, int64_t K, auto* a, int64_t per_row, auto& b, bool add, float* c) {
      brgemm(M, N, K, per_row, N, N, add, a, numbers(b.data()), c, /*is_vnni=*/true);
    };
    product(count, C, W, key.data() + first * W, W, query_columns, false, logits.data());
    product(count, C, W, value.data() + first * W, W, gradient_columns, false, of_p.data());
    for (int64_t k = 0; k < count; k += 2) {
      slopes(first, k);
    }
    product(count, W, C, probability.data(), C, paired_gradient, true, of_value.data() + first * W);
    product(count, W, C, of_logits.data(), C, paired_query, true, of_key.data() + first * W);
    const BFloat16* key_columns = numbers(transposed_key.data() + first / 2 * W);
    product(W, C, count, key_columns, kKeys, paired_of_logits, true, of_query.data());
  }

  // Probabilities and gradients of logits of two neighbouring keys, 0 where a query does not see them.
  void slopes(int64_t first, int64_t k) {
    const __m512 scale = _mm512_set1_ps(p.scale);
    for (int64_t c = 0; c < C; c += 2 * kLanes) {
      __m512i of_both[2];
      for (int64_t row = 0; row < 2; ++row) {
        const __m512i own = _mm512_set1_epi32(static_cast<int32_t>(first + k + row));
        const int64_t start = (k + row) * C;
        __m512 exact[2], slope[2];
        for (int64_t half = 0; half < 2; ++half) {
          const int64_t column = c + half * kLanes, i = start + column;
          const __mmask16 sees = _mm512_cmp_epi32_mask(_mm512_loadu_si512(at.data() + column), own, _MM_CMPINT_NLT);
          const __m512 below = _mm512_fmsub_ps(
              scale, _mm512_loadu_ps(logits.data() + i), _mm512_loadu_ps(logsumexp.data() + column));
          exact[half] = _mm512_maskz_mov_ps(sees, entkd::exp(below));
          const __m512 excess = _mm512_sub_ps(_mm512_loadu_ps(of_p.data() + i), _mm512_loadu_ps(mean.data() + column));
          slope[half] = _mm512_maskz_mul_ps(sees, exact[half], excess);
        }
        const __m512i of_row = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(slope[1], slope[0]));
        _mm512_storeu_si512(
            probability.data() + start + c, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(exact[1], exact[0])));
        _mm512_storeu_si512(of_logits.data() + start + c, of_row);
        of_both[row] = of_row;
      }
      uint32_t* pairs = paired_of_logits.data() + k / 2 * C + c;
      _mm512_storeu_si512(pairs, entkd::zip(of_both[0], of_both[1], 0));
      _mm512_storeu_si512(pairs + kLanes, entkd::zip(of_both[0], of_both[1], kLanes));
    }
  }

  void write_queries(const Document& document, int64_t g, int64_t query, int64_t count) {
    for (int64_t r = 0; r < p.R; ++r) {
      for (int64_t first = 0; first < count; first += kLanes) {
        for (int64_t d = 0; d < W; d += kLanes) {
          __m512i block[16];
          for (int i = 0; i < 16; ++i) {
            block[i] = _mm512_loadu_si512(of_query.data() + (d + i) * C + r * queries + first);
          }
          entkd::transpose(block);
          for (int i = 0; i < 16; ++i) {
            _mm512_storeu_si512(turned.data() + i * W + d, block[i]);
          }
        }
        for (int64_t i = 0; i < std::min(kLanes, count - first); ++i) {
          const int64_t token = document.first_query + query + first + i;
          p.of_query.write(token, g * p.R + r, turned.data() + i * W, p.scale);
        }
      }
    }
  }

  const Problem& p;
  const int64_t W, queries, C;
  std::vector<BFloat16> rows, key, value;
  std::vector<uint32_t> paired_query, paired_gradient, query_columns, gradient_columns, transposed_key;
  std::vector<float> logsumexp, mean;
  std::vector<int32_t> at;
  std::vector<float> logits, of_p;
  std::vector<BFloat16> probability, of_logits;
  std::vector<uint32_t> paired_of_logits;
  std::vector<float> of_query, turned, of_key, of_value;
};

} // namespace

extern "C" {

// Inputs are bf16 with neighbouring numbers of a head next to one another; `strides` has two of each, by token and by
// head: query, key, value, out, gradient. Outputs are contiguous (tokens, heads, D), and what belongs to no document is
// left as it is. A document is (first query, queries, first key, keys); `at` has the numbers of all their queries,
// ascending within a document: the last of its keys that each sees.
void entkd_attention_gradient(
    const BFloat16* query, const BFloat16* key, const BFloat16* value, const BFloat16* out, const BFloat16* gradient,
    const int64_t* strides, const float* logsumexp, const int64_t* documents, const int64_t* at, void* of_query,
    int32_t query_type, void* of_key, int32_t key_type, void* of_value, int32_t value_type, float scale, int64_t N,
    int64_t H, int64_t G, int64_t Q, int64_t D) {
  const auto input = [&](const BFloat16* data, int64_t i) { return Input{data, strides[2 * i], strides[2 * i + 1]}; };
  const Problem problem{
      input(query, 0), input(key, 1), input(value, 2), input(out, 3), input(gradient, 4), logsumexp,
      {of_query, query_type, H, D}, {of_key, key_type, G, D}, {of_value, value_type, G, D}, scale, H / G, Q, D};
  std::vector<Document> each(N);
  for (int64_t n = 0; n < N; ++n) {
    const int64_t* row = documents + 4 * n;
    each[n] = Document{row[1], row[0], row[3], row[2], at};
    at += row[1];
  }
  std::atomic<int64_t> next = 0; // documents are of different lengths: whoever is free takes the next
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), N * G), 1, [&](int64_t, int64_t) {
    Worker worker(problem);
    for (int64_t task = next++; task < N * G; task = next++) {
      worker.run(each[task / G], task % G);
    }
    brgemm_release(/*is_vnni=*/true);
  });
}

} // extern "C"
