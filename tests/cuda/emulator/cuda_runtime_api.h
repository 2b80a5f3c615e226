// What the kernels' sources use of the CUDA runtime, on the host: tests compile csrc/cuda with this folder in place of
// the toolkit's headers. See emulator.h.
#pragma once

#include <cstddef>

#include "vector_types.h"

#define CUDART_VERSION 0

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
using cudaStream_t = struct CUstream_st*;

const char* cudaGetErrorString(cudaError_t);  // of a launch that failed: what the emulator found
