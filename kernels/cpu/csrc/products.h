// Products of rows with packed weights, of which a step reads every byte once: memory sets the pace.
//
// Both kinds of weights share one layout (abi.h): int8 weights with a scale a channel, times rows quantised here with
// a scale each; or bfloat16 weights times bfloat16 rows. A row has the same bits whatever rows stand next to it.
#pragma once

// Where a processor lacks the instructions there are no products: oneDNN's are faster there. Tests define
// PORTABLE_PRODUCTS to have them in plain C++.
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#define PRODUCT_INSTRUCTIONS
#endif
#if defined(PRODUCT_INSTRUCTIONS) || defined(PORTABLE_PRODUCTS)
#define PRODUCTS

#include <optional>
#include <utility>

#include "amx.h"
#include "team.h"

namespace {

constexpr int AHEAD = 4096;  // bytes of a panel between what is multiplied and what is prefetched

enum Kind { INT8, BF16 };  // signed rows and unsigned weights, or bfloat16 both

// One step of LANES sums: adds the products of a row's group, which is in every lane, with a group of each channel.
template <Kind KIND>
void multiply_add(i32x16& sums, i32x16 weights, i32x16 group) {
#ifdef PRODUCT_INSTRUCTIONS  // around the intrinsics GCC 12 copies all sums twice
  if (KIND == INT8)
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(group));
  else
    asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(group));
#else
  if (KIND == INT8) {
    for (int i = 0; i < 32; i += 8) sums += (weights >> i & 0xff) * (group << (24 - i) >> 24);
  } else {
    f32x16 total = bits_of<f32x16>(sums);
    total += bits_of<f32x16>(weights << 16) * bits_of<f32x16>(group << 16);
    total += bits_of<f32x16>(weights & -0x10000) * bits_of<f32x16>(group & -0x10000);
    sums = bits_of<i32x16>(total);
  }
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
      __builtin_prefetch(source + AHEAD);
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

typedef void (*Multiply)(const uint8_t*, const uint8_t*, int64_t, i32x16*);

template <Kind KIND, int P, int... R>
constexpr Multiply for_rows(int64_t count, std::integer_sequence<int, R...>) {
  constexpr Multiply functions[] = {multiply<KIND, R + 1, P>...};
  return functions[count - 1];
}

// Up to MANY rows are multiplied with one panel at once, so that each weight is read once. Two panels need fewer
// loads a product: they take up to FEW rows, and more than MANY in blocks of FEW.
constexpr int MANY = 16, FEW = 8;

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

// What is added to a panel's products, and done to the sums.
struct Epilogue {
  int activation;
  f32x16 shift{};

  Epilogue(const ProductArgs& by, int64_t panel, int activation) : activation(activation) {
    const int64_t first = panel * LANES, count = std::min<int64_t>(LANES, by.channels - first);
    if (!by.bias || count <= 0) return;
    ELEMENT some[LANES] = {};
    std::memcpy(some, by.bias + first, count * sizeof *some);
    shift = load(some);
  }

  f32x16 operator()(f32x16 product) const { return activate(product + shift, activation); }
};

constexpr int64_t ROWS_AT_ONCE = 64;         // of a piece
constexpr int64_t CHANNELS = PANELS * LANES;  // of a piece

