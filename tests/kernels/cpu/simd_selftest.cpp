// Compares every operation of simd.h with plain scalar code, needs no Python. Prints what differs, and exits with 1
// if anything does.

#include "simd.h"

#include <cfloat>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

namespace {

std::mt19937 generator(1);
int failures = 0;

void expect(bool ok, const char* what, double input, double ours, double wanted) {
  if (ok || ++failures > 20) return;
  std::printf("%s of %.9g (%a): %.9g (%a), expected %.9g (%a)\n", what, input, input, ours, ours, wanted, wanted);
}

bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

float any_float() { return bits_of<float>((uint32_t)generator()); }

f32x16 any_vector() {
  std::normal_distribution<float> normal;
  f32x16 x;
  for (int i = 0; i < LANES; i++) x[i] = normal(generator);
  return x;
}

const float EDGES[] = {0.0f, -0.0f, 1.0f, -1.0f, 0.5f, 65504, 65519.996f, 65520, 65536, -65520, FLT_MAX, -FLT_MAX, FLT_MIN,
                       -FLT_MIN, FLT_TRUE_MIN, -FLT_TRUE_MIN, FLT_MIN / 2, 0x1p-14f, 0x1p-24f, 0x1p-25f, 0x1.8p-25f,
                       0x1.fffp-15f, 3.4e38f, 3.3961776e38f, INF, -INF, std::numeric_limits<float>::quiet_NaN(),
                       -std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::signaling_NaN()};

// ---- 16-bit formats: a sign, an exponent and `mantissa` bits

struct Format {
  const char* name;
  int mantissa, bias;

  int infinity() const { return (0x7fff >> mantissa) << mantissa; }

  double widen(uint16_t bits) const {
    const int size = bits & 0x7fff, exponent = size >> mantissa, fraction = size & ((1 << mantissa) - 1);
    double value = exponent ? std::ldexp((1 << mantissa) + fraction, exponent - bias - mantissa)
                            : std::ldexp(fraction, 1 - bias - mantissa);
    if (size == infinity()) value = HUGE_VAL;
    if (size > infinity()) value = NAN;
    return bits & 0x8000 ? -value : value;
  }

  // Not of NaN.
  uint16_t narrow(double x) const {
    const int sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isinf(x)) return sign | infinity();
    const int exponent = x == 0 ? 1 - bias : std::max(std::ilogb(x), 1 - bias);
    const int steps = (int)std::nearbyint(std::scalbn(std::fabs(x), mantissa - exponent));  // ties to even
    const int size = steps < 1 << mantissa ? steps : ((exponent + bias - 1) << mantissa) + steps;
    return sign | std::min(size, infinity());
  }
};

template <class Half>
void check_narrow(const Format& format, const std::vector<float>& numbers) {
  for (size_t start = 0; start < numbers.size(); start += LANES) {
    f32x16 x{};
    for (int i = 0; i < LANES && start + i < numbers.size(); i++) x[i] = numbers[start + i];
    const u16x16 narrow = Half::narrow(x);
    Half stored[LANES];
    store(stored, x);
    for (int i = 0; i < LANES; i++) {
      double value = x[i];
#ifdef __AVX512BF16__  // its instruction takes denormals for 0
      if (format.mantissa == 7 && std::fabs(value) < FLT_MIN) value = std::copysign(0.0, value);
#endif
      const double ours = format.widen(narrow[i]);
      if (std::isnan(value))
        expect(std::isnan(ours), format.name, value, ours, value);
      else
        expect(narrow[i] == format.narrow(value), format.name, value, ours, format.widen(format.narrow(value)));
      expect(stored[i].bits == narrow[i], "store", value, stored[i].bits, narrow[i]);
    }
  }
}

