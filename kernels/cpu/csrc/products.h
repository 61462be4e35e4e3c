// Products of rows with packed weights, of which a step reads every byte once: memory sets the pace.
//
// Both kinds of weights share one layout (abi.h): int8 weights with a scale a channel, times rows quantised here with
// a scale each; or bfloat16 weights times bfloat16 rows. A row has the same bits whatever rows stand next to it.
#pragma once

// Without the instructions, bfloat16 is widened and multiplied in float; int8 is left to tests, which define
// PORTABLE_PRODUCTS. Without AVX2 there are no products: oneDNN's are faster there.
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#define PRODUCT_INSTRUCTIONS
#endif
#if defined(PRODUCT_INSTRUCTIONS) || defined(PORTABLE_PRODUCTS) || (defined(__AVX2__) && defined(__FMA__))
#define PRODUCTS

#include <optional>
#include <utility>

#include "amx.h"
#include "team.h"

namespace {

constexpr int AHEAD = 4096;  // bytes of a panel between what tiles multiply and what is prefetched

enum Kind { INT8, BF16 };  // signed rows and unsigned weights, or bfloat16 both

// One step of LANES sums: adds the products of a row's group, which is in every lane, with a group of each channel.
template <Kind KIND>
void multiply_add(i32x16& sums, i32x16 weights, i32x16 group) {
#ifdef PRODUCT_INSTRUCTIONS  // around the intrinsics GCC 12 copies all sums twice
  if (KIND == INT8)
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(group));
  else
    asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(group));
#else  // of int8: see multiply_widened
  for (int i = 0; i < 32; i += 8) sums += (weights >> i & 0xff) * (group << (24 - i) >> 24);
#endif
}

// Sums of products of R rows with the channels of P panels: (R, P, LANES).
template <Kind KIND, int R, int P>
void multiply(const uint8_t* rows, const uint8_t* panels, int64_t bytes, i32x16* sums) {
  i32x16 total[R * P];
#pragma GCC unroll 32
  for (int i = 0; i < R * P; i++) total[i] = i32x16{};
  for (int64_t c = 0; c < bytes; c += GROUP) {
    i32x16 weights[P];
#pragma GCC unroll 32
    for (int p = 0; p < P; p++) {
      const uint8_t* source = panels + (p * bytes + c) * LANES;
      std::memcpy(&weights[p], source, sizeof weights[p]);
    }
#pragma GCC unroll 32
    for (int r = 0; r < R; r++) {
      int32_t group;
      std::memcpy(&group, rows + r * bytes + c, GROUP);
#pragma GCC unroll 32
      for (int p = 0; p < P; p++) multiply_add<KIND>(total[r * P + p], weights[p], i32x16{} + group);
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < R * P; i++) sums[i] = total[i];
}

#ifndef PRODUCT_INSTRUCTIONS
// Registers for a row's sums with a panel; rows that fit beside the weights, of 16 registers or of 32.
constexpr int PARTS = LANES / WIDE, WIDENED = WIDE == 16 ? 12 : WIDE == 8 ? 6 : 4;

// The same of R rows in float with one panel of bfloat16: (R, LANES).
template <int R>
void multiply_widened(const float* rows, const uint8_t* panel, int64_t columns, i32x16* sums) {
  floats total[R * PARTS] = {};
  for (int64_t c = 0; c < columns; c += 2) {
    const uint8_t* const source = panel + 2 * c * LANES;
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; odd++) {
      floats weights[PARTS];
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; p++) {
        ints pair;
        std::memcpy(&pair, source + p * sizeof pair, sizeof pair);
        weights[p] = bits_of<floats>(odd ? pair & -0x10000 : pair << 16);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) total[r * PARTS + p] += weights[p] * rows[r * columns + c + odd];
    }
  }
  std::memcpy(sums, total, sizeof total);
}

typedef void (*MultiplyWidened)(const float*, const uint8_t*, int64_t, i32x16*);

template <class Rows = std::make_integer_sequence<int, WIDENED>>
struct WidenedByRows;
template <int... R>
struct WidenedByRows<std::integer_sequence<int, R...>> {
  static constexpr MultiplyWidened functions[] = {multiply_widened<R + 1>...};
};
#endif

