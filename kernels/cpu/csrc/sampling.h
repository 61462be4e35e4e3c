// Sampling, row by row, with the tokens of kernels.torch_sampling: histograms in place of a sort, and noise only for tokens
// that could win with it. From Row::scale on, x is a token's (logit - peak) / temperature.
#pragma once

#include <cfloat>
#include <cmath>
#include <functional>
#include <utility>
#include <vector>

#include "abi.h"
#include "team.h"

namespace {

constexpr int RUN = 64;            // tokens that have a maximum of their own
constexpr int BINS = 1024;         // of a histogram
constexpr int WORDS = WIDE / 2;    // of a vector
constexpr float WEIGHTLESS = -40;  // tokens of this x weigh less, all together, than the least 1 - top_p of the peak

// The last numbers of a row, from `start` on, in room for a run, and `other` after them.
template <class Number>
const Number* padded(const Number* row, int64_t start, int64_t size, Number other, Number* room) {
  std::fill(std::copy(row + start, row + size, room), room + RUN, other);
  return room;
}

// The penalties and the bias of a batch row.
struct Adjustment {
  float repetition, presence, frequency;
  const float* bias;
  const int32_t* generated;
  const uint8_t* in_prompt;

  Adjustment(const SamplingArgs& state, int64_t row)
      : repetition(state.repetition_penalty[row]),
        presence(state.presence_penalty[row]),
        frequency(state.frequency_penalty[row]),
        bias(state.bias + row * state.bias_stride),
        generated(state.generated + row * state.generated_stride),
        in_prompt(state.in_prompt + row * state.in_prompt_stride) {}

  // The logits x of the tokens from `at` on, with the bits of kernels.torch_sampling.adjust.
  floats of(floats x, int64_t at) const {
    ints counts;
    bytes prompt;
    std::memcpy(&counts, generated + at, sizeof counts);
    std::memcpy(&prompt, in_prompt + at, sizeof prompt);
    const ints repeated = counts > 0, seen = repeated | (__builtin_convertvector(prompt, ints) != 0);
    if (any(seen)) {
      x = seen ? (x > 0 ? x / repetition : rounded(x * repetition)) : x;
      x -= rounded(__builtin_convertvector(counts, floats) * frequency);
      x -= repeated ? floats{} + presence : floats{};
    }
    return x + wide(bias + at);
  }
};

// The lowest of `count` numbers x with less than `limit` above it: that many numbers, or with MASS that share of the sum of
// e^x. At least the highest number. Overwrites the numbers and WIDE more.
//
// Each round sorts the numbers into bins and goes on with those of one bin, the one that the limit falls into.
template <bool MASS>
float lowest_kept(float* numbers, int64_t count, double limit) {
  ints lanes;
  for (int i = 0; i < WIDE; i++) lanes[i] = i;
  double above = 0;
  for (bool first = true;; first = false) {
    std::fill_n(numbers + count, WIDE, numbers[0]);
    floats high = wide(numbers), low = high;
    for (int64_t i = WIDE; i < count; i += WIDE) {
      const floats x = wide(numbers + i);
      high = x > high ? x : high;
      low = x < low ? x : low;
    }
    const float top = highest_of(high), bottom = -highest_of(-low);
    if (top == bottom) return top;
    const float scale = std::min(BINS / (top - bottom), FLT_MAX);
    const auto bins_of = [&](floats x) {
      const floats bin = (top - x) * scale, last = floats{} + (float)(BINS - 1);
      return __builtin_convertvector(bin < last ? bin : last, ints);
    };
    double sums[BINS] = {};
    for (int64_t i = 0; i < count; i += WIDE) {
      const floats x = wide(numbers + i);
      const ints bins = bins_of(x);
      const floats weights = MASS ? exp(x) : floats{} + 1;
      int bin[WIDE];
      float weight[WIDE];
      std::memcpy(bin, &bins, sizeof bin);
      put(weight, weights);
      for (int lane = 0, end = std::min<int64_t>(WIDE, count - i); lane < end; lane++) sums[bin[lane]] += weight[lane];
    }
    if (MASS && first) {
      double total = 0;
      for (double sum : sums) total += sum;
      limit *= total;
    }
    int last = 0;
    double passed = above;
    for (int bin = 0; bin < BINS && passed < limit; bin++)
      if (sums[bin] > 0) {
        last = bin;
        above = passed;
        passed += sums[bin];
      }
    int64_t inside = 0;
    for (int64_t i = 0; i < count; i += WIDE) {
      const floats x = wide(numbers + i);
      inside += compress(numbers + inside, x, (bins_of(x) == last) & (lanes < (int)std::min<int64_t>(WIDE, count - i)));
    }
    if (inside <= WIDE || inside == count) {
      std::sort(numbers, numbers + inside, std::greater<float>());
      float kept = numbers[0];
      for (int64_t i = 0; i < inside && above < limit; i++) {
        kept = numbers[i];
        above += MASS ? std::exp((double)kept) : 1;
      }
      return kept;
    }
    count = inside;
  }
}

// ---- noise: kernels.noise

// The hash of x ahead of its last step, `settled`, which leaves the upper 31 bits as they are.
template <class Word>
Word stirred(Word x) {
  x += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  return (x ^ (x >> 27)) * 0x94D049BB133111EB;
}

uint64_t settled(uint64_t x) { return x ^ (x >> 31); }

uint64_t mixed(uint64_t x) { return settled(stirred(x)); }

float gumbel(uint64_t hash) {
  const float u = std::min(((float)(int64_t)(hash >> 11) + 0.5f) * 0x1p-53f, 1 - 0x1p-24f);
  const float exponential = -std::log1p(-(double)u);
  return -std::log((double)exponential);
}

constexpr float MOST_NOISE = 37.5f;  // u is at least 2^-54

// How large the upper 31 bits of a hash may be if its noise is to lift x up to `best`; -1 if no noise does.
//
// The noise is -log(-log(1 - u)), which is less than -log(u). So u has to be below e^(x - best).
ints chances(floats x, float best) {
  constexpr float ROUNDING = 1e-3f;  // more than the errors of x, the noise and their sum
  const floats chance = exp(x - best + ROUNDING);
  const ints some = __builtin_convertvector((chance < 1 ? chance : floats{}) * 0x1p31f, ints);
  return x + MOST_NOISE < best ? ints{} - 1 : chance < 1 ? some : ints{} + 0x7fffffff;
}

// ---- rows

// A row of logits, adjusted, in runs of RUN tokens. Its memory is used again for the next row.
class Row {
 public:
  float peak;      // the highest logit, but for NaN
  bool is_finite;  // no logit was NaN or infinity when it was given

