// A pre-norm block of a language model for one token of each of a few sequences, in a single parallel region:
//
//   x = x + out(attention(norm1(x)))          where queries and keys may be normalised by head and rotated
//   x = x + network(norm2(x))                 where the network may be gated
//
// or, parallel, with both branches of the first x. As in decoder_write.cpp the time is that of reading the weights, in
// five phases: queries, keys and values | attention | out | the network's first layers | its last one.
//
// `weights` has 27 tensors; one without elements stands for none:
//   norm1, its bias, norm2, its bias, the norm of queries, that of keys;
//   and for each of query, key, value, out, first, up, last: the matrix, its scales, its bias.
// The matrices are those of weights.h, or float (inputs, outputs) if `by_inputs`. One for queries, keys and values
// together stands in the place of query.
#include <torch/csrc/stable/library.h>

#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "phases.h"
#include "products.h"
#include "scratch.h"
#include "weights.h"

namespace tinyllm::cpu {
namespace {

constexpr int64_t kRangeKeys = 512;

// The list `sizes`.
struct Sizes {
  int64_t heads, kv_heads, head_dim;
  int64_t
      joined;  // 0: three matrices; 1: one with all queries, then all keys; 2: one with a query, key and value a head
  int64_t gated, norm;  // norm is 0 (layer_norm), 1 (rms_norm) or 2 (rms_norm, of weights around zero)
  int64_t parallel, by_inputs;
};

struct Layer {
  Weight weight;
  const float* bias = nullptr;
};

struct Norm {
  const float *weight = nullptr, *bias = nullptr;
};

struct Arguments {
  Sizes sizes;
  int64_t batch, width, hidden, seen;
  const float* input;
  float* out;
  Norm norm1, norm2, query_norm, key_norm;
  Layer query, key, value, project, first, up, last;
  Strided keys, values, mask;
  MaskKind mask_kind = MaskKind::none;
  const float *cos = nullptr, *sin = nullptr;
  int64_t rotated = 0, angle_batch = 0;
  Activation activation;
  double scale, eps1, eps2, eps3;

  int64_t queries() const { return sizes.heads * sizes.head_dim; }
  int64_t pairs() const { return sizes.kv_heads * sizes.head_dim; }
};

// The program of Phases.
class Block {
 public:
  Block(const Arguments& a, int64_t threads) : a_(a), table_(kernels()), products_(threads) {
    const int64_t vector = table_.vector[DType::f32];
    partial_row_ = divide_up(a.sizes.head_dim, vector) * vector + std::max<int64_t>(vector, 2);
    memory_ = std::make_unique<Scratch>(layout(nullptr));
    layout(memory_->data());
    normalize(a_.norm1, a_.input, a_.batch, a_.width, a_.eps1, normed_);
    begin(Part::qkv, wide_, normed_);
    add(a_.query, wide_, joined_);
    if (a_.sizes.joined == 0) {
      add(a_.key, wide_, joined_ + a_.batch * a_.queries());
      add(a_.value, wide_, joined_ + a_.batch * (a_.queries() + a_.pairs()));
    }
    items_ = products_.divide();
  }

  int64_t items() const { return items_; }

  void run(int64_t item, int64_t thread) {
    if (part_ != Part::attention) return products_.run(thread);
    const int64_t head = item / attention_.ranges;
    table_.attention_decode[DType::f32](attention_, head / a_.sizes.kv_heads, head % a_.sizes.kv_heads,
                                        item % attention_.ranges);
  }

  int64_t next() {
    switch (part_) {
      case Part::qkv:
        begin_attention();
        break;
      case Part::attention:
        for (int64_t head = 0; head < a_.batch * a_.sizes.kv_heads; ++head)
          table_.attention_decode_combine[DType::f32](attention_, head / a_.sizes.kv_heads, head % a_.sizes.kv_heads);
        begin(Part::project, inner_, attended_);
        add(a_.project, inner_, a_.out).residual = a_.input;
        items_ = products_.divide();
        break;
      case Part::project:
        normalize(a_.norm2, a_.sizes.parallel ? a_.input : a_.out, a_.batch, a_.width, a_.eps2, normed_);
        begin(Part::first, wide_, normed_);
        add(a_.first, wide_, hidden_).activation = a_.activation;
        if (a_.sizes.gated) add(a_.up, wide_, up_);
        items_ = products_.divide();
        break;
      case Part::first:
        if (a_.sizes.gated)
          for (int64_t i = 0; i < a_.batch * a_.hidden; ++i) hidden_[i] *= up_[i];
        begin(Part::last, deep_, hidden_);
        add(a_.last, deep_, a_.out).residual = a_.out;
        items_ = products_.divide();
        break;
      case Part::last:
        items_ = 0;
        break;
    }
    return items_;
  }

