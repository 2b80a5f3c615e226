// From context vectors and their shift to the first layer's rows, normalised, and to dense prompts.
//
// `assemble_prompts`: a block of 128 threads owns a row of the result, and keeps it in shared memory between its sums
// and its normalisation: 2 d s bytes a row of d numbers of s bytes, as the inputs, which many rows read, come from the
// caches. Its gradient: a thread owns four columns of one sum, over the images or over the context tokens, in ascending
// order; every row is read twice, 2 d s bytes. With B M rows in all, both cost a launch.
//
// `assemble_dense`: a thread owns 16 bytes of a class's prompt, which it reads once and writes for all images: d s bytes
// a row out, and of the sources, which all images share, B times less in. Predicted: 90 % of the memory's bandwidth.
#include "cuda/device.cuh"

namespace cocoop_fast {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocks = 8;  // on a multiprocessor, which lets a thread have 64 registers: with fewer it would spill
constexpr int kWide = 4;  // numbers that a thread takes at a time, where addresses and sizes are multiples of that

// The sum of x over the block's threads, for all of them. `sums`: a float for each warp.
__device__ inline float block_sum(float x, float* sums) {
    x = sum_over_groups<1>(x);
    __syncthreads();  // no thread reads what was there before
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = x;
    __syncthreads();  // the sums of all warps are there
    float total = 0.0f;
    for (int warp = 0; warp < kThreads / kWarp; warp++) total += sums[warp];
    return total;
}

// x[b, m] = (vectors[m] + shift[b, m]) + position[m],  y = LN(x). A block owns a row, which it keeps in shared memory;
// there a thread reads what it wrote itself, kWidth numbers at a time. LN is that of the row as it is stored.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocks) assemble_prompts_fwd_kernel(AssemblePromptsFwd a) {
    const int64_t m = blockIdx.x, b = blockIdx.y;
    float* row = reinterpret_cast<float*>(shared_memory);
    float* sums = row + a.d;
    T* x = row_of<T>(a.x, b, m);
    T* y = row_of<T>(a.y, b, m);
    const int64_t shift_row = a.shift_of_row ? b * a.n_ctx + m : b;
    float sum = 0.0f;
    for (int at = threadIdx.x * kWidth; at < a.d; at += kThreads * kWidth) {
        float vectors[kWidth] = {}, shift[kWidth], position[kWidth], stored[kWidth];
        if (a.vectors.data != nullptr) load_vector(a.vectors, m * a.d + at, vectors);
        load_vector(a.shift, shift_row * a.d + at, shift);
        load_vector(a.position, m * a.d + at, position);
#pragma unroll
        for (int i = 0; i < kWidth; i++) {
            stored[i] = to_float(from_float<T>((vectors[i] + shift[i]) + position[i]));
            sum += stored[i];
        }
        store_vector(x + at, stored);
        store_vector(row + at, stored);
    }
    const float mean = block_sum(sum, sums) / a.d;
    float squares = 0.0f;
    for (int at = threadIdx.x * kWidth; at < a.d; at += kThreads * kWidth) {
        float stored[kWidth];
        load_vector(row + at, stored);
#pragma unroll
        for (int i = 0; i < kWidth; i++) squares += (stored[i] - mean) * (stored[i] - mean);
    }
    const float rstd = 1.0f / sqrtf(block_sum(squares, sums) / a.d + a.eps);
    for (int at = threadIdx.x * kWidth; at < a.d; at += kThreads * kWidth) {
        float stored[kWidth], gamma[kWidth], beta[kWidth];
        load_vector(row + at, stored);
        load_vector(a.gamma, at, gamma);
        load_vector(a.beta, at, beta);
#pragma unroll
        for (int i = 0; i < kWidth; i++) stored[i] = (stored[i] - mean) * rstd * gamma[i] + beta[i];
        store_vector(y + at, stored);
    }
    if (threadIdx.x == 0) {
        a.mean[b * a.n_ctx + m] = mean;
        a.rstd[b * a.n_ctx + m] = rstd;
    }
}

// d_vectors[m] = sum_b dx[b, m];  d_shift[b] = sum_m dx[b, m], or d_shift = dx. Sums are in ascending order. A thread owns
// kWidth numbers of a result.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocks) assemble_prompts_bwd_kernel(AssemblePromptsBwd a) {
    const int at = (blockIdx.y * kThreads + threadIdx.x) * kWidth;
    if (at >= a.d) return;
    const int shared = a.d_vectors.data == nullptr ? 0 : a.n_ctx;
    const bool of_vectors = int(blockIdx.x) < shared;
    const int64_t result = of_vectors ? blockIdx.x : int(blockIdx.x) - shared;  // m; b, or b M + m
    const int64_t image = of_vectors ? 0 : a.shift_of_row ? result / a.n_ctx : result;
    const int64_t first = of_vectors ? result : a.shift_of_row ? result % a.n_ctx : 0;
    const T* row = row_of<T>(a.dx, image, first) + at;
    const int64_t step = of_vectors ? a.dx.image_stride : a.dx.row_stride;
    float sum[kWidth] = {};
    for (int left = of_vectors ? a.batch : a.shift_of_row ? 1 : a.n_ctx; left > 0; left--, row += step) {
        float dx[kWidth];
        load_vector(row, dx);
#pragma unroll
        for (int i = 0; i < kWidth; i++) sum[i] += dx[i];
    }
    store_vector(of_vectors ? a.d_vectors : a.d_shift, result * a.d + at, sum);
}

