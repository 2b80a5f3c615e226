// All kernels, compiled once for each instruction set: kernels_<isa>.cpp includes this and nothing else.
//
// Everything is in an anonymous namespace and nothing of the C++ library is called, so that no function compiled for
// one instruction set can be linked into the code of another.
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif
#ifdef COCOOP_FAST_NEON
#include <arm_neon.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

// clang-format off: each header uses the ones above it
#include "cpu/vec.h"
#include "cpu/vec_math.h"
#include "cpu/layer_norm.h"
#include "cpu/activation.h"
#include "cpu/linear.h"
#include "cpu/tree_attention.h"
#include "cpu/assemble_prompts.h"
#include "cpu/head.h"
#include "cpu/move_rows.h"
#include "cpu/peak.h"
// clang-format on

namespace cocoop_fast {

extern const Kernels COCOOP_FAST_TABLE;
const Kernels COCOOP_FAST_TABLE = {
    COCOOP_FAST_ISA,      kLanes,               kPeakChains,        layer_norm_fwd,     layer_norm_bwd,
    activation_fwd,       activation_bwd,       linear,             pack_weight,        tree_attention_fwd,
    tree_attention_bwd,   assemble_prompts_fwd, assemble_prompts_bwd, assemble_dense,   head_fwd,
    head_bwd,             cross_entropy,        gather_rows,        add_rows,           multiply_add_loop,
    read_loop,
};

}  // namespace cocoop_fast
