// Attention over raw memory, split over threads: for attention.cpp, and for operators that contain an attention.
#pragma once
#include "dispatch.h"

namespace tinyllm::cpu {

// Writes a.out and a.lse.
void attention_forward(int dtype, const Attention& a);

// Writes a.grad_query, a.grad_key and a.grad_value.
void attention_backward(int dtype, const Attention& a);

}  // namespace tinyllm::cpu
