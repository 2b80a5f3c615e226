#define COCOOP_FAST_TABLE kernels_neon
#define COCOOP_FAST_ISA "neon"
#define COCOOP_FAST_NEON  // compilers for aarch64 define their own macro for the portable file as well
#include "cpu/kernels_impl.h"