 private:
  enum class Part { qkv, attention, project, first, last };

  size_t layout(char* base) {
    Arena arena(base);
    const int64_t batch = a_.batch, ranges = divide_up(a_.seen + 1, kRangeKeys);
    normed_ = arena.take<float>(batch * a_.width);
    around_one_ = arena.take<float>(a_.sizes.norm == 2 ? std::max(a_.width, a_.sizes.head_dim) : 0);
    joined_ = arena.take<float>(batch * (a_.queries() + 2 * a_.pairs()));
    query_ = arena.take<float>(batch * a_.queries());
    attended_ = arena.take<float>(batch * a_.queries());
    hidden_ = arena.take<float>(batch * a_.hidden);
    up_ = arena.take<float>(a_.sizes.gated ? batch * a_.hidden : 0);
    statistics_ = arena.take<float>(2 * batch * std::max<int64_t>(1, a_.sizes.heads));
    lse_ = arena.take<float>(batch * a_.sizes.heads);
    lse_rest_ = arena.take<float>(batch * a_.sizes.heads);
    partials_ = arena.take<float>(batch * a_.sizes.heads * ranges * partial_row_);
    unsigned of_width = kind_of(a_.query.weight) | kind_of(a_.first.weight);
    if (a_.sizes.joined == 0) of_width |= kind_of(a_.key.weight) | kind_of(a_.value.weight);
    if (a_.sizes.gated) of_width |= kind_of(a_.up.weight);
    forms(wide_, arena, a_.width, of_width);
    forms(inner_, arena, a_.queries(), kind_of(a_.project.weight));
    forms(deep_, arena, a_.hidden, kind_of(a_.last.weight));
    return arena.used();
  }
  void forms(Activations& x, Arena& arena, int64_t inputs, unsigned kinds) {
    x = {.rows = a_.batch, .inputs = inputs};
    x.row = inputs;
    x.layout(arena, kinds);
  }

  void normalize(const Norm& norm, const float* from, int64_t rows, int64_t size, double eps, float* to) {
    const float* weight = norm.weight;
    if (a_.sizes.norm == 2 && weight != nullptr) {
      for (int64_t i = 0; i < size; ++i) around_one_[i] = weight[i] + 1.0f;
      weight = around_one_;
    }
    LayerNormFwd args{};
    args.input = from;
    args.weight = weight;
    args.bias = norm.bias;
    args.normed = to;
    args.mean = statistics_;
    args.rstd = statistics_ + rows;
    args.size = size;
    args.eps = eps;
    (a_.sizes.norm == 0 ? table_.layer_norm_fwd : table_.rms_norm_fwd)[DType::f32](args, 0, rows);
  }

  // Begins a phase of products whose inputs are the rows of `from`.
  void begin(Part part, Activations& forms, const float* from) {
    part_ = part;
    products_.clear();
    forms.data = from;
    table_.prepare_activations(forms, 0, a_.batch);
  }
  WeightProduct& add(const Layer& layer, const Activations& forms, float* out) {
    return products_.add({.weight = layer.weight,
                          .x = &forms,
                          .bias = layer.bias,
                          .residual = nullptr,
                          .out = out,
                          .out_row = layer.weight.outputs});
  }

  // The heads of queries (0), keys (1) or values (2) as the products left them.
  Strided heads(int which) const {
    const int64_t d = a_.sizes.head_dim, queries = a_.queries(), pairs = a_.pairs();
    if (a_.sizes.joined == 2) return {joined_ + which * d, 3 * queries, 3 * d, 0, 1};
    const int64_t before = which == 0 ? 0 : which == 1 ? queries : queries + pairs;
    if (a_.sizes.joined == 1) return {joined_ + before, queries + 2 * pairs, d, 0, 1};
    return {joined_ + a_.batch * before, which == 0 ? queries : pairs, d, 0, 1};
  }

  // Normalises and rotates heads on their way to another place.
  void place(int which, int64_t count, const Norm& norm, const Strided& to) {
    const Strided from = heads(which);
    const int64_t d = a_.sizes.head_dim;
    for (int64_t b = 0; b < a_.batch; ++b)
      for (int64_t h = 0; h < count; ++h) {
        const float* x = static_cast<const float*>(from.data) + b * from.batch + h * from.head;
        float* out = static_cast<float*>(to.data) + b * to.batch + h * to.head;
        if (norm.weight != nullptr)
          normalize(norm, x, 1, d, a_.eps3, out);
        else
          std::copy_n(x, d, out);
      }
    if (which == 2 || a_.cos == nullptr) return;
    Rotary r{to, to, count, 1, d, a_.rotated};
    r.cos = a_.cos;
    r.sin = a_.sin;
    r.angle_batch = a_.angle_batch;
    table_.rotary[DType::f32](r, 0, a_.batch);
  }

