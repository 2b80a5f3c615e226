// The MLP's activation. A thread owns whole rows.
#pragma once

namespace cocoop_fast {
namespace {

// QuickGELU: act(u) = u s, act'(u) = s (1 + 1.702 u (1 - s)), with s = sigma(1.702 u)
struct QuickGelu {
    static Vec value(Vec u) { return u * sigmoid(1.702f * u); }
    static Vec derivative(Vec u) {
        const Vec s = sigmoid(1.702f * u);
        return s * (1.0f + (1.702f * u) * (1.0f - s));
    }
};

// GELU: act(u) = u Phi(u), act'(u) = Phi(u) + u phi(u)
struct Gelu {
    static Vec value(Vec u) { return u * normal(u).cdf; }
    static Vec derivative(Vec u) {
        const Normal at_u = normal(u);
        return at_u.cdf + u * at_u.density;
    }
};

template <class Act>
void activate(const ActivationFwd& a) {
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t r = 0; r < a.n; r++) {
        const float* u = row_of(a.u, r);
        float* out = row_of(a.out, r);
        for_each(a.width, [=](int64_t i, auto lanes) { lanes.store(out + i, Act::value(lanes.load(u + i))); });
    }
}

template <class Act>
void differentiate(const ActivationBwd& a) {
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t r = 0; r < a.n; r++) {
        const float* u = row_of(a.u, r);
        float* dg = row_of(a.dg, r);
        for_each(a.width, [=](int64_t i, auto lanes) {
            lanes.store(dg + i, lanes.load(dg + i) * Act::derivative(lanes.load(u + i)));
        });
    }
}

// out = act(u)
void activation_fwd(const ActivationFwd& a) {
    a.kind == Activation::gelu ? activate<Gelu>(a) : activate<QuickGelu>(a);
}

// dg *= act'(u)
void activation_bwd(const ActivationBwd& a) {
    a.kind == Activation::gelu ? differentiate<Gelu>(a) : differentiate<QuickGelu>(a);
}

}  // namespace
}  // namespace cocoop_fast
