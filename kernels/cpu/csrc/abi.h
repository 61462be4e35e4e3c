// What Python and C++ share: constants, and the structures of kernels.cpu.abi.
#pragma once

#include "simd.h"

namespace {

constexpr int PAGE_SIZE = 64;  // tokens

// Layout of panels (kernels.cpu.panels). A panel holds LANES channels, group after group, and is read from front to
// back. An instruction multiplies GROUP bytes of a row with GROUP bytes of each channel; rows are whole multiples of
// BLOCK bytes long, which is what an AMX tile multiplies.
constexpr int GROUP = 4, BLOCK = 64;
constexpr int PANELS = 2;    // that are multiplied together; a weight has an even number of them
constexpr int OFFSET = 128;  // added to int8 weights, which makes them unsigned

constexpr int NOT_FINITE = -1, NONE_LEFT = -2;  // kernels.names, in place of a token

enum Activation { NONE, RELU, GELU, GELU_NEW };  // numbers of kernels.cpu.panels.ACTIVATIONS
enum PatternKind { DENSE, BANDED, STRIDED, FIXED };  // in the order of kernels.names.PatternKind

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

// kernels.plan.StepPlan, and room for what plans.h fills in.
struct PlanArgs {
  const int32_t* page_table;  // of all batch rows, table_stride apart
  const int64_t *rows, *positions;
  const int32_t *row_ptr, *col_idx;  // of a sparse pattern's layout; else null
  int64_t table_stride, kind, size, summary;
  int64_t *slot_mapping, *page_ids, *offsets;
  uint8_t* visible;
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

// kernels.sampling_state.SamplingState; rows of a table lie a stride apart.
struct SamplingArgs {
  const float* temperature;
  const int64_t* top_k;
  const float *top_p, *min_p, *repetition_penalty, *presence_penalty, *frequency_penalty;
  const uint8_t* adjusted;
  const int64_t *seed, *choice;
  const float* bias;
  const int32_t* generated;
  const uint8_t* in_prompt;
  int64_t bias_stride, generated_stride, in_prompt_stride;
};
