// Lets a host compiler build the device code of this folder unchanged and run it on the CPU, to check it where there is
// no GPU. Blocks run in turn; the threads of a block are fibers, which change at barriers. The thread sanitizer is told
// of both, so that it sees a missing barrier. Only as much of CUDA as the kernels use.
//
// A launch returns 0, or DIVERGED when threads of a block passed different numbers of barriers, or TRAMPLED when
// something was written beside the shared memory asked for, or STUCK when every thread that is left waits for others.
// Shared memory is full of NaN when a block starts.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

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

constexpr int DIVERGED = 10001, TRAMPLED = 10002, STUCK = 10003;
constexpr int WARP = 32;

// What the thread sanitizer is told: which fiber runs from here on, which is no order between the two; and that what
// came before release(x) is over where acquire(x) returns. UNSEEN is code that it does not look at.
#ifdef __SANITIZE_THREAD__
#define UNSEEN __attribute__((no_sanitize("thread")))
inline void* this_fiber() { return __tsan_get_current_fiber(); }
inline void* new_fiber() { return __tsan_create_fiber(0); }
inline void delete_fiber(void* fiber) { __tsan_destroy_fiber(fiber); }
inline void announce(void* fiber) { __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync); }
inline void release(void* x) { __tsan_release(x); }
inline void acquire(void* x) { __tsan_acquire(x); }
#else
#define UNSEEN
inline void* this_fiber() { return nullptr; }
inline void* new_fiber() { return nullptr; }
inline void delete_fiber(void*) {}
inline void announce(void*) {}
inline void release(void*) {}
inline void acquire(void*) {}
#endif

struct Fiber {
    static constexpr std::size_t STACK = 256 << 10;
    std::unique_ptr<unsigned char[]> stack{new unsigned char[STACK]};
    ucontext_t context, caller;
    void* name = new_fiber();
    void* caller_name = nullptr;
    unsigned index = 0;               // threadIdx.x
    int barriers = 0;                 // that it has passed in this block
    const unsigned* waits = nullptr;  // goes on when this is no longer `seen`
    unsigned seen = 0;
    bool ended = false;

    ~Fiber() { delete_fiber(name); }
    UNSEEN bool ready() const { return !ended && (!waits || *waits != seen); }
};

inline thread_local Fiber* fiber = nullptr;

}  // namespace emulation

inline thread_local uint3 threadIdx, blockIdx;

namespace emulation {

// From a fiber back to what resumed it.
UNSEEN inline void pause() {
    Fiber& self = *fiber;
    announce(self.caller_name);
    swapcontext(&self.context, &self.caller);
}

UNSEEN inline void resume(Fiber& next) {
    fiber = &next;
    threadIdx = {next.index, 0, 0};
    next.caller_name = this_fiber();
    announce(next.name);
    swapcontext(&next.caller, &next.context);
}

// Runs work() once in each of a block's threads; false where all that are left wait for others.
template <class Work>
bool run_all(std::deque<Fiber>& fibers, const Work& work) {
    static thread_local const Work* given;
    static thread_local char begun, over;
    given = &work;
    const auto begin = +[] {
        acquire(&begun);
        (*given)();
        fiber->ended = true;
        release(&over);
        pause();
    };
    unsigned index = 0;
    for (Fiber& next : fibers) {
        next.index = index++;
        getcontext(&next.context);
        next.context.uc_stack.ss_sp = next.stack.get();
        next.context.uc_stack.ss_size = Fiber::STACK;
        next.context.uc_link = nullptr;
        makecontext(&next.context, begin, 0);
    }
    release(&begun);
    for (bool moved = true; moved;) {
        moved = false;
        for (Fiber& next : fibers) {
            if (!next.ready()) continue;
            resume(next);
            moved = true;
        }
    }
    acquire(&over);
    return std::all_of(fibers.begin(), fibers.end(), [](const Fiber& x) { return x.ended; });
}

// A barrier for a number of members that may shrink.
class Meeting {
  public:
    explicit Meeting(int members = 0) : members_(members) {}

    UNSEEN void wait() {
        const unsigned round = round_;
        release(&order_[round % 2]);  // who goes on to the next round must not be taken for one who came to this
        if (++here_ == members_) {
            open();
        } else {
            fiber->waits = &round_;
            fiber->seen = round;
            pause();
        }
        acquire(&order_[round % 2]);
    }

    UNSEEN void leave() {
        if (--members_ == here_ && here_ > 0) open();
    }

    // The same for `count` members, where none has come yet.
    UNSEEN Meeting& of(int count) {
        if (!members_) members_ = count;
        return *this;
    }

  private:
    UNSEEN void open() {
        here_ = 0;
        ++round_;
    }

    int members_, here_ = 0;
    unsigned round_ = 0;
    char order_[2];
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
    Meeting& among(int number, int count) { return named[number].of(count); }

    static constexpr std::size_t GUARD = 256;
    Meeting meeting;
    std::vector<unsigned char> memory;  // operator new aligns it to 16 bytes
    std::deque<Warp> warps;
    Meeting named[16];
};

inline thread_local Block* block = nullptr;

}  // namespace emulation

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

UNSEEN inline void __syncthreads() {
    ++emulation::fiber->barriers;
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
    for (int i = 0; i < blocks; ++i) {
        Block running(threads, sizeof(Shared));
        block = &running;
        blockIdx = {unsigned(i), 0, 0};
        std::deque<Fiber> fibers(threads);
        const bool ended = run_all(fibers, [&] {
            kernel(arguments...);
            warp().meeting.leave();
            block->meeting.leave();
        });
        if (!ended) return STUCK;
        if (running.trampled()) return TRAMPLED;
        const auto differs = [&](const Fiber& x) { return x.barriers != fibers[0].barriers; };
        if (std::any_of(fibers.begin(), fibers.end(), differs)) return DIVERGED;
    }
    return 0;
}
