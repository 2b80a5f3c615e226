// From text features to logits and the loss.
#pragma once

namespace cocoop_fast {
namespace {

// inverse_norm = 1 / |f|,  logit = scale (f . image) / |f|. A thread owns whole classes of an image.
void head_fwd(const HeadFwd& a) {
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t r = 0; r < a.batch * a.n_classes; r++) {
        const float* f = row_of(a.features, r);
        const float* image = a.image + (r / a.n_classes) * a.width;
        const float inverse_norm = 1.0f / __builtin_sqrtf(dot(f, f, a.width));
        a.inverse_norms[r] = inverse_norm;
        a.logits[r] = a.scale * (dot(f, image, a.width) * inverse_norm);
    }
}

// With t = f / |f|:  df = d_logit scale (image - t (t . image)) / |f|. A thread owns whole classes of an image.
void head_bwd(const HeadBwd& a) {
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t r = 0; r < a.batch * a.n_classes; r++) {
        const float* f = row_of(a.features, r);
        const float* image = a.image + (r / a.n_classes) * a.width;
        float* df = row_of(a.d_features, r);
        const float inverse_norm = a.inverse_norms[r];
        const float along_image = a.d_logits[r] * a.scale * inverse_norm;
        const float along_f = -a.d_logits[r] * a.logits[r] * inverse_norm * inverse_norm;
        for_each(a.width, [=](int64_t i, auto lanes) {
            lanes.store(df + i, along_image * lanes.load(image + i) + along_f * lanes.load(f + i));
        });
    }
}

// The sum of e^(z_k - shift) over from <= k < to.
inline double sum_of_exp(const float* z, int64_t from, int64_t to, float shift) {
    double total = 0.0;
    constexpr int64_t stretch = 1024;  // as many terms are summed in single precision
    for (; from < to; from += stretch) {
        const int64_t count = to - from < stretch ? to - from : stretch;
        total += sum(count, [=](int64_t i, auto lanes) { return exp(lanes.load(z + from + i) - shift); });
    }
    return total;
}

// loss = log(sum_k e^z_k) - z_label,  dz_k = grad softmax(z)_k, and dz_label is minus the sum of the others: where the
// label has nearly all of the probability p, p - 1 would be nothing but rounding. A thread owns whole images.
void cross_entropy(const CrossEntropy& a) {
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t b = 0; b < a.batch; b++) {
        const int64_t n = a.n_classes, label = a.labels[b];
        const float* z = a.logits + b * n;
        float highest = z[0];
        for (int64_t k = 1; k < n; k++) highest = z[k] > highest ? z[k] : highest;
        const double below = (double)highest - (double)z[label], own = __builtin_exp(-below);
        const double others = sum_of_exp(z, 0, label, highest) + sum_of_exp(z, label + 1, n, highest);
        if (a.losses != nullptr) a.losses[b] = __builtin_log1p(others + (own - 1.0)) + below;
        if (a.d_logits == nullptr) continue;
        float* dz = a.d_logits + b * n;
        const float share = (float)(a.grad / (others + own)), of_others = (float)others;
        for_each(n, [=](int64_t i, auto lanes) { lanes.store(dz + i, exp(lanes.load(z + i) - highest) * share); });
        dz[label] = -of_others * share;
    }
}

}  // namespace
}  // namespace cocoop_fast
