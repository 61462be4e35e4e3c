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
#include <functional>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace {

typedef std::chrono::steady_clock Clock;
typedef std::chrono::nanoseconds Nanoseconds;

// How long a helper without work, and a thread whose phase is not done, keep their cores.
constexpr Nanoseconds SPIN{50'000}, PATIENCE{20'000};

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
  int64_t run(int threads, const Program& program) {
    std::unique_lock<std::mutex> only(busy, std::defer_lock);
    if (threads < 2 || (uses_helpers && !only.try_lock())) return Worker::alone(program), 0;
    const auto job = std::make_shared<Job>(program, threads);
    Worker::count(*job);
    if (job->num_pieces <= job->num_phases) return Worker::alone(program), 0;
    job->parts = std::vector<Job::Part>(job->num_phases * threads);
    job->claimed = std::vector<std::atomic<bool>>(job->num_pieces);
    if (!uses_helpers) {
#pragma omp parallel num_threads(threads)
      {
        Worker worker(*job, omp_get_thread_num());
        program(worker);
      }
      return 0;
    }
    {
      const std::lock_guard<std::mutex> lock(mutex);
      while ((int)inside.size() < threads) hire();
      job->number = number.load(std::memory_order_relaxed) + 1;
      open = job;
      number.store(job->number, std::memory_order_release);
    }
    posted.notify_all();
    Worker worker(*job, 0);
    program(worker);
    const std::lock_guard<std::mutex> lock(mutex);
    open = nullptr;
    for (const int64_t of : inside)
      if (of == job->number) return of;
    return 0;
  }

  // The number of the oldest job that a helper is in.
  int64_t oldest() {
    const std::lock_guard<std::mutex> lock(mutex);
    int64_t least = INT64_MAX;
    for (const int64_t of : inside)
      if (of) least = std::min(least, of);
    return least;
  }

  // Whether helpers of our own work, and not OpenMP's. Those are also oneDNN's: where it multiplies between our calls,
  // they are awake, and two kinds of threads would take turns on the cores.
  bool uses_helpers = false;

 private:
  void hire() {
    const int id = inside.size();
    inside.push_back(0);
    try {
      std::thread([this, id] { help(id); }).detach();
    } catch (const std::system_error&) {  // there may be no more threads: the others do its part
    }
  }

  void help(int id) {
#ifdef __linux__
    pthread_setname_np(pthread_self(), "banded-helper");
#endif
    std::shared_ptr<Job> job;
    for (int64_t seen = 0;;) {
      spin(SPIN, [&] { return number.load(std::memory_order_acquire) != seen; });
      {
        std::unique_lock<std::mutex> lock(mutex);
        posted.wait(lock, [&] { return open && open->number != seen && id < open->threads; });
        job = open, seen = inside[id] = job->number;
      }
      Worker worker(*job, id);
      job->program(worker);
      const std::lock_guard<std::mutex> lock(mutex);
      inside[id] = 0;
      job = nullptr;
    }
  }

  std::mutex busy, mutex;
  std::condition_variable posted;
  std::shared_ptr<Job> open;       // that helpers may join
  std::atomic<int64_t> number{0};  // of jobs posted so far
  std::vector<int64_t> inside{0};  // the number of the job that each thread is in, or 0; the caller's is unused
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