  void read(const float* given, int64_t size, const Adjustment* by) {
    vocab = size;
    num_runs = (vocab + RUN - 1) / RUN;
    peaks.assign(num_runs + WIDE, -INF);
    if (by) adjusted.resize(vocab);
    logits = by ? adjusted.data() : given;
    ints finite = ints{} - 1;
    const auto maximum = [&](const float* source, const auto& adjust) {
      floats high = floats{} - INF;
      for (int i = 0; i < RUN; i += WIDE) {
        floats x = wide(source + i);
        finite &= x < INF;
        x = adjust(x, i);
        high = x > high ? x : high;
      }
      return highest_of(high);
    };
    const auto adjust = [&](const Adjustment& tables, int64_t at, float* target) {
      return [=, &tables](floats x, int i) {
        x = tables.of(x, at + i);
        put(target + i, x);
        return x;
      };
    };
    const auto same = [](floats x, int) { return x; };
    const int64_t whole = vocab / RUN, start = whole * RUN;
    for (int64_t r = 0; r < whole; r++) {
      const float* source = given + r * RUN;
      peaks[r] = by ? maximum(source, adjust(*by, r * RUN, &adjusted[r * RUN])) : maximum(source, same);
    }
    if (start < vocab) {
      padded(given, start, vocab, -INF, last);
      float bias[RUN];
      int32_t generated[RUN];
      uint8_t in_prompt[RUN];
      if (by) {
        Adjustment end = *by;
        end.bias = padded(by->bias, start, vocab, 0.0f, bias);
        end.generated = padded(by->generated, start, vocab, 0, generated);
        end.in_prompt = padded(by->in_prompt, start, vocab, (uint8_t)0, in_prompt);
        peaks[whole] = maximum(last, adjust(end, 0, last));
      } else {
        peaks[whole] = maximum(last, same);
      }
    }
    peak = *std::max_element(peaks.begin(), peaks.end());
    is_finite = !any(~finite);
  }

  int64_t first_maximum() const {
    const int64_t r = std::find(peaks.begin(), peaks.end() - WIDE, peak) - peaks.begin();
    return r * RUN + (std::find(run(r), run(r) + RUN, peak) - run(r));
  }

  // The peak has to be finite.
  void scale(float by) {
    temperature = by;
    tops.resize(peaks.size());
    for (int64_t r = 0; r < num_runs; r += WIDE) put(&tops[r], (wide(&peaks[r]) - peak) / temperature);
  }

