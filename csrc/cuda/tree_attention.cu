// Attention of tree rows: every row reads SOS, the context before it, and the path above it (kernels.h has the slots).
//
//   score_s = q . k_s / sqrt(D),  p = softmax(score),  o = sum_s p_s v_s            for each row and head
//   dp_s = do . v_s,  ds_s = p_s (dp_s - sum_t p_t dp_t) / sqrt(D)
//   dq = sum_s ds_s k_s,  dk_j = sum_i ds_ij q_i,  dv_j = sum_i p_ij do_i           i: the rows that read key j
//
// A warp has a query row (or a key) of one head. Its lanes stand in groups, each lane with eight of the head's numbers,
// so that one load of a warp fetches a key for every group. Eight warps with neighbouring rows share SOS and the context
// in shared memory. The rows that read a node's key are its descendants, a contiguous range: every gradient is a sum
// that one warp adds in a fixed order, without atomics; the readers of a key that many rows read are cut into parts of
// 64, whose sums are added in their order.
//
// Memory traffic a row of d numbers of s bytes: forward 4 d s (q, k, v in, o out). Backward 7 d s (q, k, v, grad o in;
// dq, dk, dv out), 16 bytes for each key and head that the row reads (its probability and the gradient of its score,
// written and read once), and what comes from the L2 cache: q and grad o once more for every node above the row and
// for every context token. Predicted: below a thousand rows the time of a launch; above, not the bandwidth bounds it but the
// rate at which instructions are issued: a warp has hundreds of them for its one row and head. The Triton kernels give 16
// rows to a matrix instruction, so `auto` prefers them: two to six times as fast on an H200 in half precision. In float32, which has
// none there, these are 1.3 to 1.8 times as fast.
#include <type_traits>

#include "cuda/device.cuh"

namespace cocoop_fast {
namespace {

constexpr int kVector = 8;         // numbers that a lane has of its group's row: 16 bytes, or 32 in float32
constexpr int kRowsPerBlock = 8;   // query rows, a warp each, that share the prefix keys in shared memory
constexpr int kTasksPerBlock = 4;  // keys or parts of their readers, a warp each
constexpr int kMostStaged = 20;    // prefix keys in shared memory at a time

// Blocks on a multiprocessor, the second launch bound: it lets a thread have 80 registers. Without it the compiler
// spills some to local memory for the sake of more warps.
constexpr int kRowBlocks = 3, kTaskBlocks = 6;

struct Place {
    int lane, warp;
    int group;    // of the warp's
    int column;   // the first of the lane's eight numbers within the head
    bool active;  // whether the head has these numbers
    int head, image;
    int head_begin;  // the head's first number within a row
};

template <int kGroup>
__device__ inline Place find_place(int head_size) {
    Place p;
    p.lane = threadIdx.x % kWarp;
    p.warp = threadIdx.x / kWarp;
    p.group = p.lane / kGroup;
    p.column = p.lane % kGroup * kVector;
    p.active = p.column < head_size;
    p.head = blockIdx.y;
    p.image = blockIdx.z;
    p.head_begin = p.head * head_size;
    return p;
}

// The lane's eight numbers of the head whose first is `head`; zeros where there are none.
template <class T>
__device__ inline void load_lane(const Place& p, bool present, const T* head, float (&x)[kVector]) {
    if (present && p.active) {
        load_vector(head + p.column, x);
    } else {
#pragma unroll
        for (int i = 0; i < kVector; i++) x[i] = 0.0f;
    }
}

__device__ inline float dot(const float (&x)[kVector], const float (&y)[kVector]) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVector; i++) sum += x[i] * y[i];
    return sum;
}

__device__ inline void add_scaled(float scale, const float (&x)[kVector], float (&sum)[kVector]) {
#pragma unroll
    for (int i = 0; i < kVector; i++) sum[i] += scale * x[i];
}

// ---- the query rows

struct QueryRow {
    int row;
    bool exists;   // the last block of a grid may have warps without a row
    int n_prefix;  // SOS and the context rows that it reads
    int n_path;
    const int32_t* path;
    __device__ int n_slots() const { return n_prefix + n_path; }
};

