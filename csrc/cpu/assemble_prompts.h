// From context vectors and their shift to the first layer's rows, and to dense prompts.
#pragma once

namespace cocoop_fast {
namespace {

// x[b, m] = (vectors[m] + shift[b, m]) + position[m],  y = LN(x). A thread owns whole rows.
void assemble_prompts_fwd(const AssemblePromptsFwd& a) {
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t r = 0; r < a.batch * a.n_ctx; r++) {
        const float* vectors = a.vectors == nullptr ? nullptr : a.vectors + (r % a.n_ctx) * a.d;
        const float* shift = a.shift + (a.shift_of_row ? r : r / a.n_ctx) * a.d;
        const float* position = a.position + (r % a.n_ctx) * a.d;
        float* x = row_of(a.x, r);
        const float total = sum(a.d, [=](int64_t i, auto lanes) {
            const Vec shared = vectors == nullptr ? Vec{} : lanes.load(vectors + i);
            const Vec row = (shared + lanes.load(shift + i)) + lanes.load(position + i);
            lanes.store(x + i, row);
            return row;
        });
        normalise_row(x, total, a.gamma, a.beta, a.eps, a.d, row_of(a.y, r), a.mean + r, a.rstd + r);
    }
}

// d_vectors[m] = sum_b dx[b, m];  d_shift[b] = sum_m dx[b, m], or d_shift = dx. Sums are in ascending order. A thread
// owns whole rows of the results.
void assemble_prompts_bwd(const AssemblePromptsBwd& a) {
    const auto one = [](int64_t) { return 1.0f; };
    const int64_t shared = a.d_vectors == nullptr ? 0 : a.n_ctx;
    const int64_t shifts = a.shift_of_row ? a.batch * a.n_ctx : a.batch;
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t r = 0; r < shared + shifts; r++) {
        const int64_t m = r, b = r - shared;
        if (b < 0) {
            weighted_sum(a.d_vectors + m * a.d, a.d, a.batch, one,
                         [=](int64_t image) { return (const float*)row_of(a.dx, image * a.n_ctx + m); });
        } else if (a.shift_of_row) {
            std::memcpy(a.d_shift + b * a.d, row_of(a.dx, b), sizeof(float) * a.d);
        } else {
            weighted_sum(a.d_shift + b * a.d, a.d, a.n_ctx, one,
                         [=](int64_t row) { return (const float*)row_of(a.dx, b * a.n_ctx + row); });
        }
    }
}

// out[b, k] = prefix[k], context[b], suffix[k]. A thread owns whole prompts.
void assemble_dense(const AssembleDense& a) {
    const int64_t n_suffix = a.length - 1 - a.n_ctx;
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t p = 0; p < a.batch * a.n_classes; p++) {
        const int64_t b = p / a.n_classes, k = p % a.n_classes;
        float* out = a.out + p * a.length * a.d;
        std::memcpy(out, a.prefix + k * a.d, sizeof(float) * a.d);
        std::memcpy(out + a.d, a.context + b * a.n_ctx * a.d, sizeof(float) * a.n_ctx * a.d);
        if (n_suffix > 0) {
            std::memcpy(out + (1 + a.n_ctx) * a.d, a.suffix + k * n_suffix * a.d, sizeof(float) * n_suffix * a.d);
        }
    }
}

}  // namespace
}  // namespace cocoop_fast
