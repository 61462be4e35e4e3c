// The loops of kernels/cpu/compiled.py: attention over live pages, norms, and products of packed weights.
//
// Compiled on the machine that runs it, for one ELEMENT (the type of activations, keys and values) and one HEAD_DIM. A row's
// arithmetic depends on its own numbers and pages only, so that it has the same bits whatever stands beside it.

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__)
#define AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int PAGE_SIZE = 64;
constexpr int LANES = 16;
constexpr float INF = __builtin_inff();

// GCC's and Clang's vectors: the compiler makes of them what the machine has.
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t SignedBytes __attribute__((vector_size(LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

// 1.5 * 2^23. Added to a number it rounds that to the nearest integer, ties to even, which its last bits then are.
constexpr float ROUNDER = 12582912;

struct bfloat16 {
  uint16_t bits;
};

template <class To, class From>
To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To result;
  std::memcpy(&result, &x, sizeof(To));
  return result;
}

// COUNT numbers as fp32, and zeros behind them.
template <int COUNT = LANES>
Floats load(const float* source) {
  Floats result{};
  std::memcpy(&result, source, COUNT * sizeof *source);
  return result;
}

template <int COUNT = LANES>
Floats load(const bfloat16* source) {
  Halves raw{};
  std::memcpy(&raw, source, COUNT * sizeof *source);
#ifdef __AVX512F__  // compilers make five instructions of the other
  return bits_of<Floats>((Words)_mm512_cvtepu16_epi32((__m256i)raw) << 16);
#else
  return bits_of<Floats>(__builtin_convertvector(raw, Words) << 16);
#endif
}

// The first COUNT numbers, rounded to the nearest, ties to even.
template <int COUNT = LANES>
void store(float* target, Floats x) {
  std::memcpy(target, &x, COUNT * sizeof *target);
}

template <int COUNT = LANES>
void store(bfloat16* target, Floats x) {
#ifdef __AVX512BF16__
  const auto narrow = _mm512_cvtneps_pbh((__m512)x);
#else
  const Words raw = bits_of<Words>(x);
  const Words rounded = x == x ? raw + 0x7fff + ((raw >> 16) & 1) : raw | 0x400000;  // NaN stays NaN
  const Halves narrow = __builtin_convertvector(rounded >> 16, Halves);
#endif
  std::memcpy(target, &narrow, COUNT * sizeof *target);
}

#ifdef __FLT16_MAX__
typedef _Float16 float16;
typedef _Float16 Float16s __attribute__((vector_size(2 * LANES)));

template <int COUNT = LANES>
Floats load(const float16* source) {
  Float16s raw{};
  std::memcpy(&raw, source, COUNT * sizeof *source);
  return __builtin_convertvector(raw, Floats);
}

template <int COUNT = LANES>
void store(float16* target, Floats x) {
  Float16s narrow = __builtin_convertvector(x, Float16s);
  std::memcpy(target, &narrow, COUNT * sizeof *target);
}
#endif

// Of two vectors cut into pieces of WIDTH lanes: the even pieces of both in turn, and the odd ones.
template <int WIDTH>
Floats even(Floats a, Floats b) {
  if (WIDTH == 8) return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  if (WIDTH == 4) return __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
  if (WIDTH == 2) return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  return __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
}

template <int WIDTH>
Floats odd(Floats a, Floats b) {
  if (WIDTH == 8) return __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  if (WIDTH == 4) return __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  if (WIDTH == 2) return __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

template <int WIDTH>
void fold(Floats* rows) {
  for (int i = 0; i < WIDTH; i++) rows[i] = even<WIDTH>(rows[i], rows[i + WIDTH]) + odd<WIDTH>(rows[i], rows[i + WIDTH]);
}

// Lane i of the result is the sum over all lanes of rows[i]; overwrites the rows. Always added in the same order.
Floats sums(Floats* rows) {
  fold<8>(rows);
  fold<4>(rows);
  fold<2>(rows);
  fold<1>(rows);
  return rows[0];
}

template <int WIDTH>
void swap(Floats* rows) {
  for (int i = 0; i < LANES; i++) {
    if (i & WIDTH) continue;
    const Floats a = rows[i], b = rows[i + WIDTH];
    rows[i] = even<WIDTH>(a, b);
    rows[i + WIDTH] = odd<WIDTH>(a, b);
  }
}

// A square of numbers, or of other 32 bits.
void transpose(Floats* rows) {
  swap<8>(rows);
  swap<4>(rows);
  swap<2>(rows);
  swap<1>(rows);
}

// Of numbers that ROUNDER has been added to.
Ints integers(Floats shifted) { return bits_of<Ints>(shifted) - bits_of<int32_t>(ROUNDER); }

float sum(Floats x) {
  Floats rows[LANES] = {x};
  return sums(rows)[0];
}

float highest(Floats x) {
  float best = x[0];
  for (int i = 1; i < LANES; i++) best = std::max(best, x[i]);
  return best;
}

// e^x to within 1e-7 of it; 0 below -87, where it has no normal number. Cephes' reduction and polynomial.
Floats exp(Floats x) {
  Floats y = x < -87.3f ? Floats{} - 87.3f : x > 88.3f ? Floats{} + 88.3f : x;
  Floats shifted = y * 1.44269504f + ROUNDER;
  Floats whole = shifted - ROUNDER;
  Floats r = y - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  p = bits_of<Floats>(bits_of<Ints>(p) + (integers(shifted) << 23));
  return x < -87.3f ? Floats{} : x == x ? p : x;
}

// Bytes of a row of numbers that are multiplied: an instruction takes GROUP of them, a tile BLOCK.
constexpr int GROUP = 4, BLOCK = 64;

#ifdef AMX
constexpr int TILE_ROWS = 16;

bool ask_for_tiles() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0; }
const bool has_tiles = ask_for_tiles();

// Gives this thread tiles of `rows` rows for what is multiplied, and takes them back.
struct Tiles {
  explicit Tiles(int64_t rows) {
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; i++) shape.bytes[i] = BLOCK, shape.rows[i] = i < 6 ? rows : BLOCK / GROUP;
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
};
#endif

// ---- decode attention

constexpr int PARTS = PAGE_SIZE / LANES;  // vectors of a page's keys, or queries
constexpr int VECTORS = (HEAD_DIM + LANES - 1) / LANES;
constexpr int TAIL = HEAD_DIM - (VECTORS - 1) * LANES;  // numbers in the last of them
// Sequences that go through their pages side by side: a page that several see, as a draft's rows do, is in the cache for
// all but the first.
constexpr int ROWS = 8;

struct Head {
  Floats part[VECTORS];
};

Head load_head(const ELEMENT* source) {
  Head head;
  for (int i = 0; i < VECTORS - 1; i++) head.part[i] = load(source + i * LANES);
  head.part[VECTORS - 1] = load<TAIL>(source + (VECTORS - 1) * LANES);
  return head;
}

void store_head(ELEMENT* target, const Head& head) {
  for (int i = 0; i < VECTORS - 1; i++) store(target + i * LANES, head.part[i]);
  store<TAIL>(target + (VECTORS - 1) * LANES, head.part[VECTORS - 1]);
}

void prefetch_head(const ELEMENT* source) {
  for (int i = 0; i < HEAD_DIM; i += 64 / sizeof(ELEMENT)) __builtin_prefetch(source + i, 0, 2);
}

// What a query has seen so far: `out` and `total` are sums of exp(score - peak).
struct Softmax {
  Head query, out;
  float peak, total;
};

// Takes in a page. `next` holds the keys that will be needed after it: memory answers late, and they are asked for now.
void attend(Softmax& softmax, const ELEMENT* k, const ELEMENT* v, const uint8_t* visible, const ELEMENT* next) {
  const Head query = softmax.query;
  Floats scores[PARTS], best = Floats{} - INF;
  for (int part = 0; part < PARTS; part++) {
    Floats products[LANES];
    for (int i = 0; i < LANES; i++) {
      const int place = (part * LANES + i) * HEAD_DIM;
      prefetch_head(v + place);
      const Head key = load_head(k + place);
      products[i] = key.part[0] * query.part[0];
      for (int j = 1; j < VECTORS; j++) products[i] += key.part[j] * query.part[j];
    }
    Bytes seen;
    std::memcpy(&seen, visible + part * LANES, LANES);
    scores[part] = __builtin_convertvector(seen, Ints) != 0 ? sums(products) : Floats{} - INF;
    best = best > scores[part] ? best : scores[part];
  }
  const float peak = std::max(softmax.peak, highest(best));
  if (peak == -INF) return;  // a sparse pattern shows this query nothing of the page
  const float fade = exp(Floats{} + (softmax.peak - peak))[0];
  float weights[PAGE_SIZE];
  Floats total{};
  for (int part = 0; part < PARTS; part++) {
    const Floats weight = exp(scores[part] - peak);
    store(weights + part * LANES, weight);
    total += weight;
  }
  Head out = softmax.out;
  for (Floats& part : out.part) part *= fade;
  for (int i = 0; i < PAGE_SIZE; i++) {
    prefetch_head(next + i * HEAD_DIM);
    if (!visible[i]) continue;  // may never have been written, and 0 * NaN is NaN
    const Head value = load_head(v + i * HEAD_DIM);
    for (int j = 0; j < VECTORS; j++) out.part[j] += weights[i] * value.part[j];
  }
  softmax.out = out;
  softmax.peak = peak;
  softmax.total = softmax.total * fade + sum(total);
}

// Copies the keys or values of `count` tokens, `stride` apart, to their pages. A parallel region calls it in all its threads.
void write_pages(const ELEMENT* source, int64_t stride, ELEMENT* pages, const int64_t* slot_mapping, int64_t count,
                 int64_t heads) {
#pragma omp for nowait
  for (int64_t i = 0; i < count; i++)
    for (int64_t h = 0; h < heads; h++) {
      const int64_t row = (slot_mapping[i] / PAGE_SIZE * heads + h) * PAGE_SIZE + slot_mapping[i] % PAGE_SIZE;
      std::memcpy(pages + row * HEAD_DIM, source + i * stride + h * HEAD_DIM, HEAD_DIM * sizeof(ELEMENT));
    }
}

}  // namespace

// kernels.ops.Ops.kv_write: k and v (count, heads, HEAD_DIM), whose rows stand `stride` apart.
extern "C" void kv_write(const ELEMENT* k, const ELEMENT* v, int64_t stride, ELEMENT* k_pages, ELEMENT* v_pages,
                         const int64_t* slot_mapping, int64_t count, int64_t heads, int threads) {
#pragma omp parallel num_threads(threads)
  {
    write_pages(k, stride, k_pages, slot_mapping, count, heads);
    write_pages(v, stride, v_pages, slot_mapping, count, heads);
  }
}

// kernels.ops.Ops.decode_step: q, k and v (batch, heads, HEAD_DIM), whose rows stand `stride` apart, `out` side by side; the
// pages of sequence b are entries offsets[b] to offsets[b + 1] of page_ids and visible.
extern "C" void decode_step(const ELEMENT* q, const ELEMENT* k, const ELEMENT* v, int64_t stride, ELEMENT* k_pages,
                            ELEMENT* v_pages, const int64_t* slot_mapping, const int64_t* page_ids, const int64_t* offsets,
                            const uint8_t* visible, ELEMENT* out, int64_t batch, int64_t heads, float scale, int threads) {
  const int64_t page = PAGE_SIZE * HEAD_DIM;  // of one head
#pragma omp parallel num_threads(threads)
  {
    write_pages(k, stride, k_pages, slot_mapping, batch, heads);
    write_pages(v, stride, v_pages, slot_mapping, batch, heads);
#pragma omp barrier
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t first = 0; first < batch; first += ROWS)
      for (int64_t h = 0; h < heads; h++) {
        const int64_t count = std::min<int64_t>(ROWS, batch - first);
        const int64_t* begin = offsets + first;
        Softmax rows[ROWS];
        int64_t most = 0;
        for (int64_t i = 0; i < count; i++) {
          rows[i] = Softmax{load_head(q + (first + i) * stride + h * HEAD_DIM), Head{}, -INF, 0};
          for (Floats& part : rows[i].query.part) part *= scale;
          most = std::max(most, begin[i + 1] - begin[i]);
        }
        for (int64_t p = 0; p < most; p++)
          for (int64_t i = 0; i < count; i++) {
            const int64_t entry = begin[i] + p;
            if (entry >= begin[i + 1]) continue;
            // The next one's, or near the end of unequal contexts some other: a wrong guess costs a little time.
            const int64_t guess = std::min(i + 1 < count ? begin[i + 1] + p : begin[0] + p + 1, offsets[batch] - 1);
            const int64_t here = (page_ids[entry] * heads + h) * page, next = (page_ids[guess] * heads + h) * page;
            attend(rows[i], k_pages + here, v_pages + here, visible + entry * PAGE_SIZE, k_pages + next);
          }
        for (int64_t i = 0; i < count; i++) {
          for (Floats& part : rows[i].out.part) part /= rows[i].total;
          store_head(out + ((first + i) * heads + h) * HEAD_DIM, rows[i].out);
        }
      }
  }
}

