// Pages of keys and values, (pages, heads, PAGE_SIZE, HEAD_DIM) of ELEMENT, and heads as vectors.
#pragma once

#include "abi.h"
#include "team.h"

namespace {

constexpr int PAGE_VECTORS = PAGE_SIZE / LANES;  // that hold a number for each key, or query, of a page
constexpr int64_t PAGE_NUMBERS = PAGE_SIZE * HEAD_DIM;  // of one head
constexpr int HEAD_VECTORS = (HEAD_DIM + LANES - 1) / LANES;
constexpr int TAIL = HEAD_DIM - (HEAD_VECTORS - 1) * LANES;  // numbers in the last of them

struct Head {
  f32x16 part[HEAD_VECTORS];
};

Head load_head(const ELEMENT* source) {
  Head head;
  for (int i = 0; i < HEAD_VECTORS - 1; i++) head.part[i] = load(source + i * LANES);
  head.part[HEAD_VECTORS - 1] = load<TAIL>(source + (HEAD_VECTORS - 1) * LANES);
  return head;
}

void store_head(ELEMENT* target, const Head& head) {
  for (int i = 0; i < HEAD_VECTORS - 1; i++) store(target + i * LANES, head.part[i]);
  store<TAIL>(target + (HEAD_VECTORS - 1) * LANES, head.part[HEAD_VECTORS - 1]);
}

void prefetch_head(const ELEMENT* source) {
  for (int i = 0; i < HEAD_DIM; i += 64 / sizeof(ELEMENT)) __builtin_prefetch(source + i, 0, 2);
}

void share_kv_write(Worker& worker, const ELEMENT* k, const ELEMENT* v, int64_t stride, ELEMENT* k_pages,
                    ELEMENT* v_pages, const int64_t* slot_mapping, int64_t count, int64_t heads) {
  worker.share(count, [&](int64_t i, Claim& claim) {
    if (!claim()) return;
    for (int64_t h = 0; h < heads; h++) {
      const int64_t row = (slot_mapping[i] / PAGE_SIZE * heads + h) * PAGE_SIZE + slot_mapping[i] % PAGE_SIZE;
      std::memcpy(k_pages + row * HEAD_DIM, k + i * stride + h * HEAD_DIM, HEAD_DIM * sizeof(ELEMENT));
      std::memcpy(v_pages + row * HEAD_DIM, v + i * stride + h * HEAD_DIM, HEAD_DIM * sizeof(ELEMENT));
    }
  });
}

}  // namespace

// kernels.ops.Ops.kv_write: k and v (count, heads, HEAD_DIM), tokens `stride` apart.
extern "C" int64_t kv_write(const ELEMENT* k, const ELEMENT* v, int64_t stride, ELEMENT* k_pages, ELEMENT* v_pages,
                            const int64_t* slot_mapping, int64_t count, int64_t heads, int threads) {
  return team().run(threads, [=](Worker& worker) {
    share_kv_write(worker, k, v, stride, k_pages, v_pages, slot_mapping, count, heads);
  });
}
