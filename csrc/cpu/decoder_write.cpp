// Generating tokens: the whole model for one token of each sequence, again and again, in a single parallel region.
// The sequences of a step may be the next places of one sequence, all in its cache, each a token longer than the one
// before: so a few tokens that are known already are read at once.
//
// Each weight is read once for all sequences, and the time is that of reading it. A token takes five phases a layer and
// two more (phases.h): queries, keys and values | attention | projection | first layer | second layer, then the logits,
// then drawing. Each thread begins with its own range of a phase's outputs, and then helps the others. What lies
// between two phases (norms, the activations in the form that the next weights need) is so little that one thread does
// it while the others wait.
//
// An output does not depend on which thread computes it, nor on the other sequences.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <tuple>

#include "decoder.h"
#include "draw.h"
#include "phases.h"
#include "products.h"
#include "scratch.h"

namespace tinyllm::cpu {
namespace {

struct Request {
  const int64_t* ids;      // (B): read first
  float* logits;           // (B, classes): all that is wanted; null: tokens are
  const double* uniforms;  // (B, steps)
  int64_t steps;
  Draw settings;
  bool* seen;  // (B, classes) or null
  std::vector<int64_t> stop_ids;
  int64_t* tokens;  // (B, steps)
  float* log_probs;
};

// The program of Phases.
class Writing {
 public:
  Writing(Decoder& d, const Request& request, int64_t threads)
      : d_(d), request_(request), table_(kernels()), products_(threads) {
    const int64_t most = *std::max_element(d.lengths.begin(), d.lengths.end()) + request.steps;
    max_ranges_ = std::max<int64_t>(1, divide_up(most, kRangeKeys));
    const int64_t vector = table_.vector[DType::f32];
    partial_row_ = divide_up(d.head_dim(), vector) * vector + std::max<int64_t>(vector, 2);
    stopped_.assign(static_cast<size_t>(d.sizes.batch), false);
    key_lengths_.resize(static_cast<size_t>(d.sizes.batch));
    memory_ = std::make_unique<Scratch>(layout(nullptr));
    layout(memory_->data());
    for (int64_t b = 0; b < d.sizes.batch; ++b) read(b, request.ids[b]);
    begin_layer(0);
  }

  int64_t items() const { return items_; }

  void run(int64_t item, int64_t thread) {
    if (part_ == Part::attention) return attend(item);
    if (part_ == Part::draw) return draw_token(item);
    products_.run(thread);
  }

  int64_t next() {
    switch (part_) {
      case Part::qkv:
        begin_attention();
        break;
      case Part::attention:
        end_attention();
        break;
      case Part::projection:
        begin_feed_forward();
        break;
      case Part::first:
        begin_second();
        break;
      case Part::second:
        if (!d_.sizes.norm_first) normalize(block().norm2, sum_, x_);
        begin_layer(layer_ + 1);
        break;
      case Part::logits:
        part_ = Part::draw;
        items_ = request_.logits == nullptr ? d_.sizes.batch : 0;
        break;
      case Part::draw:
        end_step();
        break;
    }
    return items_;
  }

 private:
  static constexpr int64_t kRangeKeys = 512;
  enum class Part { qkv, attention, projection, first, second, logits, draw };

  size_t layout(char* base) {
    Arena arena(base);
    const int64_t batch = d_.sizes.batch, width = d_.sizes.width;
    int64_t hidden = 0;
    unsigned of_width = kind_of(d_.output.matrix), of_hidden = 0;
    for (size_t l = 0; l < d_.blocks.size(); ++l) {
      const BlockParameters<Operand>& w = d_.parameters[l];
      hidden = std::max(hidden, d_.blocks[l].hidden);
      of_hidden |= kind_of(w.linear2.weight.matrix);
      for (const Affine<Operand>* p : {&w.query, &w.key, &w.value, &w.linear1}) of_width |= kind_of(p->weight.matrix);
      if (d_.sizes.projected) of_width |= kind_of(w.out_proj.weight.matrix);
    }
    for (float** p : {&x_, &sum_, &normed_, &query_, &attended_}) *p = arena.take<float>(batch * width);
    hidden_ = arena.take<float>(batch * hidden);
    logits_ = request_.logits == nullptr ? arena.take<float>(batch * d_.classes) : request_.logits;
    scores_ = arena.take<float>(request_.logits == nullptr ? batch * d_.classes : 0);
    statistics_ = arena.take<float>(2 * batch);
    lse_ = arena.take<float>(batch * d_.sizes.heads);
    partials_ = arena.take<float>(batch * d_.sizes.heads * max_ranges_ * partial_row_);
    wide_ = {.rows = batch, .inputs = width};
    wide_.layout(arena, of_width);
    deep_ = {.rows = batch, .inputs = hidden};
    deep_.layout(arena, of_hidden);
    return arena.used();
  }