  void begin_attention() {
    part_ = Part::attention;
    const int64_t d = a_.sizes.head_dim, kv_heads = a_.sizes.kv_heads;
    const auto new_row = [&](Strided s) {
      s.data = static_cast<float*>(s.data) + a_.seen * s.row;
      return s;
    };
    const Strided query{query_, a_.queries(), d, d, 1};
    place(0, a_.sizes.heads, a_.query_norm, query);
    place(1, kv_heads, a_.key_norm, new_row(a_.keys));
    place(2, kv_heads, {}, new_row(a_.values));
    Attention& a = attention_;
    a.batch = a_.batch;
    a.heads = a_.sizes.heads;
    a.kv_heads = kv_heads;
    a.queries = 1;
    a.keys = a_.seen + 1;
    a.head_dim = a.value_dim = d;
    a.scale = a_.scale;
    a.query = query;
    a.key = a_.keys;
    a.value = a_.values;
    a.mask = a_.mask;
    a.mask_kind = a_.mask_kind;
    a.out = {attended_, a_.queries(), d, d, 1};
    a.lse = lse_;
    a.lse_rest = a_.mask_kind == MaskKind::additive ? lse_rest_ : nullptr;
    a.range_keys = kRangeKeys;
    a.ranges = divide_up(a.keys, kRangeKeys);
    a.partials = partials_;
    a.partial_row = partial_row_;
    items_ = a.batch * kv_heads * a.ranges;
  }