__device__ inline QueryRow find_query_row(const AttentionPlan& plan, int row) {
    const int node_query = row - plan.n_ctx_queries;
    if (node_query >= plan.n_node_queries) return {row, false, 0, 0, nullptr};
    if (node_query < 0) return {row, true, row + 2, 0, nullptr};
    const int32_t begin = plan.path_begin[node_query];
    return {row, true, 1 + plan.n_ctx, plan.path_begin[node_query + 1] - begin, plan.path + begin};
}

// Where the slots of a query row begin in the list of all slots of an image and head.
__device__ inline int64_t slot_begin(const AttentionPlan& plan, int row) {
    const int64_t n_ctx_rows = row < plan.n_ctx_queries ? row : plan.n_ctx_queries;
    const int64_t before = n_ctx_rows * (n_ctx_rows + 3) / 2;  // sum of m + 2
    if (row < plan.n_ctx_queries) return before;
    const int node_query = row - plan.n_ctx_queries;
    return before + int64_t(node_query) * (1 + plan.n_ctx) + plan.path_begin[node_query];
}

template <class T>
__device__ inline const T* query_head(const AttentionFwd& a, const Place& p, int row) {
    const int node_query = row - a.plan.n_ctx_queries;
    const T* q = node_query < 0 ? row_of<T>(a.q_ctx, p.image, row) : row_of<T>(a.q_node, p.image, node_query);
    return q + p.head_begin;
}

__host__ __device__ inline int staged_keys(const AttentionPlan& plan) {
    return 1 + plan.n_ctx < kMostStaged ? 1 + plan.n_ctx : kMostStaged;
}

// Prefix keys and values of the block's head, in shared memory: (count, D) each.
template <class T>
struct Stage {
    int first, count;
    T *k, *v;
};

template <class T>
__device__ inline Stage<T> empty_stage(const AttentionFwd& a) {
    T* k = reinterpret_cast<T*>(shared_memory);
    return {-1, 0, k, k + staged_keys(a.plan) * a.head_size};
}

// All threads of the block call it alike.
template <class T>
__device__ inline void stage_prefix(const AttentionFwd& a, const Place& p, int first, Stage<T>& stage) {
    if (stage.first == first) return;
    const int words = a.head_size * int(sizeof(T)) / int(sizeof(uint4));  // of a key
    stage.first = first;
    stage.count = min(kMostStaged, 1 + a.plan.n_ctx - first);
    __syncthreads();  // no warp reads what was there before
    for (int i = threadIdx.x; i < stage.count * words; i += blockDim.x) {
        const int key = i / words, word = i % words, m = first + key - 1;
        const T* k = m < 0 ? static_cast<const T*>(a.sos_k) : row_of<T>(a.k_ctx, p.image, m);
        const T* v = m < 0 ? static_cast<const T*>(a.sos_v) : row_of<T>(a.v_ctx, p.image, m);
        reinterpret_cast<uint4*>(stage.k + key * a.head_size)[word] =
            reinterpret_cast<const uint4*>(k + p.head_begin)[word];
        reinterpret_cast<uint4*>(stage.v + key * a.head_size)[word] =
            reinterpret_cast<const uint4*>(v + p.head_begin)[word];
    }
    __syncthreads();  // all keys are there
}

// visit(slot, seen, k, v) for every key of the row, one for each group at a time. All lanes of the warp call it, for it
// may shuffle; seen: whether the group has a key this time. All threads of the block call visit_keys alike.
template <class T, int kGroup, class Visit>
__device__ inline void visit_keys(const AttentionFwd& a, const Place& p, const QueryRow& row, Stage<T>& stage,
                                  Visit visit) {
    constexpr int kGroups = kWarp / kGroup;
    float k[kVector], v[kVector];
    const int n_prefix = 1 + a.plan.n_ctx;
    for (int first = 0; first < n_prefix; first += kMostStaged) {
        stage_prefix(a, p, first, stage);
        const int count = min(stage.count, row.n_prefix - first);  // the row may read none of these
        for (int s = p.group; s - p.group < count; s += kGroups) {
            const bool seen = s < count;
            load_lane(p, seen, stage.k + s * a.head_size, k);
            load_lane(p, seen, stage.v + s * a.head_size, v);
            visit(first + s, seen, k, v);
        }
    }
    for (int s = p.group; s - p.group < row.n_path; s += kGroups) {
        const bool seen = s < row.n_path;
        const int node = seen ? row.path[s] : 0;
        load_lane(p, seen, row_of<T>(a.k_node, p.image, node) + p.head_begin, k);
        load_lane(p, seen, row_of<T>(a.v_node, p.image, node) + p.head_begin, v);
        visit(row.n_prefix + s, seen, k, v);
    }
}

