// Launches of WKV5 and WKV6. Every function queues its work on `stream` and returns a cudaError as a number, 0 for none.
// Tensors are contiguous and aligned to 16 bytes; types are the numbers in dispatch.cuh; kernels/README.md has the shapes.
#include "dispatch.cuh"
#include "wkv6.cuh"

namespace {

// WKV5's w is [H,N] and float, its gradient per batch entry.
template <bool PER_TOKEN, class Use>
int with_decays(int type, int decay_type, Use use) {
    if constexpr (PER_TOKEN) {
        return with_types(type, decay_type, use);
    } else {
        return with_type(type, [&](auto x) { return use(x, Type<float>()); });
    }
}

template <bool PER_TOKEN>
int forward(int type, int decay_type, int B, int T, int H, int N, const void* r, const void* w, const void* k,
            const void* v, const void* u, const void* state, void* y, void* last, void* checkpoints, void* stream) {
    return with_size(N, [&](auto size) {
        return with_decays<PER_TOKEN>(type, decay_type, [&](auto x, auto decay) {
            constexpr int N = size;
            using X = typename decltype(x)::type;
            using W = typename decltype(decay)::type;
            return launch<wkv6::ForwardTiles<N>>(
                wkv6::forward<N, PER_TOKEN, X, W>, B * H, Share<N>::THREADS, stream, static_cast<const X*>(r),
                static_cast<const W*>(w), static_cast<const X*>(k), static_cast<const X*>(v),
                static_cast<const float*>(u), static_cast<const float*>(state), static_cast<X*>(y),
                static_cast<float*>(last), static_cast<float*>(checkpoints), T, H);
        });
    });
}

template <bool PER_TOKEN>
int backward(int type, int decay_type, int B, int T, int H, int N, const void* r, const void* w, const void* k,
             const void* v, const void* u, const void* checkpoints, const void* dy, const void* dlast, void* dr,
             void* dw, void* dk, void* dv, void* du, void* dstate, void* stream) {
    return with_size(N, [&](auto size) {
        return with_decays<PER_TOKEN>(type, decay_type, [&](auto x, auto decay) {
            constexpr int N = size;
            using X = typename decltype(x)::type;
            using W = typename decltype(decay)::type;
            return launch<wkv6::BackwardTiles<N>>(
                wkv6::backward<N, PER_TOKEN, X, W>, B * H, Share<N>::THREADS, stream, static_cast<const X*>(r),
                static_cast<const W*>(w), static_cast<const X*>(k), static_cast<const X*>(v),
                static_cast<const float*>(u), static_cast<const float*>(checkpoints), static_cast<const X*>(dy),
                static_cast<const float*>(dlast), static_cast<X*>(dr), static_cast<W*>(dw), static_cast<X*>(dk),
                static_cast<X*>(dv), static_cast<float*>(du), static_cast<float*>(dstate), T, H);
        });
    });
}

}  // namespace

extern "C" int wkv5_forward(int type, int decay_type, int B, int T, int H, int N, const void* r, const void* w,
                            const void* k, const void* v, const void* u, const void* state, void* y, void* last,
                            void* checkpoints, void* stream) {
    return forward<false>(type, decay_type, B, T, H, N, r, w, k, v, u, state, y, last, checkpoints, stream);
}

extern "C" int wkv6_forward(int type, int decay_type, int B, int T, int H, int N, const void* r, const void* w,
                            const void* k, const void* v, const void* u, const void* state, void* y, void* last,
                            void* checkpoints, void* stream) {
    return forward<true>(type, decay_type, B, T, H, N, r, w, k, v, u, state, y, last, checkpoints, stream);
}

extern "C" int wkv5_backward(int type, int decay_type, int B, int T, int H, int N, const void* r, const void* w,
                             const void* k, const void* v, const void* u, const void* checkpoints, const void* dy,
                             const void* dlast, void* dr, void* dw, void* dk, void* dv, void* du, void* dstate,
                             void* stream) {
    return backward<false>(type, decay_type, B, T, H, N, r, w, k, v, u, checkpoints, dy, dlast, dr, dw, dk, dv, du,
                           dstate, stream);
}

extern "C" int wkv6_backward(int type, int decay_type, int B, int T, int H, int N, const void* r, const void* w,
                             const void* k, const void* v, const void* u, const void* checkpoints, const void* dy,
                             const void* dlast, void* dr, void* dw, void* dk, void* dv, void* du, void* dstate,
                             void* stream) {
    return backward<true>(type, decay_type, B, T, H, N, r, w, k, v, u, checkpoints, dy, dlast, dr, dw, dk, dv, du,
                          dstate, stream);
}
