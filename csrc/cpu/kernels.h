// The CPU kernels: their arguments, and the table that each instruction set fills in.
//
// Only plain data here, no functions with a body: sources compiled for different instruction sets share this header,
// and the linker would keep just one copy of an inline function.
//
// B images, K classes, N tree nodes, M context rows, R = M + N rows of an image, d width, E embedding, H heads of
// size D. All numbers are float32. Arguments were checked by the caller (bindings.cpp).
#pragma once

#include <cstdint>

namespace cocoop_fast {

// n rows of floats, as `inner` rows in each of n / inner groups (an array of two or three dimensions): row r starts
// at data + (r / inner) * outer_stride + (r % inner) * inner_stride. Strides are in floats.
template <class Float>
struct Rows {
    Float* data;
    int64_t inner;
    int64_t outer_stride;
    int64_t inner_stride;
};
using InRows = Rows<const float>;
using OutRows = Rows<float>;

struct LayerNormFwd {
    OutRows x;           // n rows; bias and residual are added to them in place
    const float* bias;   // (d,) or null
    InRows residual;     // n rows; not read without a bias
    const float* gamma;  // (d,)
    const float* beta;   // (d,)
    OutRows y;
    float* mean;  // (n,)
    float* rstd;  // (n,)
    int64_t n, d;
    float eps;
    int threads;
};

struct LayerNormBwd {
    InRows dy;
    InRows x;
    const float* gamma;
    const float* mean;
    const float* rstd;
    OutRows dx;
    bool accumulate;  // add to dx, or write it
    int64_t n, d;
    int threads;
};

enum class Activation { quick_gelu, gelu };

struct ActivationFwd {
    InRows u;
    OutRows out;
    Activation kind;
    int64_t n, width;
    int threads;
};

struct ActivationBwd {
    InRows u;
    OutRows dg;  // in: gradient of the output; out: gradient of u
    Activation kind;
    int64_t n, width;
    int threads;
};

// Columns of W^T that lie together in a packed weight: panels of (k, kPanelColumns), each contiguous.
constexpr int64_t kPanelColumns = 32;

// n rows of floats, `stride` floats apart.
template <class Float>
struct Matrix {
    Float* data;
    int64_t stride;
};

enum class LinearFinish { plain, activation, activation_gradient };

struct Linear {
    Matrix<const float> x;  // n rows of k
    const float* weight;    // column c of row i of W^T (or W) is at
    int64_t panel_stride;   //   weight + c / kPanelColumns * panel_stride + i * weight_stride + c % kPanelColumns
    int64_t weight_stride;
    Matrix<float> out;             // n rows of `width`
    const float* bias;             // (width,); null only if plain or activation_gradient
    Matrix<const float> residual;  // plain: n rows of `width` that are added, or null; may be `out` if W is packed
    Matrix<float> u;               // n rows of `width`. activation: written, or null; activation_gradient: read
    LinearFinish finish;
    Activation kind;
    int64_t n, k, width;
    int64_t k_block;  // products that are summed before the next rows' are
    float* copies;    // (threads, copied_rows, kPanelColumns) for panels of a W that is not packed, or null
    int64_t copied_rows;
    int threads;
};

struct PackWeight {
    const float* weight;  // (width, k)
    int64_t weight_stride;
    float* packed;  // (ceil(width / kPanelColumns), k, kPanelColumns)
    int64_t k, width;
    int threads;
};

// Which keys each query row reads, and which query rows read each key. See attention_plan.h.
struct PlanView {
    int64_t n_ctx;                 // M
    int64_t n_nodes;               // N
    int64_t n_ctx_queries;         // M, or 0 when only some nodes ask
    int64_t n_queries;             // query rows of an image: context first
    int64_t max_slots;             // most keys that a row reads
    const int32_t* parent;         // (N,) -1 at a root
    const int32_t* depth;          // (N,)
    const int32_t* node_of_query;  // (n_queries - n_ctx_queries,)
    const int64_t* slot_offset;    // (n_queries + 1,) where the row's keys begin in the image's list
    const int32_t* readers_begin;  // (N,) the query rows that read node j are readers_begin[j] .. readers_end[j] - 1
    const int32_t* readers_end;    // (N,)
    const int32_t* chunk_begin;    // (n_chunks + 1,) fixed chunks of query rows
    int64_t n_chunks;
};

// The context rows and the node rows of every image; a stride of 0 shares the rows between images.
struct Part {
    const float* data;
    int64_t image_stride;
    int64_t row_stride;
};
struct OutPart {
    float* data;
    int64_t image_stride;
    int64_t row_stride;
};

struct AttentionFwd {
    PlanView plan;
    int64_t batch, heads, head_size;
    Part q_ctx, k_ctx, v_ctx;     // M rows an image; q_ctx is not read when n_ctx_queries is 0
    Part q_node, k_node, v_node;  // N rows an image; q_node: the rows of node_of_query
    const float* sos_k;           // (H * D,)
    const float* sos_v;
    OutPart o;       // n_queries rows an image
    char* scratch;   // scratch_bytes for each thread
    int64_t scratch_bytes;
    int threads;
};

struct AttentionBwd {
    AttentionFwd fwd;  // without o
    Part grad_o;       // n_queries rows an image
    OutPart dq;        // n_queries rows an image; the context rows only if context_only; data may be null
    OutPart dk, dv;    // M + N rows an image; the context rows only if context_only
    bool context_only;
    float* probabilities;  // (B, slot_offset[n_queries], H)
    float* d_scores;       // (B, slot_offset[n_queries], H)
    float* partials;       // (B, n_chunks, M, 2, H * D)
};

struct AssemblePromptsFwd {
    const float* vectors;   // (M, d) or null
    const float* shift;     // (B, d), or (B, M, d) if `shift_of_row`
    bool shift_of_row;
    const float* position;  // (M, d)
    const float* gamma;     // (d,)
    const float* beta;      // (d,)
    OutRows x;              // B * M rows
    OutRows y;              // B * M rows
    float* mean;            // (B * M,)
    float* rstd;            // (B * M,)
    int64_t batch, n_ctx, d;
    float eps;
    int threads;
};

struct AssemblePromptsBwd {
    InRows dx;         // B * M rows
    float* d_vectors;  // (M, d) or null
    float* d_shift;    // (B, d), or (B, M, d) if `shift_of_row`
    bool shift_of_row;
    int64_t batch, n_ctx, d;
    int threads;
};

struct AssembleDense {
    const float* context;  // (B, M, d)
    const float* prefix;   // (K, d)
    const float* suffix;   // (K, L - 1 - M, d)
    float* out;            // (B, K, L, d)
    int64_t batch, n_classes, n_ctx, length, d;
    int threads;
};

struct HeadFwd {
    InRows features;        // B * K rows
    const float* image;     // (B, E)
    float scale;
    float* logits;          // (B, K)
    float* inverse_norms;   // (B, K)
    int64_t batch, n_classes, width;
    int threads;
};

struct HeadBwd {
    InRows features;             // B * K rows
    const float* image;          // (B, E)
    const float* logits;         // (B, K)
    const float* inverse_norms;  // (B, K)
    const float* d_logits;       // (B, K)
    OutRows d_features;          // B * K rows
    float scale;
    int64_t batch, n_classes, width;
    int threads;
};

struct CrossEntropy {
    const float* logits;    // (B, K)
    const int64_t* labels;  // (B,)
    double* losses;         // (B,) or null
    float* d_logits;        // (B, K) or null
    float grad;             // gradient of each image's loss
    int64_t batch, n_classes;
    int threads;
};

struct MoveRows {
    InRows from;           // B * n rows, or B * rows of which `index` are read
    OutRows to;
    const int64_t* index;  // (n,)
    int64_t batch, n, d;
    int threads;
};

struct PeakLoop {
    const float* data;  // read_loop: n floats
    int64_t n;
    int64_t rounds;      // multiply_add_loop
    float factor, term;  // unknown to the compiler
    float* out;          // (threads,)
    int threads;
};

struct Kernels {
    const char* name;
    int lanes;        // floats of a register
    int peak_chains;  // multiply-adds of a register in a round of multiply_add_loop
    void (*layer_norm_fwd)(const LayerNormFwd&);
    void (*layer_norm_bwd)(const LayerNormBwd&);
    void (*activation_fwd)(const ActivationFwd&);
    void (*activation_bwd)(const ActivationBwd&);
    void (*linear)(const Linear&);
    void (*pack_weight)(const PackWeight&);
    void (*tree_attention_fwd)(const AttentionFwd&);
    void (*tree_attention_bwd)(const AttentionBwd&);
    void (*assemble_prompts_fwd)(const AssemblePromptsFwd&);
    void (*assemble_prompts_bwd)(const AssemblePromptsBwd&);
    void (*assemble_dense)(const AssembleDense&);
    void (*head_fwd)(const HeadFwd&);
    void (*head_bwd)(const HeadBwd&);
    void (*cross_entropy)(const CrossEntropy&);
    void (*gather_rows)(const MoveRows&);
    void (*add_rows)(const MoveRows&);
    void (*multiply_add_loop)(const PeakLoop&);
    void (*read_loop)(const PeakLoop&);
};

}  // namespace cocoop_fast
