// Every CPU kernel of every instruction set that this machine runs, on random shapes, against plain loops in double
// precision: for machines without Python and torch, such as emulated ones. tools/check_kernels.py compiles and runs it.
//
// Checked of every call: each number of each result, up to rounding; that nothing beside the results is written and
// nothing behind an array is read; that the bits are the same for 1, 2, 3 and 7 threads.
//
// Usage: check_kernels [CALLS [ISA]]: calls of each operation, and the instruction set that must be the one chosen.
#include <algorithm>
#include <memory>

#include "arrays.h"
#include "cpu/attention_plan.h"
#include "cpu/dispatch.h"

using namespace cocoop_fast;

namespace {

// Row lengths: below, at and above every vector; the tail of every width.
int64_t width_of(Random& random) { return random.coin() ? random.from(1, 40) : random.from(41, 200); }

// ---- layer_norm

void check_layer_norm(const Kernels& kernels, Report& report, Random& random) {
    const int64_t groups = random.from(1, 3), inner = random.from(1, 5), n = groups * inner, d = width_of(random);
    const bool adds = random.coin();
    Array x(random, groups, inner, d), residual(random, groups, inner, d), bias(random, 1, d), gamma(random, 1, d);
    Array beta(random, 1, d), y(random, groups, inner, d), mean(random, 1, n, true), rstd(random, 1, n, true);
    x.fill(random, 3, 2), residual.fill(random), bias.fill(random), gamma.fill(random), beta.fill(random);
    std::vector<float> moved;
    for (int64_t r = 0; r < n; r++) {
        for (int64_t i = 0; i < d; i++)
            moved.push_back(adds ? (x.at(r, i) + bias.at(0, i)) + residual.at(r, i) : x.at(r, i));
    }
    LayerNormFwd f{x.out(),
                   adds ? bias.data : nullptr,
                   residual.in(),
                   gamma.data,
                   beta.data,
                   y.out(),
                   mean.data,
                   rstd.data,
                   n,
                   d,
                   1e-5f,
                   1};
    report.run({&x, &y, &mean, &rstd}, [&](int threads) { f.threads = threads, kernels.layer_norm_fwd(f); });
    for (int64_t r = 0; r < n; r++) {
        double sum = 0, size = 0, squares = 0;
        for (int64_t i = 0; i < d; i++) {
            report.same("x", x.at(r, i), moved[r * d + i]);
            sum += moved[r * d + i], size = std::max(size, std::fabs((double)moved[r * d + i]));
        }
        const double m = sum / d;
        for (int64_t i = 0; i < d; i++) squares += (moved[r * d + i] - m) * (moved[r * d + i] - m);
        const double s = 1 / std::sqrt(squares / d + 1e-5f);
        report.close("mean", mean.at(0, r), m, d, size);
        report.close("rstd", rstd.at(0, r), s, d, s * (1 + size * size * s * s * kEps));
        for (int64_t i = 0; i < d; i++) {
            const double g = gamma.at(0, i), b = beta.at(0, i);
            report.close("y", y.at(r, i), (moved[r * d + i] - m) * s * g + b, d,
                         size * s * std::fabs(g) + std::fabs(b));
        }
    }

    Array dy(random, groups, inner, d), dx(random, groups, inner, d);
    dy.fill(random), dx.fill(random);
    const bool accumulate = random.coin();
    std::vector<float> before;
    for (int64_t r = 0; r < n; r++) {
        for (int64_t i = 0; i < d; i++) before.push_back(accumulate ? dx.at(r, i) : 0.0f);
    }
    LayerNormBwd b{dy.in(), x.in(), gamma.data, mean.data, rstd.data, dx.out(), accumulate, n, d, 1};
    report.run({&dx}, [&](int threads) { b.threads = threads, kernels.layer_norm_bwd(b); });
    for (int64_t r = 0; r < n; r++) {
        const double m = mean.at(0, r), s = rstd.at(0, r);
        double mean_g = 0, mean_gx = 0, size_g = 0, size_x = 0;
        for (int64_t i = 0; i < d; i++) {
            const double g = (double)dy.at(r, i) * gamma.at(0, i), xhat = (x.at(r, i) - m) * s;
            mean_g += g / d, mean_gx += g * xhat / d;
            size_g = std::max(size_g, std::fabs(g));
            size_x = std::max(size_x, (std::fabs((double)x.at(r, i)) + std::fabs(m)) * s);
        }
        for (int64_t i = 0; i < d; i++) {
            const double g = (double)dy.at(r, i) * gamma.at(0, i), xhat = (x.at(r, i) - m) * s, old = before[r * d + i];
            report.close("dx", dx.at(r, i), old + s * (g - mean_g - xhat * mean_gx), d,
                         std::fabs(old) + s * size_g * (2 + size_x * size_x));
        }
    }
}

// ---- activation

// The exact value or derivative at u, and the magnitude that its rounding errors go by.
struct Exact {
    double value, scale;
};

Exact activation(Activation kind, double u) {
    if (kind == Activation::quick_gelu) {
        const double s = 1 / (1 + std::exp(-(double)1.702f * u));
        return {u * s, std::fabs(u) * s * (1 + std::fabs(1.702 * u))};
    }
    const double cdf = std::erfc(-u * M_SQRT1_2) / 2;
    return {u * cdf, std::fabs(u) * cdf * (1 + u * u)};
}

Exact activation_derivative(Activation kind, double u) {
    if (kind == Activation::quick_gelu) {
        const double a = (double)1.702f * u, s = 1 / (1 + std::exp(-a));
        return {s * (1 + a * (1 - s)), s * (1 + std::fabs(a)) * (1 + std::fabs(a))};
    }
    const double cdf = std::erfc(-u * M_SQRT1_2) / 2, density = std::exp(-u * u / 2) / std::sqrt(2 * M_PI);
    return {cdf + u * density, (cdf + std::fabs(u) * density) * (1 + u * u)};
}

void check_activation(const Kernels& kernels, Report& report, Random& random) {
    const int64_t n = random.from(1, 6), width = width_of(random);
    const Activation kind = random.coin() ? Activation::gelu : Activation::quick_gelu;
    Array u(random, n, width), out(random, n, width), dg(random, n, width);
    u.fill(random, random.one_of({1.0f, 8.0f, 60.0f})), dg.fill(random);
    if (random.coin()) u.at(0, 0) = random.one_of({0.0f, -0.0f, NAN, 1e-38f, 88.0f, -88.0f, 1e4f, -1e4f});
    std::vector<float> before;
    for (int64_t r = 0; r < n; r++) before.insert(before.end(), &dg.at(r, 0), &dg.at(r, 0) + width);
    ActivationFwd f{u.in(), out.out(), kind, n, width, 1};
    report.run({&out}, [&](int threads) { f.threads = threads, kernels.activation_fwd(f); });
    ActivationBwd b{u.in(), dg.out(), kind, n, width, 1};
    report.run({&dg}, [&](int threads) { b.threads = threads, kernels.activation_bwd(b); });
    for (int64_t r = 0; r < n; r++) {
        for (int64_t i = 0; i < width; i++) {
            const Exact value = activation(kind, u.at(r, i)), slope = activation_derivative(kind, u.at(r, i));
            const double dy = before[r * width + i];
            report.close("value", out.at(r, i), value.value, 1, value.scale);
            report.close("gradient", dg.at(r, i), dy * slope.value, 1, std::fabs(dy) * slope.scale);
        }
    }
}

// ---- linear

void check_linear(const Kernels& kernels, Report& report, Random& random) {
    const int64_t n = random.below(8) ? random.from(1, 30) : random.from(150, 400);  // panels are copied for many rows
    const int64_t k = random.coin() ? random.from(1, 12) : random.from(13, 150);
    const int64_t width = random.coin() ? random.from(1, 40) : random.from(41, 100);
    const int64_t panels = (width + kPanelColumns - 1) / kPanelColumns;
    const bool packs = random.coin();  // the forward's layout, or the backward's
    Array x(random, n, k), lying(random, k, width), out(random, n, width), residual(random, n, width);
    Array packed(random, 1, panels * k * kPanelColumns), bias(random, 1, width), u(random, n, width);
    x.fill(random, 1 / std::sqrt((float)k)), lying.fill(random), residual.fill(random), bias.fill(random);

    Linear a{};
    a.x = x.const_matrix();
    a.weight = lying.data, a.panel_stride = kPanelColumns, a.weight_stride = lying.inner_stride;
    a.k_block = random.one_of<int64_t>({1, 3, 4, 8, 50, 512});
    std::vector<float> copies;
    if (random.coin()) {
        a.copied_rows = random.one_of<int64_t>({1, 4, 7, 64, 2048});
        copies.resize(7 * a.copied_rows * kPanelColumns);
        a.copies = copies.data();
    }
    if (packs) {
        Array weight(random, width, k);
        for (int64_t c = 0; c < width; c++) {
            for (int64_t i = 0; i < k; i++) weight.at(c, i) = lying.at(i, c);
        }
        PackWeight p{weight.data, weight.inner_stride, packed.data, k, width, 1};
        report.run({&packed}, [&](int threads) { p.threads = threads, kernels.pack_weight(p); });
        for (int64_t at = 0; at < packed.d; at++) {
            const int64_t column = at / (k * kPanelColumns) * kPanelColumns + at % kPanelColumns;
            report.same("packed", packed.at(0, at), column < width ? lying.at(at / kPanelColumns % k, column) : 0.0f);
        }
        a.weight = packed.data, a.panel_stride = k * kPanelColumns, a.weight_stride = kPanelColumns, a.k_block = k;
        a.copies = nullptr;
    }
    a.out = out.matrix();
    a.finish = random.one_of({LinearFinish::plain, LinearFinish::activation, LinearFinish::activation_gradient});
    a.kind = random.coin() ? Activation::gelu : Activation::quick_gelu;
    const bool plain = a.finish == LinearFinish::plain, activates = a.finish == LinearFinish::activation;
    if (activates || (plain && random.coin())) a.bias = bias.data;
    const bool adds = plain && random.coin(), in_place = adds && a.k_block >= k && a.copies == nullptr && random.coin();
    if (adds) a.residual = in_place ? out.const_matrix() : residual.const_matrix();
    if (in_place) {
        for (int64_t r = 0; r < n; r++) std::memcpy(&out.at(r, 0), &residual.at(r, 0), sizeof(float) * width);
    }
    if (a.finish == LinearFinish::activation_gradient) u.fill(random);
    const bool keeps_u = activates && random.coin();
    if (keeps_u || a.finish == LinearFinish::activation_gradient) a.u = u.matrix();
    a.n = n, a.k = k, a.width = width;
    report.run({&out, &u}, [&](int threads) { a.threads = threads, kernels.linear(a); });

    for (int64_t r = 0; r < n; r++) {
        for (int64_t c = 0; c < width; c++) {
            double z = 0, scale = 0;
            for (int64_t i = 0; i < k; i++) {
                z += (double)x.at(r, i) * lying.at(i, c), scale += std::fabs((double)x.at(r, i) * lying.at(i, c));
            }
            if (a.bias != nullptr) z += bias.at(0, c), scale += std::fabs(bias.at(0, c));
            if (adds) z += residual.at(r, c), scale += std::fabs(residual.at(r, c));
            if (plain) {
                report.close("out", out.at(r, c), z, k, scale);
            } else if (activates) {
                if (keeps_u) report.close("u", u.at(r, c), z, k, scale);
                const Exact value = activation(a.kind, z);
                report.close("out", out.at(r, c), value.value, k,
                             value.scale + 1.2 * scale);  // its slope is at most 1.13
            } else {
                const Exact slope = activation_derivative(a.kind, u.at(r, c));
                report.close("out", out.at(r, c), z * slope.value, k, 2 * scale * slope.scale);
            }
        }
    }

    // A row alone has the same bits.
    const int64_t r = random.below(n);
    Array alone(random, 1, width);
    if (in_place) std::memcpy(alone.data, &residual.at(r, 0), sizeof(float) * width);
    Linear one = a;
    one.n = 1, one.x.data = &x.at(r, 0), one.out = alone.matrix();
    if (adds) one.residual.data = in_place ? alone.data : &residual.at(r, 0);
    if (a.u.data != nullptr) one.u.data = &u.at(r, 0);
    report.run({&alone}, [&](int threads) { one.threads = threads, kernels.linear(one); });
    for (int64_t c = 0; c < width; c++) report.same("a row alone", alone.at(0, c), out.at(r, c));
}

// ---- tree_attention

std::vector<int64_t> random_tree(Random& random, int64_t nodes) {
    std::vector<int64_t> parent, open;
    for (int64_t j = 0; j < nodes; j++) {
        const int64_t up = random.coin() ? 0 : random.from(0, (int64_t)open.size());
        open.resize(open.size() - (size_t)up);
        parent.push_back(open.empty() ? -1 : open.back());
        open.push_back(j);
        if (open.size() > 12) open.resize(1);
    }
    return parent;
}

void check_attention(const Kernels& kernels, Report& report, Random& random) {
    const int64_t batch = random.from(1, 2), m = random.from(1, 5), nodes = random.from(1, 90);
    const int64_t heads = random.one_of<int64_t>({1, 3, 8, 9}), size = random.one_of<int64_t>({1, 3, 6, 16, 33, 64});
    const int64_t d = heads * size;
    const std::vector<int64_t> parent = random_tree(random, nodes);
    std::vector<int64_t> asked;
    const bool some = random.coin(), context_only = random.coin();
    if (some) {
        for (int64_t j = 0; j < nodes; j++) {
            if (random.below(3) == 0) asked.push_back(j);
        }
    }
    const AttentionPlan plan = some ? AttentionPlan(m, parent, asked) : AttentionPlan(m, parent);
    if (!some) {
        for (int64_t j = 0; j < nodes; j++) asked.push_back(j);
    }
    const int64_t asking = plan.n_ctx_queries(), rows = plan.n_queries(), terms = size + plan.max_slots() + rows;

    // In the first layer the images share the rows of the nodes.
    const int64_t images = context_only ? 1 : batch;
    Array q_ctx(random, batch, m, d), k_ctx(random, batch, m, d), v_ctx(random, batch, m, d);
    Array q_node(random, images, (int64_t)asked.size(), d), k_node(random, images, nodes, d),
        v_node(random, images, nodes, d);
    Array sos_k(random, 1, d), sos_v(random, 1, d), o(random, batch, rows, d), grad_o(random, batch, rows, d);
    for (Array* array : {&q_ctx, &k_ctx, &v_ctx, &q_node, &k_node, &v_node, &sos_k, &sos_v, &grad_o})
        array->fill(random);

    AttentionFwd f{};
    f.plan = plan.view(), f.batch = batch, f.heads = heads, f.head_size = size;
    if (asking > 0) f.q_ctx = q_ctx.part();
    f.k_ctx = k_ctx.part(), f.v_ctx = v_ctx.part();
    f.q_node = q_node.part(context_only), f.k_node = k_node.part(context_only), f.v_node = v_node.part(context_only);
    f.sos_k = sos_k.data, f.sos_v = sos_v.data, f.o = o.out_part();
    f.scratch_bytes = plan.scratch_bytes(heads);
    const std::unique_ptr<char[]> scratch(new char[7 * f.scratch_bytes + 1]);
    f.scratch = scratch.get();
    report.run({&o}, [&](int threads) { f.threads = threads, kernels.tree_attention_fwd(f); });

    AttentionBwd b{};
    b.context_only = context_only;
    const int64_t query_rows = context_only ? asking : rows, key_rows = context_only ? m : m + nodes;
    Array dq(random, batch, query_rows, d), dk(random, batch, key_rows, d), dv(random, batch, key_rows, d);
    Array p(random, 1, plan.slot_floats(batch, heads)), ds(random, 1, plan.slot_floats(batch, heads));
    Array partials(random, 1, plan.partial_floats(batch, heads, size));
    b.grad_o = grad_o.part(), b.dk = dk.out_part(), b.dv = dv.out_part();
    if (query_rows > 0) b.dq = dq.out_part();
    b.probabilities = p.data, b.d_scores = ds.data, b.partials = partials.data;
    report.run({&dq, &dk, &dv},
               [&](int threads) { b.fwd = f, b.fwd.threads = threads, kernels.tree_attention_bwd(b); });

    struct Sum {
        double value = 0, scale = 0;
        void add(double v, double s) { value += v, scale += s; }
    };
    for (int64_t image = 0; image < batch; image++) {
        for (int64_t h = 0; h < heads; h++) {
            std::vector<Sum> exact_dk((size_t)((m + nodes) * size)), exact_dv(exact_dk);
            for (int64_t i = 0; i < rows; i++) {
                const int64_t image_of_nodes = context_only ? 0 : image;
                std::vector<int64_t> keys{-1};  // SOS; then m context rows and the nodes, numbered in this order
                const int64_t node = i < asking ? -1 : asked[i - asking];
                for (int64_t c = 0; c < (node < 0 ? i + 1 : m); c++) keys.push_back(c);
                for (int64_t j = node; j >= 0; j = parent[j]) keys.push_back(m + j);
                const float* q = node < 0 ? &q_ctx.at(image * m + i, h * size)
                                          : &q_node.at(image_of_nodes * q_node.n / images + i - asking, h * size);
                const float* go = &grad_o.at(image * rows + i, h * size);
                const auto row = [&](Array& sos, Array& ctx, Array& node_rows, int64_t key) {
                    if (key < 0) return &sos.at(0, h * size);
                    if (key < m) return &ctx.at(image * m + key, h * size);
                    return &node_rows.at(image_of_nodes * nodes + key - m, h * size);
                };
                const double share = 1 / std::sqrt((double)size);
                std::vector<double> score, weight, dp, dp_size;
                double highest = -1e300, total = 0, certainty = 1, mean = 0, mean_size = 0;
                for (const int64_t key : keys) {
                    const float *k = row(sos_k, k_ctx, k_node, key), *v = row(sos_v, v_ctx, v_node, key);
                    double s = 0, s_size = 0, g = 0, g_size = 0;
                    for (int64_t c = 0; c < size; c++) {
                        s += share * q[c] * k[c], s_size += share * std::fabs((double)q[c] * k[c]);
                        g += (double)go[c] * v[c], g_size += std::fabs((double)go[c] * v[c]);
                    }
                    score.push_back(s), dp.push_back(g), dp_size.push_back(g_size);
                    highest = std::max(highest, s), certainty = std::max(certainty, 1 + 2 * s_size);
                }
                for (const double s : score) weight.push_back(std::exp(s - highest)), total += weight.back();
                for (size_t s = 0; s < keys.size(); s++) {
                    weight[s] /= total;
                    mean += weight[s] * dp[s], mean_size += weight[s] * dp_size[s];
                }
                for (int64_t c = 0; c < size; c++) {
                    Sum out, grad_q;
                    for (size_t s = 0; s < keys.size(); s++) {
                        const double k = row(sos_k, k_ctx, k_node, keys[s])[c],
                                     v = row(sos_v, v_ctx, v_node, keys[s])[c];
                        const double d_score = share * weight[s] * (dp[s] - mean);
                        const double d_score_size = share * weight[s] * certainty * (dp_size[s] + mean_size);
                        out.add(weight[s] * v, weight[s] * certainty * std::fabs(v));
                        grad_q.add(d_score * k, d_score_size * std::fabs(k));
                        if (keys[s] < 0) continue;
                        exact_dk[keys[s] * size + c].add(d_score * q[c], d_score_size * std::fabs(q[c]));
                        exact_dv[keys[s] * size + c].add(weight[s] * go[c], weight[s] * certainty * std::fabs(go[c]));
                    }
                    report.close("o", o.at(image * rows + i, h * size + c), out.value, terms, out.scale);
                    if (i < query_rows) {
                        report.close("dq", dq.at(image * query_rows + i, h * size + c), grad_q.value, terms,
                                     grad_q.scale);
                    }
                }
            }
            for (int64_t key = 0; key < key_rows; key++) {
                for (int64_t c = 0; c < size; c++) {
                    const Sum &k = exact_dk[key * size + c], &v = exact_dv[key * size + c];
                    report.close("dk", dk.at(image * key_rows + key, h * size + c), k.value, terms, k.scale);
                    report.close("dv", dv.at(image * key_rows + key, h * size + c), v.value, terms, v.scale);
                }
            }
        }
    }
}

// ---- assemble_prompts

void check_prompts(const Kernels& kernels, Report& report, Random& random) {
    const int64_t batch = random.from(1, 5), m = random.from(1, 5), n = batch * m, d = width_of(random);
    const bool of_row = random.coin(), shared = random.coin();
    Array vectors(random, m, d, true), shift(random, of_row ? n : batch, d, true), position(random, m, d, true);
    Array gamma(random, 1, d), beta(random, 1, d), x(random, batch, m, d), y(random, batch, m, d);
    Array mean(random, 1, n), rstd(random, 1, n), dx(random, batch, m, d);
    Array d_vectors(random, m, d, true), d_shift(random, of_row ? n : batch, d, true);
    for (Array* array : {&vectors, &shift, &position, &gamma, &beta, &dx}) array->fill(random);
    AssemblePromptsFwd f{shared ? vectors.data : nullptr,
                         shift.data,
                         of_row,
                         position.data,
                         gamma.data,
                         beta.data,
                         x.out(),
                         y.out(),
                         mean.data,
                         rstd.data,
                         batch,
                         m,
                         d,
                         1e-5f,
                         1};
    report.run({&x, &y, &mean, &rstd}, [&](int threads) { f.threads = threads, kernels.assemble_prompts_fwd(f); });
    AssemblePromptsBwd b{dx.in(), shared ? d_vectors.data : nullptr, d_shift.data, of_row, batch, m, d, 1};
    report.run({&d_vectors, &d_shift}, [&](int threads) { b.threads = threads, kernels.assemble_prompts_bwd(b); });

    // Its LayerNorm is layer_norm's, bit for bit.
    Array y_again(random, batch, m, d), mean_again(random, 1, n), rstd_again(random, 1, n);
    const LayerNormFwd norm{x.out(),         nullptr,         {}, gamma.data, beta.data, y_again.out(),
                            mean_again.data, rstd_again.data, n,  d,          1e-5f,     1};
    kernels.layer_norm_fwd(norm);
    for (int64_t r = 0; r < n; r++) {
        for (int64_t i = 0; i < d; i++) {
            const float vector = shared ? vectors.at(r % m, i) : 0.0f;
            report.same("x", x.at(r, i), (vector + shift.at(of_row ? r : r / m, i)) + position.at(r % m, i));
            report.same("y", y.at(r, i), y_again.at(r, i));
            if (of_row) report.same("d_shift", d_shift.at(r, i), dx.at(r, i));
        }
        report.same("mean", mean.at(0, r), mean_again.at(0, r));
        report.same("rstd", rstd.at(0, r), rstd_again.at(0, r));
    }
    for (int64_t i = 0; i < d; i++) {
        for (int64_t c = 0; shared && c < m; c++) {
            double sum = 0, size = 0;
            for (int64_t image = 0; image < batch; image++)
                sum += dx.at(image * m + c, i), size += std::fabs(dx.at(image * m + c, i));
            report.close("d_vectors", d_vectors.at(c, i), sum, batch, size);
        }
        for (int64_t image = 0; !of_row && image < batch; image++) {
            double sum = 0, size = 0;
            for (int64_t c = 0; c < m; c++) sum += dx.at(image * m + c, i), size += std::fabs(dx.at(image * m + c, i));
            report.close("d_shift", d_shift.at(image, i), sum, m, size);
        }
    }

    const int64_t classes = random.from(1, 4), suffix_rows = random.from(0, 3), length = 1 + m + suffix_rows;
    Array prefix(random, classes, d, true), suffix(random, classes * suffix_rows, d, true);
    Array prompts(random, batch * classes * length, d, true);
    prefix.fill(random), suffix.fill(random);
    Array context(random, n, d, true);
    context.fill(random);
    AssembleDense dense{context.data, prefix.data, suffix.data, prompts.data, batch, classes, m, length, d, 1};
    report.run({&prompts}, [&](int threads) { dense.threads = threads, kernels.assemble_dense(dense); });
    for (int64_t r = 0; r < prompts.n; r++) {
        const int64_t at = r % length, k = r / length % classes, image = r / length / classes;
        for (int64_t i = 0; i < d; i++) {
            report.same("prompt", prompts.at(r, i),
                        at == 0   ? prefix.at(k, i)
                        : at <= m ? context.at(image * m + at - 1, i)
                                  : suffix.at(k * suffix_rows + at - 1 - m, i));
        }
    }
}

// ---- head

void check_head(const Kernels& kernels, Report& report, Random& random) {
    const int64_t batch = random.from(1, 3), classes = random.from(1, 40), n = batch * classes,
                  width = width_of(random);
    Array features(random, batch, classes, width), image(random, batch, width, true),
        logits(random, batch, classes, true);
    Array norms(random, batch, classes, true), d_logits(random, batch, classes, true),
        df(random, batch, classes, width);
    features.fill(random), image.fill(random, 1 / std::sqrt((float)width)), d_logits.fill(random);
    const float scale = 14.0f;
    HeadFwd f{features.in(), image.data, scale, logits.data, norms.data, batch, classes, width, 1};
    report.run({&logits, &norms}, [&](int threads) { f.threads = threads, kernels.head_fwd(f); });
    HeadBwd b{features.in(), image.data, logits.data, norms.data, d_logits.data, df.out(), scale,
              batch,         classes,    width,       1};
    report.run({&df}, [&](int threads) { b.threads = threads, kernels.head_bwd(b); });
    for (int64_t r = 0; r < n; r++) {
        double squares = 0, dot = 0, dot_size = 0;
        for (int64_t i = 0; i < width; i++) {
            const double x = features.at(r, i), y = image.at(r / classes, i);
            squares += x * x, dot += x * y, dot_size += std::fabs(x * y);
        }
        const double norm = 1 / std::sqrt(squares), d_logit = d_logits.data[r];
        report.close("inverse norm", norms.data[r], norm, width, norm);
        report.close("logit", logits.data[r], scale * dot * norm, width, scale * dot_size * norm);
        for (int64_t i = 0; i < width; i++) {
            const double x = features.at(r, i), y = image.at(r / classes, i);
            report.close("d_features", df.at(r, i), d_logit * scale * norm * (y - x * norm * norm * dot), width,
                         std::fabs(d_logit) * scale * norm * (std::fabs(y) + std::fabs(x) * norm * norm * dot_size));
        }
    }
}

void check_cross_entropy(const Kernels& kernels, Report& report, Random& random) {
    const int64_t batch = random.from(1, 4),
                  classes = random.below(4) == 0 ? random.from(1000, 2500) : random.from(1, 60);
    Array z(random, batch, classes, true), dz(random, batch, classes, true), losses(random, 1, 2 * batch);
    z.fill(random, random.one_of({1.0f, 10.0f, 60.0f}));
    std::vector<int64_t> labels;
    for (int64_t image = 0; image < batch; image++) labels.push_back(random.below(classes));
    std::vector<double> values(batch);
    CrossEntropy a{z.data, labels.data(), values.data(), dz.data, 0.25f, batch, classes, 1};
    report.run({&dz, &losses}, [&](int threads) {
        a.threads = threads, kernels.cross_entropy(a);
        std::memcpy(losses.data, values.data(), sizeof(double) * batch);  // whose bits are then compared
    });
    for (int64_t image = 0; image < batch; image++) {
        double highest = -1e300, lowest = 1e300, total = 0, others = 0;
        for (int64_t k = 0; k < classes; k++) {
            highest = std::max(highest, (double)z.at(image, k)), lowest = std::min(lowest, (double)z.at(image, k));
        }
        for (int64_t k = 0; k < classes; k++) total += std::exp(z.at(image, k) - highest);
        const double size = 1 + highest - lowest;
        report.close("loss", (float)values[image], std::log(total) + highest - z.at(image, labels[image]), 1024, size);
        for (int64_t k = 0; k < classes; k++) {
            if (k != labels[image]) others += std::exp(z.at(image, k) - highest);
        }
        for (int64_t k = 0; k < classes; k++) {
            const bool is_label = k == labels[image];
            const double share = is_label ? others / total : std::exp(z.at(image, k) - highest) / total;
            report.close("d_logits", dz.at(image, k), is_label ? -0.25 * share : 0.25 * share, 1024, 0.25 * share * size);
        }
    }
}

// ---- move_rows, peak

void check_rows(const Kernels& kernels, Report& report, Random& random) {
    const int64_t batch = random.from(1, 3), rows = random.from(1, 12), n = random.from(1, rows), d = width_of(random);
    std::vector<int64_t> index(rows);
    for (int64_t i = 0; i < rows; i++) index[i] = i;
    for (int64_t i = rows - 1; i > 0; i--) std::swap(index[i], index[random.below(i + 1)]);
    Array many(random, batch, rows, d), few(random, batch, n, d);
    many.fill(random);
    MoveRows gather{many.in(), few.out(), index.data(), batch, n, d, 1};
    report.run({&few}, [&](int threads) { gather.threads = threads, kernels.gather_rows(gather); });
    for (int64_t r = 0; r < few.n; r++) {
        for (int64_t i = 0; i < d; i++) report.same("gathered", few.at(r, i), many.at(r / n * rows + index[r % n], i));
    }
    Array sums(random, batch, rows, d);
    for (int64_t r = 0; r < many.n; r++) {
        for (int64_t i = 0; i < d; i++) sums.at(r, i) = many.at(r, i);
    }
    few.fill(random);
    MoveRows add{few.in(), sums.out(), index.data(), batch, n, d, 1};
    report.run({&sums}, [&](int threads) { add.threads = threads, kernels.add_rows(add); });
    for (int64_t r = 0; r < many.n; r++) {
        const int64_t from = std::find(index.begin(), index.begin() + n, r % rows) - index.begin();
        for (int64_t i = 0; i < d; i++) {
            const float added = from < n ? many.at(r, i) + few.at(r / rows * n + from, i) : many.at(r, i);
            report.same("added to", sums.at(r, i), added);
        }
    }
}

void check_peak(const Kernels& kernels, Report& report, Random& random) {
    const int threads = (int)random.from(1, 7);
    std::vector<float> out(threads);
    PeakLoop a{};
    a.out = out.data(), a.threads = threads, a.rounds = random.from(1, 40), a.factor = 0.999f, a.term = 0.001f;
    kernels.multiply_add_loop(a);
    double sum = 0;
    for (int c = 0; c < kernels.peak_chains; c++) {
        double chain = 1 + c;
        for (int64_t r = 0; r < a.rounds; r++) {
            chain = std::string(kernels.name) == "neon" ? chain + (double)a.factor * a.term : chain * a.factor + a.term;
        }
        sum += kernels.lanes * chain;
    }
    for (const float value : out) report.close("chains", value, sum, (double)a.rounds, sum);

    Array data(random, 1, random.from(1, 3000));
    data.fill(random);
    a.data = data.data, a.n = data.d;
    kernels.read_loop(a);
    double total = 0, exact = 0, size = 0;
    for (const float part : out) total += part;
    for (int64_t i = 0; i < a.n; i++) exact += data.at(0, i), size += std::fabs(data.at(0, i));
    report.close("numbers read", (float)total, exact, (double)a.n, size);
}

struct Check {
    const char* op;
    void (*check)(const Kernels&, Report&, Random&);
};
constexpr Check kChecks[] = {
    {"layer_norm", check_layer_norm},       {"activation", check_activation},    {"linear", check_linear},
    {"tree_attention", check_attention},    {"assemble_prompts", check_prompts}, {"head", check_head},
    {"cross_entropy", check_cross_entropy}, {"move_rows", check_rows},           {"peak", check_peak},
};

}  // namespace

int main(int argc, char** argv) {
    const int64_t calls = argc > 1 ? std::atol(argv[1]) : 40;
    if (calls < 1 || argc > 3) {
        std::fprintf(stderr, "usage: check_kernels [CALLS [ISA]]\n");
        return 2;
    }
    if (argc > 2 && std::string(kernels().name) != argv[2]) {
        std::printf("WRONG the kernels chosen here are %s, not %s\n", kernels().name, argv[2]);
        return 1;
    }
    int64_t failures = 0;
    for (const std::string& isa : available_isas()) {
        set_isa(isa);
        Report report(kernels().name);
        for (const Check& check : kChecks) {
            report.begin(check.op);
            for (int64_t call = 0; call < calls; call++) {
                Random random((uint32_t)call);
                check.check(kernels(), report, random);
            }
            report.end();
        }
        failures += report.failures;
    }
    if (failures > 0) std::printf("%ld numbers or calls are WRONG\n", (long)failures);
    return failures > 0 ? 1 : 0;
}
