// Threads that share a program: its results, and what threads that are put aside cost. Prints what is wrong, and exits
// with 1 if anything is.

#include "team.h"

#include <algorithm>
#include <cstdio>
#include <random>

namespace {

constexpr int64_t PIECES = 37, PHASES = 25;
constexpr std::chrono::seconds TOO_LONG{20};

typedef std::vector<std::vector<int64_t>> Numbers;  // of each phase, a number for each piece

int failures = 0;

void expect(bool fact, const char* what) {
  if (fact) return;
  std::printf("not so: %s\n", what);
  failures++;
}

// Every piece depends on two of the phase before.
int64_t number(const Numbers& numbers, int64_t phase, int64_t piece) {
  if (phase == 0) return piece + 1;
  const std::vector<int64_t>& before = numbers[phase - 1];
  return (31 * before[piece] + before[(7 * piece + 3) % PIECES]) % 1'000'003;
}

Numbers zeros() { return Numbers(PHASES, std::vector<int64_t>(PIECES)); }

Numbers one_by_one() {
  Numbers numbers = zeros();
  for (int64_t phase = 0; phase < PHASES; phase++)
    for (int64_t piece = 0; piece < PIECES; piece++) numbers[phase][piece] = number(numbers, phase, piece);
  return numbers;
}

// The same, shared. delay(phase) is called by whoever computes a piece, ahead of claiming it.
template <class Delay>
Program fill(Numbers& numbers, Delay delay) {
  return [&numbers, delay](Worker& worker) {
    for (int64_t phase = 0; phase < PHASES; phase++)
      worker.share(PIECES, [&](int64_t piece, Claim& claim) {
        const int64_t computed = number(numbers, phase, piece);
        delay(phase);
        if (claim()) numbers[phase][piece] += computed;  // twice would show
      });
  };
}

void settle() {
  while (team().oldest() != INT64_MAX) std::this_thread::yield();
}

void check_results() {
  const Numbers wanted = one_by_one();
  std::mt19937 generator(1);
  for (int i = 0; i < 60; i++) {
    Numbers numbers = zeros();
    team().run(1 + generator() % 5, fill(numbers, [](int64_t) {}));
    expect(numbers == wanted, "a shared program has the results of one thread");
    settle();
  }
}

void check_callers_at_once() {
  const Numbers wanted = one_by_one();
  Numbers numbers[3] = {zeros(), zeros(), zeros()};
  std::vector<std::thread> callers;
  for (Numbers& some : numbers)
    callers.emplace_back([&] { team().run(3, fill(some, [](int64_t) { std::this_thread::yield(); })); });
  for (std::thread& caller : callers) caller.join();
  settle();
  for (const Numbers& some : numbers) expect(some == wanted, "callers at once get their own results");
}

// One of the two threads is put aside once it has computed a piece of the fifth phase: the helper until the call has
// returned, the caller until the helper has come to the last phase. If a thread waits for it, it is too long.
void check_put_aside(bool helper) {
  const Numbers wanted = one_by_one();
  const std::thread::id caller = std::this_thread::get_id();
  Numbers numbers = zeros();
  std::atomic<bool> aside{false}, back{false}, too_long{false}, returned{false};
  std::atomic<int64_t> last_phase{0};  // that the other thread came to
  const int64_t job = team().run(2, fill(numbers, [&, helper, caller](int64_t phase) {
    std::this_thread::sleep_for(std::chrono::microseconds(50));  // so that both come to the fifth phase
    if ((std::this_thread::get_id() == caller) == helper) {
      last_phase = phase;
    } else if (phase == 5 && !aside) {
      aside = true;
      for (const auto end = Clock::now() + TOO_LONG; helper ? !returned : last_phase != PHASES - 1;) {
        if (Clock::now() > end) too_long = true, returned = true, last_phase = PHASES - 1;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      back = true;
    }
  }));
  expect(aside, "a thread was put aside");
  expect(numbers == wanted, "the results are those of one thread");
  if (helper) expect(job != 0 && team().oldest() == job, "it is known that a helper is in a job that has ended");
  returned = true;
  settle();
  expect(!too_long, "nobody waits for a thread that was put aside");
  expect(back && numbers == wanted, "one that comes late changes nothing");
}

}  // namespace

int main() {
#ifndef __SANITIZE_THREAD__  // it does not see what OpenMP's barriers order
  check_results();
#endif
  team().uses_helpers = true;
  check_results();
  check_callers_at_once();
  check_put_aside(true);
  check_put_aside(false);
  return failures != 0;
}
