// All blocks of the decoder in one call, where the products are compiled.
#pragma once

#include "abi.h"
#include "decode_attention.h"
#include "norms.h"
#include "plans.h"
#include "prefill_attention.h"
#include "products.h"

#ifdef PRODUCTS

namespace {

void share_blocks(Worker& worker, const BlockArgs* blocks, int64_t num_blocks, int pre_norm, int activation,
                int64_t heads, const PlanArgs* plans, int64_t tokens, int64_t decodes, ELEMENT* x, ELEMENT* update,
                const ScratchArgs& scratch, const NormArgs* final_norm) {
  const int64_t columns = heads * HEAD_DIM, row = 3 * columns;

  const auto add_norm = [&](const NormArgs& norm, const ELEMENT* more, ELEMENT* out) {
    share_add_layernorm(worker, x, more, norm, tokens, columns, out, x);
  };
  const auto multiply = [&](const ProductArgs& by, const ELEMENT* input, ELEMENT* out, int function) {
    share_linear(worker, by, input, tokens, function, out, scratch.quantized);
  };
  const auto attention = [&](const BlockArgs& block, const ELEMENT* input) {
    multiply(block.c_attn, input, scratch.qkv, NONE);
    const PlanArgs& plan = plans[block.plan];
    const ELEMENT* q = scratch.qkv;
    share_kv_write(worker, q + columns, q + 2 * columns, row, block.k_pages, block.v_pages, plan.slot_mapping, tokens,
                   heads);
    if (decodes)
      share_decode_attention(worker, q, row, block.k_pages, block.v_pages, plan.page_ids, plan.offsets, plan.visible,
                             scratch.attended, decodes, heads, block.scale);
    if (decodes < tokens)
      share_prefill_attention(worker, q + decodes * row, row, block.k_pages, block.v_pages, plan.tile_rows,
                              plan.tile_offsets, plan.tile_page_ids, plan.tile_masks, plan.tile_hidden, plan.num_tiles,
                              scratch.attended + decodes * columns, heads, block.scale);
    multiply(block.c_proj, scratch.attended, update, NONE);
  };
  const auto mlp = [&](const BlockArgs& block, const ELEMENT* input) {
    multiply(block.c_fc, input, scratch.inner, activation);
    multiply(block.mlp_c_proj, scratch.inner, update, NONE);
  };

  for (const BlockArgs* block = blocks; block < blocks + num_blocks; block++)
    if (pre_norm) {
      add_norm(block->ln_1, block == blocks ? nullptr : update, scratch.normed);
      attention(*block, scratch.normed);
      add_norm(block->ln_2, update, scratch.normed);
      mlp(*block, scratch.normed);
    } else {
      attention(*block, x);
      add_norm(block->ln_1, update, x);
      mlp(*block, x);
      add_norm(block->ln_2, update, x);
    }
  if (final_norm) add_norm(*final_norm, pre_norm ? update : nullptr, scratch.normed);
}

}  // namespace

// model.gpt.Block.forward of each block in turn, then the final norm, if there is one, into scratch.normed. x and update
// are (tokens, heads * HEAD_DIM): the next norm adds them up, or takes x alone where norms follow (pre_norm is 0). The
// first `decodes` tokens are a row of a sequence each, the others are chunks of prompts.
extern "C" int64_t run_blocks(const BlockArgs* blocks, int64_t num_blocks, int pre_norm, int activation, int64_t heads,
                              const PlanArgs* plans, int64_t num_plans, int64_t tokens, int64_t decodes, ELEMENT* x,
                              ELEMENT* update, const ScratchArgs& scratch, const NormArgs* final_norm, int threads) {
  for (int64_t i = 0; i < num_plans; i++) fill_in(plans[i], tokens, decodes);
  return team().run(threads, [=](Worker& worker) {
    share_blocks(worker, blocks, num_blocks, pre_norm, activation, heads, plans, tokens, decodes, x, update, scratch,
                 final_norm);
  });
}
#endif
