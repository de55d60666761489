// What the device code stands on: the CUDA toolkit under nvcc, and a host compiler's emulation of it anywhere else.
#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// The shared memory of this block, of the size that the launch asked for. Its content is undefined at the start.
template <class Shared>
__device__ __forceinline__ Shared& block_memory() {
    extern __shared__ uint4 bytes[];
    return *reinterpret_cast<Shared*>(bytes);
}

// Queues a kernel on a stream; returns the cudaError as a number.
template <class Shared, class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int blocks, int threads, void* stream, Arguments... arguments) {
    if (sizeof(Shared) > 48 * 1024) {  // beyond this a kernel has to ask
        const auto error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(Shared)));
        if (error != cudaSuccess) return error;
    }
    kernel<<<blocks, threads, sizeof(Shared), static_cast<cudaStream_t>(stream)>>>(arguments...);
    return cudaGetLastError();
}

#else

#include "emulation.h"

#endif