// ---- attention of prompts

namespace {

constexpr int WIDTH = VECTORS * LANES;  // numbers of a head, padded with zeros
constexpr int AT_ONCE = 4;              // keys, or numbers of a value, that share the loads of queries, or weights

// What the queries of a page have seen so far: `out` and `total` are sums of exp(score - peak). A query is a lane of every
// vector, so that none has to do with another.
struct Tile {
  Floats query[WIDTH][PARTS], out[WIDTH][PARTS], peak[PARTS], total[PARTS];
};

void widen(const ELEMENT* source, int64_t count, float (*target)[WIDTH]) {
  for (int64_t i = 0; i < PAGE_SIZE; i++) {
    const Head head = i < count ? load_head(source + i * HEAD_DIM) : Head{};
    std::memcpy(target[i], head.part, sizeof head);
  }
}

// `count` queries, `stride` apart, times `scale`; the other lanes are 0.
void widen_queries(const ELEMENT* q, int64_t stride, int64_t count, float scale, Floats (*target)[PARTS]) {
  for (int p = 0; p < PARTS; p++) {
    Head heads[LANES];
    for (int i = 0; i < LANES; i++) heads[i] = p * LANES + i < count ? load_head(q + (p * LANES + i) * stride) : Head{};
    for (int d = 0; d < VECTORS; d++) {
      Floats some[LANES];
      for (int i = 0; i < LANES; i++) some[i] = heads[i].part[d] * scale;
      transpose(some);
      for (int i = 0; i < LANES; i++) target[d * LANES + i][p] = some[i];
    }
  }
}

// Takes in the first `count` keys of a page. `hidden` (key, query) says which a query does not see; null where it sees all.
void attend(Tile& tile, const ELEMENT* k, const ELEMENT* v, int64_t count, const uint8_t* hidden) {
  float wide[PAGE_SIZE][WIDTH];
  Floats weights[PAGE_SIZE][PARTS], best[PARTS], fade[PARTS];
  widen(k, count, wide);
  std::memcpy(best, tile.peak, sizeof best);
  for (int64_t key = 0; key < PAGE_SIZE; key += AT_ONCE) {
    Floats scores[AT_ONCE][PARTS] = {};
    for (int64_t d = 0; d < WIDTH; d++)
      for (int i = 0; i < AT_ONCE; i++)
        for (int p = 0; p < PARTS; p++) scores[i][p] += wide[key + i][d] * tile.query[d][p];
    for (int i = 0; i < AT_ONCE; i++)
      for (int p = 0; p < PARTS; p++) {
        if (hidden) {
          Bytes unseen;
          std::memcpy(&unseen, hidden + (key + i) * PAGE_SIZE + p * LANES, LANES);
          scores[i][p] = __builtin_convertvector(unseen, Ints) != 0 ? Floats{} - INF : scores[i][p];
        }
        best[p] = best[p] > scores[i][p] ? best[p] : scores[i][p];
        weights[key + i][p] = scores[i][p];
      }
  }
  for (int p = 0; p < PARTS; p++) {
    // -inf - -inf is NaN: a query that has seen nothing yet.
    const Floats peak = best[p] == -INF ? Floats{} : best[p];
    fade[p] = exp(tile.peak[p] - peak);
    tile.peak[p] = best[p];
    Floats total{};
    for (int64_t key = 0; key < PAGE_SIZE; key++) total += weights[key][p] = exp(weights[key][p] - peak);
    tile.total[p] = tile.total[p] * fade[p] + total;
  }
  widen(v, count, wide);
  for (int64_t d = 0; d < WIDTH; d += AT_ONCE) {
    Floats out[AT_ONCE][PARTS];
    for (int i = 0; i < AT_ONCE; i++)
      for (int p = 0; p < PARTS; p++) out[i][p] = tile.out[d + i][p] * fade[p];
    for (int64_t key = 0; key < PAGE_SIZE; key++)
      for (int i = 0; i < AT_ONCE; i++)
        for (int p = 0; p < PARTS; p++) out[i][p] += wide[key][d + i] * weights[key][p];
    std::memcpy(tile.out[d], out, sizeof out);
  }
}

#ifdef AMX
// The same by tiles, which multiply bfloat16: weights are rounded to it.

constexpr bool FITS_TILES = std::is_same<ELEMENT, bfloat16>::value && HEAD_DIM * sizeof(ELEMENT) % BLOCK == 0;
constexpr int PAIRS = PAGE_SIZE / 2;  // of keys

// Pairs of values, (numbers of a head, pairs of keys), from the first `count` values of a page. The others are 0.
void pair_values(const ELEMENT* v, int64_t count, Words (*pairs)[PAIRS / LANES]) {
  for (int j = 0; j < PAIRS / LANES; j++)
    for (int d = 0; d < HEAD_DIM; d += 2 * LANES) {
      Floats evens[LANES], odds[LANES];
      for (int i = 0; i < LANES; i++) {
        const int64_t key = 2 * (j * LANES + i);
        Words a{}, b{};
        if (key < count) std::memcpy(&a, v + key * HEAD_DIM + d, sizeof a);
        if (key + 1 < count) std::memcpy(&b, v + (key + 1) * HEAD_DIM + d, sizeof b);
        evens[i] = bits_of<Floats>((a & 0xffff) | (b << 16));
        odds[i] = bits_of<Floats>((a >> 16) | (b & 0xffff0000));
      }
      transpose(evens);
      transpose(odds);
      for (int i = 0; i < LANES; i++) {
        pairs[d + 2 * i][j] = bits_of<Words>(evens[i]);
        pairs[d + 2 * i + 1][j] = bits_of<Words>(odds[i]);
      }
    }
}

// Pairs of numbers of `count` queries, `stride` apart: (pairs, queries). The other lanes are 0.
void pair_queries(const ELEMENT* q, int64_t stride, int64_t count, Words (*pairs)[PARTS]) {
  for (int p = 0; p < PARTS; p++)
    for (int d = 0; d < HEAD_DIM; d += 2 * LANES) {
      Floats some[LANES] = {};
      for (int i = 0; i < LANES && p * LANES + i < count; i++)
        std::memcpy(&some[i], q + (p * LANES + i) * stride + d, sizeof some[i]);
      transpose(some);
      for (int i = 0; i < LANES; i++) pairs[d / 2 + i][p] = bits_of<Words>(some[i]);
    }
}

// `query` is pair_queries'.
void attend_by_tiles(Tile& tile, const Words (*query)[PARTS], const ELEMENT* k, const ELEMENT* v, int64_t count,
                     const uint8_t* hidden, float scale) {
  constexpr int ROW = PARTS * sizeof(Floats);  // bytes of a number of all queries
  Floats weights[PAGE_SIZE][PARTS], best[PARTS], fade[PARTS];
  for (int key = 0; key < PAGE_SIZE; key += TILE_ROWS) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int d = 0; d < HEAD_DIM; d += 2 * LANES) {
      _tile_loadd(4, k + key * HEAD_DIM + d, HEAD_DIM * sizeof(ELEMENT));
      _tile_loadd(5, query[d / 2], ROW);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, query[d / 2] + 1, ROW);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(7, query[d / 2] + 2, ROW);
      _tile_dpbf16ps(2, 4, 7);
      _tile_loadd(5, query[d / 2] + 3, ROW);
      _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, weights[key], ROW);
    _tile_stored(1, weights[key] + 1, ROW);
    _tile_stored(2, weights[key] + 2, ROW);
    _tile_stored(3, weights[key] + 3, ROW);
  }
  std::memcpy(best, tile.peak, sizeof best);
  for (int key = 0; key < PAGE_SIZE; key++)
    for (int p = 0; p < PARTS; p++) {
      Floats score = weights[key][p] * scale;
      if (hidden) {
        Bytes unseen;
        std::memcpy(&unseen, hidden + key * PAGE_SIZE + p * LANES, LANES);
        score = __builtin_convertvector(unseen, Ints) != 0 ? Floats{} - INF : score;
      }
      best[p] = best[p] > score ? best[p] : score;
      weights[key][p] = score;
    }
  Words pairs[PAIRS][PARTS];
  for (int p = 0; p < PARTS; p++) {
    const Floats peak = best[p] == -INF ? Floats{} : best[p];
    fade[p] = exp(tile.peak[p] - peak);
    tile.peak[p] = best[p];
    Floats total{};
    for (int i = 0; i < PAIRS; i++) {
      const Floats first = exp(weights[2 * i][p] - peak), second = exp(weights[2 * i + 1][p] - peak);
      total += first + second;
      pairs[i][p] = __builtin_convertvector((Halves)_mm512_cvtneps_pbh((__m512)first), Words) |
                    __builtin_convertvector((Halves)_mm512_cvtneps_pbh((__m512)second), Words) << 16;
    }
    tile.total[p] = tile.total[p] * fade[p] + total;
  }
  Words values[HEAD_DIM][PAIRS / LANES];
  pair_values(v, count, values);
  for (int d = 0; d < HEAD_DIM; d++)
    for (int p = 0; p < PARTS; p++) tile.out[d][p] *= fade[p];
  for (int d = 0; d < HEAD_DIM; d += TILE_ROWS) {
    _tile_loadd(0, tile.out[d], ROW);
    _tile_loadd(1, tile.out[d] + 1, ROW);
    _tile_loadd(2, tile.out[d] + 2, ROW);
    _tile_loadd(3, tile.out[d] + 3, ROW);
    for (int j = 0; j < PAIRS / LANES; j++) {
      _tile_loadd(4, values[d] + j, sizeof values[d]);
      _tile_loadd(5, pairs[j * LANES], ROW);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, pairs[j * LANES] + 1, ROW);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(7, pairs[j * LANES] + 2, ROW);
      _tile_dpbf16ps(2, 4, 7);
      _tile_loadd(5, pairs[j * LANES] + 3, ROW);
      _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, tile.out[d], ROW);
    _tile_stored(1, tile.out[d] + 1, ROW);
    _tile_stored(2, tile.out[d] + 2, ROW);
    _tile_stored(3, tile.out[d] + 3, ROW);
  }
}
#endif

}  // namespace