  // The lowest x, of `low` and above, that top-k and min-p keep.
  float cut(int64_t top_k, float min_p, float low) {
    if (min_p > 0) low = std::max(low, log_of(min_p));
    numbers.resize((num_runs + 1) * RUN);
    if (top_k > 0 && top_k < num_runs) {  // the kth highest maximum of a run is a bound, and few runs reach it
      int64_t count = 0;
      for (int64_t r = 0; r < num_runs; r += WIDE) count += keep(wide(&tops[r]), low, count);
      if (count > top_k) low = lowest_kept<false>(numbers.data(), count, top_k);
    }
    if (top_k > 0) {
      const int64_t count = gather(low);
      if (count > top_k) low = lowest_kept<false>(numbers.data(), count, top_k);
    }
    return low;
  }

  // The lowest x that top-p keeps of those from `low` on.
  float top_p_cut(float low, float top_p) { return lowest_kept<true>(numbers.data(), gather(low), top_p); }

  // Whether top-p keeps a token, which takes a third of the time of finding the cut.
  bool top_p_keeps(int64_t token, float low, float top_p) const {
    const float own = (run(token / RUN)[token % RUN] - peak) / temperature;
    double likelier[WIDE] = {}, all[WIDE] = {}, sum = 0, total = 0;
    for (int64_t r = 0; r < num_runs; r++) {
      if (tops[r] < low) continue;
      floats more{}, weights{};
      for (int i = 0; i < RUN; i += WIDE) {
        const floats x = xs(r, i), weight = x >= low ? exp(x) : floats{};
        weights += weight;
        more += x > own ? weight : floats{};
      }
      for (int lane = 0; lane < WIDE; lane++) likelier[lane] += more[lane], all[lane] += weights[lane];
    }
    for (int lane = 0; lane < WIDE; lane++) sum += likelier[lane], total += all[lane];
    return sum < top_p * total;
  }

  // The token with the highest sum of x and noise, of those whose x is `low` or more.
  int64_t draw(float low, uint64_t key) const {
    words first;
    for (int i = 0; i < WORDS; i++) first[i] = i + 1;
    int64_t token = first_maximum();
    float best = gumbel(mixed(key ^ (token + 1)));
    for (int64_t group = 0; group < num_runs; group += WIDE) {
      ints bounds = chances(wide(&tops[group]), best);
      for (int64_t r = group; r < std::min(group + WIDE, num_runs); r++) {
        if (bounds[r - group] < 0 || tops[r] < low) continue;
        const uint64_t bound = ((uint64_t)bounds[r - group] << 33) + 0x1ffffffff;
        words hashes[RUN / WORDS];
        ints hits{};
        for (int i = 0; i < RUN / WORDS; i++) {
          hashes[i] = stirred((first + (uint64_t)(r * RUN + i * WORDS)) ^ key);
          hits |= (ints)(hashes[i] <= bound);
        }
        if (!any(hits)) continue;
        for (int i = 0; i < RUN; i++) {
          const uint64_t hash = hashes[i / WORDS][i % WORDS];
          if (hash > bound) continue;
          const float x = (run(r)[i] - peak) / temperature;
          const float noised = x + gumbel(settled(hash));
          const int64_t id = r * RUN + i;
          if (x >= low && (noised > best || (noised == best && id < token))) {
            best = noised;
            token = id;
            bounds = chances(wide(&tops[group]), best);
          }
        }
      }
    }
    return token;
  }

  // log(sum(e^logit)); NaN if there is NaN or infinity, or nothing else than minus infinity.
  float log_total() const {
    double sums[WIDE] = {}, total = 0;
    for (int64_t r = 0; r < num_runs; r++) {
      floats sum{};
      for (int i = 0; i < RUN; i += WIDE) sum += exp(wide(run(r) + i) - peak);
      for (int lane = 0; lane < WIDE; lane++) sums[lane] += sum[lane];
    }
    for (double sum : sums) total += sum;
    return peak + std::log(total);
  }

  // The `count` highest logits and their ids, equal ones by id.
  void likeliest(int64_t count, int64_t* ids, float* values) {
    std::vector<std::pair<float, int64_t>> found;
    scale(1);
    if (!count) return;
    for (float low : {cut(count, 0, -FLT_MAX), -INF}) {
      found.clear();
      for (int64_t r = 0; r < num_runs; r++) {
        if (tops[r] < low) continue;
        for (int64_t id = r * RUN; id < std::min((r + 1) * RUN, vocab); id++)
          if (run(r)[id - r * RUN] - peak >= low) found.emplace_back(-run(r)[id - r * RUN], id);
      }
      if ((int64_t)found.size() >= count) break;
    }
    found.resize(std::max<int64_t>(found.size(), count), {INF, 0});
    std::partial_sort(found.begin(), found.begin() + count, found.end());
    for (int64_t i = 0; i < count; i++) {
      values[i] = -found[i].first;
      ids[i] = found[i].second;
    }
  }