// out (rows, channels) of `count` rows of `bytes` bytes with the panels of a weight. finish(panel)(row, sums) gives
// LANES numbers of `out`.
template <Kind KIND, class Out, class Finish>
void multiply_panels(Worker& worker, const uint8_t* rows, int64_t count, int64_t bytes, const ProductArgs& by, Out* out,
                     const Finish& finish) {
#ifdef AMX
  std::optional<AmxTiles> tiles;
  if (has_tiles) tiles.emplace(std::min<int64_t>(count, TILE_ROWS));
#endif
  const int64_t blocks = (count + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
  worker.share(by.num_panels / PANELS * blocks, [&](int64_t piece, Claim& claim) {
    const int64_t panel = piece / blocks * PANELS;
    const int64_t begin = piece % blocks * ROWS_AT_ONCE, end = std::min(count, begin + ROWS_AT_ONCE);
    const uint8_t* const weights = by.panels + panel * bytes * LANES;
    Out own[ROWS_AT_ONCE][CHANNELS];
    // Of rows `from` on, and of a panel: it may be told of rows ahead of the piece's.
    const auto keep = [&](int64_t from, int64_t some, int p, const i32x16* sums, int step) {
      const auto finished = finish(panel + p);
      for (int64_t i = std::max<int64_t>(0, begin - from); i < some; i++)
        store(own[from + i - begin] + p * LANES, finished(from + i, sums[i * step]));
    };
    [&] {
#ifdef AMX
      if (has_tiles) {
        for (int64_t r = begin; r < end; r += 2 * TILE_ROWS) {
          // The last tiles overlap those ahead of them: rows past the end are memory of someone else.
          const int64_t first = std::max<int64_t>(0, std::min(r, count - 2 * TILE_ROWS));
          const int64_t second = std::min(first + TILE_ROWS, count - TILE_ROWS);
          i32x16 sums[2 * PANELS * TILE_ROWS];
          multiply_tiles<KIND>(rows + first * bytes, count > TILE_ROWS ? rows + second * bytes : nullptr, weights, bytes,
                               sums);
          for (int p = 0; p < PANELS; p++) {
            keep(first, std::min<int64_t>(count, TILE_ROWS), p, sums + p * TILE_ROWS, 1);
            if (count > TILE_ROWS) keep(second, TILE_ROWS, p, sums + (PANELS + p) * TILE_ROWS, 1);
          }
        }
        return;
      }
#endif
      const int64_t height = end - begin <= MANY ? end - begin : FEW;
      const int width = height > FEW ? 1 : PANELS;
      for (int p = 0; p < PANELS; p += width)
        for (int64_t r = begin; r < end; r += height) {
          const int64_t some = std::min(height, end - r);
          i32x16 sums[MANY];
          const Multiply multiply = width == 1 ? for_rows<KIND, 1>(some, std::make_integer_sequence<int, MANY>())
                                               : for_rows<KIND, PANELS>(some, std::make_integer_sequence<int, FEW>());
          multiply(rows + r * bytes, weights + p * bytes * LANES, bytes, sums);
          for (int i = 0; i < width; i++) keep(r, some, p + i, sums + i, width);
        }
    }();
    if (!claim()) return;
    const int64_t first = panel * LANES, size = std::min(CHANNELS, by.channels - first);
    for (int64_t r = begin; r < end; r++)
      if (size == CHANNELS)  // of a length that the compiler knows
        std::memcpy(out + r * by.channels + first, own[r - begin], sizeof *own);
      else
        std::memcpy(out + r * by.channels + first, own[r - begin], size * sizeof **own);
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
    size = size < 0.0f ? -size : size;
    best = best > size ? best : size;
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
  multiply_panels<INT8>(worker, (const uint8_t*)to.integers, rows, by.padded, by, out, [&](int64_t panel) {
    return [&to, finish = Epilogue(by, panel, activation), scale = load(by.scales + panel * LANES)](
               int64_t row, i32x16 sums) {
      const f32x16 exact = __builtin_convertvector(sums - OFFSET * to.sums[row], f32x16);
      return finish(exact * (scale * to.scales[row]));
    };
  });
}

template <class Out>
void multiply_bf16(Worker& worker, const ProductArgs& by, const ELEMENT* x, int64_t rows, int activation, Out* out) {
  const int64_t bytes = by.columns * sizeof(ELEMENT);
  multiply_panels<BF16>(worker, (const uint8_t*)x, rows, bytes, by, out, [&](int64_t panel) {
    return [finish = Epilogue(by, panel, activation)](int64_t, i32x16 sums) { return finish(bits_of<f32x16>(sums)); };
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

// Whether bfloat16 is multiplied as fast as memory is read: Intel's processors need AMX for that.
extern "C" int bf16_is_fast() {
#ifdef PRODUCT_INSTRUCTIONS
#ifdef AMX
  if (has_tiles) return 1;
#endif
  __builtin_cpu_init();
  return __builtin_cpu_is("amd") != 0;
#else
  return 0;
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