__device__ inline float score_scale(const AttentionFwd& a) { return 1.0f / sqrtf(float(a.head_size)); }

// A warp owns o of its row and head. Each group has a running softmax over its share of the keys.
template <class T, int kGroup>
__global__ void __launch_bounds__(kRowsPerBlock* kWarp, kRowBlocks) tree_attention_fwd_kernel(AttentionFwd a) {
    const Place p = find_place<kGroup>(a.head_size);
    const QueryRow row = find_query_row(a.plan, blockIdx.x * kRowsPerBlock + p.warp);
    const float scale = score_scale(a);
    float q[kVector], sum[kVector] = {};
    load_lane(p, row.exists, row.exists ? query_head<T>(a, p, row.row) : nullptr, q);
    float highest = -INFINITY, total = 0.0f;
    Stage<T> stage = empty_stage<T>(a);
    using Numbers = const float(&)[kVector];
    visit_keys<T, kGroup>(a, p, row, stage, [&](int, bool seen, Numbers k, Numbers v) {
        const float score = scale * sum_in_group<kGroup>(dot(q, k));
        if (!seen) return;
        const float now_highest = fmaxf(highest, score);
        const float keep = expf(highest - now_highest), weight = expf(score - now_highest);
        highest = now_highest;
        total = total * keep + weight;
#pragma unroll
        for (int i = 0; i < kVector; i++) sum[i] = sum[i] * keep + weight * v[i];
    });
    const float share = expf(highest - max_over_groups<kGroup>(highest));  // 0 for a group that had no key
    total = sum_over_groups<kGroup>(total * share);
#pragma unroll
    for (int i = 0; i < kVector; i++) sum[i] = sum_over_groups<kGroup>(sum[i] * share) / total;
    if (row.exists && p.active && p.group == 0) {
        store_vector(row_of<T>(a.o, p.image, row.row) + p.head_begin + p.column, sum);
    }
}

// A warp owns the weights of its row and head, and dq.
template <class T, int kGroup>
__global__ void __launch_bounds__(kRowsPerBlock* kWarp, kRowBlocks) tree_attention_bwd_query_kernel(AttentionBwd a) {
    const AttentionFwd& f = a.fwd;
    const Place p = find_place<kGroup>(f.head_size);
    const QueryRow row = find_query_row(f.plan, blockIdx.x * kRowsPerBlock + p.warp);
    const float scale = score_scale(f);
    float2* weights = nullptr;
    float q[kVector], grad_o[kVector];
    if (row.exists) {
        weights = a.weights + (int64_t(p.image) * f.heads + p.head) * a.slots + slot_begin(f.plan, row.row);
    }
    load_lane(p, row.exists, row.exists ? query_head<T>(f, p, row.row) : nullptr, q);
    load_lane(p, row.exists, row_of<T>(a.grad_o, p.image, row.exists ? row.row : 0) + p.head_begin, grad_o);

    // First (score, dp) of every slot; a group's lanes all have them, and the first writes.
    Stage<T> stage = empty_stage<T>(f);
    using Numbers = const float(&)[kVector];
    visit_keys<T, kGroup>(f, p, row, stage, [&](int slot, bool seen, Numbers k, Numbers v) {
        const float score = scale * sum_in_group<kGroup>(dot(q, k)), dp = sum_in_group<kGroup>(dot(grad_o, v));
        if (seen && p.column == 0) weights[slot] = make_float2(score, dp);
    });
    __syncwarp();  // (score, dp) are there

    // Then (p, ds), the slots over all lanes.
    float highest = -INFINITY, total = 0.0f, mean = 0.0f;
    for (int s = p.lane; s < row.n_slots(); s += kWarp) highest = fmaxf(highest, weights[s].x);
    highest = max_over_groups<1>(highest);
    for (int s = p.lane; s < row.n_slots(); s += kWarp) {
        const float e = expf(weights[s].x - highest);
        total += e;
        mean += e * weights[s].y;
    }
    total = sum_over_groups<1>(total);
    mean = sum_over_groups<1>(mean) / total;
    for (int s = p.lane; s < row.n_slots(); s += kWarp) {
        const float probability = expf(weights[s].x - highest) / total;
        weights[s] = make_float2(probability, scale * probability * (weights[s].y - mean));
    }
    __syncwarp();  // (p, ds) are there

    if (int(blockIdx.x) * kRowsPerBlock >= a.dq_rows) return;  // the whole block
    float dq[kVector] = {};
    visit_keys<T, kGroup>(f, p, row, stage, [&](int slot, bool seen, Numbers k, Numbers) {
        if (seen) add_scaled(weights[slot].y, k, dq);
    });
#pragma unroll
    for (int i = 0; i < kVector; i++) dq[i] = sum_over_groups<kGroup>(dq[i]);
    if (row.row < a.dq_rows && p.active && p.group == 0) {
        store_vector(row_of<T>(a.dq, p.image, row.row) + p.head_begin + p.column, dq);
    }
}

