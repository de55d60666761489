// From the numbers that a caller passes to the template instances that exist.
#pragma once

#include <type_traits>

#include "platform.cuh"

enum : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
constexpr int NO_SUCH_KERNEL = 1;  // the number of cudaErrorInvalidValue

template <class X>
struct Type {
    using type = X;
};

// Calls use(std::integral_constant<int, N>) for a head size that is compiled.
template <class Use>
int with_size(int N, Use use) {
    switch (N) {
        case 32: return use(std::integral_constant<int, 32>());
        case 64: return use(std::integral_constant<int, 64>());
        case 128: return use(std::integral_constant<int, 128>());
        default: return NO_SUCH_KERNEL;
    }
}

// Calls use(Type<X>) for the type of the per-token tensors.
template <class Use>
int with_type(int type, Use use) {
    switch (type) {
        case FLOAT32: return use(Type<float>());
        case BFLOAT16: return use(Type<__nv_bfloat16>());
        case FLOAT16: return use(Type<__half>());
        default: return NO_SUCH_KERNEL;
    }
}

// Calls use(Type<X>, Type<W>): log-decays have the type of the others, or float where those have 16 bits.
template <class Use>
int with_types(int type, int decay_type, Use use) {
    return with_type(type, [&](auto x) {
        if (decay_type == type) return use(x, x);
        if (decay_type == FLOAT32) return use(x, Type<float>());
        return NO_SUCH_KERNEL;
    });
}
