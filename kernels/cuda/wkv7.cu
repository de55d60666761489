// Launches of WKV7. Every function queues its work on `stream` and returns a cudaError as a number, 0 for none.
// Tensors are contiguous and aligned to 16 bytes; types are the numbers in dispatch.cuh; kernels/README.md has the shapes.
#include "dispatch.cuh"
#include "wkv7.cuh"
#include "wkv7_chunked.cuh"
#include "wkv7_chunked_backward.cuh"

namespace {

// Calls use(Type<W>) for log-decays beside bf16.
template <class Use>
int with_decay(int type, Use use) {
    if (type == BFLOAT16) return use(Type<bf16>());
    if (type == FLOAT32) return use(Type<float>());
    return NO_SUCH_KERNEL;
}

}  // namespace

extern "C" int wkv7_forward(int type, int decay_type, int B, int T, int H, int N, const void* r, const void* w,
                            const void* k, const void* v, const void* a, const void* b, const void* state, void* y,
                            void* last, void* checkpoints, void* stream) {
    return with_size(N, [&](auto size) {
        return with_types(type, decay_type, [&](auto x, auto decay) {
            constexpr int N = size;
            using X = typename decltype(x)::type;
            using W = typename decltype(decay)::type;
            return launch<wkv7::ForwardTiles<N>>(
                wkv7::forward<N, X, W>, B * H, Share<N>::THREADS, stream, static_cast<const X*>(r),
                static_cast<const W*>(w), static_cast<const X*>(k), static_cast<const X*>(v), static_cast<const X*>(a),
                static_cast<const X*>(b), static_cast<const float*>(state), static_cast<X*>(y),
                static_cast<float*>(last), static_cast<float*>(checkpoints), T, H);
        });
    });
}

// As wkv7_forward, on tensor cores: only for bf16 and a head size of 64.
extern "C" int wkv7_forward_chunked(int type, int decay_type, int B, int T, int H, int N, const void* r, const void* w,
                                    const void* k, const void* v, const void* a, const void* b, const void* state,
                                    void* y, void* last, void* checkpoints, void* stream) {
    if (type != BFLOAT16 || N != wkv7::N) return NO_SUCH_KERNEL;
    return with_decay(decay_type, [&](auto decay) {
        using W = typename decltype(decay)::type;
        return launch<wkv7::ChunkedMemory>(
            wkv7::forward_chunked<W>, B * H, wkv7::PREPARERS + wkv7::CARRIERS, stream, static_cast<const bf16*>(r),
            static_cast<const W*>(w), static_cast<const bf16*>(k), static_cast<const bf16*>(v),
            static_cast<const bf16*>(a), static_cast<const bf16*>(b), static_cast<const float*>(state),
            static_cast<bf16*>(y), static_cast<float*>(last), static_cast<float*>(checkpoints), T, H);
    });
}

extern "C" int wkv7_backward(int type, int decay_type, int B, int T, int H, int N, const void* r, const void* w,
                             const void* k, const void* v, const void* a, const void* b, const void* checkpoints,
                             const void* dy, const void* dlast, void* dr, void* dw, void* dk, void* dv, void* da,
                             void* db, void* dstate, void* stream) {
    return with_size(N, [&](auto size) {
        return with_types(type, decay_type, [&](auto x, auto decay) {
            constexpr int N = size;
            using X = typename decltype(x)::type;
            using W = typename decltype(decay)::type;
            return launch<wkv7::BackwardTiles<N>>(
                wkv7::backward<N, X, W>, B * H, Share<N>::THREADS, stream, static_cast<const X*>(r),
                static_cast<const W*>(w), static_cast<const X*>(k), static_cast<const X*>(v), static_cast<const X*>(a),
                static_cast<const X*>(b), static_cast<const float*>(checkpoints), static_cast<const X*>(dy),
                static_cast<const float*>(dlast), static_cast<X*>(dr), static_cast<W*>(dw), static_cast<X*>(dk),
                static_cast<X*>(dv), static_cast<X*>(da), static_cast<X*>(db), static_cast<float*>(dstate),
                static_cast<const int*>(nullptr), T, H);
        });
    });
}

// As wkv7_backward, on tensor cores: only for bf16 and a head size of 64. `refused` has space for B H numbers: the heads
// that the recurrence has to go through after all, which it then does.
extern "C" int wkv7_backward_chunked(int type, int decay_type, int B, int T, int H, int N, const void* r, const void* w,
                                     const void* k, const void* v, const void* a, const void* b,
                                     const void* checkpoints, const void* dy, const void* dlast, void* dr, void* dw,
                                     void* dk, void* dv, void* da, void* db, void* dstate, void* refused,
                                     void* stream) {
    if (type != BFLOAT16 || N != wkv7::N) return NO_SUCH_KERNEL;
    return with_decay(decay_type, [&](auto decay) {
        using W = typename decltype(decay)::type;
        const auto in = [](const void* x) { return static_cast<const bf16*>(x); };
        const auto out = [](void* x) { return static_cast<bf16*>(x); };
        const int error = launch<wkv7::ChunkedBackwardMemory>(
            wkv7::backward_chunked<W>, B * H, wkv7::PREPARERS + wkv7::CARRIERS, stream, in(r),
            static_cast<const W*>(w), in(k), in(v), in(a), in(b), static_cast<const float*>(checkpoints),
            in(dy), static_cast<const float*>(dlast), out(dr), static_cast<W*>(dw),
            out(dk), out(dv), out(da), out(db), static_cast<float*>(dstate), static_cast<int*>(refused), T, H);
        if (error) return error;
        return launch<wkv7::BackwardTiles<wkv7::N>>(
            wkv7::backward<wkv7::N, bf16, W>, B * H, Share<wkv7::N>::THREADS, stream, in(r), static_cast<const W*>(w),
            in(k), in(v), in(a), in(b), static_cast<const float*>(checkpoints), in(dy),
            static_cast<const float*>(dlast), out(dr), static_cast<W*>(dw), out(dk), out(dv), out(da), out(db),
            static_cast<float*>(dstate), static_cast<const int*>(refused), T, H);
    });
}
