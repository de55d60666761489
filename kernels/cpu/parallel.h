// A team of threads of our own, for work of 10 microseconds and more.
//
// Not OpenMP: torch brings its own libgomp, whose threads spin for milliseconds after each job; a second runtime beside
// it would fight with the first for the same cores. Here a worker that has nothing to do spins for some microseconds and
// then sleeps on a futex. The caller never waits for a worker that has not begun: where a core is busy with something
// else, the caller does all tasks itself and only their sum of time is lost.
//
// g++ gives the one `team()` below to all libraries of a process that include this header.
#pragma once

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <system_error>
#include <thread>

namespace rwkv_lab {

// Waits until `done()` is true or some microseconds are over; returns done().
template <class Done>
inline bool spin_until(Done done, int microseconds) {
    auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(microseconds);
    do {
        for (int i = 0; i < 16; i++) {
            if (done()) return true;
#if defined(__x86_64__) || defined(__i386__)
            __builtin_ia32_pause();
#elif defined(__aarch64__)
            asm volatile("yield");
#endif
        }
    } while (std::chrono::steady_clock::now() < end);
    return done();
}

class Team {
public:
    using Function = void (*)(void *context, int task);

    static Team &instance() {
        static Team *team = [] {
            auto *made = new Team;  // never destroyed: its workers sleep on it until the process ends
            pthread_atfork(nullptr, nullptr, [] { instance().after_fork(); });
            return made;
        }();
        return *team;
    }

    // Calls function(context, i) once for every i in 0 .. n_tasks-1, on up to n_threads threads, the caller's included.
    // Not inlined: every kind of task would be compiled with a copy.
    __attribute__((noinline)) void run(int n_tasks, int n_threads, Function function, void *context) {
        n_threads = std::min({n_threads, n_tasks, max_threads});
        // One job at a time. Whoever comes second (another Python thread, or a task of a task) works alone.
        if (n_threads <= 1 || busy_.exchange(true, std::memory_order_acquire)) {
            for (int i = 0; i < n_tasks; i++) function(context, i);
            return;
        }
        n_threads = std::min(n_threads, 1 + hire(n_threads - 1));
        const uint32_t job = job_.load(std::memory_order_relaxed) + 1;
        // From here on no claim succeeds: a worker that is late with the job before may have read its ticket, and would
        // find a task for it once n_tasks_ is the new one.
        ticket_.store(uint64_t(job) << 32 | UINT32_MAX, std::memory_order_release);
        function_.store(function, std::memory_order_release);
        context_.store(context, std::memory_order_release);
        n_tasks_.store(n_tasks, std::memory_order_release);
        n_workers_.store(n_threads - 1, std::memory_order_release);
        unfinished_.store(n_tasks, std::memory_order_release);
        ticket_.store(uint64_t(job) << 32, std::memory_order_release);  // from here on tasks can be claimed
        job_.store(job, std::memory_order_release);
        job_.notify_all();
        work(job);
        auto finished = [this] { return unfinished_.load(std::memory_order_acquire) == 0; };
        if (!spin_until(finished, spin_for))
            for (int left; (left = unfinished_.load(std::memory_order_acquire)) != 0;) unfinished_.wait(left);
        busy_.store(false, std::memory_order_release);
    }

private:
    static constexpr int max_threads = 256;
    static constexpr int spin_for = 20;  // microseconds: longer than a futex takes to wake a thread, no more

    // Claims tasks of a job until none is left. The ticket holds the job's number and its next task; it changes with
    // every claim, so a claim that succeeds proves that what was read about the job before it still held. A worker that
    // comes late finds another number or no task, and leaves.
    void work(uint32_t job) {
        int done = 0;
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        while (uint32_t(ticket >> 32) == job) {
            int task = int(uint32_t(ticket));
            Function function = function_.load(std::memory_order_acquire);
            void *context = context_.load(std::memory_order_acquire);
            if (task >= n_tasks_.load(std::memory_order_acquire)) break;
            if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
            function(context, task);
            done++;
            ticket = ticket_.load(std::memory_order_acquire);
        }
        if (done && unfinished_.fetch_sub(done, std::memory_order_acq_rel) == done) unfinished_.notify_one();
    }

    // Makes sure that there are `wanted` workers if the system gives them; returns how many there are.
    int hire(int wanted) {
        sigset_t all, before;
        if (hired_ < wanted) {
            sigfillset(&all);  // signals are for Python's threads
            pthread_sigmask(SIG_SETMASK, &all, &before);
            try {
                while (hired_ < wanted) {
                    std::thread([this, index = hired_, seen = job_.load()] { live(index, seen); }).detach();
                    hired_++;
                }
            } catch (const std::system_error &) {
            }
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
        }
        return hired_;
    }

    void live(int index, uint32_t seen) {
        for (;;) {
            auto called = [this, seen] { return job_.load(std::memory_order_acquire) != seen; };
            if (!spin_until(called, spin_for)) job_.wait(seen, std::memory_order_acquire);
            seen = job_.load(std::memory_order_acquire);
            if (index < n_workers_.load(std::memory_order_acquire)) work(seen);
        }
    }

    void after_fork() {  // in the child: the workers are gone, and so is the thread that was using them
        hired_ = 0;
        busy_.store(false);
    }

    std::atomic<bool> busy_{false};
    int hired_ = 0;  // touched by the thread that has set busy_
    std::atomic<Function> function_{nullptr};
    std::atomic<void *> context_{nullptr};
    std::atomic<int> n_tasks_{0}, n_workers_{0};
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<uint32_t> job_{0};
    alignas(64) std::atomic<int> unfinished_{0};
};

// Calls task(i) once for every i in 0 .. n_tasks-1 on up to n_threads threads, in any order; returns when all are done.
// Threads take one task at a time, so tasks may differ in length. A task must not throw.
template <class Task>
inline void parallel_for(int n_tasks, int n_threads, Task &&task) {
    using T = std::remove_reference_t<Task>;
    Team::instance().run(
        n_tasks, n_threads, [](void *context, int i) { (*static_cast<T *>(context))(i); },
        const_cast<std::remove_const_t<T> *>(&task));
}

// The same for a range 0 .. size-1, cut into runs: calls task(begin, end) with runs of about `grain` elements or more.
template <class Task>
inline void parallel_ranges(int64_t size, int64_t grain, int n_threads, Task &&task) {
    int64_t pieces = std::clamp<int64_t>(size / std::max<int64_t>(grain, 1), 1, 4 * int64_t(std::max(n_threads, 1)));
    parallel_for(int(pieces), n_threads, [&](int i) { task(size * i / pieces, size * (i + 1) / pieces); });
}

}  // namespace rwkv_lab
