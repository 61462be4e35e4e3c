// Compares attention, norms, products and sampling with plain loops in double, needs no Python. Prints what differs, and
// exits with 1 if anything does.

#include "kernels.cpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

namespace {

typedef std::vector<ELEMENT> Numbers;

constexpr bool IS_FLOAT = sizeof(ELEMENT) == 4, IS_BFLOAT16 = std::is_same<ELEMENT, bfloat16>::value;
constexpr double STEP = IS_FLOAT ? 1e-6 : IS_BFLOAT16 ? 0x1p-8 : 0x1p-11;  // at least half of a number's last bit
constexpr int HEADS = 2, PAGES = 7, THREADS = 2;
constexpr float SCALE = 0.3f, EPS = 1e-5f;

std::mt19937 generator(1);
int failures = 0;

void expect(const char* what, size_t place, double ours, double wanted, double tolerance) {
  if (std::fabs(ours - wanted) <= tolerance * (1 + std::fabs(wanted)) || ++failures > 20) return;
  std::printf("%s: %.9g at %zu, expected %.9g\n", what, ours, place, wanted);
}

float plain(ELEMENT x) {
  ELEMENT some[LANES] = {x};
  return load(some)[0];
}

ELEMENT rounded(float x) {
  ELEMENT some[LANES];
  store(some, f32x16{} + x);
  return some[0];
}

Numbers normal(size_t count, float size = 1) {
  std::normal_distribution<float> distribution(0, size);
  Numbers numbers(count);
  for (ELEMENT& x : numbers) x = rounded(distribution(generator));
  return numbers;
}

int64_t below(int64_t limit) { return generator() % limit; }

// Waits until no helper can read the arguments of a call any more.
void settle(int64_t job) {
  while (job && oldest_job() <= job) std::this_thread::yield();
}

// ---- attention: keys are (page, offset) of one head

struct Key {
  int64_t page, offset;
};

// What a query of one head gets, HEAD_DIM numbers.
std::vector<double> attended(const ELEMENT* q, const Numbers& k, const Numbers& v, const std::vector<Key>& keys, int head) {
  std::vector<double> scores, sums(HEAD_DIM);
  const auto at = [&](const Key& key) { return ((key.page * HEADS + head) * PAGE_SIZE + key.offset) * HEAD_DIM; };
  double peak = -HUGE_VAL, total = 0;
  for (const Key& key : keys) {
    double score = 0;
    for (int i = 0; i < HEAD_DIM; i++) score += (double)plain(q[i]) * plain(k[at(key) + i]);
    scores.push_back(score * SCALE);
    peak = std::max(peak, scores.back());
  }
  for (size_t i = 0; i < keys.size(); i++) {
    const double weight = std::exp(scores[i] - peak);
    total += weight;
    for (int d = 0; d < HEAD_DIM; d++) sums[d] += weight * plain(v[at(keys[i]) + d]);
  }
  for (double& sum : sums) sum /= total;
  return sums;
}

void check_decode(int64_t batch) {
  const int64_t row = HEADS * HEAD_DIM;
  const Numbers q = normal(batch * 3 * row);  // q, k and v side by side, as a step has them
  Numbers k_pages = normal(PAGES * row * PAGE_SIZE), v_pages = normal(PAGES * row * PAGE_SIZE), out(batch * row);
  std::vector<int64_t> slots, page_ids, offsets{0};
  std::vector<uint8_t> visible;
  std::vector<std::vector<Key>> keys(batch);
  for (int64_t b = 0; b < batch; b++) {
    slots.push_back(b % PAGES * PAGE_SIZE + b / PAGES);
    for (int64_t count = 1 + below(3); count; count--) {
      page_ids.push_back(below(PAGES));
      for (int64_t i = 0; i < PAGE_SIZE; i++) {
        visible.push_back(below(4) > 0);
        if (visible.back()) keys[b].push_back({page_ids.back(), i});
      }
    }
    offsets.push_back(page_ids.size());
  }
  settle(kv_write(q.data() + row, q.data() + 2 * row, 3 * row, k_pages.data(), v_pages.data(), slots.data(), batch,
                  HEADS, THREADS));
  settle(decode_attention(q.data(), 3 * row, k_pages.data(), v_pages.data(), page_ids.data(), offsets.data(),
                          visible.data(), out.data(), batch, HEADS, SCALE, THREADS));
  for (int64_t b = 0; b < batch; b++)
    for (int h = 0; h < HEADS; h++) {
      const std::vector<double> wanted = attended(&q[b * 3 * row + h * HEAD_DIM], k_pages, v_pages, keys[b], h);
      for (int d = 0; d < HEAD_DIM; d++) {
        const int64_t place = ((slots[b] / PAGE_SIZE * HEADS + h) * PAGE_SIZE + slots[b] % PAGE_SIZE) * HEAD_DIM + d;
        const int64_t source = b * 3 * row + h * HEAD_DIM + d;
        expect("a written key", place, plain(k_pages[place]), plain(q[source + row]), 0);
        expect("a written value", place, plain(v_pages[place]), plain(q[source + 2 * row]), 0);
        expect("decode_attention", b, plain(out[b * row + h * HEAD_DIM + d]), wanted[d], 4 * STEP);
      }
    }
}

void check_prefill() {
  const int64_t row = HEADS * HEAD_DIM;
  const std::vector<int64_t> lengths{64, 1, 37};
  const Numbers k_pages = normal(PAGES * row * PAGE_SIZE), v_pages = normal(PAGES * row * PAGE_SIZE);
  std::vector<int64_t> rows, offsets{0}, page_ids, masks;
  std::vector<uint8_t> hidden(2 * PAGE_SIZE * PAGE_SIZE);
  for (uint8_t& flag : hidden) flag = below(3) == 0;
  for (int i = 0; i < PAGE_SIZE; i++) hidden[i] = hidden[PAGE_SIZE * PAGE_SIZE + i] = 0;  // every query sees the first key
  int64_t tokens = 0;
  for (int64_t length : lengths) {
    rows.insert(rows.end(), {tokens, length, 1 + below(PAGE_SIZE)});
    tokens += length;
    for (int64_t count = 1 + below(3); count; count--) {
      page_ids.push_back(below(PAGES));
      masks.push_back(below(3) - 1);
    }
    masks.back() = 0;  // the keys that are not written are hidden in the last page
    offsets.push_back(page_ids.size());
  }
  for (int64_t key = 1; key < PAGE_SIZE; key++)
    for (int i = 0; i < PAGE_SIZE; i++)
      for (size_t t = 0; t < lengths.size(); t++)
        if (key >= rows[3 * t + 2]) hidden[key * PAGE_SIZE + i] = 1;
  const Numbers q = normal(tokens * row);
  Numbers out(tokens * row);
  settle(prefill_attention(q.data(), row, k_pages.data(), v_pages.data(), rows.data(), offsets.data(), page_ids.data(),
                           masks.data(), hidden.data(), lengths.size(), out.data(), HEADS, SCALE, THREADS));
  for (size_t t = 0; t < lengths.size(); t++)
    for (int64_t i = 0; i < lengths[t]; i++) {
      std::vector<Key> keys;
      for (int64_t entry = offsets[t]; entry < offsets[t + 1]; entry++)
        for (int64_t key = 0; key < PAGE_SIZE; key++)
          if (masks[entry] < 0 || !hidden[(masks[entry] * PAGE_SIZE + key) * PAGE_SIZE + i])
            keys.push_back({page_ids[entry], key});
      for (int64_t h = 0; h < HEADS; h++) {
        const int64_t place = (rows[3 * t] + i) * row + h * HEAD_DIM;
        const std::vector<double> wanted = attended(&q[place], k_pages, v_pages, keys, h);
        for (int d = 0; d < HEAD_DIM; d++)
          expect("prefill_attention", place, plain(out[place + d]), wanted[d], 4 * STEP);
      }
    }
}

// ---- norms

void check_norm(int64_t rows, int64_t columns, bool adds, bool affine) {
  const Numbers x = normal(rows * columns, 3), residual = normal(rows * columns);
  const Numbers weight = normal(columns), bias = normal(columns);
  Numbers normed(rows * columns), total(rows * columns);
  settle(add_layernorm(x.data(), adds ? residual.data() : nullptr, affine ? weight.data() : nullptr,
                       affine ? bias.data() : nullptr, rows, columns, EPS, normed.data(), total.data(), THREADS));
  for (int64_t r = 0; r < rows; r++) {
    const auto at = [&](int64_t c) { return plain((adds ? total : x)[r * columns + c]); };
    double mean = 0, variance = 0;
    for (int64_t c = 0; c < columns; c++) mean += at(c) / columns;
    for (int64_t c = 0; c < columns; c++) variance += (at(c) - mean) * (at(c) - mean) / columns;
    for (int64_t c = 0; c < columns; c++) {
      const int64_t i = r * columns + c;
      if (adds) expect("the sum", i, plain(total[i]), (double)plain(x[i]) + plain(residual[i]), STEP);
      double wanted = (at(c) - mean) / std::sqrt(variance + EPS);
      if (affine) wanted = wanted * plain(weight[c]) + plain(bias[c]);
      expect("add_layernorm", i, plain(normed[i]), wanted, 4 * STEP);
    }
  }
}

// ---- products

double plain_activation(double x, int activation) {
  switch (activation) {
    case RELU:
      return std::max(x, 0.0);
    case GELU:
      return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case GELU_NEW:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    default:
      return x;
  }
}

int64_t up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// Where byte `i` of a channel lies in panels whose rows have `bytes` bytes.
int64_t place(int64_t channel, int64_t i, int64_t bytes) {
  return (channel / LANES * bytes + i / GROUP * GROUP) * LANES + channel % LANES * GROUP + i % GROUP;
}

void check_int8(int64_t rows, int64_t columns, int64_t channels, int activation, bool biased) {
  const int64_t padded = up(columns, BLOCK), num_panels = up(channels, PANELS * LANES) / LANES;
  std::vector<uint8_t> panels(num_panels * padded * LANES, OFFSET);
  std::vector<float> scales(num_panels * LANES);
  std::vector<int> weights(channels * columns);
  for (int64_t o = 0; o < channels; o++) {
    scales[o] = 0.001f * (1 + below(9));
    for (int64_t c = 0; c < columns; c++) {
      weights[o * columns + c] = below(255) - 127;
      panels[place(o, c, padded)] = weights[o * columns + c] + OFFSET;
    }
  }
  const Numbers x = normal(rows * columns), bias = normal(channels);
  Numbers out(rows * channels);
  std::vector<int8_t> integers(rows * padded);
  std::vector<float> row_scales(rows);
  std::vector<int32_t> sums(rows);
  const QuantizedRows room{integers.data(), row_scales.data(), sums.data()};
  const ProductArgs by{panels.data(), num_panels, scales.data(), padded, biased ? bias.data() : nullptr, channels, columns};
  settle(linear_panels(by, x.data(), rows, activation, out.data(), &room, THREADS));
  for (int64_t r = 0; r < rows; r++) {
    float best = 0;
    for (int64_t c = 0; c < columns; c++) best = std::max(best, std::fabs(plain(x[r * columns + c])));
    expect("a row's scale", r, row_scales[r], plain(rounded(best / 127)), 0);
    for (int64_t c = 0; c < columns; c++) {
      const double exact = plain(x[r * columns + c]) / row_scales[r];
      if (std::fabs(integers[r * padded + c] - exact) > 0.501) expect("an integer", c, integers[r * padded + c], exact, 0);
    }
    for (int64_t o = 0; o < channels; o++) {
      double sum = 0;
      for (int64_t c = 0; c < columns; c++) sum += (double)integers[r * padded + c] * weights[o * columns + c];
      sum = sum * row_scales[r] * scales[o] + (biased ? plain(bias[o]) : 0);
      expect("linear_panels, int8", o, plain(out[r * channels + o]), plain_activation(sum, activation), 4 * STEP);
    }
  }
}

void check_bf16(int64_t rows, int64_t columns, int64_t channels, int activation) {
  const int64_t bytes = columns * sizeof(ELEMENT), num_panels = up(channels, PANELS * LANES) / LANES;
  std::vector<uint8_t> panels(num_panels * bytes * LANES);
  const Numbers x = normal(rows * columns), weights = normal(channels * columns, 0.1f), bias = normal(channels);
  for (int64_t o = 0; o < channels; o++)
    for (int64_t i = 0; i < bytes; i++) panels[place(o, i, bytes)] = ((const uint8_t*)&weights[o * columns])[i];
  Numbers out(rows * channels);
  std::vector<float> wide(rows * channels);
  ProductArgs by{panels.data(), num_panels, nullptr, 0, bias.data(), channels, columns};
  settle(linear_panels(by, x.data(), rows, activation, out.data(), nullptr, THREADS));
  by.bias = nullptr;
  settle(project_panels(by, x.data(), rows, wide.data(), THREADS));
  for (int64_t r = 0; r < rows; r++)
    for (int64_t o = 0; o < channels; o++) {
      double sum = 0;
      for (int64_t c = 0; c < columns; c++) sum += (double)plain(x[r * columns + c]) * plain(weights[o * columns + c]);
      expect("project_panels", o, wide[r * channels + o], sum, 1e-5);
      const double wanted = plain_activation(sum + plain(bias[o]), activation);
      expect("linear_panels, bfloat16", o, plain(out[r * channels + o]), wanted, 2 * STEP);
    }
}

// ---- sampling

struct Settings {
  float temperature;
  int64_t top_k;
  float top_p, min_p;
  int adjusted;
};

// The token of adjusted logits: everything sorted, and noise for every token.
int64_t plain_sample(const std::vector<float>& logits, const Settings& settings, uint64_t key) {
  const int64_t first = std::max_element(logits.begin(), logits.end()) - logits.begin();
  if (settings.temperature == 0) return first;
  std::vector<float> x, sorted;
  for (float logit : logits) x.push_back((logit - logits[first]) / settings.temperature);
  sorted = x;
  std::sort(sorted.rbegin(), sorted.rend());
  const float kth = settings.top_k > 0 ? sorted[std::min<int64_t>(settings.top_k, x.size()) - 1] : -INF;
  double total = 0, preceding = 0;
  const auto weight = [&](float value) {
    const double all = std::exp((double)value);
    return value >= kth && all >= settings.min_p ? all : 0;
  };
  for (float value : sorted) total += weight(value);
  float cut = 0;
  for (float value : sorted) {
    if (!(preceding < settings.top_p * total) && settings.top_p < 1) break;
    if (weight(value) > 0) cut = value;
    preceding += weight(value);
  }
  int64_t token = first;
  float best = -INF;
  for (size_t i = 0; i < x.size(); i++) {
    const float noised = x[i] + gumbel(mixed(key ^ (i + 1)));
    if (x[i] < cut || noised <= best) continue;
    best = noised;
    token = i;
  }
  return token;
}

// Rows of few different logits, so that ties stand at the cuts.
void check_sampling(const Settings& settings, int64_t vocab, int values) {
  const int64_t rows = 20, stride = vocab + 3;
  std::vector<float> logits(rows * stride, NAN), bias(rows * stride, NAN);
  std::vector<int32_t> generated(rows * stride, 1000);
  std::vector<uint8_t> in_prompt(rows * stride, 1), adjusted(rows, settings.adjusted);
  const std::vector<float> temperature(rows, settings.temperature), top_p(rows, settings.top_p), min_p(rows, settings.min_p);
  const std::vector<float> repetition(rows, 1.3f), presence(rows, 0.4f), frequency(rows, 0.3f);
  const std::vector<int64_t> top_k(rows, settings.top_k);
  std::vector<int64_t> seed(rows), choice(rows), batch_rows(rows), positions(rows), tokens(rows), ids(rows * 3);
  std::vector<float> totals(rows), logprobs(rows * 3);
  for (int64_t r = 0; r < rows; r++) {
    seed[r] = (int64_t)generator() << 20;
    choice[r] = below(9);
    positions[r] = below(2000);
    batch_rows[r] = rows - 1 - r;
    for (int64_t i = r * stride; i < r * stride + vocab; i++) {
      logits[i] = below(values) * 8.0f / values - 5;
      if (i % 5 == 0 && vocab > 1) logits[i] = -INF;
      generated[i] = below(4) ? 0 : below(4);
      in_prompt[i] = below(5) == 0;
      bias[i] = below(3) ? 0 : below(8) * 0.5f - 2;
    }
    logits[r * stride + vocab - 1] = 1;
  }
  const SamplingArgs state{temperature.data(), top_k.data(), top_p.data(), min_p.data(), repetition.data(), presence.data(),
                           frequency.data(), adjusted.data(), seed.data(), choice.data(), bias.data(), generated.data(),
                           in_prompt.data(), stride, stride, stride};
  settle(sample(logits.data(), stride, rows, vocab, state, batch_rows.data(), positions.data(), tokens.data(), THREADS));
  const int64_t count = std::min<int64_t>(3, vocab);
  settle(top_logprobs(logits.data(), stride, rows, vocab, count, totals.data(), ids.data(), logprobs.data(), THREADS));
  for (int64_t r = 0; r < rows; r++) {
    const int64_t own = batch_rows[r];
    const std::vector<float> given(&logits[r * stride], &logits[r * stride + vocab]);
    std::vector<float> x = given;
    double total = 0;
    for (int64_t i = 0; i < vocab; i++) {
      total += std::exp((double)x[i]);
      if (!settings.adjusted) continue;
      const int64_t place = own * stride + i;
      // Products are rounded by themselves.
      const volatile float damped = x[i] > 0 ? x[i] / 1.3f : x[i] * 1.3f, product = 0.3f * generated[place];
      if (generated[place] || in_prompt[place]) x[i] = damped;
      x[i] = x[i] - product - (generated[place] ? 0.4f : 0.0f) + bias[place];
    }
    const uint64_t key = mixed(mixed(mixed(seed[own]) ^ choice[own]) ^ positions[r]);
    expect("a sampled token", r, tokens[r], plain_sample(x, settings, key), 0);
    expect("a sum of e^x", r, totals[r], std::log(total), 1e-6);
    const int64_t first = std::max_element(given.begin(), given.end()) - given.begin();
    expect("the likeliest token", r, ids[r * count], first, 0);
    expect("its logprob", r, logprobs[r * count], given[first] - std::log(total), 1e-6);
  }
}

void check_noise() {
  const uint64_t key = mixed(mixed(mixed(-5) ^ 3) ^ 77);  // kernels.noise has these numbers
  expect("row_keys", 0, key == 4349820492936620738, 1, 0);
  expect("gumbel", 0, gumbel(mixed(key ^ 1)), 1.1992, 1e-4);
  expect("gumbel", 50256, gumbel(mixed(key ^ 50257)), 0.2417, 1e-4);
}

void check_all() {
  check_noise();
  for (int64_t vocab : {1, 15, 64, 65, 1100})
    for (int values : {3, 40, 1 << 20})
      for (int adjusted : {0, 1}) {
        check_sampling({0, 7, 0.5f, 0.1f, adjusted}, vocab, values);
        check_sampling({1.5f, 0, 1, 0, adjusted}, vocab, values);
        check_sampling({1.5f, 0, 0.8f, 0, adjusted}, vocab, values);
        check_sampling({1.5f, 9, 1, 0, adjusted}, vocab, values);
        check_sampling({2, 200, 0.7f, 0.05f, adjusted}, vocab, values);
      }
  for (int64_t batch : {1, 3, 8, 19}) check_decode(batch);
  check_prefill();
  for (int64_t rows : {1, 5})
    for (bool adds : {false, true})
      for (bool affine : {false, true}) check_norm(rows, 96, adds, affine);
  for (int64_t rows : {1, 8, 9, 16, 17, 40, 70}) {
    check_int8(rows, 70, 45, GELU_NEW, true);
    check_int8(rows, 64, 64, rows % 2 ? GELU : NONE, false);
    if (IS_BFLOAT16) check_bf16(rows, 96, 45, rows % 2 ? RELU : GELU_NEW);
  }
}

}  // namespace

int main() {
#ifndef __SANITIZE_THREAD__  // it does not see what OpenMP's barriers order
  check_all();
#endif
  use_helpers();
  check_all();
  if (failures) std::printf("%d differences\n", failures);
  return failures != 0;
}