  const BlockParameters<Operand>& block() const { return d_.parameters[static_cast<size_t>(layer_)]; }

  void normalize(const Affine<Operand>& w, const float* from, float* to) {
    const LayerNormFwd args{.input = from,
                            .residual = nullptr,
                            .weight = w.weight.vector,
                            .bias = w.bias.vector,
                            .normed = to,
                            .sum = nullptr,
                            .mean = statistics_,
                            .rstd = statistics_ + d_.sizes.batch,
                            .size = d_.sizes.width,
                            .eps = d_.sizes.eps1,
                            .stream = false};
    table_.layer_norm_fwd[DType::f32](args, 0, d_.sizes.batch);
  }

  // Begins a phase of products whose inputs are the rows of `from`.
  void begin(Part part, Activations& forms, const float* from, int64_t inputs) {
    part_ = part;
    products_.clear();
    forms.inputs = inputs;
    forms.data = from;
    forms.row = inputs;
    table_.prepare_activations(forms, 0, d_.sizes.batch);
  }
  WeightProduct& add(const Affine<Operand>& w, const Activations& forms, float* out) {
    const Weight& weight = w.weight.matrix;
    return products_.add({.weight = weight, .x = &forms, .bias = w.bias.vector, .out = out, .out_row = weight.outputs});
  }
  void divide() { items_ = products_.divide(); }

  void begin_layer(int64_t layer) {
    layer_ = layer;
    if (layer == static_cast<int64_t>(d_.blocks.size())) {
      const float* features = x_;
      if (d_.sizes.norm_first) {
        normalize({d_.norm, d_.norm_bias}, x_, normed_);
        features = normed_;
      }
      begin(Part::logits, wide_, features, d_.sizes.width);
      add({d_.output, d_.output_bias}, wide_, logits_);
      return divide();
    }
    const float* from = x_;
    if (d_.sizes.norm_first) {
      normalize(block().norm1, x_, normed_);
      from = normed_;
    }
    begin(Part::qkv, wide_, from, d_.sizes.width);
    add(block().query, wide_, query_);
    for (const int value : {0, 1}) {
      WeightProduct& p = add(value == 0 ? block().key : block().value, wide_, nullptr);
      p.cache = d_.cache_of(layer, value);
      p.cache_bf16 = d_.cache_bf16;
      p.positions = d_.lengths.data();
      p.head_dim = d_.head_dim();
    }
    divide();
  }

  void begin_attention() {
    part_ = Part::attention;
    const int64_t heads = d_.sizes.heads, head_dim = d_.head_dim(), width = d_.sizes.width;
    for (size_t b = 0; b < key_lengths_.size(); ++b) key_lengths_[b] = d_.lengths[b] + 1;
    Attention& a = attention_;
    a.batch = d_.sizes.batch;
    a.heads = a.kv_heads = heads;
    a.queries = 1;
    a.keys = *std::max_element(key_lengths_.begin(), key_lengths_.end());
    a.head_dim = a.value_dim = head_dim;
    a.scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
    a.key_lengths = key_lengths_.data();
    a.query = {query_, width, head_dim, width, 1};
    a.key = d_.cache_of(layer_, 0);
    a.value = d_.cache_of(layer_, 1);
    a.out = {attended_, width, head_dim, width, 1};
    a.lse = lse_;
    a.range_keys = kRangeKeys;
    a.ranges = divide_up(a.keys, kRangeKeys);
    a.partials = partials_;
    a.partial_row = partial_row_;
    items_ = a.batch * heads * a.ranges;
  }
  void attend(int64_t item) {
    const int64_t head = item / attention_.ranges, b = head / d_.sizes.heads, h = head % d_.sizes.heads;
    const auto kernel = d_.cache_bf16 ? table_.attention_decode_bf16 : table_.attention_decode[DType::f32];
    kernel(attention_, b, h, item % attention_.ranges);
  }
  void end_attention() {
    for (int64_t b = 0; b < d_.sizes.batch; ++b)
      for (int64_t h = 0; h < d_.sizes.heads; ++h) table_.attention_decode_combine[DType::f32](attention_, b, h);
    if (!d_.sizes.projected) {
      for (int64_t i = 0; i < d_.sizes.batch * d_.sizes.width; ++i) x_[i] += attended_[i];
      return begin_feed_forward();
    }
    begin(Part::projection, wide_, attended_, d_.sizes.width);
    add(block().out_proj, wide_, x_).residual = x_;
    divide();
  }