typedef void (*Multiply)(const uint8_t*, const uint8_t*, int64_t, i32x16*);

// Up to MANY rows are multiplied with one panel at once, so that each weight is read once. Two panels need fewer
// loads a product: they take up to FEW rows, and more than MANY in blocks of FEW; prompts, whose rows come from farther
// away, in blocks of FEWER. For up to FEWEST rows memory is the limit, which is read faster where four panels are.
constexpr int MANY = 16, FEW = 12, FEWER = 8, FEWEST = 6, WIDTH_OF_FEW = 2 * PANELS;

// multiply of 1, 2, ... rows.
template <Kind KIND, int P, class Rows = std::make_integer_sequence<int, P == 1 ? MANY : P == PANELS ? FEW : FEWEST>>
struct ByRows;
template <Kind KIND, int P, int... R>
struct ByRows<KIND, P, std::integer_sequence<int, R...>> {
  static constexpr Multiply functions[] = {multiply<KIND, R + 1, P>...};
};

#ifdef AMX
#define MULTIPLY_TILES(SUMS, ROWS, WEIGHTS) \
  if (KIND == INT8)                         \
    _tile_dpbsud(SUMS, ROWS, WEIGHTS);      \
  else                                      \
    _tile_dpbf16ps(SUMS, ROWS, WEIGHTS);

// Sums of TILE_ROWS rows each, from `first` on and from `second` on, with the channels of two panels: (2, PANELS,
// TILE_ROWS, LANES). `second` may be null.
template <Kind KIND>
void multiply_tiles(const uint8_t* first, const uint8_t* second, const uint8_t* panels, int64_t bytes, i32x16* sums) {
  const uint8_t* other = panels + bytes * LANES;
  ZERO_SUMS();
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
  STORE_SUMS(sums, TILE_ROWS, BLOCK);
}
#endif

