// A whole language model as one operator for forward and one for backward, for models so small that calls of separate
// operators would take longer than their work:
//
//   ids (B, T) -> rows of the table + positions -> blocks -> [norm] -> output -> logits (B, T, V) [-> mean loss]
//
// The list of parameters is: table (V, D); for each block what transformer_block lists; the weight of the final norm if
// norm_first; the weight of output (V', D). If the blocks have biases, the last two are each followed by their bias.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "embedding.h"
#include "layer_norm.h"
#include "losses.h"
#include "scratch.h"
#include "transformer_block.h"

namespace tinyllm::cpu {
namespace {

struct Layer {
  BlockSizes sizes;
  BlockParameters<const void*> weights;
};

// The checked arguments of a call.
struct Model {
  BlockSizes settings;  // common to all layers
  std::vector<Layer> layers;
  int64_t rows, width, vocab_size, classes;
  double eps;
  ScalarType dtype;
  Tensor ids;
  std::optional<Tensor> added;  // positions
  std::optional<Targets> targets;
  Embedding embedding;
  const void *norm = nullptr, *norm_bias = nullptr;
  const void *output, *output_bias = nullptr;
};

struct Call {
  const char* op;
  Tensor input;
  std::vector<Tensor> parameters;
  std::optional<Tensor> positions, target;
  int64_t num_layers, num_heads;
  bool causal, norm_first;
  std::string activation;
  double eps;
};

Model prepare(Call& call) {
  const char* const op = call.op;
  std::vector<Tensor>& parameters = call.parameters;
  if (parameters.empty()) fail(op, ": there are no parameters");
  if (call.input.dim() != 2) fail(op, ": input has shape ", shape_of(call.input), "; (B, T) is needed");
  if (call.num_layers < 0) fail(op, ": num_layers is ", call.num_layers, "; it must not be negative");
  const Tensor table = parameters[0];
  const DType dtype = dtype_of(op, table);
  if (dtype != DType::f32 && dtype != DType::f64)
    fail(op, ": parameters have dtype ", torch::headeronly::toString(table.scalar_type()),
         "; float or double is needed");
  if (table.dim() != 2) fail(op, ": the first parameter has shape ", shape_of(table), "; (V, D) is needed");
  Model m{};
  m.dtype = table.scalar_type();
  m.vocab_size = table.size(0);
  m.width = table.size(1);
  m.eps = call.eps;
  const int64_t batch = call.input.size(0), tokens = call.input.size(1);
  m.rows = batch * tokens;
  m.settings =
      block_settings(op, dtype, batch, tokens, m.width, call.num_heads, call.causal, call.norm_first, call.activation);
  const int64_t rest = call.norm_first ? 2 : 1, given = static_cast<int64_t>(parameters.size()) - 1;
  const int64_t without = call.num_layers * m.settings.parameters() + rest;
  m.settings.bias = given == 2 * without;
  if (!m.settings.bias && given != without)
    fail(op, ": there are ", given + 1, " parameters; ", without + 1, " or ", 2 * without + 1, " are needed");

  size_t index = 0;
  const auto next = [&](const Extents& extents) { return parameter_data(op, parameters, index++, m.dtype, extents); };
  const void* const table_data = next({m.vocab_size, m.width});
  for (int64_t l = 0; l < call.num_layers; ++l) {
    Layer layer{m.settings, {}};
    layer.sizes.hidden = hidden_dim(m.settings, parameters, index);
    layer.weights.visit(layer.sizes, [&](const void*& at, const Extents& extents) { at = next(extents); });
    m.layers.push_back(layer);
  }
  if (call.norm_first) {
    m.norm = next({m.width});
    if (m.settings.bias) m.norm_bias = next({m.width});
  }
  m.classes = parameters[index].dim() > 0 ? parameters[index].size(0) : 0;
  m.output = next({m.classes, m.width});
  if (m.settings.bias) m.output_bias = next({m.classes});

  m.ids = checked_ids(op, call.input, table, m.vocab_size);
  if (call.positions.has_value()) {
    check_device(op, "positions", *call.positions, table);
    check_dtype(op, "positions", *call.positions, m.dtype);
    check_shape(op, "positions", *call.positions, {tokens, m.width});
    m.added = as_contiguous(*call.positions);
  }
  if (call.target.has_value())
    m.targets = read_targets(op, table, *call.target, std::nullopt, m.rows, m.classes, kIgnoreIndex);
  m.embedding = {table_data,
                 static_cast<const int64_t*>(data_of(m.ids)),
                 m.added ? data_of(*m.added) : nullptr,
                 nullptr,
                 m.width,
                 std::max<int64_t>(1, tokens)};
  return m;
}

// The activations that forward saves for backward; without gradients all layers use the same memory.
template <class S>
struct Saved {
  std::vector<S*> streams;  // the input of each layer, and the output of the last one
  std::vector<BlockSaved<S>> layers;
  S *features, *mean, *rstd;  // the output and the statistics of the final norm
  S* grad_logits;             // of the mean loss

