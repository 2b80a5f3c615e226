// AttentionPlan: who reads whose key. Built and checked once for a class tree, used by every attention call.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"

namespace cocoop_fast {

// Query rows of an image: the M context rows, then the N nodes; or, with `queries`, those nodes alone.
// Keys that a row reads, in this order (its slots):
//   context row m:  SOS, context 0 .. m
//   node n:         SOS, context 0 .. M - 1, the path from the root to n
// so context row c is slot 1 + c of every row that reads it, and node j is slot 1 + M + depth[j].
class AttentionPlan {
  public:
    // parent: (N,) nodes in depth-first order, -1 at a root. queries: strictly ascending nodes.
    // Throws std::invalid_argument if they are not that.
    AttentionPlan(int64_t n_ctx, std::vector<int64_t> parent);
    AttentionPlan(int64_t n_ctx, std::vector<int64_t> parent, const std::vector<int64_t>& queries);

    PlanView view() const;

    int64_t n_ctx() const { return n_ctx_; }
    int64_t n_nodes() const { return (int64_t)parent_.size(); }
    int64_t n_ctx_queries() const { return n_ctx_queries_; }
    int64_t n_queries() const { return (int64_t)slot_offset_.size() - 1; }
    int64_t max_slots() const { return max_slots_; }

    // Floats of each of AttentionBwd's buffers.
    int64_t slot_floats(int64_t batch, int64_t heads) const;
    int64_t partial_floats(int64_t batch, int64_t heads, int64_t head_size) const;

    // Bytes of AttentionFwd::scratch for one thread.
    int64_t scratch_bytes(int64_t heads) const;

  private:
    void build_tree(const std::vector<int64_t>& parent);
    void build_readers();

    int64_t n_ctx_ = 0;
    int64_t n_ctx_queries_ = 0;
    int64_t max_slots_ = 0;
    std::vector<int32_t> parent_, depth_, subtree_end_;
    std::vector<int32_t> node_of_query_;
    std::vector<int64_t> slot_offset_;
    std::vector<int32_t> readers_begin_, readers_end_, chunk_begin_;
};

}  // namespace cocoop_fast
