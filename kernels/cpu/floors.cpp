// What the machine can do at most: the floors that measured rates are held against.
#include <cstring>
#include <vector>

#include "parallel.h"

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef long long Words __attribute__((vector_size(64)));

double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Multiply-adds on registers alone, in as many chains as hide their latency.
float multiply_add(int64_t rounds) {
    constexpr int CHAINS = 12;
    Vec x[CHAINS], scale, offset;
    for (int i = 0; i < CHAINS; i++) x[i] = Vec{} + float(i);
    scale = Vec{} + 0.999f;
    offset = Vec{} + 0.001f;
    for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) x[i] = x[i] * scale + offset;
    }
    Vec sum = x[0];  // of whole vectors: reading single lanes out of the array would keep all of it in memory
#pragma GCC unroll 12
    for (int i = 1; i < CHAINS; i++) sum += x[i];
    return sum[0];
}

}  // namespace

// GFLOP/s in float32, a multiply-add counted as two, on `threads` threads for about `seconds`.
extern "C" double fma_gflops(int threads, double seconds) {
    constexpr int64_t ROUNDS = 1 << 16;
    constexpr double FLOPS = double(ROUNDS) * 12 * LANES * 2;
    std::atomic<int64_t> batches{0};
    std::atomic<float> sink{0};
    auto start = std::chrono::steady_clock::now();
    rwkv_lab::parallel_for(threads, threads, [&](int) {
        int64_t mine = 0;
        float sum = 0;
        while (seconds_since(start) < seconds) sum += multiply_add(ROUNDS), mine++;
        batches += mine;
        sink = sum;
    });
    return double(batches.load()) * FLOPS / seconds_since(start) * 1e-9;
}

// GB/s of reading `bytes` from memory on `threads` threads: the median of `repeats` passes.
extern "C" double read_gbps(int threads, int64_t bytes, int repeats) {
    int64_t words = bytes / int64_t(sizeof(Words));
    auto *data = static_cast<Words *>(aligned_alloc(64, size_t(words) * sizeof(Words)));
    if (data == nullptr) return 0;
    memset(data, 1, size_t(words) * sizeof(Words));
    std::vector<double> rates;
    std::atomic<long long> sink{0};
    for (int i = 0; i < repeats; i++) {
        auto start = std::chrono::steady_clock::now();
        rwkv_lab::parallel_ranges(words, 1 << 14, threads, [&](int64_t begin, int64_t end) {
            Words sums[4] = {};
            int64_t at = begin;
            for (; at + 4 <= end; at += 4)
                for (int j = 0; j < 4; j++) sums[j] += data[at + j];
            for (; at < end; at++) sums[0] += data[at];
            Words sum = sums[0] + sums[1] + sums[2] + sums[3];
            sink += sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
        });
        rates.push_back(double(words) * double(sizeof(Words)) / seconds_since(start) * 1e-9);
    }
    free(data);
    std::sort(rates.begin(), rates.end());
    return rates[rates.size() / 2];
}
