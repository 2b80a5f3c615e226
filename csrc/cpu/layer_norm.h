// LayerNorm over rows of d floats. A thread owns whole rows.
#pragma once

namespace cocoop_fast {
namespace {

// The statistics and output of a row that is already in place:
//   mean = sum(x) / d,  rstd = 1 / sqrt(sum((x - mean)^2) / d + eps),  y = (x - mean) rstd gamma + beta
inline void normalise_row(const float* x, float total, const float* gamma, const float* beta, float eps, int64_t d,
                          float* y, float* mean_out, float* rstd_out) {
    const float mean = total / (float)d;
    const float squares = sum(d, [=](int64_t i, auto lanes) {
        const Vec centred = lanes.load(x + i) - mean;
        return centred * centred;
    });
    const float rstd = 1.0f / __builtin_sqrtf(squares / (float)d + eps);
    for_each(d, [=](int64_t i, auto lanes) {
        const Vec normalised = (lanes.load(x + i) - mean) * rstd;
        lanes.store(y + i, normalised * lanes.load(gamma + i) + lanes.load(beta + i));
    });
    *mean_out = mean;
    *rstd_out = rstd;
}

// x += bias + residual, y = LN(x)
void layer_norm_fwd(const LayerNormFwd& a) {
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t r = 0; r < a.n; r++) {
        float* x = row_of(a.x, r);
        const float* bias = a.bias;
        float total;
        if (bias != nullptr) {
            const float* residual = row_of(a.residual, r);
            total = sum(a.d, [=](int64_t i, auto lanes) {
                const Vec moved = (lanes.load(x + i) + lanes.load(bias + i)) + lanes.load(residual + i);
                lanes.store(x + i, moved);
                return moved;
            });
        } else {
            total = sum(a.d, [=](int64_t i, auto lanes) { return lanes.load(x + i); });
        }
        normalise_row(x, total, a.gamma, a.beta, a.eps, a.d, row_of(a.y, r), a.mean + r, a.rstd + r);
    }
}

// With xhat = (x - mean) rstd and g = dy gamma:  dx += rstd (g - mean(g) - xhat mean(g xhat))
void layer_norm_bwd(const LayerNormBwd& a) {
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t r = 0; r < a.n; r++) {
        const float* dy = row_of(a.dy, r);
        const float* x = row_of(a.x, r);
        const float* gamma = a.gamma;
        float* dx = row_of(a.dx, r);
        const float mean = a.mean[r], rstd = a.rstd[r], share = 1.0f / (float)a.d;
        const bool accumulate = a.accumulate;
        const float mean_g = share * sum(a.d, [=](int64_t i, auto lanes) {
            return lanes.load(dy + i) * lanes.load(gamma + i);
        });
        const float mean_gx = share * sum(a.d, [=](int64_t i, auto lanes) {
            return lanes.load(dy + i) * lanes.load(gamma + i) * ((lanes.load(x + i) - mean) * rstd);
        });
        for_each(a.d, [=](int64_t i, auto lanes) {
            const Vec g = lanes.load(dy + i) * lanes.load(gamma + i);
            const Vec xhat = (lanes.load(x + i) - mean) * rstd;
            const Vec change = rstd * (g - mean_g - xhat * mean_gx);
            lanes.store(dx + i, accumulate ? lanes.load(dx + i) + change : change);
        });
    }
}

}  // namespace
}  // namespace cocoop_fast