  Saved(const Model& m, bool save, TypedArena<S>& arena) {
    const int64_t size = m.rows * m.width;
    streams.assign(m.layers.size() + 1, arena.take(size));
    int64_t most = arena.used();
    for (size_t l = 0; l < m.layers.size(); ++l) {
      if (save) streams[l + 1] = arena.take(size);
      TypedArena<S> shared = arena;
      layers.emplace_back(m.layers[l].sizes, save ? arena : shared);
      most = std::max(most, shared.used());
    }
    if (!save) arena.take(most - arena.used());
    features = m.settings.norm_first ? arena.take(size) : streams.back();
    mean = m.settings.norm_first ? arena.take(m.rows) : nullptr;
    rstd = m.settings.norm_first ? arena.take(m.rows) : nullptr;
    grad_logits = save && m.targets ? arena.take(m.rows * m.classes) : nullptr;
  }
};

template <class S>
int64_t saved_size(const Model& m, bool save) {
  TypedArena<S> sizes;
  Saved<S>(m, save, sizes);
  return sizes.used();
}

// Returns the mean loss of the logits, and writes their gradient unless grad is null.
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
  Embedding embedding = m.embedding;
  embedding.out = saved.streams[0];
  embedding_forward(dtype, embedding, m.rows);
  for (size_t l = 0; l < m.layers.size(); ++l)
    block_forward<S>(m.layers[l].sizes, m.layers[l].weights, saved.streams[l], m.eps, m.eps, saved.streams[l + 1],
                     saved.layers[l]);
  if (m.settings.norm_first)
    layer_norm_forward(dtype,
                       {saved.streams.back(), nullptr, m.norm, m.norm_bias, saved.features, nullptr, saved.mean,
                        saved.rstd, m.width, m.eps, false},
                       m.rows);
  const Scratch scratch(m.targets ? static_cast<size_t>(m.rows * m.classes) * sizeof(S) : 0);
  S* const logits = m.targets ? reinterpret_cast<S*>(scratch.data()) : out;
  Matmul output = linear_output(saved.features, m.output, m.rows, m.width, m.classes, logits);
  output.bias = m.output_bias;
  run_matmuls(dtype, {output});
  if (m.targets) *out = mean_loss(m, logits, saved.grad_logits);
}

// `grads` has the memory for the gradient of each parameter and, last, for that of positions (or null).
template <class S>
void backward(const Model& m, const Saved<S>& saved, const S* grad, const std::vector<void*>& grads) {
  const DType dtype = m.settings.dtype;
  const int64_t size = m.rows * m.width, logits = m.rows * m.classes;
  const Scratch scratch(static_cast<size_t>(2 * size + logits) * sizeof(S));
  S* to = reinterpret_cast<S*>(scratch.data());
  S* from = to + size;
  const S* grad_logits = grad;
  if (m.targets) {
    S* const scaled = from + size;
    torch::stable::parallel_for(0, logits, 32768, [&](int64_t begin, int64_t end) {
      std::transform(saved.grad_logits + begin, saved.grad_logits + end, scaled + begin,
                     [&](S x) { return x * *grad; });
    });
    grad_logits = scaled;
  }
  size_t index = grads.size() - 1;
  void* const grad_positions = grads[index];  // the last
  const auto previous = [&] { return grads[--index]; };

  void* const grad_output_bias = m.settings.bias ? previous() : nullptr;
  void* const grad_output = previous();
  run_matmuls(dtype, {linear_grad_weight(grad_logits, saved.features, m.rows, m.width, m.classes, grad_output)});
  if (m.settings.bias) sum_columns(dtype, grad_logits, m.rows, m.classes, grad_output_bias);
  run_matmuls(dtype, {linear_grad_input(grad_logits, m.output, m.rows, m.width, m.classes, to)});
  if (m.settings.norm_first) {
    std::swap(from, to);
    // The kernel computes the gradients of both parameters; without a bias the second one is discarded.
    std::vector<S> unused(m.settings.bias ? 0 : m.width);
    void* const grad_bias = m.settings.bias ? previous() : unused.data();
    void* const grad_norm = previous();
    layer_norm_backward(dtype,
                        {from, nullptr, saved.streams.back(), m.norm, saved.mean, saved.rstd, to, m.width, false},
                        m.rows, grad_norm, grad_bias);
  }
  for (size_t l = m.layers.size(); l-- > 0;) {
    const BlockSizes& sizes = m.layers[l].sizes;
    index -= static_cast<size_t>(sizes.parameters());
    BlockParameters<void*> g{};
    size_t at = index;
    g.visit(sizes, [&](void*& data, const Extents&) { data = grads[at++]; });
    std::swap(from, to);
    block_backward<S>(sizes, m.layers[l].weights, saved.streams[l], from, saved.layers[l], to, g);
  }
  embedding_weight_grad(dtype, to, m.embedding.ids, m.rows, std::nullopt, grads[0], m.vocab_size, m.width);
  if (grad_positions != nullptr)
    embedding_positions_grad(dtype, to, m.settings.batch, grad_positions, m.settings.tokens, m.width);
}

std::tuple<Tensor, Tensor> transformer_fwd(Tensor input, std::vector<Tensor> parameters,
                                           std::optional<Tensor> positions, std::optional<Tensor> target,
                                           int64_t num_layers, int64_t num_heads, bool causal, bool norm_first,
                                           std::string activation, double eps, bool save) {
  Call call{"transformer", input,      std::move(parameters), positions, target, num_layers, num_heads,
            causal,        norm_first, std::move(activation), eps};
  const Model m = prepare(call);
  const std::vector<int64_t> scalar, shape{m.settings.batch, m.settings.tokens, m.classes};
  const Tensor out = empty(m.targets ? scalar : shape, m.dtype);
  return with_compute_type(m.settings.dtype, [&](auto zero) -> std::tuple<Tensor, Tensor> {
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
                                                        double eps, bool positions_grad) {
  const char* const op = "transformer_bwd";
  Call call{op,     input,      std::move(parameters), positions, target, num_layers, num_heads,
            causal, norm_first, std::move(activation), eps};
  const Model m = prepare(call);
  for (const auto& [name, t] : {std::pair{"grad", &grad}, std::pair{"saved", &saved}}) {
    check_device(op, name, *t, call.parameters[0]);
    check_dtype(op, name, *t, m.dtype);
  }
  if (m.targets)
    check_shape(op, "grad", grad, {});
  else
    check_shape(op, "grad", grad, {m.settings.batch, m.settings.tokens, m.classes});
  if (!saved.is_contiguous()) fail(op, ": saved must be contiguous");
  const Tensor dy = as_contiguous(grad);
  std::vector<Tensor> grads;
  std::vector<void*> data;
  for (const Tensor& parameter : call.parameters) {
    grads.push_back(empty(parameter.sizes(), m.dtype));
    data.push_back(data_of(grads.back()));
  }
  const Tensor grad_positions =
      empty(positions_grad ? std::vector<int64_t>{m.settings.tokens, m.width} : std::vector<int64_t>{0}, m.dtype);
  data.push_back(positions_grad ? data_of(grad_positions) : nullptr);
  with_compute_type(m.settings.dtype, [&](auto zero) {
    using S = decltype(zero);
    check_shape(op, "saved", saved, {saved_size<S>(m, true)});
    TypedArena<S> arena(data_of(saved));
    backward<S>(m, Saved<S>(m, true, arena), static_cast<const S*>(data_of(dy)), data);
  });
  return {grads, grad_positions};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tinyllm, CPU, m) {
  m.impl("transformer_fwd", TORCH_BOX(&transformer_fwd));
  m.impl("transformer_bwd", TORCH_BOX(&transformer_bwd));
}

}  // namespace tinyllm::cpu
