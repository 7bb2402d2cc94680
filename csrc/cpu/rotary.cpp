// rotary_embedding on the CPU: checks, allocation, and distribution over threads. The arithmetic is in rotary_kernel.h.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../norm_checks.h"
#include "torch_side.h"

namespace tinyllm::cpu {
namespace {

// Cosines or sines, (B or 1, T, rotated), in the compute type.
Tensor angles(const char* op, const char* name, const Tensor& t, const Tensor& query) {
  check_device(op, name, t, query);
  const int64_t columns = t.dim() == 3 ? t.size(2) : 0;
  if (t.dim() != 3 || (t.size(0) != 1 && t.size(0) != query.size(0)) || t.size(1) != query.size(2) ||
      columns % 2 != 0 || columns > query.size(3))
    fail(op, ": ", name, " has shape ", shape_of(t), "; [", query.size(0), " or 1, ", query.size(2),
         ", an even number up to ", query.size(3), "] is needed");
  const ScalarType compute = compute_dtype(query.scalar_type());
  return as_contiguous(t.scalar_type() == compute ? t : torch::stable::to(t, compute));
}

Tensor rotate(const char* op, const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  const Tensor from = x.stride(3) == 1 || x.size(3) <= 1 ? x : torch::stable::contiguous(x);
  const Tensor out = empty_heads(x, x.size(0), x.size(1), x.size(2), x.size(3));
  Rotary a{strided(from), strided(out), x.size(1), x.size(2), x.size(3), cos.size(2)};
  a.cos = data_of(cos);
  a.sin = data_of(sin);
  a.angle_row = cos.size(2);
  a.angle_batch = cos.size(0) == 1 ? 0 : cos.size(1) * cos.size(2);
  a.inverse = inverse;
  const auto kernel = kernels().rotary[dtype_of(op, x)];
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, x.size(1) * x.size(3)));
  torch::stable::parallel_for(0, x.size(0) * x.size(2), grain,
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> rotate_both(const char* op, const Tensor& query, const Tensor& key, const Tensor& cos,
                                       const Tensor& sin, bool inverse) {
  if (query.dim() != 4 || key.dim() != 4)
    fail(op, ": query and key must have 4 dimensions, not ", query.dim(), " and ", key.dim());
  check_device(op, "key", key, query);
  check_dtype(op, "key", key, query.scalar_type());
  check_shape(op, "key", key, {query.size(0), key.size(1), query.size(2), query.size(3)});
  const Tensor c = angles(op, "cos", cos, query), s = angles(op, "sin", sin, query);
  check_shape(op, "sin", s, c.sizes());
  return {rotate(op, query, c, s, inverse), rotate(op, key, c, s, inverse)};
}

std::tuple<Tensor, Tensor> rotary_embedding_fwd(Tensor query, Tensor key, Tensor cos, Tensor sin) {
  return rotate_both("rotary_embedding", query, key, cos, sin, false);
}

std::tuple<Tensor, Tensor> rotary_embedding_bwd(Tensor grad_query, Tensor grad_key, Tensor cos, Tensor sin) {
  return rotate_both("rotary_embedding_bwd", grad_query, grad_key, cos, sin, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tinyllm, CPU, m) {
  m.impl("rotary_embedding_fwd", TORCH_BOX(&rotary_embedding_fwd));
  m.impl("rotary_embedding_bwd", TORCH_BOX(&rotary_embedding_bwd));
}

}  // namespace tinyllm::cpu
