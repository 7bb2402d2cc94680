// Attention over raw memory, distributed over threads, for attention.cpp and for operators that contain attention.
#pragma once
#include "dispatch.h"

namespace tinyllm::cpu {

// Writes a.out and a.lse, by whichever kernel suits the shapes.
void attention_forward(DType dtype, const Attention& a);

// The same by blocks of queries, whatever the shapes: what a sequence gets does not depend on how long others are.
void attention_in_blocks(DType dtype, Attention a);

// Writes a.grad_query, a.grad_key and a.grad_value.
void attention_backward(DType dtype, const Attention& a);

}  // namespace tinyllm::cpu
