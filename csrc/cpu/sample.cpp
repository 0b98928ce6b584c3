// SPDX-License-Identifier: Apache-2.0
// Split: one row at a time. A greedy row is read once; what a draw needs beyond that is made in the thread's own memory.
#include "vec.h"

namespace cpu {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr Index kFirstWidth = 1024;  // tokens ranked at first for top-p; nearly always enough

// The largest of a row, of equals the first; value -infinity where there is none, infinity where a NaN or infinity is in the row.
struct Peak {
  float value;
  Index place;
  bool finite() const { return value > -kInfinity && value < kInfinity; }
};

template <class T>
Peak peak(const T* x, Index width) {
  constexpr Index kChunk = 64 * kLanes;
  Peak best{-kInfinity, 0};
  for (Index start = 0; start < width; start += kChunk) {
    const Index stop = std::min(width, start + kChunk);
    Floats top = splat(-kInfinity);
    Ints below = splat(0) < kInfinity;
    Index i = start;
    for (; i + kLanes <= stop; i += kLanes) {
      const Floats v = load(x + i);
      below &= v < kInfinity;
      top = v > top ? v : top;
    }
    bool bad = false;
    for (int lane = 0; lane < kLanes; ++lane) bad |= !below[lane];
    float found = largest(top);
    for (; i < stop; ++i) {
      bad |= !(widen(x[i]) < kInfinity);
      found = std::max(found, widen(x[i]));
    }
    if (bad) return {kInfinity, 0};
    if (found > best.value) best = {found, start};
  }
  while (best.value > -kInfinity && widen(x[best.place]) != best.value) ++best.place;
  return best;
}

// Multiple of 2^-24 in [0, 1): Philox4x32-10, as in rocm_infer/ops/sample.py.
inline double uniform(uint64_t seed, uint64_t counter) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32), c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(c0) * 0xD2511F53u, b = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return (c0 >> 8) * 0x1p-24;
}

// The first `count` of `order` become the ids of the largest of x by falling value, equals by rising id.
template <class T>
void rank(const T* x, std::vector<int32_t>& order, Index count) {
  const auto before = [x](int32_t a, int32_t b) {
    const float left = widen(x[a]), right = widen(x[b]);
    return left > right || (left == right && a < b);
  };
  if (count < Index(order.size())) std::nth_element(order.begin(), order.begin() + count, order.end(), before);
  std::sort(order.begin(), order.begin() + count, before);
}

inline std::vector<int32_t> all_ids(Index count) {
  std::vector<int32_t> ids(count);
  for (Index i = 0; i < count; ++i) ids[i] = int32_t(i);
  return ids;
}

// Zeroes the weights of tokens that top-k and top-p leave out.
inline void keep_likeliest(const float* x, float* weight, Index width, Index top_k, float top_p) {
  std::vector<int32_t> order = all_ids(width);
  Index kept = top_k;
  for (Index ranked = top_k == width && top_p < 1 ? std::min(kFirstWidth, width) : top_k;; ranked = width) {
    rank(x, order, ranked);
    double total = 0, before = 0;
    for (Index i = 0; i < top_k; ++i) total += weight[ranked < top_k ? i : order[i]];
    for (kept = 0; kept < ranked && (kept == 0 || top_p >= 1 || before < top_p * total); ++kept) before += weight[order[kept]];
    if (kept < ranked || ranked >= top_k) break;
  }
  std::vector<float> values(kept);
  for (Index i = 0; i < kept; ++i) values[i] = weight[order[i]];
  std::fill(weight, weight + width, 0.0f);
  for (Index i = 0; i < kept; ++i) weight[order[i]] = values[i];
}

struct Draw {
  float temperature, top_p, min_p;
  Index top_k;
  double share;
};

inline Index draw(const float* x, float largest, Index width, Draw with) {
  float* weight = scratch<5>(width);
  by_vectors(width, [&](Index i, Index n) { store_some(weight + i, exp((load_some(x + i, n) - largest) / with.temperature), n); });
  const Index top_k = with.top_k > 0 && with.top_k < width ? with.top_k : width;
  if (top_k < width || with.top_p < 1) keep_likeliest(x, weight, width, top_k, with.top_p);
  const float least = std::min(with.min_p, 1.0f);
  double total = 0, sum = 0;
  for (Index i = 0; i < width; ++i) {
    if (weight[i] < least) weight[i] = 0;
    total += weight[i];
  }
  for (Index i = 0; i < width; ++i)
    if ((sum += weight[i]) > with.share * total) return i;
  return width - 1;
}

