#define COCOOP_FAST_TABLE kernels_avx512
#define COCOOP_FAST_ISA "avx512"
#include "cpu/kernels_impl.h"