  const Arguments& a_;
  const Kernels& table_;
  Part part_ = Part::qkv;
  int64_t items_ = 0, partial_row_;
  Products products_;
  Attention attention_{};
  std::unique_ptr<Scratch> memory_;
  float *normed_, *around_one_, *joined_, *query_, *attended_, *hidden_, *up_, *statistics_, *lse_, *lse_rest_,
      *partials_;
  Activations wide_, inner_, deep_;
};

// ---- Arguments

const float* floats(const char* op, const char* name, const Tensor& t, int64_t count) {
  if (t.numel() == 0) return nullptr;
  check_dtype(op, name, t, ScalarType::Float);
  if (!t.is_cpu() || !t.is_contiguous() || t.numel() != count)
    fail(op, ": ", name, " has shape ", shape_of(t), "; ", count, " floats on the CPU are needed");
  return static_cast<const float*>(data_of(t));
}

Layer read_layer(const char* op, const char* name, const std::vector<Tensor>& list, size_t at, bool by_inputs,
                 int64_t inputs, int64_t outputs) {
  const Tensor &data = list[at], &scales = list[at + 1], &bias = list[at + 2];
  Layer layer;
  if (by_inputs && data.scalar_type() == ScalarType::Float) {
    check_shape(op, name, data, {inputs, outputs});
    layer.weight.outputs = outputs;
    layer.weight.inputs = inputs;
    layer.weight.by_inputs = true;
    layer.weight.data = floats(op, name, data, inputs * outputs);
  } else {
    layer.weight =
        read_weight(op, name, data, scales.numel() == 0 ? OptionalTensor() : OptionalTensor(scales), outputs, inputs);
  }
  layer.bias = floats(op, name, bias, outputs);
  return layer;
}

// A cache (B, kv_heads, length, head_dim) with room for a token behind those that were seen.
Strided cache(const char* op, const char* name, const Tensor& t, const Arguments& a) {
  check_dtype(op, name, t, ScalarType::Float);
  const Sizes& s = a.sizes;
  const bool fits = t.is_cpu() && t.dim() == 4 && t.size(0) == a.batch && t.size(1) == s.kv_heads &&
                    t.size(2) > a.seen && t.size(3) == s.head_dim && t.stride(3) == 1;
  if (!fits)
    fail(op, ": ", name, " has shape ", shape_of(t), "; [", a.batch, ", ", s.kv_heads, ", more than ", a.seen, ", ",
         s.head_dim, "] on the CPU is needed");
  return strided(t);
}

Tensor decode_block(Tensor input, std::vector<Tensor> weights, std::vector<int64_t> sizes, Tensor keys, Tensor values,
                    int64_t seen, OptionalTensor mask, OptionalTensor cos, OptionalTensor sin, std::string activation,
                    double scale, double eps1, double eps2, double eps3) {
  const char* op = "decode_block";
  check_dtype(op, "input", input, ScalarType::Float);
  if (!input.is_cpu() || input.dim() != 3 || input.size(1) != 1 || input.size(0) < 1)
    fail(op, ": input has shape ", shape_of(input), "; (B, 1, D) on the CPU is needed");
  if (weights.size() != 27 || sizes.size() != 8)
    fail(op, ": there are ", weights.size(), " weights and ", sizes.size(), " sizes; 27 and 8 are needed");
  Arguments a{};
  a.sizes = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7]};
  const Sizes& s = a.sizes;
  if (s.heads < 1 || s.kv_heads < 1 || s.heads % s.kv_heads != 0 || s.head_dim < 1 || s.head_dim > 1024 ||
      s.joined < 0 || s.joined > 2 || (s.joined == 2 && s.heads != s.kv_heads) || seen < 0)
    fail(op, ": ", s.heads, " heads, ", s.kv_heads, " of keys, of ", s.head_dim, " columns, joined ", s.joined, " and ",
         seen, " tokens do not fit");
  const Tensor x = as_contiguous(input);
  a.batch = x.size(0);
  a.width = x.size(2);
  a.seen = seen;
  a.input = static_cast<const float*>(data_of(x));
  const std::array<Norm*, 2> norms{&a.norm1, &a.norm2};
  for (size_t i = 0; i < 2; ++i) {
    norms[i]->weight = floats(op, "a norm", weights[2 * i], a.width);
    norms[i]->bias = floats(op, "a norm's bias", weights[2 * i + 1], a.width);
  }
  a.query_norm.weight = floats(op, "the norm of queries", weights[4], s.head_dim);
  a.key_norm.weight = floats(op, "the norm of keys", weights[5], s.head_dim);
  const bool by_inputs = s.by_inputs != 0;
  const Tensor& last = weights[24];
  const bool last_by_inputs = by_inputs && last.scalar_type() == ScalarType::Float;
  const Tensor& first = weights[18];
  if (first.dim() != 2 || last.dim() != 2) fail(op, ": the network's layers must have 2 dimensions");
  a.hidden = last_by_inputs                                          ? last.size(0)
             : first.scalar_type() == ScalarType::Float && by_inputs ? first.size(1)
                                                                     : first.size(0);
  const auto layer = [&](const char* name, size_t at, int64_t inputs, int64_t outputs) {
    return read_layer(op, name, weights, at, by_inputs, inputs, outputs);
  };
  a.query = layer("query", 6, a.width, s.joined == 0 ? a.queries() : a.queries() + 2 * a.pairs());
  if (s.joined == 0) {
    a.key = layer("key", 9, a.width, a.pairs());
    a.value = layer("value", 12, a.width, a.pairs());
  }
  a.project = layer("out", 15, a.queries(), a.width);
  a.first = layer("first", 18, a.width, a.hidden);
  if (s.gated) a.up = layer("up", 21, a.width, a.hidden);
  a.last = layer("last", 24, a.hidden, a.width);
  a.keys = cache(op, "keys", keys, a);
  a.values = cache(op, "values", values, a);
  Tensor cosines, sines;
  if (cos && sin) {
    const bool fits = cos->dim() == 3 && (cos->size(0) == 1 || cos->size(0) == a.batch) && cos->size(1) == 1 &&
                      cos->size(2) % 2 == 0 && cos->size(2) <= s.head_dim;
    if (!fits) fail(op, ": cos has shape ", shape_of(*cos), "; (B or 1, 1, columns to rotate) is needed");
    check_shape(op, "sin", *sin, cos->sizes());
    cosines = as_contiguous(*cos);
    sines = as_contiguous(*sin);
    a.cos = floats(op, "cos", cosines, cos->numel());
    a.sin = floats(op, "sin", sines, cos->numel());
    a.rotated = cos->size(2);
    a.angle_batch = cos->size(0) == 1 ? 0 : a.rotated;
  }
  if (mask) {
    check_shape(op, "mask", *mask, {a.batch, s.heads, 1, seen + 1});
    if (!mask->is_cpu()) fail(op, ": mask is not on the CPU");
    a.mask_kind = mask->scalar_type() == ScalarType::Bool ? MaskKind::boolean : MaskKind::additive;
    if (a.mask_kind == MaskKind::additive) check_dtype(op, "mask", *mask, ScalarType::Float);
    a.mask = strided(*mask);
  }
  a.activation = parse_activation(op, activation);
  a.scale = scale;
  a.eps1 = eps1;
  a.eps2 = eps2;
  a.eps3 = eps3;
  const Tensor out = empty(x.sizes(), ScalarType::Float);
  a.out = static_cast<float*>(data_of(out));
  int64_t bytes = 0;
  for (const Layer* l : {&a.query, &a.key, &a.value, &a.project, &a.first, &a.up, &a.last})
    bytes += l->weight.row_bytes() * l->weight.outputs;
  const int64_t threads = threads_for(bytes / 4);
  Block program(a, threads);
  Phases(program, threads);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tinyllm, CPU, m) { m.impl("decode_block", TORCH_BOX(&decode_block)); }

}  // namespace tinyllm::cpu