// ---- the keys

// The groups' sums into dk and dv of the key, or into a partial sum.
template <class T, int kGroup>
__device__ inline void store_key_gradients(const AttentionBwd& a, const Place& p, int key, int partial,
                                           float (&dk)[kVector], float (&dv)[kVector]) {
#pragma unroll
    for (int i = 0; i < kVector; i++) {
        dk[i] = sum_over_groups<kGroup>(dk[i]);
        dv[i] = sum_over_groups<kGroup>(dv[i]);
    }
    if (!p.active || p.group != 0) return;
    if (partial < 0) {
        store_vector(row_of<T>(a.dk, p.image, key) + p.head_begin + p.column, dk);
        store_vector(row_of<T>(a.dv, p.image, key) + p.head_begin + p.column, dv);
    } else {
        const int head_size = a.fwd.head_size;
        float* sums = a.partials + ((int64_t(p.image) * a.n_partials + partial) * a.fwd.heads + p.head) * 2 * head_size;
        store_vector(sums + p.column, dk);
        store_vector(sums + head_size + p.column, dv);
    }
}

// A warp owns the sum over a task's rows.
template <class T, int kGroup>
__global__ void __launch_bounds__(kTasksPerBlock* kWarp, kTaskBlocks) tree_attention_bwd_key_kernel(AttentionBwd a) {
    const AttentionFwd& f = a.fwd;
    const Place p = find_place<kGroup>(f.head_size);
    const int number = blockIdx.x * kTasksPerBlock + p.warp;
    if (number >= f.plan.n_reader_tasks) return;  // the whole warp
    const ReaderTask task = f.plan.reader_tasks[number];
    const float2* weights = a.weights + (int64_t(p.image) * f.heads + p.head) * a.slots + task.slot;
    float dk[kVector] = {}, dv[kVector] = {}, q[kVector], grad_o[kVector];
    for (int row = task.begin + p.group; row < task.end; row += kWarp / kGroup) {
        const float2 weight = weights[slot_begin(f.plan, row)];
        load_lane(p, true, query_head<T>(f, p, row), q);
        load_lane(p, true, row_of<T>(a.grad_o, p.image, row) + p.head_begin, grad_o);
        add_scaled(weight.y, q, dk);
        add_scaled(weight.x, grad_o, dv);
    }
    store_key_gradients<T, kGroup>(a, p, task.key, task.partial, dk, dv);
}

