// Several products at once on all threads, each with the function that comes behind it.
#pragma once

#include <cmath>

#include "many.h"
#include "parallel.h"
#include "products.h"

namespace rwkv_lab {

enum Activation { NONE, TANH, SIGMOID, SILU, SQUARED_RELU };

// e^x of n numbers, in place.
inline void exponentials_of(float *x, int n) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) store(x + i, exponential(load(x + i)));
    if (i < n) {
        float part[LANES] = {};
        memcpy(part, x + i, size_t(n - i) * sizeof(float));
        store(part, exponential(load(part)));
        memcpy(x + i, part, size_t(n - i) * sizeof(float));
    }
}

inline void sigmoids(float *x, int n) {
    for (int i = 0; i < n; i++) x[i] = -x[i];
    exponentials_of(x, n);
    for (int i = 0; i < n; i++) x[i] = 1 / (1 + x[i]);
}

inline void activate(float *x, int n, Activation f) {
    if (f == NONE) return;
    if (f == TANH)
        for (int i = 0; i < n; i++) x[i] = std::tanh(x[i]);
    else if (f == SIGMOID)
        sigmoids(x, n);
    else if (f == SILU) {
        for (int i = 0; i < n; i++) x[i] = x[i] / (1 + std::exp(-x[i]));
    } else
        for (int i = 0; i < n; i++) x[i] = x[i] <= 0 ? 0 : x[i] * x[i];  // NaN stays NaN
}

// What one product needs: out is where the model's numbers go on, or `result` where they leave it in its own dtype.
struct Job {
    const Tensor *weight;
    Rows x, out;
    Activation then = NONE;
    void *result = nullptr;  // [B,outputs]
    int dtype = FLOAT32;     // of `result`
};

// Calls task(i) for every i in 0 .. n-1. Each thread has a stretch of its own and goes through it in order, since memory is
// fastest read in long runs; whoever is done helps the others, so that no one waits for a thread whose core is busy.
template <class Task>
void in_stretches(int n, int threads, Task &&task) {
    constexpr int MOST = 64;
    struct alignas(64) Next {
        std::atomic<int> at;
    };
    threads = std::clamp(threads, 1, std::min(std::max(n, 1), MOST));
    Next next[MOST];
    for (int t = 0; t < threads; t++) next[t].at.store(int(int64_t(n) * t / threads), std::memory_order_relaxed);
    parallel_for(threads, threads, [&](int mine) {
        FlushToZero flush;
        for (int turn = 0; turn < threads; turn++) {
            const int t = (mine + turn) % threads, end = int(int64_t(n) * (t + 1) / threads);
            for (int i; (i = next[t].at.fetch_add(1, std::memory_order_relaxed)) < end;) task(i);
        }
    });
}

constexpr int MOST_JOBS = 8;  // at once

// The inputs of jobs packed for `product_of_many`; the calling thread keeps the memory. None for the transposed ones, and
// where there are few tokens.
inline void pack_inputs(const Job *jobs, int count, int64_t B, PackedRows *packed) {
    if (B < FEWEST) return;
    thread_local std::unique_ptr<Buffer> scratch;
    thread_local int64_t size = 0;
    int64_t needed = 0, at = 0;
    for (int i = 0; i < count; i++) needed += jobs[i].weight->transposed ? 0 : packed_size(*jobs[i].weight, jobs[i].x, B);
    if (size < needed) scratch = std::make_unique<Buffer>(size_t(size = needed));
    for (int i = 0; i < count; i++) {
        if (jobs[i].weight->transposed) continue;
        packed[i] = pack(*jobs[i].weight, jobs[i].x, B, scratch->get() + at);
        at += packed_size(*jobs[i].weight, jobs[i].x, B);
    }
}

// All jobs at once, cut into runs of outputs that take some microseconds each.
inline void run_jobs(const Job *jobs, int count, int64_t B, int threads) {
    constexpr int64_t BYTES = 1 << 15;
    PackedRows packed[MOST_JOBS];
    pack_inputs(jobs, count, B, packed);
    int run[MOST_JOBS], last[MOST_JOBS], total = 0;
    for (int i = 0; i < count; i++) {
        const Tensor &w = *jobs[i].weight;
        const int64_t rows = std::max<int64_t>(BYTES / w.row_bytes(), 1);
        run[i] = w.transposed ? 64 : packed[i].at ? 4 * TOGETHER : (int(std::min<int64_t>(rows, 256)) + 15) / 16 * 16;
        last[i] = total += (w.outputs() + run[i] - 1) / run[i];
    }
    in_stretches(total, threads, [&](int task) {
        int i = 0;
        while (task >= last[i]) i++;
        const Job &job = jobs[i];
        const Tensor &w = *job.weight;
        const int first = (task - (i ? last[i - 1] : 0)) * run[i], n = std::min(run[i], w.outputs() - first);
        float *out = job.result ? workspace(size_t(B) * n + LANES) : job.out.at + first;
        const int64_t stride = job.result ? n : job.out.stride;
        if (packed[i].at)
            product_of_many(w, first, first + n, packed[i], B, out, stride);
        else
            product(w, first, first + n, job.x, 0, B, out, stride);
        for (int64_t b = 0; b < B; b++) {
            activate(out + b * stride, n, job.then);
            if (job.result) store_row({job.result, job.dtype}, b * w.outputs() + first, out + b * stride, n);
            if (job.out.half) store_row({job.out.half, BFLOAT16}, b * stride + first, out + b * stride, n);
        }
    });
}

template <int N>
void run_jobs(const Job (&jobs)[N], int64_t B, int threads) {
    static_assert(N <= MOST_JOBS);
    run_jobs(jobs, N, B, threads);
}

}  // namespace rwkv_lab
