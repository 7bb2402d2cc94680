// The weights of linear layers as generation stores them, and their products with a few rows of float activations.
#pragma once
#include "kernel_args.h"
#include "types.h"

namespace tinyllm::cpu {

enum class WeightKind : int { f32 = 0, bf16 = 1, int8 = 2, int4 = 3 };
constexpr int kNumWeightKinds = 4;

// Quantised rows consist of blocks of so many weights; a group, which shares a scale, of whole blocks.
constexpr int64_t kQuantBlock = 64;
constexpr int kInt8Zero = 128, kInt4Zero = 8;  // what is stored for a weight of 0

// A weight (outputs, inputs), row by row. Quantised rows are padded to whole blocks with weights of 0.
//   int8: a byte holds weight / scale + 128.
//   int4: byte j of the 32 bytes of a block holds weight / scale + 8 of weight j in its lower half, and that of weight
//         j + 32 in its upper half.
struct Weight {
  WeightKind kind = WeightKind::f32;
  const void* data = nullptr;
  const bfloat16* scales = nullptr;  // (outputs, groups)
  int64_t outputs = 0, inputs = 0, group = kQuantBlock;
  bool by_inputs = false;  // f32 only: it lies as (inputs, outputs)

  bool quantized() const { return kind == WeightKind::int8 || kind == WeightKind::int4; }
  int64_t blocks() const { return (inputs + kQuantBlock - 1) / kQuantBlock; }
  int64_t groups() const { return blocks() * kQuantBlock / group; }
  int64_t row_bytes() const {
    switch (kind) {
      case WeightKind::f32:
        return 4 * inputs;
      case WeightKind::bf16:
        return 2 * inputs;
      case WeightKind::int8:
        return blocks() * kQuantBlock;
      case WeightKind::int4:
        break;
    }
    return blocks() * kQuantBlock / 2;
  }
  const char* row(int64_t r) const { return static_cast<const char*>(data) + r * row_bytes(); }
};

// Rows of activations in each form that a kind of weight is multiplied with; those of kinds that do not occur are null.
struct Activations {
  int64_t rows = 0, inputs = 0;
  const float* data = nullptr;  // rows `row` apart
  int64_t row = 0;
  float* split = nullptr;  // bf16: see split_activations
  // int8 and int4: per block of 64, integers in [-127, 127] with a scale for each block. int4: what is added to their
  // products because weights are stored with an offset: -kInt4Zero * their sum, as the first lane of a vector.
  int8_t* quantized = nullptr;
  float* scales = nullptr;
  int32_t* offsets = nullptr;

  static constexpr int64_t kMostLanes = 16;  // of a vector of any instruction set

  int64_t blocks() const { return (inputs + kQuantBlock - 1) / kQuantBlock; }
  int64_t padded() const { return blocks() * kQuantBlock; }

  // Takes the memory for kinds, a set of bits 1 << kind, from an arena.
  template <class Arena>
  void layout(Arena& arena, unsigned kinds) {
    const auto has = [&](WeightKind kind) { return (kinds >> static_cast<int>(kind) & 1u) != 0; };
    const int64_t all = rows * padded(), count = rows * blocks();
    split = has(WeightKind::bf16) ? arena.template take<float>(all) : nullptr;
    const bool integers = has(WeightKind::int8) || has(WeightKind::int4);
    quantized = integers ? arena.template take<int8_t>(all) : nullptr;
    scales = integers ? arena.template take<float>(count) : nullptr;
    offsets = has(WeightKind::int4) ? arena.template take<int32_t>(kMostLanes * count) : nullptr;
  }
};

// out = activation(x weight^T + bias) + residual, for a few rows of x.
struct WeightProduct {
  Weight weight;
  const Activations* x;
  const float* bias = nullptr;
  Activation activation = Activation::none;
  const float* residual = nullptr;  // rows like those of out, which it may be
  float* out = nullptr;
  int64_t out_row = 0;

  // Instead of out, a cache of keys or values: output r of row m goes to element r % head_dim of row positions[m] of
  // head r / head_dim of sequence m.
  Strided cache = {};
  bool cache_bf16 = false;
  const int64_t* positions = nullptr;
  int64_t head_dim = 0;
};

// Quantises rows of a weight: scales are chosen for the least squared error of each group.
struct Quantize {
  const float* weight;  // (outputs, inputs)
  Weight to;            // data and scales are written
};

}  // namespace tinyllm::cpu