// kernels.ops.Ops.prefill_attention and block_sparse_attention: q (tokens, heads, HEAD_DIM), whose rows stand `stride` apart,
// `out` side by side. The rest is kernels.plan.TileList's.
extern "C" void prefill_attention(const ELEMENT* q, int64_t stride, const ELEMENT* k_pages, const ELEMENT* v_pages,
                                  const int64_t* rows, const int64_t* offsets, const int64_t* page_ids,
                                  const int64_t* masks, const uint8_t* hidden, int64_t num_tiles, ELEMENT* out,
                                  int64_t heads, float scale, int threads) {
  const int64_t page = PAGE_SIZE * HEAD_DIM;  // of one head
#pragma omp parallel num_threads(threads)
  {
#ifdef AMX
    std::optional<Tiles> tiles;
    if (FITS_TILES && has_tiles) tiles.emplace(TILE_ROWS);
#endif
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t t = 0; t < num_tiles; t++)
      for (int64_t h = 0; h < heads; h++) {
        const int64_t first = rows[3 * t], count = rows[3 * t + 1], last_keys = rows[3 * t + 2];
        static thread_local Tile tile;
        std::memset(&tile, 0, sizeof tile);
        for (Floats& peak : tile.peak) peak = Floats{} - INF;
        const ELEMENT* queries = q + first * stride + h * HEAD_DIM;
#ifdef AMX
        Words pairs[WIDTH / 2][PARTS];
        if (tiles)
          pair_queries(queries, stride, count, pairs);
        else
#endif
          widen_queries(queries, stride, count, scale, tile.query);
        for (int64_t entry = offsets[t]; entry < offsets[t + 1]; entry++) {
          const int64_t place = (page_ids[entry] * heads + h) * page;
          const int64_t written = entry + 1 < offsets[t + 1] ? PAGE_SIZE : last_keys;
          const uint8_t* mask = masks[entry] < 0 ? nullptr : hidden + masks[entry] * PAGE_SIZE * PAGE_SIZE;
#ifdef AMX
          if (tiles) {
            attend_by_tiles(tile, pairs, k_pages + place, v_pages + place, written, mask, scale);
            continue;
          }
#endif
          attend(tile, k_pages + place, v_pages + place, written, mask);
        }
        for (int p = 0; p < PARTS; p++) {
          Head heads_of[LANES];
          for (int d = 0; d < VECTORS; d++) {
            Floats some[LANES];
            for (int i = 0; i < LANES; i++) some[i] = tile.out[d * LANES + i][p] / tile.total[p];
            transpose(some);
            for (int i = 0; i < LANES; i++) heads_of[i].part[d] = some[i];
          }
          for (int i = 0; i < LANES && p * LANES + i < count; i++)
            store_head(out + ((first + p * LANES + i) * heads + h) * HEAD_DIM, heads_of[i]);
        }
      }
  }
}

