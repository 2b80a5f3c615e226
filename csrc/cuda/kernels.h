// The CUDA kernels' arguments and launchers: a C ABI of raw pointers, sizes, strides and a stream.
//
// B images, K classes, N tree nodes, M context rows, R = M + N rows of an image, d width, H heads of size D.
// Strides are in elements. Pointers are device memory of the current device. The caller checks shapes and addresses
// (cocoop_fast/ops/cuda.py); a launcher refuses only sizes that it has no kernel or no grid for.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include <cstdint>

namespace cocoop_fast {

enum class Dtype : int32_t { float16, bfloat16, float32 };

// Rows of every image; an image stride of 0 shares them between images.
struct InRows {
    const void* data;
    int64_t image_stride, row_stride;
};
struct OutRows {
    void* data;
    int64_t image_stride, row_stride;
};

// A small contiguous array of a type of its own: what is learned is float32 where the rows are not.
struct InArray {
    const void* data;
    Dtype dtype;
};
struct OutArray {
    void* data;
    Dtype dtype;
};

// A part of the query rows that read one key, whose gradient gets its share from them.
struct ReaderTask {
    int32_t key;         // context row m, or M + node
    int32_t slot;        // where these rows have the key among those that they read
    int32_t begin, end;  // the query rows
    int32_t partial;     // where the sum goes among the partial sums; -1: it is the whole gradient
};
struct ReduceTask {
    int32_t key;
    int32_t begin, end;  // the partial sums, in the order of their rows
};

// Who reads whose key. Query rows of an image: the M context rows, then the N nodes; or some nodes alone.
// Keys that a row reads, in this order (its slots):
//   context row m:  SOS, context 0 .. m
//   node n:         SOS, context 0 .. M - 1, the path from the root to n
// The arrays are in device memory.
struct AttentionPlan {
    int32_t n_ctx;              // M
    int32_t n_ctx_queries;      // M, or 0 when only some nodes ask
    int32_t n_node_queries;     // N, or how many ask
    const int32_t* path_begin;  // (n_node_queries + 1,) where a row's path begins in `path`
    const int32_t* path;        // nodes, from the root down
    const ReaderTask* reader_tasks;  // those of context keys first
    int32_t n_reader_tasks;
    const ReduceTask* reduce_tasks;  // those of context keys first
    int32_t n_reduce_tasks;
};

struct AttentionFwd {
    AttentionPlan plan;
    Dtype dtype;
    int32_t batch, heads, head_size;
    InRows q_ctx, k_ctx, v_ctx;     // M rows an image; q_ctx is not read when n_ctx_queries is 0
    InRows q_node, k_node, v_node;  // N rows an image; q_node: the query rows
    const void* sos_k;              // (H * D,)
    const void* sos_v;
    OutRows o;  // the query rows
};

struct AttentionBwd {
    AttentionFwd fwd;  // without o
    InRows grad_o;     // the query rows
    OutRows dq;        // the first dq_rows query rows
    int32_t dq_rows;
    OutRows dk, dv;    // the keys of reader_tasks, context rows first
    float2* weights;   // (B, H, slots of all query rows): probability, and gradient of the score
    int64_t slots;
    float* partials;  // (B, n_partials, H, 2, D)
    int32_t n_partials;
};

struct AssemblePromptsFwd {
    Dtype dtype;             // of the rows x and y
    InArray vectors;         // (M, d), or no data
    InArray shift;           // (B, d), or (B, M, d) if shift_of_row
    int32_t shift_of_row;
    InArray position;        // (M, d)
    InArray gamma, beta;     // (d,)
    OutRows x, y;            // M rows an image
    float* mean;             // (B * M,)
    float* rstd;             // (B * M,)
    int32_t batch, n_ctx, d;
    float eps;
};

struct AssemblePromptsBwd {
    Dtype dtype;         // of the rows dx
    InRows dx;           // M rows an image
    OutArray d_vectors;  // (M, d), or no data
    OutArray d_shift;    // (B, d), or (B, M, d) if shift_of_row
    int32_t shift_of_row;
    int32_t batch, n_ctx, d;
};

// Copies without looking at the numbers, so `row_bytes` is all that it knows of their type.
struct AssembleDense {
    const void* context;  // (B, M, d)
    const void* prefix;   // (K, d)
    const void* suffix;   // (K, L - 1 - M, d)
    void* out;            // (B, K, L, d)
    int32_t batch, n_classes, n_ctx, length;
    int64_t row_bytes;
};

constexpr int32_t kMaxHeadSize = 128;  // a head has a multiple of 8 numbers, up to so many
constexpr int32_t kMaxGrid = 65535;    // images, and heads: the blocks of a grid's second and third dimension
constexpr int32_t kMaxWidth = 8192;    // d, of assemble_prompts_fwd: it has a row in shared memory

extern "C" {
cudaError_t cocoop_fast_tree_attention_fwd(const AttentionFwd*, cudaStream_t);
cudaError_t cocoop_fast_tree_attention_bwd(const AttentionBwd*, cudaStream_t);
cudaError_t cocoop_fast_assemble_prompts_fwd(const AssemblePromptsFwd*, cudaStream_t);
cudaError_t cocoop_fast_assemble_prompts_bwd(const AssemblePromptsBwd*, cudaStream_t);
cudaError_t cocoop_fast_assemble_dense(const AssembleDense*, cudaStream_t);
}

}  // namespace cocoop_fast