 private:
  const float* logits;
  int64_t vocab, num_runs;
  float temperature;
  float last[RUN];  // the last run, if the vocabulary ends in it, with -inf after its end
  std::vector<float> adjusted, peaks, tops, numbers;

  const float* run(int64_t r) const { return (r + 1) * RUN > vocab ? last : logits + r * RUN; }

  floats xs(int64_t r, int i) const { return (wide(run(r) + i) - peak) / temperature; }

  int keep(floats x, float low, int64_t count) { return compress(&numbers[count], x, x >= low); }

  int64_t gather(float low) {
    int64_t count = 0;
    for (int64_t r = 0; r < num_runs; r++)
      if (tops[r] >= low)
        for (int i = 0; i < RUN; i += WIDE) count += keep(xs(r, i), low, count);
    return count;
  }

  // The lowest x whose e^x in double is at least `weight`, up to 1.
  static float log_of(float weight) {
    if (weight >= 1) return -0x1p-54f;  // from there on e^x is rounded to 1
    float x = std::log((double)weight);
    while (std::exp((double)std::nextafterf(x, -INF)) >= weight) x = std::nextafterf(x, -INF);
    while (std::exp((double)x) < weight) x = std::nextafterf(x, 0);
    return x;
  }
};

int64_t sample_row(Row& row, const SamplingArgs& state, int64_t batch_row, int64_t position) {
  if (!row.is_finite) return NOT_FINITE;
  if (row.peak == -INF) return NONE_LEFT;
  const float temperature = state.temperature[batch_row];
  if (temperature == 0 || row.peak == INF) return row.first_maximum();
  row.scale(temperature);
  const float top_p = state.top_p[batch_row];
  const uint64_t key = mixed(mixed(mixed(state.seed[batch_row]) ^ state.choice[batch_row]) ^ position);
  const float low = row.cut(state.top_k[batch_row], state.min_p[batch_row], top_p < 1 ? WEIGHTLESS : -FLT_MAX);
  const int64_t token = row.draw(low, key);
  // The winner of all tokens also wins among those that top-p keeps, if it is one of them, as it mostly is.
  return top_p < 1 && !row.top_p_keeps(token, low, top_p) ? row.draw(row.top_p_cut(low, top_p), key) : token;
}

// The row that a thread reads into. Inlined, each use would look it up.
__attribute__((noinline)) Row& own_row() {
  static thread_local Row row;
  return row;
}

}  // namespace

// kernels.ops.Ops.sample of logits (rows, vocab), rows `stride` apart.
extern "C" int64_t sample(const float* logits, int64_t stride, int64_t rows, int64_t vocab, const SamplingArgs& state,
                          const int64_t* batch_rows, const int64_t* positions, int64_t* tokens, int threads) {
  return team().run(threads, [=](Worker& worker) {
    worker.share(rows, [&](int64_t r, Claim& claim) {
      Row& row = own_row();
      const int64_t batch_row = batch_rows[r];
      const Adjustment adjustment(state, batch_row);
      row.read(logits + r * stride, vocab, state.adjusted[batch_row] ? &adjustment : nullptr);
      const int64_t token = sample_row(row, state, batch_row, positions[r]);
      if (claim()) tokens[r] = token;
    });
  });
}

// kernels.ops.Ops.top_logprobs of logits (rows, vocab), rows `stride` apart.
extern "C" int64_t top_logprobs(const float* logits, int64_t stride, int64_t rows, int64_t vocab, int64_t count,
                                float* totals, int64_t* ids, float* logprobs, int threads) {
  return team().run(threads, [=](Worker& worker) {
    worker.share(rows, [&](int64_t r, Claim& claim) {
      Row& row = own_row();
      row.read(logits + r * stride, vocab, nullptr);
      const float total = row.log_total();
      int64_t* const own_ids = room<int64_t>(count);
      float* const values = room<float>(count);
      row.likeliest(count, own_ids, values);
      if (!claim()) return;
      totals[r] = total;
      std::copy_n(own_ids, count, ids + r * count);
      for (int64_t i = 0; i < count; i++) logprobs[r * count + i] = values[i] - total;
    });
  });
}