// ---- norms

// kernels.ops.Ops.add_layernorm of x (rows, columns), columns a multiple of LANES; weight and bias may be null, and so may
// residual, together with `total`.
extern "C" void add_layernorm(const ELEMENT* x, const ELEMENT* residual, const ELEMENT* weight, const ELEMENT* bias,
                              int64_t rows, int64_t columns, float eps, ELEMENT* normed, ELEMENT* total, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < rows; r++) {
    const ELEMENT* row = x + r * columns;
    if (residual) {
      for (int64_t i = 0; i < columns; i += LANES)
        store(total + r * columns + i, load(row + i) + load(residual + r * columns + i));
      row = total + r * columns;
    }
    Floats sums{}, squares{};
    for (int64_t i = 0; i < columns; i += LANES) sums += load(row + i);
    const float mean = sum(sums) / columns;
    for (int64_t i = 0; i < columns; i += LANES) {
      const Floats distance = load(row + i) - mean;
      squares += distance * distance;
    }
    const float factor = 1.0f / __builtin_sqrtf(sum(squares) / columns + eps);
    for (int64_t i = 0; i < columns; i += LANES) {
      Floats y = (load(row + i) - mean) * factor;
      if (weight) y *= load(weight + i);
      if (bias) y += load(bias + i);
      store(normed + r * columns + i, y);
    }
  }
}

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)  // where they are missing, so are the functions below
namespace {

// ---- products with few rows

// Both kinds of numbers meet in one layout: an instruction multiplies GROUP bytes of a row with GROUP bytes of each of LANES
// channels and adds up the products of each, which are exact until then. A panel holds LANES channels, group after group, and
// is read from front to back. Rows are whole multiples of BLOCK bytes long.
constexpr int PANELS = 2;    // that go together; there is an even number of them
constexpr int AHEAD = 4096;  // bytes of a panel by which memory is asked before they are needed

enum Kind { INT8, BF16 };  // signed rows and unsigned weights, or bfloat16 both

// One step of LANES sums. Around the intrinsics of these instructions GCC 12 copies all sums twice.
template <Kind KIND>
void multiply_add(Ints& sums, Ints weights, Ints group) {
  if (KIND == INT8)
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(group));
  else
    asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(group));
}

