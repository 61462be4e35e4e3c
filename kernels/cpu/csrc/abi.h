// What Python and C++ share: constants and structures, and a table from which kernels.cpu.abi checks both.
#pragma once

#include <cstddef>

#include "simd.h"

namespace {

constexpr int PAGE_SIZE = 64;  // tokens

// Layout of panels (kernels.cpu.panels). A panel holds LANES channels, group after group, and is read from front to
// back. An instruction multiplies GROUP bytes of a row with GROUP bytes of each channel; rows are whole multiples of
// BLOCK bytes long, which is what an AMX tile multiplies.
constexpr int GROUP = 4, BLOCK = 64;
constexpr int PANELS = 2;    // that are multiplied together; a weight has an even number of them
constexpr int OFFSET = 128;  // added to int8 weights, which makes them unsigned

enum Activation { NONE, RELU, GELU, GELU_NEW };  // numbers of kernels.cpu.panels.ACTIVATIONS

}  // namespace

struct NormArgs {
  const ELEMENT *weight, *bias;  // each may be null
  float eps;
};

struct ProductArgs {
  const uint8_t* panels;
  int64_t num_panels;
  const float* scales;  // of the channels; null where the weight is bfloat16
  int64_t padded;       // columns of int8 panels
  const ELEMENT* bias;  // may be null
  int64_t channels, columns;
};

struct BlockArgs {
  NormArgs ln_1, ln_2;
  ProductArgs c_attn, c_proj, c_fc, mlp_c_proj;
  ELEMENT *k_pages, *v_pages;
  int64_t plan;  // index into the step's plans
  float scale;   // of attention scores
};

// kernels.plan.StepPlan.
struct PlanArgs {
  const int64_t* slot_mapping;
  const int64_t *page_ids, *offsets;  // of the rows that decode
  const uint8_t* visible;
  const int64_t *tile_rows, *tile_offsets, *tile_page_ids, *tile_masks;  // of prompt chunks
  const uint8_t* tile_hidden;
  int64_t num_tiles;
};

// Room for the rows of a product in int8.
struct QuantizedRows {
  int8_t* integers;  // (rows, padded)
  float* scales;     // (rows,)
  int32_t* sums;     // (rows,)
};

// Room for what no later block needs, a row a token.
struct ScratchArgs {
  ELEMENT *normed, *qkv, *attended, *inner;
  QuantizedRows quantized;
};

struct AbiEntry {
  const char* name;
  int64_t place, size;  // bytes; of a constant its value and 0
};

#define C(NAME) {#NAME, NAME, 0}
#define S(NAME) {#NAME, 0, sizeof(NAME)}
#define F(STRUCTURE, NAME) {#STRUCTURE "." #NAME, offsetof(STRUCTURE, NAME), sizeof(STRUCTURE::NAME)}

// Constants, structures and fields; ends with a null name.
extern "C" const AbiEntry* abi() {
  static const AbiEntry entries[] = {
      C(PAGE_SIZE), C(LANES), C(GROUP), C(BLOCK), C(PANELS), C(OFFSET),
      S(NormArgs), F(NormArgs, weight), F(NormArgs, bias), F(NormArgs, eps),
      S(ProductArgs), F(ProductArgs, panels), F(ProductArgs, num_panels), F(ProductArgs, scales), F(ProductArgs, padded),
      F(ProductArgs, bias), F(ProductArgs, channels), F(ProductArgs, columns),
      S(BlockArgs), F(BlockArgs, ln_1), F(BlockArgs, ln_2), F(BlockArgs, c_attn), F(BlockArgs, c_proj), F(BlockArgs, c_fc),
      F(BlockArgs, mlp_c_proj), F(BlockArgs, k_pages), F(BlockArgs, v_pages), F(BlockArgs, plan), F(BlockArgs, scale),
      S(PlanArgs), F(PlanArgs, slot_mapping), F(PlanArgs, page_ids), F(PlanArgs, offsets), F(PlanArgs, visible),
      F(PlanArgs, tile_rows), F(PlanArgs, tile_offsets), F(PlanArgs, tile_page_ids), F(PlanArgs, tile_masks),
      F(PlanArgs, tile_hidden), F(PlanArgs, num_tiles),
      S(QuantizedRows), F(QuantizedRows, integers), F(QuantizedRows, scales), F(QuantizedRows, sums),
      S(ScratchArgs), F(ScratchArgs, normed), F(ScratchArgs, qkv), F(ScratchArgs, attended), F(ScratchArgs, inner),
      F(ScratchArgs, quantized), {nullptr, 0, 0},
  };
  return entries;
}

#undef C
#undef S
#undef F
