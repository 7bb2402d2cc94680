// Transformer blocks as one operator forward and one backward, for models so small that calls of separate operators
// would take longer than their work; of the first parameter's dtype, float or double:
//
//   a whole model:  ids (B, T) -> rows of the table + positions -> blocks -> [norm] -> output -> logits (B, T, V')
//                   [-> mean loss]
//   blocks alone:   input (B, T, D) -> blocks -> (B, T, D)
//
// The list of parameters: table (V, D); for each block the weights of query, key, value, out_proj (only with several
// heads), linear1, linear2, norm1 and norm2, then, if there are biases, those in the same order; if norm_first, the
// final norm's weight; output's weight (V', D); the last two with their biases behind them where the blocks have
// biases, but the output's may then be left out. For blocks alone it is theirs alone.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "embedding.h"
#include "losses.h"
#include "random.h"
#include "transformer_block.h"

namespace tinyllm::cpu {
namespace {

// The arguments of a call, checked.
struct Model {
  bool whole, output_bias;
  BlockSizes settings;  // of all blocks, without hidden
  std::vector<BlockSizes> blocks;
  int64_t rows, width, vocab_size, classes;
  ScalarType dtype;
  Tensor input;  // ids as contiguous int64, or vectors
  std::optional<Tensor> positions;
  std::optional<Targets> targets;
  std::vector<Tensor> parameters;  // contiguous

  std::vector<int64_t> out_shape() const {
    if (targets) return {};
    return {settings.batch, settings.tokens, whole ? classes : width};
  }
};

template <class P>
struct Parameters {
  P table;
  std::vector<BlockParameters<P>> blocks;
  Affine<P> norm, output;