f32x16 activate(f32x16 x, int activation) {
  switch (activation) {
    case RELU:
      return x < 0.0f ? f32x16{} : x;
    case GELU: {  // erf by Abramowitz and Stegun 7.1.26, to within 1.5e-7
      f32x16 z = (x < 0.0f ? -x : x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
      f32x16 p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
      f32x16 tail = p * exp(-z * z);  // 1 - erf(z)
      return 0.5f * x * (x < 0.0f ? tail : 2.0f - tail);
    }
    case GELU_NEW:  // (1 + tanh(u)) / 2 is 1 / (1 + exp(-2 u))
      return x / (1.0f + exp(-1.5957691216f * (x + 0.044715f * x * x * x)));
    default:
      return x;
  }
}

// A panel's columns of out = activation(product + bias), (rows, channels).
template <class Out>
struct Output {
  Out* out;
  int64_t channels, first;
  int activation;
  f32x16 shift{};

  Output(Out* out, const ProductArgs& by, int64_t panel, int activation)
      : out(out), channels(by.channels), first(panel * LANES), activation(activation) {
    if (!by.bias) return;
    ELEMENT some[LANES] = {};
    std::memcpy(some, by.bias + std::min(first, channels), size() * sizeof *some);
    shift = load(some);
  }

  int64_t size() const { return std::max<int64_t>(0, std::min<int64_t>(LANES, channels - first)); }

  void put(int64_t row, f32x16 product) const {
    Out* target = out + row * channels + first;
    const f32x16 y = activate(product + shift, activation);
    if (first + LANES <= channels) return store(target, y);
    Out some[LANES];
    store(some, y);
    std::memcpy(target, some, size() * sizeof *out);
  }
};

constexpr int64_t ROWS_AT_ONCE = 32;  // of a piece

// Multiplies `count` rows of `bytes` bytes with the panels of a weight. finish(panel)(row, sums) is called, on any
// thread, with LANES sums at a time.
template <Kind KIND, class Finish>
void multiply_panels(Worker& worker, const uint8_t* rows, int64_t count, int64_t bytes, const ProductArgs& by,
                     const Finish& finish) {
#ifdef AMX
  std::optional<AmxTiles> tiles;
  if (has_tiles) tiles.emplace(std::min<int64_t>(count, TILE_ROWS));
#endif
  const int64_t blocks = (count + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
  const int64_t width = !has_tiles && count <= FEWEST ? WIDTH_OF_FEW : PANELS;
  worker.share((by.num_panels + width - 1) / width * blocks, [&](int64_t piece, Claim& claim) {
    const int64_t part = blocks == 1 ? piece : piece / blocks, panel = part * width;  // dividing takes its time
    const int64_t begin = (piece - part * blocks) * ROWS_AT_ONCE, some = std::min(ROWS_AT_ONCE, count - begin);
    const int panels = std::min(width, by.num_panels - panel);
    const uint8_t* const weights = by.panels + panel * bytes * LANES;
    i32x16 sums[ROWS_AT_ONCE * PANELS];
    // Sums of rows `from` on; those of a panel are `step` apart. Rows ahead of the piece's are left out.
    const auto put = [&](int64_t from, int64_t some, int p, const i32x16* sums, int step) {
      const auto to = finish(panel + p);
      for (int64_t i = std::max<int64_t>(0, begin - from); i < some; i++) to(from + i, sums[i * step]);
    };
#ifdef AMX
    if (has_tiles) {
      // The last tiles overlap those ahead of them: rows past the end are memory of someone else.
      static_assert(ROWS_AT_ONCE == 2 * TILE_ROWS);
      const int64_t first = std::max<int64_t>(0, std::min(begin, count - 2 * TILE_ROWS));
      const int64_t second = std::min(first + TILE_ROWS, count - TILE_ROWS);
      multiply_tiles<KIND>(rows + first * bytes, count > TILE_ROWS ? rows + second * bytes : nullptr, weights, bytes, sums);
      if (!claim()) return;
      for (int p = 0; p < PANELS; p++) {
        put(first, std::min<int64_t>(count, TILE_ROWS), p, sums + p * TILE_ROWS, 1);
        if (count > TILE_ROWS) put(second, TILE_ROWS, p, sums + (PANELS + p) * TILE_ROWS, 1);
      }
      return;
    }
#endif
#ifndef PRODUCT_INSTRUCTIONS
    if (KIND == BF16) {
      const int64_t columns = bytes / sizeof(ELEMENT);
      float* const wide = room<float>(some * columns);
      const ELEMENT* const source = (const ELEMENT*)rows + begin * columns;
      for (int64_t i = 0; i < some * columns; i += LANES) store(wide + i, load(source + i));
      for (int p = 0; p < panels; p++)
        for (int64_t r = 0; r < some; r += WIDENED) {
          const auto function = WidenedByRows<>::functions[std::min<int64_t>(WIDENED, some - r) - 1];
          function(wide + r * columns, weights + p * bytes * LANES, columns, sums + p * some + r);
        }
      if (!claim()) return;
      for (int p = 0; p < panels; p++) put(begin, some, p, sums + p * some, 1);
      return;
    }
#endif
    const bool one = some > FEW && some <= MANY, four = panels > PANELS;
    const int at_once = one ? 1 : panels;
    const int64_t step = one ? MANY : four ? FEWEST : blocks == 1 ? FEW : FEWER;
    const Multiply* const functions = one    ? ByRows<KIND, 1>::functions
                                      : four ? ByRows<KIND, WIDTH_OF_FEW>::functions
                                             : ByRows<KIND, PANELS>::functions;
    for (int p = 0; p < panels; p += at_once)
      for (int64_t r = 0; r < some; r += step) {
        const uint8_t* const from = weights + p * bytes * LANES;
        functions[std::min(step, some - r) - 1](rows + (begin + r) * bytes, from, bytes, sums + p * some + r * at_once);
      }
    if (!claim()) return;
    for (int p = 0; p < panels; p++) put(begin, some, p, sums + (one ? p * some : p), at_once);
  });
}

constexpr float LARGEST = 127;               // of a row's integers
constexpr float SMALLEST = 1.17549435e-38f;  // of a row's scale

// kernels.int8.quantize_rows of one row, around 0, and the sum of its integers. The row is padded with zeros.
void quantize(const ELEMENT* x, int64_t columns, int64_t padded, int8_t* row, float* scale, int32_t* total) {
  auto part = [&](int64_t i) {
    ELEMENT some[LANES] = {};
    if (i < columns) std::memcpy(some, x + i, std::min<int64_t>(LANES, columns - i) * sizeof(ELEMENT));
    return load(some);
  };
  f32x16 best{}, broken{};
  for (int64_t i = 0; i < columns; i += LANES) {
    f32x16 size = part(i);
    size = higher(size, -size);
    best = higher(best, size);
    broken += size - size;  // NaN if the row has one: comparisons pass over it
  }
  ELEMENT scales[LANES];
  store(scales, f32x16{} + std::max(highest(best) / LARGEST, SMALLEST));
  *scale = load(scales)[0];
  i32x16 totals{};
  for (int64_t i = 0; i < padded; i += LANES) {
    const i32x16 numbers = integers(part(i) / *scale + ROUNDER);
    totals += numbers;
    const i8x16 narrow = __builtin_convertvector(numbers, i8x16);
    std::memcpy(row + i, &narrow, sizeof narrow);
  }
  *total = 0;
  for (int i = 0; i < LANES; i++) *total += totals[i];
  *scale += sum(broken);
}

// Of x (rows, columns).
void multiply_int8(Worker& worker, const ProductArgs& by, const ELEMENT* x, int64_t rows, int activation, ELEMENT* out,
                   const QuantizedRows& to) {
  worker.share(rows, [&](int64_t r, Claim& claim) {
    int8_t* const integers = room<int8_t>(by.padded);
    float scale;
    int32_t total;
    quantize(x + r * by.columns, by.columns, by.padded, integers, &scale, &total);
    if (!claim()) return;
    std::memcpy(to.integers + r * by.padded, integers, by.padded);
    to.scales[r] = scale, to.sums[r] = total;
  });
  multiply_panels<INT8>(worker, (const uint8_t*)to.integers, rows, by.padded, by, [&](int64_t panel) {
    return [&to, output = Output<ELEMENT>(out, by, panel, activation), scale = load(by.scales + panel * LANES)](
               int64_t row, i32x16 sums) {
      const f32x16 exact = __builtin_convertvector(sums - OFFSET * to.sums[row], f32x16);
      output.put(row, exact * (scale * to.scales[row]));
    };
  });
}

template <class Out>
void multiply_bf16(Worker& worker, const ProductArgs& by, const ELEMENT* x, int64_t rows, int activation, Out* out) {
  multiply_panels<BF16>(worker, (const uint8_t*)x, rows, by.columns * sizeof(ELEMENT), by, [&](int64_t panel) {
    return [output = Output<Out>(out, by, panel, activation)](int64_t row, i32x16 sums) {
      output.put(row, bits_of<f32x16>(sums));
    };
  });
}

void share_linear(Worker& worker, const ProductArgs& by, const ELEMENT* x, int64_t rows, int activation, ELEMENT* out,
                  const QuantizedRows& room) {
  if (by.scales)
    multiply_int8(worker, by, x, rows, activation, out, room);
  else
    multiply_bf16(worker, by, x, rows, activation, out);
}

}  // namespace

// Whether int8 is multiplied by instructions made for it.
extern "C" int int8_is_fast() {
#ifdef PRODUCT_INSTRUCTIONS
  return 1;
#else
  return 0;
#endif
}

// Whether one row of bfloat16 is multiplied as fast as memory is read: of the processors with instructions for it, Intel's
// need AMX for that.
extern "C" int bf16_is_fast() {
#ifdef AMX
  if (has_tiles) return 1;
#endif
#ifdef PRODUCT_INSTRUCTIONS
  __builtin_cpu_init();
  return __builtin_cpu_is("amd") != 0;
#else
  return 1;
#endif
}

// kernels.ops.Ops.linear: x (rows, columns), out (rows, channels). `room` may be null where the weight is bfloat16.
extern "C" int64_t linear_panels(const ProductArgs& by, const ELEMENT* x, int64_t rows, int activation, ELEMENT* out,
                                 const QuantizedRows* room, int threads) {
  return team().run(threads, [=, to = room ? *room : QuantizedRows{}](Worker& worker) {
    share_linear(worker, by, x, rows, activation, out, to);
  });
}

// kernels.ops.Ops.project of a bfloat16 weight: sums are not rounded.
extern "C" int64_t project_panels(const ProductArgs& by, const ELEMENT* x, int64_t rows, float* out, int threads) {
  return team().run(threads, [=](Worker& worker) { multiply_bf16(worker, by, x, rows, NONE, out); });
}
#endif