  void begin_feed_forward() {
    normalize(d_.sizes.norm_first ? block().norm2 : block().norm1, x_, normed_);
    begin(Part::first, wide_, normed_, d_.sizes.width);
    add(block().linear1, wide_, hidden_).activation = d_.sizes.activation;
    divide();
  }
  void begin_second() {
    begin(Part::second, deep_, hidden_, block().linear2.weight.matrix.inputs);
    // A post-norm block adds to what it has normalised, a pre-norm block to the sum before.
    WeightProduct& p = add(block().linear2, deep_, d_.sizes.norm_first ? x_ : sum_);
    p.residual = d_.sizes.norm_first ? x_ : normed_;
    divide();
  }

  void draw_token(int64_t b) {
    const int64_t at = b * request_.steps + step_;
    if (stopped_[static_cast<size_t>(b)]) {
      request_.tokens[at] = request_.tokens[at - 1];
      request_.log_probs[at] = 0;
      return;
    }
    Draw draw_of = request_.settings;
    draw_of.logits = logits_ + b * d_.classes;
    draw_of.scores = scores_ + b * d_.classes;
    draw_of.seen = request_.seen == nullptr ? nullptr : request_.seen + b * d_.classes;
    draw_of.uniform = request_.uniforms[at];
    draw(draw_of);
    if (draw_of.token < 0)
      throw std::invalid_argument("the model's logits are not finite (nan or inf), or no token is left to draw");
    request_.tokens[at] = draw_of.token;
    request_.log_probs[at] = draw_of.log_prob;
    if (request_.seen != nullptr) request_.seen[b * d_.classes + draw_of.token] = true;
  }

  void read(int64_t b, int64_t id) { embed(d_, id, d_.lengths[static_cast<size_t>(b)], x_ + b * d_.sizes.width); }

  void end_step() {
    bool all_stopped = !request_.stop_ids.empty();
    for (int64_t b = 0; b < d_.sizes.batch; ++b) {
      const int64_t token = request_.tokens[b * request_.steps + step_];
      const std::vector<int64_t>& stops = request_.stop_ids;
      if (std::find(stops.begin(), stops.end(), token) != stops.end()) stopped_[static_cast<size_t>(b)] = true;
      all_stopped = all_stopped && stopped_[static_cast<size_t>(b)];
      ++d_.lengths[static_cast<size_t>(b)];
    }
    ++step_;
    items_ = 0;
    if (step_ == request_.steps || all_stopped) return;
    for (int64_t b = 0; b < d_.sizes.batch; ++b) read(b, request_.tokens[b * request_.steps + step_ - 1]);
    begin_layer(0);
  }

