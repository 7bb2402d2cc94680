// Draws a token from logits, in the order of Hugging Face's generation: repetition penalty (Keskar et al. 2019),
// temperature, top-k (Fan et al. 2018), top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024). The token is that at
// which the cumulative distribution of the kept tokens, in the order of their ids, passes a number drawn before.
#include "draw.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "dispatch.h"

namespace tinyllm::cpu {
namespace {

// The largest of n numbers; NaN if one of them is.
float largest(const float* x, int64_t n) {
  constexpr int64_t kLanes = 16;
  constexpr float inf = std::numeric_limits<float>::infinity();
  float most[kLanes], rest = 0.0f;
  std::fill(most, most + kLanes, -inf);
  for (int64_t i = 0; i < n; i += kLanes)
    for (int64_t j = 0; j < std::min(kLanes, n - i); ++j) {
      most[j] = x[i + j] > most[j] ? x[i + j] : most[j];
      rest += x[i + j] != x[i + j] ? 1.0f : 0.0f;
    }
  return rest > 0 ? std::numeric_limits<float>::quiet_NaN() : *std::max_element(most, most + kLanes);
}

}  // namespace

void draw(Draw& d) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  int64_t n = d.classes;
  float* const x = d.scores;
  d.token = -1;
  float most = largest(d.logits, n);
  if (!(most < inf)) return;
  std::copy_n(d.logits, n, x);
  const double log_sum = std::log(kernels().exponentials(x, n, most));
  std::copy_n(d.logits, n, x);
  const auto found = [&, most](int64_t token) {
    d.token = token;
    d.log_prob = static_cast<float>(static_cast<double>(d.logits[token] - most) - log_sum);
  };
  n = d.ids_below;
  if (d.seen != nullptr)
    for (int64_t i = 0; i < n; ++i)
      if (d.seen[i]) x[i] = static_cast<float>(x[i] < 0 ? x[i] * d.repetition_penalty : x[i] / d.repetition_penalty);
  if (d.suppress_id >= 0 && d.suppress_id < n) x[d.suppress_id] = -inf;
  most = largest(x, n);
  if (!(most > -inf && most < inf)) return;  // none is left, or the penalty made one infinite
  if (d.temperature == 0) return found(std::find(x, x + n, most) - x);
  // The largest is subtracted first: divided by a small temperature it would overflow.
  if (d.temperature > 1e-30 && d.temperature < 1e30) {
    const float inverse = static_cast<float>(1 / d.temperature);
    for (int64_t i = 0; i < n; ++i) x[i] = (x[i] - most) * inverse;
  } else {
    for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>(static_cast<double>(x[i] - most) / d.temperature);
  }

  // The kept tokens with their probabilities, up to a factor: all, or those in `kept`, by falling probability, where
  // equal ones are in the order of their ids.
  std::vector<int32_t> kept;
  const auto likelier = [x](int32_t a, int32_t b) { return x[a] != x[b] ? x[a] > x[b] : a < b; };
  const int64_t k = d.top_k > 0 ? std::min(d.top_k, n) : n;
  const auto keep = [&](int64_t count) {
    kept.clear();
    if (count > n / 8) {
      kept.resize(static_cast<size_t>(n));
      std::iota(kept.begin(), kept.end(), 0);
      std::nth_element(kept.begin(), kept.begin() + count - 1, kept.end(), likelier);
      kept.resize(static_cast<size_t>(count));
    } else {  // a heap whose top is the least likely: few tokens pass it
      for (int32_t i = 0; i < count; ++i) kept.push_back(i);
      std::make_heap(kept.begin(), kept.end(), likelier);
      float least = x[kept[0]];
      for (int32_t i = static_cast<int32_t>(count); i < n; ++i) {
        if (x[i] <= least) continue;
        std::pop_heap(kept.begin(), kept.end(), likelier);
        kept.back() = i;
        std::push_heap(kept.begin(), kept.end(), likelier);
        least = x[kept[0]];
      }
    }
    std::sort(kept.begin(), kept.end(), likelier);
  };
  const bool all = k == n && d.top_p >= 1;
  if (k < n) keep(k);
  double total = 0;
  if (all) {
    total = kernels().exponentials(x, n, 0.0f);
  } else if (k == n) {  // top-p alone: the likeliest tokens usually suffice
    std::vector<float> weights(x, x + n);
    total = kernels().exponentials(weights.data(), n, 0.0f);
    for (int64_t count = std::min<int64_t>(n, 256);; count = std::min(n, 16 * count)) {
      keep(count);
      double sum = 0;
      for (const int32_t i : kept) sum += static_cast<double>(weights[static_cast<size_t>(i)]);
      if (sum >= d.top_p * total || count == n) break;
    }
    std::copy(weights.begin(), weights.end(), x);
  } else {
    for (const int32_t i : kept) {
      x[i] = std::exp(x[i]);
      total += static_cast<double>(x[i]);
    }
  }
  if (!all && d.top_p < 1) {
    double before = 0;
    size_t count = 0;
    while (count < kept.size() && (count == 0 || before < d.top_p * total))
      before += static_cast<double>(x[kept[count++]]);
    kept.resize(count);
  }
  const float least = static_cast<float>(d.min_p);  // the likeliest token has exp(0) = 1
  const auto weight = [&](int64_t i) { return x[i] >= least ? static_cast<double>(x[i]) : 0.0; };
  const auto choose = [&](int64_t count, const auto& id_of) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += weight(id_of(i));
    const double wanted = d.uniform * sum;
    double cumulative = 0;
    int64_t last = -1;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t id = id_of(i);
      if (weight(id) == 0) continue;
      cumulative += weight(id);
      last = id;
      if (cumulative > wanted) break;
    }
    return last;
  };
  if (all) return found(choose(n, [](int64_t i) { return i; }));
  std::sort(kept.begin(), kept.end());
  found(choose(static_cast<int64_t>(kept.size()), [&](int64_t i) { return kept[static_cast<size_t>(i)]; }));
}

}  // namespace tinyllm::cpu
