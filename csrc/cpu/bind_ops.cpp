// The CPU operations as Python sees them: numpy float32 arrays in, results written into arrays of the caller.
// Everything is checked here; the kernels then run without the GIL and cannot fail.
#include "cpu/bind_ops.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cmath>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "cpu/arrays.h"
#include "cpu/attention_plan.h"
#include "cpu/dispatch.h"
#include "cpu/recording.h"

namespace py = pybind11;

namespace cocoop_fast {
namespace {

using Optional = std::optional<py::array>;

// Makes a call now, and leaves it in the recording if there is one.
template <class Call>
void make(const Call& call) {
    {
        const Kernels& table = kernels();
        py::gil_scoped_release release;
        call(table);
    }
    if (Recording* recording = Recording::current()) recording->add(call);
}

// `owned` is what `args` points to beside the caller's arrays.
template <class Args>
void run(void (*Kernels::*kernel)(const Args&), const Args& args, const std::shared_ptr<const void>& owned = nullptr) {
    make([kernel, args, owned](const Kernels& table) { (table.*kernel)(args); });
}

// Of something that goes with the call, so that it cannot be made again.
template <class Args>
void run_once(void (*Kernels::*kernel)(const Args&), const Args& args) {
    if (Recording::current()) throw std::logic_error("an operation whose result goes with the call is not recorded");
    run(kernel, args);
}

// ---- layer_norm

void layer_norm_fwd(py::array x, const Optional& bias, const Optional& residual, const py::array& gamma,
                    const py::array& beta, float eps, py::array y, py::array mean, py::array rstd) {
    const RowCount rows = count_rows("x", x);
    require(bias.has_value() == residual.has_value(), "residual", "be None exactly if `bias` is",
            residual ? text_of(shape_of(*residual)) : "None");
    LayerNormFwd a{};
    if (bias) {
        a.x = rows_out("x", x, rows);
        a.bias = dense_in("bias", *bias, "(d,)", {rows.d});
        a.residual = rows_in("residual", *residual, rows);
    } else {
        const InRows in = rows_in("x", x, rows);
        a.x = {const_cast<float*>(in.data), in.inner, in.outer_stride, in.inner_stride};  // only read
    }
    a.gamma = dense_in("gamma", gamma, "(d,)", {rows.d});
    a.beta = dense_in("beta", beta, "(d,)", {rows.d});
    a.y = rows_out("y", y, rows);
    a.mean = dense_out("mean", mean, "(n,)", {rows.n});
    a.rstd = dense_out("rstd", rstd, "(n,)", {rows.n});
    require(eps >= 0, "eps", "not be negative", std::to_string(eps));
    a.n = rows.n;
    a.d = rows.d;
    a.eps = eps;
    a.threads = threads_for(rows.n * rows.d);
    run(&Kernels::layer_norm_fwd, a);
}

void layer_norm_bwd(const py::array& dy, const py::array& x, const py::array& gamma, const py::array& mean,
                    const py::array& rstd, py::array dx, bool accumulate) {
    const RowCount rows = count_rows("x", x);
    LayerNormBwd a;
    a.dy = rows_in("dy", dy, rows);
    a.x = rows_in("x", x, rows);
    a.gamma = dense_in("gamma", gamma, "(d,)", {rows.d});
    a.mean = dense_in("mean", mean, "(n,)", {rows.n});
    a.rstd = dense_in("rstd", rstd, "(n,)", {rows.n});
    a.dx = rows_out("dx", dx, rows);
    a.accumulate = accumulate;
    a.n = rows.n;
    a.d = rows.d;
    a.threads = threads_for(rows.n * rows.d);
    run(&Kernels::layer_norm_bwd, a);
}

// ---- activation

Activation activation_kind(const std::string& kind) {
    require(kind == "quick_gelu" || kind == "gelu", "kind", "be quick_gelu or gelu", "'" + kind + "'");
    return kind == "gelu" ? Activation::gelu : Activation::quick_gelu;
}

void activation_fwd(const py::array& u, const std::string& kind, py::array out) {
    const RowCount rows = count_rows("u", u);
    ActivationFwd a;
    a.u = rows_in("u", u, rows);
    a.out = rows_out("out", out, rows);
    a.kind = activation_kind(kind);
    a.n = rows.n;
    a.width = rows.d;
    a.threads = threads_for(4 * rows.n * rows.d);
    run(&Kernels::activation_fwd, a);
}

void activation_bwd(const py::array& u, const std::string& kind, py::array dg) {
    const RowCount rows = count_rows("u", u);
    ActivationBwd a;
    a.u = rows_in("u", u, rows);
    a.dg = rows_out("dg", dg, rows);
    a.kind = activation_kind(kind);
    a.n = rows.n;
    a.width = rows.d;
    a.threads = threads_for(4 * rows.n * rows.d);
    run(&Kernels::activation_bwd, a);
}

// ---- linear

// The result's shape (n, width) and the shape of x, (n, k), fix all others.
Linear linear_arguments(const py::array& x, py::array& out) {
    require(x.ndim() == 2, "x", "have shape (n, k)", text_of(shape_of(x)));
    require(out.ndim() == 2 && out.shape(0) == x.shape(0), "out",
            "have shape (n, width) with " + std::to_string(x.shape(0)) + " rows", text_of(shape_of(out)));
    Linear a{};
    a.n = x.shape(0);
    a.k = x.shape(1);
    a.width = out.shape(1);
    a.x = matrix_in("x", x, a.n, a.k);
    a.out = matrix_out("out", out, a.n, a.width);
    a.threads = threads_for(a.n * a.width * a.k / 64);
    return a;
}

void use_packed(Linear& a, const py::array& packed) {
    const int64_t panels = (a.width + kPanelColumns - 1) / kPanelColumns;
    a.weight = dense_in("packed", packed, "(ceil(width / 32), k, 32)", {panels, a.k, kPanelColumns});
    a.panel_stride = a.k * kPanelColumns;
    a.weight_stride = kPanelColumns;
    a.k_block = a.k;
}

// At least so many floats, from the beginning of a cache line; a Python thread's own, and kept.
float* scratch(int64_t floats) {
    constexpr int64_t line = 64;
    thread_local std::vector<float> memory;
    const auto size = (size_t)(floats + line / (int64_t)sizeof(float));
    if (memory.size() < size) memory.resize(size);
    return (float*)(((uintptr_t)memory.data() + line - 1) / line * line);
}

void use_weight(Linear& a, const py::array& weight) {
    constexpr int64_t block = 512;  // products whose rows of W stay in the second-level cache, where they lie
    constexpr int64_t copied = 2048;  // and in copies: no more than its results, so that few are added to in memory
    const Matrix<const float> rows = matrix_in("weight", weight, a.k, a.width);
    a.weight = rows.data;
    a.panel_stride = kPanelColumns;
    a.weight_stride = rows.stride;
    a.k_block = block;
    a.copied_rows = std::min(a.k, copied);
}

// The copies are in memory of the thread that makes the call.
void run_linear(const Linear& args) {
    make([args](const Kernels& table) {
        Linear a = args;
        if (a.copied_rows > 0) a.copies = scratch(a.threads * a.copied_rows * kPanelColumns);
        table.linear(a);
    });
}

void linear_fwd(const py::array& x, const py::array& packed, const Optional& bias, const Optional& residual,
                py::array out) {
    Linear a = linear_arguments(x, out);
    use_packed(a, packed);
    a.finish = LinearFinish::plain;
    if (bias) a.bias = dense_in("bias", *bias, "(width,)", {a.width});
    if (residual) a.residual = matrix_in("residual", *residual, a.n, a.width);
    run_linear(a);
}

void linear_bwd(const py::array& dy, const py::array& weight, py::array dx) {
    Linear a = linear_arguments(dy, dx);
    use_weight(a, weight);
    a.finish = LinearFinish::plain;
    run_linear(a);
}

void linear_activation_fwd(const py::array& x, const py::array& packed, const py::array& bias,
                           const std::string& kind, std::optional<py::array> u, py::array out) {
    Linear a = linear_arguments(x, out);
    use_packed(a, packed);
    a.finish = LinearFinish::activation;
    a.kind = activation_kind(kind);
    a.bias = dense_in("bias", bias, "(width,)", {a.width});
    if (u) a.u = matrix_out("u", *u, a.n, a.width);
    run_linear(a);
}

void linear_activation_bwd(const py::array& dy, const py::array& weight, const py::array& u, const std::string& kind,
                           py::array du) {
    Linear a = linear_arguments(dy, du);
    use_weight(a, weight);
    a.finish = LinearFinish::activation_gradient;
    a.kind = activation_kind(kind);
    const Matrix<const float> rows = matrix_in("u", u, a.n, a.width);
    a.u = {const_cast<float*>(rows.data), rows.stride};  // only read
    run_linear(a);
}

void pack_weight(const py::array& weight, py::array packed) {
    require(weight.ndim() == 2, "weight", "have shape (width, k)", text_of(shape_of(weight)));
    PackWeight a;
    a.width = weight.shape(0);
    a.k = weight.shape(1);
    const Matrix<const float> rows = matrix_in("weight", weight, a.width, a.k);
    a.weight = rows.data;
    a.weight_stride = rows.stride;
    const int64_t panels = (a.width + kPanelColumns - 1) / kPanelColumns;
    a.packed = dense_out("packed", packed, "(ceil(width / 32), k, 32)", {panels, a.k, kPanelColumns});
    a.threads = threads_for(a.width * a.k);
    run(&Kernels::pack_weight, a);
}

// ---- tree_attention

AttentionPlan make_plan(int64_t n_ctx, const py::array& parent, const Optional& queries) {
    if (!queries) return AttentionPlan(n_ctx, integers("parent", parent));
    return AttentionPlan(n_ctx, integers("parent", parent), integers("queries", *queries));
}

// Floats of tree_attention_bwd's workspace: probabilities, score gradients, partial sums.
int64_t workspace_floats(const AttentionPlan& plan, int64_t batch, int64_t heads, int64_t head_size) {
    require(batch >= 0, "batch", "not be negative", std::to_string(batch));
    require(heads >= 1, "heads", "be at least 1", std::to_string(heads));
    require(head_size >= 1, "head_size", "be at least 1", std::to_string(head_size));
    return 2 * plan.slot_floats(batch, heads) + plan.partial_floats(batch, heads, head_size);
}

// The inputs that forward and backward share. `rows`: of a result, (B, n_queries, d).
AttentionFwd attention_inputs(const AttentionPlan& plan, const std::string& result_name, const py::array& result,
                              const Optional& q_ctx, const py::array& k_ctx, const py::array& v_ctx,
                              const py::array& q_node, const py::array& k_node, const py::array& v_node,
                              const py::array& sos_k, const py::array& sos_v, int64_t heads) {
    const std::string layout = plan.n_ctx_queries() ? "(B, M + N, d)" : "(B, Q, d)";
    require(result.ndim() == 3 && result.shape(1) == plan.n_queries() && result.shape(2) >= 1, result_name,
            "have shape " + layout + " with " + std::to_string(plan.n_queries()) + " rows",
            text_of(shape_of(result)));
    const int64_t batch = result.shape(0), d = result.shape(2);
    const int64_t m = plan.n_ctx(), n = plan.n_nodes(), node_queries = plan.n_queries() - plan.n_ctx_queries();
    require(heads >= 1 && d % heads == 0, "heads", "divide the width " + std::to_string(d), std::to_string(heads));
    require(!plan.n_ctx_queries() == !q_ctx, "q_ctx",
            plan.n_ctx_queries() ? "be (B, M, d): the plan has queries of the context rows"
                                 : "be None: the plan has queries of nodes alone",
            q_ctx ? text_of(shape_of(*q_ctx)) : "None");
    AttentionFwd a{};
    a.plan = plan.view();
    a.batch = batch;
    a.heads = heads;
    a.head_size = d / heads;
    if (q_ctx) a.q_ctx = part_in("q_ctx", *q_ctx, "(B, M, d)", batch, m, d);
    a.k_ctx = part_in("k_ctx", k_ctx, "(B, M, d)", batch, m, d);
    a.v_ctx = part_in("v_ctx", v_ctx, "(B, M, d)", batch, m, d);
    a.q_node = part_in("q_node", q_node, plan.n_ctx_queries() ? "(B, N, d)" : "(B, Q, d)", batch, node_queries, d);
    a.k_node = part_in("k_node", k_node, "(B, N, d)", batch, n, d);
    a.v_node = part_in("v_node", v_node, "(B, N, d)", batch, n, d);
    a.sos_k = dense_in("sos_k", sos_k, "(d,)", {d});
    a.sos_v = dense_in("sos_v", sos_v, "(d,)", {d});
    a.threads = threads_for(plan.slot_floats(batch, d));
    return a;
}

// Runs with scratch memory for each thread: a few kilobytes, whatever the size of the inputs.
template <class Args>
void run_with_scratch(const AttentionPlan& plan, void (*Kernels::*kernel)(const Args&), Args& args,
                      AttentionFwd& inputs) {
    inputs.scratch_bytes = plan.scratch_bytes(inputs.heads);
    const std::shared_ptr<char[]> scratch(new char[inputs.threads * inputs.scratch_bytes + 1]);
    inputs.scratch = scratch.get();
    run(kernel, args, scratch);
}

void tree_attention_fwd(const AttentionPlan& plan, const Optional& q_ctx, const py::array& k_ctx,
                        const py::array& v_ctx, const py::array& q_node, const py::array& k_node,
                        const py::array& v_node, const py::array& sos_k, const py::array& sos_v, int64_t heads,
                        py::array o) {
    AttentionFwd a =
        attention_inputs(plan, "o", o, q_ctx, k_ctx, v_ctx, q_node, k_node, v_node, sos_k, sos_v, heads);
    a.o = part_out("o", o, "(B, M + N or Q, d)", a.batch, plan.n_queries(), heads * a.head_size);
    run_with_scratch(plan, &Kernels::tree_attention_fwd, a, a);
}

void tree_attention_bwd(const AttentionPlan& plan, const py::array& grad_o, const Optional& q_ctx,
                        const py::array& k_ctx, const py::array& v_ctx, const py::array& q_node,
                        const py::array& k_node, const py::array& v_node, const py::array& sos_k,
                        const py::array& sos_v, int64_t heads, Optional dq, py::array dk, py::array dv,
                        py::array workspace, bool context_only) {
    AttentionBwd a{};
    a.fwd = attention_inputs(plan, "grad_o", grad_o, q_ctx, k_ctx, v_ctx, q_node, k_node, v_node, sos_k, sos_v, heads);
    const int64_t batch = a.fwd.batch, m = plan.n_ctx(), head_size = a.fwd.head_size, d = heads * head_size;
    const int64_t query_rows = context_only ? plan.n_ctx_queries() : plan.n_queries();
    const int64_t key_rows = context_only ? m : m + plan.n_nodes();
    const bool needs_dq = query_rows > 0 || !context_only;
    require(needs_dq == dq.has_value(), "dq",
            needs_dq ? "be an array" : "be None: with context_only, queries of nodes alone have no gradient",
            dq ? text_of(shape_of(*dq)) : "None");
    const std::string key_layout = context_only ? "(B, M, d)" : "(B, M + N, d)";
    a.grad_o = part_in("grad_o", grad_o, "(B, M + N or Q, d)", batch, plan.n_queries(), d);
    if (dq) {
        a.dq = part_out("dq", *dq, context_only ? "(B, M, d)" : "(B, M + N or Q, d)", batch, query_rows, d);
    }
    a.dk = part_out("dk", dk, key_layout, batch, key_rows, d);
    a.dv = part_out("dv", dv, key_layout, batch, key_rows, d);
    a.context_only = context_only;
    const int64_t needed = workspace_floats(plan, batch, heads, head_size);
    require(workspace.ndim() == 1 && workspace.shape(0) >= needed, "workspace",
            "have at least plan.workspace_floats(batch, heads, head_size) = " + std::to_string(needed) + " numbers",
            text_of(shape_of(workspace)));
    float* free = dense_out("workspace", workspace, "(n,)", {workspace.shape(0)});
    a.probabilities = free;
    a.d_scores = a.probabilities + plan.slot_floats(batch, heads);
    a.partials = a.d_scores + plan.slot_floats(batch, heads);
    run_with_scratch(plan, &Kernels::tree_attention_bwd, a, a.fwd);
}

// ---- assemble_prompts

// (B, d): false; (B, M, d): true.
bool shift_is_of_row(const std::string& name, const py::array& shift) {
    require(shift.ndim() == 2 || shift.ndim() == 3, name, "have shape (B, d) or (B, M, d)", text_of(shape_of(shift)));
    return shift.ndim() == 3;
}

Shape shift_shape(bool of_row, int64_t batch, int64_t m, int64_t d) {
    return of_row ? Shape{batch, m, d} : Shape{batch, d};
}

void assemble_prompts_fwd(const Optional& vectors, const py::array& shift, const py::array& position,
                          const py::array& gamma, const py::array& beta, float eps, py::array x, py::array y,
                          py::array mean, py::array rstd) {
    require(position.ndim() == 2 && position.shape(0) >= 1 && position.shape(1) >= 1, "position",
            "have shape (M, d) with M, d >= 1", text_of(shape_of(position)));
    AssemblePromptsFwd a{};
    a.shift_of_row = shift_is_of_row("shift", shift);
    const int64_t m = position.shape(0), d = position.shape(1), batch = shift.shape(0);
    if (vectors) a.vectors = dense_in("vectors", *vectors, "(M, d)", {m, d});
    a.shift = dense_in("shift", shift, a.shift_of_row ? "(B, M, d)" : "(B, d)",
                       shift_shape(a.shift_of_row, batch, m, d));
    a.position = dense_in("position", position, "(M, d)", {m, d});
    a.gamma = dense_in("gamma", gamma, "(d,)", {d});
    a.beta = dense_in("beta", beta, "(d,)", {d});
    a.x = rows_out("x", x, {batch * m, d});
    a.y = rows_out("y", y, {batch * m, d});
    a.mean = dense_out("mean", mean, "(B * M,)", {batch * m});
    a.rstd = dense_out("rstd", rstd, "(B * M,)", {batch * m});
    require(eps >= 0, "eps", "not be negative", std::to_string(eps));
    a.batch = batch;
    a.n_ctx = m;
    a.d = d;
    a.eps = eps;
    a.threads = threads_for(batch * m * d);
    run(&Kernels::assemble_prompts_fwd, a);
}

void assemble_prompts_bwd(const py::array& dx, std::optional<py::array> d_vectors, py::array d_shift) {
    require(dx.ndim() == 3 && dx.shape(1) >= 1 && dx.shape(2) >= 1, "dx", "have shape (B, M, d) with M, d >= 1",
            text_of(shape_of(dx)));
    const int64_t batch = dx.shape(0), m = dx.shape(1), d = dx.shape(2);
    AssemblePromptsBwd a{};
    a.shift_of_row = shift_is_of_row("d_shift", d_shift);
    a.dx = rows_in("dx", dx, {batch * m, d});
    if (d_vectors) a.d_vectors = dense_out("d_vectors", *d_vectors, "(M, d)", {m, d});
    a.d_shift = dense_out("d_shift", d_shift, a.shift_of_row ? "(B, M, d)" : "(B, d)",
                          shift_shape(a.shift_of_row, batch, m, d));
    a.batch = batch;
    a.n_ctx = m;
    a.d = d;
    a.threads = threads_for(batch * m * d);
    run(&Kernels::assemble_prompts_bwd, a);
}

void assemble_dense(const py::array& context, const py::array& prefix, const py::array& suffix, py::array out) {
    require(context.ndim() == 3 && context.shape(1) >= 1 && context.shape(2) >= 1, "context",
            "have shape (B, M, d) with M, d >= 1", text_of(shape_of(context)));
    require(suffix.ndim() == 3, "suffix", "have shape (K, L - 1 - M, d)", text_of(shape_of(suffix)));
    const int64_t batch = context.shape(0), m = context.shape(1), d = context.shape(2);
    const int64_t n_classes = suffix.shape(0), n_suffix = suffix.shape(1);
    AssembleDense a;
    a.context = dense_in("context", context, "(B, M, d)", {batch, m, d});
    a.prefix = dense_in("prefix", prefix, "(K, d)", {n_classes, d});
    a.suffix = dense_in("suffix", suffix, "(K, L - 1 - M, d)", {n_classes, n_suffix, d});
    a.batch = batch;
    a.n_classes = n_classes;
    a.n_ctx = m;
    a.length = 1 + m + n_suffix;
    a.d = d;
    a.out = dense_out("out", out, "(B, K, L, d)", {batch, n_classes, a.length, d});
    a.threads = threads_for(batch * n_classes * a.length * d);
    run(&Kernels::assemble_dense, a);
}

// ---- head

void head_fwd(const py::array& features, const py::array& image, float scale, py::array logits,
              py::array inverse_norms) {
    require(features.ndim() == 3 && features.shape(2) >= 1, "features", "have shape (B, K, E) with E >= 1",
            text_of(shape_of(features)));
    const int64_t batch = features.shape(0), n_classes = features.shape(1), width = features.shape(2);
    HeadFwd a;
    a.features = rows_in("features", features, {batch * n_classes, width});
    a.image = dense_in("image", image, "(B, E)", {batch, width});
    a.scale = scale;
    a.logits = dense_out("logits", logits, "(B, K)", {batch, n_classes});
    a.inverse_norms = dense_out("inverse_norms", inverse_norms, "(B, K)", {batch, n_classes});
    a.batch = batch;
    a.n_classes = n_classes;
    a.width = width;
    a.threads = threads_for(batch * n_classes * width);
    run(&Kernels::head_fwd, a);
}

void head_bwd(const py::array& features, const py::array& image, float scale, const py::array& logits,
              const py::array& inverse_norms, const py::array& d_logits, py::array d_features) {
    require(features.ndim() == 3 && features.shape(2) >= 1, "features", "have shape (B, K, E) with E >= 1",
            text_of(shape_of(features)));
    const int64_t batch = features.shape(0), n_classes = features.shape(1), width = features.shape(2);
    HeadBwd a;
    a.features = rows_in("features", features, {batch * n_classes, width});
    a.image = dense_in("image", image, "(B, E)", {batch, width});
    a.logits = dense_in("logits", logits, "(B, K)", {batch, n_classes});
    a.inverse_norms = dense_in("inverse_norms", inverse_norms, "(B, K)", {batch, n_classes});
    a.d_logits = dense_in("d_logits", d_logits, "(B, K)", {batch, n_classes});
    a.d_features = rows_out("d_features", d_features, {batch * n_classes, width});
    a.scale = scale;
    a.batch = batch;
    a.n_classes = n_classes;
    a.width = width;
    a.threads = threads_for(batch * n_classes * width);
    run(&Kernels::head_bwd, a);
}

std::vector<int64_t> checked_labels(const py::array& labels, const py::array& logits) {
    require(logits.ndim() == 2 && logits.shape(1) >= 1, "logits", "have shape (B, K) with K >= 1",
            text_of(shape_of(logits)));
    std::vector<int64_t> checked = int64s("labels", labels, "(B,)", logits.shape(0));
    const int64_t last = logits.shape(1) - 1;
    for (size_t b = 0; b < checked.size(); b++) {
        require(checked[b] >= 0 && checked[b] <= last, "labels", "be classes 0 .. " + std::to_string(last),
                std::to_string(checked[b]) + " at " + std::to_string(b));
    }
    return checked;
}

CrossEntropy cross_entropy_inputs(const py::array& logits, const std::vector<int64_t>& labels) {
    CrossEntropy a{};
    a.batch = logits.shape(0);
    a.n_classes = logits.shape(1);
    a.logits = dense_in("logits", logits, "(B, K)", {a.batch, a.n_classes});
    a.labels = labels.data();
    a.threads = threads_for(a.batch * a.n_classes);
    return a;
}

double cross_entropy_fwd(const py::array& logits, const py::array& labels) {
    const std::vector<int64_t> checked = checked_labels(labels, logits);
    CrossEntropy a = cross_entropy_inputs(logits, checked);
    std::vector<double> losses(a.batch);
    a.losses = losses.data();
    run_once(&Kernels::cross_entropy, a);
    double total = 0.0;
    for (const double loss : losses) total += loss;
    return total / (double)a.batch;
}

void cross_entropy_bwd(const py::array& logits, const py::array& labels, double grad_loss, py::array d_logits) {
    const std::vector<int64_t> checked = checked_labels(labels, logits);
    CrossEntropy a = cross_entropy_inputs(logits, checked);
    a.d_logits = dense_out("d_logits", d_logits, "(B, K)", {a.batch, a.n_classes});
    a.grad = (float)(grad_loss / (double)a.batch);
    run_once(&Kernels::cross_entropy, a);
}

// ---- move_rows

// (n,) with 0 <= index < rows, and none of them twice if `distinct`.
std::shared_ptr<const std::vector<int64_t>> checked_index(const py::array& index, int64_t n, int64_t rows,
                                                         bool distinct) {
    std::vector<int64_t> checked = int64s("index", index, "(n,)", n);
    std::unordered_set<int64_t> seen;  // not a mark for each row: of no images there may be 2^60
    for (int64_t i = 0; i < n; i++) {
        const std::string got = std::to_string(checked[i]) + " at " + std::to_string(i);
        require(checked[i] >= 0 && checked[i] < rows, "index", "be rows 0 .. " + std::to_string(rows - 1), got);
        require(!distinct || seen.insert(checked[i]).second, "index", "have no row twice", got);
    }
    return std::make_shared<const std::vector<int64_t>>(std::move(checked));
}

void check_three_dimensions(const std::string& name, const py::array& array) {
    require(array.ndim() == 3 && array.shape(2) >= 1, name, "have shape (B, rows, d) with d >= 1",
            text_of(shape_of(array)));
}

void gather_rows(const py::array& x, const py::array& index, py::array out) {
    check_three_dimensions("x", x);
    require(index.ndim() == 1, "index", "have one dimension", text_of(shape_of(index)));
    const int64_t batch = x.shape(0), rows = x.shape(1), d = x.shape(2), n = index.shape(0);
    check_shape("out", out, "(B, n, d)", {batch, n, d});
    MoveRows a;
    a.from = rows_in("x", x, {batch * rows, d});
    a.to = rows_out("out", out, {batch * n, d});
    const auto checked = checked_index(index, n, rows, false);
    a.index = checked->data();
    a.batch = batch;
    a.n = n;
    a.d = d;
    a.threads = threads_for(batch * n * d);
    run(&Kernels::gather_rows, a, checked);
}

void add_rows(const py::array& x, const py::array& index, py::array out) {
    check_three_dimensions("x", x);
    check_three_dimensions("out", out);
    require(index.ndim() == 1, "index", "have one dimension", text_of(shape_of(index)));
    const int64_t batch = x.shape(0), rows = out.shape(1), d = x.shape(2), n = index.shape(0);
    check_shape("x", x, "(B, n, d)", {batch, n, d});
    check_shape("out", out, "(B, rows, d)", {batch, rows, d});
    MoveRows a;
    a.from = rows_in("x", x, {batch * n, d});
    a.to = rows_out("out", out, {batch * rows, d});
    const auto checked = checked_index(index, n, rows, true);
    a.index = checked->data();
    a.batch = batch;
    a.n = n;
    a.d = d;
    a.threads = threads_for(batch * n * d);
    run(&Kernels::add_rows, a, checked);
}

// ---- peak

double multiply_add_loop(int64_t rounds) {
    require(rounds >= 1, "rounds", "be at least 1", std::to_string(rounds));
    PeakLoop a{};
    a.rounds = rounds;
    a.factor = 0.999f;
    a.term = 0.001f;
    a.threads = threads_for(INT64_MAX);
    std::vector<float> out(a.threads);
    a.out = out.data();
    run_once(&Kernels::multiply_add_loop, a);
    return 2.0 * kernels().peak_chains * kernels().lanes * (double)rounds * a.threads;
}

double read_loop(const py::array& data) {
    require(data.ndim() == 1, "data", "have one dimension", text_of(shape_of(data)));
    PeakLoop a{};
    a.n = data.shape(0);
    a.data = dense_in("data", data, "(n,)", {a.n});
    a.threads = threads_for(a.n);
    std::vector<float> out(a.threads);
    a.out = out.data();
    run_once(&Kernels::read_loop, a);
    double total = 0;
    for (const float part : out) total += part;
    return total;
}

std::string isa() { return kernels().name; }

}  // namespace

void bind_ops(py::module_& m) {
    using py::arg;
    m.def("isa", &isa, "The instruction set whose kernels run.");
    m.def("set_isa", &set_isa, arg("isa"), "Choose the instruction set, one of available_isas().");
    m.def("multiply_add_loop", &multiply_add_loop, arg("rounds"),
          "Multiply-adds of registers on all threads; returns how many FLOPs that were.");
    m.def("read_loop", &read_loop, arg("data"), "Reads n floats on all threads and returns their sum.");
    m.def("available_isas", &available_isas, "The instruction sets that set_isa() takes here, narrowest first.");

    m.def("layer_norm_fwd", &layer_norm_fwd, arg("x"), arg("bias").none(true), arg("residual").none(true),
          arg("gamma"), arg("beta"), arg("eps"), arg("y"), arg("mean"), arg("rstd"),
          "x += bias + residual in place (if they are not None), y = LN(x); mean and rstd of every row.");
    m.def("layer_norm_bwd", &layer_norm_bwd, arg("dy"), arg("x"), arg("gamma"), arg("mean"), arg("rstd"), arg("dx"),
          arg("accumulate") = true, "dx += the gradient of LN's input, or dx = it.");

    m.def("activation_fwd", &activation_fwd, arg("u"), arg("kind"), arg("out"),
          "out = act(u), kind 'quick_gelu' or 'gelu'.");
    m.def("activation_bwd", &activation_bwd, arg("u"), arg("kind"), arg("dg"), "dg *= act'(u).");

    m.def("pack_weight", &pack_weight, arg("weight"), arg("packed"),
          "packed[p, i, c] = weight[32 p + c, i]: (width, k) as linear_fwd and linear_activation_fwd read it.");
    m.def("linear_fwd", &linear_fwd, arg("x"), arg("packed"), arg("bias").none(true), arg("residual").none(true),
          arg("out"), "out = x W^T + bias + residual.");
    m.def("linear_bwd", &linear_bwd, arg("dy"), arg("weight"), arg("dx"), "dx = dy W.");
    m.def("linear_activation_fwd", &linear_activation_fwd, arg("x"), arg("packed"), arg("bias"), arg("kind"),
          arg("u").none(true), arg("out"), "u = x W^T + bias, out = act(u).");
    m.def("linear_activation_bwd", &linear_activation_bwd, arg("dy"), arg("weight"), arg("u"), arg("kind"),
          arg("du"), "du = (dy W) act'(u).");

    py::class_<Recording>(m, "Recording", "Calls of this module, to be made again on the same memory.")
        .def(py::init<>())
        .def("begin", &Recording::begin, "Add what this thread calls from now on. The caller keeps the arrays.")
        .def("end", &Recording::end, "No more.")
        .def("run", &Recording::run, py::call_guard<py::gil_scoped_release>(), "Make all calls again, in order.")
        .def("__len__", &Recording::size);

    py::class_<AttentionPlan>(m, "AttentionPlan",
                              "Which keys each row of a class tree reads, and which rows read each key.")
        .def(py::init(&make_plan), arg("n_ctx"), arg("parent"), arg("queries") = py::none(),
             "n_ctx: M. parent: (N,) integers, nodes in depth-first order, -1 at a root. queries: the query "
             "rows, strictly ascending nodes; None if the context rows and all nodes are.")
        .def_property_readonly("n_ctx", &AttentionPlan::n_ctx, "M.")
        .def_property_readonly("n_nodes", &AttentionPlan::n_nodes, "N.")
        .def_property_readonly("n_queries", &AttentionPlan::n_queries, "Query rows of an image: M + N, or Q.")
        .def("workspace_floats", &workspace_floats, arg("batch"), arg("heads"), arg("head_size"),
             "Size of tree_attention_bwd's workspace.");
    m.def("tree_attention_fwd", &tree_attention_fwd, arg("plan"), arg("q_ctx").none(true), arg("k_ctx"), arg("v_ctx"),
          arg("q_node"), arg("k_node"), arg("v_node"), arg("sos_k"), arg("sos_v"), arg("heads"), arg("o"),
          "o = attention of every query row of the plan.");
    m.def("tree_attention_bwd", &tree_attention_bwd, arg("plan"), arg("grad_o"), arg("q_ctx").none(true),
          arg("k_ctx"), arg("v_ctx"), arg("q_node"), arg("k_node"), arg("v_node"), arg("sos_k"), arg("sos_v"),
          arg("heads"), arg("dq").none(true), arg("dk"), arg("dv"), arg("workspace"), arg("context_only") = false,
          "dq, dk, dv = gradients of the attention's inputs; with context_only, those of the context rows alone.");

    m.def("assemble_prompts_fwd", &assemble_prompts_fwd, arg("vectors").none(true), arg("shift"), arg("position"),
          arg("gamma"), arg("beta"), arg("eps"), arg("x"), arg("y"), arg("mean"), arg("rstd"),
          "x[b, m] = vectors[m] + shift[b, m] + position[m], y = LN(x); shift may be (B, d).");
    m.def("assemble_prompts_bwd", &assemble_prompts_bwd, arg("dx"), arg("d_vectors").none(true), arg("d_shift"),
          "d_vectors = sum of dx over images; d_shift = sum of dx over context rows, or dx.");
    m.def("assemble_dense", &assemble_dense, arg("context"), arg("prefix"), arg("suffix"), arg("out"),
          "out[b, k] = prefix[k], context[b], suffix[k].");

    m.def("head_fwd", &head_fwd, arg("features"), arg("image"), arg("scale"), arg("logits"), arg("inverse_norms"),
          "logits = scale cos(image, features), inverse_norms = 1 / |features|.");
    m.def("head_bwd", &head_bwd, arg("features"), arg("image"), arg("scale"), arg("logits"), arg("inverse_norms"),
          arg("d_logits"), arg("d_features"), "d_features = gradient through the cosines and the scale.");
    m.def("cross_entropy_fwd", &cross_entropy_fwd, arg("logits"), arg("labels"), "The mean cross-entropy.");
    m.def("cross_entropy_bwd", &cross_entropy_bwd, arg("logits"), arg("labels"), arg("grad_loss"), arg("d_logits"),
          "d_logits = (softmax(logits) - one_hot(labels)) grad_loss / B.");

    m.def("gather_rows", &gather_rows, arg("x"), arg("index"), arg("out"), "out[b, i] = x[b, index[i]].");
    m.def("add_rows", &add_rows, arg("x"), arg("index"), arg("out"),
          "out[b, index[i]] += x[b, i]; the indices are distinct.");
}

}  // namespace cocoop_fast
