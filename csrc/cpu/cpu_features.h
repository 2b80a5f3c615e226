// What the processor that runs this code can execute, whatever the code was compiled for.
#pragma once

namespace cocoop_fast {

struct CpuFeatures {
    bool sse2 = false;
    bool avx = false;
    bool avx2 = false;
    bool fma = false;
    bool avx512f = false;
    bool avx512bw = false;
    bool avx512dq = false;
    bool avx512vl = false;
    bool avx512vnni = false;
    bool avx512bf16 = false;
    bool neon = false;

    // What the sources named *_avx2.cpp and *_avx512.cpp are compiled with (INSTRUCTION_SETS in setup.py).
    bool runs_avx2() const { return avx2 && fma; }
    bool runs_avx512() const { return runs_avx2() && avx512f && avx512bw && avx512dq && avx512vl; }
    bool runs_neon() const { return neon; }
};

// Detected at the first call. A feature counts only if the operating system saves its registers too.
const CpuFeatures& cpu_features();

}  // namespace cocoop_fast