// A warp owns the gradients of a key that has several partial sums.
template <class T, int kGroup>
__global__ void __launch_bounds__(kTasksPerBlock* kWarp, kTaskBlocks) tree_attention_bwd_reduce_kernel(AttentionBwd a) {
    const AttentionFwd& f = a.fwd;
    const Place p = find_place<kGroup>(f.head_size);
    const int number = blockIdx.x * kTasksPerBlock + p.warp;
    if (number >= f.plan.n_reduce_tasks) return;  // the whole warp
    const ReduceTask task = f.plan.reduce_tasks[number];
    float dk[kVector] = {}, dv[kVector] = {}, part[kVector];
    for (int partial = task.begin + p.group; partial < task.end; partial += kWarp / kGroup) {
        const float* sums = a.partials + ((int64_t(p.image) * a.n_partials + partial) * f.heads + p.head) * 2 * f.head_size;
        load_lane(p, true, sums, part);
        add_scaled(1.0f, part, dk);
        load_lane(p, true, sums + f.head_size, part);
        add_scaled(1.0f, part, dv);
    }
    store_key_gradients<T, kGroup>(a, p, task.key, -1, dk, dv);
}

// ---- launchers

template <class T>
size_t stage_bytes(const AttentionFwd& a) {
    return 2 * size_t(staged_keys(a.plan)) * a.head_size * sizeof(T);
}

template <class T, int kGroup>
cudaError_t launch_fwd(const AttentionFwd& a, cudaStream_t stream) {
    const int rows = a.plan.n_ctx_queries + a.plan.n_node_queries;
    return launch(tree_attention_fwd_kernel<T, kGroup>, dim3(blocks_for(rows, kRowsPerBlock), a.heads, a.batch),
                  kRowsPerBlock * kWarp, stage_bytes<T>(a), stream, a);
}

template <class T, int kGroup>
cudaError_t launch_bwd(const AttentionBwd& a, cudaStream_t stream) {
    const AttentionFwd& f = a.fwd;
    const int rows = f.plan.n_ctx_queries + f.plan.n_node_queries;
    const auto grid = [&](int64_t items, int per_block) { return dim3(blocks_for(items, per_block), f.heads, f.batch); };
    cudaError_t status = launch(tree_attention_bwd_query_kernel<T, kGroup>, grid(rows, kRowsPerBlock),
                                kRowsPerBlock * kWarp, stage_bytes<T>(f), stream, a);
    if (status != cudaSuccess) return status;
    status = launch(tree_attention_bwd_key_kernel<T, kGroup>, grid(f.plan.n_reader_tasks, kTasksPerBlock),
                    kTasksPerBlock * kWarp, 0, stream, a);
    if (status != cudaSuccess) return status;
    return launch(tree_attention_bwd_reduce_kernel<T, kGroup>, grid(f.plan.n_reduce_tasks, kTasksPerBlock),
                  kTasksPerBlock * kWarp, 0, stream, a);
}

// f(group) with the least group whose lanes have room for a head.
template <class Function>
cudaError_t with_group(int head_size, Function f) {
    if (head_size <= 4 * kVector) return f(std::integral_constant<int, 4>());
    if (head_size <= 8 * kVector) return f(std::integral_constant<int, 8>());
    return f(std::integral_constant<int, 16>());
}

bool has_kernel(const AttentionFwd& a) {
    return a.head_size >= kVector && a.head_size <= kMaxHeadSize && a.head_size % kVector == 0 &&
           a.heads <= kMaxGrid && a.batch <= kMaxGrid;
}

}  // namespace

extern "C" cudaError_t cocoop_fast_tree_attention_fwd(const AttentionFwd* a, cudaStream_t stream) {
    if (!has_kernel(*a)) return cudaErrorInvalidConfiguration;
    return with_type(a->dtype, [&](auto number) {
        return with_group(a->head_size, [&](auto group) {
            return launch_fwd<decltype(number), decltype(group)::value>(*a, stream);
        });
    });
}

extern "C" cudaError_t cocoop_fast_tree_attention_bwd(const AttentionBwd* a, cudaStream_t stream) {
    if (!has_kernel(a->fwd)) return cudaErrorInvalidConfiguration;
    return with_type(a->fwd.dtype, [&](auto number) {
        return with_group(a->fwd.head_size, [&](auto group) {
            return launch_bwd<decltype(number), decltype(group)::value>(*a, stream);
        });
    });
}

}  // namespace cocoop_fast