// Sums of products of R rows with the channels of P panels: (R, P, LANES).
template <Kind KIND, int R, int P>
void multiply(const uint8_t* rows, const uint8_t* panels, int64_t bytes, Ints* sums) {
  Ints total[R * P];
#pragma GCC unroll 32
  for (int i = 0; i < R * P; i++) total[i] = Ints{};
  for (int64_t c = 0; c < bytes; c += GROUP) {
    Ints weights[P];
#pragma GCC unroll 32
    for (int p = 0; p < P; p++) {
      const uint8_t* source = panels + (p * bytes + c) * LANES;
      std::memcpy(&weights[p], source, sizeof weights[p]);
      __builtin_prefetch(source + AHEAD);
    }
#pragma GCC unroll 32
    for (int r = 0; r < R; r++) {
      int32_t group;
      std::memcpy(&group, rows + r * bytes + c, GROUP);
#pragma GCC unroll 32
      for (int p = 0; p < P; p++) multiply_add<KIND>(total[r * P + p], weights[p], Ints{} + group);
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < R * P; i++) sums[i] = total[i];
}

typedef void (*Multiply)(const uint8_t*, const uint8_t*, int64_t, Ints*);

template <Kind KIND, int P, int... R>
constexpr Multiply for_rows(int64_t count, std::integer_sequence<int, R...>) {
  constexpr Multiply functions[] = {multiply<KIND, R + 1, P>...};
  return functions[count - 1];
}

// Up to MANY rows take their sums with one panel at once, so that each weight is read once; where there are fewer, and where
// more go in blocks of FEW, two panels need fewer loads for each product.
constexpr int MANY = 16, FEW = 8;

#ifdef AMX
#define MULTIPLY_TILES(SUMS, ROWS, WEIGHTS) \
  if (KIND == INT8)                         \
    _tile_dpbsud(SUMS, ROWS, WEIGHTS);      \
  else                                      \
    _tile_dpbf16ps(SUMS, ROWS, WEIGHTS);

// Sums of TILE_ROWS rows each, from `first` on and from `second` on, with the channels of two panels: (2, PANELS, TILE_ROWS,
// LANES). `second` may be null.
template <Kind KIND>
void multiply_tiles(const uint8_t* first, const uint8_t* second, const uint8_t* panels, int64_t bytes, Ints* sums) {
  const uint8_t* other = panels + bytes * LANES;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t c = 0; c < bytes; c += BLOCK) {
    for (int i = 0; i < BLOCK * LANES; i += 64) {
      __builtin_prefetch(panels + c * LANES + i + AHEAD);
      __builtin_prefetch(other + c * LANES + i + AHEAD);
    }
    _tile_loadd(6, panels + c * LANES, BLOCK);
    _tile_loadd(7, other + c * LANES, BLOCK);
    _tile_loadd(4, first + c, bytes);
    MULTIPLY_TILES(0, 4, 6)
    MULTIPLY_TILES(1, 4, 7)
    if (second) {
      _tile_loadd(5, second + c, bytes);
      MULTIPLY_TILES(2, 5, 6)
      MULTIPLY_TILES(3, 5, 7)
    }
  }
  _tile_stored(0, sums, BLOCK);
  _tile_stored(1, sums + TILE_ROWS, BLOCK);
  _tile_stored(2, sums + 2 * TILE_ROWS, BLOCK);
  _tile_stored(3, sums + 3 * TILE_ROWS, BLOCK);
}
#endif

