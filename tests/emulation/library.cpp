// The schemas of the emulated library: those of the real one, in a namespace of their own, for CPU tensors.
#include <torch/csrc/stable/library.h>

#include "../../csrc/schemas.h"

STABLE_TORCH_LIBRARY(tinyllm_host, m) { tinyllm::define_operators(m); }
