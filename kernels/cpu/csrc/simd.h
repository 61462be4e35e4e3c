// Vectors of 16 numbers in GCC's and Clang's vector extensions: the compiler maps them to what the processor has.
// Intrinsics stand only where the plain form compiles to slow code; g++ 12 warns of the unmasked ones of AVX-512 (GCC bug
// 105593), and compiles the `maskz` ones with ALL to the same instruction. `f32x16{} + x` is x in every lane.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
constexpr float INF = __builtin_inff();

typedef float f32x16 __attribute__((vector_size(4 * LANES)));
typedef int32_t i32x16 __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32x16 __attribute__((vector_size(4 * LANES)));
typedef uint16_t u16x16 __attribute__((vector_size(2 * LANES)));
typedef int8_t i8x16 __attribute__((vector_size(LANES)));
typedef uint8_t u8x16 __attribute__((vector_size(LANES)));

template <class To, class From>
To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To result;
  std::memcpy(&result, &x, sizeof(To));
  return result;
}

#ifdef __AVX512F__
constexpr __mmask16 ALL = 0xffff;
constexpr int WIDE = 16;
#elif defined(__AVX2__)
constexpr int WIDE = 8;
#else
constexpr int WIDE = 4;
#endif

// As many numbers as one register holds, for code that mostly compares and selects: g++ does that lane by lane in vectors
// of more.
typedef float floats __attribute__((vector_size(4 * WIDE)));
typedef int32_t ints __attribute__((vector_size(4 * WIDE)));

floats part_of(f32x16 x, int i) {
  floats part;
  std::memcpy(&part, (const char*)&x + i * sizeof part, sizeof part);
  return part;
}

ints part_of(i32x16 x, int i) { return bits_of<ints>(part_of(bits_of<f32x16>(x), i)); }

// function(...) of 16 numbers, a register at a time.
template <class Function, class... Vectors>
f32x16 by_registers(const Function& function, Vectors... vectors) {
  f32x16 result;
  for (int i = 0; i < LANES / WIDE; i++) {
    const floats part = function(part_of(vectors, i)...);
    std::memcpy((char*)&result + i * sizeof part, &part, sizeof part);
  }
  return result;
}

f32x16 higher(f32x16 a, f32x16 b) {
  return by_registers([](floats x, floats y) { return x > y ? x : y; }, a, b);
}

// a where the mask has a lane, else b.
f32x16 select(i32x16 mask, f32x16 a, f32x16 b) {
  return by_registers([](ints some, floats x, floats y) { return some ? x : y; }, mask, a, b);
}
typedef uint64_t words __attribute__((vector_size(4 * WIDE)));
typedef uint8_t bytes __attribute__((vector_size(WIDE)));

#ifdef __F16C__
struct TwoHalves {
  __m128i a, b;
};

struct TwoFloats {
  __m256 a, b;
};
#endif

}  // namespace

// The 16-bit types: not __bf16 and _Float16, which C++ has or lacks by the compiler's version and the processor.
// `narrow` rounds to nearest, ties to even, and keeps a NaN a NaN.

struct bfloat16 {
  uint16_t bits;

  static f32x16 widen(u16x16 raw) {
#ifdef __AVX512F__  // compilers need five instructions for the plain form
    return bits_of<f32x16>((u32x16)_mm512_maskz_cvtepu16_epi32(ALL, (__m256i)raw) << 16);
#else
    return bits_of<f32x16>(__builtin_convertvector(raw, u32x16) << 16);
#endif
  }

  static u16x16 narrow(f32x16 x) {
#ifdef __AVX512BF16__
    return (u16x16)_mm512_cvtneps_pbh((__m512)x);
#else
    const u32x16 raw = bits_of<u32x16>(x), nearest = raw + 0x7fff + ((raw >> 16) & 1);
    const f32x16 rounded = select(x == x, bits_of<f32x16>(nearest), bits_of<f32x16>(raw | 0x400000));
    return __builtin_convertvector(bits_of<u32x16>(rounded) >> 16, u16x16);
#endif
  }
};

struct float16 {
  uint16_t bits;

  static f32x16 widen(u16x16 raw) {
#ifdef __AVX512F__
    return (f32x16)_mm512_maskz_cvtph_ps(ALL, (__m256i)raw);
#elif defined(__F16C__)
    const auto [a, b] = bits_of<TwoHalves>(raw);
    return bits_of<f32x16>(TwoFloats{_mm256_cvtph_ps(a), _mm256_cvtph_ps(b)});
#else
    const u32x16 wide = __builtin_convertvector(raw, u32x16), size = (wide & 0x7fff) << 13;
    const u32x16 finite = bits_of<u32x16>(bits_of<f32x16>(size) * 0x1p112f);  // makes denormals normal
    const u32x16 special = size | (size > 0x7c00 << 13 ? u32x16{} + 0x7fc00000 : u32x16{} + 0x7f800000);
    return bits_of<f32x16>((size < 0x7c00 << 13 ? finite : special) | (wide & 0x8000) << 16);
#endif
  }

  static u16x16 narrow(f32x16 x) {
#ifdef __AVX512F__
    return (u16x16)_mm512_maskz_cvtps_ph(ALL, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
    const auto [a, b] = bits_of<TwoFloats>(x);
    return bits_of<u16x16>(TwoHalves{_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT),
                                     _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT)});
#else
    const u32x16 raw = bits_of<u32x16>(x), size = raw & 0x7fffffff;
    const u32x16 normal = (size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13;  // a carry makes the largest infinite
    const u32x16 denormal = bits_of<u32x16>(bits_of<f32x16>(size) + 0.5f) - 0x3f000000;  // the sum rounds
    const u32x16 special = size > 0x7f800000 ? 0x7e00 | ((size >> 13) & 0x3ff) : u32x16{} + 0x7c00;
    const u32x16 narrowed = size < 0x38800000 ? denormal : size < 0x47800000 ? normal : special;
    return __builtin_convertvector(narrowed | ((raw >> 16) & 0x8000), u16x16);
#endif
  }
};

