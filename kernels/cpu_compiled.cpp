// The loops of kernels/cpu_compiled.py: decode attention over live pages, and products in int8.
//
// Compiled on the machine that runs it, for one ELEMENT (the type of activations, keys and values) and one HEAD_DIM. A row's
// arithmetic depends on its own numbers and pages only, so that it has the same bits whatever stands beside it.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

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
  return bits_of<Floats>(__builtin_convertvector(raw, Words) << 16);
}

// The first COUNT numbers, rounded to the nearest, ties to even.
template <int COUNT = LANES>
void store(float* target, Floats x) {
  std::memcpy(target, &x, COUNT * sizeof *target);
}

// Its upper 16 bits are the bfloat16; NaN stays NaN.
Words rounded(Floats x) {
  const Words raw = bits_of<Words>(x);
  return x == x ? raw + 0x7fff + ((raw >> 16) & 1) : raw | 0x400000;
}

template <int COUNT = LANES>
void store(bfloat16* target, Floats x) {
  const Halves narrow = __builtin_convertvector(rounded(x) >> 16, Halves);
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

// Lane i of the result is the sum over all lanes of rows[i]; overwrites the rows. Always added in the same order.
Floats sums(Floats* rows) {
  for (int i = 0; i < 8; i++)
    rows[i] =
        __builtin_shufflevector(rows[i], rows[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
        __builtin_shufflevector(rows[i], rows[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  for (int i = 0; i < 4; i++)
    rows[i] =
        __builtin_shufflevector(rows[i], rows[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
        __builtin_shufflevector(rows[i], rows[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int i = 0; i < 2; i++)
    rows[i] =
        __builtin_shufflevector(rows[i], rows[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
        __builtin_shufflevector(rows[i], rows[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return __builtin_shufflevector(rows[0], rows[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         __builtin_shufflevector(rows[0], rows[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
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

// ---- decode attention

constexpr int PAIR = 2 * LANES;  // numbers of a head that are loaded at once
constexpr int PAIRS = (HEAD_DIM + PAIR - 1) / PAIR;
constexpr int TAIL = HEAD_DIM - (PAIRS - 1) * PAIR;  // numbers in the last of them
// Sequences that go through their pages side by side: a page that several see, as a draft's rows do, is in the cache for
// all but the first.
constexpr int ROWS = 8;

// A head's numbers as fp32, in an order that depends on ELEMENT, and zeros behind them.
struct Head {
  Floats part[2 * PAIRS];
};

template <int COUNT, class Element>
void load_pair(const Element* source, Floats* pair) {
  constexpr int FIRST = std::min(COUNT, LANES);
  pair[0] = load<FIRST>(source);
  pair[1] = load<COUNT - FIRST>(source + FIRST);
}

template <int COUNT, class Element>
void store_pair(Element* target, const Floats* pair) {
  constexpr int FIRST = std::min(COUNT, LANES);
  store<FIRST>(target, pair[0]);
  store<COUNT - FIRST>(target + FIRST, pair[1]);
}

// The even numbers and the odd ones: one instruction each, where widening 16 bits takes compilers five.
template <int COUNT>
void load_pair(const bfloat16* source, Floats* pair) {
  Words words{};
  std::memcpy(&words, source, COUNT * sizeof *source);
  pair[0] = bits_of<Floats>(words << 16);
  pair[1] = bits_of<Floats>(words & 0xffff0000);
}

template <int COUNT>
void store_pair(bfloat16* target, const Floats* pair) {
  const Words words = rounded(pair[0]) >> 16 | (rounded(pair[1]) & 0xffff0000);
  std::memcpy(target, &words, COUNT * sizeof *target);
}

Head load_head(const ELEMENT* source) {
  Head head;
  for (int i = 0; i < PAIRS - 1; i++) load_pair<PAIR>(source + i * PAIR, head.part + 2 * i);
  load_pair<TAIL>(source + (PAIRS - 1) * PAIR, head.part + 2 * (PAIRS - 1));
  return head;
}

void store_head(ELEMENT* target, const Head& head) {
  for (int i = 0; i < PAIRS - 1; i++) store_pair<PAIR>(target + i * PAIR, head.part + 2 * i);
  store_pair<TAIL>(target + (PAIRS - 1) * PAIR, head.part + 2 * (PAIRS - 1));
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
  constexpr int PARTS = PAGE_SIZE / LANES;
  const Head query = softmax.query;
  Floats scores[PARTS], best = Floats{} - INF;
  for (int part = 0; part < PARTS; part++) {
    Floats products[LANES];
    for (int i = 0; i < LANES; i++) {
      const int place = (part * LANES + i) * HEAD_DIM;
      prefetch_head(v + place);
      const Head key = load_head(k + place);
      products[i] = key.part[0] * query.part[0];
      for (int j = 1; j < 2 * PAIRS; j++) products[i] += key.part[j] * query.part[j];
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
    for (int j = 0; j < 2 * PAIRS; j++) out.part[j] += weights[i] * value.part[j];
  }
  softmax.out = out;
  softmax.peak = peak;
  softmax.total = softmax.total * fade + sum(total);
}

}  // namespace

// kernels.ops.Ops.decode_step: q, k and v (batch, heads, HEAD_DIM), whose rows stand `stride` apart, `out` side by side; the
// pages of sequence b are entries offsets[b] to offsets[b + 1] of page_ids and visible.
extern "C" void decode_step(const ELEMENT* q, const ELEMENT* k, const ELEMENT* v, int64_t stride, ELEMENT* k_pages,
                            ELEMENT* v_pages, const int64_t* slot_mapping, const int64_t* page_ids, const int64_t* offsets,
                            const uint8_t* visible, ELEMENT* out, int64_t batch, int64_t heads, float scale, int threads) {
  const int64_t page = PAGE_SIZE * HEAD_DIM;  // of one head
#pragma omp parallel num_threads(threads)
  {
#pragma omp for collapse(2)
    for (int64_t b = 0; b < batch; b++)
      for (int64_t h = 0; h < heads; h++) {
        const int64_t to = (slot_mapping[b] / PAGE_SIZE * heads + h) * page + slot_mapping[b] % PAGE_SIZE * HEAD_DIM;
        const int64_t from = b * stride + h * HEAD_DIM;
        std::memcpy(k_pages + to, k + from, HEAD_DIM * sizeof(ELEMENT));
        std::memcpy(v_pages + to, v + from, HEAD_DIM * sizeof(ELEMENT));
      }
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

#ifdef __AVX512VNNI__  // where it is missing, so is `linear_int8`
namespace {

// ---- products in int8

constexpr float LARGEST = 127;           // of a row's integers
constexpr float SMALLEST = 1.17549435e-38f;  // scale
constexpr int OFFSET = 128;  // that weights have been given: the instruction multiplies unsigned numbers by signed ones
constexpr int GROUP = 4;     // products that it adds up at once
constexpr int AHEAD = 4096;  // bytes of weights by which memory is asked before they are needed

// The places of kernels.names.Activation's names in cpu_compiled.ACTIVATIONS.
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

// kernels.int8.quantize_rows of one row, around 0, and the sum of its integers. The row is padded with zeros.
void quantize(const ELEMENT* x, int64_t columns, int64_t padded, int8_t* row, float* scale, int32_t* total) {
  auto part = [&](int64_t i) {
    ELEMENT some[LANES] = {};
    std::memcpy(some, x + i, std::min<int64_t>(LANES, columns - i) * sizeof(ELEMENT));
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
  *total = 0;
  for (int64_t i = 0; i < padded; i += LANES) {
    const Ints numbers = integers(part(i) / *scale + ROUNDER);
    for (int lane = 0; lane < LANES; lane++) *total += numbers[lane];
    const SignedBytes narrow = __builtin_convertvector(numbers, SignedBytes);
    std::memcpy(row + i, &narrow, sizeof narrow);
  }
  *scale += sum(broken);
}

// Sums of products of R rows, `columns` apart, with the channels of P panels, as far apart as a panel is large.
template <int R, int P>
void multiply(const int8_t* rows, const uint8_t* panels, int64_t columns, Ints* sums) {
  Ints total[R * P];
#pragma GCC unroll 32
  for (int i = 0; i < R * P; i++) total[i] = Ints{};
  for (int64_t c = 0; c < columns; c += GROUP) {
    Ints weights[P];
#pragma GCC unroll 32
    for (int p = 0; p < P; p++) {
      const uint8_t* source = panels + (p * columns + c) * LANES;
      std::memcpy(&weights[p], source, sizeof weights[p]);
      __builtin_prefetch(source + AHEAD);
    }
#pragma GCC unroll 32
    for (int r = 0; r < R; r++) {
      int32_t group;
      std::memcpy(&group, rows + r * columns + c, GROUP);
      const Ints groups = Ints{} + group;
#pragma GCC unroll 32
      for (int p = 0; p < P; p++)  // around its own function for the instruction, GCC 12 copies every sum twice
        asm("vpdpbusd %2, %1, %0" : "+v"(total[r * P + p]) : "v"(weights[p]), "v"(groups));
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < R * P; i++) sums[i] = total[i];
}

typedef void (*Multiply)(const int8_t*, const uint8_t*, int64_t, Ints*);

template <int P, int... R>
constexpr Multiply for_rows(int64_t count, std::integer_sequence<int, R...>) {
  constexpr Multiply functions[] = {multiply<R + 1, P>...};
  return functions[count - 1];
}

// Up to so many rows take their own number of sums for each panel, so that each weight is read once; more of them go in
// blocks of FEW through PANELS panels at once, which needs fewer loads for each product.
constexpr int MANY = 16, FEW = 8, PANELS = 2;

}  // namespace

// kernels.ops.Ops.linear: x (rows, columns), `out` (rows, channels), `bias` null where there is none. Panels and scales are
// cpu_compiled.PanelWeight's. `integers` has room for the rows, padded as the panels are, the two lists for a number each.
extern "C" void linear_int8(const ELEMENT* x, int64_t rows, int64_t columns, const uint8_t* panels, const float* scales,
                            const ELEMENT* bias, int64_t channels, int activation, int8_t* integers, float* row_scales,
                            int32_t* row_sums, ELEMENT* out, int threads) {
  const int64_t padded = (columns + LANES - 1) / LANES * LANES;
  const int64_t height = rows <= MANY ? rows : FEW;
  const int width = rows > FEW && rows <= MANY ? 1 : PANELS;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t r = 0; r < rows; r++)
      quantize(x + r * columns, columns, padded, integers + r * padded, row_scales + r, row_sums + r);
#pragma omp for
    for (int64_t o = 0; o < channels; o += LANES * width)
      for (int64_t r = 0; r < rows; r += height) {
        const int64_t count = std::min(height, rows - r);
        Ints products[MANY];
        const Multiply multiply = width == 1 ? for_rows<1>(count, std::make_integer_sequence<int, MANY>())
                                             : for_rows<PANELS>(count, std::make_integer_sequence<int, FEW>());
        multiply(integers + r * padded, panels + o * padded, padded, products);
        for (int p = 0; p < width; p++) {
          const int64_t first = o + p * LANES, size = std::min<int64_t>(LANES, channels - first) * sizeof(ELEMENT);
          if (size <= 0) break;  // the second of the last pair
          ELEMENT some[LANES] = {};
          if (bias) std::memcpy(some, bias + first, size);
          const Floats scale = load(scales + first), shift = load(some);
          for (int64_t i = 0; i < count; i++) {
            const Ints exact = products[i * width + p] - OFFSET * row_sums[r + i];
            const Floats sum = __builtin_convertvector(exact, Floats) * (scale * row_scales[r + i]) + shift;
            store(some, activate(sum, activation));
            std::memcpy(out + (r + i) * channels + first, some, size);
          }
        }
      }
  }
}
#endif