  Decoder& d_;
  const Request& request_;
  const Kernels& table_;
  Part part_ = Part::qkv;
  int64_t layer_ = 0, step_ = 0, items_ = 0;
  int64_t max_ranges_, partial_row_;
  Products products_;
  Attention attention_{};
  std::vector<char> stopped_;  // not bool, whose elements share bytes
  std::vector<int64_t> key_lengths_;
  std::unique_ptr<Scratch> memory_;
  float *x_, *sum_, *normed_, *query_, *attended_, *hidden_, *logits_, *scores_, *statistics_, *lse_, *partials_;
  Activations wide_, deep_;
};

// The bytes of all weights that a token needs.
int64_t bytes_of(const Decoder& d) {
  int64_t bytes = d.output.matrix.row_bytes() * d.classes;
  for (const BlockParameters<Operand>& w : d.parameters)
    for (const Affine<Operand>* p : {&w.query, &w.key, &w.value, &w.out_proj, &w.linear1, &w.linear2})
      bytes += p->weight.matrix.row_bytes() * p->weight.matrix.outputs;
  return bytes;
}

void run(Decoder& d, const Request& request) {
  const int64_t threads = threads_for(bytes_of(d) / (5 * static_cast<int64_t>(d.blocks.size()) + 2));
  Writing program(d, request, threads);
  Phases(program, threads);
}

Draw settings_of(const char* op, double temperature, int64_t top_k, double top_p, double min_p,
                 double repetition_penalty, int64_t suppress_id, int64_t ids_below, int64_t classes) {
  if (!(temperature >= 0) || !(top_p > 0 && top_p <= 1) || !(min_p >= 0 && min_p < 1) || !(repetition_penalty > 0) ||
      top_k < 0 || suppress_id < -1 || suppress_id >= classes || ids_below < 1 || ids_below > classes)
    fail(op, ": temperature ", temperature, ", top_k ", top_k, ", top_p ", top_p, ", min_p ", min_p,
         ", repetition_penalty ", repetition_penalty, ", suppress_id ", suppress_id, " or ids_below ", ids_below,
         " is out of range");
  Draw settings{};
  settings.classes = classes;
  settings.temperature = temperature;
  settings.top_k = top_k;
  settings.top_p = top_p;
  settings.min_p = min_p;
  settings.repetition_penalty = repetition_penalty;
  settings.suppress_id = suppress_id;
  settings.ids_below = ids_below;
  return settings;
}

Tensor on_cpu(const char* op, const char* name, const Tensor& t, ScalarType dtype, IntArray shape) {
  check_dtype(op, name, t, dtype);
  check_shape(op, name, t, shape);
  if (!t.is_cpu()) fail(op, ": ", name, " is not on the CPU");
  return as_contiguous(t);
}

// Returns the memory of `seen`, which is written.
bool* seen_of(const char* op, const OptionalTensor& seen, int64_t batch, int64_t classes) {
  if (!seen) return nullptr;
  check_dtype(op, "seen", *seen, ScalarType::Bool);
  check_shape(op, "seen", *seen, {batch, classes});
  if (!seen->is_cpu() || !seen->is_contiguous()) fail(op, ": seen must be contiguous and on the CPU");
  return static_cast<bool*>(data_of(*seen));
}

std::tuple<Tensor, Tensor> decoder_write(Tensor ids, Tensor uniforms, std::vector<Tensor> weights, Tensor positions,
                                         Tensor cache, Tensor lengths, int64_t num_layers, int64_t num_heads,
                                         bool norm_first, std::string activation, double eps, double temperature,
                                         int64_t top_k, double top_p, double min_p, double repetition_penalty,
                                         int64_t suppress_id, int64_t ids_below, OptionalTensor seen,
                                         std::vector<int64_t> stop_ids) {
  const char* op = "decoder_write";
  if (ids.dim() != 1 || ids.size(0) < 1) fail(op, ": ids has shape ", shape_of(ids), "; (B) is needed");
  if (uniforms.dim() != 2 || uniforms.size(1) < 1)
    fail(op, ": uniforms has shape ", shape_of(uniforms), "; (B, steps) is needed");
  const int64_t batch = ids.size(0), steps = uniforms.size(1);
  const Tensor first = on_cpu(op, "ids", ids, ScalarType::Long, {batch});
  const Tensor numbers = on_cpu(op, "uniforms", uniforms, ScalarType::Double, {batch, steps});
  Decoder d = read_decoder(op, weights, positions, cache, lengths, num_layers, num_heads, norm_first, activation, eps,
                           batch, steps);
  const Tensor tokens = empty({batch, steps}, ScalarType::Long), log_probs = empty({batch, steps}, ScalarType::Float);
  Request request{};
  request.ids = static_cast<const int64_t*>(data_of(first));
  request.uniforms = static_cast<const double*>(data_of(numbers));
  request.steps = steps;
  request.settings =
      settings_of(op, temperature, top_k, top_p, min_p, repetition_penalty, suppress_id, ids_below, d.classes);
  request.seen = repetition_penalty == 1 ? nullptr : seen_of(op, seen, batch, d.classes);
  request.stop_ids = std::move(stop_ids);
  request.tokens = static_cast<int64_t*>(data_of(tokens));
  request.log_probs = static_cast<float*>(data_of(log_probs));
  std::fill_n(request.tokens, batch * steps, int64_t{-1});
  std::fill_n(request.log_probs, batch * steps, 0.0f);
  check_ids(op, d, request.ids, batch);
  if (d.classes > d.vocab_size) fail(op, ": the output has ", d.classes, " classes, the table ", d.vocab_size, " rows");
  run(d, request);
  return {tokens, log_probs};
}

Tensor decoder_step(Tensor ids, std::vector<Tensor> weights, Tensor positions, Tensor cache, Tensor lengths,
                    int64_t num_layers, int64_t num_heads, bool norm_first, std::string activation, double eps) {
  const char* op = "decoder_step";
  if (ids.dim() != 1 || ids.size(0) < 1) fail(op, ": ids has shape ", shape_of(ids), "; (B) is needed");
  const int64_t batch = ids.size(0);
  const Tensor first = on_cpu(op, "ids", ids, ScalarType::Long, {batch});
  Decoder d = read_decoder(op, weights, positions, cache, lengths, num_layers, num_heads, norm_first, activation, eps,
                           batch, 1);
  const Tensor logits = empty({batch, d.classes}, ScalarType::Float);
  Request request{};
  request.ids = static_cast<const int64_t*>(data_of(first));
  request.logits = static_cast<float*>(data_of(logits));
  request.steps = 1;
  check_ids(op, d, request.ids, batch);
  run(d, request);
  return logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tinyllm, CPU, m) {
  m.impl("decoder_step", TORCH_BOX(&decoder_step));
  m.impl("decoder_write", TORCH_BOX(&decoder_write));
}

}  // namespace tinyllm::cpu
