// Launches of WKV4. Every function queues its work on `stream` and returns a cudaError as a number, 0 for none.
// Tensors are contiguous and aligned to 16 bytes; types are the numbers in dispatch.cuh; wkv4.cuh has the shapes.
#include "dispatch.cuh"
#include "wkv4.cuh"

namespace {

int blocks(int B, int A) { return B * ((A + wkv4::CHANNELS - 1) / wkv4::CHANNELS); }

}  // namespace

extern "C" int wkv4_forward(int type, int B, int T, int A, const void* w, const void* u, const void* k, const void* v,
                            const void* state, void* y, void* last, void* checkpoints, void* stream) {
    return with_type(type, [&](auto x) {
        using X = typename decltype(x)::type;
        return launch<wkv4::ForwardTiles>(
            wkv4::forward<X>, blocks(B, A), wkv4::CHANNELS, stream, static_cast<const float*>(w),
            static_cast<const float*>(u), static_cast<const X*>(k), static_cast<const X*>(v),
            static_cast<const float*>(state), static_cast<X*>(y), static_cast<float*>(last),
            static_cast<float*>(checkpoints), T, A);
    });
}

extern "C" int wkv4_backward(int type, int B, int T, int A, const void* w, const void* u, const void* k, const void* v,
                             const void* checkpoints, const void* dy, const void* dlast, void* dw, void* du, void* dk,
                             void* dv, void* dstate, void* stream) {
    return with_type(type, [&](auto x) {
        using X = typename decltype(x)::type;
        return launch<wkv4::BackwardTiles>(
            wkv4::backward<X>, blocks(B, A), wkv4::CHANNELS, stream, static_cast<const float*>(w),
            static_cast<const float*>(u), static_cast<const X*>(k), static_cast<const X*>(v),
            static_cast<const float*>(checkpoints), static_cast<const X*>(dy), static_cast<const float*>(dlast),
            static_cast<float*>(dw), static_cast<float*>(du), static_cast<X*>(dk), static_cast<X*>(dv),
            static_cast<float*>(dstate), T, A);
    });
}
