// The Python module cocoop_fast._cuda: the launchers of kernels.h. Addresses come as integers: of rows with their two
// strides, of small arrays with their type. cocoop_fast/ops/cuda.py has checked what is there.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/kernels.h"

#define COCOOP_FAST_TEXT_OF(x) #x
#define COCOOP_FAST_TEXT(x) COCOOP_FAST_TEXT_OF(x)

namespace py = pybind11;
using namespace cocoop_fast;

namespace {

using Address = uintptr_t;
using RowsArgument = std::tuple<Address, int64_t, int64_t>;  // data, image stride, row stride
using PartsArgument = std::tuple<RowsArgument, RowsArgument>;  // context rows, node rows
using ArrayArgument = std::tuple<Address, int32_t>;  // data, dtype
// n_ctx, n_ctx_queries, n_node_queries, path_begin, path, reader_tasks, how many, reduce_tasks, how many
using PlanArgument =
    std::tuple<int32_t, int32_t, int32_t, Address, Address, Address, int32_t, Address, int32_t>;

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

Dtype dtype_of(int32_t number) {
    if (number < 0 || number > static_cast<int32_t>(Dtype::float32)) {
        throw py::value_error("`dtype` must be 0, 1 or 2, got " + std::to_string(number));
    }
    return static_cast<Dtype>(number);
}

template <class Rows>
Rows rows(const RowsArgument& argument) {
    const auto& [data, image_stride, row_stride] = argument;
    return {pointer(data), image_stride, row_stride};
}

template <class Array>
Array array(const ArrayArgument& argument) {
    return {pointer(std::get<0>(argument)), dtype_of(std::get<1>(argument))};
}

AttentionPlan plan(const PlanArgument& argument) {
    const auto& [n_ctx, n_ctx_queries, n_node_queries, path_begin, path, readers, n_readers, reduces, n_reduces] =
        argument;
    return {n_ctx,
            n_ctx_queries,
            n_node_queries,
            pointer<const int32_t>(path_begin),
            pointer<const int32_t>(path),
            pointer<const ReaderTask>(readers),
            n_readers,
            pointer<const ReduceTask>(reduces),
            n_reduces};
}

// The device is the calling thread's current one, as torch left it: the driver's context is common to all runtimes.
template <class Arguments>
void run(cudaError_t (*launcher)(const Arguments*, cudaStream_t), const Arguments& arguments, Address stream) {
    const cudaError_t status = launcher(&arguments, static_cast<cudaStream_t>(pointer(stream)));
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string("a CUDA kernel was not launched: ") + cudaGetErrorString(status));
    }
}

AttentionFwd attention_inputs(const PlanArgument& plan_argument, int32_t dtype, int32_t batch, int32_t heads,
                              int32_t head_size, const PartsArgument& q, const PartsArgument& k,
                              const PartsArgument& v, Address sos_k, Address sos_v) {
    AttentionFwd a;
    a.plan = plan(plan_argument);
    a.dtype = dtype_of(dtype);
    a.batch = batch;
    a.heads = heads;
    a.head_size = head_size;
    a.q_ctx = rows<InRows>(std::get<0>(q));
    a.q_node = rows<InRows>(std::get<1>(q));
    a.k_ctx = rows<InRows>(std::get<0>(k));
    a.k_node = rows<InRows>(std::get<1>(k));
    a.v_ctx = rows<InRows>(std::get<0>(v));
    a.v_node = rows<InRows>(std::get<1>(v));
    a.sos_k = pointer(sos_k);
    a.sos_v = pointer(sos_v);
    a.o = {};
    return a;
}

void tree_attention_fwd(const PlanArgument& plan_argument, int32_t dtype, int32_t batch, int32_t heads,
                        int32_t head_size, const PartsArgument& q, const PartsArgument& k, const PartsArgument& v,
                        Address sos_k, Address sos_v, const RowsArgument& o, Address stream) {
    AttentionFwd a = attention_inputs(plan_argument, dtype, batch, heads, head_size, q, k, v, sos_k, sos_v);
    a.o = rows<OutRows>(o);
    run(&cocoop_fast_tree_attention_fwd, a, stream);
}

void tree_attention_bwd(const PlanArgument& plan_argument, int32_t dtype, int32_t batch, int32_t heads,
                        int32_t head_size, const PartsArgument& q, const PartsArgument& k, const PartsArgument& v,
                        Address sos_k, Address sos_v, const RowsArgument& grad_o, const RowsArgument& dq,
                        int32_t dq_rows, const RowsArgument& dk, const RowsArgument& dv, Address weights,
                        int64_t slots, Address partials, int32_t n_partials, Address stream) {
    AttentionBwd a;
    a.fwd = attention_inputs(plan_argument, dtype, batch, heads, head_size, q, k, v, sos_k, sos_v);
    a.grad_o = rows<InRows>(grad_o);
    a.dq = rows<OutRows>(dq);
    a.dq_rows = dq_rows;
    a.dk = rows<OutRows>(dk);
    a.dv = rows<OutRows>(dv);
    a.weights = pointer<float2>(weights);
    a.slots = slots;
    a.partials = pointer<float>(partials);
    a.n_partials = n_partials;
    run(&cocoop_fast_tree_attention_bwd, a, stream);
}