  // Calls f(parameter, extents) for each, in the order of the list.
  template <class F>
  void visit(const Model& m, const F& f) {
    if (m.whole) f(table, Extents(m.vocab_size, m.width));
    blocks.resize(m.blocks.size());
    for (size_t l = 0; l < blocks.size(); ++l) blocks[l].visit(m.blocks[l], f);
    if (!m.whole) return;
    const auto both = [&](Affine<P>& p, const Extents& extents, bool bias) {
      f(p.weight, extents);
      if (bias) f(p.bias, extents.of_bias());
    };
    if (m.settings.norm_first) both(norm, Extents(m.width), m.settings.bias);
    both(output, {m.classes, m.width}, m.output_bias);
  }
};

int64_t first_size(const Tensor& t) { return t.dim() > 0 ? t.size(0) : 0; }

Model prepare(const char* op, const Tensor& input, std::vector<Tensor> parameters,
              const std::optional<Tensor>& positions, const std::optional<Tensor>& target, int64_t num_layers,
              int64_t num_heads, bool causal, bool norm_first, const std::string& activation, double eps1, double eps2,
              double dropout_p, const std::optional<Tensor>& rng) {
  if (parameters.empty()) fail(op, ": there are no parameters");
  Model m{};
  m.whole = input.scalar_type() == ScalarType::Long || input.scalar_type() == ScalarType::Int;
  const Tensor first = m.whole ? parameters[0] : input;
  m.dtype = first.scalar_type();
  const DType dtype = dtype_of(op, first);
  if (dtype != DType::f32 && dtype != DType::f64)
    fail(op, ": the dtype is ", torch::headeronly::toString(m.dtype), "; float or double is needed");
  if (input.dim() != (m.whole ? 2 : 3))
    fail(op, ": input has shape ", shape_of(input), m.whole ? "; (B, T) is needed" : "; (B, T, D) is needed");
  if (m.whole && first.dim() != 2) fail(op, ": the first parameter has shape ", shape_of(first), "; (V, D) is needed");
  if (num_layers < (m.whole ? 0 : 1))
    fail(op, ": num_layers is ", num_layers, "; it must be at least ", m.whole ? 0 : 1);
  if (!m.whole && (positions || target)) fail(op, ": blocks alone take neither positions nor target");
  m.vocab_size = m.whole ? first.size(0) : 0;
  m.width = m.whole ? first.size(1) : input.size(2);
  if (num_heads < 1 || m.width % num_heads != 0 || m.width / num_heads > 1024)
    fail(op, ": num_heads is ", num_heads, "; it must divide D, ", m.width, ", into at most 1024 columns");
  if (activation == "none") fail(op, ": activation is 'none'; relu, gelu, gelu_tanh or silu is needed");
  BlockSizes& s = m.settings;
  s = {input.size(0),
       input.size(1),
       input.size(0) * input.size(1),
       m.width,
       0,
       num_heads,
       num_heads > 1,
       false,
       causal,
       norm_first,
       parse_activation(op, activation),
       dtype,
       eps1,
       eps2,
       dropout_state(op, rng, dropout_p)};
  m.rows = s.rows;

  const int64_t given = static_cast<int64_t>(parameters.size()), table = m.whole ? 1 : 0;
  const int64_t without = num_layers * s.parameters() + (m.whole ? (norm_first ? 2 : 1) : 0);
  const int64_t all = table + 2 * without;
  m.output_bias = m.whole && given == all;
  s.bias = given == all || (m.whole && given == all - 1 && without > 1);
  if (!s.bias && given != table + without)
    fail(op, ": there are ", given, " parameters; ", table + without, " or ", all, " are needed",
         m.whole ? ", the output's bias being optional" : "");
  m.blocks.assign(num_layers, s);
  for (int64_t l = 0; l < num_layers; ++l) {
    m.blocks[l].hidden = first_size(parameters[table + l * s.parameters() + (s.projected ? 4 : 3)]);
    m.blocks[l].dropout.offset += 1 + BlockSizes::kDropouts * static_cast<uint64_t>(l);  // the embedding's is the first
  }
  m.classes = m.whole ? first_size(parameters[given - (m.output_bias ? 2 : 1)]) : 0;
  m.parameters = std::move(parameters);
  size_t index = 0;
  Parameters<const void*>().visit(m, [&](const void*, const Extents& extents) {
    Tensor& t = m.parameters[index];
    if (!t.is_cpu()) fail(op, ": parameter ", index, " is not on the CPU, where the others are");
    check_dtype(op, "a parameter", t, m.dtype);
    if (!same_shape(t.sizes(), extents.shape()))
      fail(op, ": parameter ", index, " has shape ", shape_of(t), ", which does not fit the others");
    t = as_contiguous(t);
    ++index;
  });

  m.input = m.whole ? checked_ids(op, input, first, m.vocab_size) : as_contiguous(input);
  if (positions) {
    check_device(op, "positions", *positions, first);
    check_dtype(op, "positions", *positions, m.dtype);
    check_shape(op, "positions", *positions, {s.tokens, m.width});
    m.positions = as_contiguous(*positions);
  }
  if (target) m.targets = read_targets(op, first, *target, std::nullopt, m.rows, m.classes, kIgnoreIndex);
  return m;
}

Parameters<const void*> data_of_parameters(const Model& m) {
  Parameters<const void*> found{};
  auto next = m.parameters.begin();
  found.visit(m, [&](const void*& at, const Extents&) { at = data_of(*next++); });
  return found;
}

// The activations that forward saves for backward. If nothing is saved, all layers use the same memory.
template <class S>
struct Saved {
  std::vector<S*> streams;  // what each block takes, and what the last one gives: blocks alone have neither end
  std::vector<BlockSaved<S>> blocks;
  S *features, *mean, *rstd;  // of the final norm
  S* grad_logits;             // of the mean loss

