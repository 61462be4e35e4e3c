// The pages that a step's tokens read and write, from their rows and positions.
#pragma once

#include <algorithm>

#include "abi.h"

namespace {

// kernels.patterns.Pattern.sees.
inline bool sees(const PlanArgs& plan, int64_t query, int64_t key) {
  const int64_t size = plan.size, distance = query - key;
  if (distance < 0) return false;
  switch (plan.kind) {
    case BANDED: return distance < size;
    case STRIDED: return distance < size || distance % size == 0;
    case FIXED: return query / size == key / size || key % size >= size - plan.summary;
    default: return true;
  }
}

// Fills in the slots of all tokens, and the pages that the first `decodes` of them read: slot_mapping of
// kernels.plan.StepPlan, and DecodePlan.page_list.
inline void fill_in(const PlanArgs& plan, int64_t tokens, int64_t decodes) {
  int64_t count = 0;
  for (int64_t t = 0; t < tokens; t++) {
    const int32_t* const table = plan.page_table + plan.rows[t] * plan.table_stride;
    const int64_t position = plan.positions[t], own = position / PAGE_SIZE;
    plan.slot_mapping[t] = (int64_t)table[own] * PAGE_SIZE + position % PAGE_SIZE;
    if (t >= decodes) continue;
    const auto add = [&](int64_t page) {
      plan.page_ids[count] = table[page];
      uint8_t* const visible = plan.visible + count++ * PAGE_SIZE;
      for (int i = 0; i < PAGE_SIZE; i++) visible[i] = sees(plan, position, page * PAGE_SIZE + i);
    };
    plan.offsets[t] = count;
    if (plan.row_ptr) {
      for (int32_t i = plan.row_ptr[own]; i < plan.row_ptr[own + 1]; i++) add(plan.col_idx[i]);
    } else {
      const int64_t first = plan.kind == BANDED ? std::max<int64_t>(position + 1 - plan.size, 0) : 0;
      for (int64_t page = first / PAGE_SIZE; page <= own; page++) add(page);
    }
  }
  plan.offsets[decodes] = count;
}

}  // namespace