void assemble_prompts_fwd(int32_t dtype, const ArrayArgument& vectors, const ArrayArgument& shift, bool shift_of_row,
                          const ArrayArgument& position, const ArrayArgument& gamma, const ArrayArgument& beta,
                          const RowsArgument& x, const RowsArgument& y, Address mean, Address rstd, int32_t batch,
                          int32_t n_ctx, int32_t d, float eps, Address stream) {
    AssemblePromptsFwd a;
    a.dtype = dtype_of(dtype);
    a.vectors = array<InArray>(vectors);
    a.shift = array<InArray>(shift);
    a.shift_of_row = shift_of_row;
    a.position = array<InArray>(position);
    a.gamma = array<InArray>(gamma);
    a.beta = array<InArray>(beta);
    a.x = rows<OutRows>(x);
    a.y = rows<OutRows>(y);
    a.mean = pointer<float>(mean);
    a.rstd = pointer<float>(rstd);
    a.batch = batch;
    a.n_ctx = n_ctx;
    a.d = d;
    a.eps = eps;
    run(&cocoop_fast_assemble_prompts_fwd, a, stream);
}

void assemble_prompts_bwd(int32_t dtype, const RowsArgument& dx, const ArrayArgument& d_vectors,
                          const ArrayArgument& d_shift, bool shift_of_row, int32_t batch, int32_t n_ctx, int32_t d,
                          Address stream) {
    AssemblePromptsBwd a;
    a.dtype = dtype_of(dtype);
    a.dx = rows<InRows>(dx);
    a.d_vectors = array<OutArray>(d_vectors);
    a.d_shift = array<OutArray>(d_shift);
    a.shift_of_row = shift_of_row;
    a.batch = batch;
    a.n_ctx = n_ctx;
    a.d = d;
    run(&cocoop_fast_assemble_prompts_bwd, a, stream);
}

void assemble_dense(Address context, Address prefix, Address suffix, Address out, int32_t batch, int32_t n_classes,
                    int32_t n_ctx, int32_t length, int64_t row_bytes, Address stream) {
    AssembleDense a;
    a.context = pointer(context);
    a.prefix = pointer(prefix);
    a.suffix = pointer(suffix);
    a.out = pointer(out);
    a.batch = batch;
    a.n_classes = n_classes;
    a.n_ctx = n_ctx;
    a.length = length;
    a.row_bytes = row_bytes;
    run(&cocoop_fast_assemble_dense, a, stream);
}

py::dict build_info() {
    py::dict info;
    info["toolkit"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
    info["architectures"] = COCOOP_FAST_TEXT(COCOOP_FAST_CUDA_ARCHITECTURES);
    return info;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    using py::arg;
    m.doc() = "CUDA operations of cocoop_fast. Loads without a GPU or its driver; only a launch needs them.";
#ifdef COCOOP_FAST_EMULATED
    m.attr("DEVICE_TYPE") = "cpu";  // of the tensors that the kernels take
#else
    m.attr("DEVICE_TYPE") = "cuda";
#endif
    m.attr("MAX_HEAD_SIZE") = kMaxHeadSize;
    m.attr("MAX_GRID") = kMaxGrid;
    m.attr("MAX_WIDTH") = kMaxWidth;
    m.def("build_info", &build_info,
          "How this module was compiled: the CUDA toolkit, and the compute capabilities in its machine code.");
    m.def("tree_attention_fwd", &tree_attention_fwd, arg("plan"), arg("dtype"), arg("batch"), arg("heads"),
          arg("head_size"), arg("q"), arg("k"), arg("v"), arg("sos_k"), arg("sos_v"), arg("o"),
          arg("stream"));
    m.def("tree_attention_bwd", &tree_attention_bwd, arg("plan"), arg("dtype"), arg("batch"), arg("heads"),
          arg("head_size"), arg("q"), arg("k"), arg("v"), arg("sos_k"), arg("sos_v"), arg("grad_o"), arg("dq"),
          arg("dq_rows"), arg("dk"), arg("dv"), arg("weights"), arg("slots"), arg("partials"), arg("n_partials"),
          arg("stream"));
    m.def("assemble_prompts_fwd", &assemble_prompts_fwd, arg("dtype"), arg("vectors"), arg("shift"),
          arg("shift_of_row"), arg("position"), arg("gamma"), arg("beta"), arg("x"), arg("y"), arg("mean"),
          arg("rstd"), arg("batch"), arg("n_ctx"), arg("d"), arg("eps"), arg("stream"));
    m.def("assemble_prompts_bwd", &assemble_prompts_bwd, arg("dtype"), arg("dx"), arg("d_vectors"), arg("d_shift"),
          arg("shift_of_row"), arg("batch"), arg("n_ctx"), arg("d"), arg("stream"));
    m.def("assemble_dense", &assemble_dense, arg("context"), arg("prefix"), arg("suffix"), arg("out"), arg("batch"),
          arg("n_classes"), arg("n_ctx"), arg("length"), arg("row_bytes"), arg("stream"));
}
