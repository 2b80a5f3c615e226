#define COCOOP_FAST_TABLE kernels_avx2
#define COCOOP_FAST_ISA "avx2"
#include "cpu/kernels_impl.h"