template <class Half>
void check_format(const Format& format) {
  std::vector<float> numbers(std::begin(EDGES), std::end(EDGES));
  for (int bits = 0; bits < 0x10000; bits++) {  // every number of the format, the ties between them, and their neighbours
    const float value = (float)format.widen(bits);
    numbers.push_back(value);
    if ((bits & 0x7fff) >= format.infinity()) continue;
    // The value that would follow the largest one, too: between them lies the border to infinity.
    const bool last = (bits & 0x7fff) + 1 == format.infinity();
    const double next = last ? std::copysign(std::ldexp(1.0, (format.infinity() >> format.mantissa) - format.bias), value)
                             : format.widen(bits + 1);
    const float tie = (float)((value + next) / 2);
    numbers.insert(numbers.end(), {tie, std::nextafterf(tie, INF), std::nextafterf(tie, -INF)});
  }
  for (int i = 0; i < 1 << 18; i++) numbers.push_back(any_float());
  check_narrow<Half>(format, numbers);
  for (int bits = 0; bits < 0x10000; bits += LANES) {
    Half source[LANES];
    u16x16 raw;
    for (int i = 0; i < LANES; i++) source[i].bits = raw[i] = bits + i;
    const f32x16 ours = Half::widen(raw), loaded = load(source);
    for (int i = 0; i < LANES; i++) {
      const double wanted = format.widen(bits + i);
      expect(same(ours[i], wanted) && std::signbit(ours[i]) == std::signbit(wanted), format.name, bits + i, ours[i], wanted);
      expect(same(ours[i], loaded[i]), "load", bits + i, loaded[i], ours[i]);
    }
  }
}

float plain(float x) { return x; }
template <class Half>
float plain(Half x) {
  u16x16 raw{x.bits};
  return Half::widen(raw)[0];
}

// Only COUNT numbers are read and written. The buffers end there, so that an address sanitizer sees more.
template <int COUNT, class Number>
void check_part() {
  std::vector<Number> source(COUNT), target(COUNT);
  store<COUNT>(source.data(), any_vector());
  const f32x16 x = load<COUNT>(source.data());
  store<COUNT>(target.data(), x);
  for (int i = 0; i < LANES; i++) {
    const float wanted = i < COUNT ? plain(source[i]) : 0;
    expect(x[i] == wanted, "a part", i, x[i], wanted);
    if (i < COUNT) expect(plain(target[i]) == wanted, "a stored part", i, plain(target[i]), wanted);
  }
}

template <class Number>
void check_parts() {
  check_part<1, Number>();
  check_part<7, Number>();
  check_part<8, Number>();
  check_part<15, Number>();
  check_part<16, Number>();
}

// ---- shuffles and sums

template <int PIECE>
void check_pieces() {
  const f32x16 a = any_vector(), b = any_vector(), evens = even<PIECE>(a, b), odds = odd<PIECE>(a, b);
  for (int i = 0; i < LANES; i++) {
    const f32x16& from = i / PIECE % 2 ? b : a;
    const int place = i / PIECE / 2 * 2 * PIECE + i % PIECE;
    expect(evens[i] == from[place], "even", i, evens[i], from[place]);
    expect(odds[i] == from[place + PIECE], "odd", i, odds[i], from[place + PIECE]);
  }
}

float plain_sum(f32x16 x) {  // in the order that simd.h promises to keep
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) x[i] += x[i + half];
  return x[0];
}

void check_sums() {
  f32x16 rows[LANES], folded[LANES], turned[LANES];
  for (f32x16& row : rows) row = any_vector();
  std::memcpy(folded, rows, sizeof rows);
  std::memcpy(turned, rows, sizeof rows);
  const f32x16 ours = sums(folded);
  transpose(turned);
  for (int i = 0; i < LANES; i++) {
    expect(ours[i] == plain_sum(rows[i]), "sums", i, ours[i], plain_sum(rows[i]));
    expect(sum(rows[i]) == plain_sum(rows[i]), "sum", i, sum(rows[i]), plain_sum(rows[i]));
    float best = rows[i][0];
    for (int j = 0; j < LANES; j++) {
      best = rows[i][j] > best ? rows[i][j] : best;
      expect(turned[i][j] == rows[j][i], "transpose", i, turned[i][j], rows[j][i]);
    }
    expect(highest(rows[i]) == best, "highest", i, highest(rows[i]), best);
  }
}