namespace {

// COUNT numbers, and zeros in the lanes after them.
template <int COUNT = LANES>
f32x16 load(const float* source) {
  f32x16 result{};
  std::memcpy(&result, source, COUNT * sizeof *source);
  return result;
}

template <int COUNT = LANES, class Half>
f32x16 load(const Half* source) {
  u16x16 raw{};
  std::memcpy(&raw, source, COUNT * sizeof *source);
  return Half::widen(raw);
}

// The first COUNT numbers.
template <int COUNT = LANES>
void store(float* target, f32x16 x) {
  std::memcpy(target, &x, COUNT * sizeof *target);
}

template <int COUNT = LANES, class Half>
void store(Half* target, f32x16 x) {
  const u16x16 narrow = Half::narrow(x);
  std::memcpy(target, &narrow, COUNT * sizeof *target);
}

// A mask for `?:` of the bytes that are not 0.
i32x16 nonzero(const uint8_t* bytes) {
  u8x16 some;
  std::memcpy(&some, bytes, LANES);
  return __builtin_convertvector(some, i32x16) != 0;
}

// ---- sums and squares

// Cuts two vectors into pieces of PIECE lanes: the even pieces of both in turn, and the odd ones.
template <int PIECE>
f32x16 even(f32x16 a, f32x16 b) {
  if (PIECE == 8) return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  if (PIECE == 4) return __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
  if (PIECE == 2) return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  return __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
}

template <int PIECE>
f32x16 odd(f32x16 a, f32x16 b) {
  if (PIECE == 8) return __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  if (PIECE == 4) return __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  if (PIECE == 2) return __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

template <int PIECE>
void fold(f32x16* rows) {
  for (int i = 0; i < PIECE; i++) rows[i] = even<PIECE>(rows[i], rows[i + PIECE]) + odd<PIECE>(rows[i], rows[i + PIECE]);
}

// Lane i of the result is the sum of all lanes of rows[i], always added in the same order. Overwrites the rows.
f32x16 sums(f32x16* rows) {
  fold<8>(rows);
  fold<4>(rows);
  fold<2>(rows);
  fold<1>(rows);
  return rows[0];
}

template <int PIECE>
void swap(f32x16* rows) {
  for (int i = 0; i < LANES; i++) {
    if (i & PIECE) continue;
    const f32x16 a = rows[i], b = rows[i + PIECE];
    rows[i] = even<PIECE>(a, b);
    rows[i + PIECE] = odd<PIECE>(a, b);
  }
}

// Of a square of numbers, or of any other 32 bits.
void transpose(f32x16* rows) {
  swap<8>(rows);
  swap<4>(rows);
  swap<2>(rows);
  swap<1>(rows);
}

float sum(f32x16 x) {
  f32x16 rows[LANES] = {x};
  return sums(rows)[0];
}

float highest(f32x16 x) {
  float best = x[0];
  for (int i = 1; i < LANES; i++) best = std::max(best, x[i]);
  return best;
}

// ---- vectors of WIDE

floats wide(const float* source) {
  floats x;
  std::memcpy(&x, source, sizeof x);
  return x;
}

void put(float* target, floats x) { std::memcpy(target, &x, sizeof x); }

// Whether a mask for `?:` has a lane.
bool any(ints mask) {
#ifdef __AVX512F__
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  const words pairs = bits_of<words>(mask);
  return pairs[0] | pairs[1];
#endif
}

// Stores the lanes that a mask for `?:` has one after another, and returns their number. Any of the WIDE numbers at
// `target` may be overwritten.
int compress(float* target, floats x, ints mask) {
#ifdef __AVX512F__
  const __mmask16 lanes = _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
  put(target, (floats)_mm512_maskz_compress_ps(lanes, (__m512)x));
  return __builtin_popcount(lanes);
#else
  int count = 0;
  for (int i = 0; i < WIDE; i++) {
    target[count] = x[i];
    count -= mask[i];
  }
  return count;
#endif
}

// x with its last bits: no compiler makes one instruction of the product that gave x and a sum with x.
floats rounded(floats x) {
  asm("" : "+m"(x));
  return x;
}

// The highest number; no lane may be NaN.
float highest_of(floats x) {
#ifdef __AVX512F__
  const auto fold = [&](floats others) { x = others > x ? others : x; };
  fold(odd<8>(x, x));
  fold(odd<4>(x, x));
  fold(odd<2>(x, x));
  fold(odd<1>(x, x));
  return x[0];
#else
  float best = x[0];
  for (int i = 1; i < WIDE; i++) best = std::max(best, x[i]);
  return best;
#endif
}

// ---- functions

// 1.5 * 2^23. Adding it rounds a number to the nearest integer, ties to even, and leaves that integer in the last
// bits.
constexpr float ROUNDER = 12582912;

// The integers in numbers that ROUNDER has been added to.
template <class Floats>
auto integers(Floats shifted) {
  return bits_of<decltype(shifted < shifted)>(shifted) - bits_of<int32_t>(ROUNDER);
}

// e^x with a relative error below 1e-7; 0 below -87, where e^x is not a normal number. Cephes' reduction and
// polynomial.
template <class Floats>
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
  p = bits_of<Floats>(bits_of<decltype(x < x)>(p) + (integers(shifted) << 23));
  return x < -87.3f ? Floats{} : x == x ? p : x;
}

f32x16 exp(f32x16 x) {
  return by_registers([](floats part) { return exp<floats>(part); }, x);
}

}  // namespace
