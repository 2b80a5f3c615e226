// The Python module cocoop_fast._C. The operations are bound in cpu/bind_ops.cpp.
#include <pybind11/pybind11.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/bind_ops.h"
#include "cpu/cpu_features.h"

namespace py = pybind11;
using namespace cocoop_fast;

static py::dict build_info() {
    py::list instruction_sets;
#ifdef COCOOP_FAST_HAVE_AVX2
    instruction_sets.append("avx2");
#endif
#ifdef COCOOP_FAST_HAVE_AVX512
    instruction_sets.append("avx512");
#endif
#ifdef COCOOP_FAST_HAVE_NEON
    instruction_sets.append("neon");
#endif
    py::dict info;
#if defined(__clang__)
    info["compiler"] = "clang";
#else
    info["compiler"] = "gcc";
#endif
    info["version"] = __VERSION__;
    info["cxx_standard"] = (__cplusplus / 100) % 100;  // 201703L is 17
#ifdef _OPENMP
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
    info["instruction_sets"] = instruction_sets;
    return info;
}

static py::dict cpu_features_dict() {
    const CpuFeatures& f = cpu_features();
    py::dict features;
    features["sse2"] = f.sse2;
    features["avx"] = f.avx;
    features["avx2"] = f.avx2;
    features["fma"] = f.fma;
    features["avx512f"] = f.avx512f;
    features["avx512bw"] = f.avx512bw;
    features["avx512dq"] = f.avx512dq;
    features["avx512vl"] = f.avx512vl;
    features["avx512vnni"] = f.avx512vnni;
    features["avx512bf16"] = f.avx512bf16;
    features["neon"] = f.neon;
    return features;
}

static int openmp_max_threads() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

PYBIND11_MODULE(_C, m) {
    m.doc() = "C++ operations of cocoop_fast for the CPU. Import torch first: both then share one OpenMP runtime.";
    m.def("build_info", &build_info,
          "How this module was compiled: compiler, version, cxx_standard, openmp, and the instruction_sets that "
          "variants of the operations exist for.");
    m.def("cpu_features", &cpu_features_dict, "Which instruction sets this processor can execute, by name.");
    m.def("openmp_max_threads", &openmp_max_threads,
          "Threads that a parallel region started now would use; 1 without OpenMP.");
    bind_ops(m);
}
