// Attention of prompt chunks over pages of keys, in tiles of up to PAGE_SIZE queries. Each query has a lane of its
// own in every vector, so that its bits depend on no other query.
#pragma once

#include <optional>
#include <type_traits>

#include "amx.h"
#include "pages.h"

namespace {

constexpr int WIDTH = HEAD_VECTORS * LANES;  // numbers of a head, padded with zeros
constexpr int AT_ONCE = 4;  // keys that share the loads of queries, and numbers of a value that share the loads of weights

// What a tile's queries, the lanes, have seen so far: `out` and `total` are weighted by exp(score - peak).
struct QueryTile {
  f32x16 query[WIDTH][PAGE_VECTORS], out[WIDTH][PAGE_VECTORS], peak[PAGE_VECTORS], total[PAGE_VECTORS];
};

// Keys or values of a page as fp32, zeros from `count` on.
void widen_page(const ELEMENT* source, int64_t count, float (*target)[WIDTH]) {
  for (int64_t i = 0; i < PAGE_SIZE; i++) {
    const Head head = i < count ? load_head(source + i * HEAD_DIM) : Head{};
    std::memcpy(target[i], head.part, sizeof head);
  }
}

// `count` queries, `stride` apart, times `scale`; zeros in the other lanes.
void widen_queries(const ELEMENT* q, int64_t stride, int64_t count, float scale, f32x16 (*target)[PAGE_VECTORS]) {
  for (int p = 0; p < PAGE_VECTORS; p++) {
    Head heads[LANES];
    for (int i = 0; i < LANES; i++) heads[i] = p * LANES + i < count ? load_head(q + (p * LANES + i) * stride) : Head{};
    for (int d = 0; d < HEAD_VECTORS; d++) {
      f32x16 square[LANES];
      for (int i = 0; i < LANES; i++) square[i] = heads[i].part[d] * scale;
      transpose(square);
      for (int i = 0; i < LANES; i++) target[d * LANES + i][p] = square[i];
    }
  }
}

// `count` heads, `stride` apart: what the queries have seen.
void store_queries(const QueryTile& tile, int64_t count, ELEMENT* out, int64_t stride) {
  for (int p = 0; p < PAGE_VECTORS; p++) {
    Head heads[LANES];
    for (int d = 0; d < HEAD_VECTORS; d++) {
      f32x16 square[LANES];
      for (int i = 0; i < LANES; i++) square[i] = tile.out[d * LANES + i][p] / tile.total[p];
      transpose(square);
      for (int i = 0; i < LANES; i++) heads[i].part[d] = square[i];
    }
    for (int i = 0; i < LANES && p * LANES + i < count; i++) store_head(out + (p * LANES + i) * stride, heads[i]);
  }
}

// Takes in the first `count` keys of a page. `hidden` (key, query) marks keys to hide from a query; null hides none.
void attend(QueryTile& tile, const ELEMENT* k, const ELEMENT* v, int64_t count, const uint8_t* hidden) {
  float wide[PAGE_SIZE][WIDTH];
  f32x16 weights[PAGE_SIZE][PAGE_VECTORS], best[PAGE_VECTORS], fade[PAGE_VECTORS];
  widen_page(k, count, wide);
  std::memcpy(best, tile.peak, sizeof best);
  for (int64_t key = 0; key < PAGE_SIZE; key += AT_ONCE) {
    f32x16 scores[AT_ONCE][PAGE_VECTORS] = {};
    for (int64_t d = 0; d < WIDTH; d++)
      for (int i = 0; i < AT_ONCE; i++)
        for (int p = 0; p < PAGE_VECTORS; p++) scores[i][p] += wide[key + i][d] * tile.query[d][p];
    for (int i = 0; i < AT_ONCE; i++)
      for (int p = 0; p < PAGE_VECTORS; p++) {
        if (hidden)
          scores[i][p] = select(nonzero(hidden + (key + i) * PAGE_SIZE + p * LANES), f32x16{} - INF, scores[i][p]);
        best[p] = higher(best[p], scores[i][p]);
        weights[key + i][p] = scores[i][p];
      }
  }
  for (int p = 0; p < PAGE_VECTORS; p++) {
    // A query that has seen nothing yet: -inf - -inf would be NaN.
    const f32x16 peak = best[p] == -INF ? f32x16{} : best[p];
    fade[p] = exp(tile.peak[p] - peak);
    tile.peak[p] = best[p];
    f32x16 total{};
    for (int64_t key = 0; key < PAGE_SIZE; key++) total += weights[key][p] = exp(weights[key][p] - peak);
    tile.total[p] = tile.total[p] * fade[p] + total;
  }
  widen_page(v, count, wide);
  for (int64_t d = 0; d < WIDTH; d += AT_ONCE) {
    f32x16 out[AT_ONCE][PAGE_VECTORS];
    for (int i = 0; i < AT_ONCE; i++)
      for (int p = 0; p < PAGE_VECTORS; p++) out[i][p] = tile.out[d + i][p] * fade[p];
    for (int64_t key = 0; key < PAGE_SIZE; key++)
      for (int i = 0; i < AT_ONCE; i++)
        for (int p = 0; p < PAGE_VECTORS; p++) out[i][p] += wide[key][d + i] * weights[key][p];
    std::memcpy(tile.out[d], out, sizeof out);
  }
}

#ifdef AMX
// The same with AMX, which multiplies bfloat16: the weights of the values are rounded to it.

constexpr bool FITS_TILES = std::is_same<ELEMENT, bfloat16>::value && HEAD_DIM * sizeof(ELEMENT) % BLOCK == 0;
constexpr int PAIRS = PAGE_SIZE / 2;  // of keys
constexpr int PAIR_VECTORS = PAIRS / LANES;

// Pairs of values, (numbers of a head, pairs of keys), from the first `count` values of a page; the others are 0.
void pair_values(const ELEMENT* v, int64_t count, u32x16 (*pairs)[PAIR_VECTORS]) {
  for (int j = 0; j < PAIR_VECTORS; j++)
    for (int d = 0; d < HEAD_DIM; d += 2 * LANES) {
      f32x16 evens[LANES], odds[LANES];
      for (int i = 0; i < LANES; i++) {
        const int64_t key = 2 * (j * LANES + i);
        u32x16 a{}, b{};
        if (key < count) std::memcpy(&a, v + key * HEAD_DIM + d, sizeof a);
        if (key + 1 < count) std::memcpy(&b, v + (key + 1) * HEAD_DIM + d, sizeof b);
        evens[i] = bits_of<f32x16>((a & 0xffff) | (b << 16));
        odds[i] = bits_of<f32x16>((a >> 16) | (b & 0xffff0000));
      }
      transpose(evens);
      transpose(odds);
      for (int i = 0; i < LANES; i++) {
        pairs[d + 2 * i][j] = bits_of<u32x16>(evens[i]);
        pairs[d + 2 * i + 1][j] = bits_of<u32x16>(odds[i]);
      }
    }
}

// Pairs of numbers of `count` queries, `stride` apart: (pairs, queries). The other lanes are 0.
void pair_queries(const ELEMENT* q, int64_t stride, int64_t count, u32x16 (*pairs)[PAGE_VECTORS]) {
  for (int p = 0; p < PAGE_VECTORS; p++)
    for (int d = 0; d < HEAD_DIM; d += 2 * LANES) {
      f32x16 square[LANES] = {};
      for (int i = 0; i < LANES && p * LANES + i < count; i++)
        std::memcpy(&square[i], q + (p * LANES + i) * stride + d, sizeof square[i]);
      transpose(square);
      for (int i = 0; i < LANES; i++) pairs[d / 2 + i][p] = bits_of<u32x16>(square[i]);
    }
}

// Adds the products of tile 4 with pairs of all queries to the sums.
#define MULTIPLY_PAIRS(PAIRS)                                                  \
  _tile_loadd(5, PAIRS, ROW); _tile_dpbf16ps(0, 4, 5);                         \
  _tile_loadd(6, PAIRS + 1, ROW); _tile_dpbf16ps(1, 4, 6);                     \
  _tile_loadd(7, PAIRS + 2, ROW); _tile_dpbf16ps(2, 4, 7);                     \
  _tile_loadd(5, PAIRS + 3, ROW); _tile_dpbf16ps(3, 4, 5)

// `query` is pair_queries'.
void attend_by_tiles(QueryTile& tile, const u32x16 (*query)[PAGE_VECTORS], const ELEMENT* k, const ELEMENT* v, int64_t count,
                     const uint8_t* hidden, float scale) {
  constexpr int ROW = PAGE_VECTORS * sizeof(f32x16);  // bytes of one number of all queries
  f32x16 weights[PAGE_SIZE][PAGE_VECTORS], best[PAGE_VECTORS], fade[PAGE_VECTORS];
  for (int key = 0; key < PAGE_SIZE; key += TILE_ROWS) {
    ZERO_SUMS();
    for (int d = 0; d < HEAD_DIM; d += 2 * LANES) {
      _tile_loadd(4, k + key * HEAD_DIM + d, HEAD_DIM * sizeof(ELEMENT));
      MULTIPLY_PAIRS(query[d / 2]);
    }
    STORE_SUMS(weights[key], 1, ROW);
  }
  std::memcpy(best, tile.peak, sizeof best);
  for (int key = 0; key < PAGE_SIZE; key++)
    for (int p = 0; p < PAGE_VECTORS; p++) {
      f32x16 score = weights[key][p] * scale;
      if (hidden) score = select(nonzero(hidden + key * PAGE_SIZE + p * LANES), f32x16{} - INF, score);
      best[p] = higher(best[p], score);
      weights[key][p] = score;
    }
  u32x16 pairs[PAIRS][PAGE_VECTORS];
  for (int p = 0; p < PAGE_VECTORS; p++) {
    const f32x16 peak = best[p] == -INF ? f32x16{} : best[p];
    fade[p] = exp(tile.peak[p] - peak);
    tile.peak[p] = best[p];
    f32x16 total{};
    for (int i = 0; i < PAIRS; i++) {
      const f32x16 first = exp(weights[2 * i][p] - peak), second = exp(weights[2 * i + 1][p] - peak);
      total += first + second;
      pairs[i][p] = __builtin_convertvector(bfloat16::narrow(first), u32x16) |
                    __builtin_convertvector(bfloat16::narrow(second), u32x16) << 16;
    }
    tile.total[p] = tile.total[p] * fade[p] + total;
  }
  u32x16 values[HEAD_DIM][PAIR_VECTORS];
  pair_values(v, count, values);
  for (int d = 0; d < HEAD_DIM; d++)
    for (int p = 0; p < PAGE_VECTORS; p++) tile.out[d][p] *= fade[p];
  for (int d = 0; d < HEAD_DIM; d += TILE_ROWS) {
    _tile_loadd(0, tile.out[d], ROW);
    _tile_loadd(1, tile.out[d] + 1, ROW);
    _tile_loadd(2, tile.out[d] + 2, ROW);
    _tile_loadd(3, tile.out[d] + 3, ROW);
    for (int j = 0; j < PAIR_VECTORS; j++) {
      _tile_loadd(4, values[d] + j, sizeof values[d]);
      MULTIPLY_PAIRS(pairs[j * LANES]);
    }
    STORE_SUMS(tile.out[d], 1, ROW);
  }
}
#endif

void share_prefill_attention(Worker& worker, const ELEMENT* q, int64_t stride, const ELEMENT* k_pages,
                             const ELEMENT* v_pages, const int64_t* rows, const int64_t* offsets,
                             const int64_t* page_ids, const int64_t* masks, const uint8_t* hidden, int64_t num_tiles,
                             ELEMENT* out, int64_t heads, float scale) {
#ifdef AMX
  std::optional<AmxTiles> amx;
  if (FITS_TILES && has_tiles) amx.emplace(TILE_ROWS);
#endif
  worker.share(num_tiles * heads, [&](int64_t piece, Claim& claim) {
    const int64_t t = piece / heads, h = piece % heads;
    const int64_t first = rows[3 * t], count = rows[3 * t + 1], last_keys = rows[3 * t + 2];
    static thread_local QueryTile tile;
    std::memset(&tile, 0, sizeof tile);
    for (f32x16& peak : tile.peak) peak = f32x16{} - INF;
    const ELEMENT* queries = q + first * stride + h * HEAD_DIM;
#ifdef AMX
    u32x16 pairs[WIDTH / 2][PAGE_VECTORS];
    if (amx)
      pair_queries(queries, stride, count, pairs);
    else
#endif
      widen_queries(queries, stride, count, scale, tile.query);
    for (int64_t entry = offsets[t]; entry < offsets[t + 1]; entry++) {
      const int64_t place = (page_ids[entry] * heads + h) * PAGE_NUMBERS;
      const int64_t written = entry + 1 < offsets[t + 1] ? PAGE_SIZE : last_keys;
      const uint8_t* mask = masks[entry] < 0 ? nullptr : hidden + masks[entry] * PAGE_SIZE * PAGE_SIZE;
#ifdef AMX
      if (amx) {
        attend_by_tiles(tile, pairs, k_pages + place, v_pages + place, written, mask, scale);
        continue;
      }
#endif
      attend(tile, k_pages + place, v_pages + place, written, mask);
    }
    if (claim()) store_queries(tile, count, out + (first * heads + h) * HEAD_DIM, heads * HEAD_DIM);
  });
}

}  // namespace

// kernels.ops.Ops.prefill_attention: q (tokens, heads, HEAD_DIM), tokens `stride` apart; `out`
// (tokens, heads, HEAD_DIM), contiguous. rows to hidden are kernels.plan.TileList's.
extern "C" int64_t prefill_attention(const ELEMENT* q, int64_t stride, const ELEMENT* k_pages, const ELEMENT* v_pages,
                                     const int64_t* rows, const int64_t* offsets, const int64_t* page_ids,
                                     const int64_t* masks, const uint8_t* hidden, int64_t num_tiles, ELEMENT* out,
                                     int64_t heads, float scale, int threads) {
  return team().run(threads, [=](Worker& worker) {
    share_prefill_attention(worker, q, stride, k_pages, v_pages, rows, offsets, page_ids, masks, hidden, num_tiles, out,
                            heads, scale);
  });
}