// out[b, k] = prefix[k], context[b], suffix[k], in units of as many bytes as the addresses allow. A thread owns a unit
// of class k's prompt in all images, so what they share is read once.
template <class Unit>
__global__ void __launch_bounds__(kThreads, kBlocks) assemble_dense_kernel(AssembleDense a) {
    const int64_t units = a.row_bytes / sizeof(Unit), k = blockIdx.x;  // units of a row
    const int64_t i = int64_t(blockIdx.y) * kThreads + threadIdx.x;
    if (i >= a.length * units) return;
    const int64_t n_ctx = a.n_ctx * units, n_suffix = (a.length - 1 - a.n_ctx) * units;
    const Unit* context = static_cast<const Unit*>(a.context);
    Unit* out = static_cast<Unit*>(a.out);
    const bool in_context = i >= units && i < units + n_ctx;
    Unit shared_by_images = {};
    if (i < units) shared_by_images = static_cast<const Unit*>(a.prefix)[k * units + i];
    if (i >= units + n_ctx) {
        shared_by_images = static_cast<const Unit*>(a.suffix)[k * n_suffix + i - units - n_ctx];
    }
    for (int64_t b = 0; b < a.batch; b++) {
        const Unit unit = in_context ? context[b * n_ctx + i - units] : shared_by_images;
        out[(b * a.n_classes + k) * a.length * units + i] = unit;
    }
}

// Whether kWide numbers at a time can be loaded and stored.
bool aligned_address(const void* data, Dtype dtype) {
    const uintptr_t bytes = kWide * (dtype == Dtype::float32 ? sizeof(float) : sizeof(uint16_t));
    return reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

template <class Rows>
bool aligned_rows(const Rows& rows, Dtype dtype) {
    return aligned_address(rows.data, dtype) && (rows.image_stride | rows.row_stride) % kWide == 0;
}

template <class Array>
bool aligned_array(const Array& array) {
    return aligned_address(array.data, array.dtype);
}

template <class Unit>
bool fits(const AssembleDense& a) {
    const auto addresses = reinterpret_cast<uintptr_t>(a.context) | reinterpret_cast<uintptr_t>(a.prefix) |
                           reinterpret_cast<uintptr_t>(a.suffix) | reinterpret_cast<uintptr_t>(a.out);
    return (addresses | static_cast<uintptr_t>(a.row_bytes)) % sizeof(Unit) == 0;
}

template <class Unit>
cudaError_t launch_dense(const AssembleDense& a, cudaStream_t stream) {
    const unsigned parts = blocks_for(a.length * (a.row_bytes / int64_t(sizeof(Unit))), kThreads);
    if (parts > kMaxGrid) return cudaErrorInvalidConfiguration;
    return launch(assemble_dense_kernel<Unit>, dim3(a.batch == 0 ? 0 : a.n_classes, parts), kThreads, 0, stream, a);
}

}  // namespace

extern "C" cudaError_t cocoop_fast_assemble_prompts_fwd(const AssemblePromptsFwd* a, cudaStream_t stream) {
    const dim3 grid(a->n_ctx, a->batch);
    const size_t shared_bytes = (size_t(a->d) + kThreads / kWarp) * sizeof(float);
    if (a->batch > kMaxGrid || a->d > kMaxWidth) return cudaErrorInvalidConfiguration;
    return with_type(a->dtype, [&](auto number) {
        using T = decltype(number);
        const bool wide = a->d % kWide == 0 && aligned_rows(a->x, a->dtype) && aligned_rows(a->y, a->dtype) &&
                          aligned_array(a->vectors) && aligned_array(a->shift) && aligned_array(a->position) &&
                          aligned_array(a->gamma) && aligned_array(a->beta);
        const auto kernel = wide ? assemble_prompts_fwd_kernel<T, kWide> : assemble_prompts_fwd_kernel<T, 1>;
        return launch(kernel, grid, kThreads, shared_bytes, stream, *a);
    });
}

extern "C" cudaError_t cocoop_fast_assemble_prompts_bwd(const AssemblePromptsBwd* a, cudaStream_t stream) {
    return with_type(a->dtype, [&](auto number) {
        using T = decltype(number);
        const bool wide = a->d % kWide == 0 && aligned_rows(a->dx, a->dtype) && aligned_array(a->d_vectors) &&
                          aligned_array(a->d_shift);
        const auto kernel = wide ? assemble_prompts_bwd_kernel<T, kWide> : assemble_prompts_bwd_kernel<T, 1>;
        const int64_t shared = a->d_vectors.data == nullptr ? 0 : a->n_ctx;
        const int64_t shifts = int64_t(a->batch) * (a->shift_of_row ? a->n_ctx : 1);
        const dim3 grid(unsigned(shared + shifts), blocks_for(a->d, kThreads * (wide ? kWide : 1)));
        return launch(kernel, grid, kThreads, 0, stream, *a);
    });
}

extern "C" cudaError_t cocoop_fast_assemble_dense(const AssembleDense* a, cudaStream_t stream) {
    if (fits<uint4>(*a)) return launch_dense<uint4>(*a, stream);
    if (fits<uint32_t>(*a)) return launch_dense<uint32_t>(*a, stream);
    return launch_dense<uint16_t>(*a, stream);
}

}  // namespace cocoop_fast
