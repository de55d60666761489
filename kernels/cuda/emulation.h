// Lets a host compiler build the device code of this folder unchanged and run it on the CPU, to check it where there is
// no GPU. Blocks run in turn; the threads of a block are real threads that meet at barriers, so that a thread sanitizer
// sees a missing barrier. Slow by design, and only as much of CUDA as the kernels use.
//
// A launch returns 0, or DIVERGED when threads of a block passed different numbers of barriers, or TRAMPLED when
// something was written beside the shared memory asked for. Shared memory is full of NaN when a block starts.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)

struct uint3 {
    unsigned x, y, z;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct __nv_bfloat16 {
    std::uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(std::uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {  // to nearest, ties to even
    const auto bits = std::bit_cast<std::uint32_t>(x);
    if (x != x) return {0x7fff};
    return {std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

struct __half {
    _Float16 value;
};
inline float __half2float(__half x) { return float(x.value); }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }

namespace emulation {

constexpr int DIVERGED = 10001, TRAMPLED = 10002;
constexpr int WARP = 32;

// A barrier for a number of members that may shrink.
class Meeting {
  public:
    explicit Meeting(int members) : members_(members) {}

    void wait() {
        std::unique_lock lock(mutex_);
        const unsigned round = round_;
        if (++here_ == members_) {
            open();
        } else {
            opened_.wait(lock, [&] { return round_ != round; });
        }
    }

    void leave() {
        std::unique_lock lock(mutex_);
        if (--members_ == here_ && here_ > 0) open();
    }

  private:
    void open() {
        here_ = 0;
        ++round_;
        opened_.notify_all();
    }

    std::mutex mutex_;
    std::condition_variable opened_;
    int members_, here_ = 0;
    unsigned round_ = 0;
};

struct Warp {
    Meeting meeting{WARP};
    std::uint32_t words[WARP][8];  // what each lane shows to the others
};

// Everything that the threads of one running block have in common.
struct Block {
    explicit Block(int threads, std::size_t bytes) : meeting(threads), memory(bytes + 2 * GUARD, 0xff) {
        for (int i = 0; i < threads / WARP; ++i) warps.emplace_back();
    }
    unsigned char* shared() { return memory.data() + GUARD; }
    bool trampled() const {
        const auto intact = [](unsigned char x) { return x == 0xff; };
        return !std::all_of(memory.begin(), memory.begin() + GUARD, intact) ||
               !std::all_of(memory.end() - GUARD, memory.end(), intact);
    }
    // The barrier that `count` threads use among themselves.
    Meeting& among(int number, int count) {
        std::unique_lock lock(mutex);
        if (!named[number]) named[number] = std::make_unique<Meeting>(count);
        return *named[number];
    }

    static constexpr std::size_t GUARD = 256;
    Meeting meeting;
    std::vector<unsigned char> memory;  // operator new aligns it to 16 bytes
    std::deque<Warp> warps;
    std::mutex mutex;
    std::unique_ptr<Meeting> named[16];
};

inline thread_local Block* block = nullptr;
inline thread_local int barriers = 0;  // that this thread has passed in this block

}  // namespace emulation

inline thread_local uint3 threadIdx, blockIdx;

template <class Shared>
Shared& block_memory() {
    return *reinterpret_cast<Shared*>(emulation::block->shared());
}

namespace emulation {

inline int lane() { return threadIdx.x % WARP; }
inline Warp& warp() { return block->warps[threadIdx.x / WARP]; }

// Every lane shows a value and, between two barriers, may look at those of the others.
template <class Value, class Look>
void among_lanes(const Value& mine, Look look) {
    static_assert(sizeof(Value) <= sizeof(Warp::words[0]));
    Warp& team = warp();
    std::memcpy(team.words[lane()], &mine, sizeof mine);
    team.meeting.wait();
    look([&](int other) {
        Value value;
        std::memcpy(&value, team.words[other], sizeof value);
        return value;
    });
    team.meeting.wait();
}

}  // namespace emulation

inline void __syncthreads() {
    ++emulation::barriers;
    emulation::block->meeting.wait();
}
inline void __syncwarp() { emulation::warp().meeting.wait(); }

template <class Value>
Value __shfl_xor_sync(unsigned, Value value, int mask) {
    Value found;
    emulation::among_lanes(value, [&](auto of) { found = of(emulation::lane() ^ mask); });
    return found;
}

inline bool __any_sync(unsigned, bool mine) {
    bool any = false;
    emulation::among_lanes(mine, [&](auto of) {
        for (int lane = 0; lane < emulation::WARP; ++lane) any |= of(lane);
    });
    return any;
}

using std::min;

inline float __expf(float x) { return std::exp(x); }

template <class Shared, class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int blocks, int threads, void*, Arguments... arguments) {
    using namespace emulation;
    std::deque<Block> running;
    for (int i = 0; i < blocks; ++i) running.emplace_back(threads, sizeof(Shared));
    std::vector<int> passed(threads);
    std::atomic<int> result = 0;
    Meeting team(threads);
    const auto work = [&](int thread) {
        threadIdx = {unsigned(thread), 0, 0};
        for (int i = 0; i < blocks; ++i) {
            blockIdx = {unsigned(i), 0, 0};
            block = &running[i];
            barriers = 0;
            kernel(arguments...);
            passed[thread] = barriers;
            warp().meeting.leave();
            block->meeting.leave();
            team.wait();
            if (thread == 0) {
                if (block->trampled()) result = TRAMPLED;
                if (std::any_of(passed.begin(), passed.end(), [&](int n) { return n != passed[0]; })) result = DIVERGED;
            }
            team.wait();
        }
    };
    std::vector<std::thread> workers;
    for (int i = 0; i < threads; ++i) workers.emplace_back(work, i);
    for (auto& worker : workers) worker.join();
    return result;
}
