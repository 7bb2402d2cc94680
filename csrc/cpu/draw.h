// Drawing a token from the logits of a row.
#pragma once
#include <cstdint>

namespace tinyllm::cpu {

struct Draw {
  const float* logits;
  int64_t classes;
  double temperature;  // 0: the likeliest
  int64_t top_k;       // 0: all
  double top_p, min_p, repetition_penalty;
  int64_t suppress_id;  // -1: none
  int64_t ids_below;    // only these are drawn; at least 1, at most classes
  const bool* seen;     // (classes): the tokens that repetition_penalty applies to; null: none
  double uniform;       // in [0, 1): selects the token
  float* scores;        // memory for `classes` floats

  // The results.
  int64_t token;   // -1 if the logits are not finite, or none is left
  float log_prob;  // of the model itself, at temperature 1
};

void draw(Draw& d);

}  // namespace tinyllm::cpu
