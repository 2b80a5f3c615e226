#define COCOOP_FAST_TABLE kernels_portable
#define COCOOP_FAST_ISA "portable"
#include "cpu/kernels_impl.h"