// Divides `count` units of work among threads. Each goes through a part of its own from front to back, as memory is read
// fastest, and then helps the others: one may stand still, for the server's event loop needs a core as well.
class Division {
 public:
  Division(int64_t count, int threads) : parts(threads) {
    for (int t = 0; t < threads; t++) parts[t].next = count * t / threads, parts[t].end = count * (t + 1) / threads;
  }

  // A unit that nobody has taken before, or -1.
  int64_t take() {
    const size_t own = omp_get_thread_num();
    for (size_t i = 0; i < parts.size(); i++) {
      Part& part = parts[(own + i) % parts.size()];
      const int64_t unit = part.next.fetch_add(1, std::memory_order_relaxed);
      if (unit < part.end) return unit;
    }
    return -1;
  }

 private:
  struct alignas(64) Part {  // a cache line each
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Part> parts;
};

// Multiplies `count` rows with the panels of a weight, which `division` hands out PANELS at a time. finish(panel)(row, sums)
// gets each LANES sums, from some thread, and from tiles gets some of them twice. A parallel region calls it in all its threads.
template <Kind KIND, class Finish>
void multiply_panels(const uint8_t* rows, int64_t count, int64_t bytes, const uint8_t* panels, Division& division,
                     Finish finish) {
#ifdef AMX
  if (has_tiles) {
    const int64_t height = std::min<int64_t>(count, TILE_ROWS);
    const Tiles tiles(height);
    for (int64_t panel; (panel = division.take() * PANELS) >= 0;)
      for (int64_t r = 0; r < count; r += 2 * TILE_ROWS) {
        // The last tiles overlap those before them: a row too many would be somebody else's memory.
        const int64_t first = std::max<int64_t>(0, std::min(r, count - 2 * TILE_ROWS));
        const int64_t second = std::min(first + TILE_ROWS, count - TILE_ROWS);
        Ints sums[2 * PANELS * TILE_ROWS];
        multiply_tiles<KIND>(rows + first * bytes, count > TILE_ROWS ? rows + second * bytes : nullptr,
                             panels + panel * bytes * LANES, bytes, sums);
        for (int p = 0; p < PANELS; p++) {
          const auto put = finish(panel + p);
          for (int64_t i = 0; i < height; i++) put(first + i, sums[p * TILE_ROWS + i]);
          for (int64_t i = 0; count > TILE_ROWS && i < height; i++) put(second + i, sums[(PANELS + p) * TILE_ROWS + i]);
        }
      }
    return;
  }
#endif
  const int64_t height = count <= MANY ? count : FEW;
  const int width = count > FEW && count <= MANY ? 1 : PANELS;
  for (int64_t pair; (pair = division.take() * PANELS) >= 0;)
    for (int64_t panel = pair; panel < pair + PANELS; panel += width)
      for (int64_t r = 0; r < count; r += height) {
        const int64_t some = std::min(height, count - r);
        Ints sums[MANY];
        const Multiply multiply = width == 1 ? for_rows<KIND, 1>(some, std::make_integer_sequence<int, MANY>())
                                             : for_rows<KIND, PANELS>(some, std::make_integer_sequence<int, FEW>());
        multiply(rows + r * bytes, panels + panel * bytes * LANES, bytes, sums);
        for (int p = 0; p < width; p++) {
          const auto put = finish(panel + p);
          for (int64_t i = 0; i < some; i++) put(r + i, sums[i * width + p]);
        }
      }
}

// The places of kernels.names.Activation's names in kernels.cpu.panels.ACTIVATIONS.
enum Activation { NONE, RELU, GELU, GELU_NEW };

Floats activate(Floats x, int activation) {
  switch (activation) {
    case RELU:
      return x < 0.0f ? Floats{} : x;
    case GELU: {  // erf by Abramowitz and Stegun 7.1.26, to within 1.5e-7
      Floats z = (x < 0.0f ? -x : x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
      Floats p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
      Floats tail = p * exp(-z * z);  // 1 - erf(z)
      return 0.5f * x * (x < 0.0f ? tail : 2.0f - tail);
    }
    case GELU_NEW:  // (1 + tanh(u)) / 2 is 1 / (1 + exp(-2 u))
      return x / (1.0f + exp(-1.5957691216f * (x + 0.044715f * x * x * x)));
    default:
      return x;
  }
}

// What becomes of the products with a panel: out = activation(product + bias), of (rows, channels).
template <class Element>
struct Output {
  Element* out;
  int64_t channels, first;
  int activation;
  Floats shift{};

  // `bias` may be null.
  Output(Element* out, const ELEMENT* bias, int64_t channels, int64_t panel, int activation)
      : out(out), channels(channels), first(panel * LANES), activation(activation) {
    if (!bias) return;
    ELEMENT some[LANES] = {};
    std::memcpy(some, bias + std::min(first, channels), size() * sizeof *bias);
    shift = load(some);
  }

  int64_t size() const { return std::max<int64_t>(0, std::min<int64_t>(LANES, channels - first)); }

  void put(int64_t row, Floats product) const {
    Element* target = out + row * channels + first;
    const Floats y = activate(product + shift, activation);
    if (first + LANES <= channels) return store(target, y);
    Element some[LANES];
    store(some, y);
    std::memcpy(target, some, size() * sizeof *out);
  }
};

constexpr float LARGEST = 127;               // of a row's integers
constexpr float SMALLEST = 1.17549435e-38f;  // scale
constexpr int OFFSET = 128;                  // that weights in int8 have been given, to be unsigned

// kernels.int8.quantize_rows of one row, around 0, and the sum of its integers. The row is padded with zeros.
void quantize(const ELEMENT* x, int64_t columns, int64_t padded, int8_t* row, float* scale, int32_t* total) {
  auto part = [&](int64_t i) {
    ELEMENT some[LANES] = {};
    if (i < columns) std::memcpy(some, x + i, std::min<int64_t>(LANES, columns - i) * sizeof(ELEMENT));
    return load(some);
  };
  Floats best{}, broken{};
  for (int64_t i = 0; i < columns; i += LANES) {
    Floats size = part(i);
    size = size < 0.0f ? -size : size;
    best = best > size ? best : size;
    broken += size - size;  // NaN, if there is one: it is larger than nothing
  }
  ELEMENT scales[LANES];
  store(scales, Floats{} + std::max(highest(best) / LARGEST, SMALLEST));
  *scale = load(scales)[0];
  Ints totals{};
  for (int64_t i = 0; i < padded; i += LANES) {
    const Ints numbers = integers(part(i) / *scale + ROUNDER);
    totals += numbers;
    const SignedBytes narrow = __builtin_convertvector(numbers, SignedBytes);
    std::memcpy(row + i, &narrow, sizeof narrow);
  }
  *total = 0;
  for (int i = 0; i < LANES; i++) *total += totals[i];
  *scale += sum(broken);
}

}  // namespace

// kernels.ops.Ops.linear: x (rows, columns), `out` (rows, channels), `bias` may be null; panels and scales are
// kernels.cpu.panels.Int8Panels'. `integers` has room for the rows, `padded` to whole blocks, the two lists for a number each.
extern "C" void linear_int8(const ELEMENT* x, int64_t rows, int64_t columns, const uint8_t* panels, int64_t num_panels,
                            const ELEMENT* bias, int64_t channels, int activation, ELEMENT* out, int threads,
                            const float* scales, int8_t* integers, float* row_scales, int32_t* row_sums, int64_t padded) {
  Division division(num_panels / PANELS, threads);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t r = 0; r < rows; r++)
      quantize(x + r * columns, columns, padded, integers + r * padded, row_scales + r, row_sums + r);
    multiply_panels<INT8>((const uint8_t*)integers, rows, padded, panels, division, [&](int64_t panel) {
      return [=, output = Output<ELEMENT>(out, bias, channels, panel, activation), scale = load(scales + panel * LANES)](
                 int64_t row, Ints sums) {
        const Floats exact = __builtin_convertvector(sums - OFFSET * row_sums[row], Floats);
        output.put(row, exact * (scale * row_scales[row]));
      };
    });
  }
}