// What changes the logits of one row; absent parts are null.
struct Shape {
  const int32_t* counts;
  const uint8_t* seen;
  const float *presence, *frequency, *repetition, *bias;
  const int32_t* mask;

  bool changes() const { return repetition || (counts && (presence || frequency)) || bias || mask; }

  float operator()(float x, Index i) const {
    if (repetition && ((counts && counts[i]) || (seen && seen[i]))) x = x > 0 ? x / *repetition : x * *repetition;
    if (counts && frequency) x -= *frequency * float(counts[i]);
    if (counts && presence) x -= *presence * float(counts[i] > 0);
    if (bias) x += bias[i];
    return mask && !(mask[i / 32] >> (i % 32) & 1) ? -kInfinity : x;
  }
};

template <class T>
void log_probabilities(const T* x, float largest, Index width, Index id, Index count, float* logprob, Index* top_ids, float* tops) {
  double sum = 0;
  by_vectors(width, [&](Index i, Index n) {
    const Floats found = exp(load_some(x + i, n) - largest);
    for (Index lane = 0; lane < n; ++lane) sum += found[lane];
  });
  const double total = largest + std::log(sum);
  *logprob = float(widen(x[id]) - total);
  if (count == 0) return;
  std::vector<int32_t> order = all_ids(width);
  rank(x, order, count);
  for (Index i = 0; i < count; ++i) {
    top_ids[i] = order[i];
    tops[i] = float(widen(x[order[i]]) - total);
  }
}

template <class T>
void sample(Index* ids, float* logprob, Index* top_ids, float* top_logprobs, const T* logits, const float* temperature,
            const int32_t* top_k, const float* top_p, const float* min_p, const Index* seeds, const Index* counters,
            const int32_t* counts, const uint8_t* seen, const float* presence, const float* frequency, const float* repetition,
            const float* bias, const int32_t* mask, Index rows, Index vocab, Index num_logprobs) {
  const Index words = (vocab + 31) / 32, num_top = std::max<Index>(num_logprobs, 0);
  const auto at = [](auto* p, Index offset) { return p ? p + offset : p; };
  parallel(rows, 1.0 * rows * vocab, [&](Index row) {
    const T* raw = logits + row * vocab;
    const Shape shape{at(counts, row * vocab), at(seen, row * vocab), at(presence, row), at(frequency, row),
                      at(repetition, row),     at(bias, row * vocab), at(mask, row * words)};
    const Peak plain = peak(raw, vocab);
    Peak top = plain;
    const float* shaped = nullptr;
    if (shape.changes() || (temperature[row] > 0 && plain.finite())) {
      float* made = scratch<6>(vocab);
      by_vectors(vocab, [&](Index i, Index n) { store_some(made + i, load_some(raw + i, n), n); });
      for (Index i = 0; shape.changes() && i < vocab; ++i) made[i] = shape(made[i], i);
      if (shape.changes()) top = peak(made, vocab);
      shaped = made;
    }
    const bool valid = plain.finite() && top.finite();
    logprob[row] = std::numeric_limits<float>::quiet_NaN();
    std::fill_n(at(top_ids, row * num_top), num_top, -1);
    std::fill_n(at(top_logprobs, row * num_top), num_top, logprob[row]);
    ids[row] = valid ? top.place : -1;
    if (!valid) return;
    if (temperature[row] > 0)
      ids[row] = draw(shaped, top.value, vocab,
                      {temperature[row], top_p[row], min_p[row], top_k[row], uniform(uint64_t(seeds[row]), uint64_t(counters[row]))});
    if (num_logprobs >= 0)
      log_probabilities(raw, plain.value, vocab, ids[row], num_top, logprob + row, at(top_ids, row * num_top),
                        at(top_logprobs, row * num_top));
  });
}

}  // namespace cpu

EXPORT(sample)