void check_bytes_and_integers() {
  uint8_t bytes[LANES];
  f32x16 numbers;
  const f32x16 others = any_vector() * 100;
  for (int i = 0; i < LANES; i++) {
    bytes[i] = generator() % 3 ? generator() : 0;
    numbers[i] = std::ldexp((float)(int)(generator() % 2048) - 1024, -(int)(generator() % 4));  // half of them ties
  }
  const i32x16 mask = nonzero(bytes), rounded = integers(numbers + ROUNDER);
  for (int i = 0; i < LANES; i++) {
    expect(mask[i] == (bytes[i] ? -1 : 0), "nonzero", bytes[i], mask[i], bytes[i] ? -1 : 0);
    const float picked = bytes[i] ? numbers[i] : others[i], larger = std::max(numbers[i], others[i]);
    expect(select(mask, numbers, others)[i] == picked, "select", bytes[i], select(mask, numbers, others)[i], picked);
    expect(higher(numbers, others)[i] == larger, "higher", numbers[i], higher(numbers, others)[i], larger);
    expect(rounded[i] == std::nearbyint(numbers[i]), "integers", numbers[i], rounded[i], std::nearbyint(numbers[i]));
  }
}

// Vectors of WIDE. Of the buffer only WIDE numbers may be written.
void check_wide() {
  float numbers[WIDE], kept[WIDE], wanted[WIDE];
  ints mask;
  int count = 0;
  for (int i = 0; i < WIDE; i++) {
    numbers[i] = any_vector()[0];
    mask[i] = generator() % 3 ? 0 : -1;
    if (mask[i]) wanted[count++] = numbers[i];
  }
  const floats x = wide(numbers);
  const int ours = compress(kept, x, mask);
  expect(ours == count, "compress", count, ours, count);
  for (int i = 0; i < count; i++) expect(kept[i] == wanted[i], "a kept number", i, kept[i], wanted[i]);
  expect(any(mask) == (count > 0), "any", count, any(mask), count > 0);
  const float best = *std::max_element(numbers, numbers + WIDE);
  expect(highest_of(x) == best, "highest_of", best, highest_of(x), best);
  put(kept, x);
  for (int i = 0; i < WIDE; i++) expect(kept[i] == numbers[i], "put", i, kept[i], numbers[i]);
  const float e = numbers[0], square = e * e;
  const volatile float rounded_square = square;
  expect((rounded(x * x) - wide(numbers))[0] == rounded_square - e, "rounded", e, (rounded(x * x) - x)[0], square - e);
}

void check_exp() {
  std::vector<float> numbers(std::begin(EDGES), std::end(EDGES));
  for (float border : {-87.3f, 88.3f})
    for (float x : {border, std::nextafterf(border, 0), std::nextafterf(border, 2 * border)}) numbers.push_back(x);
  for (int i = 0; i < 1 << 18; i++) numbers.push_back(std::ldexp((float)generator(), -32) * 180 - 90);
  for (float number : numbers) {
    const float ours = exp(f32x16{} + number)[0];
    const float narrow = exp(floats{} + number)[0];
    expect(same(ours, narrow), "exp of another width", number, narrow, ours);
    const double wanted = number < -87.3f ? 0 : number > 88.3f ? std::exp((double)88.3f) : std::exp((double)number);
    const bool ok = std::isnan(number) ? std::isnan(ours) : std::fabs(ours - wanted) <= 1e-7 * wanted;
    expect(ok, "exp", number, ours, wanted);
  }
}

}  // namespace

int main() {
  check_format<bfloat16>({"bfloat16", 7, 127});
  check_format<float16>({"float16", 10, 15});
  check_parts<float>();
  check_parts<bfloat16>();
  check_parts<float16>();
  check_exp();
  for (int i = 0; i < 1000; i++) {
    check_pieces<8>();
    check_pieces<4>();
    check_pieces<2>();
    check_pieces<1>();
    check_sums();
    check_bytes_and_integers();
    check_wide();
  }
  if (failures) std::printf("%d differences\n", failures);
  return failures != 0;
}