namespace {

template <class Element>
void linear(const ELEMENT* x, int64_t rows, int64_t columns, const uint8_t* panels, int64_t num_panels, const ELEMENT* bias,
            int64_t channels, int activation, Element* out, int threads) {
  Division division(num_panels / PANELS, threads);
#pragma omp parallel num_threads(threads)
  multiply_panels<BF16>((const uint8_t*)x, rows, columns * sizeof(ELEMENT), panels, division, [&](int64_t panel) {
    return [output = Output<Element>(out, bias, channels, panel, activation)](int64_t row, Ints sums) {
      output.put(row, bits_of<Floats>(sums));
    };
  });
}

}  // namespace

// Whether bfloat16 is multiplied at the speed of memory: Intel's cores need their tiles for it.
extern "C" int bf16_is_fast() {
  __builtin_cpu_init();
#ifdef AMX
  if (has_tiles) return 1;
#endif
  return __builtin_cpu_is("amd") != 0;
}

// The same of kernels.cpu.panels.Bf16Panels, where ELEMENT is bfloat16.
extern "C" void linear_bf16(const ELEMENT* x, int64_t rows, int64_t columns, const uint8_t* panels, int64_t num_panels,
                            const ELEMENT* bias, int64_t channels, int activation, ELEMENT* out, int threads) {
  linear(x, rows, columns, panels, num_panels, bias, channels, activation, out, threads);
}

