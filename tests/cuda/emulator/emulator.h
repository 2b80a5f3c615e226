// Runs CUDA kernels on the host, to test their own sources where there is no GPU.
//
// Every thread of a block is a fibre. One runs until it reaches a barrier or a shuffle, and goes on when all threads
// concerned have reached the same one; which runs next is up to a schedule that tests choose. So what a thread may see
// before a barrier is what a GPU might show it, and a thread that never comes is found out: a launch then fails, and
// cudaGetErrorString() says why.
//
// Shared memory is full of NaN when a block begins. Where sources are compiled with -fsanitize=thread, every memory
// access is reported to the emulator (not to that sanitizer's runtime), which fails the launch if two threads touch the
// same bytes, one of them writing, with no barrier between them: within a block, or in two blocks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <utility>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __shared__  // the one array of all shared memory, which emulator.cpp defines
#define __launch_bounds__(...)

using std::min;

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

inline float2 make_float2(float x, float y) { return {x, y}; }

void __syncthreads();
void __syncwarp(unsigned mask = 0xffffffffu);
float __shfl_xor_sync(unsigned mask, float value, int lane_mask);

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

namespace emulator {
cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
    return emulator::run(*config, [&] { kernel(arguments...); });
}
