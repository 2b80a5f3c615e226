#include "cpu/attention_plan.h"

#include <algorithm>
#include <initializer_list>
#include <numeric>
#include <stdexcept>
#include <string>

namespace cocoop_fast {

// Query rows that are summed in one go towards a context key's gradient. Fixed, so that the order of the sum does not
// depend on the number of threads.
constexpr int64_t kChunkRows = 64;
constexpr int64_t kMaxNodes = 1 << 30;

static void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

AttentionPlan::AttentionPlan(int64_t n_ctx, std::vector<int64_t> parent) : n_ctx_(n_ctx), n_ctx_queries_(n_ctx) {
    build_tree(parent);
    node_of_query_.resize(parent.size());
    std::iota(node_of_query_.begin(), node_of_query_.end(), 0);
    build_readers();
}

AttentionPlan::AttentionPlan(int64_t n_ctx, std::vector<int64_t> parent, const std::vector<int64_t>& queries)
    : n_ctx_(n_ctx) {
    build_tree(parent);
    for (size_t i = 0; i < queries.size(); i++) {
        const int64_t node = queries[i];
        require(node >= 0 && node < n_nodes(), "`queries` must be nodes 0 .. " + std::to_string(n_nodes() - 1) +
                                                   ", got " + std::to_string(node) + " at " + std::to_string(i));
        require(i == 0 || queries[i - 1] < node,
                "`queries` must be strictly ascending, got " + std::to_string(node) + " at " + std::to_string(i) +
                    " after " + (i ? std::to_string(queries[i - 1]) : ""));
        node_of_query_.push_back((int32_t)node);
    }
    build_readers();
}

void AttentionPlan::build_tree(const std::vector<int64_t>& parent) {
    require(n_ctx_ >= 1 && n_ctx_ < kMaxNodes, "`n_ctx` must be at least 1, got " + std::to_string(n_ctx_));
    require((int64_t)parent.size() < kMaxNodes, "`parent` has too many nodes");
    const int64_t n = (int64_t)parent.size();
    parent_.resize(n);
    depth_.resize(n);
    subtree_end_.assign(n, (int32_t)n);
    std::vector<int32_t> open;  // the path from the root to the node before this one
    for (int64_t j = 0; j < n; j++) {
        const int64_t p = parent[j];
        const std::string got = "got parent " + std::to_string(p) + " at node " + std::to_string(j);
        require(p >= -1 && p < j, "`parent` must be -1 or an earlier node, " + got);
        while (!open.empty() && open.back() != p) {
            subtree_end_[open.back()] = (int32_t)j;
            open.pop_back();
        }
        require(p == -1 || !open.empty(), "`parent` must list the nodes in depth-first order, " + got);
        parent_[j] = (int32_t)p;
        depth_[j] = (int32_t)open.size();
        open.push_back((int32_t)j);
    }
}

void AttentionPlan::build_readers() {
    int64_t slots = 0;
    slot_offset_.push_back(0);
    const auto add_row = [&](int64_t row_slots) {
        slots += row_slots;
        slot_offset_.push_back(slots);
        max_slots_ = std::max(max_slots_, row_slots);
    };
    for (int64_t m = 0; m < n_ctx_queries_; m++) add_row(2 + m);
    for (const int32_t node : node_of_query_) add_row(2 + n_ctx_ + depth_[node]);

    const auto first_query_at = [&](int32_t node) {
        const auto begin = node_of_query_.begin();
        return (int32_t)(n_ctx_queries_ + (std::lower_bound(begin, node_of_query_.end(), node) - begin));
    };
    for (int64_t j = 0; j < n_nodes(); j++) {
        readers_begin_.push_back(first_query_at((int32_t)j));
        readers_end_.push_back(first_query_at(subtree_end_[j]));
    }

    chunk_begin_.push_back(0);
    if (n_ctx_queries_ > 0) chunk_begin_.push_back((int32_t)n_ctx_queries_);
    while (chunk_begin_.back() < n_queries()) {
        chunk_begin_.push_back((int32_t)std::min(n_queries(), chunk_begin_.back() + kChunkRows));
    }
}

PlanView AttentionPlan::view() const {
    PlanView v;
    v.n_ctx = n_ctx_;
    v.n_nodes = n_nodes();
    v.n_ctx_queries = n_ctx_queries_;
    v.n_queries = n_queries();
    v.max_slots = max_slots_;
    v.parent = parent_.data();
    v.depth = depth_.data();
    v.node_of_query = node_of_query_.data();
    v.slot_offset = slot_offset_.data();
    v.readers_begin = readers_begin_.data();
    v.readers_end = readers_end_.data();
    v.chunk_begin = chunk_begin_.data();
    v.n_chunks = (int64_t)chunk_begin_.size() - 1;
    return v;
}

// Of sizes that a caller chose, so it may be beyond 64 bits.
static int64_t product(std::initializer_list<int64_t> sizes) {
    int64_t result = 1;
    for (const int64_t size : sizes) {
        const bool fits = !__builtin_mul_overflow(result, size, &result) && result <= (int64_t)1 << 60;
        require(fits, "`batch`, `heads` and `head_size` must be sizes of arrays, got more numbers than memory can have");
    }
    return result;
}

int64_t AttentionPlan::slot_floats(int64_t batch, int64_t heads) const {
    return product({batch, heads, slot_offset_.back()});
}

int64_t AttentionPlan::partial_floats(int64_t batch, int64_t heads, int64_t head_size) const {
    return product({batch, heads, head_size, (int64_t)chunk_begin_.size() - 1, n_ctx_, 2});
}

int64_t AttentionPlan::scratch_bytes(int64_t heads) const {
    const int64_t bytes = product({max_slots_, 2 * (int64_t)sizeof(const float*)}) +
                          product({max_slots_, heads, (int64_t)sizeof(float)});
    return (bytes + 63) / 64 * 64;  // threads write to cache lines of their own
}

}  // namespace cocoop_fast