// Without the rounding of the sums.
extern "C" void linear_bf16_to_float(const ELEMENT* x, int64_t rows, int64_t columns, const uint8_t* panels,
                                     int64_t num_panels, const ELEMENT* bias, int64_t channels, int activation, float* out,
                                     int threads) {
  linear(x, rows, columns, panels, num_panels, bias, channels, activation, out, threads);
}

// ---- a step's way through all blocks

// What kernels.cpu.blocks' structures of the same names hold.
struct Norm {
  const ELEMENT *weight, *bias;
  float eps;
};

struct Product {
  const uint8_t* panels;
  int64_t num_panels;
  const float* scales;  // null where the weights are bfloat16, and `padded` 0
  int64_t padded;
  const ELEMENT* bias;
  int64_t channels, columns;
};

struct Block {
  Norm ln_1, ln_2;
  Product c_attn, c_proj, c_fc, mlp_c_proj;
  ELEMENT *k_pages, *v_pages;
  int64_t plan;  // which of the step's
  float scale;
};

struct Plan {
  const int64_t* slot_mapping;
  const int64_t *page_ids, *offsets;  // of the rows that decode
  const uint8_t* visible;
  const int64_t *tile_rows, *tile_offsets, *tile_page_ids, *tile_masks;  // of prompts
  const uint8_t* tile_hidden;
  int64_t num_tiles;
};

// Numbers that no later block needs, one row for each token.
struct Scratch {
  ELEMENT *normed, *qkv, *attended, *inner;
  int8_t* integers;
  float* row_scales;
  int32_t* row_sums;
};

// model.gpt.Block's forward for each block in turn: x and update (tokens, heads * HEAD_DIM) are what the next norm adds up,
// or x alone where norms come behind. The first `decodes` tokens are sequences of a row each, the others chunks of prompts.
extern "C" void run_blocks(const Block* blocks, int64_t num_blocks, int pre_norm, int activation, int64_t heads,
                           const Plan* plans, int64_t tokens, int64_t decodes, ELEMENT* x, ELEMENT* update,
                           const Scratch& scratch, int threads) {
  const int64_t columns = heads * HEAD_DIM, row = 3 * columns;

  const auto add_norm = [&](const Norm& norm, const ELEMENT* more, ELEMENT* out) {
    add_layernorm(x, more, norm.weight, norm.bias, tokens, columns, norm.eps, out, x, threads);
  };
  const auto multiply = [&](const Product& by, const ELEMENT* input, ELEMENT* out, int function) {
    if (by.scales)
      linear_int8(input, tokens, by.columns, by.panels, by.num_panels, by.bias, by.channels, function, out, threads,
                  by.scales, scratch.integers, scratch.row_scales, scratch.row_sums, by.padded);
    else
      linear(input, tokens, by.columns, by.panels, by.num_panels, by.bias, by.channels, function, out, threads);
  };
  const auto attention = [&](const Block& block, const ELEMENT* input) {
    multiply(block.c_attn, input, scratch.qkv, NONE);
    const Plan& plan = plans[block.plan];
    if (decodes)
      decode_step(scratch.qkv, scratch.qkv + columns, scratch.qkv + 2 * columns, row, block.k_pages, block.v_pages,
                  plan.slot_mapping, plan.page_ids, plan.offsets, plan.visible, scratch.attended, decodes, heads,
                  block.scale, threads);
    if (decodes < tokens) {
      const ELEMENT* q = scratch.qkv + decodes * row;
      kv_write(q + columns, q + 2 * columns, row, block.k_pages, block.v_pages, plan.slot_mapping + decodes,
               tokens - decodes, heads, threads);
      prefill_attention(q, row, block.k_pages, block.v_pages, plan.tile_rows, plan.tile_offsets, plan.tile_page_ids,
                        plan.tile_masks, plan.tile_hidden, plan.num_tiles, scratch.attended + decodes * columns, heads,
                        block.scale, threads);
    }
    multiply(block.c_proj, scratch.attended, update, NONE);
  };
  const auto mlp = [&](const Block& block, const ELEMENT* input) {
    multiply(block.c_fc, input, scratch.inner, activation);
    multiply(block.mlp_c_proj, scratch.inner, update, NONE);
  };

  for (const Block* block = blocks; block < blocks + num_blocks; block++)
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
}
#endif
