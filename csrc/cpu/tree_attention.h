// Attention of tree rows: every row reads SOS, the context before it, and the path above it (attention_plan.h).
//
//   score_s = q . k_s / sqrt(D),  p = softmax(score),  o = sum_s p_s v_s            for each row and head
#pragma once

namespace cocoop_fast {
namespace {

// One thread's view of the keys of one query row.
struct Slots {
    int64_t count;
    const float** keys;    // (count,) rows of H * D floats
    const float** values;  // (count,)
    float* weights;        // (max_slots, H)
};

inline const float* row_of(const Part& part, int64_t image, int64_t row) {
    return part.data + image * part.image_stride + row * part.row_stride;
}

inline float* row_of(const OutPart& part, int64_t image, int64_t row) {
    return part.data + image * part.image_stride + row * part.row_stride;
}

inline Slots thread_slots(const AttentionFwd& a) {
    char* scratch = a.scratch + thread_number() * a.scratch_bytes;
    const float** keys = (const float**)scratch;
    const float** values = keys + a.plan.max_slots;
    return {0, keys, values, (float*)(values + a.plan.max_slots)};
}

inline const float* query_row(const AttentionFwd& a, int64_t image, int64_t i) {
    const int64_t node = i - a.plan.n_ctx_queries;
    return node < 0 ? row_of(a.q_ctx, image, i) : row_of(a.q_node, image, node);
}

// Points `slots` at the keys and values that query row i reads.
inline void find_slots(const AttentionFwd& a, int64_t image, int64_t i, Slots& slots) {
    const PlanView& plan = a.plan;
    const int64_t query = i - plan.n_ctx_queries;
    const int64_t n_ctx = query < 0 ? i + 1 : plan.n_ctx;
    slots.count = 1 + n_ctx;
    slots.keys[0] = a.sos_k;
    slots.values[0] = a.sos_v;
    for (int64_t m = 0; m < n_ctx; m++) {
        slots.keys[1 + m] = row_of(a.k_ctx, image, m);
        slots.values[1 + m] = row_of(a.v_ctx, image, m);
    }
    if (query < 0) return;
    int32_t node = plan.node_of_query[query];
    slots.count += plan.depth[node] + 1;
    for (int64_t s = slots.count - 1; s > n_ctx; s--, node = plan.parent[node]) {
        slots.keys[s] = row_of(a.k_node, image, node);
        slots.values[s] = row_of(a.v_node, image, node);
    }
}

// out[s, h] = scale * x_h . rows[s]_h
inline void head_dots(const AttentionFwd& a, const float* x, const float** rows, int64_t count, float scale,
                      float* out) {
    for (int64_t h = 0; h < a.heads; h++) {
        const int64_t at = h * a.head_size;
        for (int64_t s = 0; s < count; s++) out[s * a.heads + h] = scale * dot(x + at, rows[s] + at, a.head_size);
    }
}

// w[s, h] = softmax over s, heads as lanes.
inline void softmax(float* w, int64_t count, int64_t heads) {
    for_each(heads, [=](int64_t h, auto lanes) {
        Vec highest = lanes.load(w + h);
        for (int64_t s = 1; s < count; s++) {
            const Vec score = lanes.load(w + s * heads + h);
            highest = score > highest ? score : highest;
        }
        Vec total{};
        for (int64_t s = 0; s < count; s++) {
            const Vec e = exp(lanes.load(w + s * heads + h) - highest);
            total += e;
            lanes.store(w + s * heads + h, e);
        }
        const Vec share = 1.0f / total;
        for (int64_t s = 0; s < count; s++) lanes.store(w + s * heads + h, lanes.load(w + s * heads + h) * share);
    });
}

// out_h = sum over s of w[s, h] rows[s]_h
inline void head_sums(const AttentionFwd& a, const float* w, const float** rows, int64_t count, float* out) {
    for (int64_t h = 0; h < a.heads; h++) {
        const int64_t at = h * a.head_size;
        weighted_sum(
            out + at, a.head_size, count, [=](int64_t s) { return w[s * a.heads + h]; },
            [=](int64_t s) { return rows[s] + at; });
    }
}

inline float score_scale(const AttentionFwd& a) { return 1.0f / __builtin_sqrtf((float)a.head_size); }

// A thread owns whole query rows.
void tree_attention_fwd(const AttentionFwd& a) {
    const int64_t rows = a.plan.n_queries;
    const float scale = score_scale(a);
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t task = 0; task < a.batch * rows; task++) {
        const int64_t image = task / rows, i = task % rows;
        Slots slots = thread_slots(a);
        find_slots(a, image, i, slots);
        head_dots(a, query_row(a, image, i), slots.keys, slots.count, scale, slots.weights);
        softmax(slots.weights, slots.count, a.heads);
        head_sums(a, slots.weights, slots.values, slots.count, row_of(a.o, image, i));
    }
}

// ds[s, h] in: dp_s = do . v_s; out: the gradient of the score before its scale,
//   ds_s = scale p_s (dp_s - sum_t p_t dp_t)
inline void softmax_bwd(const float* p, float* ds, int64_t count, int64_t heads, float scale) {
    for_each(heads, [=](int64_t h, auto lanes) {
        Vec mean{};
        for (int64_t s = 0; s < count; s++) mean += lanes.load(p + s * heads + h) * lanes.load(ds + s * heads + h);
        for (int64_t s = 0; s < count; s++) {
            const Vec centred = lanes.load(ds + s * heads + h) - mean;
            lanes.store(ds + s * heads + h, scale * lanes.load(p + s * heads + h) * centred);
        }
    });
}

// Phase 1, for every query row: p and ds into the workspace, and dq = sum_s ds_s k_s. A thread owns whole rows.
inline void query_gradients(const AttentionBwd& a) {
    const AttentionFwd& f = a.fwd;
    const int64_t rows = f.plan.n_queries, slots_per_image = f.plan.slot_offset[rows];
    const int64_t rows_with_dq = a.dq.data == nullptr ? 0 : a.context_only ? f.plan.n_ctx_queries : rows;
    const float scale = score_scale(f);
#pragma omp parallel for schedule(static) num_threads(f.threads)
    for (int64_t task = 0; task < f.batch * rows; task++) {
        const int64_t image = task / rows, i = task % rows;
        const int64_t offset = (image * slots_per_image + f.plan.slot_offset[i]) * f.heads;
        float* p = a.probabilities + offset;
        float* ds = a.d_scores + offset;
        Slots slots = thread_slots(f);
        find_slots(f, image, i, slots);
        head_dots(f, query_row(f, image, i), slots.keys, slots.count, scale, p);
        softmax(p, slots.count, f.heads);
        head_dots(f, row_of(a.grad_o, image, i), slots.values, slots.count, 1.0f, ds);
        softmax_bwd(p, ds, slots.count, f.heads, scale);
        if (i < rows_with_dq) head_sums(f, ds, slots.keys, slots.count, row_of(a.dq, image, i));
    }
}

// The gradient of one head of the key and value in slot `slot` of query rows begin .. end - 1, which are either all
// context rows or all nodes:
//   dk = sum_i ds[i, slot] q_i,  dv = sum_i p[i, slot] do_i
inline void key_gradients(const AttentionBwd& a, int64_t image, int64_t begin, int64_t end, int64_t slot, int64_t head,
                          float* dk, float* dv) {
    const AttentionFwd& f = a.fwd;
    const int64_t* offset = f.plan.slot_offset;
    const int64_t heads = f.heads, at = head * f.head_size;
    const int64_t first = image * offset[f.plan.n_queries];
    const auto weight = [=](const float* of_slot, int64_t i) {
        return of_slot[(first + offset[begin + i] + slot) * heads + head];
    };
    const float* q = begin < end ? query_row(f, image, begin) + at : nullptr;
    const float* grad_o = row_of(a.grad_o, image, begin) + at;
    const int64_t q_stride = begin < f.plan.n_ctx_queries ? f.q_ctx.row_stride : f.q_node.row_stride;
    const int64_t o_stride = a.grad_o.row_stride;
    weighted_sum(
        dk, f.head_size, end - begin, [=](int64_t i) { return weight(a.d_scores, i); },
        [=](int64_t i) { return q + i * q_stride; });
    weighted_sum(
        dv, f.head_size, end - begin, [=](int64_t i) { return weight(a.probabilities, i); },
        [=](int64_t i) { return grad_o + i * o_stride; });
}

// Phase 2, for every node: its readers are the query rows of its subtree, a contiguous range. A thread owns whole keys.
inline void node_key_gradients(const AttentionBwd& a) {
    const AttentionFwd& f = a.fwd;
    const PlanView& plan = f.plan;
#pragma omp parallel for schedule(dynamic, 8) num_threads(f.threads)
    for (int64_t task = 0; task < f.batch * plan.n_nodes; task++) {
        const int64_t image = task / plan.n_nodes, j = task % plan.n_nodes;
        float* dk = row_of(a.dk, image, plan.n_ctx + j);
        float* dv = row_of(a.dv, image, plan.n_ctx + j);
        for (int64_t h = 0; h < f.heads; h++) {
            key_gradients(a, image, plan.readers_begin[j], plan.readers_end[j], 1 + plan.n_ctx + plan.depth[j], h,
                          dk + h * f.head_size, dv + h * f.head_size);
        }
    }
}

// Phase 3, for every context row: all query rows read it, so they are summed in fixed chunks (a thread owns a head of a
// chunk), and the chunks are added in order (a thread owns a context row).
inline void context_key_gradients(const AttentionBwd& a) {
    const AttentionFwd& f = a.fwd;
    const PlanView& plan = f.plan;
    const int64_t d = f.heads * f.head_size, chunks = plan.n_chunks;
#pragma omp parallel for schedule(static) num_threads(f.threads)
    for (int64_t task = 0; task < f.batch * chunks * f.heads; task++) {
        const int64_t h = task % f.heads, part = task / f.heads;  // part: chunk of an image
        const int64_t image = part / chunks;
        const int64_t begin = plan.chunk_begin[part % chunks], end = plan.chunk_begin[part % chunks + 1];
        for (int64_t m = 0; m < plan.n_ctx; m++) {
            // Context row m is read by the context rows from m on, and by every node.
            const int64_t first = begin < plan.n_ctx_queries ? m : begin;
            float* dk = a.partials + (part * plan.n_ctx + m) * 2 * d + h * f.head_size;
            key_gradients(a, image, first, end, 1 + m, h, dk, dk + d);
        }
    }
#pragma omp parallel for schedule(static) num_threads(f.threads)
    for (int64_t task = 0; task < f.batch * plan.n_ctx; task++) {
        const int64_t image = task / plan.n_ctx, m = task % plan.n_ctx;
        const float* first = a.partials + (image * chunks * plan.n_ctx + m) * 2 * d;
        const auto one = [](int64_t) { return 1.0f; };
        const int64_t stride = plan.n_ctx * 2 * d;
        weighted_sum(row_of(a.dk, image, m), d, chunks, one, [=](int64_t c) { return first + c * stride; });
        weighted_sum(row_of(a.dv, image, m), d, chunks, one, [=](int64_t c) { return first + d + c * stride; });
    }
}

void tree_attention_bwd(const AttentionBwd& a) {
    query_gradients(a);
    if (!a.context_only) node_key_gradients(a);
    context_key_gradients(a);
}

}  // namespace
}  // namespace cocoop_fast
