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

// loss = log(sum_k e^z_k) - z_label,  dz_k = grad (softmax(z)_k - [k = label]). A thread owns whole images.
void cross_entropy(const CrossEntropy& a) {
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t b = 0; b < a.batch; b++) {
        const int64_t n = a.n_classes;
        const float* z = a.logits + b * n;
        float highest = z[0];
        for (int64_t k = 1; k < n; k++) highest = z[k] > highest ? z[k] : highest;
        double total = 0.0;
        constexpr int64_t stretch = 1024;  // as many terms are summed in single precision
        for (int64_t from = 0; from < n; from += stretch) {
            const int64_t count = n - from < stretch ? n - from : stretch;
            total += sum(count, [=](int64_t i, auto lanes) { return exp(lanes.load(z + from + i) - highest); });
        }
        if (a.losses != nullptr) a.losses[b] = __builtin_log(total) + ((double)highest - (double)z[a.labels[b]]);
        if (a.d_logits == nullptr) continue;
        float* dz = a.d_logits + b * n;
        const float share = (float)(a.grad / total);
        for_each(n, [=](int64_t i, auto lanes) { lanes.store(dz + i, exp(lanes.load(z + i) - highest) * share); });
        dz[a.labels[b]] -= a.grad;
    }
}

}  // namespace
}  // namespace cocoop_fast
