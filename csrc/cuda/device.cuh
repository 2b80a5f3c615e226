// What the kernels share: eight numbers at a time, sums over the lanes of a warp, shared memory, a launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/kernels.h"

namespace cocoop_fast {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// All shared memory is of the size that a launch asks for: a block's, in 16 bytes.
extern __shared__ uint4 shared_memory[];

// ---- numbers: float32 in registers, whatever they are in memory

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float(float x) { return x; }
template <>
__device__ inline __half from_float(float x) { return __float2half_rn(x); }
template <>
__device__ inline __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }

// kWidth numbers side by side, in words of up to 16 bytes.
template <int kBytes>
struct WordOf {
    using type = uint4;
};
template <>
struct WordOf<8> {
    using type = uint2;
};
template <>
struct WordOf<4> {
    using type = uint32_t;
};
template <>
struct WordOf<2> {
    using type = uint16_t;
};

template <class T, int kWidth>
union Vector {
    using Word = typename WordOf<kWidth * sizeof(T)>::type;
    static constexpr int kWords = kWidth * sizeof(T) / sizeof(Word);
    Word words[kWords];
    T numbers[kWidth];
};

template <class T, int kWidth>
__device__ inline void load_vector(const T* from, float (&x)[kWidth]) {
    using Raw = Vector<T, kWidth>;
    Raw raw;
#pragma unroll
    for (int i = 0; i < Raw::kWords; i++) raw.words[i] = reinterpret_cast<const typename Raw::Word*>(from)[i];
#pragma unroll
    for (int i = 0; i < kWidth; i++) x[i] = to_float(raw.numbers[i]);
}

template <class T, int kWidth>
__device__ inline void store_vector(T* to, const float (&x)[kWidth]) {
    using Raw = Vector<T, kWidth>;
    Raw raw;
#pragma unroll
    for (int i = 0; i < kWidth; i++) raw.numbers[i] = from_float<T>(x[i]);
#pragma unroll
    for (int i = 0; i < Raw::kWords; i++) reinterpret_cast<typename Raw::Word*>(to)[i] = raw.words[i];
}

template <int kWidth>
__device__ inline void load_vector(InArray array, int64_t i, float (&x)[kWidth]) {
    switch (array.dtype) {
        case Dtype::float16: return load_vector(static_cast<const __half*>(array.data) + i, x);
        case Dtype::bfloat16: return load_vector(static_cast<const __nv_bfloat16*>(array.data) + i, x);
        default: return load_vector(static_cast<const float*>(array.data) + i, x);
    }
}

template <int kWidth>
__device__ inline void store_vector(OutArray array, int64_t i, const float (&x)[kWidth]) {
    switch (array.dtype) {
        case Dtype::float16: return store_vector(static_cast<__half*>(array.data) + i, x);
        case Dtype::bfloat16: return store_vector(static_cast<__nv_bfloat16*>(array.data) + i, x);
        default: return store_vector(static_cast<float*>(array.data) + i, x);
    }
}

template <class T>
__device__ inline const T* row_of(InRows rows, int64_t image, int64_t row) {
    return static_cast<const T*>(rows.data) + image * rows.image_stride + row * rows.row_stride;
}

template <class T>
__device__ inline T* row_of(OutRows rows, int64_t image, int64_t row) {
    return static_cast<T*>(rows.data) + image * rows.image_stride + row * rows.row_stride;
}

// ---- sums over lanes, in a fixed order; every lane of the warp calls and gets the result

// Over `kLanes` neighbours: a group.
template <int kLanes>
__device__ inline float sum_in_group(float x) {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
    return x;
}

// Over the lanes with the same place in the warp's groups of `kLanes`.
template <int kLanes>
__device__ inline float sum_over_groups(float x) {
#pragma unroll
    for (int distance = kLanes; distance < kWarp; distance *= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
    return x;
}

template <int kLanes>
__device__ inline float max_over_groups(float x) {
#pragma unroll
    for (int distance = kLanes; distance < kWarp; distance *= 2) {
        x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
    }
    return x;
}

// ---- on the host

// kernel<<<grid, threads, shared_bytes, stream>>>(arguments), as a function call; a grid without blocks is no error.
template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                   const Arguments& arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, arguments);
}

inline unsigned blocks_for(int64_t items, int64_t per_block) {
    return static_cast<unsigned>((items + per_block - 1) / per_block);
}

// f(T()) with the type of `dtype`.
template <class Function>
cudaError_t with_type(Dtype dtype, Function f) {
    switch (dtype) {
        case Dtype::float16: return f(__half());
        case Dtype::bfloat16: return f(__nv_bfloat16());
        case Dtype::float32: return f(float());
    }
    return cudaErrorInvalidValue;
}

}  // namespace cocoop_fast
