// Chosen rows, copied or added to. A thread owns whole rows.
#pragma once

namespace cocoop_fast {
namespace {

// to[b, i] = from[b, index[i]]
void gather_rows(const MoveRows& a) {
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t r = 0; r < a.batch * a.n; r++) {
        const int64_t from = (r / a.n) * a.from.inner + a.index[r % a.n];
        std::memcpy(row_of(a.to, r), row_of(a.from, from), sizeof(float) * a.d);
    }
}

// to[b, index[i]] += from[b, i]: the indices are distinct
void add_rows(const MoveRows& a) {
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t r = 0; r < a.batch * a.n; r++) {
        const float* from = row_of(a.from, r);
        float* to = row_of(a.to, (r / a.n) * a.to.inner + a.index[r % a.n]);
        for_each(a.d, [=](int64_t i, auto lanes) { lanes.store(to + i, lanes.load(to + i) + lanes.load(from + i)); });
    }
}

}  // namespace
}  // namespace cocoop_fast