  Saved(const Model& m, bool save, TypedArena<S>& arena) {
    const int64_t size = m.rows * m.width;
    streams.reserve(m.blocks.size() + 1);
    blocks.reserve(m.blocks.size());
    S* const common = save ? nullptr : arena.take(size);
    int64_t most = arena.used();
    for (size_t l = 0; l <= m.blocks.size(); ++l) {
      const bool outside = !m.whole && (l == 0 || l == m.blocks.size());
      streams.push_back(outside ? nullptr : save ? arena.take(size) : common);
      if (l == m.blocks.size()) break;
      TypedArena<S> shared = arena;
      blocks.emplace_back(m.blocks[l], save ? arena : shared);
      most = std::max(most, shared.used());
    }
    if (!save) arena.take(most - arena.used());
    const bool norm = m.whole && m.settings.norm_first;
    features = norm ? arena.take(size) : streams.back();
    mean = norm ? arena.take(m.rows) : nullptr;
    rstd = norm ? arena.take(m.rows) : nullptr;
    grad_logits = save && m.targets ? arena.take(m.rows * m.classes) : nullptr;
  }
};

template <class S>
int64_t saved_size(const Model& m, bool save) {
  TypedArena<S> sizes;
  Saved<S>(m, save, sizes);
  return sizes.used();
}

// Returns the mean loss of the logits, and writes their gradient unless `grad` is null.
template <class S>
S mean_loss(const Model& m, const S* logits, S* grad) {
  const Scratch scratch(static_cast<size_t>(3 * m.rows) * sizeof(S));
  S* const losses = reinterpret_cast<S*>(scratch.data());
  CrossEntropy args{};
  args.input = logits;
  args.target = m.targets->data();
  args.weight_sum = m.targets->weight_sum;
  args.classes = m.classes;
  args.ignore_index = kIgnoreIndex;
  args.loss = losses;
  args.max_and_sum = losses + m.rows;
  args.grad_input = grad;
  args.scale = 1.0 / m.targets->divisor;
  const auto kernel = kernels().cross_entropy_fwd[m.settings.dtype];
  torch::stable::parallel_for(0, m.rows, std::max<int64_t>(1, 8192 / std::max<int64_t>(1, m.classes)),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return static_cast<S>(sum_of_rows(losses, m.rows) / m.targets->divisor);
}

template <class S>
void forward(const Model& m, const Saved<S>& saved, S* out) {
  const DType dtype = m.settings.dtype;
  const Parameters<const void*> w = data_of_parameters(m);
  const S* x = static_cast<const S*>(data_of(m.input));
  if (m.whole) {
    embedding_forward(
        dtype,
        {w.table, static_cast<const int64_t*>(data_of(m.input)), m.positions ? data_of(*m.positions) : nullptr,
         saved.streams[0], m.width, std::max<int64_t>(1, m.settings.tokens), m.settings.dropout},
        m.rows);
    x = saved.streams[0];
  }
  for (size_t l = 0; l < m.blocks.size(); ++l) {
    S* const y = !m.whole && l + 1 == m.blocks.size() ? out : saved.streams[l + 1];
    block_forward<S>(m.blocks[l], w.blocks[l], x, y, saved.blocks[l]);
    x = y;
  }
  if (!m.whole) return;
  if (m.settings.norm_first)
    norm_forward<S>(dtype, w.norm, m.settings.eps1, x, nullptr, m.rows, m.width, saved.features, nullptr, saved.mean,
                    saved.rstd);
  const Scratch scratch(m.targets ? static_cast<size_t>(m.rows * m.classes) * sizeof(S) : 0);
  S* const logits = m.targets ? reinterpret_cast<S*>(scratch.data()) : out;
  run_matmuls(dtype, {linear_layer(w.output, saved.features, m.rows, m.width, m.classes, logits)});
  if (m.targets) *out = mean_loss(m, logits, saved.grad_logits);
}

// grad_added: where the gradient of positions, or of the input of blocks alone, goes; positions' may be null.
template <class S>
void backward(const Model& m, const Saved<S>& saved, const S* grad, const Parameters<void*>& g, S* grad_added) {
  const DType dtype = m.settings.dtype;
  const int64_t size = m.rows * m.width, logits = m.targets ? m.rows * m.classes : 0;
  const Parameters<const void*> w = data_of_parameters(m);
  const Scratch scratch(static_cast<size_t>(2 * size + logits) * sizeof(S));
  S* buffer = reinterpret_cast<S*>(scratch.data());
  S* other = buffer + size;
  // Where the next part puts the gradient of its input, which may not be where that of its output is.
  const auto next = [&] {
    std::swap(buffer, other);
    return other;
  };
  if (m.targets) {
    S* const scaled = buffer + 2 * size;
    torch::stable::parallel_for(0, logits, 32768, [&](int64_t begin, int64_t end) {
      std::transform(saved.grad_logits + begin, saved.grad_logits + end, scaled + begin,
                     [&](S x) { return x * *grad; });
    });
    grad = scaled;
  }
  if (m.whole) {
    linear_layer_backward(dtype, grad, saved.features, m.rows, m.width, m.classes, g.output);
    S* to = next();
    run_matmuls(dtype, {linear_grad_input(grad, w.output.weight, m.rows, m.width, m.classes, to)});
    grad = to;
    if (m.settings.norm_first) {
      to = next();
      norm_backward<S>(dtype, grad, nullptr, saved.streams.back(), w.norm.weight, saved.mean, saved.rstd, m.rows,
                       m.width, to, g.norm);
      grad = to;
    }
  }
  for (size_t l = m.blocks.size(); l-- > 0;) {
    const bool first = !m.whole && l == 0;
    S* const to = first ? grad_added : next();
    block_backward<S>(m.blocks[l], w.blocks[l], first ? static_cast<const S*>(data_of(m.input)) : saved.streams[l],
                      grad, saved.blocks[l], to, g.blocks[l]);
    grad = to;
  }
  if (!m.whole) return;
  embedding_weight_grad(dtype, grad, static_cast<const int64_t*>(data_of(m.input)), m.rows, std::nullopt, g.table,
                        m.vocab_size, m.width, m.settings.dropout);
  if (grad_added != nullptr)
    embedding_positions_grad(dtype, grad, m.settings.batch, grad_added, m.settings.tokens, m.width, m.settings.dropout);
}

template <class F>
auto with_compute_type(const Model& m, F&& f) {
  return m.dtype == ScalarType::Double ? f(double{}) : f(float{});
}

std::tuple<Tensor, Tensor> transformer_fwd(Tensor input, std::vector<Tensor> parameters,
                                           std::optional<Tensor> positions, std::optional<Tensor> target,
                                           int64_t num_layers, int64_t num_heads, bool causal, bool norm_first,
                                           std::string activation, double eps1, double eps2, double dropout_p,
                                           std::optional<Tensor> rng, bool save) {
  const Model m = prepare("transformer", input, std::move(parameters), positions, target, num_layers, num_heads, causal,
                          norm_first, activation, eps1, eps2, dropout_p, rng);
  const Tensor out = empty(m.out_shape(), m.dtype);
  return with_compute_type(m, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using S = decltype(zero);
    const int64_t size = saved_size<S>(m, save);
    const Tensor saved = empty({save ? size : 0}, m.dtype);
    const Scratch scratch(save ? 0 : static_cast<size_t>(size) * sizeof(S));
    TypedArena<S> arena(save ? data_of(saved) : scratch.data());
    forward<S>(m, Saved<S>(m, save, arena), static_cast<S*>(data_of(out)));
    return {out, saved};
  });
}

std::tuple<std::vector<Tensor>, Tensor> transformer_bwd(Tensor grad, Tensor input, std::vector<Tensor> parameters,
                                                        std::optional<Tensor> positions, std::optional<Tensor> target,
                                                        Tensor saved, int64_t num_layers, int64_t num_heads,
                                                        bool causal, bool norm_first, std::string activation,
                                                        double eps1, double eps2, double dropout_p,
                                                        std::optional<Tensor> rng, bool positions_grad) {
  const char* const op = "transformer_bwd";
  const Model m = prepare(op, input, std::move(parameters), positions, target, num_layers, num_heads, causal,
                          norm_first, activation, eps1, eps2, dropout_p, rng);
  for (const auto& [name, t] : {std::pair{"grad", &grad}, std::pair{"saved", &saved}}) {
    check_device(op, name, *t, input);
    check_dtype(op, name, *t, m.dtype);
  }
  check_shape(op, "grad", grad, m.out_shape());
  if (!saved.is_contiguous()) fail(op, ": saved must be contiguous");
  const Tensor dy = as_contiguous(grad);
  std::vector<Tensor> grads;
  grads.reserve(m.parameters.size());
  Parameters<void*> g{};
  g.visit(m, [&](void*& at, const Extents& extents) {
    grads.push_back(empty(extents.shape(), m.dtype));
    at = data_of(grads.back());
  });
  std::vector<int64_t> shape{m.settings.tokens, m.width};
  if (!m.whole) shape.insert(shape.begin(), m.settings.batch);
  const bool wanted = positions_grad || !m.whole;
  const Tensor grad_added = empty(wanted ? shape : std::vector<int64_t>{0}, m.dtype);
  with_compute_type(m, [&](auto zero) {
    using S = decltype(zero);
    check_shape(op, "saved", saved, {saved_size<S>(m, true)});
    TypedArena<S> arena(data_of(saved));
    backward<S>(m, Saved<S>(m, true, arena), static_cast<const S*>(data_of(dy)), g,
                wanted ? static_cast<S*>(data_of(grad_added)) : nullptr);
  });
  return {grads, grad_added};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tinyllm, CPU, m) {
  m.impl("transformer_fwd", TORCH_BOX(&transformer_fwd));
  m.impl("transformer_bwd", TORCH_BOX(&transformer_bwd));
}

}  // namespace tinyllm::cpu
