// The threads of torch's own OpenMP, for kernels that run between torch's operators.
//
// torch's workers spin for milliseconds after each of its operators, waiting for the next. Threads of our own would have
// to share the cores with them just then; so such a kernel takes the very threads that are waiting. The OpenMP library is
// not linked (torch brings its own copy, and a second one would bring threads of its own): whoever loads this library
// hands over the address of its `GOMP_parallel`. Until then `parallel.h` does the work.
#pragma once

#include "parallel.h"

namespace {
using GompParallel = void (*)(void (*function)(void *), void *data, unsigned threads, unsigned flags);
std::atomic<GompParallel> gomp_parallel{nullptr};
}  // namespace

extern "C" void use_openmp(void *address) { gomp_parallel = reinterpret_cast<GompParallel>(address); }

namespace rwkv_lab {

// As `parallel_for`, on torch's threads.
template <class Task>
inline void parallel_with_torch(int n_tasks, int n_threads, Task &&task) {
    GompParallel run = gomp_parallel.load(std::memory_order_relaxed);
    n_threads = std::min(n_threads, n_tasks);
    if (run == nullptr || n_threads <= 1) return parallel_for(n_tasks, n_threads, task);
    struct Job {
        std::remove_reference_t<Task> &task;
        int n_tasks;
        std::atomic<int> next{0};
    } job{task, n_tasks};
    auto work = [](void *data) {
        Job &job = *static_cast<Job *>(data);
        for (int i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.n_tasks;) job.task(i);
    };
    run(work, &job, unsigned(n_threads), 0);  // returns when all threads have
}

}  // namespace rwkv_lab
