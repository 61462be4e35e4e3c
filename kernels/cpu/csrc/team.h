// Threads that share the work of a call. None of them waits for another that lacks a core.
//
// A call is a program of phases; a phase is a number of pieces, in any order. Every thread runs the whole program: it
// takes pieces of a phase until none is left, goes on when all are done, and passes over phases that are done when it
// comes. A piece is computed in memory of the thread's own. Then it is claimed, which succeeds once, and written. So
// a piece whose thread was put aside is computed again by one that has nothing left to do: it costs a piece, not the
// step. A helper that comes late, or never, costs nothing.
#pragma once

#include <omp.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace {

typedef std::chrono::steady_clock Clock;
typedef std::chrono::nanoseconds Nanoseconds;

// How long a helper without work, a thread whose phase is not done, and a caller whose helpers are still inside keep their
// cores.
constexpr Nanoseconds SPIN{500'000}, PATIENCE{20'000}, LEAVE{3'000};

// Waits for `done` without giving the core up. Returns whether it came true in time.
template <class Condition>
bool spin(Nanoseconds limit, const Condition& done) {
  for (const auto end = Clock::now() + limit; Clock::now() < end;)
    for (int i = 0; i < 8; i++) {
      if (done()) return true;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
  return done();
}

// The right to write what a piece has computed. Asked for once, after computing; true for one thread only.
class Claim {
 public:
  explicit Claim(std::atomic<bool>* taken) : taken(taken) {}
  bool operator()() { return mine = !taken || !taken->exchange(true, std::memory_order_relaxed); }
  bool is_mine() const { return mine; }

 private:
  std::atomic<bool>* const taken;  // null where nobody else is
  bool mine = false;
};

class Worker;
typedef std::function<void(Worker&)> Program;  // without effects but in `share`, and with copies of its arguments

struct Job {
  struct alignas(64) Part {  // of a phase, a thread's: a cache line
    std::atomic<int64_t> taken{0}, done{0};  // pieces taken of this part by any thread; pieces done by this thread
  };
  const Program program;
  const int threads;
  int64_t number = 0, num_phases = 0, num_pieces = 0;
  std::vector<Part> parts;  // (phases, threads)
  std::vector<std::atomic<bool>> claimed;  // of all phases' pieces

  Job(Program program, int threads) : program(std::move(program)), threads(threads) {}
};

// A thread on its way through a program.
class Worker {
 public:
  explicit Worker(Job& job, int id) : job(&job), id(id) {}

  static void alone(const Program& program) {
    Worker worker;
    program(worker);
  }

  // Counts the phases and pieces of a job.
  static void count(Job& job) {
    Worker worker(job, COUNTS);
    job.program(worker);
    job.num_phases = worker.num_phases, job.num_pieces = worker.num_pieces;
  }

  // A phase of `count` pieces. body(piece, claim) computes one, and writes it only if claim() says so. It may also see
  // numbers that later phases have begun to overwrite: then claim() says no. Returns when all pieces are written.
  template <class Body>
  void share(int64_t count, const Body& body) {
    if (!job) {
      Claim claim(nullptr);
      for (int64_t piece = 0; piece < count; piece++) body(piece, claim);
      return;
    }
    const int threads = job->threads;
    const int64_t phase = num_phases++, first = num_pieces;
    num_pieces += count;
    if (id == COUNTS) return;
    Job::Part* const parts = job->parts.data() + phase * threads;
    std::atomic<bool>* const claimed = job->claimed.data() + first;
    const auto all_done = [&] {
      int64_t rest = count;
      for (int t = 0; t < threads; t++) rest -= parts[t].done.load(std::memory_order_acquire);
      return rest == 0;
    };
    const auto work = [&](int64_t piece) {
      Claim claim(claimed + piece);
#ifdef LATE_HELPERS  // for tests: as if they were put aside often
      if (id && rand() % 4 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(3));
#endif
      body(piece, claim);
      std::atomic<int64_t>& done = parts[id].done;
      if (claim.is_mine()) done.store(done.load(std::memory_order_relaxed) + 1, std::memory_order_release);
    };
    if (all_done()) return;
    // First this thread's own part from front to back, the order in which memory is read fastest. Then the others'.
    const auto begin = Clock::now();
    int64_t own = 0;
    for (int t = 0; t < threads; t++) {
      const int of = (id + t) % threads;
      const int64_t start = count * of / threads, end = count * (of + 1) / threads;
      std::atomic<int64_t>& taken = parts[of].taken;
      for (int64_t piece; (piece = start + taken.fetch_add(1, std::memory_order_relaxed)) < end; own++) work(piece);
    }
    if (all_done()) return;
    const Nanoseconds mean = own ? (Clock::now() - begin) / own : 2 * PATIENCE;
    if (spin(PATIENCE + 2 * mean, all_done)) return;
    for (int64_t i = 0; i < count && !all_done(); i++) {
      const int64_t piece = (count * id / threads + i) % count;
      if (!claimed[piece].load(std::memory_order_relaxed)) work(piece);
    }
    while (!all_done()) std::this_thread::yield();  // one was put aside while it wrote, or there is only one core
  }

 private:
  static constexpr int COUNTS = -1;
  Worker() = default;

  Job* const job = nullptr;
  const int id = 0;
  int64_t num_phases = 0, num_pieces = 0;  // that lie behind it
};

// The caller of `run` and its helpers, which live as long as the process.
class Team {
 public:
  // Runs a program. Helpers that were put aside may read its arguments for longer: until `oldest` exceeds the number
  // returned. It is 0 if there are none.
  int64_t run(int threads, Program program) {
    std::unique_lock<std::mutex> only(busy, std::defer_lock);
    if (threads < 2 || (uses_helpers && !only.try_lock())) return Worker::alone(program), 0;
    auto owned = std::make_unique<Job>(std::move(program), threads);
    Job& job = *owned;
    Worker::count(job);
    if (job.num_pieces <= job.num_phases) return Worker::alone(job.program), 0;
    job.parts = std::vector<Job::Part>(job.num_phases * threads);
    job.claimed = std::vector<std::atomic<bool>>(job.num_pieces);
    if (!uses_helpers) {
#pragma omp parallel num_threads(threads)
      {
        Worker worker(job, omp_get_thread_num());
        job.program(worker);
      }
      return 0;
    }
    while ((int)helpers.size() < threads - 1) hire();
    job.number = number + 1;
    jobs.push_back(std::move(owned));
    number = job.number;
    open = &job;
    if (num_asleep) {
      { const std::lock_guard<std::mutex> lock(mutex); }  // who is about to sleep does so, or has seen it
      posted.notify_all();
    }
    Worker worker(job, 0);
    job.program(worker);
    open = nullptr;
    const int64_t last = job.number;
    spin(LEAVE, [&] { return oldest() > last; });  // one that has a core leaves at once
    while (!jobs.empty() && jobs.front()->number < oldest()) jobs.pop_front();
    return jobs.empty() ? 0 : last;
  }

  // The number of the oldest job that a helper is in.
  int64_t oldest() {
    const std::lock_guard<std::mutex> lock(mutex);
    int64_t least = INT64_MAX;
    for (const Helper& helper : helpers)
      if (const int64_t inside = helper.inside) least = std::min(least, inside);
    return least;
  }

  // Whether helpers of our own work, and not OpenMP's. Those are also oneDNN's: where it multiplies between our calls,
  // they are awake, and two kinds of threads would take turns on the cores.
  bool uses_helpers = false;

 private:
  struct alignas(64) Helper {
    std::atomic<int64_t> inside{0};  // the number of its job, or 0
  };

  void hire() {
    const std::lock_guard<std::mutex> lock(mutex);
    Helper& helper = helpers.emplace_back();
    try {
      std::thread([this, &helper, id = (int)helpers.size()] { help(helper, id); }).detach();
    } catch (const std::system_error&) {  // there may be no more threads: the others do its part
    }
  }

  void help(Helper& helper, int id) {
#ifdef __linux__
    pthread_setname_np(pthread_self(), "banded-helper");
#endif
    for (int64_t seen = 0;;) {
      const auto is_new = [&] { return number != seen && open; };
      if (!spin(SPIN, is_new)) {
        std::unique_lock<std::mutex> lock(mutex);
        num_asleep++;
        posted.wait(lock, is_new);
        num_asleep--;
      }
      // A job lasts as long as its number stands here, if it was still open then.
      const int64_t latest = number;
      helper.inside = latest;
      Job* const job = open;
      if (job && number == latest) {
        seen = latest;
        if (id < job->threads) {
          Worker worker(*job, id);
          job->program(worker);
        }
      }
      helper.inside = 0;
    }
  }

  std::mutex busy, mutex;  // held by the caller; by who changes or reads `helpers`, and who falls asleep
  std::condition_variable posted;
  std::deque<Helper> helpers;
  std::deque<std::unique_ptr<Job>> jobs;  // the last one, and those that helpers may be in
  std::atomic<int64_t> number{0};         // of the last job, set ahead of `open`
  std::atomic<Job*> open{nullptr};        // that helpers may join
  std::atomic<int> num_asleep{0};
};

Team& team() {
  static Team& one = *new Team;  // never destroyed: helpers may outlive static variables
  return one;
}

// Memory of this thread's own, for a piece.
template <class T>
T* room(int64_t count) {
  static thread_local std::vector<T> some;
  if ((int64_t)some.size() < count) some.resize(count);
  return some.data();
}

}  // namespace
