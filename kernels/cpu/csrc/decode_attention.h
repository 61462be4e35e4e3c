// Attention of one query a sequence over the sequence's live pages.
#pragma once

#include "pages.h"

namespace {

// Sequences that one thread takes through their pages side by side. A page that several of them see, as the rows of a
// draft do, is in the cache for all but the first.
constexpr int SIDE_BY_SIDE = 8;

// What a query has seen so far: `out` and `total` are sums weighted by exp(score - peak).
struct DecodeQuery {
  Head query, out;
  float peak, total;
};

// Takes in a page. `next` points to the keys needed after it: memory answers late, so they are prefetched now.
void attend(DecodeQuery& state, const ELEMENT* k, const ELEMENT* v, const uint8_t* visible, const ELEMENT* next) {
  const Head query = state.query;
  f32x16 scores[PAGE_VECTORS], best = f32x16{} - INF;
  for (int part = 0; part < PAGE_VECTORS; part++) {
    f32x16 products[LANES];
    for (int i = 0; i < LANES; i++) {
      const int place = (part * LANES + i) * HEAD_DIM;
      prefetch_head(v + place);
      const Head key = load_head(k + place);
      products[i] = key.part[0] * query.part[0];
      for (int j = 1; j < HEAD_VECTORS; j++) products[i] += key.part[j] * query.part[j];
    }
    scores[part] = select(nonzero(visible + part * LANES), sums(products), f32x16{} - INF);
    best = higher(best, scores[part]);
  }
  const float peak = std::max(state.peak, highest(best));
  if (peak == -INF) return;  // a sparse pattern shows this query nothing of the page
  const float fade = exp(f32x16{} + (state.peak - peak))[0];
  float weights[PAGE_SIZE];
  f32x16 total{};
  for (int part = 0; part < PAGE_VECTORS; part++) {
    const f32x16 weight = exp(scores[part] - peak);
    store(weights + part * LANES, weight);
    total += weight;
  }
  Head out = state.out;
  for (f32x16& part : out.part) part *= fade;
  for (int i = 0; i < PAGE_SIZE; i++) {
    prefetch_head(next + i * HEAD_DIM);
    if (!visible[i]) continue;  // it may never have been written, and 0 * NaN is NaN
    const Head value = load_head(v + i * HEAD_DIM);
    for (int j = 0; j < HEAD_VECTORS; j++) out.part[j] += weights[i] * value.part[j];
  }
  state.out = out;
  state.peak = peak;
  state.total = state.total * fade + sum(total);
}

void share_decode_attention(Worker& worker, const ELEMENT* q, int64_t stride, const ELEMENT* k_pages,
                            const ELEMENT* v_pages, const int64_t* page_ids, const int64_t* offsets,
                            const uint8_t* visible, ELEMENT* out, int64_t batch, int64_t heads, float scale) {
  worker.share((batch + SIDE_BY_SIDE - 1) / SIDE_BY_SIDE * heads, [&](int64_t piece, Claim& claim) {
    const int64_t first = piece / heads * SIDE_BY_SIDE, h = piece % heads;
    const int64_t count = std::min<int64_t>(SIDE_BY_SIDE, batch - first);
    const int64_t* begin = offsets + first;
    DecodeQuery queries[SIDE_BY_SIDE];
    int64_t most = 0;
    for (int64_t i = 0; i < count; i++) {
      queries[i] = DecodeQuery{load_head(q + (first + i) * stride + h * HEAD_DIM), Head{}, -INF, 0};
      for (f32x16& part : queries[i].query.part) part *= scale;
      most = std::max(most, begin[i + 1] - begin[i]);
    }
    for (int64_t p = 0; p < most; p++)
      for (int64_t i = 0; i < count; i++) {
        const int64_t entry = begin[i] + p;
        if (entry >= begin[i + 1]) continue;
        // The next sequence's page, or any page near the end of unequal contexts: a wrong guess costs little.
        const int64_t guess = std::min(i + 1 < count ? begin[i + 1] + p : begin[0] + p + 1, offsets[batch] - 1);
        const int64_t here = (page_ids[entry] * heads + h) * PAGE_NUMBERS;
        const int64_t next = (page_ids[guess] * heads + h) * PAGE_NUMBERS;
        attend(queries[i], k_pages + here, v_pages + here, visible + entry * PAGE_SIZE, k_pages + next);
      }
    for (int64_t i = 0; i < count; i++)
      for (f32x16& part : queries[i].out.part) part /= queries[i].total;
    if (!claim()) return;
    for (int64_t i = 0; i < count; i++) store_head(out + ((first + i) * heads + h) * HEAD_DIM, queries[i].out);
  });
}

}  // namespace

// kernels.ops.Ops.decode_attention: q (batch, heads, HEAD_DIM), rows `stride` apart; `out` (batch, heads, HEAD_DIM),
// contiguous. Entries offsets[b] to offsets[b + 1] of page_ids and visible are the pages of sequence b.
extern "C" int64_t decode_attention(const ELEMENT* q, int64_t stride, const ELEMENT* k_pages, const ELEMENT* v_pages,
                                    const int64_t* page_ids, const int64_t* offsets, const uint8_t* visible,
                                    ELEMENT* out, int64_t batch, int64_t heads, float scale, int threads) {
  return team().run(threads, [=](Worker& worker) {
    share_decode_attention(worker, q, stride, k_pages, v_pages, page_ids, offsets, visible, out, batch, heads, scale);
  });
}
